use super::*;
use proptest::prelude::*;
use rstest::rstest;
use serde_json::json;

fn all(records: &Records) -> Vec<Record> {
    let mut all = Vec::new();
    records.each(|record| all.push(record)).unwrap();
    all
}

#[rstest]
#[case::kubelets("csi-0123abc")]
#[case::hostile("../../etc/passwd")]
#[case::long(&"x".repeat(5000))]
#[case::empty("")]
fn what_was_put_is_got_until_removed(#[case] volume_id: &str) {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path().join("a/b")).unwrap();
    let record = Record::example(volume_id, "/t/mount");
    assert_eq!(records.get(volume_id), None);
    records.put(&record).unwrap();
    assert_eq!(records.get(volume_id), Some(record.clone()));
    assert_eq!(all(&records), [record]);
    assert_eq!(
        fs::read_dir(dir.path().join("a/b")).unwrap().count(),
        1,
        "nothing beside it"
    );
    records.remove(volume_id).unwrap();
    records.remove(volume_id).unwrap();
    assert_eq!(records.get(volume_id), None);
}

#[test]
fn a_staged_record_is_none_and_keeps_the_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut record = Record::example("csi-1", "/t/mount");
    drop(records.stage(&record).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    records.put(&record).unwrap();
    let before = record.clone();
    record.provider = "azure".into();
    let staged = records.stage(&record).unwrap();
    assert_eq!(records.get("csi-1"), Some(before.clone()));
    assert_eq!(all(&records), [before]);
    record.pod_status = "p".repeat(253);
    staged.commit(&record).unwrap();
    assert_eq!(records.get("csi-1"), Some(record));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// As on a disk that became read-only after it was staged.
#[test]
fn a_staged_record_that_could_not_be_removed_is_removed_with_the_next_change() {
    let dir = tempfile::tempdir().unwrap();
    let away = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path().join("records")).unwrap();
    let count = || fs::read_dir(dir.path().join("records")).unwrap().count();
    for change in ["remove", "stage"] {
        let staged = records.stage(&Record::example("csi-1", "/t/mount"));
        let staged = staged.unwrap();
        // A file in the place of the directory: nothing below it can be removed.
        let hidden = away.path().join("records");
        fs::rename(dir.path().join("records"), &hidden).unwrap();
        fs::write(dir.path().join("records"), "").unwrap();
        drop(staged);
        fs::remove_file(dir.path().join("records")).unwrap();
        fs::rename(&hidden, dir.path().join("records")).unwrap();
        assert_eq!(count(), 1, "it stayed");
        match change {
            "remove" => records.remove("csi-2").unwrap(),
            _ => drop(
                records
                    .stage(&Record::example("csi-2", "/t/mount"))
                    .unwrap(),
            ),
        }
        assert_eq!(count(), 0, "after {change}");
    }
}

#[test]
fn a_record_that_is_too_large_is_refused_and_the_earlier_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let small = Record::example("csi-1", "/t/mount");
    records.put(&small).unwrap();
    let mut large = small.clone();
    large.objects[0].version = "v".repeat(5 << 20);
    let error = records.put(&large).unwrap_err().to_string();
    assert!(
        error.contains("vault") && error.contains("too many objects"),
        "{error}"
    );
    assert_eq!(records.get("csi-1"), Some(small));
}

#[test]
fn a_record_of_an_earlier_driver_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut filed = serde_json::to_value(Filed {
        format: FORMAT,
        record: &Record::example("csi-1", "/t/mount"),
    })
    .unwrap();
    for new in ["lastChange", "failingSince", "orders"] {
        filed.as_object_mut().unwrap().remove(new).unwrap();
    }
    filed["class"]
        .as_object_mut()
        .unwrap()
        .remove("annotations");
    fs::write(dir.path().join("csi-1.json"), filed.to_string()).unwrap();
    assert_eq!(records.get("csi-1").unwrap().failing_since, None);
    // Earlier drivers had a number of files in the place of their names.
    for files in [
        json!(4),
        json!(null),
        json!({"files": 4}),
        json!("x"),
        json!([]),
    ] {
        filed["files"] = files;
        fs::write(dir.path().join("csi-1.json"), filed.to_string()).unwrap();
        assert_eq!(records.get("csi-1").unwrap().files, None);
    }
}

#[test]
fn orphans_are_records_whose_volume_directory_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let pods = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    records
        .put(&Record::example("csi-here", pods.path().join("mount")))
        .unwrap();
    records
        .put(&Record::example("csi-gone", pods.path().join("gone/mount")))
        .unwrap();
    fs::write(dir.path().join("csi-x.tmp"), "half").unwrap();
    assert_eq!(records.remove_orphans().unwrap(), 2);
    assert!(records.get("csi-here").is_some());
    assert!(records.get("csi-gone").is_none());
}

/// Something other than a record, at the place of a record.
#[derive(Debug, Clone)]
enum Trash {
    Bytes(Vec<u8>),
    /// The beginning of a record.
    Torn(prop::sample::Index),
    Format(u32),
    OfAnother,
    /// A whole record in which one of these fields has a value that is no name of an object, or no
    /// target of a volume.
    Hostile(&'static str, &'static str),
    /// Longer than any record.
    Sparse,
    Directory,
    LinkInto,
    DanglingLink,
    Pipe,
}

