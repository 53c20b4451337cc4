//! An API server without nodes, in front of which drivers run as processes of this machine: the embedded
//! one, or a real one with etcd and the controllers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use embedded::api::{ApiServer, Call, Disturbance, Reaction};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{self, Node, ServiceAccount};
use kube::api::{Api, PostParams};
use serde_json::{Value, json};

use super::failed;
use crate::binaries::{Binaries, workspace};
use crate::cluster::{Cluster as _, Result, api};
use crate::install::{Form, Installation, NAMESPACE, assets, install};
use crate::local::{self, Running};
use crate::namespace::Namespace;
use crate::previous::allow_what_the_existing_driver_needs;
use crate::real;

/// The driver's service account in `deploy/`.
const ACCOUNT: &str = "secrets-store-csi-driver";
/// The group of classes and pod statuses.
const GROUP: &str = "secrets-store.csi.x-k8s.io";
const TOKEN_SECONDS: i64 = 24 * 60 * 60;
const INSTALL_LIMIT: Duration = Duration::from_secs(60);
/// The namespace of the pods.
const PODS: &str = "measured";

/// Numbers of requests by verb and resource.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Requests(pub(crate) BTreeMap<(String, String), f64>);

impl Requests {
    /// Returns what has come since an earlier count.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let new = |(key, count): (&(String, String), &f64)| {
            let more = count - earlier.0.get(key).copied().unwrap_or(0.0);
            (more > 0.0).then(|| (key.clone(), more))
        };
        Self(self.0.iter().filter_map(new).collect())
    }

    /// Adds other requests.
    pub(crate) fn add(&mut self, other: &Self) {
        for (key, count) in &other.0 {
            *self.0.entry(key.clone()).or_default() += count;
        }
    }

    /// Returns the number of all.
    pub(crate) fn total(&self) -> f64 {
        self.0.values().fold(0.0, |sum, count| sum + count)
    }

    /// Returns the number of those that write.
    pub(crate) fn writes(&self) -> f64 {
        let writes = |((verb, _), _): &(&(String, String), &f64)| {
            !["get", "list", "watch"].contains(&verb.as_str())
        };
        let writes = self.0.iter().filter(writes);
        writes.fold(0.0, |sum, (_, count)| sum + count)
    }
}

/// An API server without nodes, with the definitions and rights of `deploy/`.
pub(crate) struct ControlPlane {
    kind: Kind,
    client: kube::Client,
    namespace: Namespace,
    kubeconfig: PathBuf,
}

enum Kind {
    Embedded(ApiServer, Arc<Mutex<Requests>>),
    Local(Box<Running>),
}

impl ControlPlane {
    /// Starts a real control plane, or else the embedded API server, whose files go to a directory.
    ///
    /// # Errors
    /// When it does not start, or refuses a manifest.
    pub(crate) async fn start(real: bool, binaries: &Binaries, directory: &Path) -> Result<Self> {
        let kubeconfig = directory.join("kubeconfig");
        let mut manifests = Installation::read(&workspace().join("deploy"), &Form::Lean)?.manifests;
        manifests.retain(|manifest| !manifest.contains("kind: DaemonSet"));
        allow_what_the_existing_driver_needs(&mut manifests)?;
        let (kind, client, text) = if real {
            start_local(binaries, manifests).await?
        } else {
            start_embedded(directory, &manifests).await?
        };
        fs::write(&kubeconfig, text).map_err(|error| failed("a kubeconfig", &error))?;
        let plane = Self {
            kind,
            namespace: Namespace::of(client.clone(), PODS),
            client,
            kubeconfig,
        };
        plane.create_namespace().await?;
        Ok(plane)
    }

