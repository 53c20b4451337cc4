//! The API server as the driver sees it during a fault: late, refusing, in conflict, in the past, or
//! gone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use embedded::api::{ApiServer, Call, Reaction};
use serde_json::{Value, json};

use super::super::good::How;
use super::super::lock;
use super::once::Once;

/// The kinds of which a driver may be told the past, with the paths of their groups.
const KINDS: [(&str, &str, &str); 4] = [
    ("pods", "/api/v1", "pods"),
    ("secrets", "/api/v1", "secrets"),
    (
        "secretproviderclasses.secrets-store.csi.x-k8s.io",
        "/apis/secrets-store.csi.x-k8s.io/v1",
        "secretproviderclasses",
    ),
    (
        "secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io",
        "/apis/secrets-store.csi.x-k8s.io/v1",
        "secretproviderclasspodstatuses",
    ),
];

/// How the API server misbehaves.
#[derive(Clone, Debug)]
pub(super) enum ApiFault {
    Slow(Duration),
    Refuses(u16),
    Conflicts,
    NoSecrets,
    Past(BTreeMap<String, Value>),
    Gone,
    Hung {
        until: Instant,
    },
    /// Writes of a namespace wait for its webhook.
    Webhook {
        namespace: String,
        until: Instant,
    },
}

/// The faults that are active, and how often each has struck.
#[derive(Clone, Default)]
pub(super) struct ApiFaults {
    active: Arc<Mutex<BTreeMap<u64, Active>>>,
    once: Arc<Mutex<Once>>,
    writes: Arc<AtomicU64>,
    reads: Arc<AtomicU64>,
}

struct Active {
    fault: ApiFault,
    requests: u64,
    struck: u64,
}

impl ApiFaults {
    /// Lets the faults strike the requests of the pods to an API server.
    pub(super) fn install(&self, api: &ApiServer) {
        let Self {
            active,
            once,
            writes,
            reads,
        } = self.clone();
        api.intercept(move |call| {
            match call.method {
                "GET" => reads.fetch_add(1, Ordering::Relaxed),
                _ if is_event(call.uri) => 0,
                _ => writes.fetch_add(1, Ordering::Relaxed),
            };
            if let Some(reaction) = lock(&once).strike(call) {
                return reaction;
            }
            let mut active = lock(&active);
            let reactions = active.values_mut().filter_map(|active| active.strike(call));
            // A delay is followed by what another fault does.
            reactions.fold(Reaction::Serve, |before, then| match before {
                Reaction::Delay(delay, _) => Reaction::Delay(delay, Box::new(then)),
                Reaction::Serve => then,
                other => other,
            })
        });
    }

    /// Returns the number of writes so far, without those of events.
    pub(super) fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Returns the number of reads so far.
    pub(super) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Lets a single request fail, see [`Once::arm`].
    pub(super) fn arm(&self, kind: usize, how: usize) -> Option<(String, How)> {
        lock(&self.once).arm(kind, how)
    }

    /// Returns whether it has not come yet.
    pub(super) fn is_armed(&self) -> bool {
        lock(&self.once).is_armed()
    }

    /// Returns whether it has failed; if not, none does any more.
    pub(super) fn disarm(&self) -> bool {
        lock(&self.once).disarm()
    }

    /// Begins a fault; returns its number.
    pub(super) fn begin(&self, fault: ApiFault) -> u64 {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let active = Active {
            fault,
            requests: 0,
            struck: 0,
        };
        lock(&self.active).insert(number, active);
        number
    }

    /// Ends a fault; returns how often it has struck.
    pub(super) fn end(&self, number: u64) -> u64 {
        lock(&self.active)
            .remove(&number)
            .map_or(0, |active| active.struck)
    }
}

/// Returns the objects of now, by path.
pub(super) fn snapshot(api: &ApiServer) -> BTreeMap<String, Value> {
    let mut objects = BTreeMap::new();
    for (kind, group, plural) in KINDS {
        for object in api.all(kind) {
            let metadata = &object["metadata"];
            let (namespace, name) = (&metadata["namespace"], &metadata["name"]);
            let namespace = namespace.as_str().unwrap_or_default();
            let name = name.as_str().unwrap_or_default();
            let path = format!("{group}/namespaces/{namespace}/{plural}/{name}");
            objects.insert(path, object);
        }
    }
    objects
}

