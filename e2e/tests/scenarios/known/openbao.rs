//! Real providers with a real OpenBao server, which speaks Vault's protocol, too.
//!
//! Snapshots are those of the other scenarios: the fake of the store answers as this server does.

use std::{net::Ipv4Addr, ops::ControlFlow};

use e2e::{
    cluster::{Cluster as _, Component, Result, poll},
    namespace::Namespace,
    openbao::{self, Server},
    providers::{
        Object,
        Provider::{self, OpenBao, Vault},
    },
};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::{Api, DeleteParams};
use rstest::rstest;

use super::{
    PASSWORD,
    stage::{Cast, Stage, compare},
    synced,
};
use crate::{
    harness::{SOON, until},
    objects::{Class, pod},
    settings::Need,
};

/// A cluster with a real provider and a real server.
struct Real {
    stage: Stage,
    provider: Provider,
    server: Server,
}

impl Real {
    /// Starts a cluster with a server that has a password.
    async fn start(provider: Provider) -> Option<Self> {
        let stage = Stage::start(Cast::Real(provider), &[Need::OpenBaoServer]).await?;
        let s = &stage.s;
        let server = Server {
            address: (Ipv4Addr::LOCALHOST, openbao::PORT).into(),
            namespace: s.namespace.name().to_owned(),
            provider,
        };
        let directory = s.cluster.disk(&s.node(), &server.directory()).unwrap();
        server.configure(&directory).unwrap();
        let real = Self {
            stage,
            provider,
            server,
        };
        real.serve().await;
        real.put("password", "hunter2").await;
        Some(real)
    }

    /// Runs a command of the server's administrator.
    async fn administrate(&self, arguments: &[&str]) -> Result<String> {
        let line = self.server.command_line(openbao::PROGRAM, arguments);
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let cluster = self.stage.s.cluster.embedded();
        cluster.exec(&self.stage.s.node(), &line).await
    }

    /// Repeats such a command until it succeeds: a server that has just started refuses some.
    async fn administrate_soon(&self, arguments: &[&str]) {
        let what = format!("{arguments:?} to succeed");
        let done = poll(&what, SOON, async || {
            Ok(match self.administrate(arguments).await {
                Ok(_) => ControlFlow::Break(()),
                Err(error) => ControlFlow::Continue(error.to_string()),
            })
        });
        done.await.unwrap_or_else(|error| panic!("{error}"));
    }

    async fn put(&self, name: &str, value: &str) {
        let value = format!("value={value}");
        self.administrate_soon(&["kv", "put", "-mount=secret", name, &value])
            .await;
    }

    /// Writes the policy of the role `shop`.
    async fn allow(&self, path: &str) {
        let policy = format!("{{\"path\": {{\"{path}\": {{\"capabilities\": [\"read\"]}}}}}}");
        let policy = format!("policy={policy}");
        self.administrate_soon(&["write", "sys/policies/acl/shop", &policy])
            .await;
    }

    /// Starts the server, which finds the content that it had.
    async fn serve(&self) {
        let system = Namespace::of(self.stage.s.cluster.client(), "kube-system");
        system.apply(&self.server.manifest()).await.unwrap();
        until("the server serves", async || self.serves().await).await;
    }

    /// Returns whether the server is unsealed and answers.
    async fn serves(&self) -> bool {
        let server = Component::Provider(openbao::NAME.to_owned());
        let (s, path) = (&self.stage.s, "/v1/sys/health");
        let node = s.node();
        let answer = s.cluster.get(&node, &server, openbao::PORT, path).await;
        answer.is_ok_and(|answer| answer.status == 200)
    }

    /// Takes the server away; returns when nothing answers at its address.
    async fn stop(&self) {
        let client = self.stage.s.cluster.client();
        let sets = Api::<DaemonSet>::namespaced(client, "kube-system");
        let deleted = sets.delete(openbao::NAME, &DeleteParams::default()).await;
        deleted.unwrap();
        until("the server is gone", async || !self.serves().await).await;
    }

    /// Kills the server; returns when it serves again.
    async fn kill(&self) {
        let node = self.stage.s.node();
        let server = self.stage.s.cluster.provider(&node, openbao::NAME);
        server.kill().await.unwrap();
        until("the server serves", async || self.serves().await).await;
    }

