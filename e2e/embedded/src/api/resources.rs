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
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceDefinitionVersion,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
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
    /// Present for custom kinds.
    pub(super) schema: Option<Schema>,
    /// Whether `/status` is served, and the main endpoint therefore ignores `status`.
    pub(super) status: bool,
}

impl Version {
    /// Reads a version of a CustomResourceDefinition. `field` is the place of its schema.
    fn new(version: CustomResourceDefinitionVersion, field: &str) -> Result<Version, FieldError> {
        let schema = version.schema.and_then(|schema| schema.open_api_v3_schema);
        let schema = schema.ok_or_else(|| FieldError::required(field, "schemas are required"))?;
        let status = version.subresources.and_then(|all| all.status);
        Ok(Version {
            name: version.name,
            schema: Some(Schema::new(schema, field)?),
            status: status.is_some(),
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
        let CustomResourceDefinition { metadata, spec, .. } =
            CustomResourceDefinition::deserialize(definition).map_err(|error| {
                FieldError::invalid("spec", &definition["spec"], &error.to_string())
            })?;
        let (group, names) = (spec.group, spec.names);
        for (field, value) in [
            ("spec.group", &group),
            ("spec.names.plural", &names.plural),
            ("spec.names.kind", &names.kind),
        ] {
            if value.is_empty() {
                return Err(FieldError::required(field, ""));
            }
        }
        if metadata.name != Some(format!("{}.{group}", names.plural)) {
            let name = &definition["metadata"]["name"];
            let why = "must be spec.names.plural+\".\"+spec.group";
            return Err(FieldError::invalid("metadata.name", name, why));
        }

        let not_one_storage = || {
            let why = "must have exactly one version marked as storage version";
            FieldError::invalid("spec.versions", &definition["spec"]["versions"], why)
        };
        let mut storage = None;
        let mut versions = Vec::new();
        for (index, version) in spec.versions.into_iter().enumerate() {
            let field = format!("spec.versions[{index}].schema.openAPIV3Schema");
            let api_version = api_version(&group, &version.name);
            let (is_served, is_storage) = (version.served, version.storage);
            let version = Version::new(version, &field)?;
            if is_storage
                && storage
                    .replace((api_version, version.schema.clone()))
                    .is_some()
            {
                return Err(not_one_storage());
            }
            if is_served {
                versions.push(version);
            }
        }
        let (storage, storage_schema) = storage.ok_or_else(not_one_storage)?;
        versions.sort_by_cached_key(|version| preference(&version.name));
        Ok(Resource {
            qualified: qualified(&names.plural, &group),
            singular: names.singular.unwrap_or_else(|| names.kind.to_lowercase()),
            list_kind: names
                .list_kind
                .unwrap_or_else(|| format!("{}List", names.kind)),
            short_names: names.short_names.unwrap_or_default(),
            namespaced: spec.scope == "Namespaced",
            group,
            plural: names.plural,
            kind: names.kind,
            versions,
            storage,
            storage_schema,
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

/// Returns the place of a version in the order of preference: stable before beta before alpha, then
/// by number.
pub(super) fn preference(version: &str) -> impl Ord + use<> {
    std::cmp::Reverse(kube::core::Version::parse(version).priority())
}
