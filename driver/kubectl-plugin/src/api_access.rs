//! Tells from the driver's words why it cannot ask the API server, and what those who run the driver do about it.

use kube::ResourceExt as _;

use crate::installation::Installed;

/// Why the driver cannot ask the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cause {
    /// Its pod has no service account token.
    NoToken,
    /// The API server does not accept its token.
    Credentials,
    /// It does not trust the certificate of the API server.
    Certificate,
    /// It does not find the address of the API server.
    Name,
    /// Nothing answers.
    Network,
}

/// Pieces of the driver's words about a request to the API server, in lower case, and what they mean. The first one that
/// fits counts.
const CAUSES: &[(&str, Cause)] = &[
    (
        "run in a cluster with a service account token",
        Cause::NoToken,
    ),
    (
        "does not accept the driver's credentials",
        Cause::Credentials,
    ),
    ("certificate", Cause::Certificate),
    ("unknownissuer", Cause::Certificate),
    ("dns error", Cause::Name),
    ("failed to lookup address", Cause::Name),
    ("name resolution", Cause::Name),
];

/// What the driver says where it has no answer of the API server.
const AWAY: [&str; 2] = [
    "cannot connect to the api server",
    "the api server did not answer",
];

impl Cause {
    /// Finds out why, if that is what the driver says. What a provider answers is about its own requests.
    pub(crate) fn of(said: &str) -> Option<Self> {
        let lower = said.to_lowercase();
        let is_away = AWAY.iter().any(|words| lower.contains(words));
        let is_of_token = lower.contains("does not accept the driver's credentials");
        if said.contains(" answered ") || !is_away && !is_of_token {
            return None;
        }
        let mut causes = CAUSES.iter();
        let found = causes.find(|(piece, _)| lower.contains(piece));
        Some(found.map_or(Self::Network, |(_, cause)| *cause))
    }

    /// Says it of the driver, and what to do.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::NoToken => {
                "the driver cannot ask the API server: its pod has no service account token; set automountServiceAccountToken: true in the pod template of its DaemonSet"
            }
            Self::Credentials => {
                "the API server does not accept the driver's service account token; restart the driver's pod, which gives it a new one"
            }
            Self::Certificate => {
                "the driver does not trust the certificate of the API server; compare the CA in ConfigMap kube-root-ca.crt of its namespace with the cluster's, and restart the driver's pod"
            }
            Self::Name => {
                "the driver does not find the address of the API server; look at the DNS of the node, and at dnsPolicy and KUBERNETES_SERVICE_HOST of the driver's pod: with hostNetwork it is ClusterFirstWithHostNet that asks the cluster's DNS"
            }
            Self::Network => {
                "the driver gets no answer of the API server; look for a NetworkPolicy of its namespace, a firewall, or a node whose kube-proxy does not run"
            }
        }
    }

    /// Returns the command for those who run the driver. `pod` is the driver's on the node.
    pub(crate) fn command(self, installed: &Installed, pod: Option<&str>) -> String {
        let (namespace, set) = (installed.namespace(), installed.set.name_any());
        let kubectl = format!("kubectl -n {namespace}");
        match (self, pod) {
            (Self::NoToken, _) => format!(
                "{kubectl} patch daemonset {set} --type=merge -p '{{\"spec\":{{\"template\":{{\"spec\":{{\"automountServiceAccountToken\":true}}}}}}}}' # or, of the chart, automountServiceAccountToken=true"
            ),
            (Self::Credentials, Some(pod)) => format!("{kubectl} delete pod {pod}"),
            (Self::Credentials, None) => format!("{kubectl} rollout restart daemonset {set}"),
            (Self::Certificate, _) => {
                format!("{kubectl} get configmap kube-root-ca.crt -o yaml")
            }
            (Self::Name, _) => format!(
                "{kubectl} get daemonset {set} -o yaml | grep -E -A1 'hostNetwork|dnsPolicy|KUBERNETES_SERVICE'"
            ),
            (Self::Network, _) => format!("{kubectl} get networkpolicies"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_the_driver_have_a_cause() {
        let begin = "the API server did not answer: client error (Connect): ";
        for (said, cause) in [
            (
                "cannot connect to the API server: failed to read the in-cluster token; run in a cluster with a service account token, or give --kubeconfig",
                Some(Cause::NoToken),
            ),
            (
                "Unauthorized; the API server does not accept the driver's credentials. Restart the driver's pod",
                Some(Cause::Credentials),
            ),
            (
                &format!("{begin}invalid peer certificate: UnknownIssuer"),
                Some(Cause::Certificate),
            ),
            (
                &format!("{begin}dns error: failed to lookup address information"),
                Some(Cause::Name),
            ),
            (
                &format!("{begin}tcp connect error: Connection refused"),
                Some(Cause::Network),
            ),
            (
                "provider \"vault\" answered UNAVAILABLE: cannot connect to the API server",
                None,
            ),
            ("SecretProviderClass db: parameters not set", None),
            ("x509: certificate of the store is not valid", None),
        ] {
            assert_eq!(Cause::of(said), cause, "{said}");
        }
    }
}
