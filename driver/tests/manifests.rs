//! Checks that the manifests have the names, fields and rights of the existing driver's manifests
//! (`manifest_staging/deploy` of kubernetes-sigs/secrets-store-csi-driver, v1.6.0), except for the
//! differences in docs/migration.md, and that the generated manifests are up to date. `just manifests`
//! writes those.

// A test crate outside of its #[test] functions.
#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "manifests/crds.rs"]
mod crds;
#[path = "manifests/lean.rs"]
mod lean;
#[path = "manifests/objects.rs"]
mod objects;

use std::collections::BTreeMap;
use std::fs;

use driver::cluster::resources::GROUP;
use driver::config::Endpoint;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{PodSpec, ServiceAccount, Toleration};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::storage::v1::{CSIDriver, CSIDriverSpec};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::Resource;
use objects::{config, deploy, keep, objects};
use rstest::rstest;
use serde::Serialize;
use serde::de::DeserializeOwned;

#[rstest]
#[case(
    "secrets-store.csi.x-k8s.io_secretproviderclasses.yaml",
    crds::secret_provider_class()
)]
#[case(
    "secrets-store.csi.x-k8s.io_secretproviderclasspodstatuses.yaml",
    crds::secret_provider_class_pod_status()
)]
fn crds_are_rendered_from_the_rust_types(
    #[case] file: &str,
    #[case] definition: CustomResourceDefinition,
) {
    let yaml = serde_saphyr::to_string(&definition).unwrap();
    let rendered = format!(
        "# Rendered from driver/src/cluster/resources.rs by driver/tests/manifests.rs.\n{yaml}"
    );
    keep(file, &rendered);
    keep(&format!("chart/crds/{file}"), &rendered);
}

/// Adds the tree of fields as `path: type` lines, without the three fields that every object has.
fn fields(path: &str, schema: &JSONSchemaProps, lines: &mut Vec<String>) {
    let kind = schema.type_.as_deref().unwrap_or("?");
    match (&schema.items, &schema.additional_properties) {
        (Some(JSONSchemaPropsOrArray::Schema(items)), _) => {
            fields(&format!("{path}[]"), items, lines)
        }
        (_, Some(JSONSchemaPropsOrBool::Schema(values))) => {
            fields(&format!("{path}{{}}"), values, lines)
        }
        _ if schema.properties.is_none() => lines.push(format!("{path}: {kind}")),
        _ => {}
    }
    for (name, property) in schema.properties.iter().flatten() {
        let common = path.is_empty() && ["apiVersion", "kind", "metadata"].contains(&name.as_str());
        if !common {
            fields(&format!("{path}.{name}"), property, lines);
        }
    }
    let bare = JSONSchemaProps {
        type_: schema.type_.clone(),
        description: schema.description.clone(),
        items: schema.items.clone(),
        properties: schema.properties.clone(),
        additional_properties: schema.additional_properties.clone(),
        ..Default::default()
    };
    assert_eq!(
        *schema, bare,
        "{path} says more than a type and a description"
    );
}

/// The fields of the existing driver's CRD, and two that only this driver has: `encoding` and
/// `jsonKey`.
const CLASS_SPEC: [&str; 10] = [
    ".spec.parameters{}: string",
    ".spec.provider: string",
    ".spec.secretObjects[].annotations{}: string",
    ".spec.secretObjects[].data[].encoding: string",
    ".spec.secretObjects[].data[].jsonKey: string",
    ".spec.secretObjects[].data[].key: string",
    ".spec.secretObjects[].data[].objectName: string",
    ".spec.secretObjects[].labels{}: string",
    ".spec.secretObjects[].secretName: string",
    ".spec.secretObjects[].type: string",
];
const POD_STATUS: [&str; 6] = [
    ".status.mounted: boolean",
    ".status.objects[].id: string",
    ".status.objects[].version: string",
    ".status.podName: string",
    ".status.secretProviderClassName: string",
    ".status.targetPath: string",
];

