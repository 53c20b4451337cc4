//! The workspace's executables: found, and built first where they are stale.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use serde::Deserialize;

/// Names a folder that holds all four executables; nothing is built then.
pub const BIN_DIR_VARIABLE: &str = "E2E_BIN_DIR";

/// Where each executable is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    /// `secrets-store-csi`.
    pub driver: PathBuf,
    /// `fake-provider`.
    pub fake_provider: PathBuf,
    /// `probe`.
    pub probe: PathBuf,
    /// `e2e`, which is also the node.
    pub e2e: PathBuf,
}

/// What went wrong while the executables were looked for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The build tool could not be run.
    #[error("run {cargo:?} to build the workspace's executables: {reason}")]
    Run {
        /// The program.
        cargo: OsString,
        /// The system's words.
        reason: String,
    },
    /// The compiler's own messages went to stderr.
    #[error("the workspace does not build: {command} failed, its messages are above")]
    Build {
        /// What was run.
        command: String,
    },
    /// A place without one of the executables.
    #[error("there is no executable {name} in {place}")]
    Missing {
        /// The executable's file name.
        name: &'static str,
        /// Where it was expected.
        place: String,
    },
}

static FOUND: Mutex<Option<Binaries>> = Mutex::new(None);

impl Binaries {
    /// The executables of this workspace, in the profile this crate was compiled in.
    ///
    /// The first call of a process builds them, which takes a moment or, on a fresh clone,
    /// minutes; `progress` hears the name of each crate as it is done. Blocks.
    ///
    /// # Errors
    /// When the build fails, or when `$E2E_BIN_DIR` lacks one.
    pub fn find(progress: impl FnMut(&str)) -> Result<Self, Error> {
        // Held while building: a second caller wants the same result, not a second build.
        let mut found = FOUND
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(binaries) = &*found {
            return Ok(binaries.clone());
        }
        let binaries = match std::env::var_os(BIN_DIR_VARIABLE) {
            Some(dir) => Self::in_dir(Path::new(&dir))?,
            None => Self::build(progress)?,
        };
        Ok(found.insert(binaries).clone())
    }

    /// The executables in a folder.
    ///
    /// # Errors
    /// [`Error::Missing`] for the first that is not there.
    pub fn in_dir(dir: &Path) -> Result<Self, Error> {
        let at = |name: &'static str| {
            let path = dir.join(name);
            if path.is_file() {
                Ok(path)
            } else {
                Err(Error::Missing {
                    name,
                    place: dir.display().to_string(),
                })
            }
        };
        Self::from(at)
    }

    fn build(progress: impl FnMut(&str)) -> Result<Self, Error> {
        let mut args = vec!["--workspace", "--bins"];
        if !cfg!(debug_assertions) {
            args.push("--release");
        }
        let (mut executables, command) = cargo_build(&args, &[], progress)?;
        Self::from(|name| {
            executables.remove(name).ok_or_else(|| Error::Missing {
                name,
                place: format!("the output of {command}"),
            })
        })
    }

    fn from(mut at: impl FnMut(&'static str) -> Result<PathBuf, Error>) -> Result<Self, Error> {
        Ok(Self {
            driver: at("secrets-store-csi")?,
            fake_provider: at("fake-provider")?,
            probe: at("probe")?,
            e2e: at("e2e")?,
        })
    }
}

/// Runs `cargo build` in the workspace: what it built by name, and the command for a complaint.
///
/// # Errors
/// When cargo cannot be run or the workspace does not build.
pub(crate) fn cargo_build(
    args: &[&str],
    variables: &[(&str, OsString)],
    mut progress: impl FnMut(&str),
) -> Result<(BTreeMap<String, PathBuf>, String), Error> {
    // Set by cargo for everything it runs; by hand, the one on the path serves as well.
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let failed = |reason: std::io::Error| Error::Run {
        cargo: cargo.clone(),
        reason: reason.to_string(),
    };
    let mut command = Command::new(&cargo);
    command
        .args(["build", "--message-format=json-render-diagnostics"])
        .args(args)
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // Build scripts of dependencies look at these, and what they saw last was not this
    // crate's: with them in place every run would compile half the world anew.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_of_this_crate) {
            command.env_remove(name);
        }
    }
    command.envs(variables.iter().cloned());
    let mut child = command.spawn().map_err(failed)?;
    let mut executables = BTreeMap::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line.map_err(failed)?;
            // The other kinds of message have none of these fields.
            let Ok(artifact) = serde_json::from_str::<Artifact>(&line) else {
                continue;
            };
            progress(&artifact.target.name);
            if let Some(executable) = artifact.executable {
                executables.insert(artifact.target.name, executable);
            }
        }
    }
    let shown = format!("{command:?}");
    match child.wait().map_err(failed)?.success() {
        true => Ok((executables, shown)),
        false => Err(Error::Build { command: shown }),
    }
}

/// The top of the repository.
pub fn workspace() -> &'static Path {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.parent().unwrap_or(crate_dir)
}

/// Where cargo builds.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// The folder for what a failed run leaves, by the run's name.
pub fn kept(run: &str) -> PathBuf {
    target_dir().join("e2e").join(run)
}

/// Whether a variable is one that cargo sets for the crate whose program it runs.
fn is_of_this_crate(variable: &str) -> bool {
    const PREFIXES: [&str; 4] = [
        "CARGO_PKG_",
        "CARGO_BIN_",
        "CARGO_MANIFEST_",
        "CARGO_CRATE_",
    ];
    PREFIXES.iter().any(|prefix| variable.starts_with(prefix))
        || ["CARGO_PRIMARY_PACKAGE", "OUT_DIR"].contains(&variable)
}

/// The part of cargo's `compiler-artifact` message that is of interest.
#[derive(Deserialize)]
struct Artifact {
    target: Target,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_lacks_an_executable_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["secrets-store-csi", "fake-provider", "e2e"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let error = Binaries::in_dir(dir.path()).unwrap_err();
        assert!(
            matches!(error, Error::Missing { name: "probe", .. }),
            "{error}"
        );
        std::fs::write(dir.path().join("probe"), "").unwrap();
        assert_eq!(
            Binaries::in_dir(dir.path()).unwrap().probe,
            dir.path().join("probe")
        );
    }

    #[test]
    fn messages_of_cargo_without_an_executable_are_told_apart() {
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"serde"},"executable":null}"#;
        assert!(
            serde_json::from_str::<Artifact>(library)
                .unwrap()
                .executable
                .is_none()
        );
        let other = r#"{"reason":"build-script-executed","package_id":"x"}"#;
        assert!(serde_json::from_str::<Artifact>(other).is_err());
    }
}