    /// Returns what it is, and the version of a real one.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) async fn version(&self) -> Result<String> {
        match self.kind {
            Kind::Embedded(..) => Ok("the embedded API server, without TLS".to_owned()),
            Kind::Local(_) => {
                let version = self.client.apiserver_version().await;
                let version = version.map_err(api("the API server's version".to_owned()))?;
                Ok(format!("Kubernetes {} with etcd", version.git_version))
            }
        }
    }

    pub(crate) fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Returns the namespace of the pods.
    pub(crate) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Returns the path of a kubeconfig with the driver's rights; in front of the embedded API server
    /// with all rights.
    pub(crate) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Creates a Node object: a real control plane deletes the pods of nodes that do not exist.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub(crate) async fn create_node(&self, name: &str) -> Result<()> {
        let node = json!({"metadata": {"name": name}});
        let node: Node = serde_json::from_value(node).map_err(|error| failed("a node", &error))?;
        let created = Api::<Node>::all(self.client())
            .create(&PostParams::default(), &node)
            .await;
        created
            .map(drop)
            .map_err(api(format!("create node {name}")))
    }

    /// Returns the numbers of requests since the start: in front of the embedded API server all of the
    /// drivers', from a real one's metrics those for classes, pod statuses and Secrets, and reads of pods.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub(crate) async fn requests(&self) -> Result<Requests> {
        match &self.kind {
            Kind::Embedded(server, seen) => {
                // Its own list would grow with the run.
                server.reset_requests();
                Ok(seen.lock().unwrap_or_else(PoisonError::into_inner).clone())
            }
            Kind::Local(_) => {
                let request = http::Request::get("/metrics")
                    .body(Vec::new())
                    .map_err(|error| failed("the API server's metrics", &error))?;
                let metrics = self.client.request_text(request).await;
                Ok(of_metrics(
                    &metrics.map_err(api("the API server's metrics".to_owned()))?,
                ))
            }
        }
    }

    /// Takes the API server away: connections are refused, or closed without an answer.
    ///
    /// # Errors
    /// When it does not stop.
    pub(crate) fn take_away(&self) -> Result<()> {
        match &self.kind {
            Kind::Embedded(server, _) => {
                server.disturb(Disturbance::Refuse);
                Ok(())
            }
            Kind::Local(running) => tokio::task::block_in_place(|| running.stop_api_server()),
        }
    }

    /// Brings the API server back.
    ///
    /// # Errors
    /// When it does not come back.
    pub(crate) fn bring_back(&self) -> Result<()> {
        match &self.kind {
            Kind::Embedded(server, _) => {
                server.disturb(Disturbance::None);
                Ok(())
            }
            Kind::Local(running) => tokio::task::block_in_place(|| running.start_api_server()),
        }
    }

    async fn create_namespace(&self) -> Result<()> {
        let namespace = json!({"metadata": {"name": PODS}});
        let namespace: v1::Namespace =
            serde_json::from_value(namespace).map_err(|error| failed("a namespace", &error))?;
        let created = Api::<v1::Namespace>::all(self.client())
            .create(&PostParams::default(), &namespace)
            .await;
        created.map_err(api(format!("create namespace {PODS}")))?;
        match self.kind {
            Kind::Embedded(..) => Ok(()),
            Kind::Local(_) => real::wait_namespace(&self.client, PODS).await,
        }
    }
}

async fn start_embedded(
    directory: &Path,
    manifests: &[String],
) -> Result<(Kind, kube::Client, String)> {
    let server = ApiServer::start(&directory.join("api"))
        .await
        .map_err(|error| failed("the API server", &error))?;
    let seen = Arc::new(Mutex::new(Requests::default()));
    let counted = seen.clone();
    server.intercept(move |call| {
        let mut seen = counted.lock().unwrap_or_else(PoisonError::into_inner);
        *seen.0.entry(verb_and_resource(call)).or_default() += 1.0;
        Reaction::Serve
    });
    let kubeconfig = server.kubeconfig().await;
    let kubeconfig = kubeconfig.map_err(|error| failed("the API server's port", &error))?;
    let client = server.client();
    for manifest in manifests {
        embedded::apply(&client, NAMESPACE, manifest).await?;
    }
    Ok((Kind::Embedded(server, seen), client, kubeconfig))
}

async fn start_local(
    binaries: &Binaries,
    manifests: Vec<String>,
) -> Result<(Kind, kube::Client, String)> {
    let options = local::Options {
        assets: assets(),
        installation: Installation {
            manifests: Vec::new(),
            images: Vec::new(),
        },
        guard: Some(binaries.e2e.clone()),
        node: false,
    };
    let started = tokio::task::spawn_blocking(move || Running::start(&options, |_| {})).await;
    let running = started.map_err(|error| failed("the control plane", &error))??;
    let client = running.connect().await?.client();
    install(&client, &manifests, INSTALL_LIMIT).await?;
    let text = with_token(&running.kubeconfig(), &token(&client).await?)?;
    Ok((Kind::Local(Box::new(running)), client, text))
}

/// Returns a token of the driver's service account.
async fn token(client: &kube::Client) -> Result<String> {
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), NAMESPACE);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            expiration_seconds: Some(TOKEN_SECONDS),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let what = || format!("a token of {ACCOUNT}");
    let params = PostParams::default();
    let made = accounts.create_token_request(ACCOUNT, &params, &request);
    let made = made.await.map_err(api(what()))?;
    let token = made.status.and_then(|status| status.token);
    token.ok_or_else(|| failed(&what(), &"the API server made none"))
}

/// Returns an administrator's kubeconfig with a token in place of the certificate.
fn with_token(kubeconfig: &Path, token: &str) -> Result<String> {
    let broken = |error: &dyn std::fmt::Display| {
        failed(&kubeconfig.display().to_string(), &error.to_string())
    };
    let text = fs::read_to_string(kubeconfig).map_err(|error| broken(&error))?;
    let mut config: Value = serde_json::from_str(&text).map_err(|error| broken(&error))?;
    config["users"][0]["user"] = json!({"token": token});
    Ok(config.to_string())
}

