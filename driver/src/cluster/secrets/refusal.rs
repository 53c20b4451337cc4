//! Says what refuses a Secret, in words that cannot contain its content.
//!
//! The API server itself begins a refusal with a sentence that names the webhook, the policy or the
//! quota. Only those names are taken from the message, only from that sentence, and only if they
//! share nothing with the values. A field is named if it is one of a fixed list.

use std::fmt::{self, Write as _};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use super::super::request::Failure;
use crate::{record::is_object_name, secret::Secret};

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

/// The fields of a Secret that the API server checks.
const FIELDS: [&str; 7] = [
    "data",
    "type",
    "immutable",
    "metadata.name",
    "metadata.labels",
    "metadata.annotations",
    "metadata.ownerReferences",
];

/// The number of bytes that a name may not share with a value: fewer say nothing of it, unless they
/// are the whole value.
const PIECE: usize = 6;

/// The Secret that a refused request was about.
pub(super) struct Subject<'a> {
    /// The namespace.
    pub(super) namespace: &'a str,
    /// The name.
    pub(super) name: &'a str,
    /// The values that a message may quote: those that are written, and those that are there.
    pub(super) values: Vec<&'a Secret>,
}

/// Describes a failure without repeating what the API server says, except for names of objects of
/// the cluster. Without a subject, no name is taken.
pub(super) fn describe(failure: &Failure, subject: Option<&Subject<'_>>) -> String {
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
    let refuser = subject.and_then(|subject| {
        let refuser = Refuser::of(message)?;
        refuser.may_be_named(subject).then_some(refuser)
    });
    let (answer, the_rest) = match &refuser {
        Some(refuser) => (format!("{refuser}, {answer}"), "the rest of the message"),
        None => (answer, "the message"),
    };
    let help = subject.map(|subject| help(*code, refuser.as_ref(), subject));
    format!(
        "{answer}; {the_rest} is not repeated because it may quote the content{}",
        help.unwrap_or_default()
    )
}

/// Returns the end of a sentence that says how to learn more of a refusal.
fn help(code: u16, refuser: Option<&Refuser<'_>>, subject: &Subject<'_>) -> String {
    let (namespace, name) = (subject.namespace, subject.name);
    let asked = match refuser {
        Some(Refuser::Quota(quota)) => {
            return format!(". To see it: kubectl describe quota -n {namespace} {quota}");
        }
        // The class does not set these.
        Some(Refuser::Field("immutable" | "metadata.ownerReferences")) => return String::new(),
        Some(Refuser::Field(_)) => {
            return ". Correct what the class says of it in the entry of secretObjects".to_owned();
        }
        Some(Refuser::WebhookAway(_)) => return ". Look at the webhook's pods".to_owned(),
        Some(Refuser::Webhook(_)) => "the webhook",
        Some(Refuser::Policy { .. }) => "the policy",
        None if matches!(code, 400 | 403 | 422) => "the cluster",
        None => return String::new(),
    };
    format!(
        ". To read it, try other content: kubectl create secret generic -n {namespace} {name} --from-literal=KEY=x --dry-run=server. Or ask those who run {asked}"
    )
}

/// The part of a cluster that refuses a Secret, as the API server names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refuser<'a> {
    /// An admission webhook.
    Webhook(&'a str),
    /// An admission webhook that did not answer.
    WebhookAway(&'a str),
    /// A policy, and the binding that puts it into force, if the API server names it.
    Policy {
        kind: &'static str,
        name: &'a str,
        binding: Option<&'a str>,
    },
    /// A ResourceQuota.
    Quota(&'a str),
    /// A rule of the API server about this field.
    Field(&'static str),
}

impl fmt::Display for Refuser<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Webhook(name) => write!(f, "admission webhook {name} denied it"),
            Self::WebhookAway(name) => {
                write!(f, "admission webhook {name} could not be called")
            }
            Self::Policy {
                kind,
                name,
                binding,
            } => {
                write!(f, "{kind} {name}")?;
                if let Some(binding) = binding {
                    write!(f, " with binding {binding}")?;
                }
                f.write_str(" denied it")
            }
            Self::Quota(name) => write!(f, "ResourceQuota {name} is used up"),
            Self::Field(name) => write!(f, "its field {name} is not accepted"),
        }
    }
}

impl<'a> Refuser<'a> {
    /// Reads the sentence with which the API server itself begins a message.
    fn of(message: &'a str) -> Option<Self> {
        if let Some(rest) = message.strip_prefix("admission webhook \"") {
            return webhook(rest, "\" denied the request").map(Self::Webhook);
        }
        let away = "Internal error occurred: failed calling webhook \"";
        if let Some(rest) = message.strip_prefix(away) {
            return webhook(rest, "\"").map(Self::WebhookAway);
        }
        if let Some(told) = forbidden(message) {
            if let Some(rest) = told.strip_prefix("exceeded quota: ") {
                return name(rest, ", requested: ").map(|(quota, _)| Self::Quota(quota));
            }
            let kind = "ValidatingAdmissionPolicy";
            return Self::of_policy(kind, told.strip_prefix(kind)?.strip_prefix(" '")?);
        }
        // A MutatingAdmissionPolicy, and either kind that is not configured well.
        match message.strip_prefix("policy '") {
            Some(rest) => Self::of_policy("admission policy", rest),
            None => field(message).map(Self::Field),
        }
    }