#[rstest]
#[case(crds::secret_provider_class(), "v1", &CLASS_SPEC, &[".status: object"])]
#[case(crds::secret_provider_class(), "v1alpha1", &CLASS_SPEC, &[".status.byPod[].id: string", ".status.byPod[].namespace: string"])]
#[case(crds::secret_provider_class_pod_status(), "v1", &POD_STATUS, &[])]
#[case(crds::secret_provider_class_pod_status(), "v1alpha1", &POD_STATUS, &[])]
fn crds_have_the_fields_of_the_contract(
    #[case] definition: CustomResourceDefinition,
    #[case] version: &str,
    #[case] expected: &[&str],
    #[case] status: &[&str],
) {
    let mut versions = definition.spec.versions.into_iter();
    let version = versions.find(|v| v.name == version).unwrap();
    let schema = version.schema.unwrap().open_api_v3_schema.unwrap();
    let mut lines = Vec::new();
    fields("", &schema, &mut lines);
    assert_eq!(lines, [expected, status].concat());
}

fn object<K: Resource<DynamicType = ()> + DeserializeOwned + Serialize>(file: &str) -> K {
    let mut found = objects(&fs::read_to_string(deploy(file)).unwrap());
    assert_eq!(found.len(), 1, "{file}");
    found.remove(0)
}

#[rstest]
#[case(crds::secret_provider_class(), &["Provider .spec.provider"])]
#[case(crds::secret_provider_class_pod_status(), &[
    "Pod .status.podName",
    "Class .status.secretProviderClassName",
    "Mounted .status.mounted",
])]
fn crds_show_their_gist_and_nothing_that_scripts_would_trip_over(
    #[case] definition: CustomResourceDefinition,
    #[case] columns: &[&str],
) {
    // This is a line of `kubectl api-resources --no-headers`. Scripts read the version from column
    // 2, which would hold the short names if there were any.
    let names = &definition.spec.names;
    let line = format!(
        "{} {} {GROUP}/{} true {}",
        names.plural,
        names.short_names.clone().unwrap_or_default().join(","),
        definition.spec.versions[0].name,
        names.kind
    );
    let column_2 = line.split_whitespace().nth(1);
    assert_eq!(column_2, Some("secrets-store.csi.x-k8s.io/v1"));
    assert_eq!(names.categories, None);

    for version in definition.spec.versions {
        let shown: Vec<String> = version
            .additional_printer_columns
            .iter()
            .flatten()
            .map(|column| format!("{} {}", column.name, column.json_path))
            .collect();
        assert_eq!(
            shown,
            [columns, &["Age .metadata.creationTimestamp"]].concat()
        );
        assert_eq!(
            (version.subresources, version.selectable_fields),
            (None, None)
        );
    }
}

fn daemon_set() -> (DaemonSet, PodSpec) {
    let daemon_set: DaemonSet = object("secrets-store-csi-driver.yaml");
    let pod = daemon_set.spec.template.spec.clone().unwrap();
    (daemon_set, pod)
}

/// Returns the names of the YAML files of a folder of `deploy/`.
fn yaml_files(folder: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(deploy(folder))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".yaml"))
        .collect();
    names.sort();
    names
}

#[test]
fn the_files_are_those_that_operators_know() {
    assert_eq!(
        yaml_files(""),
        [
            "csidriver.yaml",
            "rbac-secretproviderclass.yaml",
            "role-secretproviderclasses-admin.yaml",
            "role-secretproviderclasses-viewer.yaml",
            "role-secretproviderclasspodstatuses-viewer.yaml",
            "secrets-store-csi-driver.yaml",
            "secrets-store.csi.x-k8s.io_secretproviderclasses.yaml",
            "secrets-store.csi.x-k8s.io_secretproviderclasspodstatuses.yaml",
        ]
    );
}

#[test]
fn the_csi_driver_object_asks_kubelet_for_what_the_driver_needs() {
    let csi_driver: CSIDriver = object("csidriver.yaml");
    assert_eq!(
        csi_driver.metadata.name.as_deref(),
        Some("secrets-store.csi.k8s.io")
    );
    assert_eq!(
        csi_driver.spec,
        CSIDriverSpec {
            attach_required: Some(false),
            pod_info_on_mount: Some(true),
            requires_republish: Some(true),
            volume_lifecycle_modes: Some(vec!["Ephemeral".into()]),
            ..Default::default()
        }
    );
}

