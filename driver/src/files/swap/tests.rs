use super::*;
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::{SigHandler, Signal, signal},
};
use proptest::prelude::*;
use rstest::rstest;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{
    files::{
        Access, File,
        generated::{self, Files},
        layout::{self, is_complete},
        tree::open_root,
    },
    mount::alone::{Own, alone},
};

fn stage(volume: &Path, payload: Payload) -> io::Result<Option<StagedContent>> {
    super::stage(open_root(volume)?, payload)
}

fn remove(volume: &Path, former: &Former) -> io::Result<()> {
    super::remove(&open_root(volume)?, former)
}

#[derive(Debug, PartialEq, Eq)]
enum Change {
    Unchanged,
    Replaced,
}

/// Stages, commits, and removes the former content.
fn replace(volume: &Path, payload: &Payload) -> io::Result<Change> {
    let Some(staged) = stage(volume, payload.clone())? else {
        return Ok(Change::Unchanged);
    };
    if let Some(former) = staged.commit()? {
        remove(volume, &former)?;
    }
    Ok(Change::Replaced)
}

type Tree<'a> = &'a [(&'a str, &'a str, i32)];

fn payload(tree: Tree<'_>) -> Payload {
    let file = |(path, text, mode): &(&str, &str, i32)| {
        (
            (*path).to_owned(),
            File::new(*mode, text.as_bytes().to_vec()),
        )
    };
    Payload::new(tree.iter().map(file)).unwrap()
}

/// Returns everything that a reader finds by following links, with mode and content.
fn seen(volume: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    fn walk(base: &Path, at: &Path, found: &mut BTreeMap<String, (u32, Vec<u8>)>) {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(at).unwrap().to_str().unwrap();
            if name.starts_with("..") {
                continue;
            }
            let metadata = fs::metadata(&path).unwrap();
            let mode = metadata.permissions().mode() & 0o7777;
            if metadata.is_dir() {
                assert_eq!(mode, 0o755, "{}", path.display());
                walk(base, &path, found);
            } else {
                let name = path.strip_prefix(base).unwrap().to_str().unwrap();
                found.insert(name.to_owned(), (mode, fs::read(&path).unwrap()));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(volume, volume, &mut found);
    found
}

fn expected(payload: &Payload) -> BTreeMap<String, (u32, Vec<u8>)> {
    payload
        .files()
        .map(|(path, file)| {
            let content = file.contents.expose().to_vec();
            (path.as_str().to_owned(), (file.mode(), content))
        })
        .collect()
}

/// Counts the hidden entries: `..data` and one directory, whatever happened before.
fn hidden(volume: &Path) -> usize {
    fs::read_dir(volume)
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_str().unwrap().starts_with("..")
        })
        .count()
}

#[rstest]
#[case::changed_content(&[("a", "1", 0)], &[("a", "2", 0)])]
#[case::changed_mode(&[("a", "1", 0o600)], &[("a", "1", 0o640)])]
#[case::added(&[("a", "1", 0)], &[("a", "1", 0), ("b/c/d", "2", 0o400)])]
#[case::gone(&[("a", "1", 0), ("b/c", "2", 0)], &[("a", "1", 0)])]
#[case::gone_inside(&[("b/c", "1", 0), ("b/d", "2", 0)], &[("b/c", "1", 0)])]
#[case::file_becomes_directory(&[("a", "1", 0)], &[("a/b", "2", 0)])]
#[case::directory_becomes_file(&[("a/b", "1", 0)], &[("a", "2", 0)])]
#[case::everything_else(&[("a", "1", 0)], &[("z", "", 0)])]
fn a_volume_holds_the_new_content_and_no_other(#[case] old: Tree<'_>, #[case] new: Tree<'_>) {
    let volume = tempfile::tempdir().unwrap();
    for tree in [old, new] {
        let payload = payload(tree);
        assert_eq!(replace(volume.path(), &payload).unwrap(), Change::Replaced);
        assert_eq!(seen(volume.path()), expected(&payload));
        assert_eq!(hidden(volume.path()), 2);
        assert!(is_complete(&open_root(volume.path()).unwrap()).unwrap());
    }
}

