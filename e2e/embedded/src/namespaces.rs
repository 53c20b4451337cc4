//! The mount and network namespaces of a node, around a root directory of its own.
//!
//! Afterwards the process sees the paths of the manifests (`/var/lib/kubelet`, `/run`, `/etc`)
//! and nothing of the host but its programs, read-only. Its network is a loopback: nothing can
//! leave the machine. Mounts and `/run` vanish with the last process of the namespace, as over a
//! reboot; the directories under the root stay, as a node's disk does.
//!
//! There is no process namespace (the node's children are ordinary processes of the host), and no
//! user but the caller.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{chdir, getegid, geteuid, pivot_root};

/// The path of the cluster's state directory in a node.
pub(crate) const STATE: &str = "/run/embedded";
/// The directory of [`Options::programs`](crate::Options::programs) in a node.
pub(crate) const PROGRAMS: &str = "/opt/embedded/bin";
/// The directories of the host's programs in a node.
pub(crate) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// The path of [`Options::shared`](crate::Options::shared) on every node.
pub const SHARED: &str = "/srv/shared";
/// The kubelet's usual root directory.
pub const KUBELET_ROOT: &str = "/var/lib/kubelet";

/// The host's programs and their libraries: directories are bound read-only, links are created again.
const HOST: [&str; 8] = [
    "usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "nix",
];
/// The kernel's own file systems.
const KERNEL: [&str; 3] = ["proc", "dev", "sys"];
/// The files of `/etc` that programs read when they start or resolve `localhost`.
const ETC: [&str; 8] = [
    "group",
    "hosts",
    "ld.so.cache",
    "localtime",
    "nsswitch.conf",
    "passwd",
    "protocols",
    "resolv.conf",
];
/// Directories that a node has from the start, besides those that are bound. Manifests create others.
const OWN: [&str; 5] = ["etc", "opt/embedded/bin", "run", "tmp", "var/log"];
/// The directories that a kubelet has below its root.
const OF_KUBELET: [&str; 3] = ["plugins", "plugins_registry", "pods"];

/// The parts of a node's file system.
#[derive(Debug)]
pub(crate) struct World<'a> {
    /// The node's root directory; created when absent, left as it is otherwise.
    pub(crate) root: &'a Path,
    /// Bound to [`STATE`].
    pub(crate) state: &'a Path,
    /// Bound to [`SHARED`], if there is one.
    pub(crate) shared: Option<&'a Path>,
    /// The kubelet's root directory.
    pub(crate) kubelet_root: &'a Path,
    /// Executables by name, bound into [`PROGRAMS`].
    pub(crate) programs: &'a BTreeMap<String, PathBuf>,
}

/// The reason why a node has no namespaces of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The system refuses new namespaces to this user.
    #[error(
        "this user may not make namespaces ({0}). Run as root, or allow user namespaces: sysctl \
         kernel.unprivileged_userns_clone=1 (where it exists), user.max_user_namespaces > 0, \
         kernel.apparmor_restrict_unprivileged_userns=0 (where it exists)"
    )]
    Refused(Errno),
    /// Another step failed.
    #[error("{step}: {source}")]
    Step {
        /// The step.
        step: String,
        /// The system's error.
        source: io::Error,
    },
}

/// Moves this process into new namespaces and makes `world.root` its root.
///
/// The process must have one thread: a process with more cannot enter a user namespace, and its other
/// threads would stay in the old namespaces.
///
/// # Errors
/// Returns [`Error::Refused`] with a remedy, or the step that failed.
pub(crate) fn enter(world: &World<'_>) -> Result<(), Error> {
    unshare_as_caller()?;
    let everything = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    change_propagation(Path::new("/"), everything)?;
    build_root(world)?;
    change_root(world.root)?;
    bind(world.kubelet_root, world.kubelet_root, Access::Write)?;
    // The kubelet does so as well: the driver's mounts must reach every other namespace.
    let shared = MsFlags::MS_REC | MsFlags::MS_SHARED;
    change_propagation(world.kubelet_root, shared)?;
    bring_loopback_up()
}

fn unshare_as_caller() -> Result<(), Error> {
    let own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
    let (uid, gid) = (geteuid(), getegid());
    if uid.is_root() {
        match unshare(own) {
            Ok(()) => return Ok(()),
            // Root in a container without CAP_SYS_ADMIN needs a user namespace like any user.
            Err(Errno::EPERM) => {}
            Err(error) => return Err(Error::Refused(error)),
        }
    }
    unshare(own | CloneFlags::CLONE_NEWUSER).map_err(Error::Refused)?;
    let maps = [
        // The kernel requires this before an unprivileged process writes a group map.
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ];
    for (file, line) in maps {
        fs::write(file, &line).map_err(|error| {
            // AppArmor allows the namespace to be created and then gives it no rights.
            match error.kind() {
                io::ErrorKind::PermissionDenied => Error::Refused(Errno::EPERM),
                _ => Error::Step {
                    step: format!("write {line:?} to {file}"),
                    source: error,
                },
            }
        })?;
    }
    Ok(())
}

