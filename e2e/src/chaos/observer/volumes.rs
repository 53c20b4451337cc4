//! Reads all volumes all the time, as the programs in the pods do, and notes what no program may see.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::statvfs::{FsFlags, fstatvfs};
use tokio::sync::mpsc::UnboundedSender;

use super::super::editions::Spec;
use super::super::lock;
use super::super::store::{CLASSES, EXTRA, OBJECTS, Store, number_of};
use super::super::tenants::{CLOSED, WHO, group_of, mode_of, volume_name};
use super::super::world::{VolumeId, Watched, World};
use super::content::{Content, DATA};
use super::kept::Kept;

/// The pause between two rounds over all volumes: the driver has two cores, too.
const PAUSE: Duration = Duration::from_millis(4);
/// The time that a slow program takes from the opening of a content until it reads the files: most of
/// the time for which a content that was replaced stays.
const SLOW: Duration = Duration::from_millis(500);

/// The invariant about what is absent.
const GAP: &str = "no pod reads an empty or partial volume";

/// A volume that was not as it must be while its pod runs. Whether it ran is to be confirmed.
pub(super) struct Suspicion {
    pub(super) pod: Watched,
    pub(super) root: PathBuf,
    pub(super) invariant: &'static str,
    pub(super) seen: String,
}

/// What was read of a volume before.
struct Known {
    /// The root of the node, which is another one after a reboot, and the file system.
    mounted: (PathBuf, u64),
    generation: u64,
    /// What its class said when its content was made.
    spec: Spec,
    /// The state of the class then, see [`Editions::settled`](super::super::editions::Editions).
    edit: Option<(u64, Spec)>,
    /// The state of the class that the volume has followed.
    follows: Option<(u64, Spec)>,
    /// Since when, by [`World::now`], the store has newer content.
    stale: Option<Duration>,
    /// The content that has shown the name of an object which a class has only after an edit.
    shows_extra: Option<PathBuf>,
}

