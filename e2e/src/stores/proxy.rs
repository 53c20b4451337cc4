//! The sockets of the stores: Vault's port, and a proxy that is every host of the clouds.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, Full, Limited, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Call, Command, Disturbance, HUNG, Service, State, aws, azure, google, vault};

/// The largest head of a request to the proxy, in bytes.
const MAX_HEAD: usize = 8 << 10;
/// The largest body of a request, in bytes.
const MAX_BODY: usize = 1 << 20;

/// The authority that signs the certificates of all hosts.
pub(super) struct Authority {
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(super) fn generate() -> Result<Self, rcgen::Error> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, "stores for tests");
        let key = KeyPair::generate()?;
        let ca_pem = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        Ok(Self { ca_pem, issuer })
    }

    pub(super) fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Returns an acceptor with a certificate for a host, which speaks `protocol`.
    fn acceptor(&self, host: &str, protocol: &[u8]) -> io::Result<TlsAcceptor> {
        let params = CertificateParams::new(vec![host.to_owned()]).map_err(io::Error::other)?;
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(io::Error::other)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(io::Error::other)?;
        config.alpn_protocols = vec![protocol.to_owned()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// A request as a store sees it.
pub(super) struct Asked {
    pub(super) host: String,
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Asked {
    /// Returns a header, or nothing if it is absent.
    pub(super) fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }
}

/// The answer of a store.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// For gRPC.
    pub(super) trailers: Vec<(&'static str, String)>,
}

impl Answer {
    pub(super) fn json(status: u16, body: &serde_json::Value) -> Self {
        Self {
            status,
            headers: vec![("content-type", "application/json".to_owned())],
            body: body.to_string().into_bytes(),
            trailers: Vec::new(),
        }
    }

    fn into_response(self) -> Response<BoxBody<Bytes, Infallible>> {
        let fields = |fields: Vec<(&'static str, String)>| -> HeaderMap {
            let valid = fields.into_iter().filter_map(|(name, value)| {
                let value = HeaderValue::from_str(&value).ok()?;
                Some((HeaderName::from_static(name), value))
            });
            valid.collect()
        };
        let body = Full::new(Bytes::from(self.body));
        let body = if self.trailers.is_empty() {
            body.boxed()
        } else {
            let trailers = fields(self.trailers);
            body.with_trailers(async { Some(Ok(trailers)) }).boxed()
        };
        let mut response = Response::new(body);
        *response.status_mut() = http::StatusCode::from_u16(self.status).unwrap_or_default();
        *response.headers_mut() = fields(self.headers);
        response
    }
}

/// Returns whether a host is of a region or a vault named `away`, which can never be reached.
fn is_away(host: &str) -> bool {
    host.split('.').any(|label| label == "away")
}

/// Returns the service of a host.
fn service_of(host: &str) -> Option<Service> {
    match host {
        "login.microsoftonline.com" => return Some(Service::EntraId),
        "securetoken.googleapis.com" => return Some(Service::GoogleSts),
        "secretmanager.googleapis.com" => return Some(Service::SecretManager),
        _ if host.ends_with(".vault.azure.net") => return Some(Service::KeyVault),
        // A region.
        _ if host.starts_with("secretmanager.") && host.ends_with(".rep.googleapis.com") => {
            return Some(Service::SecretManager);
        }
        _ => {}
    }
    match host.strip_suffix(".amazonaws.com")?.split('.').next()? {
        "secretsmanager" => Some(Service::SecretsManager),
        "ssm" => Some(Service::ParameterStore),
        "sts" => Some(Service::Sts),
        _ => None,
    }
}

/// What the listeners share.
pub(super) struct Wire {
    pub(super) authority: Authority,
    state: Mutex<State>,
    disturbances: watch::Sender<BTreeMap<Service, Disturbance>>,
}

impl Wire {
    pub(super) fn new(authority: Authority) -> Self {
        Self {
            authority,
            state: Mutex::default(),
            disturbances: watch::Sender::default(),
        }
    }

    pub(super) fn obey(&self, command: Command) -> Vec<Call> {
        let mut state = self.state();
        match command {
            Command::Put {
                service,
                name,
                value,
            } => state.put(service, name, value),
            Command::Remove { service, name } => state.remove(service, name),
            Command::Deny { service, operation } => state.deny(service, operation),
            Command::Disturb {
                service,
                disturbance,
            } => self.disturbances.send_modify(|all| {
                all.insert(service, disturbance);
            }),
            Command::Reset => {
                state.reset();
                self.disturbances.send_modify(BTreeMap::clear);
            }
            Command::Clear => state.clear(),
            Command::Calls => return state.calls.clone(),
        }
        Vec::new()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disturbance(&self, service: Service) -> Disturbance {
        let all = self.disturbances.borrow();
        all.get(&service).copied().unwrap_or_default()
    }

    /// Returns when a service is away, or no longer.
    async fn until_away(&self, service: Service, away: bool) {
        let mut disturbances = self.disturbances.subscribe();
        let changed = disturbances.wait_for(|all| {
            let disturbance = all.get(&service).copied().unwrap_or_default();
            (disturbance == Disturbance::Away) == away
        });
        if changed.await.is_err() {
            pending::<()>().await;
        }
    }

    /// Serves Vault. The port is closed while Vault is away.
    pub(super) async fn serve_vault(self: Arc<Self>, first: TcpListener, address: SocketAddr) {
        let mut listener = Some(first);
        loop {
            self.until_away(Service::Vault, false).await;
            let listening = match listener.take() {
                Some(listener) => listener,
                None => match TcpListener::bind(address).await {
                    Ok(listener) => listener,
                    Err(error) => {
                        tracing::error!(%address, %error, "Vault does not come back");
                        return;
                    }
                },
            };
            let mut connections = JoinSet::new();
            let serve = async {
                while let Ok((stream, _)) = listening.accept().await {
                    while connections.try_join_next().is_some() {}
                    let wire = self.clone();
                    let host = address.to_string();
                    connections.spawn(async move {
                        let service = service_fn(|request| {
                            wire.clone().answer(Service::Vault, host.clone(), request)
                        });
                        let connection =
                            http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                        ended(connection.await);
                    });
                }
            };
            tokio::select! {
                () = self.until_away(Service::Vault, true) => {}
                () = serve => return,
            }
        }
    }

    /// Serves the proxy.
    pub(super) async fn serve_proxy(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            while connections.try_join_next().is_some() {}
            let wire = self.clone();
            connections.spawn(async move { ended(wire.be_proxy(stream).await) });
        }
    }

    /// Serves one connection to the proxy.
    async fn be_proxy(self: Arc<Self>, mut stream: TcpStream) -> io::Result<()> {
        let head = read_head(&mut stream).await?;
        let mut words = head.split_whitespace();
        let (method, target) = (words.next(), words.next().unwrap_or_default());
        let host = target.strip_suffix(":443").unwrap_or(target).to_owned();
        let service = service_of(&host).filter(|_| method == Some("CONNECT"));
        let Some(service) = service else {
            tracing::warn!(target, "not served here");
            self.state().calls.push(Call {
                service: None,
                operation: host,
                object: String::new(),
            });
            return stream.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").await;
        };
        if is_away(&host) || self.disturbance(service) == Disturbance::Away {
            return stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").await;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
        let is_grpc = service == Service::SecretManager;
        let protocol: &[u8] = if is_grpc { b"h2" } else { b"http/1.1" };
        let acceptor = self.authority.acceptor(&host, protocol)?;
        let stream = TokioIo::new(acceptor.accept(stream).await?);
        let wire = self.clone();
        let answers =
            service_fn(move |request| wire.clone().answer(service, host.clone(), request));
        let serve = async {
            if is_grpc {
                let builder = http2::Builder::new(TokioExecutor::new());
                builder.serve_connection(stream, answers).await
            } else {
                let builder = http1::Builder::new();
                builder.serve_connection(stream, answers).await
            }
        };
        tokio::select! {
            () = self.until_away(service, true) => Ok(()),
            served = serve => served.map_err(io::Error::other),
        }
    }

    /// Answers a request, after the disturbance of its service.
    async fn answer(
        self: Arc<Self>,
        service: Service,
        host: String,
        request: Request<Incoming>,
    ) -> io::Result<Response<BoxBody<Bytes, Infallible>>> {
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await;
        let body = body.map_err(io::Error::other)?.to_bytes();
        match self.disturbance(service) {
            Disturbance::None | Disturbance::Away => {}
            Disturbance::Slow(milliseconds) => {
                tokio::time::sleep(Duration::from_millis(milliseconds)).await;
            }
            Disturbance::Hang => {
                self.state().calls.push(Call {
                    service: Some(service),
                    operation: HUNG.to_owned(),
                    object: String::new(),
                });
                let mut disturbances = self.disturbances.subscribe();
                let _ended = disturbances
                    .wait_for(|all| all.get(&service) != Some(&Disturbance::Hang))
                    .await;
                return Err(io::Error::other("it hung"));
            }
        }
        let asked = Asked {
            host,
            method: parts.method,
            path: parts.uri.path().to_owned(),
            headers: parts.headers,
            body,
        };
        let mut state = self.state();
        let answer = match service {
            Service::Vault => vault::answer(&mut state, &asked),
            Service::SecretsManager => aws::secrets_manager(&mut state, &asked),
            Service::ParameterStore => aws::parameter_store(&mut state, &asked),
            Service::Sts => aws::sts(&mut state, &asked),
            Service::KeyVault => azure::key_vault(&mut state, &asked),
            Service::EntraId => azure::entra_id(&mut state, &asked),
            Service::SecretManager => google::secret_manager(&mut state, &asked),
            Service::GoogleSts => google::token_exchange(&mut state, &asked),
        };
        Ok(answer.into_response())
    }
}

/// Reads the head of a request. Nothing follows it before the answer.
pub(super) async fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < MAX_HEAD {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

fn ended<T, E: std::fmt::Display>(outcome: Result<T, E>) {
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection to a store ended early");
    }
}