    /// Returns a class of the server's secrets, with a login as a role.
    fn class(&self, role: &str, objects: &[Object<'_>]) -> Class {
        let address = format!("{}Address", self.provider.name());
        let class = self.stage.class(self.provider, objects);
        class
            .parameter(&address, &self.server.url())
            .parameter("roleName", role)
    }

    /// Runs a pod with the password.
    async fn mounted(&self) {
        self.stage.s.apply(self.class("shop", &[PASSWORD])).await;
        self.stage.pods(|pod| pod).await;
        self.stage.ready().await;
    }

    /// Applies a second pod of the class, and returns its name.
    async fn late(&self) -> String {
        let name = format!("late-{}", self.provider.name());
        self.stage
            .s
            .apply(pod(&name, &[self.provider.name()]))
            .await;
        name
    }

    /// Compares the event of a failed mount with a snapshot, as if the server had the fake's address.
    async fn compare_failure(&self, name: &str, pod: &str, says: &str) {
        let said = self.stage.s.failed_mount(pod, says).await;
        let said = said.replace(&self.server.url(), "http://127.0.0.1:8200");
        compare(name, self.provider, &said);
    }
}

macro_rules! real {
    ($provider:expr) => {
        match Real::start($provider).await {
            Some(real) => real,
            None => return,
        }
    };
}

/// The files, the pod status, a rotation, and the Secret that follows it.
#[rstest]
#[tokio::test]
async fn a_first_mount_a_rotation_and_a_secret(#[values(Vault, OpenBao)] provider: Provider) {
    let r = real!(provider);
    let stage = &r.stage;
    let class = synced(provider, r.class("shop", &[PASSWORD]));
    stage.s.apply(class).await;
    stage.pods(|pod| pod).await;
    stage.ready().await;
    stage.compare_states("first_mount").await;
    stage.all_secrets_say("hunter2").await;
    r.put("password", "correct horse").await;
    stage.all_read("password", "correct horse").await;
    stage.all_secrets_say("correct horse").await;
    stage.unmounted().await;
    r.stop().await;
}

/// A secret that is missing, a policy that does not allow it, and a role of another namespace. None of
/// them takes away what a pod has.
#[rstest]
#[tokio::test]
async fn what_the_server_refuses(#[values(Vault, OpenBao)] provider: Provider) {
    let r = real!(provider);
    let stage = &r.stage;
    stage
        .s
        .apply(r.class("shop", &[Object::new("missing")]))
        .await;
    stage.pods(|pod| pod).await;
    r.compare_failure("secret_missing", provider.name(), "missing")
        .await;
    r.put("missing", "found").await;
    stage.ready().await;
    stage.s.delete(provider.name()).await;

    r.mounted().await;
    r.allow("secret/data/other").await;
    let late = r.late().await;
    r.compare_failure("secret_denied", &late, "permission denied")
        .await;
    stage.all_hear("MountRotationFailed").await;
    stage.all_read("password", "hunter2").await;
    r.allow("secret/data/*").await;
    stage.s.ready(&late).await;
    r.put("password", "correct horse").await;
    stage.all_read("password", "correct horse").await;

    stage.s.delete(&late).await;
    stage.s.apply(r.class("elsewhere", &[PASSWORD])).await;
    let late = r.late().await;
    r.compare_failure("role_of_another_namespace", &late, "failed to login")
        .await;
    stage.all_read("password", "correct horse").await;
    r.stop().await;
}

/// Mounted content outlives the server. A killed server has what it had: a change is mounted then.
#[rstest]
#[tokio::test]
async fn the_server_is_killed_and_comes_back(#[values(Vault, OpenBao)] provider: Provider) {
    let r = real!(provider);
    let stage = &r.stage;
    r.mounted().await;
    r.kill().await;
    r.put("password", "correct horse").await;
    stage.all_read("password", "correct horse").await;

    r.stop().await;
    stage.all_hear("MountRotationFailed").await;
    let late = r.late().await;
    stage.s.failed_mount(&late, "connection refused").await;
    stage.all_read("password", "correct horse").await;
    r.serve().await;
    stage.s.ready(&late).await;
    r.put("password", "staple").await;
    stage.all_read("password", "staple").await;
    r.stop().await;
}
