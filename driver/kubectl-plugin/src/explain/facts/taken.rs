//! The Secrets that a pod takes: into the environment of its containers, and as volumes.

use k8s_openapi::api::core::v1::{Container, KeyToPath};

use super::Facts;

/// A Secret that a container's environment takes.
pub(in crate::explain) struct Take<'a> {
    /// The container.
    pub container: &'a Container,
    /// The Secret's name.
    pub secret: &'a str,
    /// The key; none if it takes all.
    pub key: Option<&'a str>,
    /// The variable that gets it; none if it takes all.
    pub variable: Option<&'a str>,
    /// Whether the container starts without it, too.
    pub is_optional: bool,
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
    /// Returns the Secrets and keys that the environment of the pod's containers needs, in the order in which they
    /// start.
    pub(in crate::explain) fn takes(&self) -> Vec<Take<'_>> {
        let all = self.takes_if_there().into_iter();
        all.filter(|take| !take.is_optional).collect()
    }

    /// Returns what [`Facts::takes`] does, and what containers take with `optional: true`.
    pub(in crate::explain) fn takes_if_there(&self) -> Vec<Take<'_>> {
        let mut all = Vec::new();
        for container in self.containers() {
            let of_all = container.env_from.iter().flatten();
            let of_all = of_all.filter_map(|source| source.secret_ref.as_ref());
            all.extend(of_all.map(|secret| Take {
                container,
                secret: &secret.name,
                key: None,
                variable: None,
                is_optional: secret.optional == Some(true),
            }));
            let from = container.env.iter().flatten();
            all.extend(from.filter_map(|variable| {
                let source = variable.value_from.as_ref()?;
                let key = source.secret_key_ref.as_ref()?;
                Some(Take {
                    container,
                    secret: &key.name,
                    key: Some(&key.key),
                    variable: Some(&variable.name),
                    is_optional: key.optional == Some(true),
                })
            }));
        }
        all
    }

    /// Returns the names of the Secrets with which the pod's images are pulled.
    pub(in crate::explain) fn pull_secrets(&self) -> impl Iterator<Item = &str> {
        let spec = self.pod.spec.iter();
        let all = spec.flat_map(|spec| spec.image_pull_secrets.iter().flatten());
        all.map(|secret| secret.name.as_str())
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
