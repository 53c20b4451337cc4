//! Renders the chart with Helm.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use tempfile::TempDir;

use crate::objects::deploy;

/// A chart to render.
pub(crate) struct Chart {
    path: PathBuf,
    _copy: Option<TempDir>,
}

impl Chart {
    /// Returns the chart in `deploy/`.
    pub(crate) fn ours() -> Self {
        Self {
            path: deploy("chart"),
            _copy: None,
        }
    }

    /// Returns the chart in `deploy/` with other default values, as Helm uses it with
    /// `--reuse-values`: the values of the release replace those of the new chart.
    pub(crate) fn with_values(values: &str) -> Self {
        let copy = tempfile::tempdir().unwrap();
        copy_tree(&deploy("chart"), copy.path());
        fs::write(copy.path().join("values.yaml"), values).unwrap();
        Self {
            path: copy.path().to_owned(),
            _copy: Some(copy),
        }
    }
}

fn copy_tree(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&target).unwrap();
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The `helm` program of this machine.
pub(crate) struct Helm(PathBuf);

impl Helm {
    /// Finds the program. Prints a line if there is none.
    pub(crate) fn find() -> Option<Self> {
        let named = std::env::var_os("HELM").map(PathBuf::from);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = named
            .into_iter()
            .chain(std::env::split_paths(&path).map(|dir| dir.join("helm")))
            .chain(["/var/cache/e2e-tools/helm".into()])
            .find(|candidate| candidate.is_file());
        static ONCE: Once = Once::new();
        if found.is_none() {
            // The test harness would hide the output of eprintln! when the test passes.
            let line = "skipped: rendering the chart needs helm in $HELM or $PATH\n";
            ONCE.call_once(|| std::io::stderr().write_all(line.as_bytes()).unwrap());
        }
        found.map(Self)
    }

    /// Renders the objects of an installation `csi-secrets-store` in `kube-system`, without CRDs. The
    /// error is Helm's message.
    pub(crate) fn render(
        &self,
        chart: &Chart,
        kubernetes: &str,
        values: &str,
    ) -> Result<String, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, values).unwrap();
        let output = Command::new(&self.0)
            .args(["template", "csi-secrets-store", "--namespace=kube-system"])
            .args(["--kube-version", kubernetes, "--values"])
            .args([file.path(), &chart.path])
            .output()
            .unwrap();
        if output.status.success() {
            Ok(String::from_utf8(output.stdout).unwrap())
        } else {
            Err(String::from_utf8(output.stderr).unwrap())
        }
    }
}
