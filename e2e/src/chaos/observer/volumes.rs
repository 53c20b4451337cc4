//! Reads all volumes all the time, as the programs in the pods do, and notes what no program may see.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::super::lock;
use super::super::store::{CLASSES, EXTRA, OBJECTS, generation_of};
use super::super::tenants::{WHO, volume_name};
use super::super::world::{VolumeId, Watched, World};

/// The pause between two rounds over all volumes: the driver has two cores, too.
const PAUSE: Duration = Duration::from_millis(4);
const DATA: &str = "..data";

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
    /// Since when, by [`World::now`], the store has newer content.
    stale: Option<Duration>,
}

/// The reason why a reading is not as it must be.
enum Wrong {
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

fn read_one(
    world: &World,
    pod: &Watched,
    root: &Path,
    class: usize,
    known: &mut BTreeMap<VolumeId, Known>,
    out: &UnboundedSender<Suspicion>,
) {
    let id = (pod.uid.clone(), class);
    let path = embedded::target_path(&pod.uid, &volume_name(class));
    let volume = root.join(path.strip_prefix("/").unwrap_or(&path));
    let begun = Instant::now();
    let floor = known.get(&id).map_or(0, |known| known.generation);
    // A provider is called after the pod was created.
    let floor = floor.max(world.store.at(class, pod.created));
    let reading = read_volume(&volume, class, pod, floor);
    world.log.checked("readings of a volume", 1);
    world.log.took("reading of a volume", begun.elapsed());
    let suspect = |invariant: &'static str, seen: String| {
        let name = CLASSES.get(class).copied().unwrap_or_default();
        // The other end is gone only when the run ends.
        let _ended = out.send(Suspicion {
            pod: pod.clone(),
            root: root.to_owned(),
            invariant,
            seen: format!("pod {} ({}), volume of {name}: {seen}", pod.name, pod.uid),
        });
    };
    match reading {
        Ok((device, generation)) => {
            let mounted = (root.to_owned(), device);
            let before = known.remove(&id);
            let is_stale = generation < world.store.latest(class);
            let still = before
                .as_ref()
                .filter(|before| before.generation == generation);
            let since = still.and_then(|before| before.stale).unwrap_or(world.now());
            if is_stale && world.now() - since > world.bounds.silence {
                world.fails(pod, "its volume is not refreshed");
            }
            let now = Known {
                mounted: mounted.clone(),
                generation,
                stale: is_stale.then_some(since),
            };
            known.insert(id.clone(), now);
            if let Some(before) = before
                && before.mounted.0 == mounted.0
                && before.mounted.1 != mounted.1
            {
                let text = "the mount was replaced under a running container".to_owned();
                suspect("a running container keeps its mount", text);
            }
            if generation > world.store.latest(class) {
                let text = format!("generation {generation} is newer than the store's");
                world.log.find("a volume has what the store had", text);
            }
            lock(&world.read).insert(id, generation);
        }
        Err(Wrong::Gap(seen)) => suspect("no pod reads an empty or partial volume", seen),
        Err(Wrong::Content(invariant, seen)) => {
            let text = format!("pod {} ({}): {seen}", pod.name, pod.uid);
            world.log.find(invariant, text);
        }
    }
}

/// Reads a volume twice: file by file, as a program does that does not know of `..data`, and all
/// files of one `..data`. Returns its file system and generation.
fn read_volume(
    volume: &Path,
    class: usize,
    pod: &Watched,
    floor: u64,
) -> Result<(u64, u64), Wrong> {
    let gap =
        |what: &Path, error: std::io::Error| Wrong::Gap(format!("{}: {error}", what.display()));
    let device = fs::metadata(volume).map_err(|error| gap(volume, error))?;
    let parent = volume.parent().unwrap_or(volume);
    let outside = fs::metadata(parent).map_err(|error| gap(parent, error))?;
    if device.dev() == outside.dev() {
        return Err(Wrong::Gap("nothing is mounted".to_owned()));
    }
    let mut last = floor;
    for (object, _) in OBJECTS {
        let file = volume.join(object);
        let text = fs::read_to_string(&file).map_err(|error| gap(Path::new(object), error))?;
        last = take(class, object, &text, last)?;
    }
    let file = volume.join(WHO);
    let text = fs::read_to_string(&file).map_err(|error| gap(Path::new(WHO), error))?;
    check_owner(&text, pod)?;
    let generation = read_at_once(volume, class, last)?;
    Ok((device.dev(), generation))
}

/// Reads all files of one `..data`; returns their generation.
fn read_at_once(volume: &Path, class: usize, floor: u64) -> Result<u64, Wrong> {
    let data = File::open(volume.join(DATA));
    let data = data.map_err(|error| Wrong::Gap(format!("{DATA}: {error}")))?;
    let below = PathBuf::from(format!("/proc/self/fd/{}", data.as_raw_fd()));
    let version = fs::read_link(&below).unwrap_or_default();
    let mut first: Option<(&str, u64)> = None;
    for object in OBJECTS.iter().map(|(object, _)| *object).chain([EXTRA]) {
        let mut text = String::new();
        let read =
            File::open(below.join(object)).and_then(|mut file| file.read_to_string(&mut text));
        if let Err(error) = read {
            let now = fs::read_link(volume.join(DATA));
            let is_current = now.is_ok_and(|now| now.file_name() == version.file_name());
            // What was replaced is removed after a moment. A class has the extra object only after
            // an edit.
            if !is_current || object == EXTRA {
                continue;
            }
            return Err(Wrong::Gap(format!("{DATA}/{object}: {error}")));
        }
        let generation = take(class, object, &text, floor)?;
        let (name, expected) = *first.get_or_insert((object, generation));
        if generation != expected {
            return Err(Wrong::Content(
                "no pod reads a mixed volume",
                format!(
                    "in one {DATA}, {name} is of generation {expected} and {object} of {generation}"
                ),
            ));
        }
    }
    Ok(first.map_or(floor, |(_, generation)| generation))
}

/// Checks a content; returns its generation.
fn take(class: usize, object: &str, text: &str, floor: u64) -> Result<u64, Wrong> {
    let name = CLASSES.get(class).copied().unwrap_or_default();
    let generation = generation_of(name, object, text)
        .map_err(|what| Wrong::Content("each file is whole", format!("{name}: {object} {what}")))?;
    if generation < floor {
        return Err(Wrong::Content(
            "no pod reads older content than before",
            format!("{name}: {object} is of generation {generation} after {floor}"),
        ));
    }
    Ok(generation)
}

/// Checks that the provider was called for this pod.
fn check_owner(text: &str, pod: &Watched) -> Result<(), Wrong> {
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
