//! The sockets: a plain Unix socket for administrators, TLS over a Unix socket for pods, and a port
//! without TLS for programs that are not in a pod.

use std::{io, path::Path, sync::Arc};

use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

use super::{
    Disturbance, Error,
    server::{Entrance, Server},
};

/// The names and addresses of the API server for pods.
const NAMES: [&str; 6] = [
    "127.0.0.1",
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];

/// A new authority, and a server certificate that it signed.
pub(super) struct Certificates {
    pub(super) ca_pem: String,
    acceptor: TlsAcceptor,
}

impl Certificates {
    /// Generates the certificates.
    ///
    /// # Errors
    /// Returns an error when they cannot be generated or used.
    pub(super) fn generate() -> Result<Certificates, Error> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        authority
            .distinguished_name
            .push(DnType::CommonName, "kubernetes");
        let authority_key = KeyPair::generate()?;
        let authority_certificate = authority.self_signed(&authority_key)?;
        let issuer = Issuer::new(authority, authority_key);

        let mut server = CertificateParams::new(NAMES.map(str::to_owned))?;
        server
            .distinguished_name
            .push(DnType::CommonName, "kube-apiserver");
        let server_key = KeyPair::generate()?;
        let server_certificate = server.signed_by(&server_key, &issuer)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(server_key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![server_certificate.der().clone()], key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Certificates {
            ca_pem: authority_certificate.pem(),
            acceptor: TlsAcceptor::from(Arc::new(config)),
        })
    }
}

/// Opens a socket, and removes one that an earlier server may have left behind.
///
/// # Errors
/// Returns an error when the path cannot be bound; it may have 107 bytes at most.
pub(super) fn bind(path: &Path) -> Result<UnixListener, Error> {
    let failed = |source: io::Error| Error::Socket {
        path: path.to_owned(),
        source,
    };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    UnixListener::bind(path).map_err(failed)
}

/// Serves administrators until the task is aborted.
pub(super) async fn serve_admins(listener: UnixListener, server: Arc<Server>) {
    let mut connections = JoinSet::new();
    while let Some(stream) = accepted(listener.accept(), &mut connections).await {
        connections.spawn(converse(stream, server.clone(), Entrance::Admin));
    }
}

/// Serves a port without TLS until the task is aborted.
pub(super) async fn serve_loopback(listener: TcpListener, server: Arc<Server>) {
    let mut connections = JoinSet::new();
    while let Some(stream) = accepted(listener.accept(), &mut connections).await {
        let server = server.clone();
        connections.spawn(async move {
            let talk = converse(stream, server.clone(), Entrance::Loopback);
            until_refused(&server, talk).await;
        });
    }
}

/// Serves pods until the task is aborted.
pub(super) async fn serve_pods(
    listener: UnixListener,
    server: Arc<Server>,
    certificates: Certificates,
) {
    let mut connections = JoinSet::new();
    while let Some(stream) = accepted(listener.accept(), &mut connections).await {
        let (server, acceptor) = (server.clone(), certificates.acceptor.clone());
        connections.spawn(async move {
            let talk = async {
                match acceptor.accept(stream).await {
                    Ok(stream) => converse(stream, server.clone(), Entrance::Pods).await,
                    Err(error) => tracing::debug!(%error, "a TLS handshake failed"),
                }
            };
            until_refused(&server, talk).await;
        });
    }
}

/// Serves a connection to its end, or until a disturbance refuses connections: that also ends open
/// ones, above all watches.
async fn until_refused(server: &Server, talk: impl Future<Output = ()>) {
    let mut disturbances = server.disturbance.subscribe();
    tokio::select! {
        _ = disturbances.wait_for(|disturbance| matches!(disturbance, Disturbance::Refuse)) => {}
        () = talk => {}
    }
}

/// Returns the next connection, and reaps finished ones meanwhile.
async fn accepted<S, A>(
    next: impl Future<Output = io::Result<(S, A)>>,
    connections: &mut JoinSet<()>,
) -> Option<S> {
    tokio::pin!(next);
    loop {
        tokio::select! {
            accepted = &mut next => match accepted {
                Ok((stream, _)) => return Some(stream),
                Err(error) => {
                    tracing::error!(%error, "the embedded API server cannot accept connections any more");
                    return None;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    server: Arc<Server>,
    entrance: Entrance,
) {
    let service =
        service_fn(move |request: http::Request<Incoming>| server.clone().serve(entrance, request));
    // Without a timer: hyper would close idle connections, also those of tests that advance the clock.
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.with_upgrades().await {
        tracing::debug!(%error, "a connection to the embedded API server ended early");
    }
}
