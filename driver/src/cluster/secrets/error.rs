//! The error of synced Secrets, in words that cannot contain their content.
//!
//! A text of the API server or of an admission webhook about a Secret may quote the Secret: cut,
//! escaped, encoded or in pieces. No part of such a text is repeated, not in a log either. The error
//! is made of the HTTP code, of a reason that Kubernetes itself defines, and of the name of what
//! refuses the Secret, if the API server gives one (see [`refusal`](super::refusal)).

use std::fmt;

use tonic::Code;

use super::{
    super::request::Failure,
    refusal::{Subject, describe, forbidden},
};
use crate::error::Error;

/// The `error_type` label of `sync_k8s_secret_error_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorType {
    /// The class contradicts itself, or asks for something impossible.
    InvalidClass,
    /// The volume does not contain an object that the class names.
    ObjectNotFound,
    /// An object is not JSON or base64, although the class says so.
    InvalidValue,
    /// An object does not contain a usable certificate or key.
    InvalidCertificate,
    /// A key or annotation that the type requires is missing.
    MissingKey,
    /// The data is larger than a Secret may be.
    TooLarge,
    /// There is a Secret of that name that is not the driver's.
    Unmanaged,
    /// Another class makes a different Secret of the same name.
    Conflict,
    /// The driver is not allowed to write Secrets.
    Forbidden,
    /// The API server refuses the Secret.
    Refused,
    /// The Secret was deleted to change its type, and the API server does not accept the new one.
    Missing,
    /// The API server or the volume was not available.
    Unavailable,
}

impl ErrorType {
    /// Returns the label's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::InvalidClass => "InvalidClass",
            Self::ObjectNotFound => "ObjectNotFound",
            Self::InvalidValue => "InvalidValue",
            Self::InvalidCertificate => "InvalidCertificate",
            Self::MissingKey => "MissingKey",
            Self::TooLarge => "TooLarge",
            Self::Unmanaged => "Unmanaged",
            Self::Conflict => "Conflict",
            Self::Forbidden => "Forbidden",
            Self::Refused => "Refused",
            Self::Missing => "Missing",
            Self::Unavailable => "Unavailable",
        }
    }
}

/// The reason why a Secret is not as its class asks for, as a sentence for the pod's owner.
#[derive(Debug, Clone)]
pub struct SyncError {
    error_type: ErrorType,
    message: String,
    is_awaited: bool,
}

impl SyncError {
    /// Makes an error. The message names the key and what to change; [`SyncError::context`] adds the
    /// class and the Secret.
    pub fn new(error_type: ErrorType, message: impl Into<String>) -> Self {
        Self {
            error_type,
            message: message.into(),
            is_awaited: false,
        }
    }

    /// Makes an error that another attempt may not meet.
    pub fn unavailable(why: impl fmt::Display) -> Self {
        Self::new(ErrorType::Unavailable, why.to_string())
    }

    /// Makes the error of a Secret whose type stays as it is, because no new Secret can take its
    /// place.
    pub(super) fn type_stays(desired_type: &str, why: impl fmt::Display) -> Self {
        Self::new(
            ErrorType::Refused,
            format!(
                "its type cannot be changed to {desired_type:.100}, and the existing Secret is kept: {why}"
            ),
        )
    }

    /// Makes the error of a Secret that was deleted to change its type, and that the API server has
    /// not accepted again yet.
    pub(super) fn missing(namespace: &str, desired_type: &str, why: impl fmt::Display) -> Self {
        Self::new(
            ErrorType::Missing,
            format!(
                "it is missing: it was deleted to change its type to {desired_type:.100}, and the API server rejects the new one: {why}. The driver tries again, every few minutes at least, as long as a pod needs it. Look for a webhook, a policy or a quota that rejects Secrets in namespace {namespace}, or set type in the entry of secretObjects back to its former value"
            ),
        )
    }

    /// Makes the error of a request that failed, about a Secret if it wrote one.
    pub(super) fn refused(failure: Failure, subject: Option<&Subject<'_>>) -> Self {
        let error_type = error_type(&failure);
        // The permissions of others say nothing of the driver's.
        let subject = subject.filter(|_| error_type != ErrorType::Forbidden);
        let described = describe(&failure, subject);
        let message = match (error_type, failure) {
            (ErrorType::Forbidden, _) => format!(
                "the API server answers {described}. The driver may write Secrets only when the chart's value syncSecret.enabled is true, or deploy/optional/rbac-secretprovidersyncing.yaml is applied"
            ),
            (ErrorType::Refused, _) => format!("the API server refuses it: {described}"),
            (_, Failure::Refused { .. }) => described,
            (_, failure) => failure.into_error().to_string(),
        };
        Self::new(error_type, message)
    }

    /// Makes the error of a Secret whose content cannot be changed.
    pub(super) fn immutable(namespace: &str, name: &str) -> Self {
        Self::new(
            ErrorType::Refused,
            format!(
                "the Secret is immutable, so that its content cannot be changed, and immutable cannot be set back to false. Delete it, and the driver makes it anew: kubectl delete secret -n {namespace} {name}"
            ),
        )
    }

