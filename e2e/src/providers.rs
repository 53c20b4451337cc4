//! Real providers: unmodified executables of other projects, against the fakes of [`crate::stores`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use embedded::Options;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::PostParams;
use serde_json::json;

use crate::binaries::Binaries;
use crate::cluster::{Cluster as _, Error, Result, api, wait_until};
use crate::embedded::{Embedded, bare};
use crate::images;
use crate::install::Installation;
use crate::namespace::Namespace;
use crate::stores::{Call, Command, Service, send};

/// Names a folder with the executables of real providers.
pub const FOLDER_VARIABLE: &str = "E2E_PROVIDERS";

/// The role that service accounts have with AWS.
const ROLE: &str = "arn:aws:iam::111122223333:role/shop";
/// The limit of waits for a provider to start.
const START: Duration = Duration::from_secs(30);
/// Restarts a provider: kills the process of that name on this node, and no other's.
const RESTART: &str = r#"
node=$(readlink /proc/self/ns/net)
for process in /proc/[0-9]*; do
  [ "$(readlink $process/ns/net)" = "$node" ] || continue
  case NAME in "$(cat $process/comm)"*) kill -9 ${process#/proc/} ;; esac
done"#;

/// A real provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// [hashicorp/vault-csi-provider](https://github.com/hashicorp/vault-csi-provider).
    Vault,
    /// [openbao/openbao-csi-provider](https://github.com/openbao/openbao-csi-provider).
    OpenBao,
    /// [aws/secrets-store-csi-driver-provider-aws](https://github.com/aws/secrets-store-csi-driver-provider-aws).
    Aws,
    /// [Azure/secrets-store-csi-driver-provider-azure](https://github.com/Azure/secrets-store-csi-driver-provider-azure).
    Azure,
    /// [GoogleCloudPlatform/secrets-store-csi-driver-provider-gcp](https://github.com/GoogleCloudPlatform/secrets-store-csi-driver-provider-gcp).
    Gcp,
}

/// An object that a class asks for: a secret in the store, and its file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Object<'a> {
    /// The name in the store, as [`Provider::object`] takes it.
    pub name: &'a str,
    /// The path of the file; none for that which the provider makes of the name.
    pub path: Option<&'a str>,
    /// The mode as octal digits; none for an object without a mode of its own.
    pub mode: Option<&'a str>,
}

impl<'a> Object<'a> {
    /// Returns an object whose file has its name.
    pub const fn new(name: &'a str) -> Self {
        Self {
            name,
            path: None,
            mode: None,
        }
    }

    /// Returns the object with a path of its own.
    pub const fn at(self, path: &'a str) -> Self {
        Self {
            path: Some(path),
            ..self
        }
    }

    /// Returns the object with a mode of its own.
    pub const fn mode(self, mode: &'a str) -> Self {
        Self {
            mode: Some(mode),
            ..self
        }
    }

    /// Returns the path of the file.
    pub fn file(&self) -> &'a str {
        self.path.unwrap_or(self.name)
    }

    /// Returns the mode after `before`, or nothing if there is none.
    fn mode_after(&self, before: &str) -> String {
        self.mode
            .map_or_else(String::new, |mode| format!("{before}{mode}"))
    }
}

impl Provider {
    /// All providers.
    pub const ALL: [Self; 5] = [
        Self::Vault,
        Self::OpenBao,
        Self::Aws,
        Self::Azure,
        Self::Gcp,
    ];

