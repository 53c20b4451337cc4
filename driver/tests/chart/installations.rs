//! Checks values as installations have them: what they render, and what the chart's notes say of them.

use k8s_openapi::api::apps::v1::DaemonSet;
use rstest::rstest;

use crate::helm::{Chart, Helm};
use crate::objects::objects;

#[rstest]
#[case("", "10m", "200Mi")]
#[case("linux: {driver: {resources: {limits: {memory: 1Gi}}}}", "50m", "1Gi")]
#[case(
    "linux: {driver: {resources: {limits: {memory: 1Gi}}, builtinResources: {limits: {memory: 300Mi}}}}",
    "10m",
    "300Mi"
)]
#[case("linux: {driver: {resources: null}}", "10m", "200Mi")]
fn the_drivers_resources_hold_in_one_container(
    #[case] values: &str,
    #[case] cpu: &str,
    #[case] memory: &str,
) {
    let Some(helm) = Helm::find() else { return };
    let values = format!("sidecars: builtin\n{values}");
    let rendered = helm.render(&Chart::ours(), "1.34.2", &values).unwrap();
    let pod = objects::<DaemonSet>(&rendered).remove(0).spec.template.spec;
    let driver = pod.unwrap().containers.remove(0).resources.unwrap();
    assert_eq!(driver.requests.unwrap()["cpu"].0, cpu);
    assert_eq!(driver.limits.unwrap()["memory"].0, memory);
}

#[rstest]
#[case("x-resources: &small {cpu: 1}", true)]
#[case("_team: storage", true)]
#[case("grpcSupportedProviders: gcp;azure", true)]
#[case("minimumProviderVersions: {azure: 0.0.14}", true)]
#[case("linux: {metricsAddr: 0}\nlivenessProbe: {port: 8095}", true)]
#[case("linux: {metricsAddr: ':9808'}\nlivenessProbe: {port: 9809}", true)]
#[case("commonLabels: {app: secrets-store-csi-driver, team: a}", true)]
#[case("linux: {podLabels: {app: csi}}\nnameOverride: csi", true)]
#[case("linux: {kubeletRootDir: /var/lib/pods/kubelet}", true)]
#[case("linux: {driver: {resources: {limits: {memory: 64Mi}}}}", true)]
#[case("linux: {driver: {resources: {limits: {memory: 67108864}}}}", true)]
#[case("linux: {driver: {resources: {limits: {memory: '0.5Gi'}}}}", true)]
#[case("linux: {driver: {resources: {limits: {memory: '128e6'}}}}", true)]
#[case("linux: {driver: {resources: {limits: {cpu: 1}}}}", true)]
#[case(
    "linux: {driver: {resources: {limits: {memory: 1Mi}}, container: {resources: {limits: {memory: 1Gi}}}}}",
    true
)]
#[case(
    "sidecars: builtin\nlinux: {driver: {builtinResources: {limits: null}}}",
    true
)]
#[case(
    "linux: {enabled: false, podLabels: {app: x}, kubeletRootDir: /var/lib/kubelet/pods}",
    true
)]
#[case("linux: {metricsAddr: 8080}", false)]
#[case("linux: {metricsAddr: 'node.example.org:8095'}", false)]
#[case("linux: {metricsAddr: ':65536'}", false)]
#[case("linux: {metricsAddr: ':65535'}", true)]
#[case("linux: {metricsAddr: 0}", true)]
#[case("linux: {metricsAddr: '[::]:8095'}", true)]
#[case("linux: {metricsAddr: 'localhost:8095'}", true)]
#[case(
    "linux: {metricsAddr: 'localhost:8095'}\npodMonitor: {enabled: true}",
    false
)]
#[case(
    "linux: {metricsAddr: '127.0.0.1:8095'}\nmetricsService: {enabled: true}",
    false
)]
#[case(
    "linux: {metricsAddr: '[::1]:8095'}\nserviceMonitor: {enabled: true}",
    false
)]
fn values_of_companies_render_or_are_refused(#[case] values: &str, #[case] renders: bool) {
    let Some(helm) = Helm::find() else { return };
    let rendered = helm.render(&Chart::ours(), "1.34.2", values);
    assert_eq!(rendered.is_ok(), renders, "{rendered:?}");
}

#[rstest]
#[case("", "is never pulled: each node needs it", true)]
#[case(
    "linux: {image: {repository: a.b/c, pullPolicy: Always}}",
    "is never pulled",
    false
)]
#[case(
    "podMonitor: {enabled: true}\nserviceMonitor: {enabled: 'true'}",
    "scrapes each pod twice",
    true
)]
#[case(
    "podMonitor: {enabled: true}\nmetricsService: {enabled: true}",
    "scrapes each pod twice",
    false
)]
#[case("", "docs/troubleshooting.md", true)]
#[case("", "--set=rbac.existingDriver=false", true)]
#[case("", "the Secrets of all namespaces", false)]
#[case(
    "syncSecret: {enabled: true}",
    "list, watch and update the Secrets of all namespaces.",
    true
)]
#[case(
    "syncSecret: {enabled: true}\nrbac: {existingDriver: false}",
    "existing driver uses",
    false
)]
#[case("", "sigs.k8s.io", false)]
fn notes_say_what_to_do(#[case] values: &str, #[case] sentence: &str, #[case] said: bool) {
    let Some(helm) = Helm::find() else { return };
    let notes = helm
        .render(&Chart::with_visible_notes(), "1.34.2", values)
        .unwrap();
    let (_, notes) = notes.split_once("kind: Notes").unwrap();
    assert_eq!(notes.contains(sentence), said, "{notes}");
}
