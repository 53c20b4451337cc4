//! Scenarios over known providers. The real ones run unmodified, against fakes of their stores; the
//! fake one has the manners of all of them. Both are compared with the same snapshots, which proves that
//! the manners are those of the real ones.

use std::time::{Duration, Instant};

use e2e::{
    cluster::Cluster as _,
    providers::{Object, Provider},
    stores::{Disturbance, Service},
};
use serde_json::json;

use crate::{
    harness::SOON,
    objects::{Class, MOUNT, SecretObject, pod},
    settings::Need,
};
use stage::{Cast, Refused, Stage, TOKENS_IN_SECRETS, compare};

mod moves;
mod openbao;
mod stage;

/// Makes a test of each scenario and each provider: `real::first_mount::vault` and
/// `manners::first_mount`, which has all providers.
macro_rules! table {
    ($($(#[$doc:meta])* $scenario:ident: $($provider:ident)* $(, $manners:ident)?;)+) => {
        mod real {
            $(mod $scenario {
                $(#[tokio::test]
                async fn $provider() {
                    super::super::$scenario(super::super::Cast::named(stringify!($provider))).await;
                })*
            })+
        }
        mod manners {
            $($(#[tokio::test]
            async fn $scenario() {
                super::$scenario(super::Cast::named(stringify!($manners))).await;
            })?)+
        }
    };
}

table! {
    first_mount:                   vault openbao aws azure gcp, manners;
    many_objects:                  vault openbao aws azure gcp, manners;
    default_mode_and_group:        vault openbao aws azure gcp, manners;
    rotation:                      vault openbao aws azure gcp, manners;
    class_edited:                  vault openbao aws azure gcp, manners;
    class_edited_with_versions:    vault openbao aws azure gcp, manners;
    secret_missing:                vault openbao aws azure gcp, manners;
    secret_denied:                 vault openbao aws azure gcp, manners;
    login_denied:                  vault openbao aws azure gcp;
    describing_denied:                           aws          , manners;
    store_away:                    vault openbao aws azure gcp, manners;
    provider_killed:               vault openbao aws azure gcp, manners;
    provider_away:                                            , manners;
    synced_secret:                 vault openbao aws azure gcp, manners;
    tokens_in_secrets:             vault openbao aws azure gcp;
    no_tokens:                     vault openbao aws azure gcp;
    unpublish_during_a_hung_call:  vault openbao aws azure gcp, manners;
    own_files:                                   aws          ;
    files_by_the_driver:                         aws          ;
    parameter_store:                             aws          ;
}

/// Starts a scenario, or ends it where something is missing.
macro_rules! stage {
    ($cast:expr $(, $need:expr)*) => {
        match Stage::start($cast, &[$($need),*]).await {
            Some(stage) => stage,
            None => return,
        }
    };
}

const PASSWORD: Object = Object::new("password");
const SEND_VERSIONS: &str = "secrets-store.csi.k8s.io/send-object-versions";
const DEFAULT_MODE: &str = "secrets-store.csi.k8s.io/default-mode";

/// A file, its mode, and the pod status.
async fn first_mount(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.mounted(&[PASSWORD]).await;
    stage.compare_states("first_mount").await;
    stage.unmounted().await;
}

/// Paths and modes of their own, and a large object.
async fn many_objects(cast: Cast) {
    let stage = stage!(cast);
    stage.put("user", "alice").await;
    stage.put("password", "hunter2").await;
    stage.put("key", "private").await;
    stage.put("large", &"0123456789abcde\n".repeat(1200)).await;
    let objects = [
        Object::new("user"),
        PASSWORD.at("db/password"),
        Object::new("key").mode("0400"),
        Object::new("large").at("large.txt").mode("0640"),
    ];
    stage.mounted(&objects).await;
    stage.compare_states("many_objects").await;
    stage.unmounted().await;
}

/// Files have the default mode and the volume's group, also those that the provider writes itself,
/// and also after a refresh. An explicit mode stays.
async fn default_mode_and_group(cast: Cast) {
    let stage = stage!(cast, Need::OtherUsers);
    stage.put("password", "1").await;
    stage.put("key", "private").await;
    stage
        .classes(&[PASSWORD, Object::new("key").mode("0400")])
        .await;
    let user = json!({"runAsUser": 1004, "runAsGroup": 1004, "fsGroup": 2000});
    stage
        .pods(|pod| {
            let pod = pod.with("securityContext", user.clone());
            pod.attribute(DEFAULT_MODE, "0440")
        })
        .await;
    stage.ready().await;
    stage.compare_states("default_mode_and_group").await;
    stage.put("password", "2").await;
    stage.all_read("password", "2").await;
    stage.compare_states("default_mode_and_group_later").await;
}

/// A changed secret reaches pod and pod status; an unchanged one is not written again.
async fn rotation(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.put("user", "alice").await;
    stage.mounted(&[PASSWORD, Object::new("user")]).await;
    let before = stage.written().await;
    stage.refreshed().await;
    assert_eq!(stage.written().await, before);
    stage.put("password", "correct horse").await;
    stage.all_read("password", "correct horse").await;
    stage.refreshed().await;
    stage.compare_states("rotation").await;
    let before = stage.written().await;
    stage.refreshed().await;
    assert_eq!(stage.written().await, before);
}

/// An object that the class no longer names leaves the pod status, and the volume unless the provider
/// wrote it itself. A new one comes.
async fn class_edited(cast: Cast) {
    edit_class(cast, |class| class).await;
}

/// The same with mounted versions in the request, which AWS's provider adds to its answer.
async fn class_edited_with_versions(cast: Cast) {
    edit_class(cast, |class| class.annotation(SEND_VERSIONS, "true")).await;
}

async fn edit_class(cast: Cast, annotated: impl Fn(Class) -> Class) {
    let stage = stage!(cast);
    for (name, value) in [("stays", "a"), ("goes", "b"), ("comes", "c")] {
        stage.put(name, value).await;
    }
    let apply = async |objects: &[Object<'_>]| {
        stage
            .classes_with(objects, |_, class| annotated(class))
            .await;
    };
    apply(&[Object::new("stays"), Object::new("goes")]).await;
    stage.pods(|pod| pod).await;
    stage.ready().await;
    stage.refreshed().await;
    apply(&[Object::new("stays"), Object::new("comes").at("new.txt")]).await;
    stage.all_read("new.txt", "c").await;
    stage.refreshed().await;
    stage.compare_states("class_edited").await;
}

async fn secret_missing(cast: Cast) {
    let stage = stage!(cast);
    stage.classes(&[Object::new("missing")]).await;
    stage.pods(|pod| pod).await;
    let words = |_| "missing".to_owned();
    stage.compare_failures("secret_missing", "", words).await;
    assert!(stage.s.pod_status_objects().await.is_empty());
    stage.put("missing", "found").await;
    stage.ready().await;
    stage.all_read("missing", "found").await;
}

/// A refusal does not take the content away from a pod that has it.
async fn secret_denied(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.mounted(&[PASSWORD]).await;
    stage.refuse(Refused::Read).await;
    for provider in &stage.providers {
        let late = pod(&format!("late-{}", provider.name()), &[provider.name()]);
        stage.s.apply(late).await;
    }
    let words = |_| "rpc error".to_owned();
    stage
        .compare_failures("secret_denied", "late-", words)
        .await;
    stage.all_hear("MountRotationFailed").await;
    stage.all_read("password", "hunter2").await;
    stage.recover().await;
    for provider in &stage.providers {
        stage.s.ready(&format!("late-{}", provider.name())).await;
    }
    stage.all_hear("MountRotationComplete").await;
}

async fn login_denied(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.refuse(Refused::Login).await;
    stage.classes(&[PASSWORD]).await;
    stage.pods(|pod| pod).await;
    let words = |_| "rpc error".to_owned();
    stage.compare_failures("login_denied", "", words).await;
    stage.recover().await;
    stage.ready().await;
}

/// A provider whose identity may get a secret and not describe it fails only calls that bring
/// mounted versions. The driver then asks without them.
async fn describing_denied(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.refuse(Refused::Describe).await;
    let sends = |_, class: Class| class.annotation(SEND_VERSIONS, "true");
    stage.classes_with(&[PASSWORD], sends).await;
    stage.pods(|pod| pod).await;
    stage.ready().await;
    stage.put("password", "correct horse").await;
    stage.all_read("password", "correct horse").await;
    stage.refreshed().await;
    assert!(stage.who_hear("MountRotationFailed").await.is_empty());
}

/// Adds a Secret of the class's name, made from the password.
fn synced(provider: Provider, class: Class) -> Class {
    class.secret_objects([SecretObject::new(provider.name(), &[("pw", "password")])])
}

/// While the store is away, volumes, pod statuses and Secrets stay. They follow once it is back.
async fn store_away(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.classes_with(&[PASSWORD], synced).await;
    stage.pods(|pod| pod).await;
    stage.ready().await;
    let before = stage.kept().await;
    stage.disturb(Disturbance::Away).await;
    stage.put("password", "correct horse").await;
    stage.all_hear("MountRotationFailed").await;
    assert_eq!(stage.kept().await, before);
    stage.all_secrets_say("hunter2").await;
    stage.recover().await;
    stage.all_read("password", "correct horse").await;
    stage.all_secrets_say("correct horse").await;
    stage.all_hear("MountRotationComplete").await;
}

async fn provider_killed(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.mounted(&[PASSWORD]).await;
    stage.kill().await;
    stage.all_read("password", "hunter2").await;
    stage.put("password", "correct horse").await;
    stage.all_read("password", "correct horse").await;
}

/// A provider that is away loses nothing, and its volumes are refreshed when it is back.
async fn provider_away(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.mounted(&[PASSWORD]).await;
    let before = stage.kept().await;
    let node = stage.s.node();
    let provider = stage.s.cluster.provider(&node, "fake-provider");
    provider.stop().await.unwrap();
    stage.all_hear("MountRotationFailed").await;
    assert_eq!(stage.kept().await, before);
    provider.start().await.unwrap();
    stage.serves().await;
    stage.put("password", "correct horse").await;
    stage.all_hear("MountRotationComplete").await;
    stage.all_read("password", "correct horse").await;
}

async fn synced_secret(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.classes_with(&[PASSWORD], synced).await;
    stage.pods(|pod| pod).await;
    stage.ready().await;
    stage.all_secrets_say("hunter2").await;
    stage.put("password", "correct horse").await;
    stage.all_secrets_say("correct horse").await;
    stage.all_read("password", "correct horse").await;
}

/// Starts a scenario with a real provider without the tokens that all others have.
async fn without_tokens(cast: Cast, needs: &[Need]) -> Option<Stage> {
    let stage = Stage::with(cast, needs).await?;
    stage.put("password", "hunter2").await;
    stage.classes(&[PASSWORD]).await;
    stage.pods(|pod| pod).await;
    Some(stage)
}

async fn tokens_in_secrets(cast: Cast) {
    if let Some(stage) = without_tokens(cast, &[TOKENS_IN_SECRETS]).await {
        stage.ready().await;
        stage.all_read("password", "hunter2").await;
    }
}

/// Providers that need tokens of kubelet fail with a hint; the others request their own.
async fn no_tokens(cast: Cast) {
    if let Provider::Aws | Provider::Azure = cast.real() {
        if let Some(stage) = without_tokens(cast, &[]).await {
            let words = |_| "tokenRequests".to_owned();
            stage.compare_failures("no_tokens", "", words).await;
        }
    } else if let Some(stage) = without_tokens(cast, &[Need::Protobuf]).await {
        stage.ready().await;
        stage.all_read("password", "hunter2").await;
    }
}

/// A pod goes at once although its provider waits for a store that never answers.
async fn unpublish_during_a_hung_call(cast: Cast) {
    let waits = "their kubelet unpublishes a volume when its publish has ended";
    let stage = stage!(cast, Need::Embedded(waits));
    stage.put("password", "hunter2").await;
    stage.disturb(Disturbance::Hang).await;
    stage.classes(&[PASSWORD]).await;
    stage.pods(|pod| pod).await;
    stage.hangs().await;
    let started = Instant::now();
    stage.unmounted().await;
    let took = started.elapsed();
    assert!(took < Duration::from_secs(30).min(SOON), "{took:?}");
}

/// The provider writes files into the volume itself; the driver's layout is not there.
async fn own_files(cast: Cast) {
    let stage = stage!(cast);
    stage.put("password", "hunter2").await;
    stage.mounted(&[PASSWORD]).await;
    let pod = cast.real().name();
    let disk = stage.s.disk(pod, MOUNT).await;
    assert_eq!(disk, stage.s.reads(pod, MOUNT).await, "no links");
}

/// The same provider answers with files if it is told to.
async fn files_by_the_driver(cast: Cast) {
    let flags = &["--driver-writes-secrets=true"];
    let stage = stage!(cast, Need::ProviderFlags(cast.real(), flags));
    stage.put("password", "hunter2").await;
    stage.mounted(&[PASSWORD]).await;
    // Checks the driver's layout.
    let state = stage.s.state(cast.real().name()).await;
    compare("files_by_the_driver", cast.real(), &state);
    stage.put("password", "correct horse").await;
    stage.all_read("password", "correct horse").await;
    stage.refreshed().await;
    stage.compare_states("files_by_the_driver_rotated").await;
}

/// A parameter of AWS's Parameter Store, whose versions are numbers.
async fn parameter_store(cast: Cast) {
    let stage = stage!(cast);
    let store = Service::ParameterStore;
    stage.put_in(store, "password", "hunter2").await;
    let class = stage.class(cast.real(), &[]).parameter(
        "objects",
        "- {objectName: password, objectType: ssmparameter, filePermission: '0440'}",
    );
    stage.s.apply(class).await;
    stage.pods(|pod| pod).await;
    stage.ready().await;
    stage.compare_states("parameter_store").await;
    stage.put_in(store, "password", "correct horse").await;
    stage.all_read("password", "correct horse").await;
    stage.refreshed().await;
    stage.compare_states("parameter_store_rotated").await;
}
