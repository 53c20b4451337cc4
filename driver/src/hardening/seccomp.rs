//! The seccomp filter of the driver: the system calls that it uses once it runs, and no others
//! (seccomp(2)).
//!
//! The list was found by tracing the driver through the scenarios, and has what other C libraries,
//! kernels and the other architecture use for the same. A call that is not in it fails with `ENOSYS`,
//! so that libraries use what older kernels have; one with other arguments than the driver's fails with
//! `EPERM`. So there are no new programs, processes or namespaces, no tracing, no kernel modules or BPF,
//! no way back to being dumpable, and no new executable memory.

use std::{collections::BTreeMap, io};

/// The arguments that a system call may have.
#[derive(Clone, Copy, Debug)]
enum Arguments {
    /// Any.
    Any,
    /// The low half of an argument, masked, is one of some values. The high half does not matter: the
    /// kernel reads these arguments as `int`, or the mask has all bits that are refused.
    OneOf {
        argument: u32,
        mask: u32,
        values: &'static [u32],
    },
    /// A pointer is null.
    Null { argument: u32 },
}

/// A system call that is allowed: its constant's name, its number on this architecture.
type Call = (&'static str, libc::c_long, Arguments);

macro_rules! calls {
    ($($call:ident)*) => { &[$((stringify!($call), libc::$call, Arguments::Any)),*] };
}

/// What all architectures have.
const COMMON: &[Call] = calls! {
    // Files and directories.
    SYS_close SYS_close_range SYS_dup SYS_dup3 SYS_faccessat SYS_faccessat2 SYS_fallocate SYS_fchmod
    SYS_fchmodat SYS_fchown SYS_fchownat SYS_fcntl SYS_fdatasync SYS_flock SYS_fstat SYS_fstatfs SYS_fsync
    SYS_ftruncate SYS_getcwd SYS_getdents64 SYS_linkat SYS_lseek SYS_mkdirat SYS_newfstatat SYS_openat
    SYS_openat2 SYS_pipe2 SYS_pread64 SYS_pwrite64 SYS_read SYS_readlinkat SYS_readv SYS_renameat
    SYS_renameat2 SYS_statfs SYS_statx SYS_symlinkat SYS_umask SYS_unlinkat SYS_utimensat SYS_write
    SYS_writev
    // Mounts.
    SYS_mount SYS_umount2
    // Sockets and waiting.
    SYS_accept4 SYS_bind SYS_connect SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2
    SYS_eventfd2 SYS_getpeername SYS_getsockname SYS_getsockopt SYS_listen SYS_ppoll SYS_recvfrom
    SYS_recvmsg SYS_recvmmsg SYS_sendmmsg SYS_sendmsg SYS_sendto SYS_setsockopt SYS_shutdown
    SYS_socketpair
    // Memory.
    SYS_brk SYS_madvise SYS_mlockall SYS_mremap SYS_munlockall SYS_munmap
    // Threads, signals and time.
    SYS_clock_getres SYS_clock_gettime SYS_clock_nanosleep SYS_exit SYS_exit_group SYS_futex SYS_getpid
    SYS_getppid SYS_getrandom SYS_getegid SYS_geteuid SYS_getgid SYS_getuid SYS_gettid SYS_gettimeofday
    SYS_membarrier SYS_nanosleep SYS_restart_syscall SYS_rseq SYS_rt_sigaction SYS_rt_sigprocmask
    SYS_rt_sigreturn SYS_rt_sigtimedwait SYS_sched_getaffinity SYS_sched_yield SYS_set_robust_list
    SYS_set_tid_address SYS_sigaltstack SYS_sysinfo SYS_tgkill SYS_uname
};

/// Older forms of the calls above, which newer architectures do not have.
#[cfg(target_arch = "x86_64")]
const OLDER: &[Call] = calls! {
    SYS_access SYS_chmod SYS_chown SYS_dup2 SYS_epoll_wait SYS_lchown SYS_link SYS_lstat SYS_mkdir SYS_open
    SYS_pipe SYS_poll SYS_readlink SYS_rename SYS_rmdir SYS_stat SYS_symlink SYS_time SYS_unlink
};
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[Call] = &[];

/// The bits of clone(2) that make namespaces, and `CLONE_THREAD`.
const NAMESPACES: u32 = 0x7e02_0000;
const THREAD: u32 = libc::CLONE_THREAD as u32;
const EXECUTABLE: Arguments = Arguments::OneOf {
    argument: 2,
    mask: libc::PROT_EXEC as u32,
    values: &[0],
};
const ALL: u32 = u32::MAX;

/// What is allowed with some arguments only. `clone3`, whose arguments a filter cannot read, is not: C
/// libraries use `clone` instead.
const SOME: &[Call] = &[
    // Threads, and no processes.
    (
        "SYS_clone",
        libc::SYS_clone,
        Arguments::OneOf {
            argument: 0,
            mask: NAMESPACES | THREAD,
            values: &[THREAD],
        },
    ),
    // What sets a descriptor non-blocking or asks whether it is a terminal.
    (
        "SYS_ioctl",
        libc::SYS_ioctl,
        Arguments::OneOf {
            argument: 1,
            mask: ALL,
            values: &[
                libc::FIONBIO as u32,
                libc::FIOCLEX as u32,
                libc::TCGETS as u32,
                libc::TIOCGWINSZ as u32,
            ],
        },
    ),
    ("SYS_mmap", libc::SYS_mmap, EXECUTABLE),
    ("SYS_mprotect", libc::SYS_mprotect, EXECUTABLE),
    // What names threads and memory.
    (
        "SYS_prctl",
        libc::SYS_prctl,
        Arguments::OneOf {
            argument: 0,
            mask: ALL,
            values: &[libc::PR_SET_NAME as u32, libc::PR_SET_VMA as u32],
        },
    ),
    // Limits are read, and not set.
    (
        "SYS_prlimit64",
        libc::SYS_prlimit64,
        Arguments::Null { argument: 2 },
    ),
    (
        "SYS_socket",
        libc::SYS_socket,
        Arguments::OneOf {
            argument: 0,
            mask: ALL,
            // The C library asks the kernel for addresses of its own (netlink) when it resolves a name.
            values: &[
                libc::AF_UNIX as u32,
                libc::AF_INET as u32,
                libc::AF_INET6 as u32,
                libc::AF_NETLINK as u32,
            ],
        },
    ),
];

/// What a process needs before it has installed its filter: the container runtime's part, the C
/// library's and [`harden`](super::harden)'s.
const TO_START: &[Call] = calls! {
    SYS_capget SYS_capset SYS_chdir SYS_execve SYS_prctl SYS_seccomp SYS_setgid SYS_setgroups SYS_setuid
};
#[cfg(target_arch = "x86_64")]
const OF_LOADER: &[Call] = calls! { SYS_arch_prctl };
#[cfg(not(target_arch = "x86_64"))]
const OF_LOADER: &[Call] = &[];

/// The number by which the kernel knows this architecture (`linux/audit.h`).
const ARCHITECTURE: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else {
    None
};

/// The lowest number of a call of the x32 interface, which the architecture x86_64 has besides its own.
const X32: u32 = 0x4000_0000;

/// Returns the name and the number of every call of the filter, and of those that a process needs to
/// start, in the order of the names: what a container runtime's profile has to allow.
pub fn profile() -> BTreeMap<&'static str, libc::c_long> {
    let calls = [COMMON, OLDER, SOME, TO_START, OF_LOADER].concat();
    let named = |(name, number, _): Call| (name.trim_start_matches("SYS_"), number);
    calls.into_iter().map(named).collect()
}

