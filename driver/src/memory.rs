//! Bounds the memory that mounted content takes.
//!
//! The kernel charges the memory of a tmpfs to the process that writes it, also after that process has
//! ended. Content that does not fit below the driver's memory limit would kill the driver, and each
//! driver after it. So memory is reserved before content is written, and content that does not fit is
//! refused. The room for content is the limit less what the driver needs itself.
//!
//! Files that a provider writes are charged to the provider. They are measured, but take no room.

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

/// The size of a page, in bytes. A file of one byte takes a page.
const PAGE: u64 = 4096;

/// The bytes that the kernel needs for each file, directory and link beside its content: an inode and
/// the name (measured on Linux 6.18: 0.9 to 1.3 KiB).
const OBJECT: u64 = 2048;

/// The bytes that the kernel needs for each mount (measured: 2.8 KiB).
const MOUNT: u64 = 2 * OBJECT;

/// The length of a link's target from which on the link takes a page.
const LONGEST_INLINE_LINK: usize = 128;

/// The bytes that any content takes, which [`Memory::check`] asks for.
const LEAST: u64 = 16 * 1024;

/// The memory of this process that content takes.
#[derive(Debug)]
pub struct Memory {
    ledger: Mutex<Ledger<PathBuf>>,
    answer_bytes: u64,
}

/// Memory that is reserved for content while it is written. Dropping it frees it.
#[derive(Debug)]
#[must_use = "dropping a reservation frees it"]
pub struct Reservation {
    memory: Arc<Memory>,
    target: PathBuf,
    bytes: u64,
}

/// The readings for `/metrics`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readings {
    /// The memory that all mounted volumes take.
    pub mounted: u64,
    /// The memory that content that the driver writes may take.
    pub room: u64,
    /// The memory limit of this process.
    pub limit: u64,
}

impl Memory {
    /// Creates the memory with a limit. `answer_bytes` is the memory that all answers of a provider may
    /// take together.
    pub fn new(limit: Limit, answer_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            ledger: Mutex::new(Ledger::new(Budget::of(limit, answer_bytes))),
            answer_bytes,
        })
    }

    /// Returns how the limit is divided.
    pub fn budget(&self) -> Budget {
        self.lock().budget()
    }

    /// Sets the limit, which changes when Kubernetes resizes the pod.
    pub fn set_limit(&self, limit: Limit) {
        self.lock().set_budget(Budget::of(limit, self.answer_bytes));
    }

    /// Reserves memory for content that is about to be written into a volume, beside its present
    /// content. May block.
    ///
    /// # Errors
    /// Says which bound the content exceeds.
    pub fn reserve(
        self: &Arc<Self>,
        target: &Path,
        namespace: &str,
        content: &Payload,
    ) -> Result<Reservation, NoRoom> {
        self.reserve_bytes(target, namespace, cost(content))
    }

    /// Makes sure that there is room for the smallest content, before a provider is asked for it. May
    /// block.
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
            // Content that is gone, such as former content, may still be counted.
            ledger.measure(|target| in_use(target));
            ledger.reserve(&target, namespace, bytes)?;
        }
        Ok(Reservation {
            memory: Arc::clone(self),
            target,
            bytes,
        })
    }

    /// Measures a volume that may not be known yet. `is_charged` says whether the driver wrote its
    /// content. May block.
    pub fn found(&self, target: &Path, namespace: &str, is_charged: bool) {
        let used = in_use(target);
        self.lock()
            .holds(&target.to_owned(), namespace, used, is_charged);
    }

    /// Measures a volume again, if it is known. May block.
    pub fn changed(&self, target: &Path) {
        let used = in_use(target);
        self.lock().changed(&target.to_owned(), used);
    }

    /// Finds mounted volumes of this driver that are not known yet: an earlier driver was killed while
    /// it published them. May block.
    pub fn find_others(&self, driver_name: &str) {
        for target in cgroup::tmpfs_mounts(Path::new("/")) {
            if !self.lock().knows(&target) && is_of_driver(&target, driver_name) {
                self.found(&target, "", true);
            }
        }
    }

    /// Returns the bytes of the room that are used or reserved, by the last measurement.
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
        // A panic while it was held has left the numbers whole.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.memory.lock().release(&self.target, self.bytes);
    }
}

/// Returns the bytes that content takes at most once it is written.
fn cost(content: &Payload) -> u64 {
    let files: u64 = content
        .files()
        .map(|(_, file)| (file.contents.expose().len() as u64).next_multiple_of(PAGE))
        .sum();
    let roots = content.roots();
    let long = |name: &&&str| name.len() + "..data/".len() >= LONGEST_INLINE_LINK;
    let long_links = roots.iter().filter(long).count();
    // Links at the root exist twice for a moment. The four others are the root, `..data`, the
    // directory that it leads to, and the one for what a swap puts aside.
    let objects = content.len() + content.directories() + 2 * roots.len() + 4;
    files + 2 * PAGE * long_links as u64 + OBJECT * objects as u64 + MOUNT
}

/// Returns the bytes that a volume takes: none if nothing is mounted, or it cannot be examined.
fn in_use(target: &Path) -> u64 {
    match mount::in_use(target) {
        Ok(Some(in_use)) => in_use.bytes + OBJECT * in_use.inodes + MOUNT,
        Ok(None) | Err(_) => 0,
    }
}

/// Returns whether a volume is of this driver, by the file that kubelet writes beside the target.
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
