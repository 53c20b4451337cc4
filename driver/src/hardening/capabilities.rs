//! Reduces the capabilities of the process to those that mounting and filling volumes needs
//! (capabilities(7)).

use std::{fs, io};

use super::MemoryLock;
use crate::config::Config;

/// A capability that the driver keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// The name, as manifests write it.
    pub name: &'static str,
    number: u32,
    /// What does not work without it.
    pub without: &'static str,
}

const KEPT: [Capability; 4] = [
    Capability {
        name: "CHOWN",
        number: 0,
        without: "volumes of pods with an fsGroup cannot be mounted",
    },
    Capability {
        name: "DAC_OVERRIDE",
        number: 1,
        without: "sockets and files of providers that run as another user than the driver cannot be used",
    },
    Capability {
        name: "FOWNER",
        number: 3,
        without: "files that a provider writes as another user cannot get the volume's mode",
    },
    Capability {
        name: "SYS_ADMIN",
        number: 21,
        without: "no volume can be mounted or unmounted. Run the driver's container as privileged",
    },
];

/// Needed when the driver starts to serve an address, and only for ports below 1024.
const NET_BIND_SERVICE: Capability = Capability {
    name: "NET_BIND_SERVICE",
    number: 10,
    without: "the port of --metrics-addr or --healthz-addr is below 1024, and may be refused",
};

/// The version of the structures below that has two words for each set.
const VERSION_3: u32 = 0x2008_0522;

/// The highest number of a capability that version 3 can express.
const HIGHEST: u32 = 63;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// One word of each set.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Word {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Needed for each page that is locked, where locked memory has a limit.
const IPC_LOCK: Capability = Capability {
    name: "IPC_LOCK",
    number: 14,
    without: "memory cannot be locked",
};

/// Returns the capabilities that a driver with these settings keeps.
pub fn kept(config: &Config, lock: MemoryLock) -> Vec<Capability> {
    let mut kept = KEPT.to_vec();
    if lock == MemoryLock::ByCapability {
        kept.push(IPC_LOCK);
    }
    let addresses = [config.metrics_addr, config.healthz_addr];
    if addresses
        .iter()
        .flatten()
        .any(|it| (1..1024).contains(&it.port()))
    {
        kept.push(NET_BIND_SERVICE);
    }
    kept
}

/// Drops all other capabilities of this thread, from the bounding and the ambient set, too. Nothing
/// remains inheritable. Returns those of `kept` that the thread did not have.
///
/// # Errors
/// The system's error.
pub(super) fn reduce_to(kept: &[Capability]) -> io::Result<Vec<Capability>> {
    let wanted = kept.iter().fold(0, |set, it| set | 1_u64 << it.number);
    let had = permitted()?;
    // Where the thread may not do so (without SETPCAP), the sets below are what counts: with
    // `no_new_privs`, the bounding set gives nothing back.
    let bounding = drop_bounding(wanted);
    clear_ambient()?;
    set(had & wanted)?;
    if let Err(error) = bounding {
        tracing::info!(%error, "the bounding set of capabilities stays as it is; the driver uses none of it");
    }
    let missing = kept.iter().filter(|it| had & 1 << it.number == 0);
    Ok(missing.copied().collect())
}

#[allow(unsafe_code)]
fn permitted() -> io::Result<u64> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut words = [Word::default(); 2];
    // SAFETY: both pointers are valid for the structures of version 3, which the kernel reads and fills
    // during the call.
    let done = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) };
    succeeded(done)?;
    let [low, high] = words.map(|word| u64::from(word.permitted));
    Ok(high << 32 | low)
}

/// Sets the effective and the permitted set, and empties the inheritable one.
#[allow(unsafe_code)]
fn set(capabilities: u64) -> io::Result<()> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let words = [capabilities, capabilities >> 32].map(|word| {
        let word = u32::try_from(word & u64::from(u32::MAX)).unwrap_or_default();
        Word {
            effective: word,
            permitted: word,
            inheritable: 0,
        }
    });
    // SAFETY: both pointers are valid for the structures of version 3, which the kernel reads during the
    // call.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, words.as_ptr()) };
    succeeded(done)
}

#[allow(unsafe_code)]
fn drop_bounding(wanted: u64) -> io::Result<()> {
    let last = fs::read_to_string("/proc/sys/kernel/cap_last_cap").ok();
    let last = last.and_then(|text| text.trim().parse().ok());
    for number in 0..=last.unwrap_or(HIGHEST).min(HIGHEST) {
        if wanted & 1 << number != 0 {
            continue;
        }
        // SAFETY: PR_CAPBSET_DROP takes a number and no pointer.
        let done =
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        match succeeded(done.into()) {
            // This kernel has fewer capabilities than `last` says.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            result => result?,
        }
    }
    Ok(())
}

#[allow(unsafe_code)]
fn clear_ambient() -> io::Result<()> {
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong;
    // SAFETY: PR_CAP_AMBIENT_CLEAR_ALL takes no pointer.
    let done = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0) };
    match succeeded(done.into()) {
        // Kernels before 4.3 have no ambient set.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

fn succeeded(done: libc::c_long) -> io::Result<()> {
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