/// Installs the filter for all threads of the process, for good. `no_new_privs` must be set.
///
/// # Errors
/// The system's error, or that there is no filter for this architecture.
pub(super) fn install() -> io::Result<()> {
    let Some(architecture) = ARCHITECTURE else {
        return Err(io::Error::other("there is none for this architecture"));
    };
    load(&mut program(architecture))
}

/// Returns the filter in classic BPF.
fn program(architecture: u32) -> Vec<libc::sock_filter> {
    // The offsets of `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    let refused = refuse(libc::ENOSYS);
    let mut program = vec![
        load_word(ARCH),
        unless_equal(architecture, 3),
        load_word(NUMBER),
        jump(libc::BPF_JGE, X32, 0, 1),
        refused,
    ];
    for (_, number, arguments) in [COMMON, OLDER, SOME].into_iter().flatten() {
        let checks = checks(*arguments);
        let number = u32::try_from(*number).unwrap_or(ALL);
        program.push(unless_equal(number, checks.len()));
        program.extend(checks);
    }
    program.push(refused);
    program
}

/// Returns the instructions that allow or refuse a call by its arguments.
fn checks(arguments: Arguments) -> Vec<libc::sock_filter> {
    let (allowed, refused) = (answer(libc::SECCOMP_RET_ALLOW), refuse(libc::EPERM));
    // The low half comes first on the architectures that have a filter.
    let low = |argument| load_word(16 + 8 * argument);
    let high = |argument| load_word(16 + 8 * argument + 4);
    match arguments {
        Arguments::Any => vec![allowed],
        Arguments::OneOf {
            argument,
            mask,
            values,
        } => {
            let and = instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask, 0, 0);
            let mut checks = vec![low(argument), and];
            for (at, value) in values.iter().enumerate() {
                checks.push(jump(libc::BPF_JEQ, *value, values.len() - at, 0));
            }
            checks.extend([refused, allowed]);
            checks
        }
        Arguments::Null { argument } => vec![
            low(argument),
            unless_equal(0, 2),
            high(argument),
            jump(libc::BPF_JEQ, 0, 1, 0),
            refused,
            allowed,
        ],
    }
}

