//! The containers that a DaemonSet has on a node.
//!
//! Arguments, environment, hostPath volumes and the service account are those of the manifest. Images
//! are not pulled: each stands for the executable of its name in
//! [`Options::programs`](crate::Options::programs).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1 as core;
use kube::Resource as _;

use crate::kubelet::node_labels;
use crate::kubelet::tokens::service_account;
use crate::processes::{Container, Mount, Propagation};

/// The directory in which in-cluster clients find their service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The label with the revision of the template of which a pod is made.
pub(crate) const REVISION: &str = "controller-revision-hash";
/// The API server's address in every node.
pub(crate) const API_ADDRESS: (&str, u16) = ("127.0.0.1", 6443);

/// Returns the containers of a DaemonSet on a node; none if its node selector excludes the node.
///
/// `credentials` is the directory with the service account's token, `kubelet_root` kubelet's.
///
/// # Errors
/// Returns a sentence that names the part of the manifest that is not supported.
pub(crate) fn containers(
    set: &DaemonSet,
    node: &str,
    programs: &BTreeMap<String, PathBuf>,
    credentials: &Path,
    kubelet_root: &Path,
) -> Result<Vec<Container>, String> {
    let Some(pod) = &set.spec.template.spec else {
        return Err("it has no pod template".to_owned());
    };
    let labels = node_labels(node);
    let mut selector = pod.node_selector.iter().flatten();
    if !selector.all(|(key, value)| labels.get(key) == Some(value)) {
        return Ok(Vec::new());
    }
    let facts = PodFacts {
        set,
        pod,
        node,
        kubelet_root,
    };
    let container = |container: &core::Container| {
        let image = container.image.as_deref().unwrap_or_default();
        if !programs.contains_key(program_of(image)) {
            return Err(format!("there is no executable for image {image:?} here"));
        }
        facts.container(container, program_of(image), credentials)
    };
    pod.containers.iter().map(container).collect()
}

/// Returns the object of the pod that a DaemonSet has on a node.
pub(crate) fn pod(set: &DaemonSet, node: &str, revision: &str) -> core::Pod {
    let template = set.spec.template.clone();
    let mut metadata = template.metadata.unwrap_or_default();
    metadata.name = Some(pod_name(set, node));
    metadata.namespace.clone_from(&set.metadata.namespace);
    metadata.owner_references = set.controller_owner_ref(&()).map(|owner| vec![owner]);
    let labels = metadata.labels.get_or_insert_default();
    labels.insert(REVISION.to_owned(), revision.to_owned());
    let spec = template.spec.map(|spec| core::PodSpec {
        node_name: Some(node.to_owned()),
        ..spec
    });
    core::Pod {
        metadata,
        spec,
        ..core::Pod::default()
    }
}

fn pod_name(set: &DaemonSet, node: &str) -> String {
    format!(
        "{}-{node}",
        set.metadata.name.as_deref().unwrap_or_default()
    )
}

/// Returns the last component of an image's path, without tag and digest.
fn program_of(image: &str) -> &str {
    let path = image.split('@').next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    last.split(':').next().unwrap_or_default()
}

struct PodFacts<'a> {
    set: &'a DaemonSet,
    pod: &'a core::PodSpec,
    node: &'a str,
    kubelet_root: &'a Path,
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
        // The executable is the image's entry point; `command`, which would replace it, is not read.
        let args = from
            .args
            .iter()
            .flatten()
            .map(|arg| expand(arg, &env))
            .collect();
        Ok(Container {
            name: from.name.clone(),
            program: program.to_owned(),
            args,
            env,
            mounts,
            kubelet_root: self.kubelet_root.to_owned(),
        })
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
        pod_name(self.set, self.node)
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
metadata: {name: csi-driver, namespace: kube-system}
spec:
  selector: {matchLabels: {app: csi-driver}}
  template:
    metadata: {labels: {app: csi-driver}}
    spec:
      serviceAccountName: csi-driver
      nodeSelector: {kubernetes.io/os: linux}
      containers:
      - name: driver
        image: registry.k8s.io/csi/driver:v1.6.0
        args: ['--endpoint=$(CSI_ENDPOINT)', '--nodeid=$(KUBE_NODE_NAME)']
        env:
        - {name: CSI_ENDPOINT, value: 'unix:///csi/csi.sock'}
        - name: KUBE_NODE_NAME
          valueFrom: {fieldRef: {apiVersion: v1, fieldPath: spec.nodeName}}
        volumeMounts:
        - {name: plugin-dir, mountPath: /csi}
        - {name: mountpoint-dir, mountPath: /var/lib/kubelet/pods, mountPropagation: Bidirectional}
        - {name: registration-dir, mountPath: /registration}
      volumes:
      - {name: mountpoint-dir, hostPath: {path: /var/lib/kubelet/pods}}
      - {name: registration-dir, hostPath: {path: /var/lib/kubelet/plugins_registry/}}
      - {name: plugin-dir, hostPath: {path: /var/lib/kubelet/plugins/driver/}}
";

    /// The containers of a manifest on `node-1`.
    fn run(yaml: &str) -> Result<Vec<Container>, String> {
        let set = serde_saphyr::from_str(yaml).unwrap();
        let programs = BTreeMap::from([("driver".to_owned(), "/built/driver".into())]);
        let (credentials, root) = (Path::new("/run/sa"), Path::new("/var/lib/kubelet"));
        containers(&set, "node-1", &programs, credentials, root)
    }

    #[test]
    fn a_manifest_becomes_a_process() {
        let containers = run(DRIVER).unwrap();
        let [driver] = &containers[..] else {
            panic!("{containers:?}")
        };
        assert_eq!(driver.name, "driver");
        assert_eq!(driver.program(), Path::new("/opt/embedded/bin/driver"));
        assert_eq!(
            driver.args,
            ["--endpoint=unix:///csi/csi.sock", "--nodeid=node-1"]
        );
        let plugin = "/var/lib/kubelet/plugins/driver";
        let socket = Path::new(plugin).join("csi.sock");
        assert_eq!(driver.endpoint(), Some(socket));
        let pods = "/var/lib/kubelet/pods";
        let registry = "/var/lib/kubelet/plugins_registry";
        assert!(driver.has(Path::new(registry)));
        let expected = [
            (plugin, "/csi", Propagation::None),
            (pods, pods, Propagation::Bidirectional),
            (registry, "/registration", Propagation::None),
            ("/run/sa", SERVICE_ACCOUNT, Propagation::None),
        ]
        .map(|(from, to, propagation)| Mount {
            from: from.into(),
            to: to.into(),
            propagation,
        });
        assert_eq!(driver.mounts, expected);
        assert_eq!(driver.env["KUBERNETES_SERVICE_PORT"], "6443");
    }

    #[test]
    fn a_set_for_other_nodes_is_none_of_ours() {
        let windows = DRIVER.replace("os: linux", "os: windows");
        assert_eq!(run(&windows).unwrap(), []);
    }

    #[test]
    fn an_image_without_an_executable_is_refused_by_name() {
        let error = run(&DRIVER.replace("csi/driver:v1.6.0", "nginx:1")).unwrap_err();
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
