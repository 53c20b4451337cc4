//! Each store by its own protocol, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Collected, Full};
use hyper::body::Incoming;
use hyper::client::conn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::proxy::read_head;
use super::state::SESSION;
use super::*;

/// A token as a service account has one.
const JWT: &str = "e30.e30.c2lnbmF0dXJl";

struct Fixture {
    directory: tempfile::TempDir,
    stores: Stores,
}

type Got = Response<Collected<Bytes>>;

impl Fixture {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let stores = Stores::start(directory.path(), 0, 0).await.unwrap();
        Self { directory, stores }
    }

    async fn tell(&self, command: Command) -> Vec<Call> {
        send(self.directory.path(), &command).await.unwrap()
    }

    async fn put(&self, service: Service, name: &str, value: &str) {
        let (name, value) = (name.to_owned(), value.to_owned());
        self.tell(Command::Put {
            service,
            name,
            value,
        })
        .await;
    }

    async fn deny(&self, service: Service, operation: &str) {
        let operation = operation.to_owned();
        self.tell(Command::Deny { service, operation }).await;
    }

    async fn disturb(&self, service: Service, disturbance: Disturbance) {
        self.tell(Command::Disturb {
            service,
            disturbance,
        })
        .await;
    }

    /// Sends a request to Vault.
    async fn vault(&self, request: Request<Full<Bytes>>) -> io::Result<Got> {
        let stream = TcpStream::connect(self.stores.vault).await?;
        let (mut sender, connection) = conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(connection);
        answer(sender.send_request(request).await).await
    }

    /// Sends a request to a host by the proxy.
    async fn host(&self, host: &str, mut request: Request<Full<Bytes>>) -> io::Result<Got> {
        let mut stream = TcpStream::connect(self.stores.proxy).await?;
        let head = format!("CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let head = read_head(&mut stream).await?;
        if !head.starts_with("HTTP/1.1 200 ") {
            return Err(io::Error::other(head));
        }
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(self.directory.path().join(CA)).unwrap();
        roots.add(ca).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let stream = TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await?;
        let is_grpc = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let stream = TokioIo::new(stream);
        if is_grpc {
            *request.uri_mut() = format!("https://{host}{}", request.uri()).parse().unwrap();
            let (mut sender, connection) = conn::http2::handshake(TokioExecutor::new(), stream)
                .await
                .map_err(io::Error::other)?;
            tokio::spawn(connection);
            return answer(sender.send_request(request).await).await;
        }
        let (mut sender, connection) = conn::http1::handshake(stream)
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(connection);
        answer(sender.send_request(request).await).await
    }
}

async fn answer(response: hyper::Result<Response<Incoming>>) -> io::Result<Got> {
    let (parts, body) = response.map_err(io::Error::other)?.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?;
    Ok(Response::from_parts(parts, body))
}

fn request(
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request
        .body(Full::new(Bytes::copy_from_slice(body)))
        .unwrap()
}

fn body(got: Got) -> Value {
    serde_json::from_slice(&got.into_body().to_bytes()).unwrap()
}