fn load_word(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
}

/// Skips instructions unless the loaded word has this value.
fn unless_equal(value: u32, skip: usize) -> libc::sock_filter {
    jump(libc::BPF_JEQ, value, 0, skip)
}

fn jump(comparison: u32, value: u32, if_true: usize, if_false: usize) -> libc::sock_filter {
    let code = libc::BPF_JMP | comparison | libc::BPF_K;
    instruction(code, value, if_true, if_false)
}

fn refuse(errno: i32) -> libc::sock_filter {
    answer(libc::SECCOMP_RET_ERRNO | errno.unsigned_abs())
}

fn answer(value: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, value, 0, 0)
}

fn instruction(code: u32, value: u32, if_true: usize, if_false: usize) -> libc::sock_filter {
    // A code is below 256, and no jump here is longer than the checks of one call.
    let short = |length| u8::try_from(length).unwrap_or(u8::MAX);
    libc::sock_filter {
        code: u16::try_from(code).unwrap_or(u16::MAX),
        jt: short(if_true),
        jf: short(if_false),
        k: value,
    }
}

#[allow(unsafe_code)]
fn load(program: &mut [libc::sock_filter]) -> io::Result<()> {
    // Kernels before 5.16 otherwise slow the process down, as protection from code in it that is not
    // trusted (spec_store_bypass_disable).
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog {
        len: length,
        filter: program.as_mut_ptr(),
    };
    let operation = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel copies `len` instructions from the pointer, which is valid for as many.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, &raw const filter) };
    match done {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!(
            "thread {thread} has another filter"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::alone::{Own, alone};
    use nix::{
        errno::Errno,
        sys::{prctl, resource, socket},
    };
    use std::{fs, process::Command, thread};

    #[test]
    fn the_filter_allows_work_and_nothing_new() {
        alone(Own::Process, || {
            prctl::set_no_new_privs().unwrap();
            prctl::set_dumpable(false).unwrap();
            install().unwrap();
            // Threads, files, sockets and memory.
            thread::spawn(|| vec![1_u8; 64 << 20].len()).join().unwrap();
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("file"), "x").unwrap();
            fs::rename(dir.path().join("file"), dir.path().join("other")).unwrap();
            std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
            std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            resource::getrlimit(resource::Resource::RLIMIT_NOFILE).unwrap();
            // Programs, processes and namespaces.
            assert!(Command::new("true").status().is_err());
            let namespaces = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER);
            assert_eq!(namespaces, Err(Errno::ENOSYS));
            assert_eq!(called(libc::SYS_execve, [0; 3]), Errno::ENOSYS);
            assert_eq!(called(libc::SYS_ptrace, [0; 3]), Errno::ENOSYS);
            assert_eq!(called(libc::SYS_bpf, [0; 3]), Errno::ENOSYS);
            // A new process, with and without namespaces; a thread in a namespace of its own.
            let new_user = libc::CLONE_NEWUSER as libc::c_long;
            let thread = libc::CLONE_THREAD as libc::c_long;
            for flags in [0, libc::SIGCHLD.into(), new_user, thread | new_user] {
                assert_eq!(called(libc::SYS_clone, [flags, 0, 0]), Errno::EPERM);
            }
            // Ways back, and other arguments.
            assert_eq!(prctl::set_dumpable(true), Err(Errno::EPERM));
            let limit = resource::setrlimit(resource::Resource::RLIMIT_CORE, 1, 1);
            assert_eq!(limit, Err(Errno::EPERM));
            let packets = socket::socket(
                socket::AddressFamily::Packet,
                socket::SockType::Raw,
                socket::SockFlag::empty(),
                None,
            );
            assert_eq!(packets.unwrap_err(), Errno::EPERM);
            let executable = libc::c_long::from(libc::PROT_EXEC | libc::PROT_READ);
            assert_eq!(called(libc::SYS_mmap, [0, 4096, executable]), Errno::EPERM);
            assert_eq!(
                called(libc::SYS_mprotect, [0, 4096, executable]),
                Errno::EPERM
            );
            let terminal = libc::TIOCSTI as libc::c_long;
            assert_eq!(called(libc::SYS_ioctl, [0, terminal, 0]), Errno::EPERM);
        });
    }

    /// Makes a system call that has to be refused before it is carried out.
    #[allow(unsafe_code)]
    fn called(number: libc::c_long, arguments: [libc::c_long; 3]) -> Errno {
        let [first, second, third] = arguments;
        // SAFETY: the filter refuses the call, and no pointer here is valid for one that it allows.
        let done = unsafe { libc::syscall(number, first, second, third, 0, 0, 0) };
        assert_eq!(done, -1, "call {number} is allowed");
        Errno::last()
    }
}
