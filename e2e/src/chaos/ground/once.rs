//! The kinds of requests that the driver sends to the API server, and the single one that fails.

use std::collections::BTreeSet;
use std::time::Duration;

use embedded::api::{Call, Reaction};

use super::super::good::How;
use super::api_faults::refusal;

/// The time without an answer, as long as the driver waits for one.
const SILENCE: Duration = Duration::from_secs(15);
/// The ways in which a request fails: an error, a request for patience, a connection that breaks, a change that
/// another one has overtaken, and no answer.
const FAILURES: [&str; 5] = ["500", "429", "cut", "conflict", "silence"];
const CONFLICT: usize = 3;

/// The kinds of requests that there were, and the one of which the next request fails.
#[derive(Default)]
pub(super) struct Once {
    /// As `patch secrets`.
    kinds: BTreeSet<String>,
    armed: Option<(String, usize)>,
}

impl Once {
    /// Lets the next request of a kind fail. Returns what that is; none before the first request.
    pub(super) fn arm(&mut self, kind: usize, how: usize) -> Option<(String, How)> {
        let how = how % FAILURES.len();
        // Nothing overtakes what changes nothing that is there.
        let changes = |kind: &&String| kind.starts_with("put ") || kind.starts_with("patch ");
        let kinds = self.kinds.iter();
        let kinds: Vec<&String> = kinds
            .filter(|kind| how != CONFLICT || changes(kind))
            .collect();
        let kind = (*kinds.get(kind % kinds.len().max(1))?).clone();
        let name = FAILURES.get(how).copied().unwrap_or_default();
        let text = format!("{kind}, {name}");
        self.armed = Some((kind, how));
        let how = match how {
            CONFLICT => How::Overtaken,
            how if how == FAILURES.len() - 1 => How::Silently,
            _ => How::AtOnce,
        };
        Some((text, how))
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
            CONFLICT => refusal(409, "Conflict"),
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
        let armed = once.arm(7, 7);
        assert_eq!(armed, Some(("patch secrets, cut".to_owned(), How::AtOnce)));
        assert_eq!(once.strike(&call("GET", class)), None);
        assert!(once.is_armed());
        let patch = call("PATCH", "/api/v1/namespaces/other/secrets/s");
        assert_eq!(once.strike(&patch), Some(Reaction::Close));
        assert_eq!(once.strike(&patch), None);
        assert!(once.disarm());
        for (kind, how, expected) in [(0, 4, How::Silently), (0, 0, How::AtOnce)] {
            assert_eq!(once.arm(kind, how).map(|(_, how)| how), Some(expected));
        }
        let conflicts = [0, 1].map(|kind| once.arm(kind, CONFLICT));
        let expected = [
            "patch secrets, conflict",
            "put secretproviderclasspodstatuses/status, conflict",
        ];
        assert_eq!(
            conflicts,
            expected.map(|text| Some((text.to_owned(), How::Overtaken)))
        );
        assert!(!once.disarm());
    }
}