#[tokio::test]
async fn vault_serves_keys_to_callers_that_logged_in_and_can_be_away_or_hang() {
    let f = Fixture::start().await;
    f.put(Service::Vault, "shop/db", r#"{"password": "hunter2"}"#)
        .await;
    let login = json!({"jwt": JWT, "role": "shop"}).to_string();
    let login = || request("POST", "/v1/auth/kubernetes/login", &[], login.as_bytes());
    let token = body(f.vault(login()).await.unwrap());
    let token = token["auth"]["client_token"].as_str().unwrap().to_owned();
    let read = |path: &str| request("GET", path, &[("x-vault-token", &token)], b"");
    let secret = body(f.vault(read("/v1/secret/data/shop/db")).await.unwrap());
    assert_eq!(secret["data"]["data"]["password"], "hunter2");
    assert_eq!(secret["data"]["metadata"]["version"], 1);
    let status = async |request| f.vault(request).await.unwrap().status().as_u16();
    assert_eq!(status(read("/v1/secret/data/other")).await, 404);
    let without = request("GET", "/v1/secret/data/shop/db", &[], b"");
    assert_eq!(status(without).await, 403);
    f.deny(Service::Vault, "login").await;
    assert_eq!(status(login()).await, 403);
    f.tell(Command::Reset).await;

    f.disturb(Service::Vault, Disturbance::Away).await;
    let refused = async || TcpStream::connect(f.stores.vault).await.is_err();
    while !refused().await {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    f.disturb(Service::Vault, Disturbance::Hang).await;
    while refused().await {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let hung = tokio::time::timeout(Duration::from_millis(100), f.vault(login()));
    assert!(hung.await.is_err());
    f.disturb(Service::Vault, Disturbance::Slow(20)).await;
    assert_eq!(status(login()).await, 200);
    let call = |operation: &str, object: &str| Call {
        service: Some(Service::Vault),
        operation: operation.to_owned(),
        object: object.to_owned(),
    };
    let calls = f.tell(Command::Calls).await;
    assert_eq!(calls, [call(HUNG, ""), call("login", "shop")]);
}

#[tokio::test]
async fn aws_serves_secrets_and_parameters_to_callers_with_a_role() {
    let f = Fixture::start().await;
    f.put(Service::SecretsManager, "password", "old").await;
    f.put(Service::SecretsManager, "password", "new").await;
    f.put(Service::ParameterStore, "user", "shop").await;
    let form = format!(
        "Action=AssumeRoleWithWebIdentity&RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fshop&WebIdentityToken={JWT}"
    );
    let sts = "sts.nowhere-1.amazonaws.com";
    let session = request("POST", "/", &[], form.as_bytes());
    let session = f.host(sts, session).await.unwrap().into_body().to_bytes();
    assert!(String::from_utf8_lossy(&session).contains(SESSION));
    let signed = format!("AWS4-HMAC-SHA256 Credential={SESSION}/20260101/x, Signature=0");
    let ask = async |host: &str, target: &str, body: Value| {
        let headers = [("authorization", &*signed), ("x-amz-target", target)];
        let asked = request("POST", "/", &headers, body.to_string().as_bytes());
        let got = f.host(host, asked).await.unwrap();
        (got.status().as_u16(), self::body(got))
    };
    let secrets = "secretsmanager.nowhere-1.amazonaws.com";
    let id = json!({"SecretId": "password"});
    let (_, got) = ask(secrets, "secretsmanager.GetSecretValue", id.clone()).await;
    assert_eq!(got["SecretString"], "new");
    let (_, described) = ask(secrets, "secretsmanager.DescribeSecret", id.clone()).await;
    let stages = &described["VersionIdsToStages"][got["VersionId"].as_str().unwrap()];
    assert_eq!(stages[0], "AWSCURRENT");
    f.deny(Service::SecretsManager, "DescribeSecret").await;
    let (status, denied) = ask(secrets, "secretsmanager.DescribeSecret", id.clone()).await;
    assert_eq!(
        (status, &denied["__type"]),
        (400, &json!("AccessDeniedException"))
    );
    let (status, _) = ask(secrets, "secretsmanager.GetSecretValue", id).await;
    assert_eq!(status, 200);
    let names = json!({"Names": ["user", "other"]});
    let (_, got) = ask(
        "ssm.nowhere-1.amazonaws.com",
        "AmazonSSM.GetParameters",
        names,
    )
    .await;
    assert_eq!(got["Parameters"][0]["Value"], "shop");
    assert_eq!(got["InvalidParameters"], json!(["other"]));
}

#[tokio::test]
async fn azure_serves_secrets_to_callers_with_a_token_of_its_login() {
    let f = Fixture::start().await;
    f.put(Service::KeyVault, "password", "hunter2").await;
    let vault = "shop.vault.azure.net";
    let path = "/secrets/password/?api-version=7.6";
    let challenge = f.host(vault, request("GET", path, &[], b"")).await.unwrap();
    assert_eq!(challenge.status(), 401);
    assert!(challenge.headers().contains_key("www-authenticate"));
    let login = "login.microsoftonline.com";
    let token = request("POST", "/t/oauth2/v2.0/token", &[], b"client_id=shop");
    let token = body(f.host(login, token).await.unwrap());
    let bearer = format!("Bearer {}", token["access_token"].as_str().unwrap());
    let ask = || request("GET", path, &[("authorization", &bearer)], b"");
    let secret = body(f.host(vault, ask()).await.unwrap());
    assert_eq!(secret["value"], "hunter2");
    f.deny(Service::KeyVault, "GetSecret").await;
    assert_eq!(f.host(vault, ask()).await.unwrap().status(), 403);
}

#[tokio::test]
async fn google_serves_secrets_over_grpc_to_callers_with_an_exchanged_token() {
    let f = Fixture::start().await;
    let secret = "projects/shop/secrets/password";
    f.put(Service::SecretManager, secret, "hunter2").await;
    let exchange = json!({"subject_token": JWT, "audience": "pool"}).to_string();
    let exchange = request("POST", "/v1/identitybindingtoken", &[], exchange.as_bytes());
    let token = body(
        f.host("securetoken.googleapis.com", exchange)
            .await
            .unwrap(),
    );
    let bearer = format!("Bearer {}", token["access_token"].as_str().unwrap());
    let ask = async |secret: &str| {
        let name = format!("{secret}/versions/latest");
        let mut message = vec![0, 0, 0, 0, u8::try_from(name.len() + 2).unwrap()];
        message.extend([0x0a, u8::try_from(name.len()).unwrap()]);
        message.extend(name.as_bytes());
        let path = "/google.cloud.secretmanager.v1.SecretManagerService/AccessSecretVersion";
        let headers = [("authorization", &*bearer), ("te", "trailers")];
        let asked = request("POST", path, &headers, &message);
        f.host("secretmanager.googleapis.com", asked).await.unwrap()
    };
    let got = ask(secret).await.into_body();
    assert_eq!(got.trailers().unwrap()["grpc-status"], "0");
    let got = String::from_utf8_lossy(&got.to_bytes()).into_owned();
    assert!(
        got.contains("/versions/1") && got.ends_with("hunter2"),
        "{got:?}"
    );
    let got = ask("projects/shop/secrets/other").await;
    assert_eq!(got.headers()["grpc-status"], "5");
}

#[tokio::test]
async fn hosts_that_are_not_served_are_refused_and_listed() {
    let f = Fixture::start().await;
    for (host, says) in [
        ("example.com", "403"),
        ("169.254.169.254", "403"),
        ("secretsmanager.away.amazonaws.com", "502"),
    ] {
        let refused = f
            .host(host, request("GET", "/", &[], b""))
            .await
            .unwrap_err();
        assert!(refused.to_string().contains(says), "{refused}");
    }
    let calls = f.tell(Command::Calls).await;
    let hosts: Vec<_> = calls.iter().map(|call| &*call.operation).collect();
    assert_eq!(hosts, ["example.com", "169.254.169.254"]);
}
