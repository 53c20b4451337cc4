//! The manners of real providers, one of which a class chooses with its parameter `manners`.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use sha2::{Digest, Sha256};
use tonic::Status;

use crate::server::{Code, Failure, MountResponse, Object, ObjectVersion};

/// The key with which versions of Vault and OpenBao are made in tests.
const VERSION_KEY: &[u8] = b"a key for tests, of 32 bytes ...";
/// The block size of SHA-256, in bytes.
const BLOCK: usize = 64;
/// The line between the parts of an error of Azure's client.
const LINE: &str =
    "--------------------------------------------------------------------------------";

/// The provider that an answer is like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Manners {
    /// What most providers do.
    #[default]
    Common,
    Aws,
    Azure,
    Gcp,
    /// Vault and OpenBao, which do the same.
    Vault,
}

impl Manners {
    /// Parses the class parameter.
    ///
    /// # Errors
    ///
    /// A sentence with the names that there are.
    pub(super) fn parse(parameter: Option<&str>) -> Result<Self, String> {
        match parameter {
            None | Some("") => Ok(Self::Common),
            Some("aws") => Ok(Self::Aws),
            Some("azure") => Ok(Self::Azure),
            Some("gcp") => Ok(Self::Gcp),
            Some("vault" | "openbao") => Ok(Self::Vault),
            Some(_) => {
                Err("parameter manners must be aws, azure, gcp, vault or openbao".to_owned())
            }
        }
    }

    /// Returns the mode of a file that has none of its own. `latest` is the permission of the latest
    /// request of the process.
    pub(super) fn mode(self, permission: u32, latest: u32) -> u32 {
        match self {
            Self::Aws => latest,
            _ => permission,
        }
    }

    /// Returns whether the provider writes files itself.
    pub(super) fn writes_files(self) -> bool {
        self == Self::Aws
    }

    /// Returns whether the provider may ask the store for versions before it gets content, if it was
    /// sent any: AWS's does, and one without manners does if a fault is about that.
    pub(super) fn describes(self) -> bool {
        matches!(self, Self::Aws | Self::Common)
    }

    /// Returns whether an object that is stored nowhere fails the call. Without manners, it is empty.
    pub(super) fn misses_objects(self) -> bool {
        self != Self::Common
    }

    /// Gives the object the path, id and version that it has with the provider. `name` is its name in
    /// the store, `mode` the one that its entry gives.
    pub(super) fn name(self, object: &mut Object, name: &str, mode: Option<u32>) {
        match self {
            Self::Common => {}
            Self::Aws => {
                object.path = object.path.replace('/', "_");
                object.id.clone_from(&object.path);
                object.version = uuid(&version_id(name, &object.version));
            }
            Self::Azure => object.version = version_id(name, &object.version),
            Self::Gcp => {
                let secret = format!("projects/shop/secrets/{name}/versions");
                object.id = format!("{secret}/latest");
                object.version = format!("{secret}/{}", object.version);
            }
            Self::Vault => {
                object.id.clone_from(&object.path);
                // The provider's entry of the object, as Go writes it.
                let entry = format!(
                    r#"{{"ObjectName":"{}","SecretPath":"secret/data/{name}","SecretKey":"value","Method":"","SecretArgs":null,"FilePermission":{},"Encoding":""}}"#,
                    object.path,
                    mode.unwrap_or_default(),
                );
                let digest = hmac(VERSION_KEY, &[entry.as_bytes(), &object.contents].concat());
                object.version = URL_SAFE.encode(digest);
            }
        }
    }

    /// Adds the versions that were sent to the answer, if the provider does.
    pub(super) fn echo(self, response: &mut MountResponse, sent: &[ObjectVersion]) {
        if self != Self::Aws {
            return;
        }
        let answered = &mut response.object_version;
        for version in sent {
            if answered.iter().all(|other| other.id != version.id) {
                answered.push(version.clone());
            }
        }
    }

    /// Returns the failure for an object as the provider tells it.
    pub(super) fn told(self, failure: Failure, object: &str) -> Failure {
        let Failure::Status(status) = failure else {
            return failure;
        };
        let (code, message) = match self {
            Self::Common => return Failure::Status(status),
            Self::Aws => (Code::Unknown, of_aws(&status, object)),
            Self::Azure => (Code::Unknown, of_azure(&status, object)),
            Self::Gcp => (Code::Internal, of_gcp(&status, object)),
            Self::Vault => (Code::Unknown, of_vault(&status, object)),
        };
        Failure::new(code, message)
    }
}

/// Only a missing secret is told: for any other refusal, the cause is in the provider's log.
fn of_aws(status: &Status, object: &str) -> String {
    match status.code() {
        Code::NotFound => format!(
            "nowhere-1: Failed fetching secret {object}: operation error Secrets Manager: \
             GetSecretValue, https response error StatusCode: 400, RequestID: , \
             ResourceNotFoundException: Secrets Manager can't find the specified secret."
        ),
        _ => format!(
            "Failed to fetch secret from all regions. Verify secret exists and required permissions \
             are granted for: {object}"
        ),
    }
}

