//! Mount points of this process, or of another node, and copies of logs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Returns the mount points of this process at and below a path, in the order of mounting.
///
/// # Errors
/// When the kernel's table cannot be read.
pub(crate) fn mount_points(below: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mount_points_in(&table, below))
}

/// Returns those in a table that was read elsewhere.
pub(crate) fn mount_points_in(table: &str, below: &Path) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(unescape(path)))
        .filter(|path| path.starts_with(below))
        .collect()
}

/// Undoes the kernel's escapes, such as `\040`, for characters that would break its columns.
fn unescape(path: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(path.to_owned(), |path, (code, character)| {
        path.replace(code, character)
    })
}

/// Copies all files below a directory, which may be absent. Leaves out files that vanish meanwhile.
pub(crate) fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    let Ok(entries) = fs::read_dir(from) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_files(&entry.path(), &target)?;
        } else if entry.path().exists() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_below_a_path_are_told_from_its_neighbours() {
        let table = "\
            1 0 8:1 / / rw - ext4 /dev/sda rw\n\
            2 1 0:9 / /var/lib/kubelet/pods/u/mount rw shared:1 - tmpfs tmpfs rw\n\
            3 1 0:9 / /var/lib/kubelet/pods/a\\040b rw - tmpfs tmpfs rw\n\
            4 1 0:9 / /var/lib/kubelet/pods-too rw - tmpfs tmpfs rw\n";
        assert_eq!(
            mount_points_in(table, Path::new("/var/lib/kubelet/pods")),
            [
                Path::new("/var/lib/kubelet/pods/u/mount"),
                Path::new("/var/lib/kubelet/pods/a b")
            ]
        );
    }
}
