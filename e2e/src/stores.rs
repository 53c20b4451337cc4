//! Small fakes of the stores whose secrets real providers fetch: Vault and OpenBao, AWS, Azure and
//! Google Cloud.
//!
//! A provider is not told that the stores are fakes. It uses the hosts that it always uses, over TLS,
//! and reaches them by an HTTP proxy that answers in their place:
//!
//! ```text
//! HTTPS_PROXY=http://127.0.0.1:3128   all hosts of the clouds; others are refused, and listed
//! SSL_CERT_FILE=<directory>/ca.pem    the authority that signs the certificates of these hosts
//! VAULT_ADDR=http://127.0.0.1:8200    Vault, which has no host of its own
//! <directory>/control.sock            commands
//! ```
//!
//! The stores hold what [`Command::Put`] gives them, and check that a caller has logged in. They know
//! the operations that providers use, and no policies but [`Command::Deny`]. A cloud's region or vault
//! named `away` can never be reached.

mod aws;
mod azure;
mod google;
mod proxy;
mod state;
mod vault;

#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::task::JoinSet;

use proxy::{Authority, Wire};
use state::State;

/// The port of Vault in a cluster.
pub const VAULT_PORT: u16 = 8200;
/// The port of the proxy in a cluster.
pub const PROXY_PORT: u16 = 3128;
/// The file with the certificate of the authority.
const CA: &str = "ca.pem";
/// The socket for commands.
const CONTROL: &str = "control.sock";

/// An API of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// Vault or OpenBao: a KV store of version 2, and a login with a service account token.
    Vault,
    /// AWS Secrets Manager.
    SecretsManager,
    /// AWS Systems Manager Parameter Store.
    ParameterStore,
    /// AWS Security Token Service.
    Sts,
    /// Azure Key Vault.
    KeyVault,
    /// Microsoft Entra ID, where callers of Key Vault log in.
    EntraId,
    /// Google Secret Manager.
    SecretManager,
    /// Google's exchange of service account tokens.
    GoogleSts,
}

/// A disturbance of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disturbance {
    /// It answers.
    #[default]
    None,
    /// It refuses connections, and closes those that are open.
    Away,
    /// It accepts calls and does not answer them.
    Hang,
    /// It answers so many milliseconds later.
    Slow(u64),
}

/// The operation of a call that is not answered.
pub const HUNG: &str = "hung";

/// A command to the stores.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "command")]
pub enum Command {
    /// Stores a value as the latest version of an object.
    Put {
        /// The store.
        service: Service,
        /// The name of the object.
        name: String,
        /// The value. Vault serves a JSON object as the keys of the secret.
        value: String,
    },
    /// Removes an object with all its versions.
    Remove {
        /// The store.
        service: Service,
        /// The name of the object.
        name: String,
    },
    /// Refuses an operation to everybody from now on.
    Deny {
        /// The service.
        service: Service,
        /// The operation, as in [`Call::operation`].
        operation: String,
    },
    /// Disturbs a service from now on.
    Disturb {
        /// The service.
        service: Service,
        /// The disturbance.
        disturbance: Disturbance,
    },
    /// Ends all refusals and disturbances, and forgets the calls so far.
    Reset,
    /// Removes all objects.
    Clear,
    /// Returns the calls so far.
    Calls,
}

/// A call to a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Call {
    /// The service. None for a host that is not served here.
    pub service: Option<Service>,
    /// The operation, by the name in the API of the service: `GetSecretValue`, `login`. [`HUNG`] for
    /// any call while the service hangs; the host for a host that is not served here.
    pub operation: String,
    /// The name of the object, the role, or the user.
    pub object: String,
}

/// Running stores. Dropping them closes every connection.
pub struct Stores {
    /// The address of Vault.
    pub vault: SocketAddr,
    /// The address of the proxy.
    pub proxy: SocketAddr,
    tasks: JoinSet<()>,
}

impl Stores {
    /// Starts all stores on the loopback, with files in `directory`. A port of 0 is any free port.
    ///
    /// # Errors
    /// When an address or the directory cannot be used.
    pub async fn start(directory: &Path, vault: u16, proxy: u16) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let authority = Authority::generate().map_err(io::Error::other)?;
        let wire = Arc::new(Wire::new(authority));
        let control = directory.join(CONTROL);
        // Before the socket is replaced: it may belong to stores that have these ports.
        let vault = listen(vault).await?;
        let proxy = listen(proxy).await?;
        // Left by stores that were killed.
        match fs::remove_file(&control) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let control = UnixListener::bind(control)?;
        fs::write(directory.join(CA), wire.authority.ca_pem())?;
        let (vault_address, proxy_address) = (vault.local_addr()?, proxy.local_addr()?);
        let mut tasks = JoinSet::new();
        tasks.spawn(wire.clone().serve_vault(vault, vault_address));
        tasks.spawn(wire.clone().serve_proxy(proxy));
        tasks.spawn(serve_commands(control, wire));
        Ok(Self {
            vault: vault_address,
            proxy: proxy_address,
            tasks,
        })
    }

    /// Serves until a part of the stores fails.
    pub async fn run(mut self) {
        let _ended = self.tasks.join_next().await;
    }
}

/// Listens on a port of the loopback.
async fn listen(port: u16) -> io::Result<TcpListener> {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    bound.map_err(|error| io::Error::new(error.kind(), format!("port {port}: {error}")))
}

/// Sends a command to the stores with files in `directory`. Returns the calls for
/// [`Command::Calls`], and nothing otherwise.
///
/// # Errors
/// When nobody answers.
pub async fn send(directory: &Path, command: &Command) -> io::Result<Vec<Call>> {
    // The path of a node's disk may be longer than a socket's path can be.
    let directory = fs::File::open(directory)?;
    let short = format!("/proc/self/fd/{}/{CONTROL}", directory.as_raw_fd());
    let mut stream = UnixStream::connect(short).await?;
    let mut line = serde_json::to_vec(command)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    match serde_json::from_slice(&answer)? {
        Ok(calls) => Ok(calls),
        Err::<_, String>(reason) => Err(io::Error::other(reason)),
    }
}

/// Serves commands, a line of JSON on a connection each.
async fn serve_commands(listener: UnixListener, wire: Arc<Wire>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut line = String::new();
        let read = BufReader::new(&mut stream).read_line(&mut line).await;
        let obeyed = read
            .map_err(|error| error.to_string())
            .and_then(|_| serde_json::from_str(&line).map_err(|error| error.to_string()))
            .map(|command| wire.obey(command));
        // Whoever has gone does not miss the answer.
        if let Ok(answer) = serde_json::to_vec(&obeyed) {
            let _unread = stream.write_all(&answer).await;
        }
    }
}
