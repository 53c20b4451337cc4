//! Real providers: unmodified executables of other projects, against the fakes of [`crate::stores`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use embedded::Options;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::PostParams;
use serde_json::json;

use crate::binaries::Binaries;
use crate::cluster::{Cluster as _, Error, Result, api, wait_until};
use crate::embedded::{Embedded, bare};
use crate::namespace::Namespace;
use crate::stores::{Call, Command, Service, send};

/// Names a folder with the executables of real providers.
pub const FOLDER_VARIABLE: &str = "E2E_PROVIDERS";

/// The role that service accounts have with AWS.
const ROLE: &str = "arn:aws:iam::111122223333:role/shop";
/// The directory of the stores on a node.
const STORES: &str = "var/lib/stores";
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

    /// Returns the manifest of a DaemonSet with the provider's own rights, which uses the fakes.
    pub fn manifest(self) -> &'static str {
        match self {
            Self::Vault => include_str!("../manifests/providers/vault.yaml"),
            Self::OpenBao => include_str!("../manifests/providers/openbao.yaml"),
            Self::Aws => include_str!("../manifests/providers/aws.yaml"),
            Self::Azure => include_str!("../manifests/providers/azure.yaml"),
            Self::Gcp => include_str!("../manifests/providers/gcp.yaml"),
        }
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

    /// Returns the name in the store of the object that [`Provider::parameters`] mounts as a file.
    pub fn object(self, file: &str) -> String {
        match self {
            Self::Gcp => format!("projects/shop/secrets/{file}"),
            _ => file.to_owned(),
        }
    }

    /// Returns the parameters of a class that mounts an object of the store as each file. The store
    /// cannot be reached where `reachable` is false.
    pub fn parameters(self, files: &[&str], reachable: bool) -> BTreeMap<String, String> {
        let place = if reachable { "nowhere-1" } else { "away" };
        let each = |object: &dyn Fn(&str) -> String| -> String {
            files.iter().map(|file| object(file)).collect()
        };
        let parameters = match self {
            Self::Vault | Self::OpenBao => {
                let port = if reachable { 8200 } else { 8209 };
                let objects = each(&|file| {
                    format!(
                        "- {{objectName: {file}, secretPath: secret/data/{file}, secretKey: value}}\n"
                    )
                });
                let address = format!("{}Address", self.name());
                vec![
                    ("roleName".to_owned(), "shop".to_owned()),
                    (address, format!("http://127.0.0.1:{port}")),
                    ("objects".to_owned(), objects),
                ]
            }
            Self::Aws => {
                let objects =
                    each(&|file| format!("- {{objectName: {file}, objectType: secretsmanager}}\n"));
                vec![
                    ("region".to_owned(), place.to_owned()),
                    ("objects".to_owned(), objects),
                ]
            }
            Self::Azure => {
                let objects =
                    each(&|file| format!("- |\n  objectName: {file}\n  objectType: secret\n"));
                vec![
                    ("keyvaultName".to_owned(), place.to_owned()),
                    ("tenantID".to_owned(), "tenant".to_owned()),
                    ("clientID".to_owned(), "shop".to_owned()),
                    ("objects".to_owned(), format!("array:\n{objects}")),
                ]
            }
            Self::Gcp => {
                let place = if reachable { "" } else { "/locations/away" };
                let objects = each(&|file| {
                    format!(
                        "- {{resourceName: projects/shop{place}/secrets/{file}/versions/latest, path: {file}}}\n"
                    )
                });
                vec![("secrets".to_owned(), objects)]
            }
        };
        parameters.into_iter().collect()
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

/// Adds the stores and a provider to the options of a cluster, if [`find`] finds its executable.
pub fn add(options: &mut Options, provider: Provider) {
    let stores = include_str!("../manifests/providers/stores.yaml");
    options.manifests.push(stores.to_owned());
    options.manifests.push(provider.manifest().to_owned());
    let program = options.node_program.clone();
    options.programs.insert("e2e".to_owned(), program);
    if let Ok(path) = find(provider) {
        options
            .programs
            .insert(provider.executable().to_owned(), path);
    }
}

/// Sends a command to the stores of a node. Returns the calls for [`Command::Calls`].
///
/// # Errors
/// When they do not answer.
pub async fn tell(cluster: &Embedded, node: &str, command: &Command) -> Result<Vec<Call>> {
    let stores = cluster.disk(node).join(STORES);
    let sent = send(&stores, command).await;
    sent.map_err(|error| Error::Impossible(format!("a command to the stores: {error}")))
}

/// Waits until the stores of a node answer.
///
/// # Errors
/// [`Error::Timeout`] when they do not.
pub async fn wait_stores(cluster: &Embedded, node: &str) -> Result<()> {
    wait_until("the stores answer", START, async || {
        tell(cluster, node, &Command::Calls).await.is_ok()
    })
    .await
}

/// Stores a value for a file of [`Provider::parameters`].
///
/// # Errors
/// When the stores do not answer.
pub async fn put(
    cluster: &Embedded,
    node: &str,
    provider: Provider,
    file: &str,
    value: &str,
) -> Result<()> {
    let command = Command::Put {
        service: provider.store(),
        name: provider.object(file),
        value: value.to_owned(),
    };
    tell(cluster, node, &command).await.map(drop)
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
pub async fn check(binaries: &Binaries, provider: Provider) -> Result<String> {
    find(provider).map_err(Error::Impossible)?;
    let mut options = bare(binaries);
    add(&mut options, provider);
    let checker = binaries.fake_provider.with_file_name("provider-check");
    options
        .programs
        .insert("provider-check".to_owned(), checker);
    let cluster = Embedded::start(options).await?;
    let node = cluster.nodes().remove(0);
    wait_stores(&cluster, &node).await?;
    for (file, value) in [("password", "hunter2-hunter2"), ("user", "shop-user")] {
        put(&cluster, &node, provider, file, value).await?;
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
    let class =
        |files: &[&str], reachable| json!(provider.parameters(files, reachable)).to_string();
    let files = [
        ("parameters", class(&["password", "user"], true)),
        ("missing", class(&["missing"], true)),
        ("outage", class(&["password"], false)),
        ("attributes", json!(attributes).to_string()),
        ("tokens", json!(tokens).to_string()),
        ("change", format!("e2e stores /{STORES} --send '{change}'")),
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
         [ $? -lt 2 ] || {{ cat {log} >&2; exit 1; }}"
    );
    cluster.exec(&node, &["sh", "-c", &command]).await
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
