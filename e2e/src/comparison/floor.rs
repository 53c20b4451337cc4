//! The floor of a publish: the requests that it cannot do without, each alone and one at a time. What a
//! driver takes beyond their sum is its own.

use std::time::Instant;

use kube::api::PostParams;
use kube::config::Kubeconfig;
use kube::core::DynamicObject;
use proto::provider::MountRequest;
use proto::provider::csi_driver_provider_client::CsiDriverProviderClient;
use serde_json::{Value, json};

use super::attempts::Round;
use crate::bench::{ControlPlane, Provider, Volume, failed, percentile};
use crate::cluster::{Result, api};
use crate::install::{classes, pod_statuses};
use crate::real;

/// The name of the sum.
pub(super) const SUM: &str = "floor of a publish: the sum of these three";
/// The name of what a publish takes for each millisecond of the sum.
pub(super) const RATIO: &str = "publish at 1, p50, divided by that sum";

/// Measures the read of the class, the creation of a pod status and the call of the provider, for each
/// volume in turn, with the rights of a driver and over connections that stay. `parameters` are those of
/// the class. The pod statuses belong to the volumes' pods.
///
/// # Errors
/// When a request is refused.
pub(super) async fn measure(
    (plane, provider): (&ControlPlane, &Provider),
    (class, parameters): (&str, &Value),
    volumes: &[Volume],
    round: &mut Round,
) -> Result<()> {
    let kubeconfig = Kubeconfig::read_from(plane.kubeconfig());
    let client =
        real::client(kubeconfig.map_err(|error| failed("the kubeconfig", &error))?).await?;
    let namespace = plane.namespace().name();
    let (classes, statuses) = (
        classes(&client, namespace),
        pod_statuses(&client, namespace),
    );
    let mut provider = CsiDriverProviderClient::new(provider.channel()?);
    let mut times: [Vec<f64>; 3] = Default::default();
    let mut measured = |number: usize, started: Instant| {
        times[number].push(started.elapsed().as_secs_f64() * 1000.0);
    };
    // Makes the connection.
    classes
        .get(class)
        .await
        .map_err(api("read a class".to_owned()))?;
    for volume in volumes {
        let started = Instant::now();
        let read = classes.get(class).await;
        measured(0, started);
        read.map_err(api("read a class".to_owned()))?;

        let status = pod_status(volume, class)?;
        let started = Instant::now();
        let created = statuses.create(&PostParams::default(), &status).await;
        measured(1, started);
        created.map_err(api("create a pod status".to_owned()))?;

        let request = mount_request(volume, parameters);
        let started = Instant::now();
        let mounted = provider.mount(request).await;
        measured(2, started);
        mounted.map_err(|status| failed("a call of the provider", &status.message()))?;
    }
    let names = [
        "GET of the class",
        "POST of a pod status",
        "call of the provider",
    ];
    let mut sum = 0.0;
    for (name, times) in names.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let median = percentile(times, 50);
        sum += median;
        round.add(&format!("floor of a publish: {name}, p50"), "ms", median);
    }
    round.add(SUM, "ms", sum);
    Ok(())
}

/// Returns a pod status as drivers write it.
fn pod_status(volume: &Volume, class: &str) -> Result<DynamicObject> {
    let (pod, uid, namespace) = (volume.pod(), volume.uid(), volume.namespace());
    let object = |id: &str| json!({"id": format!("secret/{id}"), "version": "v1"});
    let status = json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClassPodStatus",
        "metadata": {
            "name": format!("{pod}-{namespace}-{class}"),
            "namespace": namespace,
            "labels": {"internal.secrets-store.csi.k8s.io/node-name": "floor"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}],
        },
        "status": {
            "podName": pod,
            "secretProviderClassName": class,
            "mounted": true,
            "targetPath": volume.target(),
            "objects": [object("one"), object("two")],
        },
    });
    serde_json::from_value(status).map_err(|error| failed("a pod status", &error))
}

/// Returns a request for a volume as drivers send it.
fn mount_request(volume: &Volume, parameters: &Value) -> MountRequest {
    let mut attributes = json!(volume.publish().volume_context);
    for (key, value) in parameters.as_object().into_iter().flatten() {
        attributes[key] = value.clone();
    }
    MountRequest {
        attributes: attributes.to_string(),
        secrets: "null".to_owned(),
        target_path: volume.target(),
        permission: 0o644.to_string(),
        ..MountRequest::default()
    }
}
