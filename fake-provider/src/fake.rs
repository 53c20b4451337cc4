//! A provider for tests and demos: it serves the objects it is told to, rotates them, and fails on
//! request. It holds no real secret and protects none.
//!
//! It serves the objects of upstream's end-to-end tests (`test/e2eprovider`): `foo` is `secret`,
//! `fookey` is a mock public key, any other name is empty. Like upstream's provider it refuses callers
//! whose `:authority` is not `localhost`. Unlike it, and like most providers, it gives files the mode
//! that was asked for; upstream's gives mode 0.
//!
//! # The class parameter `objects`
//!
//! YAML with one key, `array`. Each entry is a map, or a string that is YAML of that map:
//!
//! | key | meaning |
//! |---|---|
//! | `objectName` | the object's name; the id of its version is `secret/<objectName>` |
//! | `objectVersion` | ignored |
//! | `path` | the file's path, sent to the driver as it is; default `objectName` |
//! | `mode` | octal digits, quoted or not; default the permission that was asked for |
//! | `version` | the version; default `v1` |
//! | `content` | the content as text |
//! | `contentBase64` | the content as base64 |
//! | `contentSize` | a content of this many bytes, in a fixed pattern |
//! | `contentFrom` | a part of the request, see below |
//! | `wholeAnswer` | wraps the content in JSON that changes with each Mount, like Vault's answer |
//!
//! `contentFrom` is one of `attributes`, `secrets`, `permission`, `targetPath` and
//! `currentObjectVersion`, with `<token>` in place of each service account token; or of
//! `tokenClaims`, which shows whom each token is for, and `tokenDigests`, which shows renewals.
//!
//! An entry without a `content…` key is looked up among the objects set over HTTP, then in
//! [`Options::objects`], then in upstream's table. `/rotation` changes only the objects of that
//! table. All others change when the class or the file changes; both are read at each Mount. If the
//! class has no `objects`, the provider serves all of [`Options::objects`].
//!
//! # The class parameter `faults`
//!
//! A YAML list of maps. A PUT of the same YAML to `/faults` applies to all classes:
//!
//! | key | effect |
//! |---|---|
//! | `object` | only calls that ask for this object fail |
//! | `times` | only the first calls of a pod for a class fail, as many as this |
//! | `delay` | waits after it has read the objects, for example `2s` or `1m30s` |
//! | `jitter` | waits for a part of this time as well, another one in each call |
//! | `crash` | ends the process during the call |
//! | `hang` | never answers |
//! | `status` | fails with `{code: UNAVAILABLE, message: "..."}` |
//! | `errorCode` | answers with `MountResponse.error.code` and nothing else |
//! | `errorCodeBeside` | adds `MountResponse.error.code` to an answer that has all else |
//! | `spoilt` | gives each file the content `spoilt` |
//! | `badPath` | gives this path to the file of `object`, or to an additional file |
//! | `oversize` | adds a file `oversize` of this many bytes |
//! | `missingVersions` | answers without `object_version` |
//! | `writeFiles` | writes the files below the target path and answers without files |
//! | `changedOnly` | leaves out the files of objects that the call says are mounted in the same version |
//! | `describeDenied` | without manners, or with AWS's: fails calls that bring mounted versions |
//!
//! # The class parameter `manners`
//!
//! The name of a provider that the answer is like. Delays and hanging calls are faults, see above.
//!
//! | manners | effect |
//! |---|---|
//! | `aws` | writes files itself, `a/b` as `a_b`; gives them the permission of the latest request of the process; the id is the file's name, the version a UUID; adds mounted versions of other objects to its answer |
//! | `azure` | the version is an id of 32 digits |
//! | `gcp` | ids and versions are resource names |
//! | `vault`, `openbao` | the id is the file's path; the version is the HMAC of the object's entry and content |
//!
//! With manners, an object that is stored nowhere is missing. Failures have the codes and the words
//! of the provider, with the addresses that the stores of the tests have:
//!
//! | failure | `aws` | `azure` | `gcp` | `vault`, `openbao` |
//! |---|---|---|---|---|
//! | missing, or the fault `NOT_FOUND` | UNKNOWN, what the store says | UNKNOWN, the same | INTERNAL, the same | UNKNOWN, the same |
//! | the fault `PERMISSION_DENIED` | UNKNOWN, always the same text | UNKNOWN, what the store says | INTERNAL, the same | UNKNOWN, the same |
//! | any other status | UNKNOWN, the text of a denied call | UNKNOWN, with the fault's message | INTERNAL, the same | UNKNOWN, the same |
//!
//! Snapshots that the real providers share (`e2e/tests/scenarios/known.rs`) prove all this, with these
//! exceptions, which are meant: nobody logs in to a store, no provider requests tokens itself, and
//! Google Cloud's wait of 30 seconds for a store that is away is the fault `delay`.
//!
//! Sources: [aws](https://github.com/aws/secrets-store-csi-driver-provider-aws) (`server/server.go`,
//! `provider/secrets_manager_provider.go`),
//! [azure](https://github.com/Azure/secrets-store-csi-driver-provider-azure),
//! [gcp](https://github.com/GoogleCloudPlatform/secrets-store-csi-driver-provider-gcp),
//! [vault](https://github.com/hashicorp/vault-csi-provider),
//! [openbao](https://github.com/openbao/openbao-csi-provider). `docs/writing-a-provider.md` has what
//! was seen of each.
//!
//! # HTTP
//!
//! | path | effect |
//! |---|---|
//! | `/rotation?rotated=true` | rotates the objects of upstream's table, as upstream's provider does |
//! | `/validate-token-requests?audience=a,b` | requires tokens for these audiences, as upstream's provider does |
//! | `/objects?name=a&content=b` | sets an object, with an optional `&version=c` |
//! | `/calls`, `/calls/reset` | returns the counts of calls as JSON; sets them to zero |
//! | `/faults` | PUT sets the faults of all classes, and so does GET with `?set=`; DELETE clears them |
//! | `/reset` | forgets objects and faults that were set, and counts of calls |

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

