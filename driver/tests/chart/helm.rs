//! Renders the chart with Helm.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use tempfile::TempDir;

use crate::objects::deploy;

/// Values of an installation whose nodes have the image, which has no registry.
pub(crate) const IMAGE_BY_HAND: &str = "linux: {image: {pullPolicy: Never}}";

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
        Self::changed("", |chart| {
            fs::write(chart.join("values.yaml"), values).unwrap();
        })
    }

    /// Returns the chart as a release has it, with the place of the driver's image.
    pub(crate) fn released(image: &str) -> Self {
        Self::changed("", |chart| {
            let file = chart.join("Chart.yaml");
            let text = fs::read_to_string(&file).unwrap();
            let released = text.replace(
                "driverImage: secrets-store-csi\n",
                &format!("driverImage: {image}\n"),
            );
            assert_ne!(released, text);
            fs::write(file, released).unwrap();
        })
    }

    /// Returns the chart with its notes among the objects, as the field `notes` of a `kind: Notes`.
    pub(crate) fn with_visible_notes() -> Self {
        Self::changed("", |chart| {
            let notes = fs::read_to_string(chart.join("templates/NOTES.txt")).unwrap();
            let object = format!(
                "{{{{- define \"notes\" }}}}\n{notes}{{{{- end }}}}\nkind: Notes\nnotes: |\n{{{{ include \"notes\" . | indent 2 }}}}\n"
            );
            fs::write(chart.join("templates/notes.yaml"), object).unwrap();
        })
    }

    /// Returns a chart of which the one in `deploy/` is a part, on a condition below its values.
    pub(crate) fn parent(condition: &str) -> Self {
        let chart = Self::changed("charts/secrets-store-csi-driver", |_| {});
        let parent = format!(
            "apiVersion: v2\nname: provider\nversion: 1.0.0\ndependencies:\n  - name: secrets-store-csi-driver\n    version: \"*\"\n    condition: secrets-store-csi-driver.{condition}\n"
        );
        fs::write(chart.path.join("Chart.yaml"), parent).unwrap();
        chart
    }

    /// Returns a folder with a copy of the chart at this place in it, and a change.
    fn changed(place: &str, change: impl Fn(&Path)) -> Self {
        let copy = tempfile::tempdir().unwrap();
        let chart = copy.path().join(place);
        fs::create_dir_all(&chart).unwrap();
        copy_tree(&deploy("chart"), &chart);
        change(&chart);
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

/// Finds a program in a variable, on the search path or in `/var/cache/e2e-tools`. Prints once what is skipped if
/// there is none.
pub(crate) fn tool(variable: &str, name: &str, skipped: &str, said: &Once) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = named
        .into_iter()
        .chain(std::env::split_paths(&path).map(|directory| directory.join(name)))
        .chain([Path::new("/var/cache/e2e-tools").join(name)])
        .find(|candidate| candidate.is_file());
    if found.is_none() {
        // The test harness would hide the output of eprintln! when the test passes.
        let line = format!("skipped: {skipped} {name} in ${variable} or $PATH\n");
        said.call_once(|| std::io::stderr().write_all(line.as_bytes()).unwrap());
    }
    found
}

/// The `helm` program of this machine.
pub(crate) struct Helm(PathBuf);

impl Helm {
    /// Finds the program. Prints a line if there is none.
    pub(crate) fn find() -> Option<Self> {
        static ONCE: Once = Once::new();
        tool("HELM", "helm", "rendering the chart needs", &ONCE).map(Self)
    }

    /// Renders the objects of an installation `csi-secrets-store` in `kube-system`, without CRDs, for
    /// nodes that have the image. The error is Helm's message.
    pub(crate) fn render(
        &self,
        chart: &Chart,
        kubernetes: &str,
        values: &str,
    ) -> Result<String, String> {
        self.render_with(chart, kubernetes, &[IMAGE_BY_HAND, values])
    }

    /// Renders as [`render`](Self::render) does, with these files of values alone.
    pub(crate) fn render_with(
        &self,
        chart: &Chart,
        kubernetes: &str,
        values: &[&str],
    ) -> Result<String, String> {
        let mut command = Command::new(&self.0);
        command
            .args(["template", "csi-secrets-store", "--namespace=kube-system"])
            .args(["--kube-version", kubernetes]);
        let folder = tempfile::tempdir().unwrap();
        for (number, values) in values.iter().enumerate() {
            let file = folder.path().join(number.to_string());
            fs::write(&file, values).unwrap();
            command.arg("--values").arg(file);
        }
        let output = command.arg(&chart.path).output().unwrap();
        if output.status.success() {
            // Helm 4 ends each object with an empty line, Helm 3 does not.
            let objects = String::from_utf8(output.stdout).unwrap();
            Ok(objects.replace("\n\n---\n", "\n---\n"))
        } else {
            Err(String::from_utf8(output.stderr).unwrap())
        }
    }
}
