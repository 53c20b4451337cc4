//! The manners of real providers, one of which a class chooses with its parameter `manners`.

use super::source::version_of;
use crate::server::{Code, Failure, MountResponse, Object, ObjectVersion};

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

    /// Returns whether the provider asks the store for versions before it gets content, if it was
    /// sent any.
    pub(super) fn describes(self) -> bool {
        self == Self::Aws
    }

    /// Gives the object the id and version that it has with the provider.
    pub(super) fn name(self, object: &mut Object, name: &str) {
        match self {
            Self::Common | Self::Aws => {}
            Self::Azure => object.version = version_of(object.version.as_bytes()).repeat(2),
            Self::Gcp => {
                object.id = format!("projects/fake/secrets/{name}/versions/latest");
                object.version =
                    format!("projects/fake/secrets/{name}/versions/{}", object.version);
            }
            Self::Vault => object.version = version_of(&object.contents),
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

    /// Returns the failure as the provider tells it.
    pub(super) fn told(self, failure: Failure, object: &str) -> Failure {
        match (self, failure) {
            (Self::Aws, Failure::Status(_)) => {
                let message = format!(
                    "Failed to fetch secret from all regions. Verify secret exists and required \
                     permissions are granted for: {object}"
                );
                Failure::new(Code::Unknown, message)
            }
            (_, failure) => failure,
        }
    }
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

    #[rstest]
    #[case(Manners::Common, "secret/a", "7")]
    #[case(Manners::Aws, "secret/a", "7")]
    #[case(Manners::Azure, "secret/a", "7902699be42c7902699be42c")]
    #[case(
        Manners::Gcp,
        "projects/fake/secrets/a/versions/latest",
        "projects/fake/secrets/a/versions/7"
    )]
    #[case(Manners::Vault, "secret/a", "2bd806c97f0e")]
    fn objects_are_named_as_the_provider_names_them(
        #[case] manners: Manners,
        #[case] id: &str,
        #[case] version: &str,
    ) {
        let mut object = Object {
            id: "secret/a".to_owned(),
            version: "7".to_owned(),
            contents: b"alice".to_vec(),
            ..Object::default()
        };
        manners.name(&mut object, "a");
        assert_eq!((&*object.id, &*object.version), (id, version));
    }
}
