//! Reads a system call of a stopped thread: what it is called, to what it is done, and whether it may
//! change anything that outlives the process.
//!
//! Only calls that are known to change nothing are left out. A call that the driver does not make
//! today counts as a change, by its number if its name is not known here.

use std::{
    fs,
    io::IoSliceMut,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        ptrace,
        uio::{RemoteIoVec, process_vm_readv},
    },
    unistd::Pid,
};

/// The most bytes of a message that are read to tell what it says.
const MOST_READ: usize = 64 << 10;

/// A system call at its beginning.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) number: i64,
    pub(crate) args: [u64; 6],
}

/// The registers of a thread that is stopped at a system call.
pub(crate) struct Registers {
    pub(crate) call: Call,
    /// Whether the call begins.
    pub(crate) is_begin: bool,
    /// What the call returns, if it ends.
    pub(crate) result: i64,
}

#[cfg(target_arch = "x86_64")]
impl Registers {
    pub(crate) fn of(thread: Pid) -> nix::Result<Self> {
        let regs = ptrace::getregs(thread)?;
        let result = regs.rax.cast_signed();
        Ok(Self {
            call: Call {
                number: regs.orig_rax.cast_signed(),
                args: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
            },
            // The kernel sets it before the call.
            is_begin: result == -i64::from(libc::ENOSYS),
            result,
        })
    }
}

/// Has a thread that begins a call not carry it out.
#[cfg(target_arch = "x86_64")]
pub(crate) fn skip(thread: Pid) {
    if let Ok(mut regs) = ptrace::getregs(thread) {
        regs.orig_rax = u64::MAX;
        let _gone = ptrace::setregs(thread, regs);
    }
}

/// Has a thread that ends a call find an error.
#[cfg(target_arch = "x86_64")]
pub(crate) fn fail(thread: Pid, error: Errno) {
    if let Ok(mut regs) = ptrace::getregs(thread) {
        regs.rax = (-i64::from(error as i32)).cast_unsigned();
        let _gone = ptrace::setregs(thread, regs);
    }
}

/// Another kernel interface changes a call on this machine, which no test uses yet.
#[cfg(target_arch = "aarch64")]
pub(crate) fn skip(_: Pid) {}

#[cfg(target_arch = "aarch64")]
pub(crate) fn fail(_: Pid, _: Errno) {}

#[cfg(target_arch = "aarch64")]
impl Registers {
    pub(crate) fn of(thread: Pid) -> nix::Result<Self> {
        let regs = ptrace::getregs(thread)?.regs;
        let [a0, a1, a2, a3, a4, a5, _, is_end, number, ..] = regs;
        Ok(Self {
            call: Call {
                number: number.cast_signed(),
                args: [a0, a1, a2, a3, a4, a5],
            },
            is_begin: is_end == 0,
            result: a0.cast_signed(),
        })
    }
}

/// The effect that a system call may have.
pub(crate) enum Effect {
    /// Nothing outside of the process.
    None,
    /// Bytes come in, or go out, by a descriptor.
    Moves {
        out: bool,
    },
    /// A descriptor becomes a connection to an address, or a connection ends.
    Connects,
    Closes,
    /// Anything else.
    Changes,
}

impl Call {
    fn is(self, any: &[i64]) -> bool {
        any.contains(&self.number)
    }

    pub(crate) fn effect(self, thread: Pid) -> Effect {
        if self.is(HARMLESS) || self.is(HARMLESS_HERE) {
            return Effect::None;
        }
        if self.is(INPUT) {
            return Effect::Moves { out: false };
        }
        if self.is(OUTPUT) {
            return Effect::Moves { out: true };
        }
        match self.number {
            libc::SYS_connect => Effect::Connects,
            libc::SYS_close => Effect::Closes,
            _ if self.only_opens(thread) => Effect::None,
            _ => Effect::Changes,
        }
    }