mod calls;
mod control;
mod faults;
mod manners;
mod objects;
mod provider;
mod source;
mod tokens;
mod yaml;

use crate::server::{self, STOP_GRACE, Server, Socket};
use provider::FakeProvider;
use source::Source;
pub use source::Unreadable;

/// The settings of a fake provider.
#[derive(Clone, Debug)]
pub struct Options {
    /// The unix socket to serve on, `<provider directory>/<provider name>.sock`.
    pub socket: PathBuf,
    /// The address to serve HTTP at: `host:port`, or `:port` for all addresses. `None` for no HTTP.
    pub http_addr: Option<String>,
    /// A YAML file (a list of `name`, `content` or `contentBase64`, `mode`, `version`), or a
    /// directory in which each file is an object. It is read at each Mount.
    pub objects: Option<PathBuf>,
    /// The audiences, separated by commas, for which each Mount must bring a service account
    /// token. Empty for none.
    pub token_audiences: String,
}

impl Options {
    /// Returns settings with a socket, no HTTP, upstream's objects and no required tokens.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            http_addr: None,
            objects: None,
            token_audiences: String::new(),
        }
    }
}

/// The reason why a fake provider cannot start or has to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--endpoint` is not a `unix://` URL with a path.
    #[error("endpoint {0:?} must be unix:// followed by the path of the socket")]
    Endpoint(String),
    /// `--name` cannot be the name of a provider's socket.
    #[error("provider name {0:?} must be a plain file name")]
    Name(String),
    /// The HTTP address could not be bound.
    #[error("cannot serve HTTP on {addr}: {source}")]
    Http {
        /// The address as given.
        addr: String,
        /// The system's error.
        source: io::Error,
    },
    /// [`Options::objects`] cannot be read or parsed.
    #[error(transparent)]
    Objects(#[from] Unreadable),
    /// The socket cannot be served.
    #[error(transparent)]
    Server(#[from] server::Error),
}

/// Returns the socket's path in an endpoint as upstream's provider takes it:
/// `unix:///provider/e2e-provider.sock`.
///
/// # Errors
///
/// [`Error::Endpoint`] for another scheme or an empty path.
pub fn socket_of_endpoint(endpoint: &str) -> Result<PathBuf, Error> {
    match endpoint.strip_prefix("unix://") {
        Some(path) if !path.is_empty() => Ok(PathBuf::from(path)),
        _ => Err(Error::Endpoint(endpoint.to_owned())),
    }
}

/// Returns the path at which the driver looks for the socket of provider `name` in `dir`.
///
/// # Errors
///
/// [`Error::Name`] if `name` is empty, `.`, `..` or contains a slash.
pub fn socket_of_name(dir: &Path, name: &str) -> Result<PathBuf, Error> {
    if name.is_empty() || name == "." || name == ".." || name.contains('/') {
        return Err(Error::Name(name.to_owned()));
    }
    Ok(dir.join(format!("{name}.sock")))
}

/// Serves until `stop` is cancelled, then lets calls end and removes the socket.
///
/// The fault `crash` ends the whole process, so a test that uses it runs the program instead.
///
/// # Errors
///
/// [`Error`] if it cannot start or has to stop.
pub async fn serve(options: Options, stop: CancellationToken) -> Result<(), Error> {
    bind(options).await?.run(stop).await
}

/// A fake provider whose addresses are bound, so that callers can connect. Dropping it removes its
/// socket.
#[derive(Debug)]
pub struct Bound {
    socket: Socket,
    http: Option<TcpListener>,
    source: Option<Source>,
    token_audiences: String,
}

/// Reads the objects and binds the addresses: the first half of [`serve`].
///
/// # Errors
///
/// [`Error`] if the options cannot be used.
pub async fn bind(options: Options) -> Result<Bound, Error> {
    let source = options.objects.map(Source::new);
    if let Some(source) = &source {
        source.read().await?;
    }
    let http = match options.http_addr {
        Some(addr) => Some(
            listen_http(&addr)
                .await
                .map_err(|source| Error::Http { addr, source })?,
        ),
        None => None,
    };
    let socket = Socket::bind(options.socket)?;
    Ok(Bound {
        socket,
        http,
        source,
        token_audiences: options.token_audiences,
    })
}

impl Bound {
    /// Returns the address of HTTP, with the real port if the options have port 0.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http
            .as_ref()
            .and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until `stop` is cancelled: the second half of [`serve`].
    ///
    /// # Errors
    ///
    /// [`Error`] if it has to stop.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Error> {
        let http_addr = self.http_addr();
        let provider = Arc::new(FakeProvider::new(
            self.source,
            self.token_audiences,
            stop.clone(),
        ));
        let grpc = Server::new(self.socket, Arc::clone(&provider))
            .require_localhost()
            .run(stop.clone().cancelled_owned());
        let http = async {
            let Some(listener) = self.http else {
                return Ok(());
            };
            tracing::info!(address = ?http_addr, "serving HTTP");
            let serving = axum::serve(listener, control::router(provider))
                .with_graceful_shutdown(stop.clone().cancelled_owned());
            tokio::select! {
                ended = async { serving.await } => ended.map_err(|source| Error::Http {
                    addr: http_addr.map(|addr| addr.to_string()).unwrap_or_default(),
                    source,
                }),
                () = async {
                    stop.cancelled().await;
                    tokio::time::sleep(STOP_GRACE).await;
                } => Ok(()),
            }
        };
        tokio::try_join!(async { Ok(grpc.await?) }, http)?;
        Ok(())
    }
}