#[test]
fn the_same_content_touches_nothing() {
    let volume = tempfile::tempdir().unwrap();
    let tree = payload(&[("a", "1", 0), ("b/c", "2", 0o400), ("empty", "", 0)]);
    replace(volume.path(), &tree).unwrap();
    let before = fs::metadata(volume.path()).unwrap();
    let data = fs::read_link(volume.path().join(DATA)).unwrap();
    assert_eq!(replace(volume.path(), &tree).unwrap(), Change::Unchanged);
    let after = fs::metadata(volume.path()).unwrap();
    assert_eq!(
        (before.mtime_nsec(), before.ctime_nsec()),
        (after.mtime_nsec(), after.ctime_nsec())
    );
    assert_eq!(fs::read_link(volume.path().join(DATA)).unwrap(), data);
}

#[test]
fn what_a_provider_or_a_crash_left_makes_way() {
    let volume = tempfile::tempdir().unwrap();
    let at = |name: &str| volume.path().join(name);
    fs::create_dir_all(at("..2020_01_01_00_00_00.1/x")).unwrap();
    fs::create_dir_all(at("a/deep")).unwrap();
    fs::write(at("a/deep/file"), "old").unwrap();
    fs::write(at("plain"), "old").unwrap();
    // An earlier version of the driver made it.
    symlink("nowhere", at("..link_tmp")).unwrap();
    let tree = payload(&[("a", "1", 0), ("plain", "2", 0)]);
    replace(volume.path(), &tree).unwrap();
    assert_eq!(seen(volume.path()), expected(&tree));
    assert_eq!(hidden(volume.path()), 2);
}

#[test]
fn a_damaged_volume_is_made_whole() {
    let volume = tempfile::tempdir().unwrap();
    let tree = payload(&[("a", "1", 0), ("b/c", "2", 0)]);
    let put = |path: PathBuf, make: fn(&Path)| {
        fs::remove_file(&path).unwrap();
        make(&path);
    };
    let pipe = |path: &Path| nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap();
    let damages: [&dyn Fn(PathBuf); 10] = [
        &|v| put(v.join("..data/a"), pipe),
        &|v| put(v.join("..data/b/c"), pipe),
        &|v| put(v.join("a"), pipe),
        &|v| put(v.join(DATA), pipe),
        &|v| {
            put(v.join("..data/a"), |path| {
                drop(std::os::unix::net::UnixListener::bind(path).unwrap())
            })
        },
        &|v| put(v.join("..data/a"), |path| symlink("b/c", path).unwrap()),
        &|v| fs::remove_file(v.join("a")).unwrap(),
        &|v| fs::write(v.join("..data/b/stranger"), "x").unwrap(),
        &|v| fs::write(v.join("..data/a"), "9").unwrap(),
        &|v| fs::remove_dir_all(v.join(fs::read_link(v.join(DATA)).unwrap())).unwrap(),
    ];
    for damage in damages {
        replace(volume.path(), &tree).unwrap();
        damage(volume.path().to_owned());
        assert_eq!(replace(volume.path(), &tree).unwrap(), Change::Replaced);
        assert_eq!(seen(volume.path()), expected(&tree));
    }
}

/// What others put beside the content is no change of it, and goes, with anything in it that is no
/// directory.
#[test]
fn strangers_go_and_the_content_is_the_same() {
    let volume = tempfile::tempdir().unwrap();
    let volume = volume.path();
    let tree = payload(&[("a", "1", 0), ("b/c", "2", 0)]);
    replace(volume, &tree).unwrap();
    let data = fs::read_link(volume.join(DATA)).unwrap();
    let strangers: [&dyn Fn(&Path); 5] = [
        &|at| fs::write(at, "x").unwrap(),
        &|at| symlink("a", at).unwrap(),
        &|at| nix::unistd::mkfifo(at, Mode::S_IRWXU).unwrap(),
        &|at| symlink("..data/stranger", at).unwrap(),
        &|at| {
            fs::create_dir_all(at.join("deep/er")).unwrap();
            fs::write(at.join("deep/file"), "x").unwrap();
        },
    ];
    for stranger in strangers {
        stranger(&volume.join("stranger"));
        assert_eq!(replace(volume, &tree).unwrap(), Change::Unchanged);
        assert_eq!(seen(volume), expected(&tree));
        assert!(fs::symlink_metadata(volume.join("stranger")).is_err());
        assert_eq!(fs::read_link(volume.join(DATA)).unwrap(), data);
    }
}

