//! Checks of answers: object versions, paths, modes, sizes, and whether they stay the same.

use std::collections::BTreeSet;

use proto::provider::MountRequest;

use super::subject::{Answer, PERMISSION};
use super::{Check, Finding, Subject, failed};

/// The limits of this repository's driver.
pub(super) const MOST_FILES: usize = 4096;
const MOST_VERSIONS: usize = 4096;
const MOST_VERSION_BYTES: usize = 1 << 20;
pub(super) const MOST_LEVELS: usize = 32;
const LARGEST_ANSWER: usize = 4 << 20;

/// The limits of Linux: NAME_MAX and PATH_MAX.
const LONGEST_NAME: usize = 255;
const LONGEST_PATH: usize = 4096;

const UPSTREAM_CLIENT: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/pkg/secrets-store/provider_client.go";
const UPSTREAM_SERVER: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/pkg/secrets-store/nodeserver.go";
const SERVICE: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/provider/v1alpha1/service.proto";
const MESSAGE_SIZE: &str = "https://secrets-store-csi-driver.sigs.k8s.io/providers";
const ETCD_LIMIT: &str = "https://etcd.io/docs/v3.5/dev-guide/limit/";
const ATOMIC_WRITER: &str =
    "https://github.com/kubernetes/kubernetes/blob/master/pkg/volume/util/atomic_writer.go";
const LIMITS: &str = "https://man7.org/linux/man-pages/man7/path_resolution.7.html";
const FILE_NAMES: &str = "https://dwheeler.com/essays/fixing-unix-linux-filenames.html";
const MODES: &str = "https://man7.org/linux/man-pages/man7/inode.7.html";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "files-present",
        rule: "An answer has files, or the provider wrote files below the target path.",
        source: UPSTREAM_CLIENT,
        run: |s| Box::pin(of_first(s, files_present)),
    },
    Check {
        name: "no-files-beside-answer",
        rule: "A provider that answers with files writes none below the target path.",
        source: UPSTREAM_CLIENT,
        run: |s| Box::pin(of_first(s, no_files_beside_answer)),
    },
    Check {
        name: "answer-bounded",
        rule: "An answer has at most 4 MiB and 4096 files.",
        source: MESSAGE_SIZE,
        run: |s| Box::pin(of_first(s, answer_bounded)),
    },
    Check {
        name: "versions-present",
        rule: "An answer has the versions of its objects.",
        source: UPSTREAM_CLIENT,
        run: |s| Box::pin(of_first(s, versions_present)),
    },
    Check {
        name: "version-ids",
        rule: "Each object version has an id of its own.",
        source: SERVICE,
        run: |s| Box::pin(of_first(s, version_ids)),
    },
    Check {
        name: "versions-bounded",
        rule: "An answer has at most 4096 object versions, with 1 MiB of ids and versions.",
        source: ETCD_LIMIT,
        run: |s| Box::pin(of_first(s, versions_bounded)),
    },
    Check {
        name: "paths-relative",
        rule: "Paths are relative.",
        source: ATOMIC_WRITER,
        run: |s| Box::pin(of_first(s, paths_relative)),
    },
    Check {
        name: "paths-clean",
        rule: "Paths have no '.', no '..', no empty part and no NUL.",
        source: ATOMIC_WRITER,
        run: |s| Box::pin(of_first(s, paths_clean)),
    },
    Check {
        name: "paths-reserved",
        rule: "No part of a path begins with '..', which is reserved for the driver's own links.",
        source: ATOMIC_WRITER,
        run: |s| Box::pin(of_first(s, paths_reserved)),
    },
    Check {
        name: "paths-short",
        rule: "Paths have at most 32 levels, 255 bytes in each, and 4096 bytes together.",
        source: LIMITS,
        run: |s| Box::pin(of_first(s, paths_short)),
    },
    Check {
        name: "paths-unique",
        rule: "Each path is there once, and no file is a directory of another one.",
        source: ATOMIC_WRITER,
        run: |s| Box::pin(of_first(s, paths_unique)),
    },
    Check {
        name: "paths-printable",
        rule: "Paths have no control characters, and no character in place of bytes that are not UTF-8.",
        source: FILE_NAMES,
        run: |s| Box::pin(of_first(s, paths_printable)),
    },
    Check {
        name: "modes-in-range",
        rule: "Modes are permission bits, 0 to 0777.",
        source: MODES,
        run: |s| Box::pin(of_first(s, modes_in_range)),
    },
    Check {
        name: "modes-asked-for",
        rule: "A file has mode 0, the permission that was asked for, or a mode of its own.",
        source: UPSTREAM_SERVER,
        run: |s| Box::pin(modes_asked_for(s)),
    },
    Check {
        name: "modes-concurrent",
        rule: "Concurrent Mounts with different permissions do not affect each other.",
        source: UPSTREAM_SERVER,
        run: |s| Box::pin(modes_concurrent(s)),
    },
    Check {
        name: "content-stable",
        rule: "Two Mounts have the same content when nothing changed.",
        source: SERVICE,
        run: |s| Box::pin(content_stable(s)),
    },
    Check {
        name: "versions-stable",
        rule: "Versions stay the same when the content does.",
        source: SERVICE,
        run: |s| Box::pin(versions_stable(s)),
    },
];

