//! Keeps the rooms of the driver apart: who may use whom, and where protobuf, the kube crate
//! and system calls stop. The picture is in `src/lib.rs`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// For each room, the rooms that it may use. `record` and `resources` are rooms of their own.
const MAY_USE: [(&str, &[&str]); 18] = [
    (
        "csi",
        &[
            "config", "error", "files", "metrics", "record", "secret", "socket", "volume",
        ],
    ),
    (
        "volume",
        &[
            "cluster", "config", "error", "files", "memory", "metrics", "mount", "provider",
            "record", "secret", "sync",
        ],
    ),
    ("record", &[]),
    (
        "sync",
        &[
            "cluster",
            "error",
            "files",
            "metrics",
            "mount",
            "record",
            "resources",
            "secret",
            "turns",
        ],
    ),
    (
        "cluster",
        &["error", "record", "resources", "secret", "turns"],
    ),
    ("resources", &[]),
    (
        "provider",
        &["error", "files", "metrics", "record", "secret"],
    ),
    ("memory", &["files", "mount"]),
    ("mount", &[]),
    ("files", &["secret"]),
    ("secret", &[]),
    ("turns", &[]),
    ("error", &[]),
    ("config", &[]),
    ("logging", &["config"]),
    ("metrics", &["config", "socket"]),
    ("registration", &["socket"]),
    ("socket", &[]),
];

/// Crates that stop at certain rooms.
const CONFINED: [(&str, &[&str]); 5] = [
    ("proto", &["csi", "provider", "metrics", "registration"]),
    ("kube", &["cluster", "resources"]),
    ("k8s_openapi", &["cluster", "resources"]),
    ("nix", &["mount", "files", "socket"]),
    ("libc", &["metrics"]),
];

/// The code of each room, without tests and comments.
fn rooms() -> BTreeMap<String, String> {
    fn read(directory: &Path, rooms: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, rooms);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let relative = path.strip_prefix(root()).unwrap().with_extension("");
            let names: Vec<_> = relative.iter().map(|n| n.to_str().unwrap()).collect();
            let room = match names.as_slice() {
                ["volume", "record", ..] => "record",
                ["cluster", "resources"] => "resources",
                ["main" | "lib"] => continue,
                [room, ..] => room,
                [] => unreachable!(),
            };
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            let code: String = code
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .fold(String::new(), |all, line| all + line + "\n");
            rooms.entry(room.to_owned()).or_default().push_str(&code);
        }
    }
    let mut rooms = BTreeMap::new();
    read(root(), &mut rooms);
    rooms
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
}

/// The rooms that some code names: `crate::x`, and each `x` of a grouped `use crate::{...}`.
fn used(code: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for (start, _) in code.match_indices("crate::") {
        let rest = &code[start + "crate::".len()..];
        let mut depth = 0;
        let mut path = String::new();
        for c in rest.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                c if depth == 0 && ";(),<> \n".contains(c) => break,
                _ => {}
            }
            path.push(c);
        }
        let inner = path.strip_prefix('{').unwrap_or(&path);
        let mut level = 0;
        for part in inner.split_inclusive([',', '{', '}']) {
            if level == 0 {
                let part = part.trim();
                let mut names = part.trim_end_matches([',', '{', '}']).split("::");
                let room = match (names.next().unwrap_or(""), names.next()) {
                    ("volume", Some("record")) => "record",
                    ("cluster", Some("resources")) => "resources",
                    (first, _) => first,
                };
                if !room.is_empty() {
                    used.insert(room.to_owned());
                }
            }
            level += part.matches('{').count() as i32 - part.matches('}').count() as i32;
        }
    }
    used
}

#[test]
fn a_room_uses_only_the_rooms_below_it() {
    let allowed: BTreeMap<_, _> = MAY_USE.into_iter().collect();
    for (room, code) in rooms() {
        let may = allowed
            .get(room.as_str())
            .unwrap_or_else(|| panic!("{room} is not in the picture"));
        for other in used(&code) {
            assert!(
                other == room || may.contains(&other.as_str()),
                "{room} must not use {other}"
            );
        }
    }
}

#[test]
fn foreign_types_stop_where_they_should() {
    let rooms = rooms();
    for (name, allowed) in CONFINED {
        for (room, code) in &rooms {
            let mentions = code.lines().any(|line| {
                let line = line.trim_start();
                line.starts_with(&format!("use {name}::"))
                    || line.contains(&format!(" {name}::"))
                    || line.contains(&format!("({name}::"))
                    || line.contains(&format!("<{name}::"))
            });
            assert!(
                !mentions || allowed.contains(&room.as_str()),
                "{room} must not use {name}"
            );
        }
    }
}

#[test]
fn the_reader_of_uses_reads_what_is_written_here() {
    let code = "use crate::{\n    config::{A, B},\n    error::{Error, Result},\n    volume::record::Pod,\n};\nlet x = crate::files::File::new(crate::secret::S);\n";
    let expected = ["config", "error", "files", "record", "secret"].map(String::from);
    assert_eq!(used(code), BTreeSet::from(expected));
}
