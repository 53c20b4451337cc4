//! Installations to upgrade from: an earlier state of this repository, or the existing driver.
//!
//! A new driver takes over nodes with running pods. The tests of this install one of these, run
//! pods, and then install this driver over it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::binaries::{target_dir, workspace};
use crate::cluster::{Error, Result};
use crate::images::{build_static, of_executable, of_executables};
use crate::install::{Form, Installation, assets};
use crate::manifest::change_object;

/// Names a commit, tag or branch of this repository.
pub const PREVIOUS_VARIABLE: &str = "E2E_PREVIOUS";
/// Names the static executable of the existing driver.
pub const UPSTREAM_VARIABLE: &str = "UPSTREAM_DRIVER";
/// The executable's name below the Kubernetes binaries, where the variable is not set.
const UPSTREAM: &str = "upstream-secrets-store-csi";
/// The name of the ClusterRole for Secrets.
const SYNCING: &str = "secretprovidersyncing-role";

/// Builds the driver of an earlier state of this repository and reads its `deploy/`: in the form with
/// three containers, if the sidecars' executables are there.
///
/// Blocks, the first time for minutes.
///
/// # Errors
/// When there is no such commit, or it does not build.
pub fn commit(reference: &str) -> Result<Installation> {
    let source = check_out(reference)?;
    let manifest = source.join("Cargo.toml");
    let manifest = manifest.to_string_lossy();
    let args = ["--manifest-path", &manifest, "--locked"];
    let args: Vec<_> = args.into_iter().chain(["-p", "driver", "--bins"]).collect();
    let failed = |reason: String| Error::Start(format!("the driver of {reference}: {reason}"));
    let (executables, command) =
        build_static(&args, |_| {}).map_err(|error| failed(error.to_string()))?;
    let driver = executables
        .get("secrets-store-csi")
        .ok_or_else(|| failed(format!("{command} built no secrets-store-csi")))?;
    let sidecars = assets();
    let form = if sidecars.join("csi-node-driver-registrar").is_file() {
        Form::Sidecars(sidecars)
    } else {
        Form::Lean
    };
    let image = of_executable("secrets-store-csi:previous", driver, &[]);
    let image = image.map_err(|error| failed(error.to_string()))?;
    Installation::read(&source.join("deploy"), &form)?.with_driver(image)
}

/// Writes the files of a commit below cargo's target directory.
fn check_out(reference: &str) -> Result<PathBuf> {
    let commit = git(&["rev-parse", "--verify", &format!("{reference}^{{commit}}")])?;
    let parent = target_dir().join("previous");
    let source = parent.join(commit.trim());
    if source.is_dir() {
        return Ok(source);
    }
    let failed = |error: std::io::Error| Error::Start(format!("{}: {error}", parent.display()));
    fs::create_dir_all(&parent).map_err(failed)?;
    let scratch = tempfile::tempdir_in(&parent).map_err(failed)?;
    let archive = scratch.path().join("archive.tar");
    let output = format!("--output={}", archive.display());
    git(&["archive", "--format=tar", &output, commit.trim()])?;
    let files = scratch.path().join("files");
    fs::create_dir(&files).map_err(failed)?;
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(&archive).arg("-C").arg(&files);
    run(tar)?;
    // Renamed into place, so that no other process builds half of it.
    fs::rename(&files, &source).map_err(failed)?;
    Ok(source)
}

fn git(args: &[&str]) -> Result<String> {
    let mut git = Command::new("git");
    git.arg("-C").arg(workspace()).args(args);
    run(git)
}

fn run(mut command: Command) -> Result<String> {
    let failed = |reason: &dyn std::fmt::Display, command: &Command| {
        Error::Start(format!("{command:?}: {reason}"))
    };
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => return Err(failed(&error, &command)),
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(failed(&complaint.trim(), &command))
}

/// Returns the commit that `$E2E_PREVIOUS` names, if any.
pub fn reference() -> Option<String> {
    let reference = std::env::var(PREVIOUS_VARIABLE).ok()?;
    (!reference.is_empty()).then_some(reference)
}

/// Returns the path of the existing driver's executable: `$UPSTREAM_DRIVER`, or the usual place.
pub fn upstream_driver() -> PathBuf {
    std::env::var_os(UPSTREAM_VARIABLE).map_or_else(|| assets().join(UPSTREAM), PathBuf::from)
}

/// Returns an installation of the existing driver from its executable, which has to be static. Our
/// manifests with three containers install it, with its own rights to Secrets; they are equivalent to its
/// own. It runs `mount` and `umount`, for which the static `probe` stands in.
///
/// # Errors
/// When an executable is not there, or is not static.
pub fn upstream(driver: &Path, probe: &Path) -> Result<Installation> {
    let programs = [
        ("secrets-store-csi", driver),
        ("bin/mount", probe),
        ("bin/umount", probe),
    ];
    let image = of_executables("secrets-store-csi:existing", &programs, &[]);
    let image = image.map_err(|error| Error::Start(error.to_string()))?;
    let deploy = workspace().join("deploy");
    let mut existing =
        Installation::read(&deploy, &Form::Sidecars(assets()))?.with_driver(image)?;
    allow_what_the_existing_driver_needs(&mut existing.manifests)?;
    Ok(existing)
}

/// Gives the driver's role for Secrets the verbs of the existing driver's.
///
/// # Errors
/// When no manifest has the role.
pub(crate) fn allow_what_the_existing_driver_needs(manifests: &mut [String]) -> Result<()> {
    let verbs = [
        "create", "delete", "get", "list", "patch", "update", "watch",
    ];
    change_object(manifests, "ClusterRole", SYNCING, |role| {
        role["rules"][0]["verbs"] = json!(verbs);
    })
}