#[test]
fn the_daemon_set_is_found_by_its_names_and_runs_everywhere() {
    let (daemon_set, pod) = daemon_set();
    assert_eq!(
        daemon_set.metadata.name.as_deref(),
        Some("csi-secrets-store")
    );
    assert_eq!(
        daemon_set.metadata.namespace.as_deref(),
        Some("kube-system")
    );
    let spec = daemon_set.spec;
    let label = BTreeMap::from([("app".to_owned(), "csi-secrets-store".to_owned())]);
    assert_eq!(spec.selector.match_labels, Some(label.clone()));
    let template = spec.template.metadata.unwrap();
    assert_eq!(template.labels, Some(label));
    assert_eq!(
        template.annotations.unwrap()["kubectl.kubernetes.io/default-container"],
        "secrets-store"
    );
    assert_eq!(
        pod.service_account_name.as_deref(),
        Some("secrets-store-csi-driver")
    );
    assert_eq!(pod.node_selector.unwrap()["kubernetes.io/os"], "linux");
    let [toleration] = pod.tolerations.as_deref().unwrap() else {
        panic!("one toleration")
    };
    assert_eq!(
        *toleration,
        Toleration {
            operator: Some("Exists".into()),
            ..Default::default()
        }
    );
}

#[rstest]
#[case(0, "node-driver-registrar", &[
    "--v=5",
    "--csi-address=/csi/csi.sock",
    "--kubelet-registration-path=/var/lib/kubelet/plugins/csi-secrets-store/csi.sock",
], &["plugin-dir /csi", "registration-dir /registration"])]
#[case(1, "secrets-store", &[
    "--endpoint=$(CSI_ENDPOINT)",
    "--nodeid=$(KUBE_NODE_NAME)",
    "--provider-volume=/var/run/secrets-store-csi-providers",
    "--additional-provider-volume-paths=/etc/kubernetes/secrets-store-csi-providers",
    "--metrics-addr=:8095",
    "--enable-secret-rotation=false",
    "--rotation-poll-interval=2m",
    "--provider-health-check=false",
    "--provider-health-check-interval=2m",
], &[
    "plugin-dir /csi",
    "mountpoint-dir /var/lib/kubelet/pods Bidirectional",
    "providers-dir /etc/kubernetes/secrets-store-csi-providers",
    "providers-dir-0 /var/run/secrets-store-csi-providers",
])]
#[case(2, "liveness-probe", &[
    "--csi-address=/csi/csi.sock",
    "--probe-timeout=3s",
    "--http-endpoint=0.0.0.0:9808",
    "-v=2",
], &["plugin-dir /csi"])]
fn containers_keep_their_place_name_arguments_and_mounts(
    #[case] position: usize,
    #[case] name: &str,
    #[case] args: &[&str],
    #[case] mounts: &[&str],
) {
    let (_, pod) = daemon_set();
    assert_eq!(pod.containers.len(), 3);
    let container = &pod.containers[position];
    assert_eq!(container.name, name);
    assert_eq!(container.args.as_deref().unwrap(), args);
    let found: Vec<String> = container
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| {
            let propagation = mount.mount_propagation.as_deref().unwrap_or_default();
            format!("{} {} {propagation}", mount.name, mount.mount_path)
                .trim()
                .to_owned()
        })
        .collect();
    assert_eq!(found, mounts);
}

#[test]
fn only_the_driver_is_privileged_and_no_container_writes_to_its_image() {
    let (_, pod) = daemon_set();
    for container in &pod.containers {
        let driver = container.name == "secrets-store";
        let context = container.security_context.as_ref().unwrap();
        assert_eq!(context.read_only_root_filesystem, Some(true));
        assert_eq!(context.privileged, driver.then_some(true));
        if !driver {
            let dropped = context.capabilities.as_ref().unwrap().drop.as_ref();
            assert_eq!(dropped.unwrap(), &["ALL"]);
            assert_eq!(context.allow_privilege_escalation, Some(false));
        }
    }
    let seccomp = pod.security_context.unwrap().seccomp_profile.unwrap();
    assert_eq!(seccomp.type_, "RuntimeDefault");
    assert_eq!((pod.host_network, pod.host_pid), (None, None));
}

