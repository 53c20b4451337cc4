//! Faults of mounts: those of pods' volumes, and their way out of the driver's container.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{DeleteParams, ListParams};

use crate::cluster::{Result, api};

use super::super::ground::Ground;
use super::super::lock;
use super::super::observer::{has_ended, is_mount, path_of};
use super::super::schedule::What;
use super::super::store::{CHANGED_ONLY, CLASSES, OBJECTS, SELDOM, number_of};
use super::super::tenants::{CLOSED, pod_name};
use super::super::world::Watched;
use super::calls::target;
use super::{Actor, sleep};

/// The time after which a pod that is refused has an event about it.
const VISIBLE: Duration = Duration::from_secs(3);
/// The longest time for which other faults keep volumes from being mounted, one after another.
const LONGEST: Duration = Duration::from_secs(30);
/// Tries to continue the process `$1`, which may be gone.
const GOES_ON: &str = "kill -CONT \"$1\" 2>/dev/null || true";

/// Makes the volumes `$@` read-only; prints how many.
///
/// The other flags are those of the mount: a remount that does not repeat them removes them.
const READ_ONLY: &str = r#"
struck=0
for volume in "$@"; do
    if mount -o remount,ro,nosuid,nodev,noexec tmpfs "$volume"; then struck=$((struck + 1)); fi
done
echo "$struck"
"#;
/// Undoes that, where there is such a volume.
const WRITABLE: &str = r#"
for volume in "$@"; do
    if grep -q " $volume tmpfs ro" /proc/self/mounts; then mount -o remount,rw,nosuid,nodev,noexec tmpfs "$volume"; fi
done
"#;

/// Puts `$2` mounts at once onto each of the volumes `$3`…, prepared in the directory `$1`. Prints how
/// many there are then. A file of the lowest one stays in the directory `$1-kept`.
///
/// The path of the directory leads to the last mount. The working directory is the root of the first,
/// with all others above it.
const BURY: &str = r#"
stage=$1 count=$2 made=0 mounted=0
shift 2
undo() {
    cd /
    while [ "$made" -gt 0 ] && umount "$stage"; do made=$((made - 1)); done
    rmdir "$stage"
}
set -e
mkdir -p "$stage"; trap undo EXIT
while [ "$made" -lt "$count" ]; do
    mount -t tmpfs -o size=4k,mode=0700 buried "$stage"
    made=$((made + 1))
    if [ "$made" = 1 ]; then
        mount --make-rprivate "$stage"; cd "$stage"
        mkdir "$stage-kept"; mount --bind . "$stage-kept"; echo kept > "$stage-kept/kept"
    fi
done
for volume in "$@"; do
    if mount --no-canonicalize --rbind . "$volume" 2>/dev/null; then mounted=$((mounted + count)); fi
done
echo "$mounted"
"#;

/// Prints the file that [`BURY`] has left in the directory `$1`, and removes the directory.
const KEPT: &str = r#"
cat "$1/kept" 2>&1 || true
umount "$1"
rmdir "$1"
"#;
/// Unmounts the volumes `$@`.
const UNMOUNT: &str = r#"for volume in "$@"; do umount -l "$volume"; done"#;
/// The content that a file gets which somebody alters.
pub(in super::super) const ALTERED: &str = "altered";
/// Each alters the volume `$1`, and never the directory below it once that is unmounted.
pub(in super::super) const ALTERATIONS: [&str; 5] = [
    r#"cd "$1/..data" && printf altered > a"#,
    r#"chmod 0666 "$1/c""#,
    r#"rm "$1/c""#,
    r#"rm -r "$1/..data/deep""#,
    r#"cd "$1/..data" && cd -P .. && touch stray && mkdir strays && touch strays/one"#,
];
/// The time in which the volumes of a pod that is deleted are unmounted, and the pause between two looks.
const UNMOUNTED: Duration = Duration::from_secs(20);
const PAUSE: u64 = 250;

