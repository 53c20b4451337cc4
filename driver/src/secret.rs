//! Values that cannot be printed.
//!
//! [`Secret`] has no `Debug`, `Display` or `Serialize`, and is wiped when it is dropped. The
//! only way to its bytes is [`Secret::expose`], so that a search for that word finds every
//! place where a secret leaves its type. The program's allocator wipes what others copy it into
//! ([`Wiping`](crate::hardening::Wiping)), once that is freed.

use std::collections::BTreeMap;

use zeroize::Zeroizing;

/// A secret value: the content of a file, a token, an entry of a nodePublishSecretRef.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Returns the bytes. The caller must not let them be printed or stored.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Secret {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        text.into_bytes().into()
    }
}

/// A map of keys to secret strings, such as kubelet's `secrets` or the attributes for a provider.
#[derive(Clone, Default)]
pub struct SecretMap(BTreeMap<String, Zeroizing<String>>);

impl SecretMap {
    /// Sets a value. An earlier value of that key is wiped.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.0.insert(key.into(), Zeroizing::new(value.into()));
    }

    /// Adds the entries of another map, which replace entries of this one.
    pub fn extend(&mut self, over: &Self) {
        self.0.extend(
            over.0
                .iter()
                .map(|(key, value)| (key.clone(), value.clone())),
        );
    }

    /// Removes a value and returns it.
    pub fn remove(&mut self, key: &str) -> Option<Zeroizing<String>> {
        self.0.remove(key)
    }

    /// Returns a value.
    pub fn expose(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(|value| value.as_str())
    }

    /// Returns whether the map is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the map as a JSON object of strings, in the order of the keys, for a provider.
    ///
    /// # Errors
    /// Serializing a map of strings does not fail in practice.
    pub fn expose_json(&self) -> Result<Zeroizing<String>, serde_json::Error> {
        let exposed: BTreeMap<&str, &str> = self
            .0
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        serde_json::to_string(&exposed).map(Zeroizing::new)
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for SecretMap {
    fn from_iter<T: IntoIterator<Item = (K, V)>>(pairs: T) -> Self {
        let mut map = Self::default();
        for (key, value) in pairs {
            map.insert(key, value);
        }
        map
    }
}