#[test]
fn the_lean_daemon_set_is_rendered_from_the_full_one() {
    let (full, _) = daemon_set();
    let yaml = serde_saphyr::to_string(&lean::lean(full)).unwrap();
    let file = "lean/secrets-store-csi-driver.yaml";
    keep(
        file,
        &format!(
            "# The driver alone on every Linux node: one container instead of the three of\n\
             # ../secrets-store-csi-driver.yaml, which this replaces. Apply it after that directory.\n\
             # Rendered from that file by driver/tests/manifests.rs.\n{yaml}"
        ),
    );
}

#[test]
fn volumes_are_the_paths_of_the_node() {
    let (_, pod) = daemon_set();
    let found: Vec<String> = pod
        .volumes
        .unwrap()
        .into_iter()
        .map(|volume| {
            let host = volume.host_path.unwrap();
            format!("{} {} {}", volume.name, host.path, host.type_.unwrap())
        })
        .collect();
    assert_eq!(
        found,
        [
            "mountpoint-dir /var/lib/kubelet/pods DirectoryOrCreate",
            // It must exist: kubelet watches only a directory that it has created.
            "registration-dir /var/lib/kubelet/plugins_registry/ Directory",
            "plugin-dir /var/lib/kubelet/plugins/csi-secrets-store/ DirectoryOrCreate",
            "providers-dir /etc/kubernetes/secrets-store-csi-providers DirectoryOrCreate",
            "providers-dir-0 /var/run/secrets-store-csi-providers DirectoryOrCreate",
        ]
    );
}

#[test]
fn kubelet_probes_the_driver_through_the_sidecar() {
    let (_, pod) = daemon_set();
    let driver = &pod.containers[1];
    let ports: Vec<_> = driver
        .ports
        .iter()
        .flatten()
        .map(|port| (port.name.as_deref().unwrap(), port.container_port))
        .collect();
    assert_eq!(ports, [("healthz", 9808), ("metrics", 8095)]);
    let probe = driver.liveness_probe.as_ref().unwrap();
    let request = probe.http_get.as_ref().unwrap();
    assert_eq!(request.path.as_deref(), Some("/healthz"));
    assert_eq!(request.port, IntOrString::String("healthz".into()));
    let times = [
        probe.initial_delay_seconds,
        probe.timeout_seconds,
        probe.period_seconds,
        probe.failure_threshold,
    ];
    assert_eq!(times, [Some(30), Some(10), Some(15), Some(5)]);
}

#[rstest]
#[case("secrets-store-csi-driver.yaml", 1)]
#[case("lean/secrets-store-csi-driver.yaml", 0)]
fn the_driver_understands_its_own_manifest(#[case] file: &str, #[case] position: usize) {
    let daemon_set: DaemonSet = object(file);
    let pod = daemon_set.spec.template.spec.unwrap();
    let config = config(&pod.containers[position]);
    assert_eq!(config.endpoint, Endpoint::Unix("/csi/csi.sock".into()));
    assert_eq!(config.node_id, "node-1");
    assert_eq!(config.without_effect(), Vec::<&str>::new());
    let lean = pod.containers.len() == 1;
    assert_eq!(config.healthz_addr.is_some(), lean);
    assert_eq!(
        config.registration_dir,
        lean.then(|| "/registration".into())
    );
    if lean {
        assert_eq!(
            config.kubelet_registration_path.to_str(),
            Some("/var/lib/kubelet/plugins/csi-secrets-store/csi.sock")
        );
    }
}

