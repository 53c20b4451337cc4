//! Faults of the disk with the driver's records: full, read-only, or without an answer.

use std::time::Duration;

use tokio::sync::MutexGuard;

use crate::cluster::Result;

use super::super::ground::Ground;
use super::super::schedule::{HUNG_FOR_LONG, What};
use super::node::PLUGIN;
use super::{Actor, sleep};

/// The least number of volumes whose calls take all threads of a driver soon.
const ENOUGH_VOLUMES: usize = 4;
/// Removes the file system that does not answer, if it is still there. `$1` is its directory.
const ANSWER: &str = r#"if grep -q "^hung $1 " /proc/self/mounts; then umount -l "$1"; fi"#;

/// Replaces the disk with the records by a small one with the same files, while the driver is halted.
/// `$1` is the driver, `$2` the directory, `$3` another one that is free, `$4` what to do then. Leaves
/// all as it was if that fails.
///
/// A mount is made read-only by its name and directory: without the name, mount(8) would repeat the
/// options that the mount has, among them an owner that a user namespace does not know.
const SMALL_DISK: &str = r#"
driver=$1 records=$2 copy=$3 mounted=
undo() {
    code=$?
    if [ "$code" != 0 ] && [ -n "$mounted" ]; then umount -l "$records"; fi
    rm -rf "$copy"
    kill -CONT "$driver" || true
    exit "$code"
}
set -e
kill -STOP "$driver"; trap undo EXIT
rm -rf "$copy"; mkdir -p "$copy"; cp -a "$records/." "$copy/"
mount -t tmpfs -o size=512k,mode=0700 chaos "$records"; mounted=yes
cp -a "$copy/." "$records/"
case "$4" in
full) dd if=/dev/zero of="$records/filler" bs=4k status=none 2>/dev/null || true ;;
*) mount -o remount,ro chaos "$records" ;;
esac
"#;
/// Undoes that; the files are those that the small disk has by now.
const LARGE_DISK: &str = r#"
set -e
if [ -n "$1" ]; then kill -STOP "$1" && trap 'kill -CONT "$1" || true' EXIT || true; fi
mount -o remount,rw chaos "$2"; rm -f "$2/filler"
rm -rf "$3"; mkdir -p "$3"; cp -a "$2/." "$3/"
umount -l "$2"
find "$2" -mindepth 1 -delete; cp -a "$3/." "$2/"; rm -rf "$3"
"#;
/// Tries to write the file `$1`, and leaves none.
const WRITE: &str = r#"echo 0123456789 > "$1"; code=$?; rm -f "$1"; exit "$code""#;

impl<G: Ground> Actor<'_, G> {
    /// Waits until no other fault of the disk of a node lasts.
    async fn disk(&self, node: &str) -> Option<MutexGuard<'_, ()>> {
        Some(self.disks.get(node)?.lock().await)
    }

    pub(super) async fn bad_disk(
        &self,
        what: What,
        node: &str,
        lasts: u64,
        how: &str,
    ) -> Result<()> {
        let _alone = self.disk(node).await;
        let records = format!("{PLUGIN}/records");
        let driver = self.running_driver(node).await?;
        let copy = format!("{}/chaos-records", self.ground.scratch());
        // A driver that is killed meanwhile has records from before.
        self.world.records_are_lost();
        self.sh(node, SMALL_DISK, &[&driver, &records, &copy, how])
            .await?;
        let mark = format!("{records}/mark");
        let writes = self.sh(node, WRITE, &[&mark]).await;
        self.world
            .log
            .struck(&what.kind(), u64::from(writes.is_err()));
        sleep(lasts).await;
        self.world.records_are_lost();
        let driver = self.ground.driver_process(node).await.ok().flatten();
        let driver = driver.map(|driver| driver.to_string()).unwrap_or_default();
        let arguments = [&*driver, &records, &copy];
        let large = self.sh(node, LARGE_DISK, &arguments).await;
        self.undone(what, large.map(drop));
        Ok(())
    }

    /// Lays a file system over the records that does not answer, for a while. If it is a long one, the
    /// health check has to say so.
    pub(super) async fn disk_hung(&self, what: What, node: &str, lasts: u64) -> Result<()> {
        let _alone = self.disk(node).await;
        let records = format!("{PLUGIN}/records");
        self.running_driver(node).await?;
        let volumes = || {
            let pods = self.pods_of(node).into_iter().filter(|pod| pod.ready);
            pods.map(|pod| pod.classes.len()).sum::<usize>()
        };
        let before = volumes();
        self.world.records_are_lost();
        self.liveness.hang_begins(node);
        let milliseconds = lasts.to_string();
        let command = ["probe", "hung-disk", &records, &milliseconds];
        let hung = self.ground.run(node, &command);
        let mut least = before;
        let watch = async {
            loop {
                sleep(500).await;
                least = least.min(volumes());
            }
        };
        let hung = tokio::select! {
            hung = hung => hung,
            () = watch => return Ok(()),
        };
        let told = self.liveness.hang_ends(node);
        self.world.records_are_lost();
        if hung.is_err() {
            let answers = self.sh(node, ANSWER, &[&records]).await;
            self.undone(what, answers.map(drop));
        }
        hung?;
        self.world.log.struck(&what.kind(), 1);
        if lasts >= HUNG_FOR_LONG && least >= ENOUGH_VOLUMES {
            self.world.log.checked("long hangs of a disk", 1);
            match told {
                Some(after) => self
                    .world
                    .log
                    .took("a hung disk until the health check tells", after),
                None => self.world.log.find(
                    "the health check tells of a disk that does not answer",
                    format!(
                        "the disk on {node} hung for {:?}",
                        Duration::from_millis(lasts)
                    ),
                ),
            }
        }
        Ok(())
    }
}
