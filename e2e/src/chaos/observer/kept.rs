//! Contents that a process still has open when their volume is unmounted, as one does that lingers in another
//! mount namespace: the driver removes their files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::lock;
use super::super::store::CLASSES;
use super::super::world::{VolumeId, Watched, World};
use super::content::Content;
use super::volumes::{is_mount, path_of};

/// The time from the unmount until the files are gone.
const SOON: Duration = Duration::from_secs(3);
/// The time after which a volume whose pod has gone is not waited for any more.
const LONG: Duration = Duration::from_secs(90);

/// The last content of each volume that a slow reader has opened.
#[derive(Default)]
pub(super) struct Kept(BTreeMap<VolumeId, Open>);

struct Open {
    pod: Watched,
    root: PathBuf,
    content: Content,
    /// The times, by [`World::now`], at which it was opened, and since when nothing is mounted.
    at: Duration,
    gone: Option<Duration>,
}

impl Kept {
    /// Keeps a content until its volume is gone. The one before, of the same volume, is closed.
    pub(super) fn keep(
        &mut self,
        world: &World,
        (pod, root, class, content): (Watched, PathBuf, usize, Content),
    ) {
        let open = Open {
            root,
            content,
            at: world.now(),
            gone: None,
            pod,
        };
        self.0.insert((open.pod.uid.clone(), class), open);
    }

    /// Judges those whose volumes are gone for a while.
    pub(super) fn judge(&mut self, world: &World) {
        let there: Vec<String> = lock(&world.pods).keys().cloned().collect();
        self.0
            .retain(|(uid, class), open| there.contains(uid) || open.stays(world, *class));
    }
}

impl Open {
    /// Judges the content of a pod that is gone. Returns whether it is too early for that.
    fn stays(&mut self, world: &World, class: usize) -> bool {
        // Who loses a mount in another way cannot remove what it has.
        let is_judged = world.is_up(&self.pod.node, &self.root)
            && !world.is_buried(&self.pod.uid)
            && !self.content.is_read_only();
        let now = world.now();
        if !is_judged || now - self.at > LONG {
            return false;
        }
        let volume = path_of(&self.pod, &self.root, class);
        if is_mount(&volume) {
            self.gone = None;
            return true;
        }
        // A fault under which a driver starts anew is noted when it is over.
        let is_calm = lock(&world.calm).is_some();
        if now - *self.gone.get_or_insert(now) < SOON || !is_calm {
            return true;
        }
        // Who is killed in between does not come back to it.
        if world.driver_ran_since(&self.pod.node, self.at) {
            self.finds(world, &volume, class);
        }
        false
    }

    fn finds(&self, world: &World, volume: &Path, class: usize) {
        world.log.checked("contents open beyond their volume", 1);
        if let Some(name) = self.content.readable() {
            let class = CLASSES.get(class).copied().unwrap_or_default();
            let Watched { name: pod, uid, .. } = &self.pod;
            let volume = volume.display();
            let text = format!("pod {pod} ({uid}), volume of {class} at {volume}: {name}");
            let invariant = "what was unmounted cannot be read any more";
            world.log.find(invariant, text);
        }
    }
}