fn build_root(world: &World<'_>) -> Result<(), Error> {
    let root = world.root;
    make_dir(root)?;
    // The new root must be a mount of its own.
    bind(root, root, Access::Write)?;
    for name in OWN {
        make_dir(&root.join(name))?;
    }
    let kubelet = world.kubelet_root;
    for name in OF_KUBELET {
        let below = kubelet.strip_prefix("/").unwrap_or(kubelet);
        make_dir(&root.join(below).join(name))?;
    }
    for name in HOST {
        let host = Path::new("/").join(name);
        match fs::read_link(&host) {
            Ok(target) => link(&target, &root.join(name))?,
            Err(_) if host.is_dir() => {
                make_dir(&root.join(name))?;
                bind(&host, &root.join(name), Access::Read)?;
            }
            Err(_) => {}
        }
    }
    for name in KERNEL {
        make_dir(&root.join(name))?;
        bind(&Path::new("/").join(name), &root.join(name), Access::Write)?;
    }
    for name in ETC {
        let host = Path::new("/etc").join(name);
        if host.is_file() {
            bind_file(&host, &root.join("etc").join(name))?;
        }
    }
    let run = root.join("run");
    step(format!("mount a tmpfs on {}", run.display()), || {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), &run, Some("tmpfs"), flags, Some("mode=0755"))
    })?;
    link(Path::new("/run"), &root.join("var/run"))?;
    let state = inside(root, STATE);
    make_dir(&state)?;
    step(format!("bind {}", world.state.display()), || {
        mount(
            Some(world.state),
            &state,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
    })?;
    if let Some(shared) = world.shared {
        let to = inside(root, SHARED);
        make_dir(&to)?;
        bind(shared, &to, Access::Write)?;
    }
    for (name, path) in world.programs {
        bind_file(path, &inside(root, PROGRAMS).join(name))?;
    }
    Ok(())
}

/// Leaves the host's mounts behind for good, which a `chroot` would not.
fn change_root(root: &Path) -> Result<(), Error> {
    step(format!("enter {}", root.display()), || chdir(root))?;
    // Given one directory for both, the kernel mounts the old root on top of the new one.
    step(format!("make {} the root", root.display()), || {
        pivot_root(".", ".")
    })?;
    step("leave the host's mounts".to_owned(), || {
        umount2(".", MntFlags::MNT_DETACH)
    })?;
    step("enter the new root".to_owned(), || chdir("/"))
}

/// The access to a bound directory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// Binds a directory with all mounts below, because a user namespace may not bind it without them.
fn bind(from: &Path, to: &Path, access: Access) -> Result<(), Error> {
    step(
        format!("bind {} to {}", from.display(), to.display()),
        || {
            mount(
                Some(from),
                to,
                None::<&str>,
                MsFlags::MS_BIND | MsFlags::MS_REC,
                None::<&str>,
            )?;
            if access == Access::Read {
                let flags =
                    MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | locked_flags(to)?;
                mount(None::<&str>, to, None::<&str>, flags, None::<&str>)?;
            }
            Ok(())
        },
    )
}

fn bind_file(from: &Path, to: &Path) -> Result<(), Error> {
    if !to.exists() {
        fs::write(to, "").map_err(|source| Error::Step {
            step: format!("make {}", to.display()),
            source,
        })?;
    }
    bind(from, to, Access::Read)
}

/// Returns the flags that a user namespace must keep when it remounts a path.
fn locked_flags(path: &Path) -> nix::Result<MsFlags> {
    let pairs = [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let present = statvfs(path)?.flags();
    Ok(pairs
        .into_iter()
        .filter(|(flag, _)| present.contains(*flag))
        .fold(MsFlags::empty(), |flags, (_, flag)| flags | flag))
}

fn change_propagation(path: &Path, flags: MsFlags) -> Result<(), Error> {
    step(
        format!("change how mounts below {} spread", path.display()),
        || mount(None::<&str>, path, None::<&str>, flags, None::<&str>),
    )
}

/// Brings up the loopback, which is down in a new network namespace.
#[allow(unsafe_code)]
fn bring_loopback_up() -> Result<(), Error> {
    use nix::libc;
    use std::os::fd::AsRawFd;

    let fail = |source| Error::Step {
        step: "bring the loopback up".to_owned(),
        source,
    };
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").map_err(fail)?;
    // SAFETY: `ifreq` is plain data, for which zeroes are a value. Both calls get a descriptor
    // that outlives them and a pointer to an `ifreq` on this stack, whose name is
    // NUL-terminated; the kernel reads and writes nothing beyond it. The union's flags are what
    // the first call filled in.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) < 0 {
            return Err(fail(io::Error::last_os_error()));
        }
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) < 0 {
            return Err(fail(io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn make_dir(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|source| Error::Step {
        step: format!("make {}", path.display()),
        source,
    })
}

/// Creates a link, or leaves the one of an earlier boot.
fn link(target: &Path, path: &Path) -> Result<(), Error> {
    match symlink(target, path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(Error::Step {
            step: format!("make the link {}", path.display()),
            source,
        }),
        _ => Ok(()),
    }
}

fn inside(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn step(name: String, action: impl FnOnce() -> nix::Result<()>) -> Result<(), Error> {
    action().map_err(|error| Error::Step {
        step: name,
        source: error.into(),
    })
}
