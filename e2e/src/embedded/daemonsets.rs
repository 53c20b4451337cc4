//! DaemonSets out of the API as containers of this node.
//!
//! What a manifest says is taken as it stands: arguments, environment, hostPath volumes, the
//! service account. Only the images are not pulled: each stands for an executable of this
//! workspace, and the two sidecars of CSI, which have none here, for the flags of the driver
//! that do their work.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1 as core;

use super::namespaces::BINARIES;
use super::processes::{Container, Mount, Propagation};

/// Where a pod finds its service account, as every in-cluster client expects it.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The API server's address in every node.
pub(crate) const API_ADDRESS: (&str, u16) = ("127.0.0.1", 6443);

/// What an image stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Image {
    Driver,
    FakeProvider,
    Registrar,
    LivenessProbe,
}

/// The containers of a DaemonSet on this node; none if its node selector excludes the node.
///
/// `credentials` is the directory with the service account's token.
///
/// # Errors
/// What in the manifest has no equivalent here, by name.
pub(crate) fn containers(
    set: &DaemonSet,
    node: &str,
    labels: &BTreeMap<String, String>,
    credentials: &Path,
) -> Result<Vec<Container>, String> {
    let Some(pod) = &set.spec.template.spec else {
        return Err("it has no pod template".to_owned());
    };
    let selected = pod
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    if !selected {
        return Ok(Vec::new());
    }
    let facts = PodFacts { set, pod, node };
    let mut containers = Vec::new();
    let mut sidecars = Vec::new();
    for container in &pod.containers {
        let image = container.image.as_deref().unwrap_or_default();
        match image_of(image) {
            Some(Image::Driver) => containers.push((
                true,
                facts.container(container, "secrets-store-csi", credentials)?,
            )),
            Some(Image::FakeProvider) => {
                containers.push((
                    false,
                    facts.container(container, "fake-provider", credentials)?,
                ));
            }
            Some(sidecar) => sidecars.push((sidecar, container)),
            None => return Err(format!("there is no executable for image {image:?} here")),
        }
    }
    for (sidecar, container) in sidecars {
        let Some((_, driver)) = containers.iter_mut().find(|(is_driver, _)| *is_driver) else {
            return Err(format!("sidecar {} without a driver", container.name));
        };
        facts.merge(sidecar, container, driver)?;
    }
    Ok(containers
        .into_iter()
        .map(|(_, container)| container)
        .collect())
}

/// By the last component of the image's path, without tag and digest.
fn image_of(image: &str) -> Option<Image> {
    let path = image.split('@').next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    let name = last.split(':').next().unwrap_or_default();
    match name {
        "csi-node-driver-registrar" => Some(Image::Registrar),
        "livenessprobe" => Some(Image::LivenessProbe),
        "fake-provider" | "e2e-provider" => Some(Image::FakeProvider),
        _ if name.starts_with("driver") || name.starts_with("secrets-store-csi") => {
            Some(Image::Driver)
        }
        _ => None,
    }
}

struct PodFacts<'a> {
    set: &'a DaemonSet,
    pod: &'a core::PodSpec,
    node: &'a str,
}

