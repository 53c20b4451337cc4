//! Short runs in which everything goes wrong that can: `cargo run -p e2e -- chaos` runs longer ones.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::Command;
use std::time::Duration;

use e2e::chaos::{Options, Schedule, Site, fresh_seed, run};
use rstest::rstest;
use tokio::sync::Mutex;

/// Held by the run whose turn it is: the bounds are for one cluster on the machine.
static TURN: Mutex<()> = Mutex::const_new(());

#[rstest]
#[case::with_a_long_fault(1)]
#[case::with_a_hostile_tenant(2)]
#[case::with_faults_of_all_kinds(3)]
#[case::fresh(fresh_seed())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_driver_keeps_its_promises_whatever_goes_wrong(#[case] seed: u64) {
    let _turn = TURN.lock().await;
    let options = Options {
        schedule: Schedule::of_minutes(seed, 0.4, Site::Embedded.nodes()),
        limit: Duration::from_secs(24),
        reductions: 3,
        verbose: false,
    };
    let is_good = run(Site::Embedded, &options)
        .await
        .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    assert!(
        is_good,
        "seed {seed}: the driver broke a promise, see above"
    );
}

/// `e2e chaos --dry-run | head`: whoever reads it has gone before it is written.
#[test]
fn a_reader_that_goes_ends_the_command_quietly() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_e2e"))
        .args(["chaos", "--dry-run", "--seed=1"])
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(141));
}
