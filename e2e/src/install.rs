//! Installations of the driver: `deploy/` as an operator applies it, and the tests' provider.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::ResourceExt;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, ListParams};

use crate::binaries::workspace;
use crate::cluster::{Error, Result, api, poll};
use crate::images::{self, Image, Images};
use crate::manifest::{change_container, containers_mut, parse};
use crate::namespace::Namespace;

pub(crate) use rollout::{missing, wait_rolled_out};

mod rollout;

/// Names the folder with the Kubernetes binaries.
pub const ASSETS_VARIABLE: &str = "KUBE_ASSETS";
const DEFAULT_ASSETS: &str = "/var/cache/kube-assets";
/// Not empty: the driver is installed with its two sidecars.
pub const SIDECARS_VARIABLE: &str = "E2E_SIDECARS";

/// The namespace of driver and provider.
pub(crate) const NAMESPACE: &str = "kube-system";
const DRIVER_NAME: &str = "secrets-store.csi.k8s.io";
/// The names of the driver's DaemonSet and its container.
pub(crate) const DRIVER: &str = "csi-secrets-store";
const DRIVER_CONTAINER: &str = "secrets-store";
/// A label that no node has: a DaemonSet that selects it runs nowhere.
pub(crate) const STOPPED: &str = "e2e/stopped";

/// Returns the folder with the Kubernetes binaries: `$KUBE_ASSETS`, or the usual place.
pub fn assets() -> PathBuf {
    std::env::var_os(ASSETS_VARIABLE).map_or_else(|| DEFAULT_ASSETS.into(), PathBuf::from)
}

/// The form of the driver's DaemonSet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// One container, as in `lean/` below the manifests.
    Lean,
    /// Beside the driver Kubernetes' registrar and liveness probe, as in the manifests themselves.
    /// Their static executables are in this folder.
    Sidecars(PathBuf),
}

impl Form {
    /// Returns the form that `$E2E_SIDECARS` asks for.
    pub fn from_env() -> Self {
        if std::env::var_os(SIDECARS_VARIABLE).is_some_and(|value| !value.is_empty()) {
            Self::Sidecars(assets())
        } else {
            Self::Lean
        }
    }
}

/// Manifests and images that are put into a cluster of real Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// The manifests in the order of their application, each with any number of documents.
    pub manifests: Vec<String>,
    /// The images that they name.
    pub images: Vec<Image>,
}

impl Installation {
    /// Reads a folder like `deploy/`, with the right to make Secrets. The driver's image is not among the
    /// images.
    ///
    /// # Errors
    /// When a manifest cannot be read, or a sidecar's executable is not there or not static.
    pub fn read(deploy: &Path, form: &Form) -> Result<Self> {
        let mut manifests = read_manifests(deploy)?;
        // Earlier states of this repository have it among the rest.
        let syncing = deploy.join("optional/rbac-secretprovidersyncing.yaml");
        if syncing.is_file() {
            manifests.push(read_manifest(&syncing)?);
        }
        let mut images = Vec::new();
        for manifest in &mut manifests {
            let Form::Sidecars(executables) = form else {
                *manifest = lean(manifest, deploy)?;
                continue;
            };
            for program in ["csi-node-driver-registrar", "livenessprobe"] {
                if let Some(name) = image_of(manifest, program)? {
                    let executable = executables.join(program);
                    let image = images::of_executable(&name, &executable, &[]);
                    images.push(image.map_err(|error| Error::Start(error.to_string()))?);
                }
            }
        }
        Ok(Self { manifests, images })
    }

    /// Reads this workspace's `deploy/` and the tests' provider.
    ///
    /// # Errors
    /// As of [`Installation::read`].
    pub fn standard(images: &Images, form: &Form) -> Result<Self> {
        let mut standard = Self::read(&workspace().join("deploy"), form)?;
        let of_tests = read_manifests(&workspace().join("e2e/manifests"))?;
        standard.manifests.extend(of_tests);
        standard.images.extend(images.archives.iter().cloned());
        Ok(standard)
    }

    /// Replaces the driver's image.
    ///
    /// # Errors
    /// When no manifest has the driver's container.
    pub fn with_driver(mut self, driver: Image) -> Result<Self> {
        change_container(&mut self.manifests, DRIVER_CONTAINER, |container| {
            container["image"] = driver.name.clone().into();
        })?;
        self.images.push(driver);
        Ok(self)
    }
}

/// Returns the interface to the SecretProviderClasses of a namespace.
pub fn classes(client: &kube::Client, namespace: &str) -> Api<DynamicObject> {
    custom(
        client,
        namespace,
        "SecretProviderClass",
        "secretproviderclasses",
    )
}

/// Returns the interface to the SecretProviderClassPodStatuses of a namespace.
pub fn pod_statuses(client: &kube::Client, namespace: &str) -> Api<DynamicObject> {
    let plural = "secretproviderclasspodstatuses";
    custom(client, namespace, "SecretProviderClassPodStatus", plural)
}