/// Kubelet makes directories where a `subPath` is not there, at the root and below directories of the
/// content, and binds them into the container.
#[test]
fn the_directories_that_kubelet_makes_are_no_content_and_stay() {
    let volume = tempfile::tempdir().unwrap();
    let volume = volume.path();
    let make = |path: &str| {
        let made = volume.join(path);
        fs::create_dir_all(&made).unwrap();
        fs::set_permissions(&made, fs::Permissions::from_mode(0o750)).unwrap();
        fs::metadata(made).unwrap().ino()
    };
    let is_there = |path: &str, inode: u64| {
        let metadata = fs::symlink_metadata(volume.join(path));
        metadata.is_ok_and(|metadata| metadata.is_dir() && metadata.ino() == inode)
    };
    let [one, two] = ["1", "2"].map(|text| payload(&[("a", text, 0), ("b/c", text, 0)]));
    replace(volume, &one).unwrap();
    let (plain, deep) = (make("web.kye"), make("x/y/z"));
    for nested in ["b/d", "b/e/f", "..data/g"] {
        make(nested);
        assert!(
            layout::is_linked(&open_root(volume).unwrap()).unwrap(),
            "{nested}"
        );
        assert_eq!(
            replace(volume, &one).unwrap(),
            Change::Unchanged,
            "{nested}"
        );
    }
    assert!(!layout::has_foreign_entries(&open_root(volume).unwrap()).unwrap());
    // A change of the content is one, and leaves those at the root alone.
    assert_eq!(replace(volume, &two).unwrap(), Change::Replaced);
    for (path, inode) in [("web.kye", plain), ("x/y/z", deep)] {
        assert!(is_there(path, inode), "{path}");
    }
    for (path, file) in two.files() {
        let read = fs::read(volume.join(path.as_str())).unwrap();
        assert_eq!(read, file.contents.expose());
    }
    assert_eq!(replace(volume, &two).unwrap(), Change::Unchanged);
    // A file of that very name takes its place, and a process that has the directory keeps it.
    let bound = open_root(&volume.join("web.kye")).unwrap();
    let three = payload(&[("a", "2", 0), ("b/c", "2", 0), ("web.kye", "3", 0)]);
    assert_eq!(replace(volume, &three).unwrap(), Change::Replaced);
    assert_eq!(fs::read_to_string(volume.join("web.kye")).unwrap(), "3");
    assert!(names(bound.as_fd()).unwrap().is_empty());
    assert!(is_there("x/y/z", deep));
}

/// Makes former contents as old as if they had been replaced long ago.
fn let_the_grace_pass(volume: &Path) {
    let current = current(&open_root(volume).unwrap()).unwrap();
    let long_ago = std::time::SystemTime::now() - 2 * GRACE;
    for entry in fs::read_dir(volume).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with("..2") && current.as_ref() != Some(&name) {
            let former = StdFile::open(volume.join(name)).unwrap();
            former.set_modified(long_ago).unwrap();
        }
    }
}

/// Wherever somebody lets `..data` lead, new content takes its place and stays.
#[test]
fn what_data_leads_to_is_removed_only_if_it_was_content() {
    let long = format!("..{}", "x".repeat(253));
    for target in [
        "..data", "..aside", "..links", "..x", "..", ".", "a", "d", "/", "../x", "..1/x", "..2026",
        "absent", &long,
    ] {
        let volume = tempfile::tempdir().unwrap();
        let volume = volume.path();
        let [old, new] =
            ["old", "new"].map(|text| payload(&[("a", text, 0o600), ("d/b", text, 0o644)]));
        replace(volume, &old).unwrap();
        std::os::unix::fs::symlink(target, volume.join("..t")).unwrap();
        fs::rename(volume.join("..t"), volume.join(DATA)).unwrap();
        replace(volume, &new).unwrap();
        for file in ["a", "d/b"] {
            let text = fs::read_to_string(volume.join(file));
            assert_eq!(text.unwrap(), "new", "{file}, ..data led to {target}");
        }
    }
}

/// What a driver has left that ended goes without another swap, and what a reader may still open stays.
#[test]
fn what_an_earlier_driver_left_goes_and_the_content_stays() {
    let volume = tempfile::tempdir().unwrap();
    let volume = volume.path();
    let tidy = || super::tidy(&open_root(volume).unwrap()).unwrap();
    // A volume without content is not looked at.
    fs::create_dir(volume.join(ASIDE)).unwrap();
    assert_eq!(tidy(), Leftovers::default());
    let [old, new] =
        ["old", "new"].map(|text| payload(&[("a", text, 0o600), ("d/b", text, 0o644)]));
    replace(volume, &old).unwrap();
    assert_eq!(tidy(), Leftovers::default());
    let staged = stage(volume, new.clone()).unwrap().unwrap();
    let _former = staged.commit().unwrap().unwrap();
    let in_grace = Leftovers {
        removed: false,
        left: true,
    };
    assert_eq!((tidy(), hidden(volume)), (in_grace, 3));
    let_the_grace_pass(volume);
    fs::create_dir_all(volume.join(ASIDE).join("deep")).unwrap();
    symlink("..2020", volume.join("..link_tmp")).unwrap();
    let gone = Leftovers {
        removed: true,
        left: false,
    };
    assert_eq!((tidy(), hidden(volume)), (gone, 2));
    assert_eq!(tidy(), Leftovers::default());
    assert_eq!(seen(volume), expected(&new));
}