    /// Whether a file is opened that is there already, and not emptied by that.
    fn only_opens(self, thread: Pid) -> bool {
        let flags = match self.number {
            libc::SYS_openat => self.args[2],
            libc::SYS_openat2 => {
                let how = memory(thread, self.args[2], 8);
                how.try_into().map_or(u64::MAX, u64::from_ne_bytes)
            }
            _ => match self.open_flags() {
                Some(flags) => flags,
                None => return false,
            },
        };
        let makes = libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);
        flags & u64::from(makes.cast_unsigned()) == 0
    }

    #[cfg(target_arch = "x86_64")]
    fn open_flags(self) -> Option<u64> {
        (self.number == libc::SYS_open).then_some(self.args[1])
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn open_flags(self) -> Option<u64> {
        None
    }

    /// Returns the error with which the call fails on a machine that has no room, or a broken disk.
    pub(crate) fn error(self) -> Errno {
        let mut known = NAMES.iter().chain(NAMES_HERE);
        let name = known.find(|(number, ..)| *number == self.number);
        match name.map(|(_, name, _)| *name) {
            None if self.is(OUTPUT) => Errno::ENOSPC,
            Some("open" | "mkdir" | "symlink" | "link" | "truncate" | "fallocate") => Errno::ENOSPC,
            Some("umount") => Errno::EBUSY,
            Some("fsync") => Errno::EIO,
            Some(name) if name.contains("mount") || name.starts_with("fs") => Errno::ENOMEM,
            _ => Errno::EIO,
        }
    }

    /// Returns the descriptor that the call uses first.
    pub(crate) fn descriptor(self) -> i32 {
        self.args[0] as u32 as i32
    }

    /// Returns the name of the call and the paths that it is about.
    pub(crate) fn describe(self, thread: Pid) -> String {
        let known = NAMES
            .iter()
            .chain(NAMES_HERE)
            .find(|(number, ..)| *number == self.number);
        let Some((_, name, arguments)) = known else {
            return format!("system call {}", self.number);
        };
        let mut said = vec![(*name).to_owned()];
        let mut directory = None;
        for (kind, value) in arguments.chars().zip(self.args) {
            match kind {
                'd' => directory = Some(value as u32 as i32),
                'p' => {
                    let text = text(thread, value);
                    let base = directory.take().unwrap_or(libc::AT_FDCWD);
                    let path = if base == libc::AT_FDCWD {
                        PathBuf::from(text)
                    } else {
                        path_of(thread, base).unwrap_or_default().join(text)
                    };
                    said.push(path.display().to_string());
                }
                't' => said.push(text(thread, value)),
                'f' => {
                    let path = path_of(thread, value as u32 as i32).unwrap_or_default();
                    said.push(path.display().to_string());
                }
                's' => said.push(Peer::at(thread, value).map_or_else(String::new, |p| p.0)),
                _ => {}
            }
        }
        said.join(" ")
    }

    /// Returns the number of bytes that a call is about to send, as far as the arguments tell.
    pub(crate) fn to_move(self) -> usize {
        match self.number {
            libc::SYS_write | libc::SYS_sendto => {
                usize::try_from(self.args[2]).unwrap_or(MOST_READ)
            }
            _ => MOST_READ,
        }
    }

    /// Returns what a call that has ended has moved, `length` bytes.
    pub(crate) fn moved(self, thread: Pid, length: usize) -> Vec<u8> {
        let most = length.min(MOST_READ);
        let word = |address: u64| {
            let read = memory(thread, address, 8).try_into();
            read.map_or(0, u64::from_ne_bytes)
        };
        let (vector, count) = match self.number {
            libc::SYS_sendmsg | libc::SYS_recvmsg => {
                (word(self.args[1] + 16), word(self.args[1] + 24))
            }
            libc::SYS_writev | libc::SYS_readv | libc::SYS_pwritev => (self.args[1], self.args[2]),
            _ => return memory(thread, self.args[1], most),
        };
        let mut all = Vec::new();
        for at in (0..count.min(64)).map(|index| vector + 16 * index) {
            let wanted = usize::try_from(word(at + 8)).unwrap_or(0);
            all.extend(memory(thread, word(at), wanted.min(most - all.len())));
        }
        all
    }
}

/// The address to which a socket is connected, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer(pub(crate) String);

impl Peer {
    pub(crate) fn at(thread: Pid, address: u64) -> Option<Self> {
        let read = memory(thread, address, 110);
        let family = u16::from_ne_bytes(read.get(..2)?.try_into().ok()?);
        match i32::from(family) {
            libc::AF_UNIX => {
                let path = read[2..].split(|byte| *byte == 0).next()?;
                let path = String::from_utf8_lossy(path);
                // The driver connects to a provider's socket that it has opened.
                let opened = path.strip_prefix("/proc/self/fd/");
                let opened = opened.and_then(|fd| path_of(thread, fd.parse().ok()?));
                Some(Self(opened.map_or_else(
                    || path.into_owned(),
                    |opened| opened.display().to_string(),
                )))
            }
            libc::AF_INET => Some(Self(format!(
                "port {}",
                u16::from_be_bytes(read[2..4].try_into().ok()?)
            ))),
            _ => None,
        }
    }
}

/// Returns the path behind a descriptor, if it is that of a file.
pub(crate) fn path_of(thread: Pid, descriptor: i32) -> Option<PathBuf> {
    let path = fs::read_link(Path::new("/proc").join(format!("{thread}/fd/{descriptor}"))).ok()?;
    path.is_absolute().then_some(path)
}