    /// Returns the name in `spec.provider` of classes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vault => "vault",
            Self::OpenBao => "openbao",
            Self::Aws => "aws",
            Self::Azure => "azure",
            Self::Gcp => "gcp",
        }
    }

    /// Returns the file name of the executable.
    pub fn executable(self) -> &'static str {
        match self {
            Self::Vault => "vault-csi-provider",
            Self::OpenBao => "openbao-csi-provider",
            Self::Aws => "secrets-store-csi-driver-provider-aws",
            Self::Azure => "secrets-store-csi-driver-provider-azure",
            Self::Gcp => "secrets-store-csi-driver-provider-gcp",
        }
    }

    /// Returns the name of the container of [`Provider::manifest`].
    pub fn container(self) -> String {
        format!("{}-provider", self.name())
    }

    /// Returns the manifest of a DaemonSet with the provider's own rights. Beside the provider runs a
    /// container with fakes of its stores, which it reaches on the pod's loopback.
    pub fn manifest(self) -> &'static str {
        match self {
            Self::Vault => include_str!("../manifests/providers/vault.yaml"),
            Self::OpenBao => include_str!("../manifests/providers/openbao.yaml"),
            Self::Aws => include_str!("../manifests/providers/aws.yaml"),
            Self::Azure => include_str!("../manifests/providers/azure.yaml"),
            Self::Gcp => include_str!("../manifests/providers/gcp.yaml"),
        }
    }

    /// Returns the directory of the stores on a node, for [`tell`].
    pub fn stores(self) -> PathBuf {
        Path::new("/var/lib/kubelet/stores").join(self.name())
    }

    /// Returns the socket of the provider on a node.
    pub fn socket(self) -> PathBuf {
        let directory = Path::new("/var/run/secrets-store-csi-providers");
        directory.join(format!("{}.sock", self.name()))
    }

    /// Returns the audience of the token of kubelet that the provider uses. Vault, OpenBao and Google
    /// Cloud request tokens themselves where there is none, in protobuf, which the embedded API server
    /// does not read.
    pub fn audience(self) -> &'static str {
        match self {
            Self::Vault => "vault",
            Self::OpenBao => "openbao",
            Self::Aws => "sts.amazonaws.com",
            Self::Azure => "api://AzureADTokenExchange",
            Self::Gcp => "shop.svc.id.goog",
        }
    }

    /// Returns the service that holds the provider's secrets.
    pub fn store(self) -> Service {
        match self {
            Self::Vault | Self::OpenBao => Service::Vault,
            Self::Aws => Service::SecretsManager,
            Self::Azure => Service::KeyVault,
            Self::Gcp => Service::SecretManager,
        }
    }

    /// Returns the operation of [`Provider::store`] that reads a secret.
    pub fn read(self) -> &'static str {
        match self {
            Self::Vault | Self::OpenBao => "read",
            Self::Aws => "GetSecretValue",
            Self::Azure => "GetSecret",
            Self::Gcp => "AccessSecretVersion",
        }
    }

    /// Returns the operation with which a provider logs in, and its service.
    pub fn login(self) -> (Service, &'static str) {
        match self {
            Self::Vault | Self::OpenBao => (Service::Vault, "login"),
            Self::Aws => (Service::Sts, "AssumeRoleWithWebIdentity"),
            Self::Azure => (Service::EntraId, "token"),
            Self::Gcp => (Service::GoogleSts, "exchange"),
        }
    }

    /// Returns the name in the store of an object of [`Provider::parameters`].
    pub fn object(self, name: &str) -> String {
        match self {
            Self::Gcp => format!("projects/shop/secrets/{name}"),
            _ => name.to_owned(),
        }
    }

    /// Returns the parameters of a class that mounts objects of the store. The store cannot be reached
    /// where `reachable` is false.
    pub fn parameters(self, objects: &[Object<'_>], reachable: bool) -> BTreeMap<String, String> {
        let place = if reachable { "nowhere-1" } else { "away" };
        let port = if reachable { 8200 } else { 8209 };
        let listed = objects.iter().map(|object| self.entry(object, reachable));
        let listed: String = listed.collect();
        let address = format!("{}Address", self.name());
        let url = format!("http://127.0.0.1:{port}");
        let parameters = match self {
            Self::Vault | Self::OpenBao => vec![
                ("roleName", "shop".to_owned()),
                (&*address, url),
                ("objects", listed),
            ],
            Self::Aws => vec![("region", place.to_owned()), ("objects", listed)],
            Self::Azure => vec![
                ("keyvaultName", place.to_owned()),
                ("tenantID", "tenant".to_owned()),
                ("clientID", "shop".to_owned()),
                ("objects", format!("array:\n{listed}")),
            ],
            Self::Gcp => vec![("secrets", listed)],
        };
        let named = parameters.into_iter();
        named.map(|(name, text)| (name.to_owned(), text)).collect()
    }

    /// Returns the entry of an object in a list of YAML.
    fn entry(self, object: &Object<'_>, reachable: bool) -> String {
        let (name, file) = (object.name, object.file());
        match self {
            Self::Vault | Self::OpenBao => format!(
                "- {{objectName: {file}, secretPath: secret/data/{name}, secretKey: value{}}}\n",
                object.mode_after(", filePermission: ")
            ),
            Self::Aws => format!(
                "- {{objectName: {name}, objectType: secretsmanager, objectAlias: {file}{}}}\n",
                object.mode_after(", filePermission: '") + object.mode.map_or("", |_| "'")
            ),
            Self::Azure => format!(
                "- |\n  objectName: {name}\n  objectType: secret\n  objectAlias: {file}\n{}",
                object.mode_after("  filePermission: '") + object.mode.map_or("", |_| "'\n")
            ),
            Self::Gcp => {
                let place = if reachable { "" } else { "/locations/away" };
                format!(
                    "- {{resourceName: projects/shop{place}/secrets/{name}/versions/latest, path: {file}{}}}\n",
                    object.mode_after(", mode: ")
                )
            }
        }
    }
}