    /// Returns the type of the error.
    pub fn error_type(&self) -> ErrorType {
        self.error_type
    }

    /// Puts words before the message: the class, the Secret.
    #[must_use]
    pub fn context(mut self, words: impl fmt::Display) -> Self {
        self.message = format!("{words}: {}", self.message);
        self
    }

    /// Puts words behind the message.
    #[must_use]
    pub fn and(mut self, words: impl fmt::Display) -> Self {
        self.message = format!("{}; {words}", self.message);
        self
    }

    /// Marks an error whose end is awaited without anybody's doing.
    #[must_use]
    pub fn awaited(mut self) -> Self {
        self.is_awaited = true;
        self
    }

    /// Returns whether the error is marked so, and no pod need be told of it yet.
    pub fn is_awaited(&self) -> bool {
        self.is_awaited
    }

    /// Returns a text that is equal for errors that are the same to the pod's owner. The ways in
    /// which an API server does not answer vary.
    pub fn identity(&self) -> &str {
        match self.error_type {
            ErrorType::Unavailable | ErrorType::Missing => self.error_type.label(),
            _ => &self.message,
        }
    }
}

impl fmt::Display for SyncError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<SyncError> for Error {
    fn from(error: SyncError) -> Self {
        let code = match error.error_type {
            ErrorType::Unavailable | ErrorType::Missing => Code::Unavailable,
            _ => Code::FailedPrecondition,
        };
        Self::new(code, error.message)
    }
}

impl From<Failure> for SyncError {
    /// Converts the failure of a request that has no Secret in it: a read.
    fn from(failure: Failure) -> Self {
        Self::refused(failure, None)
    }
}

/// Returns whether a failure is about permissions or about the Secret, or may pass by itself.
pub(super) fn error_type(failure: &Failure) -> ErrorType {
    match failure {
        Failure::Refused {
            code: 403,
            namespace_ends: true,
            ..
        } => ErrorType::Unavailable,
        Failure::Refused {
            code: 403, message, ..
        } if is_about_permissions(message) => ErrorType::Forbidden,
        // A webhook, a policy or a quota says 403 as well.
        Failure::Refused {
            code: 400 | 403 | 413 | 422,
            ..
        } => ErrorType::Refused,
        _ => ErrorType::Unavailable,
    }
}

/// Returns whether a 403 says that the driver lacks a permission. Then the message begins with
/// `secrets "creds" is forbidden: User "..." cannot create resource "secrets" in`.
fn is_about_permissions(message: &str) -> bool {
    let who = forbidden(message).and_then(|told| told.strip_prefix("User \""));
    who.is_some_and(|who| who.contains("\" cannot ") && who.contains(" resource \"secrets\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u16, reason: &str, message: &str) -> Failure {
        Failure::Refused {
            code,
            reason: reason.to_owned(),
            message: message.to_owned(),
            object: "creds".to_owned(),
            namespace_ends: false,
        }
    }

    /// Only a message of the API server itself about permissions gets a hint at them.
    #[test]
    fn a_hint_at_permissions() {
        let denied = "User \"system:serviceaccount:kube-system:driver\" cannot patch resource \"secrets\" in API group \"\" in the namespace \"shop\"";
        let webhook = "admission webhook \"Values_1\" denied the request:";
        for (message, expected) in [
            (format!("secrets is forbidden: {denied}"), ErrorType::Forbidden),
            (format!("secrets \"creds\" is forbidden: {denied}"), ErrorType::Forbidden),
            (format!("secrets \"creds\" is forbidden: {denied}: RBAC: role not found"), ErrorType::Forbidden),
            ("secrets \"creds\" is forbidden: exceeded quota: few, requested: secrets=1, used: secrets=3, limited: secrets=3".to_owned(), ErrorType::Refused),
            (format!("secrets \"creds\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: {denied}"), ErrorType::Refused),
            ("admission webhook \"values.example.com\" denied the request: no".to_owned(), ErrorType::Refused),
            (format!("{webhook} no"), ErrorType::Refused),
            (format!("{webhook} secrets is forbidden: {denied}"), ErrorType::Refused),
            ("no".to_owned(), ErrorType::Refused),
        ] {
            let error = SyncError::from(refused(403, "Forbidden", &message));
            assert_eq!(error.error_type(), expected, "{message}");
        }
    }

    #[test]
    fn the_type_says_whether_the_user_has_to_mend_it() {
        let denied = "admission webhook \"values.example.com\" denied the request: no";
        let of = |failure| SyncError::from(failure).error_type();
        assert_eq!(of(refused(422, "Forbidden", "no")), ErrorType::Refused);
        assert_eq!(
            of(refused(500, "Forbidden", denied)),
            ErrorType::Unavailable
        );
        let ends = Failure::Refused {
            code: 403,
            reason: "Forbidden".to_owned(),
            message: "no".to_owned(),
            object: String::new(),
            namespace_ends: true,
        };
        assert_eq!(of(ends), ErrorType::Unavailable);
    }
}
