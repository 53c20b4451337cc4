//! Checks which images the chart takes: not copies of the existing driver's, and none that no node can pull.

use k8s_openapi::api::apps::v1::DaemonSet;
use rstest::rstest;
use serde_json::json;

use crate::helm::{Chart, Helm, IMAGE_BY_HAND};
use crate::objects::objects;

/// What clouds, providers' charts, hardened images and mirrors call the existing driver's image, or its
/// copy. Each is there with the source that names it.
const COPIES: [&str; 14] = [
    // Azure: the chart of its provider, and AKS itself.
    "mcr.microsoft.com/oss/kubernetes-csi/secrets-store/driver",
    "mcr.microsoft.com/oss/v2/kubernetes-csi/secrets-store/driver",
    // Alibaba Cloud: the chart of its provider.
    "registry.cn-hangzhou.aliyuncs.com/acs/csi-secrets-store-driver",
    // OpenShift: its operator, and the image that is shipped.
    "quay.io/openshift/origin-secrets-store-csi-driver",
    "registry.redhat.io/openshift4/ose-secrets-store-csi-driver-rhel8",
    "registry.redhat.io/openshift4/ose-secrets-store-csi-driver-rhel9",
    // Hardened images of Chainguard and Docker.
    "cgr.dev/chainguard/secrets-store-csi-driver",
    "cgr.dev/example.org/secrets-store-csi-driver-fips",
    "dhi.io/secrets-store-csi-driver",
    // The existing driver's own, before they are released, and from its first home.
    "gcr.io/k8s-staging-csi-secrets-store/driver",
    "docker.io/deislabs/secrets-store-csi",
    // ECR has no copy of its own: one pulls through, another is pushed by hand.
    "123456789012.dkr.ecr.eu-west-1.amazonaws.com/registry-k8s-io/csi-secrets-store/driver",
    "123456789012.dkr.ecr.eu-west-1.amazonaws.com/csi-secrets-store/driver",
    "public.ecr.aws/example/secrets-store-csi-driver",
];

/// Returns how a mirror calls these images: with the registry's name, without it, with other separators.
fn mirrored() -> Vec<String> {
    let mut mirrored = Vec::new();
    for copy in COPIES
        .into_iter()
        .chain(["registry.k8s.io/csi-secrets-store/driver"])
    {
        let (registry, path) = copy.split_once('/').unwrap();
        let mirrors = [
            "mirror.example.org",
            "localhost:5000",
            "harbor.example.org/proxy",
        ];
        for mirror in mirrors {
            mirrored.push(format!("{mirror}/{path}"));
            mirrored.push(format!("{mirror}/{registry}/{path}"));
        }
        // The existing driver's own registry is no mirror: the chart replaces this name.
        if registry != "registry.k8s.io" {
            mirrored.push(copy.to_owned());
        }
        mirrored.push(format!("{copy}:v1.6.0"));
        // A mirror without folders. The image of the first home would have the name of this driver's.
        if !path.starts_with("deislabs") {
            mirrored.push(format!("mirror.example.org/{}", path.replace('/', "-")));
        }
    }
    mirrored
}

/// Renders several installations of the chart at once, with one image each, and returns what becomes of
/// each: the image or Helm's message.
fn images(helm: &Helm, repositories: &[String]) -> Vec<Result<String, String>> {
    let render = |repository: &String| {
        let values = json!({"linux": {"image": {"repository": repository}}}).to_string();
        let rendered = helm.render_with(&Chart::ours(), "1.34.2", &[&values])?;
        let pod = objects::<DaemonSet>(&rendered).remove(0).spec.template.spec;
        Ok(pod.unwrap().containers.remove(1).image.unwrap())
    };
    std::thread::scope(|scope| {
        let quarters = repositories.chunks(repositories.len().div_ceil(4));
        let threads: Vec<_> = quarters
            .map(|some| scope.spawn(|| some.iter().map(render).collect::<Vec<_>>()))
            .collect();
        let ended = threads.into_iter().map(|thread| thread.join().unwrap());
        ended.flatten().collect()
    })
}

#[test]
fn copies_of_the_existing_drivers_image_are_refused() {
    let Some(helm) = Helm::find() else { return };
    let copies = mirrored();
    assert!(copies.len() > 120, "{}", copies.len());
    for (copy, outcome) in copies.iter().zip(images(&helm, &copies)) {
        let refusal = outcome.expect_err(copy);
        let sentence =
            format!("linux.image.repository={copy} is a copy of the existing driver's image");
        assert!(refusal.contains(&sentence), "{refusal}");
    }
}

