//! Checks that the usual mistakes are answered with what to do about them.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::harness::{Answer, Class, EAGER, Volume, World, alone, class};

/// The time for work in the background on a busy machine.
const SOON: Duration = Duration::from_secs(60);

macro_rules! fixture {
    ($name:literal) => {
        include_bytes!(concat!("../../src/sync/tls/fixtures/", $name))
    };
}

/// A mistake: its name, how it is made, and the pieces that the message has.
type Mistake = (&'static str, Make, &'static [&'static str]);

enum Make {
    /// The API server answers like this when the class is read.
    Read(Class),
    /// The class is changed.
    Class(fn(&mut Value)),
    /// The class makes a Secret `creds` of this type, with these keys, from a volume with an object
    /// `pw` of this content.
    Secret(
        &'static str,
        &'static [(&'static str, &'static str)],
        &'static [u8],
    ),
    /// The API server refuses the Secret.
    SecretRefused(u16, &'static str, &'static str),
    /// A driver made the Secret from other content, and this is changed since.
    SecretIsThere(fn(&mut Value)),
    /// The request of kubelet is changed, or what it has prepared.
    Request(fn(&World, &Volume, &mut proto::csi::NodePublishVolumeRequest)),
}

const TLS: &str = "kubernetes.io/tls";
const PAIR: &[(&str, &str)] = &[("tls.crt", "pw"), ("tls.key", "pw")];

fn mistakes() -> Vec<Mistake> {
    use Make::{Class as Changed, Read, Request, Secret, SecretIsThere, SecretRefused};
    vec![
        (
            "the CRDs are not installed",
            Read(Class::Text(404, "404 page not found\n")),
            &[
                "404 page not found",
                "Install the CRDs",
                "deploy/secrets-store.csi.x-k8s.io_",
            ],
        ),
        (
            "the token is not accepted",
            Read(Class::RefusedSo(401, "Unauthorized", "Unauthorized")),
            &["Unauthorized", "Restart the driver's pod"],
        ),
        (
            "the driver may not read classes",
            Read(Class::RefusedSo(
                403,
                "Forbidden",
                "secretproviderclasses.secrets-store.csi.x-k8s.io \"db\" is forbidden: User \"system:serviceaccount:kube-system:secrets-store-csi-driver\" cannot get resource \"secretproviderclasses\" in API group \"secrets-store.csi.x-k8s.io\" in the namespace \"shop\"",
            )),
            &[
                "cannot get resource",
                "rbac.install",
                "deploy/rbac-secretproviderclass.yaml",
            ],
        ),
        (
            "the class names no provider",
            Changed(|class| class["spec"]["provider"] = json!("")),
            &["provider not set", "set spec.provider"],
        ),
        (
            "the class has no parameters",
            Changed(|class| class["spec"]["parameters"] = json!({})),
            &["parameters not set", "set spec.parameters"],
        ),
        (
            "the provider is not installed",
            Changed(|class| class["spec"]["provider"] = json!("vault")),
            &["vault", "socket"],
        ),
        (
            "the interval is no duration",
            Changed(|class| {
                class["metadata"]["annotations"] =
                    json!({"secrets-store.csi.k8s.io/rotation-poll-interval": "soon"});
            }),
            &["rotation-poll-interval", "\"soon\"", "never"],
        ),
        (
            "a switch is no boolean",
            Changed(|class| {
                class["metadata"]["annotations"] =
                    json!({"secrets-store.csi.k8s.io/number-versions": "yes"});
            }),
            &["number-versions", "\"yes\"", "true or false"],
        ),
        (
            "kubelet has another root directory",
            Request(|_, volume, _| {
                fs::remove_dir_all(volume.target.parent().unwrap()).unwrap();
            }),
            &["linux.kubeletRootDir", "mountPropagation"],
        ),
        (
            "the volume is not read-only",
            Request(|_, _, request| request.readonly = false),
            &["readOnly: true"],
        ),
        (
            "the volume names no class",
            Request(|_, _, request| {
                request.volume_context.remove("secretProviderClass");
            }),
            &["secretProviderClass", "volumeAttributes"],
        ),
        (
            "objectName is not the alias",
            Secret("Opaque", &[("password", "secret/pw")], b"x"),
            &[
                "there is no object \"secret/pw\"",
                "the volume has \"pw\"",
                "alias",
            ],
        ),
        (
            "a quota is used up",
            SecretRefused(
                403,
                "Forbidden",
                "secrets \"creds\" is forbidden: exceeded quota: few, requested: secrets=1, used: secrets=3, limited: secrets=3",
            ),
            &[
                "the API server refuses it",
                "ResourceQuota few is used up, HTTP 403",
                "kubectl describe quota -n shop few",
            ],
        ),
        (
            "a webhook refuses the Secret",
            SecretRefused(
                403,
                "Forbidden",
                "admission webhook \"values.example.com\" denied the request: no",
            ),
            &[
                "admission webhook values.example.com denied it",
                "kubectl create secret generic -n shop creds-",
                "--dry-run=server",
                "ask those who run the webhook",
            ],
        ),
        (
            "a webhook for the Secret is away",
            SecretRefused(
                500,
                "InternalError",
                "Internal error occurred: failed calling webhook \"values.example.com\": failed to call webhook: Post \"https://values.shop.svc\": no endpoints available for service",
            ),
            &["admission webhook values.example.com could not be called"],
        ),
        (
            "a policy refuses the Secret",
            SecretRefused(
                422,
                "Invalid",
                "secrets \"creds\" is forbidden: ValidatingAdmissionPolicy 'no-weak-ones' with binding 'shop' denied request: no",
            ),
            &[
                "ValidatingAdmissionPolicy no-weak-ones with binding shop denied it",
                "--dry-run=server",
                "ask those who run the policy",
            ],
        ),
        (
            "a label of the class is none",
            SecretRefused(
                422,
                "Invalid",
                "Secret \"creds\" is invalid: metadata.labels: Invalid value: \"it is\": a valid label must be an empty string or consist of alphanumeric characters",
            ),
            &["its field metadata.labels is not accepted", "secretObjects"],
        ),
        (
            "the Secret is immutable",
            SecretIsThere(|secret| secret["immutable"] = json!(true)),
            &[
                "the Secret is immutable",
                "the driver makes it anew",
                "kubectl delete secret -n shop creds-",
            ],
        ),
        (
            "the driver may not write Secrets",
            SecretRefused(
                403,
                "Forbidden",
                "secrets is forbidden: User \"driver\" cannot create resource \"secrets\" in API group \"\" in the namespace \"shop\"",
            ),
            &["syncSecret.enabled"],
        ),
        (
            "PKCS#12 is stored as base64",
            Secret(TLS, PAIR, b"MIIKfAIBAzCCCjIGCSqGSIb3DQEHAaCCCiM="),
            &["encoding: base64"],
        ),
        (
            "PEM is stored as base64",
            Secret(TLS, PAIR, b"LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUIK"),
            &["PEM in base64", "encoding: base64"],
        ),
        (
            "PEM has no line breaks",
            Secret(
                TLS,
                PAIR,
                br"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
            ),
            &["store it with line breaks"],
        ),
        (
            "the key is encrypted",
            Secret(TLS, PAIR, fixture!("encrypted.key.pem")),
            &["passphrase"],
        ),
        (
            "PKCS#12 has a password",
            Secret(TLS, PAIR, fixture!("password.p12")),
            &["without a password"],
        ),
        (
            "the curve is explicit",
            Secret(TLS, PAIR, fixture!("explicit.traditional.pem")),
            &["openssl ec", "named_curve"],
        ),
        (
            "the certificate is openssl's own",
            Secret(
                TLS,
                PAIR,
                b"-----BEGIN TRUSTED CERTIFICATE-----\nAAAA\n-----END TRUSTED CERTIFICATE-----\n",
            ),
            &["openssl x509"],
        ),
    ]
}

/// Makes a mistake. Returns what kubelet is told.
async fn made(world: &mut World, make: Make) -> String {
    let volume = world.volume_of_its_own();
    let mut request = volume.request();
    let mut object = class(&volume.class, 1);
    let secret = |type_: &str, data: &[(&str, &str)], name: &str| {
        let data = data
            .iter()
            .map(|(key, object)| json!({"objectName": object, "key": key}));
        json!([{"secretName": name, "type": type_, "data": data.collect::<Vec<_>>()}])
    };
    let name = format!("creds-{}", volume.id);
    match make {
        Make::Read(answer) => world.api.class_is(&volume.class, [answer]),
        Make::Class(change) => {
            change(&mut object);
            world.api.class_is(&volume.class, [Class::Is(object)]);
        }
        Make::Secret(type_, data, content) => {
            object["spec"]["secretObjects"] = secret(type_, data, &name);
            world.api.class_is(&volume.class, [Class::Is(object)]);
            let answer = Answer {
                files: vec![("pw".to_owned(), content.to_vec())],
                ..Answer::file("pw", "x")
            };
            world.provider.answers(&volume.class, answer);
        }
        Make::SecretRefused(code, reason, message) => {
            object["spec"]["secretObjects"] = secret("Opaque", &[("pw", "pw")], &name);
            world.api.class_is(&volume.class, [Class::Is(object)]);
            world.api.refuse_secret(&name, (code, reason, message));
        }
        Make::SecretIsThere(change) => {
            object["spec"]["secretObjects"] = secret("Opaque", &[("pw", "pw")], &name);
            world.api.class_is(&volume.class, [Class::Is(object)]);
            let labels = json!({"secrets-store.csi.k8s.io/managed": "true"});
            let mut there = json!({
                "metadata": {"name": name, "resourceVersion": "1", "labels": labels},
                "type": "Opaque", "data": {"pw": "Zm9ybWVy"},
            });
            change(&mut there);
            let path = format!("/api/v1/namespaces/shop/secrets/{name}");
            world.api.put(&path, there);
        }
        Make::Request(change) => change(world, &volume, &mut request),
    }
    let mut client = world.client().await;
    let answer = client.node_publish_volume(request).await;
    answer.map_or_else(|status| status.message().to_owned(), |_| String::new())
}

#[test]
fn the_usual_mistakes_are_answered_with_what_to_do() {
    alone(async {
        let flags = [&EAGER[..], &["--sync-errors=fail"]].concat();
        let mut world = World::start(&flags).await;
        let mut wrong = Vec::new();
        for (name, make, pieces) in mistakes() {
            let message = made(&mut world, make).await;
            for piece in pieces.iter().filter(|piece| !message.contains(**piece)) {
                wrong.push(format!("{name}: there is no {piece:?} in: {message}"));
            }
            assert!(message.len() < 1024, "{name}: {message}");
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}

/// A class that is not there, or in another namespace: those that are in the namespace are named, as
/// far as they can be read.
#[test]
fn the_error_about_a_missing_class_names_others() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let classes = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces";
        let none = world.volume("db");
        let told = async |world: &World, volume: &Volume| {
            let status = world.publish_patiently(volume).await.unwrap_err();
            status.message().to_owned()
        };
        let message = told(&world, &none).await;
        assert!(message.ends_with("; there are none in shop"), "{message}");
        for (namespace, name) in [("shop", "database"), ("shop", "web"), ("other", "db")] {
            let mut there = class(name, 1);
            there["metadata"]["namespace"] = json!(namespace);
            let path = format!("{classes}/{namespace}/secretproviderclasses/{name}");
            world.api.put(&path, there);
        }
        let message = told(&world, &none).await;
        assert!(
            message.contains("create it in the pod's namespace"),
            "{message}"
        );
        let end = "; in shop there are: \"database\", \"web\"";
        assert!(message.ends_with(end), "{message}");
        for number in 0..50 {
            let path = format!("{classes}/shop/secretproviderclasses/many-{number}");
            world.api.put(&path, class(&format!("many-{number}"), 1));
        }
        let message = told(&world, &none).await;
        assert_eq!(message.matches('"').count(), 2 * 5, "{message}");
    });
}

/// Waits for an event about the pod of a volume.
async fn event(world: &World, volume: &Volume, reason: &str) -> String {
    let started = Instant::now();
    loop {
        let mut events = world.api.events().into_iter();
        let is_it = |event: &Value| {
            event["involvedObject"]["uid"] == volume.uid && event["reason"] == reason
        };
        if let Some(event) = events.find(is_it) {
            return event["message"].as_str().unwrap().to_owned();
        }
        assert!(started.elapsed() < SOON, "no event {reason}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_refresh_that_is_asked_for_while_nothing_is_refreshed() {
    alone(async {
        let mut world = World::start(&["--sync-interval=200ms"]).await;
        let volume = world.volume_of_its_own();
        let mut asking = class(&volume.class, 1);
        asking["metadata"]["annotations"] = json!({"secrets-store.csi.k8s.io/refresh": "1"});
        world
            .api
            .class_is(&volume.class, [Class::Is(asking.clone())]);
        world.publish_patiently(&volume).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(world.api.events_of(&volume, "MountRefreshIgnored"), 0);
        asking["metadata"]["annotations"] = json!({"secrets-store.csi.k8s.io/refresh": "2"});
        asking["metadata"]["resourceVersion"] = json!("11");
        world.api.class_is(&volume.class, [Class::Is(asking)]);
        let message = event(&world, &volume, "MountRefreshIgnored").await;
        assert!(message.contains("enableSecretRotation"), "{message}");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(world.api.events_of(&volume, "MountRefreshIgnored"), 1);
    });
}

#[test]
fn a_mount_with_sub_path_under_rotation() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let volume = world.volume_of_its_own();
        let spec = json!({"containers": [{
            "name": "app", "volumeMounts": [{"name": "secrets", "mountPath": "/pw", "subPath": "pw"}],
        }]});
        world.api.pod_is(&volume, spec);
        world.publish_patiently(&volume).await.unwrap();
        world
            .provider
            .answers(&volume.class, Answer::file("pw", "two"));
        world.publish_patiently(&volume).await.unwrap();
        let message = event(&world, &volume, "MountSubPathNotRefreshed").await;
        assert!(
            message.contains("subPath") && message.contains("replace the pod"),
            "{message}"
        );
    });
}
