//! The kinds of requests that the driver sends to the API server, and the single one that fails.

use std::collections::BTreeSet;
use std::time::Duration;

use embedded::api::{Call, Reaction};

use super::api_faults::refusal;

/// The time without an answer, as long as the driver waits for one.
const SILENCE: Duration = Duration::from_secs(15);
/// The ways in which a request fails: an error, a request for patience, a connection that breaks, and no
/// answer.
const FAILURES: [&str; 4] = ["500", "429", "cut", "silence"];

/// The kinds of requests that there were, and the one of which the next request fails.
#[derive(Default)]
pub(super) struct Once {
    /// As `patch secrets`.
    kinds: BTreeSet<String>,
    armed: Option<(String, usize)>,
}

impl Once {
    /// Lets the next request of a kind fail. Returns what that is, and whether it has no answer; none before
    /// the first request.
    pub(super) fn arm(&mut self, kind: usize, how: usize) -> Option<(String, bool)> {
        let number = kind % self.kinds.len().max(1);
        let kind = self.kinds.iter().nth(number)?.clone();
        let how = how % FAILURES.len();
        let name = FAILURES.get(how).copied().unwrap_or_default();
        let text = format!("{kind}, {name}");
        self.armed = Some((kind, how));
        Some((text, how == FAILURES.len() - 1))
    }

    /// Returns whether the request has not come yet.
    pub(super) fn is_armed(&self) -> bool {
        self.armed.is_some()
    }

    /// Lets no request fail any more. Returns whether one has failed.
    pub(super) fn disarm(&mut self) -> bool {
        self.armed.take().is_none()
    }

    /// Notes the kind of a request. Returns how it fails, if it does.
    pub(super) fn strike(&mut self, call: &Call<'_>) -> Option<Reaction> {
        let kind = kind_of(call)?;
        let how = self.armed.take_if(|(armed, _)| *armed == kind);
        self.kinds.insert(kind);
        Some(match how?.1 {
            0 => refusal(500, "InternalError"),
            1 => refusal(429, "TooManyRequests"),
            2 => Reaction::Close,
            _ => Reaction::Delay(SILENCE, Box::new(Reaction::Close)),
        })
    }
}

/// Returns the verb and the resource of a request; none for what is no resource.
fn kind_of(call: &Call<'_>) -> Option<String> {
    let path = call.uri.split('?').next().unwrap_or(call.uri);
    let mut parts = path.trim_matches('/').split('/');
    // The version, and before it the name of a group.
    match parts.next() {
        Some("api") => parts.next(),
        Some("apis") => parts.nth(1),
        _ => None,
    }?;
    let mut rest: Vec<&str> = parts.collect();
    if rest.first() == Some(&"namespaces") && rest.len() > 2 {
        rest.drain(..2);
    }
    let resource = rest.first()?;
    let verb = match (call.method, rest.len()) {
        ("GET", 1) => "list",
        (method, _) => &method.to_lowercase(),
    };
    let subresource = rest.get(2).map(|name| format!("/{name}"));
    let subresource = subresource.unwrap_or_default();
    Some(format!("{verb} {resource}{subresource}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(method: &'static str, uri: &'static str) -> Call<'static> {
        Call {
            method,
            uri,
            body: b"",
        }
    }

    #[test]
    fn one_request_of_the_kind_fails_and_the_kinds_are_those_that_came() {
        let mut once = Once::default();
        assert_eq!(once.arm(3, 0), None);
        let group = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/n";
        let class = format!("{group}/secretproviderclasses/c").leak();
        let status = format!("{group}/secretproviderclasspodstatuses/s/status").leak();
        for call in [
            call("PATCH", "/api/v1/namespaces/n/secrets/s?fieldManager=x"),
            call("POST", "/api/v1/namespaces/n/events"),
            call("GET", "/api/v1/namespaces/n/secrets"),
            call("GET", class),
            call("PUT", status),
            call("GET", "/version"),
        ] {
            assert_eq!(once.strike(&call), None);
        }
        let kinds: Vec<&str> = once.kinds.iter().map(String::as_str).collect();
        let expected = [
            "get secretproviderclasses",
            "list secrets",
            "patch secrets",
            "post events",
            "put secretproviderclasspodstatuses/status",
        ];
        assert_eq!(kinds, expected);
        let armed = once.arm(7, 6);
        assert_eq!(armed, Some(("patch secrets, cut".to_owned(), false)));
        assert_eq!(once.strike(&call("GET", class)), None);
        assert!(once.is_armed());
        let patch = call("PATCH", "/api/v1/namespaces/other/secrets/s");
        assert_eq!(once.strike(&patch), Some(Reaction::Close));
        assert_eq!(once.strike(&patch), None);
        assert!(once.disarm());
        assert_eq!(once.arm(0, 3).map(|(_, is_silent)| is_silent), Some(true));
        assert!(!once.disarm());
    }
}
