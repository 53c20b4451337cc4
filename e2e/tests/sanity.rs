//! The CSI community's checks, `csi-sanity`, against the driver's executable.
//!
//! Source: <https://github.com/kubernetes-csi/csi-test>. Checks that need a controller service, or
//! volumes that it has made, are skipped: this driver runs on nodes only. Without `csi-sanity`, the
//! whole test is skipped.
//!
//! Up to 5.4, the checks read a controller's capabilities even if the driver does not have one, and
//! expect at least one. Therefore a proxy in front of the driver answers requests to a controller
//! with the capability `UNKNOWN`, and forwards all others.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use e2e::binaries::Binaries;
use e2e::install::assets;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::{BodyExt as _, Full};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint, Server};
use tower::ServiceExt as _;

/// The checks that need a controller or staged volumes.
const SKIPPED: &str =
    "Controller|should.work|NodeStageVolume|should.be.idempotent|should.remove.target.path";
/// The passed checks, of 96: identity 3, node capabilities, node info, publish 3, unpublish 2.
const PASSED: &str = "10 Passed";

/// The driver's process; killed when dropped.
struct Driver(Child);

impl Drop for Driver {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A ControllerGetCapabilitiesResponse with one capability, the RPC `UNKNOWN`, in gRPC's framing.
const NO_CONTROLLER: [u8; 9] = [0, 0, 0, 0, 4, 0x0a, 2, 0x0a, 0];

async fn answer(driver: Channel, request: axum::extract::Request) -> Response<Body> {
    if request.uri().path().starts_with("/csi.v1.Controller/") {
        let message = Full::new(Bytes::from_static(&NO_CONTROLLER));
        let status = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from(0))]);
        let body = message.with_trailers(std::future::ready(Some(Ok(status))));
        let answer = Response::builder().header("content-type", "application/grpc");
        return answer.body(Body::new(body)).unwrap();
    }
    driver.oneshot(request.map(Body::new)).await.unwrap()
}

/// Serves the proxy in front of the driver.
fn serve(socket: &Path, driver: &Path) {
    let driver = Endpoint::from_shared(format!("unix://{}", driver.display()))
        .unwrap()
        .connect_lazy();
    let routes = axum::Router::new().fallback(async move |request| answer(driver, request).await);
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(
        Server::builder()
            .add_routes(Routes::from(routes))
            .serve_with_incoming(UnixListenerStream::new(listener)),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn csi_sanity() {
    let program = assets().join("csi-sanity");
    if !program.exists() {
        return e2e::skipped::skip(&format!("there is no {}", program.display()));
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("csi.sock");
    let driver = Binaries::find(|_| {}).unwrap().driver;
    let _driver = Driver(
        Command::new(driver)
            .arg(format!("--endpoint=unix://{}", socket.display()))
            .args(["--nodeid=node-1", "--metrics-addr="])
            .arg(format!("--provider-volume={}", dir.path().display()))
            // Where the tests run in a pod, too, the driver shares its mounts with the caller.
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let started = Instant::now();
    while !socket.exists() {
        assert!(started.elapsed() < Duration::from_secs(20), "no CSI socket");
        std::thread::sleep(Duration::from_millis(20));
    }
    let endpoint = dir.path().join("endpoint.sock");
    serve(&endpoint, &socket);
    let output = Command::new(program)
        .arg(format!("--csi.endpoint=unix://{}", endpoint.display()))
        .arg(format!(
            "--csi.mountdir={}",
            dir.path().join("mount").display()
        ))
        .arg(format!(
            "--csi.stagingdir={}",
            dir.path().join("stage").display()
        ))
        .arg(format!("--ginkgo.skip={SKIPPED}"))
        .arg("--ginkgo.no-color")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains(PASSED) && text.contains("0 Failed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
