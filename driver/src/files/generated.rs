//! Generates payloads for tests: of one to two hundred files, with every character that a path may
//! hold, and with names that are prefixes of one another.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{File, Payload};

/// The contents and modes of files by path.
pub(super) type Files = BTreeMap<String, (Vec<u8>, i32)>;

/// Generates a name at one level. Most are made of few beginnings and endings, so that they meet. The
/// endings sort before and after the slash.
fn name() -> impl Strategy<Value = String> {
    const BEGINNINGS: [&str; 6] = ["a", "app", "db", "tls", ".env", "ä"];
    const ENDINGS: [&str; 16] = [
        "", "-", "-admin", ".", ".crt", ".json", "+", " ", "!", "\u{1}", "\n", "0", "_", "~", "é",
        "😀",
    ];
    let met = (
        prop::sample::select(&BEGINNINGS[..]),
        prop::sample::select(&ENDINGS[..]),
    )
        .prop_map(|(beginning, ending)| format!("{beginning}{ending}"));
    let any = prop::collection::vec(any::<char>(), 1..12)
        .prop_map(|chars| chars.into_iter().collect::<String>())
        .prop_filter("not a name", |name| {
            !name.contains(['/', '\0']) && !name.starts_with("..") && name != "."
        });
    prop_oneof![8 => met, 2 => any, 1 => Just("n".repeat(255))]
}

fn path() -> impl Strategy<Value = String> {
    let deep = prop::collection::vec(prop::sample::select(&["a", "d", "d-"][..]), 20..=32);
    prop_oneof![
        30 => prop::collection::vec(name(), 1..5).prop_map(|names| names.join("/")),
        1 => deep.prop_map(|names| names.join("/")),
    ]
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        10 => prop::collection::vec(any::<u8>(), 0..40),
        1 => (4094_usize..8200, any::<u8>()).prop_map(|(length, byte)| vec![byte; length]),
    ]
}

/// Generates the files of a volume, without those whose paths others need to be directories.
pub(super) fn files() -> impl Strategy<Value = Files> {
    let mode = prop::sample::select(&[0, 0o400, 0o440, 0o640, 0o604, 0o777][..]);
    let file = (path(), (content(), mode)).boxed();
    prop_oneof![
        4 => prop::collection::vec(file.clone(), 1..8),
        1 => prop::collection::vec(file, 1..=200),
    ]
    .prop_map(|files| {
        let mut kept = Files::new();
        for (path, file) in files {
            let below = format!("{path}/");
            let meets = |other: &String| {
                *other == path
                    || other.starts_with(&below)
                    || path.starts_with(&format!("{other}/"))
            };
            if !kept.keys().any(meets) {
                kept.insert(path, file);
            }
        }
        kept
    })
}

/// Returns the payload of such files.
pub(super) fn payload(files: &Files) -> Payload {
    let files = files
        .iter()
        .map(|(path, (content, mode))| (path.clone(), File::new(*mode, content.clone())));
    Payload::new(files).unwrap()
}