fn of_azure(status: &Status, object: &str) -> String {
    let (answer, code, message) = match status.code() {
        Code::NotFound => (
            "404: 404 Not Found",
            "SecretNotFound",
            format!("A secret with (name/id) {object} was not found in this key vault."),
        ),
        Code::PermissionDenied => (
            "403: 403 Forbidden",
            "Forbidden",
            "Caller is not authorized to perform action on resource.".to_owned(),
        ),
        _ => (
            "503: 503 Service Unavailable",
            "UNAVAILABLE",
            status.message().to_owned(),
        ),
    };
    format!(
        "failed to mount objects, error: failed to get objectType:secret, objectName:{object}, \
         objectVersion:: GET https://nowhere-1.vault.azure.net/secrets/{object}/\n{LINE}\n\
         RESPONSE {answer}\nERROR CODE: {code}\n{LINE}\n{{\n  \"error\": {{\n    \"code\": \"{code}\",\n    \
         \"message\": \"{message}\"\n  }}\n}}\n{LINE}\n"
    )
}

fn of_gcp(status: &Status, object: &str) -> String {
    let secret = format!("projects/shop/secrets/{object}");
    let told = match status.code() {
        Code::NotFound => {
            format!("code = NotFound desc = Secret [{secret}] not found or has no versions.")
        }
        Code::PermissionDenied => format!(
            "code = PermissionDenied desc = Permission 'secretmanager.versions.access' denied for \
             resource '{secret}/versions/latest' (or it may not exist)."
        ),
        code => format!("code = {code:?} desc = {}", status.message()),
    };
    format!("{{{secret}/versions/latest  {object}}}: rpc error: {told}")
}

fn of_vault(status: &Status, object: &str) -> String {
    let told = match status.code() {
        Code::NotFound => "Code: 404. Errors:\n\n".to_owned(),
        Code::PermissionDenied => {
            "Code: 403. Errors:\n\n* 1 error occurred:\n\t* permission denied\n\n".to_owned()
        }
        _ => format!("Code: 503. Errors:\n\n* {}", status.message()),
    };
    format!(
        "error making mount request: couldn't read secret \"{object}\": error requesting secret: \
         Error making API request.\n\nURL: GET http://127.0.0.1:8200/v1/secret/data/{object}\n{told}"
    )
}

/// Returns the id that the fakes of stores give a version: 32 hexadecimal digits.
fn version_id(name: &str, version: &str) -> String {
    let digest = Sha256::digest(format!("{name}/{version}"));
    digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Returns an id of 32 digits in the form of a UUID.
fn uuid(id: &str) -> String {
    let ends = [8, 12, 16, 20];
    let mut out = String::new();
    for (at, digit) in id.chars().enumerate() {
        if ends.contains(&at) {
            out.push('-');
        }
        out.push(digit);
    }
    out
}

/// Returns the HMAC of a text with SHA-256 (RFC 2104). The key is no longer than a block.
fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let padded = |pad: u8| {
        let mut block = [pad; BLOCK];
        for (to, from) in block.iter_mut().zip(key) {
            *to ^= from;
        }
        block
    };
    let inner = Sha256::new().chain_update(padded(0x36)).chain_update(text);
    let outer = Sha256::new()
        .chain_update(padded(0x5c))
        .chain_update(inner.finalize());
    outer.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(None, Ok(Manners::Common))]
    #[case(Some("openbao"), Ok(Manners::Vault))]
    #[case(Some("hunter2"), Err(()))]
    fn manners_are_those_of_known_providers(
        #[case] parameter: Option<&str>,
        #[case] expected: Result<Manners, ()>,
    ) {
        assert_eq!(Manners::parse(parameter).map_err(drop), expected);
    }

    /// The second test case of RFC 4231.
    #[test]
    fn an_hmac_is_that_of_the_rfc() {
        let digest = hmac(b"Jefe", b"what do ya want for nothing?");
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(hex, expected);
    }

    #[rstest]
    #[case(Manners::Common, "db/pw", "secret/password", "1")]
    #[case(Manners::Aws, "db_pw", "db_pw", "13a93777-7b50-7088-19c6-42c3aaa04fad")]
    #[case(
        Manners::Gcp,
        "db/pw",
        "projects/shop/secrets/password/versions/latest",
        "projects/shop/secrets/password/versions/1"
    )]
    fn objects_are_named_as_the_provider_names_them(
        #[case] manners: Manners,
        #[case] path: &str,
        #[case] id: &str,
        #[case] version: &str,
    ) {
        let mut object = Object {
            id: "secret/password".to_owned(),
            path: "db/pw".to_owned(),
            version: "1".to_owned(),
            contents: b"hunter2".to_vec(),
            ..Object::default()
        };
        manners.name(&mut object, "password", None);
        assert_eq!(
            (&*object.path, &*object.id, &*object.version),
            (path, id, version)
        );
    }

    /// The version that the real provider answered.
    #[test]
    fn a_version_of_vault_is_that_of_the_real_provider() {
        let mut object = Object {
            path: "password".to_owned(),
            contents: b"hunter2".to_vec(),
            ..Object::default()
        };
        Manners::Vault.name(&mut object, "password", None);
        assert_eq!(
            object.version,
            "8FX_aVMsprfkZTWYwMnrItzmHX78YSwr2n7OZRvR5UE="
        );
    }
}