impl Active {
    fn strike(&mut self, call: &Call<'_>) -> Option<Reaction> {
        self.requests += 1;
        let is_second = self.requests.is_multiple_of(2);
        let is_read = call.method == "GET";
        let reaction = match &self.fault {
            ApiFault::Slow(by) => Some(Reaction::Delay(*by, Box::new(Reaction::Serve))),
            ApiFault::Refuses(status) => is_second.then(|| refusal(*status, "chaos")),
            ApiFault::NoSecrets => {
                (!is_read && writes_secret(call.uri)).then(|| refusal(403, "Forbidden"))
            }
            ApiFault::Conflicts => (is_second && !is_read).then(|| refusal(409, "Conflict")),
            // As of several servers of which one lags behind.
            ApiFault::Past(then) if is_read && looks_random(self.requests) => past(then, call.uri),
            ApiFault::Past(_) => None,
            ApiFault::Gone => Some(Reaction::Close),
            // The connection breaks when the server is back.
            ApiFault::Hung { until } => Some(Reaction::Delay(
                until.saturating_duration_since(Instant::now()),
                Box::new(Reaction::Close),
            )),
            ApiFault::Webhook { namespace, until } => (!is_read && is_in(call.uri, namespace))
                .then(|| {
                    let left = until.saturating_duration_since(Instant::now());
                    Reaction::Delay(left, Box::new(refusal(500, "InternalError")))
                }),
        };
        self.struck += u64::from(reaction.is_some());
        reaction
    }
}

/// Returns a bit of a number that has no pattern, so that no kind of request always has the same one.
fn looks_random(number: u64) -> bool {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) & 1 == 1
}

fn writes_secret(uri: &str) -> bool {
    let path = uri.split('?').next().unwrap_or(uri);
    let mut parts = path.trim_start_matches('/').split('/');
    parts.nth(4) == Some("secrets")
}

fn is_event(uri: &str) -> bool {
    let path = uri.split('?').next().unwrap_or(uri);
    path.split('/').any(|part| part == "events")
}

fn is_in(uri: &str, namespace: &str) -> bool {
    let path = uri.split('?').next().unwrap_or(uri);
    let mut parts = path.split('/').skip_while(|part| *part != "namespaces");
    parts.nth(1) == Some(namespace)
}

/// Returns the answer of a server that does not know yet what happened since.
fn past(then: &BTreeMap<String, Value>, uri: &str) -> Option<Reaction> {
    let path = uri.split('?').next().unwrap_or(uri);
    if let Some(object) = then.get(path) {
        return Some(Reaction::Answer(200, object.to_string()));
    }
    let is_object = KINDS.iter().any(|(_, group, plural)| {
        let rest = path.strip_prefix(group).unwrap_or_default();
        let parts: Vec<&str> = rest.trim_start_matches('/').split('/').collect();
        matches!(parts[..], ["namespaces", _, kind, _] if kind == *plural)
    });
    is_object.then(|| refusal(404, "NotFound"))
}

pub(super) fn refusal(status: u16, reason: &str) -> Reaction {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "reason": reason, "message": "a fault of the run", "code": status,
    });
    Reaction::Answer(status, body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_past_has_its_objects_and_no_later_ones() {
        let group = "/apis/secrets-store.csi.x-k8s.io/v1";
        let path = format!("{group}/namespaces/n/secretproviderclasses/alpha");
        let then = BTreeMap::from([(path.clone(), json!({"old": true}))]);
        let answer = |uri: &str| past(&then, uri);
        assert_eq!(
            answer(&path),
            Some(Reaction::Answer(200, json!({"old": true}).to_string()))
        );
        let Some(Reaction::Answer(404, _)) = answer("/api/v1/namespaces/n/secrets/new?x=1") else {
            panic!("a Secret that was made later is there");
        };
        assert_eq!(answer("/api/v1/namespaces/n/secrets"), None);
        assert_eq!(answer("/api"), None);
    }

    #[test]
    fn the_namespace_of_a_write_is_recognized() {
        let group = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces";
        assert!(is_in(&format!("{group}/n/secretproviderclasses/c"), "n"));
        assert!(is_in("/api/v1/namespaces/n/events?fieldManager=x", "n"));
        assert!(!is_in("/api/v1/namespaces/other/secrets/n", "n"));
        assert!(!is_in("/api/v1/nodes/n", "n"));
    }

    #[test]
    fn writes_of_secrets_are_recognized() {
        assert!(writes_secret("/api/v1/namespaces/n/secrets"));
        assert!(writes_secret(
            "/api/v1/namespaces/n/secrets/one?fieldManager=x"
        ));
        assert!(!writes_secret("/api/v1/namespaces/secrets/pods"));
        assert!(!writes_secret("/api/v1/namespaces/secrets"));
    }
}