/// Returns the path of a provider's executable.
///
/// # Errors
/// Returns a sentence that says why there is none.
pub fn find(provider: Provider) -> std::result::Result<PathBuf, String> {
    let folder = std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from);
    let folder =
        folder.ok_or_else(|| format!("${FOLDER_VARIABLE} names no folder with real providers"))?;
    let path = folder.join(provider.executable());
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("there is no executable {}", path.display()))
    }
}

/// Adds a provider to the options of an embedded cluster, if [`find`] finds its executable. The nodes
/// of an embedded cluster have one loopback for all pods, so that there can be one provider.
pub fn add(options: &mut Options, provider: Provider) {
    options.manifests.push(provider.manifest().to_owned());
    let program = options.node_program.clone();
    options.programs.insert("e2e".to_owned(), program);
    if let Ok(path) = find(provider) {
        options
            .programs
            .insert(provider.executable().to_owned(), path);
    }
}

/// Builds the images of providers, and returns them with the manifests, for a cluster of real
/// Kubernetes. Blocks.
///
/// # Errors
/// When an executable is not there, or an image cannot be made.
pub fn installation(providers: &[Provider]) -> Result<Installation> {
    let failed = |error: images::Error| Error::Start(error.to_string());
    let mut images = vec![images::of_stores(|_| {}).map_err(failed)?];
    for provider in providers {
        let executable = find(*provider).map_err(Error::Start)?;
        let name = format!("{}:e2e", provider.executable());
        images.push(images::of_executable(&name, &executable, &[]).map_err(failed)?);
    }
    let manifests = providers.iter().map(|p| p.manifest().to_owned());
    Ok(Installation {
        manifests: manifests.collect(),
        images,
    })
}

/// Sends a command to the stores in a directory, that of [`Provider::stores`] on a node's disk. Returns
/// the calls for [`Command::Calls`].
///
/// # Errors
/// When they do not answer.
pub async fn tell(stores: &Path, command: &Command) -> Result<Vec<Call>> {
    let sent = send(stores, command).await;
    sent.map_err(|error| Error::Impossible(format!("a command to the stores: {error}")))
}

/// Waits until the stores in a directory answer.
///
/// # Errors
/// [`Error::Timeout`] when they do not.
pub async fn wait_stores(stores: &Path) -> Result<()> {
    wait_until("the stores answer", START, async || {
        tell(stores, &Command::Calls).await.is_ok()
    })
    .await
}

/// Stores a value for an object of [`Provider::parameters`].
///
/// # Errors
/// When the stores do not answer.
pub async fn put(stores: &Path, provider: Provider, name: &str, value: &str) -> Result<()> {
    let command = Command::Put {
        service: provider.store(),
        name: provider.object(name),
        value: value.to_owned(),
    };
    tell(stores, &command).await.map(drop)
}

/// Lets the service account of a namespace be known to AWS.
///
/// # Errors
/// When the API server refuses it.
pub async fn annotate_account(namespace: &Namespace) -> Result<()> {
    let account = json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": "default", "annotations": {"eks.amazonaws.com/role-arn": ROLE}},
    });
    namespace.apply(&account.to_string()).await.map(drop)
}