#[rstest]
#[case("rbac-secretproviderclass.yaml", "secretproviderclasses-role", &[], &[
    "/events: create patch".to_owned(),
    "/pods: get".to_owned(),
    format!("{GROUP}/secretproviderclasses: get list"),
    format!("{GROUP}/secretproviderclasspodstatuses: create delete get update"),
    // What only the existing driver uses.
    "/pods: list watch".to_owned(),
    format!("{GROUP}/secretproviderclasses: watch"),
    format!("{GROUP}/secretproviderclasspodstatuses: list patch watch"),
    format!("{GROUP}/secretproviderclasspodstatuses/status: get patch update"),
    "storage.k8s.io/csidrivers secrets-store.csi.k8s.io: get list watch".to_owned(),
])]
#[case("optional/rbac-secretprovidersyncing.yaml", "secretprovidersyncing-role", &[], &[
    "/secrets: create delete get patch".to_owned(),
])]
#[case("role-secretproviderclasses-admin.yaml", "secretproviderclasses-admin-role", &["admin", "edit"], &[
    format!("{GROUP}/secretproviderclasses: get list watch create update patch delete"),
])]
#[case("role-secretproviderclasses-viewer.yaml", "secretproviderclasses-viewer-role", &["view"], &[
    format!("{GROUP}/secretproviderclasses: get list watch"),
])]
#[case("role-secretproviderclasspodstatuses-viewer.yaml", "secretproviderclasspodstatuses-viewer-role", &["view"], &[
    format!("{GROUP}/secretproviderclasspodstatuses: get list watch"),
])]
fn roles_grant_this_and_nothing_else(
    #[case] file: &str,
    #[case] name: &str,
    #[case] aggregated_to: &[&str],
    #[case] rules: &[String],
) {
    let role: ClusterRole = object(file);
    assert_eq!(role.metadata.name.as_deref(), Some(name));
    let labels = aggregated_to.iter().map(|to| {
        (
            format!("rbac.authorization.k8s.io/aggregate-to-{to}"),
            "true".to_owned(),
        )
    });
    assert_eq!(role.metadata.labels.unwrap_or_default(), labels.collect());
    let found: Vec<String> = role
        .rules
        .unwrap()
        .iter()
        .map(|rule| {
            let joined = |list: &Option<Vec<String>>| list.as_deref().unwrap_or_default().join(",");
            let names: String = rule
                .resource_names
                .iter()
                .flatten()
                .map(|name| format!(" {name}"))
                .collect();
            let (groups, resources) = (joined(&rule.api_groups), joined(&rule.resources));
            format!("{groups}/{resources}{names}: {}", rule.verbs.join(" "))
        })
        .collect();
    assert_eq!(found, rules);
}

/// `kubectl apply -f deploy/` applies the files of that folder, and none of the folders in it.
#[test]
fn what_everybody_applies_grants_no_right_on_secrets() {
    let mut rules = 0;
    for file in yaml_files("") {
        let manifest = fs::read_to_string(deploy(&file)).unwrap();
        let of_cluster = objects::<ClusterRole>(&manifest).into_iter();
        let of_namespaces = objects::<Role>(&manifest).into_iter();
        let granted = of_cluster
            .filter_map(|role| role.rules)
            .chain(of_namespaces.filter_map(|role| role.rules));
        for rule in granted.flatten() {
            let grants = |list: &Option<Vec<String>>, name: &str| {
                list.iter()
                    .flatten()
                    .any(|granted| granted == name || granted == "*")
            };
            let secrets = grants(&rule.api_groups, "") && grants(&rule.resources, "secrets");
            assert!(!secrets, "{file}: {rule:?}");
            rules += 1;
        }
        // A role of Kubernetes itself, such as cluster-admin, may grant anything.
        for binding in objects::<ClusterRoleBinding>(&manifest) {
            assert_eq!(
                binding.role_ref.name, "secretproviderclasses-role",
                "{file}"
            );
        }
        assert_eq!(objects::<RoleBinding>(&manifest), [], "{file}");
    }
    assert!(rules > 6, "{rules}");
}

#[rstest]
#[case("rbac-secretproviderclass.yaml", "secretproviderclasses-role")]
#[case(
    "optional/rbac-secretprovidersyncing.yaml",
    "secretprovidersyncing-role"
)]
fn the_drivers_account_has_its_role(#[case] file: &str, #[case] role: &str) {
    let binding: ClusterRoleBinding = object(file);
    assert_eq!(binding.metadata.name, Some(format!("{role}binding")));
    assert_eq!(
        (
            binding.role_ref.kind.as_str(),
            binding.role_ref.name.as_str()
        ),
        ("ClusterRole", role)
    );
    let subjects = binding.subjects.unwrap();
    let [subject] = subjects.as_slice() else {
        panic!("one subject")
    };
    let account: ServiceAccount = object("rbac-secretproviderclass.yaml");
    assert_eq!(subject.kind, "ServiceAccount");
    assert_eq!(subject.name, "secrets-store-csi-driver");
    assert_eq!(
        account.metadata.name.as_deref(),
        Some("secrets-store-csi-driver")
    );
    assert_eq!(subject.namespace.as_deref(), Some("kube-system"));
    assert_eq!(account.metadata.namespace.as_deref(), Some("kube-system"));
}