/// Checks the answer to the first request.
async fn of_first(
    subject: &Subject,
    check: fn(&Answer) -> Result<(), Finding>,
) -> Result<(), Finding> {
    check(subject.first().await?)
}

fn files_present(answer: &Answer) -> Result<(), Finding> {
    if answer.files.is_empty() {
        return Err(failed("there are no files"));
    }
    Ok(())
}

fn no_files_beside_answer(answer: &Answer) -> Result<(), Finding> {
    if answer.wrote_beside {
        return Err(failed(
            "there are files in the answer and below the target path",
        ));
    }
    Ok(())
}

fn answer_bounded(answer: &Answer) -> Result<(), Finding> {
    if answer.bytes > LARGEST_ANSWER || answer.files.len() > MOST_FILES {
        let (bytes, files) = (answer.bytes, answer.files.len());
        return Err(failed(format!("it has {bytes} bytes and {files} files")));
    }
    Ok(())
}

fn versions_present(answer: &Answer) -> Result<(), Finding> {
    if answer.versions.is_empty() {
        return Err(failed("there are none"));
    }
    Ok(())
}

fn version_ids(answer: &Answer) -> Result<(), Finding> {
    let mut ids = BTreeSet::new();
    for version in &answer.versions {
        if version.id.is_empty() {
            return Err(failed("an id is empty"));
        }
        if !ids.insert(&version.id) {
            return Err(failed(format!("{:?} is there twice", version.id)));
        }
    }
    Ok(())
}

fn versions_bounded(answer: &Answer) -> Result<(), Finding> {
    let versions = answer.versions.len();
    let length = |v: &proto::provider::ObjectVersion| v.id.len() + v.version.len();
    let bytes: usize = answer.versions.iter().map(length).sum();
    if versions > MOST_VERSIONS || bytes > MOST_VERSION_BYTES {
        let reason = format!("it has {versions} versions with {bytes} bytes");
        return Err(failed(reason));
    }
    Ok(())
}

/// Fails for the first path that a predicate refuses.
fn each_path(answer: &Answer, keeps: impl Fn(&str) -> bool) -> Result<(), Finding> {
    match answer.files.iter().find(|file| !keeps(&file.path)) {
        Some(file) => Err(failed(format!("{:?}", file.path))),
        None => Ok(()),
    }
}

fn paths_relative(answer: &Answer) -> Result<(), Finding> {
    each_path(answer, |path| !path.starts_with('/'))
}

fn paths_clean(answer: &Answer) -> Result<(), Finding> {
    each_path(answer, |path| {
        let path = path.trim_start_matches('/');
        !path.contains('\0') && path.split('/').all(|part| !["", ".", ".."].contains(&part))
    })
}

fn paths_reserved(answer: &Answer) -> Result<(), Finding> {
    each_path(answer, |path| {
        path.split('/')
            .all(|part| part == ".." || !part.starts_with(".."))
    })
}