/// Contents follow each other faster than slow programs read.
#[test]
fn each_former_content_stays_for_its_grace_however_many_follow() {
    let volume = tempfile::tempdir().unwrap();
    let volume = volume.path();
    let text = |number: usize| number.to_string();
    // A driver that ended has left content that was never in use.
    fs::create_dir(volume.join(fresh_name())).unwrap();
    let mut formers = Vec::new();
    for number in 0..6 {
        let content = payload(&[("a", &text(number), 0o644)]);
        let staged = stage(volume, content).unwrap().unwrap();
        formers.extend(staged.commit().unwrap());
        for (number, Former(former)) in formers.iter().enumerate() {
            let read = fs::read_to_string(volume.join(former).join("a"));
            assert_eq!(read.unwrap(), text(number));
        }
        let generations = fs::read_dir(volume).unwrap().filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            is_generation(&std::ffi::CString::new(name.as_encoded_bytes()).unwrap())
        });
        assert_eq!(generations.count(), formers.len() + 1);
    }
    let_the_grace_pass(volume);
    replace(volume, &payload(&[("a", "last", 0o644)])).unwrap();
    assert_eq!(hidden(volume), 2);
}

/// A provider that writes to the volume itself may put a link in the place of the content.
#[test]
fn replaced_content_is_not_marked_through_a_link() {
    let (volume, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    replace(volume.path(), &payload(&[("a", "1", 0)])).unwrap();
    let staged = stage(volume.path(), payload(&[("a", "2", 0)])).unwrap();
    let content = current(&open_root(volume.path()).unwrap())
        .unwrap()
        .unwrap();
    let content = volume.path().join(content);
    fs::rename(&content, volume.path().join("moved")).unwrap();
    symlink(outside.path(), &content).unwrap();
    let before = fs::metadata(outside.path()).unwrap();
    staged.unwrap().commit().unwrap();
    let after = fs::metadata(outside.path()).unwrap();
    assert_eq!(after.mode(), before.mode());
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
}

#[test]
fn former_content_stays_for_those_who_read_it_and_goes_later() {
    let volume = tempfile::tempdir().unwrap();
    let [one, two, three] = ["1", "2", "3"].map(|text| payload(&[("a", text, 0)]));
    replace(volume.path(), &one).unwrap();
    let reader = fs::canonicalize(volume.path().join("a")).unwrap();

    let staged = stage(volume.path(), two.clone()).unwrap().unwrap();
    assert_eq!(
        seen(volume.path()),
        expected(&one),
        "staged is not committed"
    );
    let former = staged.commit().unwrap().unwrap();
    assert_eq!(seen(volume.path()), expected(&two));
    assert_eq!(fs::read_to_string(&reader).unwrap(), "1");

    // An unchanged volume is seen as such while its former content is still there.
    assert!(stage(volume.path(), two.clone()).unwrap().is_none());
    assert!(reader.exists());

    // A driver that went away before it took the former content away.
    stage(volume.path(), three.clone())
        .unwrap()
        .unwrap()
        .commit()
        .unwrap();
    assert!(reader.exists(), "its grace is not over");
    assert_eq!(hidden(volume.path()), 4);
    remove(volume.path(), &former).unwrap();
    assert_eq!(hidden(volume.path()), 3);
    let_the_grace_pass(volume.path());
    assert!(stage(volume.path(), three.clone()).unwrap().is_none());
    assert_eq!(hidden(volume.path()), 2);
    assert_eq!(seen(volume.path()), expected(&three));
}

#[test]
fn staged_content_that_is_dropped_leaves_nothing() {
    let volume = tempfile::tempdir().unwrap();
    replace(volume.path(), &payload(&[("a", "1", 0)])).unwrap();
    drop(
        stage(volume.path(), payload(&[("b", "2", 0)]))
            .unwrap()
            .unwrap(),
    );
    assert_eq!(seen(volume.path()), expected(&payload(&[("a", "1", 0)])));
    assert_eq!(hidden(volume.path()), 2);
}

/// Needs a group that this user may give files to.
#[test]
fn everything_belongs_to_the_group() {
    let own = nix::unistd::getgid().as_raw();
    let other = if nix::unistd::geteuid().is_root() {
        1004
    } else {
        own
    };
    let volume = tempfile::tempdir().unwrap();
    let tree = payload(&[("a", "1", 0o640), ("b/c", "2", 0o600)]);
    replace(volume.path(), &tree).unwrap();
    let of = |group| {
        tree.clone().accessible(Access {
            default_mode: 0o644,
            group: Some(group),
        })
    };
    let of_other = if other == own {
        Change::Unchanged
    } else {
        Change::Replaced
    };
    for (group, change) in [
        (own, Change::Unchanged),
        (other, of_other),
        (other, Change::Unchanged),
    ] {
        assert_eq!(replace(volume.path(), &of(group)).unwrap(), change);
    }
    let mut left = vec![volume.path().to_owned()];
    let mut seen = 0;
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        assert_eq!(metadata.gid(), other, "{}", path.display());
        seen += 1;
        if metadata.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    assert_eq!(
        seen, 8,
        "the root, two links, ..data, its directory, b, and two files"
    );
    let mode = fs::metadata(volume.path().join("b/c")).unwrap().mode() & 0o7777;
    assert_eq!(mode, 0o600, "modes stay as the provider gave them");
}

#[test]
fn a_link_in_the_way_is_replaced_and_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("kept"), "x").unwrap();
    let volume = tempfile::tempdir().unwrap();
    symlink(outside.path(), volume.path().join("a")).unwrap();
    symlink(outside.path(), volume.path().join(DATA)).unwrap();
    let tree = payload(&[("a/kept", "1", 0)]);
    replace(volume.path(), &tree).unwrap();
    assert_eq!(seen(volume.path()), expected(&tree));
    assert_eq!(
        fs::read_to_string(outside.path().join("kept")).unwrap(),
        "x"
    );
}

