//! Checks the errors of publishes: their length, and their hints.

use serde_json::{Value, json};

use crate::harness::{Answer, Class, EAGER, World, alone, class};

/// The longest message that an error may have, in bytes.
const LONGEST: usize = 4096;

/// A text of many bytes, which escaping makes longer. The entries of a class have at most 128 KiB.
fn long() -> String {
    "\u{e0001}".repeat(25_000)
}

/// Returns a class whose one Secret has this entry, with the fields of `data` for its data.
fn with_secret(name: &str, entry: Value, data: Value) -> Value {
    let mut object = json!({"secretName": name, "type": "Opaque"});
    let mut datum = json!({"objectName": "pw", "key": "pw"});
    for (whole, fields) in [(&mut object, entry), (&mut datum, data)] {
        for (key, value) in fields.as_object().unwrap() {
            whole[key] = value.clone();
        }
    }
    object["data"] = json!([datum]);
    let mut class = class(name, 2);
    class["spec"]["secretObjects"] = json!([object]);
    class
}

fn annotated(name: &str, key: &str) -> Value {
    let mut class = class(name, 1);
    class["metadata"]["annotations"] = json!({format!("secrets-store.csi.k8s.io/{key}"): long()});
    class
}

#[test]
fn an_error_about_a_long_text_is_short() {
    alone(async {
        let flags = [&EAGER[..], &["--sync-errors=fail"]].concat();
        let mut world = World::start(&flags).await;
        let mut told = Vec::new();

        let in_context = [
            ("csi.storage.k8s.io/pod.name", "csi.storage.k8s.io/pod.name"),
            (
                "csi.storage.k8s.io/pod.namespace",
                "csi.storage.k8s.io/pod.namespace",
            ),
            ("csi.storage.k8s.io/pod.uid", "target path"),
            ("secretProviderClass", "failed to get secretproviderclass"),
            (
                "secrets-store.csi.k8s.io/rotation-poll-interval",
                "rotation-poll-interval",
            ),
            ("secrets-store.csi.k8s.io/default-mode", "default-mode"),
        ];
        for (key, expected) in in_context {
            let mut request = world.volume_of_its_own().request();
            request.volume_context.insert(key.to_owned(), long());
            told.push((key, expected, world.publish(request).await));
        }
        let mut request = world.volume_of_its_own().request();
        request.target_path += &long();
        told.push(("target", "target path", world.publish(request).await));
        let mut request = world.volume_of_its_own().request();
        let group = access(long());
        request.volume_capability = Some(group);
        told.push(("group", "volume mount group", world.publish(request).await));

        type Make = fn(&str) -> Value;
        let of_class: [(&str, Make); 12] = [
            ("invalid provider", |n| {
                let mut class = class(n, 2);
                class["spec"]["provider"] = long().into();
                class
            }),
            ("rotation-poll-interval", |n| {
                annotated(n, "rotation-poll-interval")
            }),
            ("send-object-versions", |n| {
                annotated(n, "send-object-versions")
            }),
            ("cannot be the name of a Secret", |n| {
                with_secret(n, json!({"secretName": long()}), json!({}))
            }),
            ("there is no object", |n| {
                with_secret(n, json!({}), json!({"objectName": long()}))
            }),
            ("cannot be a key", |n| {
                with_secret(n, json!({}), json!({"key": long()}))
            }),
            ("objectName is empty", |n| {
                with_secret(n, json!({}), json!({"objectName": "", "key": long()}))
            }),
            ("leave it out", |n| {
                with_secret(n, json!({}), json!({"objectName": "*", "key": long()}))
            }),
            ("not a JSON object", |n| {
                with_secret(n, json!({}), json!({"jsonKey": long()}))
            }),
            ("is not supported", |n| {
                with_secret(n, json!({}), json!({"key": long(), "encoding": "rot13"}))
            }),
            ("is not supported: write base64", |n| {
                with_secret(n, json!({}), json!({"encoding": long()}))
            }),
            ("tls-key-format", |n| {
                let mut class = with_secret(
                    n,
                    json!({"type": "kubernetes.io/tls"}),
                    json!({"key": "tls.crt"}),
                );
                let of_key = json!({"objectName": "pw", "key": "tls.key"});
                class["spec"]["secretObjects"][0]["data"]
                    .as_array_mut()
                    .unwrap()
                    .push(of_key);
                class["metadata"]["annotations"] =
                    annotated(n, "tls-key-format")["metadata"]["annotations"].clone();
                class
            }),
        ];
        for (expected, make) in of_class {
            let volume = world.volume_of_its_own();
            // Secrets are a matter of the first publish, and the other fields of a refresh.
            if make(&volume.class)["spec"]["secretObjects"].is_null() {
                world.publish_patiently(&volume).await.unwrap();
            }
            world
                .api
                .class_is(&volume.class, [Class::Is(make(&volume.class))]);
            told.push((expected, expected, world.publish_patiently(&volume).await));
        }

        for (case, expected, answer) in told {
            let message = answer.expect_err(case).message().to_owned();
            let length = message.len();
            assert!(length < LONGEST, "{case}: {length} bytes");
            assert!(message.contains(expected), "{case}: {message}");
        }
    });
}