fn custom(client: &kube::Client, namespace: &str, kind: &str, plural: &str) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("secrets-store.csi.x-k8s.io", "v1", kind);
    let resource = ApiResource::from_gvk_with_plural(&kind, plural);
    Api::namespaced_with(client.clone(), namespace, &resource)
}

/// Reads the `*.yaml` files of a directory, by name; those that define kinds come first.
pub(crate) fn read_manifests(dir: &Path) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| unreadable(dir, error))? {
        let path = entry.map_err(|error| unreadable(dir, error))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            paths.push(path);
        }
    }
    paths.sort();
    let mut manifests = Vec::new();
    for path in paths {
        manifests.push(read_manifest(&path)?);
    }
    manifests.sort_by_key(|manifest| !manifest.contains("kind: CustomResourceDefinition"));
    Ok(manifests)
}

fn read_manifest(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| unreadable(path, error))
}

fn unreadable(path: &Path, error: io::Error) -> Error {
    Error::Start(format!("{}: {error}", path.display()))
}

/// Applies manifests; returns when all of it runs and the driver is registered.
///
/// # Errors
/// When the API server refuses an object, or something is missing after `limit`.
pub(crate) async fn install(
    client: &kube::Client,
    manifests: &[String],
    limit: Duration,
) -> Result<()> {
    let namespace = Namespace::of(client.clone(), NAMESPACE);
    for manifest in manifests {
        namespace.apply(manifest).await?;
        wait_established(client, limit).await?;
    }
    wait_rolled_out(client, limit).await
}

/// Waits until the API server serves all custom kinds.
async fn wait_established(client: &kube::Client, limit: Duration) -> Result<()> {
    let definitions = Api::<CustomResourceDefinition>::all(client.clone());
    let is_established = |definition: &CustomResourceDefinition| {
        let status = definition.status.iter();
        let conditions = status.flat_map(|status| status.conditions.iter().flatten());
        let mut conditions = conditions.into_iter();
        conditions.any(|c| c.type_ == "Established" && c.status == "True")
    };
    poll("custom kinds to be served", limit, async || {
        let list = definitions
            .list(&ListParams::default())
            .await
            .map_err(api("list CustomResourceDefinitions".to_owned()))?;
        let missing = list.iter().find(|definition| !is_established(definition));
        Ok(match missing {
            Some(missing) => ControlFlow::Continue(format!("{} is not", missing.name_any())),
            None => ControlFlow::Break(()),
        })
    })
    .await
}

/// Returns the lean form of a manifest: for the driver's, the file in `lean/`, with which the driver
/// registers itself and answers kubelet's probe; any other as it is.
///
/// # Errors
/// [`Error::Manifest`] when it is no YAML, or there is no lean form.
fn lean(manifest: &str, deploy: &Path) -> Result<String> {
    let documents = parse(manifest)?;
    let mut kinds = documents
        .iter()
        .map(|document| (&document["kind"], &document["metadata"]["name"]));
    if !kinds.any(|(kind, name)| kind == "DaemonSet" && name == DRIVER) {
        return Ok(manifest.to_owned());
    }
    let path = deploy.join("lean/secrets-store-csi-driver.yaml");
    fs::read_to_string(&path)
        .map_err(|error| Error::Manifest(format!("{}: {error}", path.display())))
}

/// Returns the image that a manifest names for a program, the last part of the image's path.
///
/// # Errors
/// [`Error::Manifest`] when it is no YAML.
fn image_of(manifest: &str, program: &str) -> Result<Option<String>> {
    let mut documents = parse(manifest)?;
    let containers = documents.iter_mut().flat_map(containers_mut);
    let mut images = containers.filter_map(|container| container["image"].as_str());
    let image = images.find(|image| {
        let last = image.rsplit('/').next().unwrap_or_default();
        last.split(':').next() == Some(program)
    });
    Ok(image.map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = include_str!("../../deploy/secrets-store-csi-driver.yaml");

    #[test]
    fn the_lean_form_has_one_container_that_does_the_sidecars_work() {
        let deploy = workspace().join("deploy");
        let documents = parse(&lean(MANIFEST, &deploy).unwrap()).unwrap();
        let set = documents.iter().find(|d| d["kind"] == "DaemonSet").unwrap();
        let containers = set["spec"]["template"]["spec"]["containers"]
            .as_array()
            .unwrap();
        let [driver] = containers.as_slice() else {
            panic!("{containers:?}")
        };
        assert_eq!(lean("kind: Other", &deploy).unwrap(), "kind: Other");
        let args = driver["args"].to_string();
        assert!(
            args.contains("--registration-dir=/registration") && args.contains("--healthz-addr")
        );
        let mounts = driver["volumeMounts"].to_string();
        assert!(mounts.contains("registration-dir"));
    }

    #[test]
    fn images_are_found_by_the_program_in_them() {
        let image = image_of(MANIFEST, "livenessprobe").unwrap().unwrap();
        assert!(image.contains("/livenessprobe:v"), "{image}");
        assert_eq!(image_of(MANIFEST, "nobody").unwrap(), None);
    }
}