/// Something is mounted below the content that is replaced.
#[test]
fn a_commit_does_not_hang_on_the_removal_of_former_content() {
    alone(Own::Mounts, || {
        let volume = tempfile::tempdir().unwrap();
        let trees = ["1", "2", "3"].map(|text| payload(&[("a/b", text, 0)]));
        replace(volume.path(), &trees[0]).unwrap();
        let busy = fs::canonicalize(volume.path().join("a")).unwrap();
        let none = None::<&str>;
        nix::mount::mount(
            Some("x"),
            &busy,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            none,
        )
        .unwrap();
        for tree in &trees[1..] {
            let former = stage(volume.path(), tree.clone())
                .unwrap()
                .unwrap()
                .commit()
                .unwrap();
            assert!(former.is_some());
            assert_eq!(seen(volume.path()), expected(tree));
            assert!(stage(volume.path(), tree.clone()).unwrap().is_none());
        }
        assert!(busy.exists());
        nix::mount::umount(&busy).unwrap();
        let_the_grace_pass(volume.path());
        replace(volume.path(), &trees[0]).unwrap();
        assert!(!busy.exists(), "it goes at the next occasion");
        assert_eq!(hidden(volume.path()), 2);
    });
}

/// In a process of its own, because the limit that makes writing fail is the process's.
#[test]
fn a_failed_replace_leaves_the_volume_as_it_was() {
    alone(Own::Process, || {
        let volume = tempfile::tempdir().unwrap();
        let old = payload(&[("a", "1", 0), ("b/c", "2", 0)]);
        replace(volume.path(), &old).unwrap();
        let new = payload(&[
            ("a", "", 0),
            ("b", "", 0),
            ("new", "more than there is room for", 0),
        ]);
        let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: ignoring a signal installs no handler.
        unsafe {
            signal(Signal::SIGXFSZ, SigHandler::SigIgn).unwrap();
        }
        setrlimit(Resource::RLIMIT_FSIZE, 0, hard).unwrap();
        let result = replace(volume.path(), &new);
        setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
        assert!(result.unwrap_err().to_string().contains("new"));
        assert_eq!(seen(volume.path()), expected(&old));
        assert_eq!(hidden(volume.path()), 2, "nothing half-written stays");
    });
}

