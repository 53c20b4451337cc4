//! Checks of the socket's file: its name, its place, and who may connect.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{Check, Finding, Subject, failed};

const UPSTREAM_CLIENT: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/pkg/secrets-store/provider_client.go";
const UNIX_SOCKETS: &str = "https://man7.org/linux/man-pages/man7/unix.7.html";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "socket-type",
        rule: "A unix socket is at the path.",
        source: UPSTREAM_CLIENT,
        run: |s| Box::pin(async { kind(s) }),
    },
    Check {
        name: "socket-name",
        rule: "The socket is <name>.sock, with a name of at most 30 letters, digits, '-' and '_'.",
        source: UPSTREAM_CLIENT,
        run: |s| Box::pin(async { name(s) }),
    },
    Check {
        name: "socket-owner",
        rule: "The socket belongs to root, or to the user who checks it.",
        source: UNIX_SOCKETS,
        run: |s| Box::pin(async { owner(s) }),
    },
    Check {
        name: "socket-mode",
        rule: "Others may not connect: the socket is not writable to other users and groups.",
        source: UNIX_SOCKETS,
        run: |s| Box::pin(async { mode(s) }),
    },
    Check {
        name: "socket-directory",
        rule: "Others may not replace the socket: no directory above it is theirs or writable to them.",
        source: UNIX_SOCKETS,
        run: |s| Box::pin(async { directory(s) }),
    },
];

/// Returns the owner and the mode of the socket, to compare them after a restart.
pub(super) fn owner_and_mode(subject: &Subject) -> Result<(u32, u32), Finding> {
    let metadata = examine(&subject.settings.socket)?;
    Ok((metadata.uid(), metadata.mode() & 0o777))
}

fn examine(path: &Path) -> Result<Metadata, Finding> {
    fs::metadata(path).map_err(|error| failed(format!("{}: {error}", path.display())))
}

fn kind(subject: &Subject) -> Result<(), Finding> {
    if examine(&subject.settings.socket)?.file_type().is_socket() {
        return Ok(());
    }
    Err(failed("something else is at the path"))
}

fn name(subject: &Subject) -> Result<(), Finding> {
    let file = subject.settings.socket.file_name().unwrap_or_default();
    let file = file.to_string_lossy();
    let name = file.strip_suffix(".sock").unwrap_or_default();
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 30 || !name.chars().all(allowed) {
        return Err(failed(format!("the driver cannot look up {file:?}")));
    }
    Ok(())
}

/// The user and the group who may do everything beside root: those who check.
#[derive(Clone, Copy)]
struct Checker {
    user: u32,
    group: u32,
}

impl Checker {
    fn current() -> Result<Self, Finding> {
        let process = examine(Path::new("/proc/self"))?;
        Ok(Self {
            user: process.uid(),
            group: process.gid(),
        })
    }

    fn is_user(self, user: u32) -> bool {
        user == 0 || user == self.user
    }

    /// Returns whether only root and the checker may write to what has this group and mode.
    fn alone_writes(self, group: u32, mode: u32) -> bool {
        let is_own = group == 0 || group == self.group;
        mode & 0o002 == 0 && (mode & 0o020 == 0 || is_own)
    }

    /// Returns why others may replace what is in a directory.
    fn replaced_by_others(self, owner: u32, group: u32, mode: u32) -> Option<String> {
        if !self.is_user(owner) {
            return Some(format!("belongs to user {owner}"));
        }
        // In a sticky directory only the owner of a file may replace it.
        if mode & 0o1000 != 0 || self.alone_writes(group, mode) {
            return None;
        }
        Some(format!("has mode {mode:04o} and group {group}"))
    }
}

fn owner(subject: &Subject) -> Result<(), Finding> {
    let owner = examine(&subject.settings.socket)?.uid();
    if Checker::current()?.is_user(owner) {
        return Ok(());
    }
    Err(failed(format!("it belongs to user {owner}")))
}

fn mode(subject: &Subject) -> Result<(), Finding> {
    let socket = examine(&subject.settings.socket)?;
    let (group, mode) = (socket.gid(), socket.mode() & 0o777);
    if Checker::current()?.alone_writes(group, mode) {
        return Ok(());
    }
    Err(failed(format!("it has mode {mode:04o} and group {group}")))
}

fn directory(subject: &Subject) -> Result<(), Finding> {
    let socket = &subject.settings.socket;
    let checker = Checker::current()?;
    // A link on the way may be replaced as well as a directory.
    for path in [std::path::absolute(socket), fs::canonicalize(socket)] {
        let path = path.map_err(|error| failed(format!("{}: {error}", socket.display())))?;
        for directory in path.ancestors().skip(1) {
            let found = examine(directory)?;
            let mode = found.mode() & 0o7777;
            if let Some(why) = checker.replaced_by_others(found.uid(), found.gid(), mode) {
                return Err(failed(format!("{} {why}", directory.display())));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const CHECKER: Checker = Checker {
        user: 1000,
        group: 100,
    };

    /// Others may write where the last digit says so, or the middle one with a group of others; they
    /// may replace the files of others there unless it is sticky, and anything in what is theirs.
    #[rstest]
    fn only_root_and_the_checker_may_replace_a_socket(
        #[values(0, 1000, 1001)] owner: u32,
        #[values(0, 100, 101)] group: u32,
        #[values(0o0, 0o2, 0o7)] of_group: u32,
        #[values(0o0, 0o5, 0o2, 0o7)] of_others: u32,
        #[values(0, 0o1000)] sticky: u32,
    ) {
        let mode = sticky | 0o700 | of_group << 3 | of_others;
        let others_write = [2, 7].contains(&of_others) || (of_group != 0 && group == 101);
        assert_eq!(CHECKER.alone_writes(group, mode), !others_write);
        let expected = owner == 1001 || (others_write && sticky == 0);
        let replaced = CHECKER.replaced_by_others(owner, group, mode);
        assert_eq!(replaced.is_some(), expected, "{replaced:?}");
    }
}
