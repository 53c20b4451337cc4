//! The table of kinds: what is built in, and what a CustomResourceDefinition adds to it.
//!
//! Built-in kinds have one version and are checked by decoding them as the types of `k8s-openapi`,
//! which also prunes unknown fields. Custom kinds are checked by their schema.

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet},
    batch::v1::Job,
    coordination::v1::Lease,
    core::v1::{ConfigMap, Event, Namespace, Node, Pod, Secret, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    storage::v1::{CSIDriver, CSINode},
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    schema::Schema,
    status::{FieldError, Status},
};

/// A kind of object the server stores, with all versions it is served at.
#[derive(Debug)]
pub(super) struct Resource {
    /// Empty for the core group.
    pub(super) group: String,
    pub(super) plural: String,
    pub(super) singular: String,
    pub(super) kind: String,
    pub(super) list_kind: String,
    pub(super) short_names: Vec<String>,
    /// `pods`, `secretproviderclasses.secrets-store.csi.x-k8s.io`: unique, and the name in messages.
    pub(super) qualified: String,
    pub(super) namespaced: bool,
    /// Served versions, preferred first.
    pub(super) versions: Vec<Version>,
    /// The version objects are stored at, as `apiVersion`.
    pub(super) storage: String,
    pub(super) storage_schema: Option<Schema>,
    pub(super) source: Source,
}

/// Where a kind comes from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    BuiltIn(&'static BuiltIn),
    Custom,
}

/// One served version of a kind.
#[derive(Debug)]
pub(super) struct Version {
    pub(super) name: String,
    /// The text of the `Warning` header for a deprecated version.
    pub(super) warning: Option<String>,
    /// Present for custom kinds.
    pub(super) schema: Option<Schema>,
    /// Whether `/status` is served, and the main endpoint therefore ignores `status`.
    pub(super) status: bool,
}

/// A row of the table of built-in kinds.
#[derive(Debug)]
pub(super) struct BuiltIn {
    group: &'static str,
    version: &'static str,
    plural: &'static str,
    kind: &'static str,
    short_names: &'static [&'static str],
    namespaced: bool,
    status: bool,
    /// Whether `metadata.generation` counts changes of the desired state.
    pub(super) generation: bool,
    /// Reads the object as its type and writes it again: refuses wrong types, drops unknown fields.
    pub(super) decode: fn(&Value) -> Result<Value, serde_json::Error>,
}

fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, serde_json::Error> {
    serde_json::to_value(T::deserialize(object)?)
}

macro_rules! row {
    ($type:ty, $group:literal / $version:literal, $plural:literal, $short:expr, $namespaced:literal, $status:literal, $generation:literal) => {
        BuiltIn {
            group: $group,
            version: $version,
            plural: $plural,
            kind: <$type as k8s_openapi::Resource>::KIND,
            short_names: &$short,
            namespaced: $namespaced,
            status: $status,
            generation: $generation,
            decode: typed::<$type>,
        }
    };
}

