//! A minimal API server: it stores objects by path, records requests and who added an owner to a
//! Secret, and refuses what it is told to refuse.

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, Uri},
};
use driver::cluster::Cluster;
use serde_json::{Value, json};
use tokio::net::TcpListener;

pub(crate) const SECRET: &str = "/api/v1/namespaces/shop/secrets/creds";
pub(crate) const CLASS: &str =
    "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasses/db";

/// The driver's field manager.
const MANAGER: &str = "csi-secrets-store";

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// A dry run of creating a Secret.
    Trial,
    /// The creation of a Secret.
    Create,
    /// The creation of a Secret that was there before.
    PutBack,
    Delete,
    Patch,
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
struct Stored {
    objects: BTreeMap<String, Value>,
    requests: Vec<String>,
    refusals: Vec<Refuse>,
    revision: u64,
    events: Vec<String>,
    takes: Duration,
    hangs: bool,
}

#[derive(Clone, Default)]
pub(crate) struct Api(Arc<Mutex<Stored>>);

impl Api {
    pub(crate) async fn start(dir: &Path) -> (Self, Cluster) {
        let api = Self::default();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(api.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {}}],
        });
        let path = dir.join("kubeconfig");
        fs::write(&path, kubeconfig.to_string()).unwrap();
        (api, Cluster::new(Some(path), "test", "node-1"))
    }

    pub(crate) fn put(&self, path: &str, object: Value) {
        self.0
            .lock()
            .unwrap()
            .objects
            .insert(path.to_owned(), object);
    }

    pub(crate) fn remove(&self, path: &str) {
        self.0.lock().unwrap().objects.remove(path);
    }

    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.0.lock().unwrap().objects.get(path).cloned()
    }

    /// Returns the requests since the last call.
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().requests)
    }

    /// Returns how many of the requests since the last call of `requests` contain a text.
    pub(crate) fn count(&self, part: &str) -> usize {
        let state = self.0.lock().unwrap();
        state.requests.iter().filter(|r| r.contains(part)).count()
    }

    pub(crate) fn refuse(&self, refusals: Vec<Refuse>) {
        self.0.lock().unwrap().refusals = refusals;
    }

    /// Sets how long each answer takes from now on.
    pub(crate) fn takes(&self, time: Duration) {
        self.0.lock().unwrap().takes = time;
    }

    /// Sets whether requests to create a Secret get no answer from now on, except dry runs.
    pub(crate) fn hangs(&self, hangs: bool) {
        self.0.lock().unwrap().hangs = hangs;
    }

    /// Returns the bodies of the events that were posted.
    pub(crate) fn events(&self) -> Vec<String> {
        self.0.lock().unwrap().events.clone()
    }

    pub(crate) fn put_class(&self, secret_objects: &Value, resource_version: &str) {
        let object = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
            "metadata": {
                "name": "db", "namespace": "shop", "uid": "class",
                "resourceVersion": resource_version,
            },
            "spec": {"provider": "test", "parameters": {"a": "b"}, "secretObjects": secret_objects},
        });
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

impl Stored {
    /// Returns the refusal of a request, if it is to be refused.
    fn refusal(&mut self, what: What) -> Option<(StatusCode, String)> {
        let next = self.refusals.iter_mut();
        let due = next.filter(|refuse| refuse.what == what && refuse.times > 0);
        let refuse = due.into_iter().next()?;
        refuse.times -= 1;
        let code = StatusCode::from_u16(refuse.code).unwrap();
        Some(status(code, "Refused", &refuse.message, ""))
    }

    /// Stores an object at the next revision. Owners that were not there before are the driver's.
    fn write(&mut self, path: &str, mut object: Value) -> Value {
        self.revision += 1;
        let before = self.objects.get(path);
        let owners = |object: &Value| -> Vec<String> {
            let owners = object["metadata"]["ownerReferences"].as_array();
            let keys = owners.into_iter().flatten();
            keys.map(|owner| json!({"uid": owner["uid"]}).to_string())
                .collect()
        };
        let there = before.map(owners).unwrap_or_default();
        let mut entry = json!({
            "manager": MANAGER, "operation": "Update", "apiVersion": "v1",
            "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": {"f:ownerReferences": {}}},
        });
        if let Some(earlier) = before.map(|b| b["metadata"]["managedFields"][0].clone())
            && earlier.is_object()
        {
            entry = earlier;
        }
        for key in owners(&object).iter().filter(|key| !there.contains(key)) {
            entry["fieldsV1"]["f:metadata"]["f:ownerReferences"][format!("k:{key}")] = json!({});
        }
        object["metadata"]["managedFields"] = json!([entry]);
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        if before.is_none() {
            object["metadata"]["uid"] = json!(format!("made-{}", self.revision));
        }
        self.objects.insert(path.to_owned(), object.clone());
        object
    }
}

