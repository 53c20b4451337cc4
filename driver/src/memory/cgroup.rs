//! Reads the memory limit of this process from its cgroups (cgroups(7), versions 1 and 2).

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use super::ledger::{Limit, Source};
use crate::mount::unescaped_path;

/// The most bytes that are read of a file. The largest is the table of mounts, with a line for each
/// volume of the node.
const LONGEST_FILE: u64 = 16 << 20;

/// Returns the memory limit of this process: the smallest one of its cgroup and the visible cgroups
/// above it. `root` is `/`.
///
/// In a container with a cgroup namespace only its own cgroup is visible. The limit of the pod is
/// then the sum of its containers' limits, and not smaller.
pub fn limit(root: &Path) -> Limit {
    let machine = memory_of_machine(root).unwrap_or(u64::MAX / 2);
    let files = directories(root).into_iter().flat_map(|directory| {
        ["memory.max", "memory.high", "memory.limit_in_bytes"].map(|name| directory.join(name))
    });
    let limits = files.filter_map(|file| read(&file).ok()?.trim().parse::<u64>().ok());
    // Version 1 writes "no limit" as a number that is larger than the memory of any machine.
    match limits.filter(|limit| *limit < machine).min() {
        Some(bytes) => Limit {
            bytes,
            source: Source::Cgroup,
        },
        None => Limit {
            bytes: machine / 2,
            source: Source::Machine,
        },
    }
}

/// Returns the directories of this process's cgroups that may limit memory, and of those above them.
fn directories(root: &Path) -> Vec<PathBuf> {
    let own = read(&root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = read(&root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut directories = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let is_of_version_2 = controllers.is_empty();
        if !is_of_version_2 && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        for (top, point) in mounts
            .lines()
            .filter_map(|line| mount(line, is_of_version_2))
        {
            // A cgroup outside of the mounted hierarchy counts as the top of that hierarchy.
            let below = Path::new(path).strip_prefix(&top).unwrap_or(Path::new(""));
            let point = root.join(point.strip_prefix("/").unwrap_or(&point));
            let climbs = below.components().any(|part| part.as_os_str() == "..");
            let below = if climbs { Path::new("") } else { below };
            directories.extend(below.ancestors().map(|below| point.join(below)));
        }
    }
    directories
}

/// Parses a line of mountinfo (proc_pid_mountinfo(5)). Returns the mounted cgroup and the mount point,
/// if it is a hierarchy that may limit memory.
fn mount(line: &str, version_2: bool) -> Option<(PathBuf, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (top, point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    let fits = if version_2 {
        kind == "cgroup2"
    } else {
        kind == "cgroup" && options.split(',').any(|option| option == "memory")
    };
    fits.then(|| {
        (
            unescaped_path(top.as_bytes()),
            unescaped_path(point.as_bytes()),
        )
    })
}

/// Returns the mount points of all volumes of kubelet's pods that are a tmpfs, of any driver.
pub(super) fn tmpfs_mounts(root: &Path) -> Vec<PathBuf> {
    let mounts = read(&root.join("proc/self/mountinfo")).unwrap_or_default();
    let of_tmpfs = mounts.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?;
        let fits = after.starts_with("tmpfs ")
            && point.contains("/volumes/kubernetes.io~csi/")
            && point.ends_with("/mount");
        fits.then(|| unescaped_path(point.as_bytes()))
    });
    of_tmpfs.collect()
}