impl PodFacts<'_> {
    fn container(
        &self,
        from: &core::Container,
        program: &str,
        credentials: &Path,
    ) -> Result<Container, String> {
        let env = self.env(from)?;
        let mut mounts = self.mounts(from)?;
        mounts.push(Mount {
            from: credentials.to_owned(),
            to: SERVICE_ACCOUNT.into(),
            propagation: Propagation::None,
        });
        // `command` replaces an image's entry point, which is the program in ours.
        let args = from
            .args
            .iter()
            .flatten()
            .map(|arg| expand(arg, &env))
            .collect();
        Ok(Container {
            name: from.name.clone(),
            program: Path::new(BINARIES).join(program),
            args,
            env,
            mounts,
        })
    }

    /// Gives the driver the flags that do a sidecar's work, and the sidecar's mounts.
    fn merge(
        &self,
        sidecar: Image,
        from: &core::Container,
        driver: &mut Container,
    ) -> Result<(), String> {
        let args = from.args.as_deref().unwrap_or_default();
        let flag = |name: &str| {
            args.iter().find_map(|arg| {
                arg.trim_start_matches('-')
                    .strip_prefix(name)?
                    .strip_prefix('=')
            })
        };
        if sidecar == Image::Registrar {
            let socket = flag("kubelet-registration-path")
                .ok_or_else(|| format!("{} has no --kubelet-registration-path", from.name))?;
            let dir = flag("plugin-registration-path").unwrap_or("/registration");
            driver.args.push(format!("--registration-dir={dir}"));
            driver
                .args
                .push(format!("--kubelet-registration-path={socket}"));
        } else {
            let address = flag("http-endpoint").unwrap_or("0.0.0.0:9808");
            driver.args.push(format!("--healthz-addr={address}"));
        }
        for mount in self.mounts(from)? {
            if driver.mounts.iter().all(|known| known.to != mount.to) {
                driver.mounts.push(mount);
            }
        }
        Ok(())
    }

    fn mounts(&self, from: &core::Container) -> Result<Vec<Mount>, String> {
        let mut mounts = Vec::new();
        for mount in from.volume_mounts.iter().flatten() {
            let volume = self
                .pod
                .volumes
                .iter()
                .flatten()
                .find(|volume| volume.name == mount.name);
            let host = volume
                .and_then(|volume| volume.host_path.as_ref())
                .ok_or_else(|| format!("volume {} is not a hostPath", mount.name))?;
            mounts.push(Mount {
                from: PathBuf::from(host.path.trim_end_matches('/')),
                to: PathBuf::from(mount.mount_path.trim_end_matches('/')),
                propagation: Propagation::named(mount.mount_propagation.as_deref()).ok_or_else(
                    || format!("volume {} has an unknown mountPropagation", mount.name),
                )?,
            });
        }
        Ok(mounts)
    }

    fn env(&self, from: &core::Container) -> Result<BTreeMap<String, String>, String> {
        let mut env = BTreeMap::from([
            (
                "KUBERNETES_SERVICE_HOST".to_owned(),
                API_ADDRESS.0.to_owned(),
            ),
            (
                "KUBERNETES_SERVICE_PORT".to_owned(),
                API_ADDRESS.1.to_string(),
            ),
            ("HOSTNAME".to_owned(), self.pod_name()),
        ]);
        for variable in from.env.iter().flatten() {
            let value = match (&variable.value, &variable.value_from) {
                (_, Some(source)) => {
                    let field = source
                        .field_ref
                        .as_ref()
                        .map(|field| field.field_path.as_str());
                    self.field(field).ok_or_else(|| {
                        format!(
                            "variable {} comes from {field:?}, which is not known here",
                            variable.name
                        )
                    })?
                }
                (value, None) => expand(value.as_deref().unwrap_or_default(), &env),
            };
            env.insert(variable.name.clone(), value);
        }
        Ok(env)
    }

    fn field(&self, path: Option<&str>) -> Option<String> {
        match path? {
            "spec.nodeName" => Some(self.node.to_owned()),
            "spec.serviceAccountName" => Some(service_account(self.pod).to_owned()),
            "metadata.name" => Some(self.pod_name()),
            "metadata.namespace" => self.set.metadata.namespace.clone(),
            "status.podIP" | "status.hostIP" => Some("127.0.0.1".to_owned()),
            _ => None,
        }
    }

    fn pod_name(&self) -> String {
        format!(
            "{}-{}",
            self.set.metadata.name.as_deref().unwrap_or_default(),
            self.node
        )
    }
}

/// The service account a pod runs as.
pub(crate) fn service_account(pod: &core::PodSpec) -> &str {
    match pod.service_account_name.as_deref() {
        None | Some("") => "default",
        Some(name) => name,
    }
}

