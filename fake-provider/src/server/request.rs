//! A Mount request, parsed and checked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proto::provider::{MountRequest, ObjectVersion};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tonic::Code;

use super::Failure;

/// The attribute that holds a pod's service account tokens: a JSON object from audience to token.
/// Source: <https://kubernetes-csi.github.io/docs/token-requests.html>.
pub const TOKENS_KEY: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// The form in which attributes and secrets arrive: a JSON object of strings.
pub type Strings = BTreeMap<String, String>;

/// A Mount request. It has no [`Debug`](std::fmt::Debug), because it contains secrets and tokens.
pub struct Request {
    attributes: Strings,
    secrets: Option<Strings>,
    permission: u32,
    target_path: PathBuf,
    mounted_versions: Vec<ObjectVersion>,
}

/// The identity of the pod that a volume is for, as kubelet tells it
/// (<https://kubernetes-csi.github.io/docs/pod-info.html>). A part that did not arrive is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod's name.
    pub name: &'a str,
    /// The pod's UID.
    pub uid: &'a str,
    /// The name of the pod's service account.
    pub service_account: &'a str,
}

/// A service account token. It cannot be printed.
#[derive(Clone, Deserialize)]
pub struct Token {
    token: String,
}

impl Token {
    /// Returns the token itself, to send it to the store.
    pub fn reveal(&self) -> &str {
        &self.token
    }
}

impl Request {
    /// Checks a request as it arrives.
    ///
    /// # Errors
    ///
    /// [`Code::InvalidArgument`], naming the field and never quoting it.
    pub(crate) fn parse(request: MountRequest) -> Result<Self, Failure> {
        let attributes = json("attributes", "object of strings", &request.attributes)?;
        let secrets = json("secrets", "object of strings", &request.secrets)?;
        let permission = json("permission", "number", &request.permission)?;
        if request.target_path.is_empty() {
            return Err(invalid("target_path is empty".to_owned()));
        }
        Ok(Self {
            attributes,
            secrets,
            permission,
            target_path: request.target_path.into(),
            mounted_versions: request.current_object_version,
        })
    }

    /// Returns a parameter of the SecretProviderClass, or an attribute of the volume, which goes
    /// before the parameter of its name.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    /// Returns all parameters and attributes, service account tokens included.
    pub fn attributes(&self) -> &Strings {
        &self.attributes
    }

    /// Returns the data of the Secret that the pod's `nodePublishSecretRef` names, or `None` if
    /// the pod has none.
    pub fn secrets(&self) -> Option<&Strings> {
        self.secrets.as_ref()
    }

    /// Returns the pod that the volume is for.
    pub fn pod(&self) -> Pod<'_> {
        let of = |key: &str| {
            let value = self.parameter(&format!("csi.storage.k8s.io/{key}"));
            value.unwrap_or_default()
        };
        Pod {
            namespace: of("pod.namespace"),
            name: of("pod.name"),
            uid: of("pod.uid"),
            service_account: of("serviceAccount.name"),
        }
    }

    /// Returns the pod's service account token for an audience.
    ///
    /// # Errors
    ///
    /// [`Code::FailedPrecondition`] if kubelet sent none: the CSIDriver object has to name the
    /// audience in `tokenRequests`.
    pub fn token(&self, audience: &str) -> Result<Token, Failure> {
        self.tokens()?.remove(audience).ok_or_else(|| {
            let message = format!(
                "no service account token for audience {audience:?} arrived; the tokenRequests of \
                 the CSIDriver secrets-store.csi.k8s.io must name it"
            );
            Failure::new(Code::FailedPrecondition, message)
        })
    }

    /// Returns the pod's service account tokens by audience.
    ///
    /// # Errors
    ///
    /// [`Code::InvalidArgument`] if they do not have the form that kubelet sends.
    pub fn tokens(&self) -> Result<BTreeMap<String, Token>, Failure> {
        match self.parameter(TOKENS_KEY) {
            None | Some("") => Ok(BTreeMap::new()),
            Some(tokens) => serde_json::from_str(tokens).map_err(|_| {
                invalid("the service account tokens are not what kubelet sends".to_owned())
            }),
        }
    }

    /// Returns the permission bits that files should have. The driver always asks for `0o644`.
    pub fn permission(&self) -> u32 {
        self.permission
    }

    /// Returns the directory where the volume is mounted, for providers that write files
    /// themselves.
    pub fn target_path(&self) -> &Path {
        &self.target_path
    }

    /// Returns the versions that the volume holds now. It is empty unless the class asks for it.
    pub fn mounted_versions(&self) -> &[ObjectVersion] {
        &self.mounted_versions
    }
}

/// Parses a field of the request. The parser's own message quotes the input, which may be a
/// token, so the error names only the place.
fn json<T: DeserializeOwned>(field: &str, expected: &str, text: &str) -> Result<T, Failure> {
    serde_json::from_str(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        invalid(format!(
            "{field} is not a JSON {expected} (line {line}, column {column})"
        ))
    })
}

fn invalid(message: String) -> Failure {
    Failure::new(Code::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(attributes: &[(&str, &str)]) -> Request {
        let attributes: BTreeMap<_, _> = attributes.iter().copied().collect();
        let request = MountRequest {
            attributes: serde_json::to_string(&attributes).unwrap(),
            secrets: "null".to_owned(),
            target_path: "/t".to_owned(),
            permission: "420".to_owned(),
            ..MountRequest::default()
        };
        Request::parse(request).unwrap()
    }

    fn message<T>(result: Result<T, Failure>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn a_request_names_its_pod_and_parameters() {
        let request = request(&[
            ("folder", "shop"),
            ("csi.storage.k8s.io/pod.name", "web"),
            ("csi.storage.k8s.io/pod.namespace", "ns"),
        ]);
        let pod = request.pod();
        assert_eq!((pod.namespace, pod.name, pod.uid), ("ns", "web", ""));
        assert_eq!(request.parameter("folder"), Some("shop"));
        assert_eq!(request.permission(), 0o644);
        assert!(request.secrets().is_none());
    }

    #[test]
    fn a_token_is_found_by_its_audience_and_never_quoted() {
        let some = request(&[(TOKENS_KEY, r#"{"vault":{"token":"hunter2"}}"#)]);
        assert_eq!(some.token("vault").ok().unwrap().reveal(), "hunter2");
        let missing = message(some.token("aws"));
        assert!(
            missing.contains("\"aws\"") && !missing.contains("hunter2"),
            "{missing}"
        );
        assert!(message(request(&[]).token("vault")).contains("tokenRequests"));
        let garbled = message(request(&[(TOKENS_KEY, "hunter2")]).token("vault"));
        assert!(
            garbled.contains("kubelet sends") && !garbled.contains("hunter2"),
            "{garbled}"
        );
    }
}
