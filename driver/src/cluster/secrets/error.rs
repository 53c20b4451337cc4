//! The error of synced Secrets, in words that cannot contain their content.
//!
//! A text of the API server or of an admission webhook about a Secret may quote the Secret: cut,
//! escaped, encoded or in pieces. No part of such a text is repeated, not in a log either. The error
//! is made of the HTTP code, of a reason that Kubernetes itself defines, and of a webhook's name if
//! the API server gives one.

use std::fmt;

use tonic::Code;

use super::super::request::Failure;
use crate::{error::Error, record::is_object_name};

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
}

impl SyncError {
    /// Makes an error. The message names the key and what to change; [`SyncError::context`] adds the
    /// class and the Secret.
    pub fn new(error_type: ErrorType, message: impl Into<String>) -> Self {
        Self {
            error_type,
            message: message.into(),
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
    fn from(failure: Failure) -> Self {
        let (error_type, described) = (error_type(&failure), describe(&failure));
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

/// The reasons that Kubernetes defines. Other reasons come from webhooks, and may be anything.
const REASONS: [&str; 20] = [
    "AlreadyExists",
    "BadRequest",
    "Conflict",
    "Expired",
    "Forbidden",
    "Gone",
    "InternalError",
    "Invalid",
    "MethodNotAllowed",
    "NotAcceptable",
    "NotFound",
    "RequestEntityTooLarge",
    "ServerTimeout",
    "ServiceUnavailable",
    "StorageReadError",
    "StoreReadError",
    "Timeout",
    "TooManyRequests",
    "Unauthorized",
    "UnsupportedMediaType",
];

/// The length of the longest webhook name that is repeated.
const MAX_WEBHOOK_NAME: usize = 253;

/// Describes a failure without repeating what the API server says.
pub(super) fn describe(failure: &Failure) -> String {
    let Failure::Refused {
        code,
        reason,
        message,
        namespace_ends,
        ..
    } = failure
    else {
        return "the API server did not answer".to_owned();
    };
    if *namespace_ends {
        return "the namespace is being deleted, and nothing can be created in it".to_owned();
    }
    let known = REASONS.iter().find(|known| *known == reason);
    let answer = match known {
        Some(reason) => format!("HTTP {code} {reason}"),
        None => format!("HTTP {code}"),
    };
    let answer = match webhook(message) {
        Some(name) => format!("admission webhook {name} denied it, {answer}"),
        None => answer,
    };
    format!("{answer}; the message is not repeated because it may quote the content")
}

/// Returns whether a 403 says that the driver lacks a permission. Then the message begins with
/// `secrets "creds" is forbidden: User "..." cannot create resource "secrets" in`. The message of a
/// webhook begins with other words.
fn is_about_permissions(message: &str) -> bool {
    let about = message.strip_prefix("secrets ");
    let told = about.and_then(|about| about.split_once("is forbidden: "));
    told.is_some_and(|(object, told)| {
        let names_one = object.is_empty() || object.starts_with('"') && object.ends_with("\" ");
        let who = told.strip_prefix("User \"");
        names_one
            && who.is_some_and(|who| {
                who.contains("\" cannot ") && who.contains(" resource \"secrets\"")
            })
    })
}

/// Returns the name of the webhook that denied a request, from the sentence that the API server
/// itself writes before the message of the webhook.
fn webhook(message: &str) -> Option<&str> {
    let rest = message.strip_prefix("admission webhook \"")?;
    let (name, rest) = rest.split_once('"')?;
    let is_name = name.len() <= MAX_WEBHOOK_NAME && name.contains('.') && is_object_name(name);
    (is_name && rest.starts_with(" denied the request")).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::secrets::tests::quoted;
    use proptest::prelude::*;
    use rstest::rstest;

    fn refused(code: u16, reason: &str, message: &str) -> Failure {
        Failure::Refused {
            code,
            reason: reason.to_owned(),
            message: message.to_owned(),
            object: "creds".to_owned(),
            namespace_ends: false,
        }
    }

    #[rstest]
    #[case::a_rule_of_the_api(
        422,
        "Invalid",
        "Secret \"creds\" is invalid: data: hunter2",
        "HTTP 422 Invalid"
    )]
    #[case::a_webhook(
        403,
        "Forbidden",
        "admission webhook \"values.policy.example.com\" denied the request: hunter2 is weak",
        "admission webhook values.policy.example.com denied it, HTTP 403 Forbidden"
    )]
    #[case::a_reason_of_a_webhooks_own(418, "hunter2", "no", "HTTP 418")]
    #[case::a_name_that_is_none(
        400,
        "BadRequest",
        "admission webhook \"hunter2 x\" denied the request",
        "HTTP 400 BadRequest"
    )]
    #[case::no_sentence_of_the_servers(
        400,
        "BadRequest",
        "said: admission webhook \"hunter2.example\" denied the request",
        "HTTP 400 BadRequest"
    )]
    fn what_is_said_instead(
        #[case] code: u16,
        #[case] reason: &str,
        #[case] message: &str,
        #[case] begins: &str,
    ) {
        let said = describe(&refused(code, reason, message));
        let expected = format!("{begins}; the message is not repeated");
        assert!(said.starts_with(&expected), "{said}");
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

    proptest! {
        /// Whatever a value is and however a message quotes it, no six bytes of it come through.
        #[test]
        fn no_piece_of_a_value_is_repeated(
            value in proptest::collection::vec(any::<u8>(), 6..60),
            how in 0..8_usize,
            around in "[ -~\\n]{0,40}",
            code in prop::sample::select(vec![400_u16, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504]),
            in_reason in any::<bool>(),
        ) {
            let quoted = quoted(&value, how);
            // The driver's own words, which a value might happen to contain.
            let plain = format!("{:?}", SyncError::from(refused(code, "", "")));
            let (reason, message) = if in_reason {
                (quoted.clone(), around)
            } else {
                ("Invalid".to_owned(), format!("{around}{quoted}{around}"))
            };
            let error = SyncError::from(refused(code, &reason, &message));
            let said = format!("{error:?}");
            let pieces = quoted.as_bytes().windows(6);
            for piece in pieces.filter_map(|piece| std::str::from_utf8(piece).ok()) {
                let ours = plain.contains(piece) || "Invalid".contains(piece.trim());
                prop_assert!(ours || !said.contains(piece), "{piece:?} is in {said:?}");
            }
        }
    }
}
