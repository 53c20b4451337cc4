//! Tells who refuses what the driver writes: the API server names what denied a request, and for each of them somebody
//! else is to be asked.

/// Who refuses a request, as the API server or the driver says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refuser<'a> {
    /// The driver lacks a right (RBAC).
    Rights,
    /// A policy of admission: its resource, for kubectl, its kind, and its name.
    Policy(&'static str, &'static str, &'a str),
    /// An admission webhook, by its name, and whether it did not answer.
    Webhook(&'a str, bool),
    /// A ResourceQuota.
    Quota(&'a str),
    /// The namespace, which is being deleted.
    Namespace,
    /// Something that the API server does not name.
    Other,
}

/// Makes a refuser of its name.
type Named = fn(&str) -> Refuser<'_>;

/// Words before the name of what refuses, those behind it, and what it is. The first that stands earliest in the text
/// counts: the message of a policy or a webhook may quote others.
const WORDS: &[(&str, &str, Named)] = &[
    ("ValidatingAdmissionPolicy '", "' ", validating),
    ("policy '", "' ", mutating),
    ("admission webhook \"", "\" denied the request", denied),
    ("failed calling webhook \"", "\"", away),
    ("exceeded quota: ", ", requested", |name| {
        Refuser::Quota(name)
    }),
    ("is forbidden: User \"", "\" cannot ", |_| Refuser::Rights),
    ("being terminated", "", |_| Refuser::Namespace),
    // The words of the driver where the message is not repeated.
    ("ValidatingAdmissionPolicy ", " ", validating),
    ("admission policy ", " ", mutating),
    ("admission webhook ", " denied it", denied),
    ("admission webhook ", " could not be called", away),
    ("ResourceQuota ", " is used up", |name| Refuser::Quota(name)),
    ("the namespace is being deleted", "", |_| Refuser::Namespace),
    ("The driver may write Secrets only", "", |_| Refuser::Rights),
    ("lacks this right", "", |_| Refuser::Rights),
    ("exceeded quota", "", |_| Refuser::Quota("")),
    ("is forbidden", "", |_| Refuser::Other),
];

fn validating(name: &str) -> Refuser<'_> {
    Refuser::Policy(
        "validatingadmissionpolicy",
        "ValidatingAdmissionPolicy",
        name,
    )
}

fn mutating(name: &str) -> Refuser<'_> {
    Refuser::Policy("mutatingadmissionpolicy", "MutatingAdmissionPolicy", name)
}

fn denied(name: &str) -> Refuser<'_> {
    Refuser::Webhook(name, false)
}

fn away(name: &str) -> Refuser<'_> {
    Refuser::Webhook(name, true)
}

impl<'a> Refuser<'a> {
    /// Finds out who refused a request, from the words of the API server or of the driver.
    pub(super) fn of(said: &'a str) -> Option<Self> {
        let found = WORDS.iter().filter_map(|(before, after, refuser)| {
            let at = said.find(before)?;
            let rest = &said[at + before.len()..];
            let end = rest.find(after)?;
            // A name has no blanks, and the words of others may be anything.
            let name = rest[..end].trim();
            let is_name = !name.contains(char::is_whitespace);
            is_name.then_some((at, refuser(name)))
        });
        // "is forbidden" stands before what the API server forbids it for.
        let is_vague = |refuser: &Self| *refuser == Self::Other;
        let first = found.min_by_key(|(at, refuser)| (is_vague(refuser), *at));
        first.map(|(_, refuser)| refuser)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts of API servers 1.30 to 1.36, for each kind of object that the driver writes.
    #[test]
    fn each_refusal_names_who_refuses() {
        let objects = [
            "secrets \"creds\"",
            "secrets",
            "secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io \"web-shop-db\"",
            "secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io",
            "events \"web.1\"",
            "events",
        ];
        let user = "User \"system:serviceaccount:kube-system:driver\" cannot create resource \"x\" in API group \"\" in the namespace \"shop\"";
        let policy = "ValidatingAdmissionPolicy 'no-x' with binding 'no-x-here' denied request";
        let no_x = validating("no-x");
        let webhook = "admission webhook \"no.example.com\" denied the request";
        let call = "Internal error occurred: failed calling webhook \"no.example.com\": failed to call webhook: Post \"https://no.example.svc:443/?timeout=10s\": context deadline exceeded";
        for object in objects {
            let forbidden = format!("{object} is forbidden");
            for (said, refuser) in [
                (format!("{forbidden}: {user}"), Refuser::Rights),
                (
                    format!(
                        "{forbidden}: {user}; the driver's ClusterRole lacks this right: set the chart's value"
                    ),
                    Refuser::Rights,
                ),
                (format!("{forbidden}: {policy}: no {object}"), no_x),
                (format!("{forbidden}: {policy}: {forbidden}: {user}"), no_x),
                (
                    format!("{forbidden}: ValidatingAdmissionPolicy 'no-x' denied request: no"),
                    no_x,
                ),
                (
                    format!("policy 'add-x' with binding 'b' denied request: {forbidden}"),
                    mutating("add-x"),
                ),
                (format!("{webhook}: no {object}"), denied("no.example.com")),
                (
                    format!("{webhook}: {forbidden}: {user}"),
                    denied("no.example.com"),
                ),
                (call.to_owned(), away("no.example.com")),
                (
                    format!(
                        "{forbidden}: exceeded quota: few, requested: count/x=1, used: count/x=1, limited: count/x=1"
                    ),
                    Refuser::Quota("few"),
                ),
                (
                    format!(
                        "{forbidden}: unable to create new content in namespace shop because it is being terminated"
                    ),
                    Refuser::Namespace,
                ),
                (format!("{forbidden}: LimitRanger says no"), Refuser::Other),
            ] {
                let said = format!("the pod status cannot be written: {said}");
                assert_eq!(Refuser::of(&said), Some(refuser), "{said}");
            }
        }
    }

    /// The driver does not repeat what the API server says of a Secret, but for names.
    #[test]
    fn the_words_of_the_driver_name_who_refuses() {
        let begin = "SecretProviderClass db, Secret creds: the API server refuses it: ";
        let end = ", HTTP 403 Forbidden; the rest of the message is not repeated because it may quote the content";
        for (said, refuser) in [
            (
                "ValidatingAdmissionPolicy no-x with binding b denied it",
                validating("no-x"),
            ),
            ("admission policy add-x denied it", mutating("add-x")),
            (
                "admission webhook no.example.com denied it",
                denied("no.example.com"),
            ),
            (
                "admission webhook no.example.com could not be called",
                away("no.example.com"),
            ),
            ("ResourceQuota few is used up", Refuser::Quota("few")),
            (
                "the namespace is being deleted, and nothing can be created in it",
                Refuser::Namespace,
            ),
        ] {
            assert_eq!(
                Refuser::of(&format!("{begin}{said}{end}")),
                Some(refuser),
                "{said}"
            );
        }
        assert_eq!(Refuser::of("there is no object quota in the volume"), None);
    }
}
