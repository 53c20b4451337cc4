//! The table of kinds: the built-in ones, and those of CustomResourceDefinitions.
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

use super::{field_error::FieldError, schema::Schema};

/// A kind of object that the server stores, with all versions at which it is served.
#[derive(Debug)]
pub(super) struct Resource {
    /// Empty for the core group.
    pub(super) group: String,
    pub(super) plural: String,
    pub(super) singular: String,
    pub(super) kind: String,
    pub(super) list_kind: String,
    pub(super) short_names: Vec<String>,
    /// The unique name in messages: `pods`, `deployments.apps`.
    pub(super) qualified: String,
    pub(super) namespaced: bool,
    /// Served versions, preferred first.
    pub(super) versions: Vec<Version>,
    /// The `apiVersion` at which objects are stored.
    pub(super) storage: String,
    pub(super) storage_schema: Option<Schema>,
    pub(super) source: Source,
}

/// The origin of a kind.
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

impl Version {
    /// Parses a version of a CustomResourceDefinition. `field` is the place of its schema.
    fn parse(
        version: &Value,
        api_version: &str,
        kind: &str,
        field: &str,
    ) -> Result<Version, FieldError> {
        let schema = &version["schema"]["openAPIV3Schema"];
        if schema.is_null() {
            return Err(FieldError::required(field, "schemas are required"));
        }
        let warning = version["deprecationWarning"].as_str().map_or_else(
            || format!("{api_version} {kind} is deprecated"),
            str::to_owned,
        );
        Ok(Version {
            name: version["name"].as_str().unwrap_or_default().to_owned(),
            warning: (version["deprecated"] == true).then_some(warning),
            schema: Some(Schema::parse(schema, field)?),
            status: version["subresources"]["status"].is_object(),
        })
    }
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

impl BuiltIn {
    /// A cluster-scoped kind without `/status` whose generation is not counted.
    const fn new<T>(short_names: &'static [&'static str]) -> BuiltIn
    where
        T: k8s_openapi::Resource + DeserializeOwned + Serialize,
    {
        BuiltIn {
            group: T::GROUP,
            version: T::VERSION,
            plural: T::URL_PATH_SEGMENT,
            kind: T::KIND,
            short_names,
            namespaced: false,
            status: false,
            generation: false,
            decode: typed::<T>,
        }
    }

    const fn namespaced(mut self) -> BuiltIn {
        self.namespaced = true;
        self
    }

    const fn status(mut self) -> BuiltIn {
        self.status = true;
        self
    }

    /// A kind with `/status` whose generation is counted.
    const fn generation(mut self) -> BuiltIn {
        self.generation = true;
        self.status()
    }
}

static BUILT_IN: &[BuiltIn] = &[
    BuiltIn::new::<Namespace>(&["ns"]).status(),
    BuiltIn::new::<Pod>(&["po"]).namespaced().generation(),
    BuiltIn::new::<Event>(&["ev"]).namespaced(),
    BuiltIn::new::<Secret>(&[]).namespaced(),
    BuiltIn::new::<ConfigMap>(&["cm"]).namespaced(),
    BuiltIn::new::<ServiceAccount>(&["sa"]).namespaced(),
    BuiltIn::new::<Node>(&["no"]).status(),
    BuiltIn::new::<CSIDriver>(&[]),
    BuiltIn::new::<CSINode>(&[]),
    BuiltIn::new::<DaemonSet>(&["ds"]).namespaced().generation(),
    BuiltIn::new::<Deployment>(&["deploy"])
        .namespaced()
        .generation(),
    BuiltIn::new::<ReplicaSet>(&["rs"])
        .namespaced()
        .generation(),
    BuiltIn::new::<StatefulSet>(&["sts"])
        .namespaced()
        .generation(),
    BuiltIn::new::<Job>(&[]).namespaced().generation(),
    BuiltIn::new::<Lease>(&[]).namespaced(),
    BuiltIn::new::<ClusterRole>(&[]),
    BuiltIn::new::<ClusterRoleBinding>(&[]),
    BuiltIn::new::<Role>(&[]).namespaced(),
    BuiltIn::new::<RoleBinding>(&[]).namespaced(),
    BuiltIn::new::<CustomResourceDefinition>(&["crd", "crds"]).generation(),
];

impl Resource {
    /// Returns every built-in kind.
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

    /// Returns the kind that a CustomResourceDefinition describes.
    ///
    /// # Errors
    /// Returns the field for which a real server refuses the definition, or that this server cannot
    /// check and therefore does not accept (`pattern`).
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
            let api_version = api_version(&group, &text(&version["name"]));
            let parsed = Version::parse(version, &api_version, &kind, &field)?;
            if version["storage"] == true
                && let Some(schema) = parsed.schema.clone()
                && storage.replace((api_version, schema)).is_some()
            {
                let why = "must have exactly one version marked as storage version";
                return Err(FieldError::invalid("spec.versions", &spec["versions"], why));
            }
            if version["served"] == true {
                versions.push(parsed);
            }
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

    /// Returns the `apiVersion` of objects at a version.
    pub(super) fn api_version(&self, version: &str) -> String {
        api_version(&self.group, version)
    }

    /// Returns the name in messages about validity: `Pod`, `Deployment.apps`.
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
}

/// Returns `name.group`, or `name` in the core group.
pub(super) fn qualified(name: &str, group: &str) -> String {
    match group {
        "" => name.to_owned(),
        group => format!("{name}.{group}"),
    }
}

/// Returns `group/version`, or `version` in the core group.
pub(super) fn api_version(group: &str, version: &str) -> String {
    match group {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
    }
}

/// Returns the order of a version in Kubernetes: stable before beta before alpha, then by number.
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
