//! A CSI driver under a kubelet, without Docker: `cargo run --example greeting`.

mod driver;

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use embedded::{Cluster, Options, apply, is_ready, take_over, target_path};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::Api;
use kube::runtime::wait::await_condition;

fn main() -> Result<(), Box<dyn Error>> {
    take_over();
    let runtime = tokio::runtime::Runtime::new()?;
    // The nodes start this executable again, as the driver.
    match std::env::args().nth(1) {
        Some(endpoint) => runtime.block_on(driver::run(&endpoint)),
        None => runtime.block_on(test()),
    }
}

async fn test() -> Result<(), Box<dyn Error>> {
    let own = std::env::current_exe()?;
    let cluster = Cluster::start(Options {
        manifests: vec![include_str!("driver.yaml").to_owned()],
        programs: BTreeMap::from([("greeting-driver".to_owned(), own.clone())]),
        // A driver whose registration is served by tonic needs this, and does not run under a real
        // kubelet without a sidecar for its registration.
        path_authority: false,
        ..Options::bare(own)
    })
    .await?;
    apply(&cluster.client(), "default", include_str!("pod.yaml")).await?;
    let pods = Api::<Pod>::namespaced(cluster.client(), "default");
    let ready = await_condition(pods, "web", |pod: Option<&Pod>| pod.is_some_and(is_ready));
    let pod = tokio::time::timeout(Duration::from_secs(10), ready).await??;
    let uid = pod.and_then(|pod| pod.uid()).unwrap_or_default();
    let file = target_path(&uid, "greeting").join("greeting");
    let read = ["cat", &*file.to_string_lossy()];
    println!("{}", cluster.exec("node-1", &read).await?);
    Ok(())
}
