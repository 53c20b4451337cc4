//! An API server that records requests, and refuses, delays and ignores those that it is told to.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use driver::cluster::Cluster;
use embedded::api::{ApiServer, Call, Reaction};
use serde_json::{Value, json};

use crate::server;

pub(crate) const SECRET: &str = "/api/v1/namespaces/shop/secrets/creds";
pub(crate) const CLASS: &str =
    "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasses/db";

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// A dry run of creating a Secret.
    Trial,
    /// The creation of a Secret.
    Create,
    /// The creation of a Secret that was there before.
    PutBack,
    /// A change of a Secret.
    Patch,
    Delete,
    /// A read of a class.
    Class,
}

/// The answer to the next requests of a kind.
#[derive(Debug, Clone)]
pub(crate) struct Refuse {
    pub(crate) what: What,
    pub(crate) code: u16,
    pub(crate) times: usize,
    pub(crate) message: String,
}

#[derive(Default)]
struct Behavior {
    requests: Vec<String>,
    refusals: Vec<Refuse>,
    takes: Duration,
    hangs: Vec<What>,
}

pub(crate) struct Api {
    server: ApiServer,
    behavior: Arc<Mutex<Behavior>>,
}

impl Api {
    pub(crate) async fn start(dir: &Path) -> (Self, Cluster) {
        let (server, cluster) = server::start(dir).await;
        let behavior = Arc::<Mutex<Behavior>>::default();
        let current = Arc::clone(&behavior);
        server.intercept(move |call| current.lock().unwrap().react(call));
        (Self { server, behavior }, cluster)
    }

    pub(crate) fn put(&self, path: &str, object: Value) {
        self.server.put(path, object).unwrap();
    }

    pub(crate) fn remove(&self, path: &str) {
        self.server.remove(path);
    }

    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.server.get(path)
    }

    /// Returns the requests since the last call.
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.behavior.lock().unwrap().requests)
    }

    /// Returns how many of the requests since the last call of `requests` contain a text.
    pub(crate) fn count(&self, part: &str) -> usize {
        let behavior = self.behavior.lock().unwrap();
        behavior
            .requests
            .iter()
            .filter(|r| r.contains(part))
            .count()
    }

    pub(crate) fn refuse(&self, refusals: Vec<Refuse>) {
        self.behavior.lock().unwrap().refusals = refusals;
    }

    /// Sets how long each answer takes from now on.
    pub(crate) fn takes(&self, time: Duration) {
        self.behavior.lock().unwrap().takes = time;
    }

    /// Sets which requests get no answer from now on, except dry runs.
    pub(crate) fn hangs(&self, what: &[What]) {
        self.behavior.lock().unwrap().hangs = what.to_vec();
    }

    /// Lets a webhook change what is written from now on.
    pub(crate) fn mutate(&self, webhook: impl Fn(&str, &mut Value) + Send + Sync + 'static) {
        self.server.mutate(webhook);
    }

    /// Makes the client of a node that shares nothing with another one.
    pub(crate) async fn client(&self, dir: &Path) -> Cluster {
        let path = dir.join("kubeconfig-of-another");
        std::fs::write(&path, self.server.kubeconfig().await.unwrap()).unwrap();
        Cluster::new(Some(path), "test", "node-2")
    }

    /// Returns the events as text.
    pub(crate) fn events(&self) -> Vec<String> {
        let events = self.server.all("events").into_iter();
        events.map(|event| event.to_string()).collect()
    }

    pub(crate) fn put_class(&self, secret_objects: &Value, resource_version: &str) {
        self.put_class_with(secret_objects, resource_version, &json!({}));
    }

    /// Puts the class with further metadata.
    pub(crate) fn put_class_with(
        &self,
        secret_objects: &Value,
        resource_version: &str,
        metadata: &Value,
    ) {
        let mut object = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
            "metadata": {
                "name": "db", "namespace": "shop", "uid": "class",
                "resourceVersion": resource_version,
            },
            "spec": {"provider": "test", "parameters": {"a": "b"}, "secretObjects": secret_objects},
        });
        let fields = object["metadata"].as_object_mut().unwrap();
        fields.extend(metadata.as_object().unwrap().clone());
        self.put(CLASS, object);
    }

    pub(crate) fn pod(&self, name: &str, owner: Option<(&str, &str)>, phase: &str) {
        let owners = owner.map(|(kind, uid)| {
            json!([{"apiVersion": "x/v1", "kind": kind, "name": uid, "uid": uid, "controller": true}])
        });
        let object = json!({
            "metadata": {"name": name, "uid": format!("uid-{name}"), "ownerReferences": owners},
            "status": {"phase": phase},
        });
        self.put(&format!("/api/v1/namespaces/shop/pods/{name}"), object);
    }

    /// Returns the UIDs of the owners of the Secret.
    pub(crate) fn owners(&self) -> Vec<String> {
        let secret = self.get(SECRET).unwrap();
        let owners = secret["metadata"]["ownerReferences"].as_array().unwrap();
        let uid = |owner: &Value| owner["uid"].as_str().unwrap().to_owned();
        owners.iter().map(uid).collect()
    }
}

impl Behavior {
    fn react(&mut self, call: &Call<'_>) -> Reaction {
        let request = format!("{} {}", call.method, call.uri);
        self.requests.push(request);
        let (path, query) = call.uri.split_once('?').unwrap_or((call.uri, ""));
        let is_trial = query.contains("dryRun");
        let body: Value = serde_json::from_slice(call.body).unwrap_or_default();
        let is_put_back =
            body["metadata"]["annotations"]["secrets-store.csi.k8s.io/refused-type"].is_string();
        let what = match call.method {
            "GET" if path.contains("/secretproviderclasses/") => Some(What::Class),
            "POST" if path.ends_with("/secrets") && is_put_back => Some(What::PutBack),
            "POST" if path.ends_with("/secrets") && is_trial => Some(What::Trial),
            "POST" if path.ends_with("/secrets") => Some(What::Create),
            "PATCH" if path.contains("/secrets/") => Some(What::Patch),
            "DELETE" => Some(What::Delete),
            _ => None,
        };
        let hangs = what.is_some_and(|what| self.hangs.contains(&what)) && !is_trial;
        let reaction = if hangs {
            Reaction::Hang
        } else if let Some(refusal) = what.and_then(|what| self.refusal(what)) {
            refusal
        } else if call.method == "DELETE" && !names_what_it_deletes(&body) {
            server::refuse(409, "Conflict", "no", Some(""))
        } else {
            Reaction::Serve
        };
        Reaction::Delay(self.takes, Box::new(reaction))
    }

    /// Returns the refusal of a request, if it is to be refused.
    fn refusal(&mut self, what: What) -> Option<Reaction> {
        let mut refusals = self.refusals.iter_mut();
        let refuse = refusals.find(|refuse| refuse.what == what && refuse.times > 0)?;
        refuse.times -= 1;
        let (code, message) = (refuse.code, &refuse.message);
        Some(server::refuse(code, "Refused", message, Some("")))
    }
}

/// Returns whether a request deletes one state of one object only.
fn names_what_it_deletes(body: &Value) -> bool {
    let preconditions = &body["preconditions"];
    preconditions["uid"].is_string() && preconditions["resourceVersion"].is_string()
}