/// Columns: type, group/version, plural, short names, namespaced, `/status`, generation.
static BUILT_IN: &[BuiltIn] = &[
    row!(
        Namespace,
        "" / "v1",
        "namespaces",
        ["ns"],
        false,
        true,
        false
    ),
    row!(Pod, "" / "v1", "pods", ["po"], true, true, true),
    row!(Event, "" / "v1", "events", ["ev"], true, false, false),
    row!(Secret, "" / "v1", "secrets", [], true, false, false),
    row!(
        ConfigMap,
        "" / "v1",
        "configmaps",
        ["cm"],
        true,
        false,
        false
    ),
    row!(
        ServiceAccount,
        "" / "v1",
        "serviceaccounts",
        ["sa"],
        true,
        false,
        false
    ),
    row!(Node, "" / "v1", "nodes", ["no"], false, true, false),
    row!(
        CSIDriver,
        "storage.k8s.io" / "v1",
        "csidrivers",
        [],
        false,
        false,
        false
    ),
    row!(
        CSINode,
        "storage.k8s.io" / "v1",
        "csinodes",
        [],
        false,
        false,
        false
    ),
    row!(
        DaemonSet,
        "apps" / "v1",
        "daemonsets",
        ["ds"],
        true,
        true,
        true
    ),
    row!(
        Deployment,
        "apps" / "v1",
        "deployments",
        ["deploy"],
        true,
        true,
        true
    ),
    row!(
        ReplicaSet,
        "apps" / "v1",
        "replicasets",
        ["rs"],
        true,
        true,
        true
    ),
    row!(
        StatefulSet,
        "apps" / "v1",
        "statefulsets",
        ["sts"],
        true,
        true,
        true
    ),
    row!(Job, "batch" / "v1", "jobs", [], true, true, true),
    row!(
        Lease,
        "coordination.k8s.io" / "v1",
        "leases",
        [],
        true,
        false,
        false
    ),
    row!(
        ClusterRole,
        "rbac.authorization.k8s.io" / "v1",
        "clusterroles",
        [],
        false,
        false,
        false
    ),
    row!(
        ClusterRoleBinding,
        "rbac.authorization.k8s.io" / "v1",
        "clusterrolebindings",
        [],
        false,
        false,
        false
    ),
    row!(
        Role,
        "rbac.authorization.k8s.io" / "v1",
        "roles",
        [],
        true,
        false,
        false
    ),
    row!(
        RoleBinding,
        "rbac.authorization.k8s.io" / "v1",
        "rolebindings",
        [],
        true,
        false,
        false
    ),
    row!(
        CustomResourceDefinition,
        "apiextensions.k8s.io" / "v1",
        "customresourcedefinitions",
        ["crd", "crds"],
        false,
        true,
        true
    ),
];

impl Resource {
    /// Every built-in kind.
    pub(super) fn built_in() -> impl Iterator<Item = Resource> {
        BUILT_IN.iter().map(|row| Resource {
            group: row.group.to_owned(),
            plural: row.plural.to_owned(),
            singular: row.kind.to_lowercase(),
            kind: row.kind.to_owned(),
            list_kind: format!("{}List", row.kind),
            short_names: row
                .short_names
                .iter()
                .map(|&name| name.to_owned())
                .collect(),
            qualified: qualified(row.plural, row.group),
            namespaced: row.namespaced,
            versions: vec![Version {
                name: row.version.to_owned(),
                warning: None,
                schema: None,
                status: row.status,
            }],
            storage: api_version(row.group, row.version),
            storage_schema: None,
            source: Source::BuiltIn(row),
        })
    }

    /// The kind a CustomResourceDefinition describes.
    ///
    /// # Errors
    /// Names the field for which a real server would refuse the definition, and what this server
    /// cannot check and therefore does not accept (`pattern`).
    pub(super) fn from_definition(definition: &Value) -> Result<Resource, FieldError> {
        let spec = &definition["spec"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (group, plural, kind) = (
            text(&spec["group"]),
            text(&spec["names"]["plural"]),
            text(&spec["names"]["kind"]),
        );
        for (field, value) in [
            ("spec.group", &group),
            ("spec.names.plural", &plural),
            ("spec.names.kind", &kind),
        ] {
            if value.is_empty() {
                return Err(FieldError::required(field, ""));
            }
        }
        let name = &definition["metadata"]["name"];
        if name.as_str() != Some(&format!("{plural}.{group}")) {
            let why = "must be spec.names.plural+\".\"+spec.group";
            return Err(FieldError::invalid("metadata.name", name, why));
        }

        let mut storage = None;
        let mut versions = Vec::new();
        for (index, version) in spec["versions"]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            let field = format!("spec.versions[{index}].schema.openAPIV3Schema");
            let schema = &version["schema"]["openAPIV3Schema"];
            if schema.is_null() {
                return Err(FieldError::required(field, "schemas are required"));
            }
            let api_version = api_version(&group, &text(&version["name"]));
            if version["storage"] == true
                && storage
                    .replace((api_version.clone(), Schema::parse(schema, &field)?))
                    .is_some()
            {
                let why = "must have exactly one version marked as storage version";
                return Err(FieldError::invalid("spec.versions", &spec["versions"], why));
            }
            if version["served"] != true {
                continue;
            }
            let warning = (version["deprecated"] == true).then(|| {
                version["deprecationWarning"].as_str().map_or_else(
                    || format!("{api_version} {kind} is deprecated"),
                    str::to_owned,
                )
            });
            versions.push(Version {
                name: text(&version["name"]),
                warning,
                schema: Some(Schema::parse(schema, &field)?),
                status: version["subresources"]["status"].is_object(),
            });
        }
        let Some((storage, storage_schema)) = storage else {
            let why = "must have exactly one version marked as storage version";
            return Err(FieldError::invalid("spec.versions", &spec["versions"], why));
        };
        versions.sort_by_key(|version| std::cmp::Reverse(priority(&version.name)));

        let named = |field: &str, default: String| {
            spec["names"][field].as_str().map_or(default, str::to_owned)
        };
        Ok(Resource {
            qualified: qualified(&plural, &group),
            singular: named("singular", kind.to_lowercase()),
            list_kind: named("listKind", format!("{kind}List")),
            short_names: spec["names"]["shortNames"]
                .as_array()
                .into_iter()
                .flatten()
                .map(text)
                .collect(),
            namespaced: spec["scope"] == "Namespaced",
            group,
            plural,
            kind,
            versions,
            storage,
            storage_schema: Some(storage_schema),
            source: Source::Custom,
        })
    }