    /// Reads the names of a policy and its binding.
    fn of_policy(kind: &'static str, told: &'a str) -> Option<Self> {
        let (names, _) = told.split_once("' denied request: ")?;
        let (policy, binding) = match names.split_once("' with binding '") {
            Some((policy, binding)) => (policy, Some(binding)),
            None => (names, None),
        };
        let are_names = is_object_name(policy) && binding.is_none_or(is_object_name);
        are_names.then_some(Self::Policy {
            kind,
            name: policy,
            binding,
        })
    }

    /// Returns whether its names are none that a message could quote from a Secret.
    fn may_be_named(&self, subject: &Subject<'_>) -> bool {
        let names = match *self {
            Self::Webhook(name) | Self::WebhookAway(name) | Self::Quota(name) => [Some(name), None],
            Self::Policy { name, binding, .. } => [Some(name), binding],
            // The words are the driver's own.
            Self::Field(_) => [None, None],
        };
        let mut names = names.into_iter().flatten();
        names.all(|name| !subject.values.iter().any(|value| is_quoted(name, value)))
    }
}

/// Splits a text behind the name of an object with which it begins.
fn name<'a>(text: &'a str, after: &str) -> Option<(&'a str, &'a str)> {
    let (name, rest) = text.split_once(after)?;
    is_object_name(name).then_some((name, rest))
}

/// Returns the name of a webhook at the beginning of a text. It has a domain.
fn webhook<'a>(text: &'a str, after: &str) -> Option<&'a str> {
    let (name, _) = name(text, after)?;
    name.contains('.').then_some(name)
}

/// Returns the field that the API server's own rules refuse, from
/// `Secret "creds" is invalid: metadata.labels: Invalid value: ...`.
fn field(message: &str) -> Option<&'static str> {
    let rest = message.strip_prefix("Secret \"")?;
    let (_, rest) = name(rest, "\" is invalid: ")?;
    // Several are in brackets.
    let rest = rest.strip_prefix('[').unwrap_or(rest);
    let begins = |field: &&&str| {
        let rest = rest.strip_prefix(**field);
        rest.is_some_and(|rest| rest.starts_with([':', '[', '.']))
    };
    FIELDS.iter().find(begins).copied()
}

/// Returns what follows `secrets "creds" is forbidden: ` in a message of the API server. The message
/// of a webhook begins with other words.
pub(super) fn forbidden(message: &str) -> Option<&str> {
    let rest = message.strip_prefix("secrets ")?;
    match rest.strip_prefix('"') {
        Some(rest) => name(rest, "\" is forbidden: ").map(|(_, told)| told),
        None => rest.strip_prefix("is forbidden: "),
    }
}

/// Returns whether a name may come from a value: as it is, in base64 from any of its bytes on, or in
/// hexadecimal digits.
fn is_quoted(name: &str, value: &Secret) -> bool {
    let value = value.expose();
    // No byte above ASCII is in a name; as a character it has two bytes.
    let as_it_is = || {
        let mut text = Zeroizing::new(String::with_capacity(2 * value.len()));
        text.extend(value.trim_ascii().iter().copied().map(char::from));
        is_shared(name, text)
    };
    // Where the other alphabet differs from this one, it has what no name has.
    let encoded = |skip: usize| {
        let rest = value.get(skip..).unwrap_or_default();
        is_shared(name, Zeroizing::new(URL_SAFE_NO_PAD.encode(rest)))
    };
    let in_digits = || {
        let mut digits = Zeroizing::new(String::with_capacity(2 * value.len()));
        let written = value
            .iter()
            .all(|byte| write!(digits, "{byte:02x}").is_ok());
        !written || is_shared(name, digits)
    };
    as_it_is() || (0..3).any(encoded) || in_digits()
}

/// Returns whether a name and a text are equal, or one is in the other, in whatever case. Takes no longer for a
/// text that is nearly the name again and again.
fn is_shared(name: &str, mut text: Zeroizing<String>) -> bool {
    text.make_ascii_lowercase();
    let name = name.to_ascii_lowercase();
    let (short, long) = if name.len() < text.len() {
        (name.as_str(), text.as_str())
    } else {
        (text.as_str(), name.as_str())
    };
    let tells = short.len() >= PIECE || short.len() == long.len();
    tells && !short.is_empty() && long.contains(short)
}

#[cfg(test)]
mod tests;
