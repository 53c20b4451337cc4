//! The Secrets that a pod takes: into the environment of its containers, and as volumes.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::KeyToPath;

use super::Facts;

/// A Secret that a container's environment takes.
#[derive(Default)]
pub(in crate::explain) struct Taken {
    /// The container's name.
    pub container: String,
    /// The names of all containers that take it.
    pub containers: BTreeSet<String>,
    /// The keys; none if it takes all.
    pub keys: BTreeSet<String>,
}

/// A Secret that a volume of the pod takes.
pub(in crate::explain) struct SecretVolume {
    /// The volume's name.
    pub name: String,
    /// The Secret's.
    pub secret: String,
    /// The keys; none if it takes all.
    pub keys: Vec<String>,
}

impl Facts {
    /// Returns the Secrets that the environment of the pod's containers needs, with the container and the keys.
    pub(in crate::explain) fn taken_secrets(&self) -> BTreeMap<String, Taken> {
        let mut all: BTreeMap<String, Taken> = BTreeMap::new();
        let Some(spec) = &self.pod.spec else {
            return all;
        };
        for container in spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers)
        {
            let mut take = |secret: &str, key: Option<&str>| {
                let taken = all.entry(secret.to_owned()).or_default();
                taken.container.clone_from(&container.name);
                taken.containers.insert(container.name.clone());
                taken.keys.extend(key.map(str::to_owned));
            };
            for source in container.env_from.iter().flatten() {
                if let Some(secret) = &source.secret_ref
                    && secret.optional != Some(true)
                {
                    take(&secret.name, None);
                }
            }
            let from = container.env.iter().flatten();
            for source in from.filter_map(|variable| variable.value_from.as_ref()) {
                if let Some(key) = &source.secret_key_ref
                    && key.optional != Some(true)
                {
                    take(&key.name, Some(&key.key));
                }
            }
        }
        all
    }

    /// Returns the volumes of Secrets, of a pod that has volumes of the driver.
    pub(in crate::explain) fn secret_volumes(&self) -> Vec<SecretVolume> {
        let spec = self.pod.spec.iter().filter(|_| !self.volumes.is_empty());
        let volumes = spec.flat_map(|spec| spec.volumes.iter().flatten());
        let mut all = Vec::new();
        for volume in volumes {
            let mut add = |secret: Option<&String>, optional, items: &Option<Vec<KeyToPath>>| {
                let items = items.iter().flatten();
                if let Some(secret) = secret.filter(|_| optional != Some(true)) {
                    all.push(SecretVolume {
                        name: volume.name.clone(),
                        secret: secret.clone(),
                        keys: items.map(|item| item.key.clone()).collect(),
                    });
                }
            };
            if let Some(source) = &volume.secret {
                add(source.secret_name.as_ref(), source.optional, &source.items);
            }
            let projected = volume.projected.iter();
            let sources = projected.flat_map(|projected| projected.sources.iter().flatten());
            for source in sources.filter_map(|source| source.secret.as_ref()) {
                add(Some(&source.name), source.optional, &source.items);
            }
        }
        all
    }
}