/// The reason why a reading is not as it must be.
pub(super) enum Wrong {
    /// Something is absent, which is right if the pod does not run any more.
    Gap(String),
    /// The content must not be there, whether the pod runs or not.
    Content(&'static str, String),
}

/// Reads until told to stop.
pub(super) fn read_all(world: &World, stop: &Arc<AtomicBool>, out: &UnboundedSender<Suspicion>) {
    let mut known = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        let pods = world.running();
        known.retain(|(uid, _): &VolumeId, _| lock(&world.pods).contains_key(uid));
        for (pod, root) in pods {
            for class in &pod.classes {
                read_one(world, &pod, &root, *class, &mut known, out);
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Opens all volumes and reads them a while later, until told to stop: the content of a slow program
/// may be replaced meanwhile, and stays.
pub(super) fn read_all_slowly(
    world: &World,
    stop: &Arc<AtomicBool>,
    out: &UnboundedSender<Suspicion>,
) {
    let mut kept = Kept::default();
    while !stop.load(Ordering::Relaxed) {
        kept.judge(world);
        let mut opened = Vec::new();
        for (pod, root) in world.running() {
            for class in &pod.classes {
                // The other reader tells what cannot be opened.
                if let Ok(content) = Content::open(&path_of(&pod, &root, *class)) {
                    opened.push((pod.clone(), root.clone(), *class, content));
                }
            }
        }
        std::thread::sleep(SLOW);
        for (pod, root, class, content) in opened {
            world.log.checked("slow readings of a volume", 1);
            if let Err(wrong) = content.read(&world.store, class, 0) {
                report(world, &pod, &root, class, wrong, out);
            }
            kept.keep(world, (pod, root, class, content));
        }
    }
}

/// Returns the path of a pod's volume, as this process has it.
pub(in super::super) fn path_of(pod: &Watched, root: &Path, class: usize) -> PathBuf {
    let path = embedded::target_path(&pod.uid, &volume_name(class));
    root.join(path.strip_prefix("/").unwrap_or(&path))
}

/// Returns whether something is mounted on a directory.
pub(in super::super) fn is_mount(directory: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
    let parent = directory.parent().and_then(device);
    parent.is_some() && device(directory).is_some_and(|own| Some(own) != parent)
}

/// Tells what is wrong with a volume. What is absent is to be confirmed.
fn report(
    world: &World,
    pod: &Watched,
    root: &Path,
    class: usize,
    wrong: Wrong,
    out: &UnboundedSender<Suspicion>,
) {
    // Somebody is about to change the volume, who has told so before.
    if world.is_buried(&pod.uid) {
        return;
    }
    let name = CLASSES.get(class).copied().unwrap_or_default();
    let text = |seen: String| format!("pod {} ({}), volume of {name}: {seen}", pod.name, pod.uid);
    match wrong {
        Wrong::Gap(seen) => suspect(pod, root, GAP, text(seen), out),
        Wrong::Content(invariant, seen) => world.log.find(invariant, text(seen)),
    }
}

fn suspect(
    pod: &Watched,
    root: &Path,
    invariant: &'static str,
    seen: String,
    out: &UnboundedSender<Suspicion>,
) {
    let (pod, root) = (pod.clone(), root.to_owned());
    // The other end is gone only when the run ends.
    let _ended = out.send(Suspicion {
        pod,
        root,
        invariant,
        seen,
    });
}

fn read_one(
    world: &World,
    pod: &Watched,
    root: &Path,
    class: usize,
    known: &mut BTreeMap<VolumeId, Known>,
    out: &UnboundedSender<Suspicion>,
) {
    let id = (pod.uid.clone(), class);
    let volume = path_of(pod, root, class);
    let begun = Instant::now();
    let floor = known.get(&id).map_or(0, |known| known.generation);
    // A provider is called after the pod was created.
    let floor = floor.max(world.store.at(class, pod.created));
    let edit = world.editions.settled(class);
    let changed = world.editions.changed(class);
    let shows_extra = known.get(&id).and_then(|known| known.shows_extra.clone());
    let reading = read_volume(&world.store, &volume, class, pod, floor).and_then(|reading| {
        let shows = extra_of(&volume, shows_extra.as_deref())?;
        Ok(reading.map(|reading| (reading, shows)))
    });
    world.log.checked("readings of a volume", 1);
    world.log.took("reading of a volume", begun.elapsed());
    let reading = match reading {
        Ok(Some(reading)) => reading,
        // This process was too slow to tell.
        Ok(None) => return,
        Err(wrong) => return report(world, pod, root, class, wrong, out),
    };
    let (reading, shows_extra) = reading;
    let Reading {
        device,
        generation,
        spec,
    } = reading;
    let broken = |invariant, text: String| {
        let wrong = Wrong::Content(invariant, text);
        report(world, pod, root, class, wrong, out);
    };
    if !world.editions.was(class, spec) {
        let text = format!("the class never said {spec:?}");
        broken("no pod reads a mixed volume", text);
    }
    let before = known.remove(&id);
    let number = world.store.number(class, generation);
    let is_stale = number != world.store.latest_number(class);
    let still = before
        .as_ref()
        .filter(|before| before.generation == generation);
    let since = still.and_then(|before| before.stale).unwrap_or(world.now());
    if is_stale && world.now() - since > world.bounds_since(since).silence {
        world.fails(pod, "its volume is not refreshed", since);
    }
    let is_late = |since: Duration| {
        world.is_calm_since(since) && world.now() - since > world.bounds_since(since).follow
    };
    const IN_TIME: &str = "a volume follows its store and its class within its bound";
    if is_stale && is_late(since) {
        let text = format!("contents number {number} are not the last ones of the store");
        broken(IN_TIME, text);
    }
    if let Some((expected, since)) = changed
        && spec != expected
        && is_late(since)
        && world.editions.changed(class) == changed
    {
        broken(IN_TIME, format!("it has {spec:?} instead of {expected:?}"));
    }
    let has_edit = edit.is_some_and(|(_, expected)| spec == expected);
    let follows = match before.as_ref() {
        Some(before) if before.follows.is_some() && before.follows == edit => edit,
        // It has become so: it was not so since an earlier edit.
        Some(before) if has_edit && before.spec != spec && before.edit == edit => edit,
        _ => None,
    };
    if follows.is_some() && !has_edit && world.editions.settled(class) == follows {
        let text = "it had followed an edit of its class, and does not any more";
        broken("no volume goes back to an older class", text.to_owned());
    }
    let mounted = (root.to_owned(), device);
    let now = Known {
        mounted: mounted.clone(),
        generation,
        spec,
        edit,
        follows,
        stale: is_stale.then_some(since),
        shows_extra,
    };
    known.insert(id.clone(), now);
    if let Some(before) = before
        && before.mounted.0 == mounted.0
        && before.mounted.1 != mounted.1
    {
        let text = format!(
            "pod {} ({}), volume {class}: another mount",
            pod.name, pod.uid
        );
        suspect(pod, root, "a running container keeps its mount", text, out);
    }
    if generation > world.store.latest(class) {
        let text = format!("generation {generation} is newer than the store's");
        world.log.find("a volume has what the store had", text);
    }
    lock(&world.read).insert(id, (generation, spec));
}

/// What was read of a volume.
struct Reading {
    /// Its file system.
    device: u64,
    generation: u64,
    /// What its class said when its content was made.
    spec: Spec,
}

/// Reads a volume twice: file by file, as a program does that does not know of `..data`, and all
/// files of one `..data`. Returns `None` if this process was too slow for that.
fn read_volume(
    store: &Store,
    volume: &Path,
    class: usize,
    pod: &Watched,
    floor: u64,
) -> Result<Option<Reading>, Wrong> {
    let gap =
        |what: &Path, error: std::io::Error| Wrong::Gap(format!("{}: {error}", what.display()));
    let device = fs::metadata(volume).map_err(|error| gap(volume, error))?;
    let parent = volume.parent().unwrap_or(volume);
    let outside = fs::metadata(parent).map_err(|error| gap(parent, error))?;
    if device.dev() == outside.dev() {
        return Err(Wrong::Gap("nothing is mounted".to_owned()));
    }
    let mut last = floor;
    for (object, file) in OBJECTS {
        let file = volume.join(file);
        let text = fs::read_to_string(&file).map_err(|error| gap(Path::new(object), error))?;
        last = take(store, class, object, &text, last)?;
    }
    for (object, mode) in [("a", mode_of(&pod.name)), CLOSED] {
        let found = fs::metadata(volume.join(object));
        let found = found.map_err(|error| gap(Path::new(object), error))?.mode() & 0o7777;
        if found != mode {
            let text = format!("{object} has mode {found:04o} instead of {mode:04o}");
            return Err(Wrong::Content("each file has its mode", text));
        }
    }
    check_mount(volume, device.dev(), group_of(&pod.name))?;
    let file = volume.join(WHO);
    let text = fs::read_to_string(&file).map_err(|error| gap(Path::new(WHO), error))?;
    check_owner(&text, pod)?;
    let content = Content::open(volume)?;
    let read = content.read(store, class, last)?;
    Ok(read.map(|(generation, edition)| Reading {
        device: device.dev(),
        generation,
        spec: Spec {
            edition,
            has_extra: content.has_extra(),
        },
    }))
}

/// Checks that nothing in a volume can be run, that it has no devices, and that its files are of the pod's group.
fn check_mount(volume: &Path, device: u64, group: Option<u32>) -> Result<(), Wrong> {
    let gap = |error: std::io::Error| Wrong::Gap(format!("{}: {error}", volume.display()));
    // It may have been unmounted since its files were read.
    let root = File::open(volume).map_err(gap)?;
    if root.metadata().map_err(gap)?.dev() != device {
        return Err(Wrong::Gap("nothing is mounted any more".to_owned()));
    }
    let flags = fstatvfs(&root).map_err(|error| gap(error.into()))?.flags();
    let needed = FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC;
    if !flags.contains(needed) {
        let text = format!("it has {flags:?}");
        return Err(Wrong::Content("each volume keeps its mount flags", text));
    }
    for (object, file) in OBJECTS {
        let found = fs::metadata(volume.join(file)).map_err(gap)?;
        if (found.uid(), found.gid()) != (0, group.unwrap_or_default()) {
            let (user, found) = (found.uid(), found.gid());
            let text = format!("{object} is of user {user} and group {found}, not {group:?}");
            return Err(Wrong::Content("each file has its owner and group", text));
        }
    }
    Ok(())
}

/// Returns the present content if a program finds by its name the object that a class has only after an
/// edit. `before` is the content that has shown that name: while it stays, the name does, too. New content
/// shows its names a moment after it has come.
fn extra_of(volume: &Path, before: Option<&Path>) -> Result<Option<PathBuf>, Wrong> {
    let content = || fs::read_link(volume.join(DATA)).ok();
    let at_first = content();
    if fs::metadata(volume.join(EXTRA)).is_ok() {
        let stays = content() == at_first;
        return Ok(at_first.filter(|_| stays));
    }
    if at_first.is_none() || at_first.as_deref() != before || content() != at_first {
        return Ok(None);
    }
    Err(Wrong::Gap(format!(
        "the name {EXTRA} has gone, and its content is still there"
    )))
}

/// Checks a content; returns the number in it.
pub(super) fn number(class: usize, object: &str, text: &str) -> Result<u64, Wrong> {
    let name = CLASSES.get(class).copied().unwrap_or_default();
    number_of(name, object, text)
        .map_err(|what| Wrong::Content("each file is whole", format!("{name}: {object} {what}")))
}

/// Checks a content; returns its generation for somebody who has read `floor`.
pub(super) fn take(
    store: &Store,
    class: usize,
    object: &str,
    text: &str,
    floor: u64,
) -> Result<u64, Wrong> {
    let generation = store.generation(class, number(class, object, text)?, floor);
    if generation < floor {
        let name = CLASSES.get(class).copied().unwrap_or_default();
        return Err(Wrong::Content(
            "no pod reads older content than before",
            format!("{name}: {object} is of generation {generation} after {floor}"),
        ));
    }
    Ok(generation)
}

/// Checks that the provider was called for this pod.
fn check_owner(text: &str, pod: &Watched) -> Result<(), Wrong> {
    // Some texts are long.
    if text.contains(&format!("\"csi.storage.k8s.io/pod.uid\":\"{}\"", pod.uid)) {
        return Ok(());
    }
    let attributes: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let uid = attributes["csi.storage.k8s.io/pod.uid"].as_str();
    if uid == Some(pod.uid.as_str()) {
        return Ok(());
    }
    Err(Wrong::Content(
        "no pod reads another pod's volume",
        format!("the volume is of pod {uid:?}"),
    ))
}