/// Replaces `$(NAME)` by the variable's value, as kubelet does: an unknown one stays as it is,
/// and `$$` stands for `$`.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let variable = after
            .strip_prefix('(')
            .and_then(|name| name.split_once(')'));
        match variable {
            Some((name, behind)) => {
                match env.get(name) {
                    Some(value) => out.push_str(value),
                    None => out.push_str(&format!("$({name})")),
                }
                rest = behind;
            }
            None => {
                out.push('$');
                rest = after.strip_prefix('$').unwrap_or(after);
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const DRIVER: &str = r"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: csi-secrets-store, namespace: kube-system}
spec:
  selector: {matchLabels: {app: csi-secrets-store}}
  template:
    metadata: {labels: {app: csi-secrets-store}}
    spec:
      serviceAccountName: secrets-store-csi-driver
      nodeSelector: {kubernetes.io/os: linux}
      containers:
      - name: node-driver-registrar
        image: registry.k8s.io/sig-storage/csi-node-driver-registrar:v2.16.0
        args: [--v=5, --csi-address=/csi/csi.sock, --kubelet-registration-path=/var/lib/kubelet/plugins/csi-secrets-store/csi.sock]
        volumeMounts:
        - {name: plugin-dir, mountPath: /csi}
        - {name: registration-dir, mountPath: /registration}
      - name: secrets-store
        image: registry.k8s.io/csi-secrets-store/driver:v1.6.0
        args: ['--endpoint=$(CSI_ENDPOINT)', '--nodeid=$(KUBE_NODE_NAME)']
        env:
        - {name: CSI_ENDPOINT, value: 'unix:///csi/csi.sock'}
        - name: KUBE_NODE_NAME
          valueFrom: {fieldRef: {apiVersion: v1, fieldPath: spec.nodeName}}
        volumeMounts:
        - {name: plugin-dir, mountPath: /csi}
        - {name: mountpoint-dir, mountPath: /var/lib/kubelet/pods, mountPropagation: Bidirectional}
      - name: liveness-probe
        image: registry.k8s.io/sig-storage/livenessprobe:v2.18.0
        args: [--csi-address=/csi/csi.sock, --probe-timeout=3s, '--http-endpoint=0.0.0.0:9808', -v=2]
        volumeMounts: [{name: plugin-dir, mountPath: /csi}]
      volumes:
      - {name: mountpoint-dir, hostPath: {path: /var/lib/kubelet/pods}}
      - {name: registration-dir, hostPath: {path: /var/lib/kubelet/plugins_registry/}}
      - {name: plugin-dir, hostPath: {path: /var/lib/kubelet/plugins/csi-secrets-store/}}
";

    fn linux() -> BTreeMap<String, String> {
        BTreeMap::from([("kubernetes.io/os".to_owned(), "linux".to_owned())])
    }

    fn set(yaml: &str) -> DaemonSet {
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn the_drivers_manifest_becomes_one_process_that_does_the_sidecars_work() {
        let containers =
            containers(&set(DRIVER), "node-1", &linux(), Path::new("/run/sa")).unwrap();
        let [driver] = &containers[..] else {
            panic!("{containers:?}")
        };
        assert_eq!(driver.name, "secrets-store");
        assert_eq!(driver.program, Path::new("/opt/e2e/bin/secrets-store-csi"));
        assert_eq!(
            driver.args,
            [
                "--endpoint=unix:///csi/csi.sock",
                "--nodeid=node-1",
                "--registration-dir=/registration",
                "--kubelet-registration-path=/var/lib/kubelet/plugins/csi-secrets-store/csi.sock",
                "--healthz-addr=0.0.0.0:9808",
            ]
        );
        let mounts: Vec<_> = driver
            .mounts
            .iter()
            .map(|m| {
                (
                    m.from.to_str().unwrap(),
                    m.to.to_str().unwrap(),
                    m.propagation,
                )
            })
            .collect();
        assert_eq!(
            mounts,
            [
                (
                    "/var/lib/kubelet/plugins/csi-secrets-store",
                    "/csi",
                    Propagation::None
                ),
                (
                    "/var/lib/kubelet/pods",
                    "/var/lib/kubelet/pods",
                    Propagation::Bidirectional
                ),
                ("/run/sa", SERVICE_ACCOUNT, Propagation::None),
                (
                    "/var/lib/kubelet/plugins_registry",
                    "/registration",
                    Propagation::None
                ),
            ]
        );
        assert_eq!(driver.env["KUBERNETES_SERVICE_PORT"], "6443");
    }

    #[test]
    fn a_set_for_other_nodes_is_none_of_ours() {
        let windows = set(&DRIVER.replace("os: linux", "os: windows"));
        assert_eq!(
            containers(&windows, "node-1", &linux(), Path::new("/x")).unwrap(),
            []
        );
    }

    #[test]
    fn an_image_without_an_executable_is_refused_by_name() {
        let other = set(&DRIVER.replace("csi-secrets-store/driver:v1.6.0", "nginx:1"));
        let error = containers(&other, "node-1", &linux(), Path::new("/x")).unwrap_err();
        assert!(error.contains("nginx:1"), "{error}");
    }

    #[rstest]
    #[case("--a=$(A)", "--a=1")]
    #[case("$(A)$(A)-$(B)", "11-$(B)")]
    #[case("$$(A) costs $5", "$(A) costs $5")]
    #[case("$(A", "$(A")]
    fn variables_are_expanded_as_kubelet_does(#[case] text: &str, #[case] expected: &str) {
        let env = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        assert_eq!(expand(text, &env), expected);
    }
}
