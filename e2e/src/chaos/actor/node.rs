//! Faults of a node: its processes, its disk, its clock, its memory.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use serde_json::{Value, json};

use crate::cluster::{Cluster as _, Component, Error, Result, api, poll};

use super::super::ground::{Ground, PROVIDER};
use super::super::lock;
use super::super::schedule::What;
use super::calls::SOCKET;
use super::{Actor, sleep};

const NAMESPACE: &str = "kube-system";
const DRIVER_SET: &str = "csi-secrets-store";
const PROVIDERS: &str = "/var/run/secrets-store-csi-providers";
const REGISTRY: &str = "/var/lib/kubelet/plugins_registry";
/// The driver's socket in that directory, in the form without sidecars.
const REGISTRATION: &str = "secrets-store.csi.k8s.io-reg.sock";
pub(super) const PLUGIN: &str = "/var/lib/kubelet/plugins/csi-secrets-store";
/// The time in which a process ends after SIGTERM, or is killed.
const GRACE: Duration = Duration::from_secs(40);
/// The memory of a machine on which content nearly takes all of the driver's share, in MiB.
const SMALL_MACHINE: u64 = 64;
/// The fields of a record that a clock has written.
const TIMES: [&str; 3] = ["lastSuccess", "lastChange", "failingSince"];

/// Returns the process that listens at a socket, as this process has it.
fn listener(socket: &Path) -> Option<i32> {
    let connection = UnixStream::connect(socket).ok()?;
    let peer = getsockopt(&connection, PeerCredentials).ok()?;
    Some(peer.pid())
}