fn memory_of_machine(root: &Path) -> Option<u64> {
    let text = read(&root.join("proc/meminfo")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?
        .take(LONGEST_FILE)
        .read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const MIB: u64 = 1 << 20;

    /// A tree of files as the kernel shows them.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let meminfo = (
            "proc/meminfo",
            "MemTotal:       8388608 kB\nMemFree: 1 kB\n",
        );
        for (path, text) in [meminfo].iter().chain(files) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const V2: &str =
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "25 18 0:22 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n26 18 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    const UNLIMITED_V1: &str = "9223372036854771712\n";

    #[rstest]
    #[case::v2(&[("proc/self/cgroup", "0::/kubepods/pod1/c1\n"), ("proc/self/mountinfo", V2),
        ("sys/fs/cgroup/kubepods/pod1/c1/memory.max", "209715200\n")], Some(200))]
    #[case::v2_namespace(&[("proc/self/cgroup", "0::/\n"), ("proc/self/mountinfo", V2),
        ("sys/fs/cgroup/memory.max", "209715200\n")], Some(200))]
    #[case::v2_pod_is_smaller(&[("proc/self/cgroup", "0::/kubepods/pod1/c1\n"), ("proc/self/mountinfo", V2),
        ("sys/fs/cgroup/kubepods/pod1/memory.max", "104857600\n"),
        ("sys/fs/cgroup/kubepods/pod1/c1/memory.max", "209715200\n")], Some(100))]
    #[case::v2_only_far_above(&[("proc/self/cgroup", "0::/kubepods/pod1/c1\n"), ("proc/self/mountinfo", V2),
        ("sys/fs/cgroup/kubepods/memory.max", "104857600\n"),
        ("sys/fs/cgroup/kubepods/pod1/c1/memory.max", "max\n")], Some(100))]
    #[case::v2_throttled_earlier(&[("proc/self/cgroup", "0::/c\n"), ("proc/self/mountinfo", V2),
        ("sys/fs/cgroup/c/memory.max", "209715200\n"), ("sys/fs/cgroup/c/memory.high", "104857600\n")], Some(100))]
    #[case::v2_none(&[("proc/self/cgroup", "0::/c\n"), ("proc/self/mountinfo", V2),
        ("sys/fs/cgroup/c/memory.max", "max\n"), ("sys/fs/cgroup/c/memory.high", "max\n")], None)]
    #[case::v2_larger_than_the_machine(&[("proc/self/cgroup", "0::/c\n"), ("proc/self/mountinfo", V2),
        ("sys/fs/cgroup/c/memory.max", "99999999999999\n")], None)]
    #[case::v1(&[("proc/self/cgroup", "4:memory:/pod1/c1\n3:cpu:/\n0::/\n"), ("proc/self/mountinfo", V1),
        ("sys/fs/cgroup/memory/pod1/c1/memory.limit_in_bytes", "209715200\n"),
        ("sys/fs/cgroup/cpu/memory.limit_in_bytes", "1048576\n")], Some(200))]
    #[case::v1_pod(&[("proc/self/cgroup", "4:cpu,memory:/pod1/c1\n"), ("proc/self/mountinfo", V1),
        ("sys/fs/cgroup/memory/pod1/memory.limit_in_bytes", "104857600\n"),
        ("sys/fs/cgroup/memory/pod1/c1/memory.limit_in_bytes", UNLIMITED_V1)], Some(100))]
    #[case::v1_none(&[("proc/self/cgroup", "4:memory:/c\n"), ("proc/self/mountinfo", V1),
        ("sys/fs/cgroup/memory/c/memory.limit_in_bytes", UNLIMITED_V1)], None)]
    // Docker without a cgroup namespace mounts the container's own cgroup.
    #[case::v1_only_its_own_is_mounted(&[("proc/self/cgroup", "4:memory:/docker/abc\n"),
        ("proc/self/mountinfo", "26 18 0:23 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "209715200\n")], Some(200))]
    // Mounted from outside of the namespace.
    #[case::outside(&[("proc/self/cgroup", "0::/../other\n"), ("proc/self/mountinfo", V2),
        ("sys/fs/cgroup/memory.max", "209715200\n")], Some(200))]
    #[case::both(&[("proc/self/cgroup", "4:memory:/c\n0::/c\n"),
        ("proc/self/mountinfo", "26 18 0:23 / /cg\\040one rw - cgroup cgroup rw,memory\n27 18 0:24 / /two rw - cgroup2 cgroup2 rw\n"),
        ("cg one/c/memory.limit_in_bytes", "104857600\n"), ("two/c/memory.max", "209715200\n")], Some(100))]
    #[case::nothing_there(&[], None)]
    #[case::nonsense(&[("proc/self/cgroup", "x\n4:memory\n::\n"), ("proc/self/mountinfo", "- - -\nx\n1 2 3 - cgroup2\n")], None)]
    fn limits(#[case] files: &[(&str, &str)], #[case] mib: Option<u64>) {
        let root = tree(files);
        let expected = match mib {
            Some(mib) => Limit {
                bytes: mib * MIB,
                source: Source::Cgroup,
            },
            None => Limit {
                bytes: 4096 * MIB,
                source: Source::Machine,
            },
        };
        assert_eq!(limit(root.path()), expected);
    }

    proptest! {
        /// However deep the cgroups are nested: the smallest limit counts.
        #[test]
        fn the_smallest_limit_counts(
            limits in prop::collection::vec(prop::option::of(1_u64..16384), 1..8),
            version_2 in any::<bool>(),
        ) {
            let (line, table, dir, file) = match version_2 {
                true => ("0::", V2, "sys/fs/cgroup", "memory.max"),
                false => ("4:memory:", V1, "sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            };
            let mut path = String::new();
            let mut files = Vec::new();
            for (depth, mib) in limits.iter().enumerate() {
                let text = match (mib, version_2) {
                    (Some(mib), _) => (mib * MIB).to_string(),
                    (None, true) => "max".to_owned(),
                    (None, false) => UNLIMITED_V1.to_owned(),
                };
                path.push_str(&format!("/{depth}"));
                files.push((format!("{dir}{path}/{file}"), text));
            }
            files.push(("proc/self/cgroup".into(), format!("{line}{path}\n")));
            files.push(("proc/self/mountinfo".into(), table.into()));
            let files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
            let smallest = limits.into_iter().flatten().filter(|mib| *mib < 8192).min();
            let expected = smallest.unwrap_or(4096) * MIB;
            prop_assert_eq!(limit(tree(&files).path()).bytes, expected);
        }
    }

    /// On this machine, in a cgroup of its own. Says why where that cannot be had.
    #[test]
    fn a_real_cgroup() {
        let parent = directories(Path::new("/")).into_iter().find(|directory| {
            directory.join("memory.limit_in_bytes").exists()
                || directory.join("memory.max").exists()
        });
        let Some(parent) = parent else {
            println!("skipped: no cgroup that limits memory is mounted here");
            return;
        };
        let own = parent.join(format!("secrets-store-csi-test-{}", std::process::id()));
        if let Err(error) = fs::create_dir(&own) {
            println!(
                "skipped: no cgroup can be made in {}: {error}",
                parent.display()
            );
            return;
        }
        let file = ["memory.limit_in_bytes", "memory.max"]
            .map(|name| own.join(name))
            .into_iter()
            .find(|file| file.exists());
        let seen = file.map(|file| {
            fs::write(file, (64 * MIB).to_string())?;
            // A process of its own, so that this one stays where it is.
            let script = format!(
                "echo $$ > {}/cgroup.procs && exec cat /proc/self/cgroup",
                own.display()
            );
            let output = std::process::Command::new("sh")
                .args(["-c", &script])
                .output()?;
            let of_process = String::from_utf8_lossy(&output.stdout).into_owned();
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            let root = tree(&[
                ("proc/self/cgroup", &of_process),
                ("proc/self/mountinfo", &mounts),
            ]);
            std::os::unix::fs::symlink("/sys", root.path().join("sys"))?;
            io::Result::Ok(limit(root.path()))
        });
        fs::remove_dir(&own).unwrap();
        match seen {
            None => println!("skipped: {} has no memory controller", own.display()),
            Some(Err(error)) => println!("skipped: {error}"),
            Some(Ok(seen)) => assert!(
                seen.bytes <= 64 * MIB && seen.source == Source::Cgroup,
                "{seen:?}"
            ),
        }
    }
}