/// A name of one's own for a copy says nothing, so the version does.
#[rstest]
#[case("v1.6.0", true)]
#[case("v1.6.0-1", true)]
#[case("v1.0.1", true)]
#[case("v0.0.23", true)]
#[case("v0.1.0", false)]
#[case("v1.7.0", false)]
#[case("1.6.0", false)]
#[case("latest", false)]
fn versions_of_the_existing_driver_are_refused(#[case] tag: &str, #[case] refused: bool) {
    let Some(helm) = Helm::find() else { return };
    let names = [
        "artifactory.example.org/secrets-store-csi",
        "reg.example.org/csi/driver",
    ];
    for name in names {
        let render = |digest: &str| {
            let image = json!({"repository": name, "tag": tag, "digest": digest});
            let values = json!({"linux": {"image": image}}).to_string();
            helm.render_with(&Chart::ours(), "1.34.2", &[&values])
        };
        match render("") {
            Ok(_) => assert!(!refused, "{tag}"),
            Err(why) => {
                let sentence = format!("linux.image.tag={tag} is a version of the existing driver");
                assert!(refused && why.contains(&sentence), "{why}");
            }
        }
        // With a digest, the tag is not used.
        render("sha256:0000000000000000000000000000000000000000000000000000000000000000").unwrap();
    }
}

#[test]
fn images_of_this_driver_are_taken() {
    let Some(helm) = Helm::find() else { return };
    let ours = [
        "ghcr.io/owner/repository/secrets-store-csi",
        "localhost:5000/secrets-store-csi",
        "mirror.example.org/secrets-store-csi",
        "mcr.example.org/oss/v2/secrets-store/secrets-store-csi",
        "mirror.example.org/secrets-store-csi-driver-rust",
        "mirror.example.org/csi-secrets-store/rust-driver",
    ]
    .map(str::to_owned);
    for (repository, outcome) in ours.iter().zip(images(&helm, &ours)) {
        assert_eq!(outcome, Ok(format!("{repository}:0.1.0")));
    }
}

/// Reused values name the existing driver's image. The released chart has its own image in their place.
#[rstest]
#[case("registry.k8s.io/csi-secrets-store/driver")]
#[case("k8s.gcr.io/csi-secrets-store/driver")]
#[case("us.gcr.io/k8s-artifacts-prod/csi-secrets-store/driver")]
fn the_existing_drivers_own_image_is_replaced(#[case] repository: &str) {
    let Some(helm) = Helm::find() else { return };
    let values = format!(
        "linux: {{image: {{repository: {repository}, tag: v1.6.0, digest: 'sha256:0000000000000000000000000000000000000000000000000000000000000000'}}}}"
    );
    let rendered = helm.render(&Chart::ours(), "1.34.2", &values).unwrap();
    assert!(
        rendered.contains("image: secrets-store-csi:0.1.0\n"),
        "{rendered}"
    );
    let released = Chart::released("ghcr.io/owner/repository/secrets-store-csi");
    let rendered = helm.render_with(&released, "1.34.2", &[&values]).unwrap();
    assert!(
        rendered.contains("image: ghcr.io/owner/repository/secrets-store-csi:0.1.0\n"),
        "{rendered}"
    );
}

#[rstest]
#[case("", false)]
#[case("linux: {image: {repository: team/secrets-store-csi}}", false)]
#[case(
    "linux: {image: {digest: 'sha256:0000000000000000000000000000000000000000000000000000000000000000'}}",
    false
)]
#[case(
    "linux: {image: {repository: registry.k8s.io/csi-secrets-store/driver}}",
    false
)]
#[case(IMAGE_BY_HAND, true)]
#[case(
    "linux: {image: {repository: registry.example.org/secrets-store-csi}}",
    true
)]
#[case("linux: {enabled: false}", true)]
fn an_image_without_a_registry_must_be_loaded_by_hand(#[case] values: &str, #[case] renders: bool) {
    let Some(helm) = Helm::find() else { return };
    let rendered = helm.render_with(&Chart::ours(), "1.34.2", &[values]);
    assert_eq!(rendered.is_ok(), renders, "{rendered:?}");
    if let Err(refusal) = rendered {
        assert!(
            refusal.contains("names no registry to pull it from: push the image"),
            "{refusal}"
        );
    }
}