/// Reads memory of a thread, as far as it can be read.
fn memory(thread: Pid, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let base = usize::try_from(address).unwrap_or(0);
    let mut read = 0;
    while read < length {
        let from = base + read;
        // Up to the end of the page: the next one may not be there.
        let len = (4096 - from % 4096).min(length - read);
        let local = &mut [IoSliceMut::new(&mut bytes[read..read + len])];
        match process_vm_readv(thread, local, &[RemoteIoVec { base: from, len }]) {
            Ok(0) | Err(_) => break,
            Ok(more) => read += more,
        }
    }
    bytes.truncate(read);
    bytes
}

fn text(thread: Pid, address: u64) -> String {
    let read = memory(thread, address, 4096);
    let text = read.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

const INPUT: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
];

const OUTPUT: &[i64] = &[
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
];

/// What only reads, or concerns only the process.
const HARMLESS: &[i64] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fcntl,
    libc::SYS_fgetxattr,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_getxattr,
    libc::SYS_ioctl,
    libc::SYS_kill,
    libc::SYS_lgetxattr,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mlockall,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munlock,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_personality,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_pselect6,
    libc::SYS_readlinkat,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_yield,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setrlimit,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_tkill,
    libc::SYS_umask,
    libc::SYS_uname,
    libc::SYS_unshare,
    libc::SYS_wait4,
    libc::SYS_waitid,
    // statmount(2) and listmount(2).
    457,
    458,
];

#[cfg(target_arch = "x86_64")]
const HARMLESS_HERE: &[i64] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_dup2,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_getdents,
    libc::SYS_getpgrp,
    libc::SYS_lstat,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
];

#[cfg(not(target_arch = "x86_64"))]
const HARMLESS_HERE: &[i64] = &[];

/// The names of calls that change something, and what their arguments are: a directory, a path, a
/// text, a file, or the address of a socket.
const NAMES: &[(i64, &str, &str)] = &[
    (libc::SYS_openat, "open", "dp"),
    (libc::SYS_openat2, "open", "dp"),
    (libc::SYS_mkdirat, "mkdir", "dp"),
    (libc::SYS_mknodat, "mknod", "dp"),
    (libc::SYS_unlinkat, "unlink", "dp"),
    (libc::SYS_renameat, "rename", "dpdp"),
    (libc::SYS_renameat2, "rename", "dpdp"),
    (libc::SYS_symlinkat, "symlink", "tdp"),
    (libc::SYS_linkat, "link", "dpdp"),
    (libc::SYS_fchmod, "chmod", "f"),
    (libc::SYS_fchmodat, "chmod", "dp"),
    (libc::SYS_fchmodat2, "chmod", "dp"),
    (libc::SYS_fchown, "chown", "f"),
    (libc::SYS_fchownat, "chown", "dp"),
    (libc::SYS_utimensat, "utimens", "dp"),
    (libc::SYS_truncate, "truncate", "p"),
    (libc::SYS_ftruncate, "truncate", "f"),
    (libc::SYS_fallocate, "fallocate", "f"),
    (libc::SYS_fsync, "fsync", "f"),
    (libc::SYS_fdatasync, "fsync", "f"),
    (libc::SYS_sendfile, "sendfile", "ff"),
    (libc::SYS_copy_file_range, "copy_file_range", "f-f"),
    (libc::SYS_setxattr, "setxattr", "pt"),
    (libc::SYS_lsetxattr, "setxattr", "pt"),
    (libc::SYS_fsetxattr, "setxattr", "ft"),
    (libc::SYS_mount, "mount", "-p"),
    (libc::SYS_umount2, "umount", "p"),
    (libc::SYS_open_tree, "open_tree", "dp"),
    (libc::SYS_move_mount, "move_mount", "dpdp"),
    (libc::SYS_mount_setattr, "mount_setattr", "dp"),
    (libc::SYS_fsopen, "fsopen", "t"),
    (libc::SYS_fsconfig, "fsconfig", "--t"),
    (libc::SYS_fsmount, "fsmount", ""),
    (libc::SYS_fspick, "fspick", "dp"),
    (libc::SYS_bind, "bind", "-s"),
];

#[cfg(target_arch = "x86_64")]
const NAMES_HERE: &[(i64, &str, &str)] = &[
    (libc::SYS_open, "open", "p"),
    (libc::SYS_creat, "open", "p"),
    (libc::SYS_mkdir, "mkdir", "p"),
    (libc::SYS_rmdir, "rmdir", "p"),
    (libc::SYS_unlink, "unlink", "p"),
    (libc::SYS_rename, "rename", "pp"),
    (libc::SYS_symlink, "symlink", "tp"),
    (libc::SYS_link, "link", "pp"),
    (libc::SYS_chmod, "chmod", "p"),
    (libc::SYS_chown, "chown", "p"),
    (libc::SYS_lchown, "chown", "p"),
];

#[cfg(not(target_arch = "x86_64"))]
const NAMES_HERE: &[(i64, &str, &str)] = &[];