/// Listens at an address in Go's notation: `:8080` means all addresses, IPv6 and IPv4, or IPv4 alone
/// on a host without IPv6.
async fn listen_http(addr: &str) -> io::Result<TcpListener> {
    if !addr.starts_with(':') {
        return TcpListener::bind(addr).await;
    }
    match TcpListener::bind(format!("[::]{addr}")).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(format!("0.0.0.0{addr}")).await
        }
        bound => bound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(
        "unix:///provider/e2e-provider.sock",
        Some("/provider/e2e-provider.sock")
    )]
    #[case("unix://run/x.sock", Some("run/x.sock"))]
    #[case("unix://", None)]
    #[case("unix:/run/x.sock", None)]
    #[case("tcp://127.0.0.1:1", None)]
    #[case("/run/x.sock", None)]
    fn only_unix_endpoints_are_taken(#[case] endpoint: &str, #[case] socket: Option<&str>) {
        assert_eq!(socket_of_endpoint(endpoint).ok(), socket.map(PathBuf::from));
    }

    #[rstest]
    #[case("fake", Some("/p/fake.sock"))]
    #[case("", None)]
    #[case("..", None)]
    #[case("a/b", None)]
    fn a_name_stays_in_its_directory(#[case] name: &str, #[case] socket: Option<&str>) {
        assert_eq!(
            socket_of_name(Path::new("/p"), name).ok(),
            socket.map(PathBuf::from)
        );
    }

    #[tokio::test]
    async fn a_port_alone_means_all_addresses() {
        let listener = listen_http(":0").await.unwrap();
        assert!(listener.local_addr().unwrap().ip().is_unspecified());
    }
}