/// Runs `provider-check` against a provider on an embedded cluster. Returns its report.
///
/// # Errors
/// When the provider does not start, or the checker checks nothing.
pub async fn check(binaries: &Binaries, provider: Provider) -> Result<Conformance> {
    find(provider).map_err(Error::Impossible)?;
    let mut options = bare(binaries);
    add(&mut options, provider);
    let checker = binaries.fake_provider.with_file_name("provider-check");
    options
        .programs
        .insert("provider-check".to_owned(), checker);
    let cluster = Embedded::start(options).await?;
    let node = cluster.nodes().remove(0);
    let inside = provider.stores();
    let stores = cluster
        .disk(&node)
        .join(inside.strip_prefix("/").unwrap_or(&inside));
    wait_stores(&stores).await?;
    for (file, value) in [("password", "hunter2-hunter2"), ("user", "shop-user")] {
        put(&stores, provider, file, value).await?;
    }
    let namespace = Namespace::create(&cluster).await?;
    annotate_account(&namespace).await?;
    namespace.apply(POD).await?;
    let pod = namespace.wait_ready("checked", START).await?;
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    let attributes = BTreeMap::from([
        ("csi.storage.k8s.io/pod.name", "checked".to_owned()),
        (
            "csi.storage.k8s.io/pod.namespace",
            namespace.name().to_owned(),
        ),
        ("csi.storage.k8s.io/pod.uid", uid),
    ]);
    let audience = provider.audience();
    let tokens = BTreeMap::from([(audience, token(&namespace, &pod, audience).await?)]);
    let change = Command::Put {
        service: provider.store(),
        name: provider.object("password"),
        value: "correct-horse-battery".to_owned(),
    };
    let change = json!(change);
    let class = |names: &[&str], reachable| {
        let objects: Vec<_> = names.iter().copied().map(Object::new).collect();
        json!(provider.parameters(&objects, reachable)).to_string()
    };
    let files = [
        ("parameters", class(&["password", "user"], true)),
        ("missing", class(&["missing"], true)),
        ("outage", class(&["password"], false)),
        ("attributes", json!(attributes).to_string()),
        ("tokens", json!(tokens).to_string()),
        (
            "change",
            format!("e2e stores {} --send '{change}'", inside.display()),
        ),
        ("restart", RESTART.replace("NAME", provider.executable())),
    ];
    let directory = cluster.disk(&node).join("check");
    let write = || -> io::Result<()> {
        fs::create_dir_all(directory.join("target"))?;
        for (name, text) in &files {
            fs::write(directory.join(name), text)?;
        }
        Ok(())
    };
    write().map_err(|error| Error::Impossible(format!("{}: {error}", directory.display())))?;
    let socket = format!("/run/secrets-store-csi-providers/{}.sock", provider.name());
    let log = format!(
        "/run/embedded/nodes/{node}/logs/{}.log",
        provider.container()
    );
    let command = format!(
        "cd /check; for try in $(seq 100); do [ -S {socket} ] && break; sleep 0.1; done; \
         provider-check {socket} --parameters parameters --missing missing \
         --outage outage --attributes attributes --tokens tokens --target-dir /check/target \
         --log {log} --change \"$(cat change)\" --restart \"$(cat restart)\"; \
         code=$?; [ $code -lt 2 ] || {{ cat {log} >&2; exit 1; }}; echo {CODE}$code"
    );
    let output = cluster.exec(&node, &["sh", "-c", &command]).await?;
    Conformance::of(&output)
}

/// What the last line of the output begins with, before the exit code of `provider-check`.
const CODE: &str = "exit code ";

/// The report of `provider-check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conformance {
    /// Its output.
    pub report: String,
    /// Whether no check failed.
    pub passed: bool,
}

impl Conformance {
    fn of(output: &str) -> Result<Self> {
        let lines = output.trim_end().rsplit_once('\n');
        let code = lines.and_then(|(report, last)| Some((report, last.strip_prefix(CODE)?)));
        let (report, code) = code
            .ok_or_else(|| Error::Impossible(format!("provider-check says no code: {output}")))?;
        Ok(Self {
            report: report.to_owned(),
            passed: code == "0",
        })
    }
}

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: checked}
spec:
  containers: [{name: app, image: 'probe:e2e'}]
";

/// Requests a token for a pod, as kubelet does.
async fn token(namespace: &Namespace, pod: &Pod, audience: &str) -> Result<String> {
    let pod_name = pod.metadata.name.clone();
    let spec = TokenRequestSpec {
        audiences: Some(vec![audience.to_owned()]),
        bound_object_ref: Some(BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod_name,
            uid: pod.metadata.uid.clone(),
        }),
        ..TokenRequestSpec::default()
    };
    let request = TokenRequest {
        spec: Some(spec),
        ..TokenRequest::default()
    };
    let accounts = namespace.api::<ServiceAccount>();
    let answer = accounts
        .create_token_request("default", &PostParams::default(), &request)
        .await
        .map_err(api(format!("request a token for {audience}")))?;
    Ok(answer
        .status
        .and_then(|status| status.token)
        .unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_is_no_pass_and_neither_is_an_unknown_end() {
        let passed = Conformance::of("a passed\n5 passed\nexit code 0\n").unwrap();
        assert!(passed.passed);
        assert_eq!(passed.report, "a passed\n5 passed");
        let failed = Conformance::of("a failed\nexit code 1\n").unwrap();
        assert!(!failed.passed);
        assert!(Conformance::of("a passed\n").is_err());
        assert!(Conformance::of("").is_err());
    }
}
