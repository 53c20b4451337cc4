//! Searches for inputs that reach new code, with libFuzzer. `.ci/fuzz` builds it and runs it for each
//! target. The environment variable `FUZZ_TARGET` names the target.

#![no_main]
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::expect_used,
    reason = "code of the macro; a program that cannot start ends"
)]

use std::{env, sync::LazyLock};

use driver::fuzz::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = env::var("FUZZ_TARGET").expect("FUZZ_TARGET names no target");
    let mut targets = TARGETS.iter();
    targets
        .find(|target| target.name == name)
        .expect("there is no target of the name in FUZZ_TARGET")
});

fuzz_target!(|input: &[u8]| (TARGET.run)(input));