fn status(code: StatusCode, reason: &str, message: &str, name: &str) -> (StatusCode, String) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": code.as_u16(), "reason": reason, "message": message, "details": {"name": name}});
    (code, status.to_string())
}

fn merge(into: &mut Value, patch: &Value) {
    match patch.as_object() {
        Some(patch) => patch.iter().for_each(|(key, value)| match value {
            Value::Null => drop(into.as_object_mut().unwrap().remove(key)),
            value => merge(&mut into[key], value),
        }),
        None => *into = patch.clone(),
    }
}

async fn answer(
    State(api): State<Api>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> (StatusCode, String) {
    let (takes, hangs) = {
        let mut state = api.0.lock().unwrap();
        state.requests.push(format!("{method} {uri}"));
        (state.takes, state.hangs)
    };
    tokio::time::sleep(takes).await;
    let is_trial = uri.query().is_some_and(|query| query.contains("dryRun"));
    if hangs && method == Method::POST && uri.path().ends_with("/secrets") && !is_trial {
        return std::future::pending().await;
    }
    let mut state = api.0.lock().unwrap();
    let path = uri.path().to_owned();
    let name = path.rsplit('/').next().unwrap_or_default();
    let missing = status(StatusCode::NOT_FOUND, "NotFound", "no", name);
    let read = |body: &Bytes| -> Value { serde_json::from_slice(body).unwrap() };
    match method {
        Method::GET => {
            if path.contains("/secretproviderclasses/")
                && let Some(refused) = state.refusal(What::Class)
            {
                return refused;
            }
            match state.objects.get(&path) {
                Some(object) => (StatusCode::OK, object.to_string()),
                None => missing,
            }
        }
        Method::POST if path.ends_with("/secrets") => {
            let object = read(&body);
            let annotations = &object["metadata"]["annotations"];
            let what = match annotations.get("secrets-store.csi.k8s.io/refused-type") {
                Some(_) => What::PutBack,
                None if is_trial => What::Trial,
                None => What::Create,
            };
            if let Some(refused) = state.refusal(what) {
                return refused;
            }
            let name = object["metadata"]["name"].as_str().unwrap();
            let at = format!("{path}/{name}");
            if state.objects.contains_key(&at) {
                return status(StatusCode::CONFLICT, "AlreadyExists", "no", name);
            }
            if is_trial {
                return (StatusCode::CREATED, object.to_string());
            }
            (StatusCode::CREATED, state.write(&at, object).to_string())
        }
        Method::POST if path.ends_with("/events") => {
            let event = String::from_utf8(body.to_vec()).unwrap();
            state.events.push(event);
            (StatusCode::CREATED, "{}".to_owned())
        }
        Method::DELETE => {
            if let Some(refused) = state.refusal(What::Delete) {
                return refused;
            }
            let asked = &read(&body)["preconditions"];
            let Some(object) = state.objects.get(&path) else {
                return missing;
            };
            let found = &object["metadata"];
            if asked["uid"] != found["uid"] || asked["resourceVersion"] != found["resourceVersion"]
            {
                return status(StatusCode::CONFLICT, "Conflict", "no", name);
            }
            state.revision += 1;
            state.objects.remove(&path);
            (StatusCode::OK, "{}".to_owned())
        }
        Method::PATCH => {
            if let Some(refused) = state.refusal(What::Patch) {
                return refused;
            }
            let Some(mut object) = state.objects.get(&path).cloned() else {
                return missing;
            };
            let mut patch = read(&body);
            let asked = patch["metadata"]["resourceVersion"].take();
            if !asked.is_null() && asked != object["metadata"]["resourceVersion"] {
                return status(StatusCode::CONFLICT, "Conflict", "no", name);
            }
            merge(&mut object, &patch);
            (StatusCode::OK, state.write(&path, object).to_string())
        }
        _ => (StatusCode::CREATED, "{}".to_owned()),
    }
}