impl<G: Ground> Actor<'_, G> {
    pub(super) async fn strike_node(&self, what: What) -> Result<()> {
        match what {
            What::KillDriver { node } => {
                self.ground.cluster().driver(self.node(node)).kill().await?;
                self.world.log.struck(&what.kind(), 1);
                Ok(())
            }
            What::TwoDrivers {
                node,
                lasts,
                killed,
            } => {
                self.two_drivers(what, self.node(node), (lasts, killed))
                    .await
            }
            What::ProviderGone {
                node,
                lasts,
                socket,
            } => {
                self.provider_gone(what, self.node(node), lasts, socket)
                    .await
            }
            What::KillProvider { node } => {
                self.ground
                    .cluster()
                    .provider(self.node(node), PROVIDER)
                    .kill()
                    .await?;
                self.world.log.struck(&what.kind(), 1);
                Ok(())
            }
            What::ReplaceProvider { node, lasts } => {
                let node = self.node(node);
                let arguments = ["--http-addr=:18080"];
                let second = (&arguments[..], 18080);
                self.second(
                    what,
                    PROVIDER,
                    node,
                    second,
                    (lasts, false),
                    async || Ok(()),
                )
                .await?;
                // The second took its socket away with it.
                self.ground.cluster().provider(node, PROVIDER).kill().await
            }
            What::RestartKubelet { node } => {
                self.ground.restart_kubelet(self.node(node)).await?;
                self.world.log.struck(&what.kind(), 1);
                Ok(())
            }
            What::Reboot { node } => {
                self.reboot(self.node(node)).await?;
                self.world.log.struck(&what.kind(), 1);
                Ok(())
            }
            What::WipeProviders { node } => {
                let node = self.node(node);
                self.wipe(what, node, PROVIDERS, "e2e-provider.sock")
                    .await?;
                self.ground.cluster().provider(node, PROVIDER).kill().await
            }
            What::WipePlugin { node } => {
                let node = self.node(node);
                self.world.records_are_lost();
                self.wipe(what, node, PLUGIN, "csi.sock").await?;
                self.ground.cluster().driver(node).kill().await
            }
            What::WipeRegistry { node } => {
                let node = self.node(node);
                self.wipe(what, node, REGISTRY, REGISTRATION).await?;
                self.ground.restart_kubelet(node).await
            }
            What::DiskReadOnly { node, lasts } => {
                self.bad_disk(what, self.node(node), lasts, "read-only")
                    .await
            }
            What::DiskFull { node, lasts } => {
                self.bad_disk(what, self.node(node), lasts, "full").await
            }
            What::TearRecord { node } => self.tear_record(self.node(node)).await,
            What::StepClock { node, by } => self.step_clock(what, self.node(node), by).await,
            What::MemoryNear { node, lasts } => {
                self.memory_near(what, self.node(node), lasts).await
            }
            What::BuryVolumes { pod, mounts } => self.bury(what, pod, mounts).await,
            What::DiskHung { node, lasts } => self.disk_hung(what, self.node(node), lasts).await,
            What::PropagationLost { node, pod, lasts } => {
                self.propagation_lost(what, self.node(node), pod, lasts)
                    .await
            }
            What::OtherBound { node, lasts, bytes } => {
                self.other_bound(what, self.node(node), lasts, bytes).await
            }
            What::DriverPaused { node, lasts } => {
                self.driver_paused(what, self.node(node), lasts).await
            }
            What::AlterFiles { pod, how } => self.alter_files(what, pod, how).await,
            What::UnmountVolumes { pod } => self.unmount_volumes(what, pod).await,
            What::VolumesReadOnly { pod, lasts } => self.volumes_read_only(what, pod, lasts).await,
            What::AnswersCompete { node } => self.answers_compete(what, self.node(node)).await,
            _ => Ok(()),
        }
    }

    /// Runs a shell script on a node.
    pub(super) async fn sh(&self, node: &str, script: &str, arguments: &[&str]) -> Result<String> {
        let head = ["sh", "-c", script, "sh"];
        let command: Vec<&str> = head.into_iter().chain(arguments.iter().copied()).collect();
        self.ground.run(node, &command).await
    }

    /// Empties a directory; returns a while later.
    async fn wipe(&self, what: What, node: &str, directory: &str, socket: &str) -> Result<()> {
        self.sh(node, "rm -rf \"$1\"/*", &[directory]).await?;
        let there = format!("{directory}/{socket}");
        let there = self.ground.run(node, &["test", "-e", &there]).await;
        self.world
            .log
            .struck(&what.kind(), u64::from(there.is_err()));
        sleep(1_500).await;
        Ok(())
    }

    async fn two_drivers(&self, what: What, node: &str, lasts: (u64, bool)) -> Result<()> {
        let arguments = ["--metrics-addr=:18095", "--healthz-addr=:19808"];
        // The second takes the socket away with it, or leaves one at which nobody listens. The first makes
        // its own again.
        let first_ends = async || match lasts.1 && self.ground.stops_at_once() {
            true => self.first_ends(node).await,
            false => Ok(()),
        };
        self.second(
            what,
            DRIVER_SET,
            node,
            (&arguments, 18095),
            lasts,
            first_ends,
        )
        .await
    }

    /// Ends the driver of a node while another one serves at its socket, as an update does that starts the new driver
    /// first. The socket has to stay.
    async fn first_ends(&self, node: &str) -> Result<()> {
        let socket = self.ground.root(node).await?.join(SOCKET);
        let serving = listener(&socket);
        // The first may have it, or have it again.
        if serving.is_none() || serving == self.ground.driver_process(node).await? {
            return Ok(());
        }
        let driver = self.ground.cluster().driver(node);
        driver.stop().await?;
        let after = listener(&socket);
        self.world
            .log
            .checked("drivers that end beside another one", 1);
        if after != serving {
            let text = format!("on {node}, process {after:?} serves instead of {serving:?}");
            let promise = "a driver that ends leaves the socket of another";
            self.world.log.find(promise, text);
        }
        driver.start().await
    }

    /// Runs the pods of a DaemonSet a second time on a node, with more arguments, for a while, in the middle of
    /// which something happens. Kills its process then if `killed`.
    async fn second(
        &self,
        what: What,
        name: &str,
        node: &str,
        (arguments, port): (&[&str], u16),
        (lasts, killed): (u64, bool),
        meanwhile: impl AsyncFnOnce() -> Result<()>,
    ) -> Result<()> {
        let sets = Api::<DaemonSet>::namespaced(self.ground.cluster().client(), NAMESPACE);
        let first = sets.get(name).await;
        let first = first.map_err(api(format!("get DaemonSet {name}")))?;
        let second = format!("{name}-second-{node}");
        let mut component = Component::Driver;
        let failed = |error: serde_json::Error| Error::Manifest(error.to_string());
        let mut set = serde_json::to_value(&first).map_err(failed)?;
        set["metadata"] = json!({"name": second, "namespace": NAMESPACE});
        set["spec"]["selector"]["matchLabels"] = json!({"app": second});
        let template = &mut set["spec"]["template"];
        template["metadata"]["labels"] = json!({"app": second});
        template["spec"]["nodeSelector"]["kubernetes.io/hostname"] = node.into();
        for container in template["spec"]["containers"]
            .as_array_mut()
            .into_iter()
            .flatten()
        {
            let name = container["name"].as_str().unwrap_or_default();
            let name = format!("{name}-second");
            component = Component::Provider(name.clone());
            container["name"] = name.into();
            if let Some(all) = container["args"].as_array_mut() {
                all.extend(arguments.iter().map(|argument| Value::from(*argument)));
            }
        }
        if let Some(fields) = set.as_object_mut() {
            fields.remove("status");
        }
        let set = serde_json::from_value(set).map_err(failed)?;
        let created = sets.create(&PostParams::default(), &set).await;
        created.map_err(api(format!("create DaemonSet {second}")))?;
        sleep(lasts / 2).await;
        let happened = meanwhile().await;
        sleep(lasts / 2).await;
        self.undone(what, happened);
        let cluster = self.ground.cluster();
        let answers = cluster.get(node, &component, port, "/").await;
        self.world
            .log
            .struck(&what.kind(), u64::from(answers.is_ok()));
        if killed && let Component::Provider(container) = &component {
            cluster.provider(node, container).kill().await?;
        }
        let deleted = sets.delete(&second, &DeleteParams::default()).await;
        let deleted = deleted.map_err(api(format!("delete DaemonSet {second}")));
        self.undone(what, deleted.map(drop));
        // It has the time of a grace period to end.
        let pods = Api::<Pod>::namespaced(cluster.client(), NAMESPACE);
        let of_it = ListParams::default().labels(&format!("app={second}"));
        poll("the second to be gone", GRACE, async || {
            if cluster.get(node, &component, port, "/").await.is_ok() {
                return Ok(ControlFlow::Continue(format!("port {port} answers")));
            }
            // A pod of real Kubernetes that is about to go has no process to ask any more.
            let pods = pods.list(&of_it).await;
            let pods = pods.map_err(api(format!("list pods of {second}")))?;
            Ok(match pods.items.len() {
                0 => ControlFlow::Break(()),
                left => ControlFlow::Continue(format!("{left} pods are there")),
            })
        })
        .await
    }

    async fn provider_gone(&self, what: What, node: &str, lasts: u64, socket: bool) -> Result<()> {
        let provider = self.ground.cluster().provider(node, PROVIDER);
        provider.stop().await?;
        let path = format!("{PROVIDERS}/e2e-provider.sock");
        let is_dead = match socket {
            true => {
                let dead = "rm -f \"$1\" && probe dead-socket \"$1\"";
                self.sh(node, dead, &[&path]).await.map(drop)
            }
            false => Ok(()),
        };
        if is_dead.is_ok() {
            sleep(lasts).await;
            let answers = self.control(node, "/calls").await.is_ok();
            self.world.log.struck(&what.kind(), u64::from(!answers));
        }
        let removed = self.sh(node, "rm -f \"$1\"", &[&path]).await;
        self.undone(what, removed.map(drop));
        self.undone(what, provider.start().await);
        is_dead
    }

    async fn reboot(&self, node: &str) -> Result<()> {
        lock(&self.world.roots).remove(node);
        let rebooted = self.ground.cluster().reboot(node).await;
        let root = self.ground.root(node).await?;
        lock(&self.world.roots).insert(node.to_owned(), root);
        rebooted
    }

    /// Returns the driver's process, which may be about to start after another fault.
    pub(super) async fn running_driver(&self, node: &str) -> Result<String> {
        poll("the driver to run", GRACE, async || {
            let process = self.ground.driver_process(node).await?;
            Ok(match process {
                Some(process) => ControlFlow::Break(process.to_string()),
                None => ControlFlow::Continue(format!("it does not run on {node}")),
            })
        })
        .await
    }

    /// Returns the paths of a node's records, as this process sees them.
    async fn records(&self, node: &str) -> Result<Vec<std::path::PathBuf>> {
        let root = self.ground.root(node).await?;
        let directory = root.join(PLUGIN.trim_start_matches('/')).join("records");
        let entries = fs::read_dir(&directory).map_err(|error| failed(&directory, error))?;
        let paths = entries.flatten().map(|entry| entry.path());
        let mut records: Vec<_> = paths
            .filter(|path| path.extension().is_some_and(|ending| ending == "json"))
            .collect();
        records.sort();
        Ok(records)
    }

    /// Starts a driver with another bound of answers, and after a while with that of its manifest.
    async fn other_bound(&self, what: What, node: &str, lasts: u64, bytes: u64) -> Result<()> {
        let argument = format!("--max-call-recv-msg-size={bytes}");
        self.running_driver(node).await?;
        self.ground.add_arguments(node, &[&argument]).await?;
        let killed = self.ground.cluster().driver(node).kill().await;
        if killed.is_ok() {
            sleep(lasts).await;
        }
        let has_it = self.running_driver(node).await;
        let line = has_it.map(|driver| fs::read(format!("/proc/{driver}/cmdline")));
        let ended = self.ground.add_arguments(node, &[]).await;
        self.undone(what, ended);
        let again = self.ground.cluster().driver(node).kill().await;
        self.undone(what, again);
        let line = line?.unwrap_or_default();
        let has_it = line
            .split(|byte| *byte == 0)
            .any(|word| word == argument.as_bytes());
        self.world.log.struck(&what.kind(), u64::from(has_it));
        killed
    }

    async fn tear_record(&self, node: &str) -> Result<()> {
        if let Some(record) = self.records(node).await?.first() {
            let bytes = fs::read(record).map_err(|error| failed(record, error))?;
            self.world.records_are_lost();
            let half = bytes.get(..bytes.len() / 2).unwrap_or_default();
            fs::write(record, half).map_err(|error| failed(record, error))?;
            self.world.log.struck("tear-record", 1);
        }
        self.ground.cluster().driver(node).kill().await
    }

    /// Steps the clock of a node by what the driver has written: no process can have a clock of its
    /// own here. Times on disk that are so much later are those of a clock that was set back since.
    async fn step_clock(&self, what: What, node: &str, by: i64) -> Result<()> {
        let driver = self.running_driver(node).await?;
        self.sh(node, "kill -STOP \"$1\"", &[&driver]).await?;
        let shifted = self.shift_records(node, by).await;
        let killed = self.ground.cluster().driver(node).kill().await;
        if killed.is_err() {
            // It is gone, or goes on.
            let goes_on = "kill -CONT \"$1\" 2>/dev/null || true";
            let goes_on = self.sh(node, goes_on, &[&driver]).await;
            self.undone(what, goes_on.map(drop));
        }
        killed?;
        self.world.log.struck(&what.kind(), shifted?);
        Ok(())
    }

    async fn shift_records(&self, node: &str, by: i64) -> Result<u64> {
        let mut shifted = 0;
        for path in self.records(node).await? {
            let text = fs::read_to_string(&path).map_err(|error| failed(&path, error))?;
            let Ok(mut record) = serde_json::from_str::<Value>(&text) else {
                continue;
            };
            for name in TIMES {
                let time = record[name].as_str().and_then(|time| time.parse().ok());
                let shift =
                    |time: jiff::Timestamp| time.checked_sub(jiff::SignedDuration::from_secs(by));
                if let Some(Ok(time)) = time.map(shift) {
                    record[name] = time.to_string().into();
                }
            }
            fs::write(&path, record.to_string()).map_err(|error| failed(&path, error))?;
            shifted += 1;
        }
        Ok(shifted)
    }

    /// Keeps the driver's memory limit small for a while.
    async fn memory_near(&self, what: What, node: &str, lasts: u64) -> Result<()> {
        self.running_driver(node).await?;
        let limit = self.ground.shrink_memory(node, SMALL_MACHINE).await?;
        sleep(lasts).await;
        let metrics = self.ground.cluster().driver(node).metrics().await;
        let value = format!(" {limit}");
        let is_near = metrics.unwrap_or_default().lines().any(|line| {
            line.starts_with("secrets_store_memory_limit_bytes{") && line.ends_with(&value)
        });
        self.world.log.struck(&what.kind(), u64::from(is_near));
        self.ground.restore_memory(node).await
    }
}

fn failed(path: &std::path::Path, error: std::io::Error) -> Error {
    Error::Impossible(format!("{}: {error}", path.display()))
}
