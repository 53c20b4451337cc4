//! Why a Secret is not as it should be, in words that cannot hold its content.
//!
//! What the API server or an admission webhook says about a Secret may quote the Secret: cut,
//! escaped, encoded or in pieces. So no word of it is repeated, not in a log either. What is said
//! instead is made of the HTTP code, of a reason that Kubernetes itself knows, and of a webhook's
//! name where the API server names one.

use super::super::request::Failure;
use crate::{error::Error, record::is_object_name};

/// Why a Secret is not as it should be.
#[derive(Debug, Clone)]
pub enum Refusal {
    /// It belongs to somebody else.
    Unmanaged,
    /// Another class, this one, makes something else of it.
    OtherClass(String),
    /// The driver may not do that.
    Forbidden(String),
    /// The API server does not take such a Secret.
    Invalid(String),
    /// Its type should be another, for which a new Secret would have to take its place, and that
    /// is not possible: why.
    TypeStays(String),
    /// It was deleted because its type was to change, and the API server has taken neither the new
    /// one nor the former one again yet: why.
    Missing(String),
    /// It did not work, and may later.
    Failed(Error),
}

/// The reasons that Kubernetes has. Others come from a webhook, and may be anything.
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

/// The longest name of a webhook that is repeated.
const LONGEST_NAME: usize = 253;

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let said = said(&failure);
        match &failure {
            // A namespace that goes is no question of permissions, nor is what a webhook, a policy
            // or a quota says with the same code.
            Failure::Refused {
                code: 403,
                namespace_ends: false,
                message,
                ..
            } => match is_about_permissions(message) {
                true => Self::Forbidden(said),
                false => Self::Invalid(said),
            },
            Failure::Refused {
                code: 400 | 413 | 422,
                ..
            } => Self::Invalid(said),
            Failure::Refused { .. } => Self::Failed(Error::unavailable(said)),
            Failure::NoAnswer(_) | Failure::WrongObject => Self::Failed(failure.into_error()),
        }
    }
}

impl Refusal {
    /// What may be said of it, without saying what it means for the Secret.
    pub(super) fn said(&self) -> String {
        match self {
            Self::Unmanaged => "it is not the driver's".to_owned(),
            Self::OtherClass(name) => format!("SecretProviderClass {name} makes it"),
            Self::Forbidden(said)
            | Self::Invalid(said)
            | Self::TypeStays(said)
            | Self::Missing(said) => said.clone(),
            Self::Failed(error) => error.to_string(),
        }
    }
}

/// What may be said of a failure.
fn said(failure: &Failure) -> String {
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

/// Whether a 403 says that the driver lacks a permission. Then the API server writes, before
/// anything else: `secrets "creds" is forbidden: User "..." cannot create resource "secrets" in`
/// and so on. What a webhook says begins with other words.
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

/// The name of the webhook that denied a request. The API server itself writes the sentence that
/// it is taken from, before anything that the webhook says.
fn webhook(message: &str) -> Option<&str> {
    let rest = message.strip_prefix("admission webhook \"")?;
    let (name, rest) = rest.split_once('"')?;
    let is_name = name.len() <= LONGEST_NAME && name.contains('.') && is_object_name(name);
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
        let said = said(&refused(code, reason, message));
        let expected = format!("{begins}; the message is not repeated");
        assert!(said.starts_with(&expected), "{said}");
    }

    /// Only what the API server says of a permission is mended by one.
    #[rstest]
    #[case::create(
        "secrets is forbidden: User \"system:serviceaccount:kube-system:driver\" cannot create resource \"secrets\" in API group \"\" in the namespace \"shop\"",
        true
    )]
    #[case::by_name(
        "secrets \"creds\" is forbidden: User \"u\" cannot patch resource \"secrets\" in API group \"\" in the namespace \"shop\"",
        true
    )]
    #[case::with_a_reason(
        "secrets \"creds\" is forbidden: User \"u\" cannot delete resource \"secrets\" in API group \"\" in the namespace \"shop\": RBAC: role not found",
        true
    )]
    #[case::a_quota(
        "secrets \"creds\" is forbidden: exceeded quota: few, requested: secrets=1, used: secrets=3, limited: secrets=3",
        false
    )]
    #[case::a_policy(
        "secrets \"creds\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: User \"u\" cannot create resource \"secrets\"",
        false
    )]
    #[case::a_webhook(
        "admission webhook \"values.example.com\" denied the request: no",
        false
    )]
    #[case::a_webhook_with_an_odd_name(
        "admission webhook \"Values_1\" denied the request: no",
        false
    )]
    #[case::a_webhook_that_quotes(
        "admission webhook \"Values_1\" denied the request: secrets is forbidden: User \"u\" cannot create resource \"secrets\"",
        false
    )]
    #[case::anything_else("no", false)]
    fn a_hint_at_permissions(#[case] message: &str, #[case] is: bool) {
        let refusal = Refusal::from(refused(403, "Forbidden", message));
        assert_eq!(matches!(refusal, Refusal::Forbidden(_)), is, "{refusal:?}");
        assert_eq!(matches!(refusal, Refusal::Invalid(_)), !is, "{refusal:?}");
    }

    #[test]
    fn who_is_to_mend_it() {
        let denied = "admission webhook \"values.example.com\" denied the request: no";
        let of = |code, message| Refusal::from(refused(code, "Forbidden", message));
        assert!(matches!(of(422, "no"), Refusal::Invalid(_)));
        assert!(matches!(of(500, denied), Refusal::Failed(_)));
        let ends = Failure::Refused {
            code: 403,
            reason: "Forbidden".to_owned(),
            message: "no".to_owned(),
            object: String::new(),
            namespace_ends: true,
        };
        assert!(matches!(Refusal::from(ends), Refusal::Failed(_)));
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
            // Words of ours that a value might happen to hold are not its content.
            let plain = format!("{:?}", Refusal::from(refused(code, "", "")));
            let (reason, message) = match in_reason {
                true => (quoted.clone(), around),
                false => ("Invalid".to_owned(), format!("{around}{quoted}{around}")),
            };
            let refusal = Refusal::from(refused(code, &reason, &message));
            let said = format!("{refusal:?}");
            let pieces = quoted.as_bytes().windows(6);
            for piece in pieces.filter_map(|piece| std::str::from_utf8(piece).ok()) {
                let ours = plain.contains(piece) || "Invalid".contains(piece.trim());
                prop_assert!(ours || !said.contains(piece), "{piece:?} is in {said:?}");
            }
        }
    }
}