/// The fields of a record that are names of objects, and values that are no such names.
const PLACES: [&str; 4] = ["/pod/name", "/pod/namespace", "/class/name", "/podStatus"];
const NO_NAMES: [&str; 8] = ["", "..", "../../x", "a/b", "a?b", "A", "a%2fb", "-a"];
const NO_TARGETS: [&str; 3] = ["/etc", "relative/mount", "/pods/../mount"];

fn trash() -> impl Strategy<Value = Trash> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Trash::Bytes),
        any::<prop::sample::Index>().prop_map(Trash::Torn),
        (2_u32..).prop_map(Trash::Format),
        Just(Trash::OfAnother),
        (
            prop::sample::select(&PLACES[..]),
            prop::sample::select(&NO_NAMES[..])
        )
            .prop_map(|(place, name)| Trash::Hostile(place, name)),
        (prop::sample::select(&NO_TARGETS[..]))
            .prop_map(|target| Trash::Hostile("/targetPath", target)),
        Just(Trash::Sparse),
        Just(Trash::Directory),
        Just(Trash::LinkInto),
        Just(Trash::DanglingLink),
        Just(Trash::Pipe),
    ]
}

impl Trash {
    fn put(&self, at: &Path, whole: &Record) {
        let filed = |format| {
            serde_json::to_vec(&Filed {
                format,
                record: whole,
            })
            .unwrap()
        };
        match self {
            Self::Bytes(bytes) => fs::write(at, bytes).unwrap(),
            Self::Torn(end) => {
                let bytes = filed(FORMAT);
                fs::write(at, &bytes[..end.index(bytes.len())]).unwrap();
            }
            Self::Format(format) => fs::write(at, filed(*format)).unwrap(),
            Self::OfAnother => {
                let other = Record {
                    volume_id: "csi-other".into(),
                    ..whole.clone()
                };
                let format = FORMAT;
                let record = &other;
                fs::write(at, serde_json::to_vec(&Filed { format, record }).unwrap()).unwrap();
            }
            Self::Hostile(place, name) => {
                let mut filed: serde_json::Value = serde_json::from_slice(&filed(FORMAT)).unwrap();
                *filed.pointer_mut(place).unwrap() = (*name).into();
                fs::write(at, filed.to_string()).unwrap();
            }
            Self::Sparse => fs::File::create(at).unwrap().set_len(1 << 40).unwrap(),
            Self::Directory => {
                fs::create_dir(at).unwrap();
                fs::write(at.join("in it"), "x").unwrap();
            }
            Self::LinkInto => {
                std::os::unix::fs::symlink(at.parent().unwrap().join("kept.txt"), at).unwrap();
            }
            Self::DanglingLink => std::os::unix::fs::symlink("nowhere", at).unwrap(),
            Self::Pipe => {
                nix::unistd::mkfifo(at, nix::sys::stat::Mode::S_IRWXU).unwrap();
            }
        }
    }
}

proptest! {
    /// Trash at the place of a record, and beside it, disturbs nothing, and is gone after the next
    /// record or the next start.
    #[test]
    fn what_is_no_record_is_in_nobodys_way(
        at_record in proptest::option::of(trash()),
        at_tmp in proptest::option::of(trash()),
        then in 0..3,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let pods = tempfile::tempdir().unwrap();
        let below = pods.path().to_owned();
        let is_target = move |record: &Record| {
            let is_below = record.target_path.starts_with(&below);
            is_below.then_some(()).ok_or_else(|| "its target is elsewhere".to_owned())
        };
        let records = Records::open(dir.path()).unwrap().checked_by(is_target);
        fs::write(dir.path().join("kept.txt"), "x").unwrap();
        fs::write(dir.path().join("package.json"), "somebody else's").unwrap();
        let neighbour = Record::example("csi-2", pods.path().join("mount"));
        records.put(&neighbour).unwrap();
        let whole = Record::example("csi-1", pods.path().join("mount"));
        for (trash, name) in [(&at_record, "csi-1.json"), (&at_tmp, "csi-1.tmp")] {
            if let Some(trash) = trash {
                trash.put(&dir.path().join(name), &whole);
            }
        }
        prop_assert_eq!(records.get("csi-1"), None);
        prop_assert_eq!(all(&records), [neighbour.clone()]);
        let mut expected = vec!["csi-2.json", "kept.txt", "package.json"];
        match then {
            0 => {
                let trash = usize::from(at_record.is_some()) + usize::from(at_tmp.is_some());
                prop_assert_eq!(records.remove_orphans().unwrap(), trash);
            }
            1 => {
                records.put(&whole).unwrap();
                records.remove_orphans().unwrap();
                prop_assert_eq!(records.get("csi-1"), Some(whole));
                expected.insert(0, "csi-1.json");
            }
            _ => {
                records.remove("csi-1").unwrap();
                records.remove_orphans().unwrap();
            }
        }
        let mut left: Vec<String> = fs::read_dir(dir.path()).unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        prop_assert_eq!(left, expected);
        prop_assert_eq!(records.get("csi-2"), Some(neighbour));
    }
}
