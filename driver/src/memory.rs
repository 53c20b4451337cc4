//! How much memory mounted content takes, and how much it may take.
//!
//! A tmpfs is memory that the kernel charges to who writes it, and it stays charged when the
//! writer dies. Content that does not fit below the driver's memory limit would end the driver,
//! and the next one after it. So a volume's content is reserved before it is written, and refused
//! where it does not fit; the room is the limit less what the driver needs itself.
//!
//! Files that a provider writes are charged to the provider. They are measured, and take nothing
//! of the room.

mod cgroup;
mod ledger;

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{files::Payload, mount};

pub use cgroup::limit;
use ledger::Ledger;
pub use ledger::{Budget, Limit, NoRoom, Source};

/// A file of one byte takes a page.
const PAGE: u64 = 4096;

/// What the kernel keeps of each file, directory and link beside its content: an inode and the
/// name (measured on Linux 6.18: 0.9 to 1.3 KiB).
const OBJECT: u64 = 2048;

/// What the kernel keeps of each mount (measured: 2.8 KiB).
const MOUNT: u64 = 2 * OBJECT;

/// A link whose target is at least this long takes a page.
const LONGEST_INLINE_LINK: usize = 128;

/// What [`Memory::check`] asks for: less than this, no content takes.
const LEAST: u64 = 16 * 1024;

/// The memory of this process, as far as content takes it.
#[derive(Debug)]
pub struct Memory {
    ledger: Mutex<Ledger<PathBuf>>,
    answer_bytes: u64,
}

/// Memory that is set aside for content that is being written. Dropping it gives it back.
#[derive(Debug)]
#[must_use = "dropping a reservation gives it back"]
pub struct Reservation {
    memory: Arc<Memory>,
    target: PathBuf,
    bytes: u64,
}

/// What `/metrics` says, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readings {
    /// What all mounted volumes hold.
    pub mounted: u64,
    /// What the volumes may hold whose content the driver writes.
    pub room: u64,
    /// What bounds this process.
    pub limit: u64,
}

impl Memory {
    /// Shares out a limit. `answer_bytes` is what the answers of a provider may take together.
    pub fn new(limit: Limit, answer_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            ledger: Mutex::new(Ledger::new(Budget::of(limit, answer_bytes))),
            answer_bytes,
        })
    }

    /// How the limit is shared out.
    pub fn budget(&self) -> Budget {
        self.lock().budget()
    }

    /// The limit may have changed: Kubernetes can resize a pod that runs.
    pub fn set_limit(&self, limit: Limit) {
        self.lock().set_budget(Budget::of(limit, self.answer_bytes));
    }

    /// Sets memory aside for content that is about to be written into a volume, beside what it
    /// holds. May block.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn reserve(
        self: &Arc<Self>,
        target: &Path,
        namespace: &str,
        content: &Payload,
    ) -> Result<Reservation, NoRoom> {
        self.reserve_bytes(target, namespace, cost(content))
    }

    /// Refuses a volume for which there is no room whatever its content is, before anybody is
    /// asked for it. May block.
    ///
    /// # Errors
    /// When nothing fits any more.
    pub fn check(self: &Arc<Self>, target: &Path, namespace: &str) -> Result<(), NoRoom> {
        self.reserve_bytes(target, namespace, LEAST).map(drop)
    }

    fn reserve_bytes(
        self: &Arc<Self>,
        target: &Path,
        namespace: &str,
        bytes: u64,
    ) -> Result<Reservation, NoRoom> {
        let target = target.to_owned();
        let mut ledger = self.lock();
        if ledger.reserve(&target, namespace, bytes).is_err() {
            // Perhaps something is gone that still counts, former content for example.
            ledger.measure(|target| in_use(target));
            ledger.reserve(&target, namespace, bytes)?;
        }
        Ok(Reservation {
            memory: Arc::clone(self),
            target,
            bytes,
        })
    }

    /// Measures a volume that may be new here. `charged` says whether the driver wrote what is in
    /// it. May block.
    pub fn found(&self, target: &Path, namespace: &str, charged: bool) {
        let used = in_use(target);
        self.lock()
            .holds(&target.to_owned(), namespace, used, charged);
    }

    /// Measures a volume anew, if it is known here. May block.
    pub fn changed(&self, target: &Path) {
        let used = in_use(target);
        self.lock().changed(&target.to_owned(), used);
    }

    /// Finds volumes of this driver that are mounted without being known here: a driver that was
    /// killed left them, and their memory. May block.
    pub fn find_others(&self, driver_name: &str) {
        for target in cgroup::tmpfs_mounts(Path::new("/")) {
            if !self.lock().knows(&target) && is_of_driver(&target, driver_name) {
                self.found(&target, "", true);
            }
        }
    }

    /// What is held and set aside of the room, in bytes, as far as it is known without measuring.
    pub fn in_use(&self) -> u64 {
        self.lock().in_use()
    }

    /// Measures all volumes. May block.
    pub fn readings(&self) -> Readings {
        let mut ledger = self.lock();
        ledger.measure(|target| in_use(target));
        let budget = ledger.budget();
        Readings {
            mounted: ledger.mounted(),
            room: budget.room(),
            limit: budget.limit().bytes,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ledger<PathBuf>> {
        // Its numbers are whole whoever panicked while holding it.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.memory.lock().release(&self.target, self.bytes);
    }
}

/// What content takes at most once it is written, in bytes.
fn cost(content: &Payload) -> u64 {
    let files: u64 = content
        .files()
        .map(|(_, file)| (file.contents.expose().len() as u64).next_multiple_of(PAGE))
        .sum();
    let roots = content.roots();
    let long = |name: &&&str| name.len() + "..data/".len() >= LONGEST_INLINE_LINK;
    let long_links = roots.iter().filter(long).count();
    // Links at the root exist twice for a moment; the root, `..data`, the directory that it leads
    // to and the one for what is put aside are there always.
    let objects = content.len() + content.directories() + 2 * roots.len() + 4;
    files + 2 * PAGE * long_links as u64 + OBJECT * objects as u64 + MOUNT
}

/// What a volume holds, in bytes; nothing where nothing is mounted, or nothing can be seen.
fn in_use(target: &Path) -> u64 {
    match mount::in_use(target) {
        Ok(Some(in_use)) => in_use.bytes + OBJECT * in_use.inodes + MOUNT,
        Ok(None) | Err(_) => 0,
    }
}

/// Whether kubelet says that a volume is of this driver: it leaves a file beside the target.
fn is_of_driver(target: &Path, driver_name: &str) -> bool {
    const LONGEST: u64 = 64 * 1024;
    let read = || {
        let beside = target.parent()?.join("vol_data.json");
        if !fs::symlink_metadata(&beside).ok()?.is_file() {
            return None;
        }
        let mut text = Vec::new();
        let file = fs::File::open(beside).ok()?;
        file.take(LONGEST).read_to_end(&mut text).ok()?;
        let data: serde_json::Value = serde_json::from_slice(&text).ok()?;
        Some(data["driverName"] == *driver_name)
    };
    read().unwrap_or(false)
}
