//! Says what to do about an error of a mount, a refresh or a Secret: the command depends on who can mend it.

use kube::ResourceExt as _;

use super::{Then, paths::is_clash, refuser::Refuser};
use crate::{
    api_access::Cause,
    explain::facts::{Facts, VolumeFacts},
    installation::DRIVER,
    lint::names::closest,
};

/// What the provider says when its store is away, and not when it refuses what the class asks for.
const AWAY: [&str; 3] = ["UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"];

/// Who can mend an error.
#[derive(Clone, Copy)]
enum Mender {
    /// Who writes the class.
    Class,
    /// The same: two of its objects want one path.
    Paths,
    /// The same: its provider is misspelt.
    NameOfProvider,
    /// Who writes the pod.
    Pod,
    /// Who installs the driver: the provider gets no token.
    Tokens,
    /// Whoever mends it, the provider's log says more.
    Provider,
    /// Who runs the driver: it cannot ask the API server.
    Access(Cause),
    /// Nobody in particular.
    Driver,
}

/// Pieces of messages of the driver, in lower case, and who can mend what they say. The first one that fits counts.
const MENDERS: &[(&str, Mender)] = &[
    ("no service account token was sent", Mender::Tokens),
    ("volumeattributes is wrong", Mender::Pod),
    ("resembles a key of kubelet", Mender::Pod),
    ("is not a group id", Mender::Pod),
    ("parameters not set", Mender::Class),
    ("missing object versions", Mender::Class),
    ("maxcallrecvmsgsize", Mender::Class),
    ("is refused: the path", Mender::Class),
    ("is refused: a name", Mender::Class),
];

/// Returns what to do about an error of a mount or a refresh. The driver's log has the same words once more, so
/// it is for errors of the driver itself.
pub(super) fn after_refusal(facts: &Facts, volume: &VolumeFacts, said: Option<&str>) -> Then {
    let said = said.unwrap_or_default();
    if let Some(refuser) = refuser(said) {
        return after_denial(facts, refuser, said);
    }
    // Whoever says so: the class lacks what each needs.
    if super::volume::class_fields(facts, volume).is_some() {
        return facts.edit_class(volume).into();
    }
    match mender(facts, said) {
        Mender::Class => facts.show_class(volume).into(),
        Mender::NameOfProvider | Mender::Paths => facts.edit_class(volume).into(),
        Mender::Pod => facts.describe().into(),
        Mender::Tokens => format!("kubectl get csidriver {DRIVER} -o yaml").into(),
        Mender::Provider => facts.pods_of_node(),
        Mender::Access(cause) => facts.access(cause),
        Mender::Driver => facts.driver_log(),
    }
}

/// Returns whether what the driver says of a Secret is for those who write the class: nobody refuses it, and its own
/// words are about what the class asks for.
pub(super) fn is_of_class(facts: &Facts, said: &str) -> bool {
    refuser(said).is_none() && matches!(mender(facts, said), Mender::Driver | Mender::Class)
}

/// Returns whether a change of the class may mend an error of a mount.
pub(super) fn may_be_of_class(facts: &Facts, said: &str) -> bool {
    let mender = mender(facts, said);
    refuser(said).is_none()
        && matches!(
            mender,
            Mender::Class | Mender::Paths | Mender::NameOfProvider
        )
}

/// Returns who refused what the driver asked for. A provider may speak of its own rights and quotas.
fn refuser(said: &str) -> Option<Refuser<'_>> {
    Refuser::of(said).filter(|_| !said.contains(" answered "))
}

/// Returns what to do about a request that was refused: the one who refuses it knows why.
fn after_denial(facts: &Facts, refuser: Refuser<'_>, said: &str) -> Then {
    const HOOKS: &str = "validatingwebhookconfigurations,mutatingwebhookconfigurations";
    let is_of_secrets = said.contains("resource \"secrets\"") || said.contains("may write Secrets");
    match refuser {
        // kubelet asks for the pod's tokens and the Secret of nodePublishSecretRef itself.
        Refuser::Rights if said.contains("User \"system:node:") => facts.describe().into(),
        Refuser::Rights if is_of_secrets => facts.grant(
            "syncSecret.enabled",
            "optional/rbac-secretprovidersyncing.yaml",
        ),
        Refuser::Rights => facts.grant("rbac.install", "rbac-secretproviderclass.yaml"),
        Refuser::Quota(name) => {
            format!("{} describe quota {name}", facts.kubectl()).trim_end().into()
        }
        Refuser::Namespace => {
            let namespace = facts.pod.namespace().unwrap_or_default();
            format!("kubectl get namespace {namespace} -o yaml").into()
        }
        Refuser::Policy(resource, kind, name) => facts.ask(
            &format!("{kind} {name}"),
            &format!("kubectl get {resource} {name} -o yaml"),
        ),
        Refuser::Webhook(name, _) => facts.ask(
            &format!("admission webhook {name}"),
            &format!(
                "kubectl get {HOOKS} -o custom-columns='KIND:.kind,NAME:.metadata.name,WEBHOOKS:.webhooks[*].name,SERVICES:.webhooks[*].clientConfig.service.name' | grep {name}"
            ),
        ),
        Refuser::Other => facts.ask(
            "the admission of this cluster",
            &format!("kubectl get validatingadmissionpolicies,{HOOKS}"),
        ),
    }
}

fn mender(facts: &Facts, said: &str) -> Mender {
    if is_clash(said) {
        return Mender::Paths;
    }
    // Whether nothing answers may be over soon, and the driver's log says more.
    if let Some(cause) = Cause::of(said).filter(|cause| *cause != Cause::Network) {
        return Mender::Access(cause);
    }
    let lower = said.to_lowercase();
    // A provider may speak of its own rights and quotas.
    let answer = said.split_once(" answered ").map(|(_, answer)| answer);
    let of_driver = MENDERS.iter().find(|(piece, mender)| {
        let may_be = answer.is_none() || matches!(mender, Mender::Tokens | Mender::Class);
        may_be && lower.contains(piece)
    });
    if let Some((_, mender)) = of_driver {
        return *mender;
    }
    if lower.contains("has no socket") {
        return without_socket(facts, said);
    }
    if said.contains("provider \"") || said.contains("provider's log") {
        let code = answer.and_then(|answer| answer.split([':', ' ']).next());
        let is_refusal = code.is_some_and(|code| {
            let is_code = code.bytes().all(|c| c.is_ascii_uppercase() || c == b'_');
            is_code && !AWAY.contains(&code)
        });
        return match is_refusal {
            true => Mender::Class,
            false => Mender::Provider,
        };
    }
    let of_class = ["secretproviderclass", "parameters", "attribute"];
    match of_class.iter().any(|words| lower.contains(words)) {
        true => Mender::Class,
        false => Mender::Driver,
    }
}

/// Returns who can mend that a provider has no socket. The message has the sockets that are there: for someone who
/// may not look at the driver, one of them is what the class should name.
fn without_socket(facts: &Facts, said: &str) -> Mender {
    let name = said.split("provider \"").nth(1);
    let name = name.and_then(|rest| rest.split('"').next());
    let there = said.split_once("the sockets there are: ");
    let names: Vec<_> = there
        .into_iter()
        .flat_map(|(_, rest)| rest.split([',', ' ']))
        .filter_map(|name| name.trim_end_matches('.').strip_suffix(".sock"))
        .collect();
    let is_meant = name.is_some_and(|name| closest(name, &names).is_some());
    match is_meant || facts.may_not_see_the_driver() && !names.is_empty() {
        true => Mender::NameOfProvider,
        false => Mender::Provider,
    }
}