    pub(super) fn version(&self, name: &str) -> Option<&Version> {
        self.versions.iter().find(|version| version.name == name)
    }

    /// `apiVersion` of an object of this kind at that version.
    pub(super) fn api_version(&self, version: &str) -> String {
        api_version(&self.group, version)
    }

    /// `Pod`, `SecretProviderClass.secrets-store.csi.x-k8s.io`: the name in messages about validity.
    pub(super) fn qualified_kind(&self) -> String {
        qualified(&self.kind, &self.group)
    }

    pub(super) fn is(&self, group: &str, plural: &str) -> bool {
        self.group == group && self.plural == plural
    }

    pub(super) fn built_in_row(&self) -> Option<&'static BuiltIn> {
        match self.source {
            Source::BuiltIn(row) => Some(row),
            Source::Custom => None,
        }
    }

    /// The refusal for a body that is not of this kind.
    pub(super) fn undecodable(&self, version: &str, why: &str) -> Status {
        Status::bad_request(format!(
            "{} in version \"{version}\" cannot be handled as a {}: {why}",
            self.kind, self.kind
        ))
    }
}

/// `plural.group`, or `plural` in the core group.
pub(super) fn qualified(name: &str, group: &str) -> String {
    match group {
        "" => name.to_owned(),
        group => format!("{name}.{group}"),
    }
}

/// `group/version`, or `version` in the core group.
pub(super) fn api_version(group: &str, version: &str) -> String {
    match group {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
    }
}

/// Orders versions as Kubernetes does: stable before beta before alpha, then by number.
/// Names of another form come last.
pub(super) fn priority(version: &str) -> (u8, u32, u32) {
    let Some(rest) = version.strip_prefix('v') else {
        return (0, 0, 0);
    };
    let digits = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    let (major, rest) = rest.split_at(digits);
    let Ok(major) = major.parse() else {
        return (0, 0, 0);
    };
    let stage = |rank: u8, number: &str| match number.parse() {
        Ok(minor) => (rank, major, minor),
        Err(_) => (0, 0, 0),
    };
    if rest.is_empty() {
        (3, major, 0)
    } else if let Some(number) = rest.strip_prefix("beta") {
        stage(2, number)
    } else if let Some(number) = rest.strip_prefix("alpha") {
        stage(1, number)
    } else {
        (0, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_preferred_by_maturity() {
        let mut versions = ["v1alpha1", "v2beta1", "foo", "v1", "v2", "v1beta2"];
        versions.sort_by_key(|version| std::cmp::Reverse(priority(version)));
        assert_eq!(
            versions,
            ["v2", "v1", "v2beta1", "v1beta2", "v1alpha1", "foo"]
        );
    }
}
