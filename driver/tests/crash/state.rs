//! Describes what a driver has made of a node and of the API, without what differs from run to run.

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt as _, path::Path};

use serde_json::{Value, json};

use crate::node::{NOTES, Node, STATUSES};

/// The state of all things, by their names.
pub(crate) type State = BTreeMap<String, String>;

/// What a test itself puts into the directory of a node.
const OF_THE_TEST: [&str; 8] = [
    NOTES,
    "api",
    "kubeconfig",
    "kubelet",
    "log",
    "registration",
    "store.yaml",
    "test.sock",
];

/// Describes a node, and the objects that its driver writes.
pub(crate) fn state(node: &Node) -> State {
    let mut state = node_state(node);
    let target = node.target();
    if let Err(error) = files(&target, "", &mut state) {
        state.insert("volume".to_owned(), error.to_string());
    }
    let api = node.api();
    let statuses = api.all(STATUSES);
    let uids: Vec<String> = statuses
        .iter()
        .filter_map(|status| status["metadata"]["uid"].as_str().map(str::to_owned))
        .collect();
    for (kind, objects) in [("pod status", statuses), ("Secret", api.all("secrets"))] {
        for object in objects {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let text = serde_json::to_string_pretty(&plain(object.clone())).unwrap();
            let text = text.replace(&node.path().display().to_string(), "");
            // As an owner of the Secret.
            let text = uids
                .iter()
                .fold(text, |text, uid| text.replace(uid, "UID OF A POD STATUS"));
            state.insert(format!("{kind} {name}"), text);
        }
    }
    for event in api.all("events") {
        let reason = event["reason"].as_str().unwrap_or_default();
        // It tells of a change that this driver has seen. One that a driver was killed over stands on the
        // pod status only.
        if reason == "MountContentChanged" {
            continue;
        }
        state.insert(format!("event {reason}"), String::new());
    }
    state
}

/// Describes what a driver has made of a node, except for what is in the volume.
pub(crate) fn node_state(node: &Node) -> State {
    let mut state = State::new();
    let root = node.path();
    for mount in mounts_below(root) {
        *state.entry(format!("mount {mount}")).or_default() += "once ";
    }
    list(root, &|name| OF_THE_TEST.contains(&name), &mut state);
    for directory in ["state", "registration"] {
        list(&root.join(directory), &|name| name == NOTES, &mut state);
    }
    list(node.target().parent().unwrap(), &|_| false, &mut state);
    state.retain(|name, _| name != "entry state");
    state
}

/// Lists a directory.
fn list(directory: &Path, without: &dyn Fn(&str) -> bool, state: &mut State) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !without(&name) {
            let mode = entry.metadata().map_or(0, |metadata| metadata.mode());
            state.insert(format!("entry {name}"), format!("{mode:o}"));
        }
    }
}

/// Describes the mounts below a directory.
fn mounts_below(root: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = root.to_str().unwrap();
    let mounts = table.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let point = mount.get(4)?.strip_prefix(root)?;
        let file_system: Vec<&str> = file_system.split(' ').collect();
        let [kind, _source, options] = file_system.as_slice() else {
            return None;
        };
        Some(format!("{point} {} {kind} {options}", mount.get(5)?))
    });
    mounts.collect()
}

/// Returns how the mount of the volume is not as safe as it should be, or that there are several, or none.
pub(crate) fn wrong_mount(node: &Node) -> Option<String> {
    let target = node.target();
    let target = target.strip_prefix(node.path()).unwrap().to_str().unwrap();
    let mounts = mounts_below(node.path()).into_iter();
    let on_it = mounts.filter(|mount| mount.split(' ').next() == Some(&format!("/{target}")));
    let on_it: Vec<String> = on_it.collect();
    let [mount] = &on_it[..] else {
        return Some(format!("these are mounted at the target: {on_it:?}"));
    };
    let options = mount.split(' ').nth(1).unwrap_or_default();
    let has = |option: &&str| options.split(',').any(|one| one == *option);
    let lacks = ["nosuid", "nodev", "noexec"]
        .into_iter()
        .find(|option| !has(option));
    lacks.map(|option| format!("the volume is mounted without {option}: {mount}"))
}

/// Describes all that lies in a volume.
fn files(directory: &Path, prefix: &str, state: &mut State) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let (entry, mut name) = {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            (entry, name)
        };
        if name.starts_with("..2") {
            "..TIME".clone_into(&mut name);
        }
        let path = format!("{prefix}/{name}");
        let metadata = entry.metadata()?;
        let what = if metadata.is_symlink() {
            let leads = fs::read_link(entry.path())?.display().to_string();
            let leads = if leads.starts_with("..2") {
                "..TIME"
            } else {
                &leads
            };
            format!("leads to {leads}")
        } else if metadata.is_dir() {
            files(&entry.path(), &path, state)?;
            "directory".to_owned()
        } else {
            String::from_utf8_lossy(&fs::read(entry.path())?).into_owned()
        };
        let (mode, uid, gid) = (metadata.mode(), metadata.uid(), metadata.gid());
        let file = state.entry(format!("file {path}")).or_default();
        *file += &format!("{mode:o} {uid}:{gid} {what}");
    }
    Ok(())
}

/// Returns an object without what the API server and clocks put into it.
fn plain(mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for of_the_server in [
            "uid",
            "resourceVersion",
            "creationTimestamp",
            "managedFields",
            "generation",
        ] {
            metadata.remove(of_the_server);
        }
        let annotations = metadata.get_mut("annotations");
        for (key, value) in annotations
            .and_then(Value::as_object_mut)
            .into_iter()
            .flatten()
        {
            // Content that is written once more counts as a change, and is a newer one.
            if ["/content-order", "/content-changes", "/class-generation"]
                .iter()
                .any(|of| key.ends_with(of))
            {
                *value = json!("NUMBER");
            }
        }
    }
    without_times(&mut object);
    object
}

fn without_times(value: &mut Value) {
    match value {
        Value::String(text) => {
            let bytes = text.as_bytes();
            if bytes.len() >= 20 && bytes[4] == b'-' && bytes[10] == b'T' && text.ends_with('Z') {
                "TIME".clone_into(text);
            }
        }
        Value::Array(all) => all.iter_mut().for_each(without_times),
        Value::Object(all) => all.values_mut().for_each(without_times),
        _ => {}
    }
}

/// Returns how two states differ.
pub(crate) fn difference(expected: &State, found: &State) -> Option<String> {
    let names: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let lines: Vec<String> = names
        .into_iter()
        .filter(|name| expected.get(*name) != found.get(*name))
        .map(|name| {
            let shown = |state: &State| {
                state
                    .get(name)
                    .map_or("not there", |s| &s[..s.len().min(2000)])
                    .to_owned()
            };
            format!(
                "{name}:\n  undisturbed: {}\n  here: {}",
                shown(expected),
                shown(found)
            )
        })
        .collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}