impl<G: Ground> Actor<'_, G> {
    /// Mounts on the volumes of a pod, as those have done that mounted a volume anew with each of their
    /// starts, and deletes the pod. Its containers do not see it.
    pub(super) async fn bury(&self, what: What, number: usize, mounts: usize) -> Result<()> {
        let name = pod_name(number);
        let pod = {
            let pods = lock(&self.world.pods);
            pods.values().find(|pod| pod.name == name).cloned()
        };
        let Some(pod) = pod.filter(|pod| pod.ready) else {
            return Ok(());
        };
        // From now on this process does not see what the containers see.
        lock(&self.world.buried).insert(pod.uid.clone());
        let stage = format!("{}/chaos-stage-{}", self.ground.scratch(), self.next());
        let volumes = pod.classes.iter().map(|class| target(&pod, *class));
        let arguments: Vec<String> = [stage.clone(), mounts.to_string()]
            .into_iter()
            .chain(volumes)
            .collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mounted = self.sh(&pod.node, BURY, &arguments).await;
        self.delete(number, &DeleteParams::default()).await?;
        let mounted = mounted?.trim().parse().unwrap_or_default();
        self.world.log.struck(&what.kind(), mounted);
        self.others_keep_files(&pod, &format!("{stage}-kept")).await
    }

    /// Checks that the driver removes no file of another file system from a volume of a pod that goes.
    async fn others_keep_files(&self, pod: &Watched, kept: &str) -> Result<()> {
        let root = self.ground.root(&pod.node).await?;
        let begun = self.world.now();
        let is_there = |class: &usize| is_mount(&path_of(pod, &root, *class));
        while pod.classes.iter().any(is_there) && self.world.now() - begun < UNMOUNTED {
            sleep(PAUSE).await;
        }
        let text = self.sh(&pod.node, KEPT, &[kept]).await;
        // With the power, a node has lost what was mounted.
        if !self.world.is_up(&pod.node, &root) {
            return Ok(());
        }
        let text = text?;
        self.world.log.checked("file systems of others", 1);
        if text.trim() != "kept" {
            let text = format!("pod {} ({}): {}", pod.name, pod.uid, text.trim());
            let invariant = "what others have mounted keeps its files";
            self.world.log.find(invariant, text);
        }
        Ok(())
    }

    /// Returns the well-behaved pod of a number, if it runs.
    pub(super) fn running_pod(&self, number: usize) -> Option<Watched> {
        let name = pod_name(number);
        let pods = lock(&self.world.pods);
        let pod = pods.values().find(|pod| pod.name == name).cloned();
        pod.filter(|pod| pod.ready && !self.world.is_buried(&pod.uid))
    }

    /// Stops the driver for a while, in the middle of whatever it does.
    pub(super) async fn driver_paused(&self, what: What, node: &str, lasts: u64) -> Result<()> {
        let driver = self.running_driver(node).await?;
        self.sh(node, "kill -STOP \"$1\"", &[&driver]).await?;
        sleep(lasts).await;
        let goes_on = self.sh(node, GOES_ON, &[&driver]).await;
        self.undone(what, goes_on.map(drop));
        self.world.log.struck(&what.kind(), 1);
        Ok(())
    }

    /// Keeps the driver's mounts in its container until it starts anew. No pod may start with a volume
    /// that it would not see: the observer finds one that is empty. A pod that comes meanwhile has to be told.
    pub(super) async fn propagation_lost(
        &self,
        what: What,
        node: &str,
        number: usize,
        lasts: u64,
    ) -> Result<()> {
        self.ground.isolate_driver(node, true).await?;
        self.world.driver_restarts(node);
        let force = DeleteParams::default().grace_period(0);
        let comes = async {
            self.delete(number, &force).await?;
            self.create(number, node).await
        };
        let came = comes.await;
        sleep(lasts).await;
        let refused = match came {
            Ok(()) => self.refused(node, number).await,
            Err(error) => Err(error),
        };
        let ended = self.ground.isolate_driver(node, false).await;
        self.undone(what, ended);
        self.world.log.struck(&what.kind(), refused?);
        Ok(())
    }

    /// Returns how many of the pods of this number on a node are refused. Finds one that is and of which
    /// nobody is told.
    async fn refused(&self, node: &str, number: usize) -> Result<u64> {
        let name = pod_name(number);
        let now = self.world.now();
        let waits = |pod: &Watched| pod.waiting.is_some_and(|since| now - since > VISIBLE);
        let pods = self.pods_of(node);
        let Some(pod) = pods.into_iter().find(|pod| pod.name == name && waits(pod)) else {
            return Ok(0);
        };
        let events = self.namespace.api::<Event>();
        let events = events.list(&ListParams::default()).await;
        let events = events.map_err(api("list events".to_owned()))?;
        let of_it = events.iter().filter(|event| {
            event.involved_object.uid.as_deref() == Some(&pod.uid)
                && event.reason.as_deref() == Some("FailedMount")
        });
        self.world
            .log
            .checked("pods that are refused for lost mounts", 1);
        if of_it.count() == 0 {
            let text = format!("pod {name} ({}) on {node} waits", pod.uid);
            self.world
                .log
                .find("a pod whose volume it would not see is told", text);
        }
        Ok(1)
    }

    /// Alters files in the volumes of a pod, as an administrator does by mistake. The next refresh puts them in
    /// order. The pod is deleted then.
    pub(super) async fn alter_files(&self, what: What, number: usize, how: usize) -> Result<()> {
        let Some(pod) = self.running_pod(number) else {
            return Ok(());
        };
        // Until then the pod reads what was altered, and Secrets are made of it.
        lock(&self.world.buried).insert(pod.uid.clone());
        self.world.files_are_altered(true);
        let done = self.alter_files_of(what, &pod, number, how).await;
        self.world.files_are_altered(false);
        done
    }

    async fn alter_files_of(
        &self,
        what: What,
        pod: &Watched,
        number: usize,
        how: usize,
    ) -> Result<()> {
        let how = ALTERATIONS[how % ALTERATIONS.len()];
        let mut altered = Ok(String::new());
        for class in &pod.classes {
            let volume = target(pod, *class);
            let done = self.sh(&pod.node, how, &[&volume]).await;
            altered = altered.and(done);
            match *class {
                SELDOM => self.ask(*class).await?,
                // What its provider leaves out counts as it is.
                CHANGED_ONLY => self.rotate(*class).await?,
                _ => {}
            }
        }
        let come_back = self.come_back(pod).await;
        self.delete(number, &DeleteParams::default()).await?;
        if pod.classes.contains(&SELDOM) {
            // What this pod had last may be of a call from before an edit of the class, and its Secret has that
            // until another volume is refreshed (docs/secrets.md).
            self.ask(SELDOM).await?;
        }
        altered?;
        self.world.log.struck(&what.kind(), 1);
        come_back
    }

    /// Unmounts the volumes of a pod on the node, where its containers do not see it. They are mounted
    /// again for the next container, with what the store has. The pod is deleted then.
    pub(super) async fn unmount_volumes(&self, what: What, number: usize) -> Result<()> {
        let Some(pod) = self.running_pod(number) else {
            return Ok(());
        };
        // From now on this process does not see what the containers see.
        lock(&self.world.buried).insert(pod.uid.clone());
        let targets: Vec<String> = pod
            .classes
            .iter()
            .map(|class| target(&pod, *class))
            .collect();
        let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
        let unmounted = self.sh(&pod.node, UNMOUNT, &targets).await;
        let come_back = self.come_back(&pod).await;
        self.delete(number, &DeleteParams::default()).await?;
        unmounted?;
        self.world.log.struck(&what.kind(), targets.len() as u64);
        come_back
    }

    /// Waits until the volumes of a pod are whole on its node.
    async fn come_back(&self, pod: &Watched) -> Result<()> {
        let root = self.ground.root(&pod.node).await?;
        let lacks = |class: &usize| !is_whole(&path_of(pod, &root, *class), *class);
        let since = self.world.now();
        let pods = self.namespace.api::<Pod>();
        while pod.classes.iter().any(lacks) {
            let there = pods.get_opt(&pod.name).await;
            let there = there.map_err(api(format!("get pod {}", pod.name)))?;
            let runs = there.is_some_and(|there| {
                there.metadata.uid.as_ref() == Some(&pod.uid)
                    && there.metadata.deletion_timestamp.is_none()
                    && !has_ended(&there)
            });
            // After a reboot the node has other mounts.
            if !runs || !self.world.is_up(&pod.node, &root) {
                return Ok(());
            }
            if self.world.now() - since > self.world.bounds.converge + LONGEST {
                let text = format!("pod {} ({}) on {}", pod.name, pod.uid, pod.node);
                self.world
                    .log
                    .find("a volume that somebody has altered is put in order", text);
                return Ok(());
            }
            sleep(250).await;
        }
        self.world
            .log
            .took("a volume that was unmounted", self.world.now() - since);
        Ok(())
    }

    /// Makes the volumes of a pod read-only for a while: its program keeps what it has.
    pub(super) async fn volumes_read_only(
        &self,
        what: What,
        number: usize,
        lasts: u64,
    ) -> Result<()> {
        let Some(pod) = self.running_pod(number) else {
            return Ok(());
        };
        let targets: Vec<String> = pod
            .classes
            .iter()
            .map(|class| target(&pod, *class))
            .collect();
        let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
        let struck = self.sh(&pod.node, READ_ONLY, &targets).await?;
        for class in &pod.classes {
            self.rotate(*class).await?;
        }
        sleep(lasts).await;
        // A volume that is gone by now is no volume of this pod any more.
        let writable = self.sh(&pod.node, WRITABLE, &targets).await;
        let is_up = lock(&self.world.roots).contains_key(&pod.node);
        if is_up {
            self.undone(what, writable.map(drop));
        }
        let struck = struck.trim().parse().unwrap_or_default();
        self.world.log.struck(&what.kind(), struck);
        Ok(())
    }
}

/// Returns whether a volume of a class has whole files with their modes, and nothing that a program has put there.
fn is_whole(volume: &Path, class: usize) -> bool {
    let name = CLASSES.get(class).copied().unwrap_or_default();
    let is = |(object, file): (&str, &str)| {
        let text = fs::read_to_string(volume.join(file)).unwrap_or_default();
        number_of(name, object, &text).is_ok()
    };
    let (closed, mode) = CLOSED;
    let found = fs::metadata(volume.join(closed)).map(|found| found.mode() & 0o7777);
    let has_stray = || volume.join("stray").exists() || volume.join("strays").exists();
    OBJECTS.into_iter().all(is) && found.is_ok_and(|found| found == mode) && !has_stray()
}