fn paths_short(answer: &Answer) -> Result<(), Finding> {
    each_path(answer, |path| {
        path.len() <= LONGEST_PATH
            && path.split('/').count() <= MOST_LEVELS
            && path.split('/').all(|part| part.len() <= LONGEST_NAME)
    })
}

fn paths_unique(answer: &Answer) -> Result<(), Finding> {
    let mut paths = BTreeSet::new();
    for path in answer.paths() {
        if !paths.insert(path) {
            return Err(failed(format!("{path:?} is there twice")));
        }
    }
    for path in &paths {
        let parents = path.match_indices('/').map(|(end, _)| &path[..end]);
        for parent in parents {
            if paths.contains(parent) {
                return Err(failed(format!("{parent:?} is a file and a directory")));
            }
        }
    }
    Ok(())
}

fn paths_printable(answer: &Answer) -> Result<(), Finding> {
    each_path(answer, |path| {
        let path = path.replace('\0', "");
        !path
            .chars()
            .any(|c| c.is_control() || c == char::REPLACEMENT_CHARACTER)
    })
}

fn modes_in_range(answer: &Answer) -> Result<(), Finding> {
    let out = answer
        .files
        .iter()
        .find(|file| !(0..=0o777).contains(&file.mode));
    match out {
        Some(file) => Err(failed(format!("{:?} has mode {:#o}", file.path, file.mode))),
        None => Ok(()),
    }
}

fn asking(subject: &Subject, permission: u32) -> MountRequest {
    MountRequest {
        permission: permission.to_string(),
        ..subject.request()
    }
}

async fn modes_asked_for(subject: &Subject) -> Result<(), Finding> {
    let first = subject.first().await?;
    let other = 0o400;
    let answer = subject.succeeds(asking(subject, other)).await?;
    for (before, after) in first.files.iter().zip(&answer.files) {
        let copied =
            before.mode.cast_unsigned() == PERMISSION && after.mode.cast_unsigned() == other;
        if before.path == after.path && before.mode != after.mode && !copied {
            let (path, mode) = (&after.path, after.mode);
            return Err(failed(format!(
                "asked for {other:04o}, {path:?} has {mode:04o}"
            )));
        }
    }
    Ok(())
}

async fn modes_concurrent(subject: &Subject) -> Result<(), Finding> {
    let permissions = [0o400, 0o440, 0o444, 0o600];
    let mut alone = Vec::new();
    for permission in permissions {
        let answer = subject.succeeds(asking(subject, permission)).await?;
        alone.push(modes(&answer));
    }
    for _ in 0..4 {
        let calls = permissions.map(|permission| subject.mount(asking(subject, permission)));
        for (answer, alone) in futures::future::join_all(calls).await.iter().zip(&alone) {
            let answer = answer
                .as_ref()
                .map_err(|status| failed(subject.told(status)))?;
            if modes(answer) != *alone {
                return Err(failed("a file has the mode that another call asked for"));
            }
        }
    }
    Ok(())
}

fn modes(answer: &Answer) -> Vec<i32> {
    answer.files.iter().map(|file| file.mode).collect()
}

async fn content_stable(subject: &Subject) -> Result<(), Finding> {
    let first = subject.first().await?;
    let again = subject.succeeds(subject.request()).await?;
    if first.paths() != again.paths() {
        return Err(failed("the second answer has other files"));
    }
    let changed = first
        .files
        .iter()
        .zip(&again.files)
        .find(|(a, b)| a.contents != b.contents);
    match changed {
        Some((file, _)) => Err(failed(format!(
            "{:?} changed. If the store makes a new value for each call, each refresh writes the \
             volume, and applications that watch the file load it again; a class should ask for \
             such objects only if that is wanted",
            file.path
        ))),
        None => Ok(()),
    }
}

async fn versions_stable(subject: &Subject) -> Result<(), Finding> {
    let first = subject.first().await?;
    let again = subject.succeeds(subject.request()).await?;
    if first.files != again.files {
        return Err(Finding::Skipped("the content is not stable".to_owned()));
    }
    if first.versions != again.versions {
        return Err(failed("the versions changed, and the content did not"));
    }
    Ok(())
}