/// Returns the verb and the resource of a request, as Kubernetes' audit log has them.
fn verb_and_resource(call: &Call<'_>) -> (String, String) {
    let (path, query) = call.uri.split_once('?').unwrap_or((call.uri, ""));
    let mut segments = path.trim_start_matches('/').split('/');
    let group = segments.next();
    // The version, and before it the name of a group.
    segments.nth(usize::from(group == Some("apis")));
    let mut rest: Vec<&str> = segments.collect();
    if rest.first() == Some(&"namespaces") && rest.len() > 2 {
        rest.drain(..2);
    }
    let verb = match (call.method, rest.len()) {
        ("GET", 0 | 1) if query.contains("watch=true") || query.contains("watch=1") => "watch",
        ("GET", 0 | 1) => "list",
        ("GET", _) => "get",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", _) => "delete",
        (other, _) => other,
    };
    let resource = rest.first().copied().unwrap_or_default();
    (verb.to_owned(), resource.to_owned())
}

/// Returns the requests that a real API server's metrics count, in the text format of Prometheus.
fn of_metrics(metrics: &str) -> Requests {
    let mut requests = Requests::default();
    for line in metrics.lines() {
        let Some(line) = line.strip_prefix("apiserver_request_total{") else {
            continue;
        };
        let Some((labels, count)) = line.rsplit_once("} ") else {
            continue;
        };
        let label = |name: &str| {
            let marked = format!("{name}=\"");
            let at = labels
                .split(',')
                .find_map(|label| label.strip_prefix(&*marked));
            at.map_or("", |value| value.trim_end_matches('"'))
        };
        let (verb, resource) = (label("verb"), label("resource"));
        let counts = label("group") == GROUP
            || label("group").is_empty()
                && (resource == "secrets" || (verb, resource) == ("GET", "pods"));
        let Some(count) = count.parse::<f64>().ok().filter(|_| counts) else {
            continue;
        };
        let verb = match verb {
            "POST" => "create".to_owned(),
            "PUT" => "update".to_owned(),
            "APPLY" => "patch".to_owned(),
            other => other.to_lowercase(),
        };
        *requests.0.entry((verb, resource.to_owned())).or_default() += count;
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(
        "GET",
        "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/n/secretproviderclasses/a",
        "get secretproviderclasses"
    )]
    #[case(
        "GET",
        "/apis/secrets-store.csi.x-k8s.io/v1/secretproviderclasses?limit=500",
        "list secretproviderclasses"
    )]
    #[case(
        "GET",
        "/apis/g/v1/namespaces/n/secretproviderclasses?watch=true&resourceVersion=0",
        "watch secretproviderclasses"
    )]
    #[case(
        "POST",
        "/apis/g/v1/namespaces/n/secretproviderclasspodstatuses",
        "create secretproviderclasspodstatuses"
    )]
    #[case("PATCH", "/api/v1/namespaces/n/secrets/a", "patch secrets")]
    #[case("GET", "/api/v1/namespaces/n", "get namespaces")]
    fn requests_are_named_as_in_the_audit_log(
        #[case] method: &str,
        #[case] uri: &str,
        #[case] expected: &str,
    ) {
        let (verb, resource) = verb_and_resource(&Call {
            method,
            uri,
            body: b"",
        });
        assert_eq!(format!("{verb} {resource}"), expected);
    }

    #[test]
    fn the_metrics_of_others_do_not_count() {
        let metrics = r#"# TYPE apiserver_request_total counter
apiserver_request_total{code="200",component="apiserver",dry_run="",group="secrets-store.csi.x-k8s.io",resource="secretproviderclasses",scope="resource",subresource="",verb="GET",version="v1"} 7
apiserver_request_total{code="404",component="apiserver",dry_run="",group="secrets-store.csi.x-k8s.io",resource="secretproviderclasses",scope="resource",subresource="",verb="GET",version="v1"} 1
apiserver_request_total{code="201",component="apiserver",dry_run="",group="secrets-store.csi.x-k8s.io",resource="secretproviderclasspodstatuses",scope="resource",subresource="",verb="POST",version="v1"} 3
apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="pods",scope="resource",subresource="",verb="GET",version="v1"} 2
apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="pods",scope="cluster",subresource="",verb="WATCH",version="v1"} 50
apiserver_request_total{code="200",component="apiserver",dry_run="",group="coordination.k8s.io",resource="leases",scope="resource",subresource="",verb="PUT",version="v1"} 90
"#;
        let counted = of_metrics(metrics);
        assert_eq!((counted.total(), counted.writes()), (13.0, 3.0));
        let earlier = Requests([(("get".to_owned(), "pods".to_owned()), 1.5)].into());
        assert_eq!(counted.since(&earlier).total(), 11.5);
    }
}