/// A wrong annotation is told when a pod starts, and not only when its volume should be refreshed.
#[test]
fn a_wrong_annotation_of_the_class_fails_the_first_publish() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        for (key, values) in [
            ("rotation-poll-interval", ["soon", "1 h", ""]),
            ("send-object-versions", ["True", "yes", ""]),
        ] {
            for value in values {
                let volume = world.volume_of_its_own();
                let mut wrong = class(&volume.class, 1);
                wrong["metadata"]["annotations"] =
                    json!({format!("secrets-store.csi.k8s.io/{key}"): value});
                world.api.class_is(&volume.class, [Class::Is(wrong)]);
                world.provider.asked();
                let status = world.publish_patiently(&volume).await.unwrap_err();
                assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status}");
                assert!(status.message().contains(key), "{status}");
                assert!(world.provider.asked().is_empty(), "{key}: {value}");
            }
        }
    });
}

/// Parameters of a class may have any name, but what kubelet tells of a pod comes from kubelet alone.
#[test]
fn a_class_sets_nothing_that_kubelet_tells_of_a_pod() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let volume = world.volume_of_its_own();
        let own = [
            "serviceAccount.tokens",
            "pod.name",
            "pod.uid",
            "ephemeral",
            "anything",
            "",
        ];
        let mut forged = class(&volume.class, 1);
        for name in own {
            forged["spec"]["parameters"][format!("csi.storage.k8s.io/{name}")] = json!("forged");
        }
        let allowed = ["csi.storage.k8s.io", "x/csi.storage.k8s.io/pod.name", "a"];
        for name in allowed {
            forged["spec"]["parameters"][name] = json!("of the class");
        }
        world.api.class_is(&volume.class, [Class::Is(forged)]);
        world.provider.asked();
        world.publish_patiently(&volume).await.unwrap();
        let asked = world.provider.asked();
        assert!(!asked[0].to_string().contains("forged"), "{asked:?}");
        for name in allowed {
            assert_eq!(asked[0][name], "of the class", "{asked:?}");
        }
    });
}

fn access(group: String) -> proto::csi::VolumeCapability {
    use proto::csi::{
        VolumeCapability,
        volume_capability::{AccessType, MountVolume},
    };
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume {
            volume_mount_group: group,
            ..MountVolume::default()
        })),
        ..VolumeCapability::default()
    }
}

/// The error of a provider that wants a service account token has a hint if none was sent.
#[test]
fn a_hint_at_tokens_is_for_those_who_sent_none() {
    alone(async {
        let mut world = World::start(&[]).await;
        let tokens =
            json!({"vault": {"token": "t", "expirationTimestamp": "2026-01-01T00:00:00Z"}});
        for (in_context, in_secrets) in [(false, false), (true, false), (false, true)] {
            for answer in [
                Answer {
                    error_code: Some("token-expired"),
                    ..Answer::default()
                },
                Answer {
                    says: "the token is not valid",
                    ..Answer::default()
                },
            ] {
                let volume = world.volume_of_its_own();
                world.provider.answers(&volume.class, answer);
                let mut request = volume.request();
                let key = "csi.storage.k8s.io/serviceAccount.tokens".to_owned();
                if in_context {
                    request.volume_context.insert(key, tokens.to_string());
                } else if in_secrets {
                    request.secrets.insert(key, tokens.to_string());
                }
                let error = world.publish(request).await.unwrap_err();
                let is_hinted = error
                    .message()
                    .contains("No service account token was sent");
                assert_eq!(is_hinted, !in_context && !in_secrets, "{error}");
            }
        }
    });
}
