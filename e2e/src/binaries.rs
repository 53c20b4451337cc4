//! The workspace's executables, built where they are stale.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use serde::Deserialize;

/// Names a folder with all four executables. Nothing is built then.
pub const BIN_DIR_VARIABLE: &str = "E2E_BIN_DIR";

/// The paths of the executables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    /// `secrets-store-csi`.
    pub driver: PathBuf,
    /// `fake-provider`.
    pub fake_provider: PathBuf,
    /// `probe`.
    pub probe: PathBuf,
    /// `e2e`, which also runs the nodes of the embedded cluster.
    pub e2e: PathBuf,
}

/// The reason why there are no executables.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The build tool could not be run.
    #[error("run {cargo:?} to build the workspace's executables: {reason}")]
    Run {
        /// The path of cargo.
        cargo: OsString,
        /// The error of the system.
        reason: String,
    },
    /// The workspace does not build; the compiler's messages are on standard error.
    #[error("the workspace does not build: {command} failed, its messages are above")]
    Build {
        /// The command.
        command: String,
    },
    /// An executable is missing.
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
    /// Returns the executables of this workspace, in the profile of this crate.
    ///
    /// The first call of a process builds them, which takes a moment or, on a fresh clone, minutes.
    /// Calls `progress` with the name of each crate that is compiled. Blocks.
    ///
    /// # Errors
    /// When the build fails, or when `$E2E_BIN_DIR` lacks one.
    pub fn find(progress: impl FnMut(&str)) -> Result<Self, Error> {
        // Locked while building: a second caller needs the same result, not a second build.
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

    /// Returns `kubectl-secrets_store`, the plugin, which is built with the others.
    pub fn plugin(&self) -> PathBuf {
        self.e2e.with_file_name("kubectl-secrets_store")
    }

    /// Returns the executables in a folder.
    ///
    /// # Errors
    /// [`Error::Missing`] for the first that does not exist.
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

/// Runs `cargo build` in the workspace. Returns the executables by name, and the command, for error
/// messages.
///
/// # Errors
/// When cargo cannot be run or the workspace does not build.
pub(crate) fn cargo_build(
    args: &[&str],
    variables: &[(&str, OsString)],
    mut progress: impl FnMut(&str),
) -> Result<(BTreeMap<String, PathBuf>, String), Error> {
    // Cargo sets the variable for what it runs; otherwise, the one on the path is used.
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
    // Build scripts of dependencies depend on these variables, and the last build had other values:
    // with them, each run would compile many dependencies again.
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
            // Other kinds of messages do not have these fields.
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
    if child.wait().map_err(failed)?.success() {
        return Ok((executables, shown));
    }
    Err(Error::Build { command: shown })
}

/// Returns the root of the repository.
pub fn workspace() -> &'static Path {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.parent().unwrap_or(crate_dir)
}

/// Returns the directory in which cargo builds.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// Returns the folder for the logs of a failed run.
pub fn logs_dir(run: &str) -> PathBuf {
    target_dir().join("e2e").join(run)
}

/// Returns whether cargo sets a variable for the crate whose program it runs.
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

/// The used fields of cargo's message `compiler-artifact`.
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
    fn only_artifacts_are_parsed_as_artifacts() {
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