/// Reads each path in a loop until `stop`, as a pod does. Returns the first path that is missing or
/// has neither of the two right contents.
fn read_until(stop: &AtomicBool, volume: &Path, right: &[(&str, [&[u8]; 2])]) -> Option<String> {
    loop {
        let last = stop.load(Ordering::SeqCst);
        for (path, contents) in right {
            match fs::read(volume.join(path)) {
                Ok(found) if contents.contains(&found.as_slice()) => {}
                found => return Some(format!("{path:?}: {:?}", found.map(|f| f.len()))),
            }
        }
        if last {
            return None;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 300, ..ProptestConfig::with_cases(16) })]
    #[test]
    fn a_volume_is_what_the_last_payload_says_and_readers_miss_nothing(
        rows in prop::collection::vec(generated::files(), 1..5)
    ) {
        let volume = tempfile::tempdir().unwrap();
        let mut before = Files::new();
        for files in rows {
            let payload = generated::payload(&files);
            let both: Vec<_> = before
                .iter()
                .filter_map(|(path, (old, _))| {
                    Some((path.as_str(), [old.as_slice(), files.get(path)?.0.as_slice()]))
                })
                .collect();
            let stop = AtomicBool::new(false);
            let (former, missed) = std::thread::scope(|scope| {
                let reader = scope.spawn(|| read_until(&stop, volume.path(), &both));
                let staged = stage(volume.path(), payload.clone());
                let former = staged.and_then(|staged| staged.map_or(Ok(None), StagedContent::commit));
                stop.store(true, Ordering::SeqCst);
                (former, reader.join().unwrap())
            });
            let former = former.unwrap();
            prop_assert_eq!(missed, None);
            prop_assert_eq!(seen(volume.path()), expected(&payload));
            if let Some(former) = former {
                remove(volume.path(), &former).unwrap();
            }
            prop_assert_eq!(seen(volume.path()), expected(&payload));
            prop_assert_eq!(hidden(volume.path()), 2);
            prop_assert_eq!(replace(volume.path(), &payload).unwrap(), Change::Unchanged);
            before = files;
        }
    }
}

/// The content of a volume before a commit.
#[derive(Clone, Copy)]
enum Before {
    Nothing,
    OfDriver,
    OfProvider,
}

#[rstest]
fn a_commit_whose_content_is_not_found_gives_back_what_was_there(
    #[values(Before::Nothing, Before::OfDriver, Before::OfProvider)] before: Before,
    #[values(
        "gone",
        "content",
        "length",
        "mode",
        "pipe",
        "link",
        "directory",
        "more"
    )]
    damage: &str,
) {
    let volume = tempfile::tempdir().unwrap();
    let at = |path: &str| volume.path().join(path);
    match before {
        Before::Nothing => {}
        Before::OfDriver => {
            let old = payload(&[
                ("app/x", "0", 0o640),
                ("app.old", "1", 0),
                ("only/old", "2", 0),
            ]);
            replace(volume.path(), &old).unwrap();
        }
        Before::OfProvider => {
            fs::create_dir_all(at("app.json/deep")).unwrap();
            fs::write(at("app.json/deep/file"), "0").unwrap();
            fs::write(at("app"), "1").unwrap();
            fs::write(at("only"), "2").unwrap();
        }
    }
    let seen_before = seen(volume.path());
    let all = || {
        let names = fs::read_dir(volume.path()).unwrap();
        names
            .map(|e| e.unwrap().file_name())
            .collect::<std::collections::BTreeSet<_>>()
    };
    let all_before = all();
    let new = payload(&[
        ("app/x", "new", 0o600),
        ("app.json", "new", 0),
        ("app-tls/y", "new", 0),
    ]);
    let staged = stage(volume.path(), new).unwrap().unwrap();
    let file = volume.path().join(&staged.new).join("app/x");
    match damage {
        "gone" => fs::remove_file(&file).unwrap(),
        "content" => fs::write(&file, "nEw").unwrap(),
        "length" => fs::write(&file, "newer").unwrap(),
        "mode" => fs::set_permissions(&file, fs::Permissions::from_mode(0o604)).unwrap(),
        "more" => fs::write(file.with_file_name("x-1"), "").unwrap(),
        other => {
            fs::remove_file(&file).unwrap();
            match other {
                "pipe" => nix::unistd::mkfifo(&file, Mode::S_IRWXU).unwrap(),
                "link" => symlink("../app.json", &file).unwrap(),
                _ => fs::create_dir(&file).unwrap(),
            }
        }
    }
    let error = staged.commit().unwrap_err().to_string();
    assert!(error.contains("app/x"), "{error}");
    assert_eq!(seen(volume.path()), seen_before);
    assert_eq!(all(), all_before);
}
