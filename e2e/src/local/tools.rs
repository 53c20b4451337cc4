//! The programs that the cluster consists of, and where to get those that are missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cluster::{Error, Result};
use crate::install::ASSETS_VARIABLE;

/// The paths of the programs.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    pub(super) apiserver: PathBuf,
    pub(super) controller_manager: PathBuf,
    pub(super) scheduler: PathBuf,
    pub(super) kubelet: PathBuf,
    pub(super) kubectl: PathBuf,
    pub(super) etcd: PathBuf,
    pub(super) containerd: PathBuf,
    pub(super) ctr: PathBuf,
    pub(super) runc: PathBuf,
    /// The directory with the CNI plugins.
    pub(super) cni: PathBuf,
    /// The minor version of Kubernetes 1.
    pub(super) minor: u32,
}

impl Tools {
    /// Finds the programs: first in the assets, so that a newer containerd or etcd there is used,
    /// then where distributions install them.
    ///
    /// # Errors
    /// [`Error::Start`] naming every program that is missing, and how to get it.
    pub(super) fn find(assets: &Path) -> Result<Self> {
        let mut search = Search {
            assets,
            missing: Vec::new(),
        };
        let kubernetes = format!(
            "from https://dl.k8s.io/<version>/kubernetes-server-linux-<architecture>.tar.gz, into ${ASSETS_VARIABLE}"
        );
        let mut of_kubernetes = |name| search.find(name, &[assets.to_owned()], kubernetes.as_str());
        let apiserver = of_kubernetes("kube-apiserver");
        let controller_manager = of_kubernetes("kube-controller-manager");
        let scheduler = of_kubernetes("kube-scheduler");
        let kubelet = of_kubernetes("kubelet");
        let kubectl = of_kubernetes("kubectl");
        let etcd = search.installed("etcd", "etcd-server");
        let containerd = search.installed("containerd", "containerd");
        let ctr = search.installed("ctr", "containerd");
        search.installed("containerd-shim-runc-v2", "containerd");
        let runc = search.installed("runc", "runc");
        search.installed("iptables", "iptables");
        search.installed("ip", "iproute2");
        let plugin_dirs = ["/usr/lib/cni", "/opt/cni/bin"].map(PathBuf::from);
        let package = "apt-get install containernetworking-plugins";
        let bridge = search.find("bridge", &plugin_dirs, package);
        search.find("host-local", &plugin_dirs, package);
        if !search.missing.is_empty() {
            let missing = search.missing.join("; ");
            return Err(Error::Start(format!(
                "these programs are missing: {missing}"
            )));
        }
        Ok(Self {
            minor: minor_version(&kubelet)?,
            apiserver,
            controller_manager,
            scheduler,
            kubelet,
            kubectl,
            etcd,
            containerd,
            ctr,
            runc,
            cni: bridge.parent().unwrap_or(assets).to_owned(),
        })
    }
}

struct Search<'a> {
    assets: &'a Path,
    missing: Vec<String>,
}

impl Search<'_> {
    fn installed(&mut self, name: &str, package: &str) -> PathBuf {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut dirs = vec![self.assets.to_owned()];
        dirs.extend(std::env::split_paths(&path));
        // An ordinary user does not have these on the path.
        dirs.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
        self.find(name, &dirs, &format!("apt-get install {package}"))
    }

    fn find(&mut self, name: &str, dirs: &[PathBuf], how: &str) -> PathBuf {
        let mut candidates = dirs.iter().map(|dir| dir.join(name));
        candidates.find(|path| path.is_file()).unwrap_or_else(|| {
            self.missing.push(format!("{name} ({how})"));
            PathBuf::new()
        })
    }
}

/// Returns `36` for `Kubernetes v1.36.2`.
fn minor_version(kubelet: &Path) -> Result<u32> {
    let failed = |reason: &dyn std::fmt::Display| {
        Error::Start(format!("{} --version: {reason}", kubelet.display()))
    };
    let output = Command::new(kubelet)
        .arg("--version")
        .output()
        .map_err(|error| failed(&error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_minor(&text).ok_or_else(|| failed(&format_args!("no version in {text:?}")))
}

fn parse_minor(text: &str) -> Option<u32> {
    text.trim()
        .strip_prefix("Kubernetes v1.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_missing_is_named_at_once() {
        let empty = tempfile::tempdir().unwrap();
        let error = Tools::find(empty.path()).unwrap_err().to_string();
        for name in ["kube-apiserver (from ", "kubelet (from ", "kubectl (from "] {
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn versions() {
        assert_eq!(parse_minor("Kubernetes v1.36.2\n"), Some(36));
        assert_eq!(parse_minor("Kubernetes v1.30.0-rc.1+k3s"), Some(30));
        assert_eq!(parse_minor("v1.30"), None);
    }
}
