//! Renders the lean DaemonSet, with one container, from the one with three.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Returns the same DaemonSet without sidecars: the driver registers itself with kubelet and answers
/// kubelet's probe. The rest is equal to `full`, so that one form can replace the other in place.
pub(crate) fn lean(mut full: DaemonSet) -> DaemonSet {
    let pod = full.spec.template.spec.as_mut().unwrap();
    let [registrar, driver, _liveness_probe] = pod.containers.as_mut_slice() else {
        panic!("three containers")
    };
    // The driver gets the settings of the sidecars, whose work it does.
    let registration_path = argument(registrar, "--kubelet-registration-path=");
    let mounts = registrar.volume_mounts.take().unwrap();
    let registration = mounts
        .into_iter()
        .find(|mount| mount.name == "registration-dir")
        .unwrap();
    let healthz = &driver.ports.as_ref().unwrap()[0];
    driver.args.as_mut().unwrap().extend([
        "--kubelet-root-dir=/var/lib/kubelet".to_owned(),
        format!("--registration-dir={}", registration.mount_path),
        registration_path,
        format!("--healthz-addr=:{}", healthz.container_port),
    ]);
    driver.volume_mounts.as_mut().unwrap().push(registration);
    request_less(driver.resources.as_mut().unwrap());
    let driver = driver.clone();
    pod.containers = vec![driver];
    full
}

/// Requests what the driver needs at rest, with some room. Its limits are for many pods that start at
/// once.
fn request_less(resources: &mut ResourceRequirements) {
    let requests = resources.requests.as_mut().unwrap();
    requests.insert("cpu".to_owned(), Quantity("10m".to_owned()));
    requests.insert("memory".to_owned(), Quantity("20Mi".to_owned()));
}

fn argument(container: &Container, flag: &str) -> String {
    let mut args = container.args.iter().flatten();
    args.find(|arg| arg.starts_with(flag)).unwrap().clone()
}
