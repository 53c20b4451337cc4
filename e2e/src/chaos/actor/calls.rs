//! Calls as of a kubelet that starts anew again and again: a publish begins while the one before runs,
//! some are given up early, and the unpublish of a pod that goes comes twice.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use proto::csi::node_client::NodeClient;
use proto::csi::volume_capability::access_mode::Mode;
use proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use proto::csi::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability};
use sha2::{Digest as _, Sha256};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::cluster::Result;
use crate::tree::hex;

use super::super::ground::Ground;
use super::super::lock;
use super::super::random::Random;
use super::super::schedule::What;
use super::super::store::WITH_CREDENTIAL;
use super::super::tenants::{CREDENTIALS, attributes_of, credential, group_of, volume_name};
use super::super::world::{VolumeId, Watched};
use super::{Actor, escaped, sleep};

/// The driver's socket below the root of a node.
pub(super) const SOCKET: &str = "var/lib/kubelet/plugins/csi-secrets-store/csi.sock";
/// The number of calls of a volume that overlap.
const CALLS: usize = 3;
/// The deadline of a call that is not given up early, in milliseconds.
const PATIENT: u64 = 5_000;
/// The pause before the next look at whether a pod that goes is gone, and the most looks.
const AGAIN: u64 = 250;
const LOOKS: usize = 60;

/// Removes what a publish has left that began when kubelet had just unpublished the volume, as kubelet
/// does with the volumes that it finds. `$1` is the target.
const REMOVE: &str = r#"
there=$1
for up in mount volume plugin volumes pod; do rmdir "$there" 2>/dev/null || true; there=${there%/*}; done
"#;

/// A call of a volume: when it begins and is given up, in milliseconds.
#[derive(Clone, Copy)]
struct Call {
    begins: u64,
    gives_up: u64,
}

impl<G: Ground> Actor<'_, G> {
    /// Repeats the calls of all volumes of a node for a while.
    pub(super) async fn repeat_calls(
        &self,
        what: What,
        node: &str,
        lasts: u64,
        by: u64,
    ) -> Result<()> {
        let faults = escaped(&format!("[{{jitter: {by}ms}}]"));
        self.control(node, &format!("/faults?set={faults}")).await?;
        let mut random = Random(lasts ^ by);
        let mut called = BTreeMap::new();
        let (begun, mut overlapping) = (Instant::now(), 0);
        while begun.elapsed() < Duration::from_millis(lasts) {
            let client = self.csi_client(node).await;
            let pods = self.pods_of(node);
            let mut bursts = FuturesUnordered::new();
            for (pod, class) in volumes(&pods) {
                let calls = std::array::from_fn(|number| Call {
                    begins: random.below(by),
                    // Two of them have the time to end.
                    gives_up: match number {
                        0 | 1 => PATIENT,
                        _ => 1 + random.below(2 * by),
                    },
                });
                if let Some(client) = &client {
                    called.insert((pod.uid.clone(), *class), target(pod, *class));
                    bursts.push(self.burst(client, pod, *class, calls));
                }
            }
            let called = async {
                while let Some(refused) = bursts.next().await {
                    overlapping += refused;
                }
            };
            // All calls refresh, those from before the change of the store and those from after it.
            let rotated = async {
                let classes: BTreeSet<usize> = volumes(&pods).map(|(_, class)| *class).collect();
                for class in &classes {
                    self.ask(*class).await?;
                }
                sleep(random.below(by)).await;
                for class in &classes {
                    self.rotate(*class).await?;
                    self.ask(*class).await?;
                }
                Result::<()>::Ok(())
            };
            let ((), rotated) = tokio::join!(called, rotated);
            rotated?;
            sleep(random.below(400)).await;
        }
        self.world.log.struck(&what.kind(), overlapping);
        self.tidy(node, called).await?;
        self.control(node, "/faults?set=").await.map(drop)
    }

    /// Returns a client of a node's driver; none if nobody listens.
    async fn csi_client(&self, node: &str) -> Option<NodeClient<Channel>> {
        let root = self.ground.root(node).await.ok()?;
        let socket = format!("unix://{}", root.join(SOCKET).display());
        let channel = Endpoint::from_shared(socket).ok()?.connect().await.ok()?;
        Some(NodeClient::new(channel))
    }

    pub(super) fn pods_of(&self, node: &str) -> Vec<Watched> {
        let pods = lock(&self.world.pods);
        let here = pods.values().filter(|pod| pod.node == node);
        here.cloned().collect()
    }

    /// Makes overlapping calls of a volume; returns how many the driver refused because of another.
    async fn burst(
        &self,
        client: &NodeClient<Channel>,
        pod: &Watched,
        class: usize,
        calls: [Call; CALLS],
    ) -> u64 {
        let request = self.publish_request(pod, class);
        let mut running: FuturesUnordered<_> = calls
            .into_iter()
            .map(|call| {
                let (mut client, request) = (client.clone(), request.clone());
                async move {
                    sleep(call.begins).await;
                    let limit = Duration::from_millis(call.gives_up);
                    let answered = match pod.ready {
                        true => {
                            let publish = client.node_publish_volume(request);
                            tokio::time::timeout(limit, publish).await.map(|a| a.err())
                        }
                        false => {
                            let unpublish = client.node_unpublish_volume(unpublish(&request));
                            tokio::time::timeout(limit, unpublish)
                                .await
                                .map(|a| a.err())
                        }
                    };
                    matches!(answered, Ok(Some(status)) if status.code() == Code::Aborted)
                }
            })
            .collect();
        let mut refused = 0;
        while let Some(is_refused) = running.next().await {
            refused += u64::from(is_refused);
        }
        refused
    }

    /// Returns the request that kubelet makes for a volume.
    fn publish_request(&self, pod: &Watched, class: usize) -> NodePublishVolumeRequest {
        let of_kubelet = [
            ("csi.storage.k8s.io/pod.name", pod.name.as_str()),
            ("csi.storage.k8s.io/pod.namespace", &self.world.namespace),
            ("csi.storage.k8s.io/pod.uid", &pod.uid),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ];
        let attributes = attributes_of(&pod.name, class)
            .into_iter()
            .chain(of_kubelet);
        let attributes = attributes.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let group = group_of(&pod.name).map(|group| group.to_string());
        let mount = MountVolume {
            volume_mount_group: group.unwrap_or_default(),
            ..MountVolume::default()
        };
        NodePublishVolumeRequest {
            volume_id: handle(&pod.uid, class),
            target_path: target(pod, class),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(mount)),
                access_mode: Some(AccessMode {
                    mode: Mode::SingleNodeWriter.into(),
                }),
            }),
            readonly: true,
            volume_context: attributes.collect(),
            secrets: self.credentials(class),
            ..NodePublishVolumeRequest::default()
        }
    }

    /// Returns the Secret that kubelet has for a volume.
    fn credentials(&self, class: usize) -> HashMap<String, String> {
        let number = self.world.credential.load(Ordering::SeqCst);
        let credential = || (CREDENTIALS.1.to_owned(), credential(number));
        let has_one = class == WITH_CREDENTIAL;
        has_one.then(credential).into_iter().collect()
    }

    /// Unpublishes the volumes of pods that are gone by now: a publish may have begun between kubelet's
    /// unpublish and its removal of the directory.
    async fn tidy(&self, node: &str, called: BTreeMap<VolumeId, String>) -> Result<()> {
        let uids: Vec<&String> = called.keys().map(|(uid, _)| uid).collect();
        for _ in 0..LOOKS {
            let goes = |pod: &Watched| uids.contains(&&pod.uid) && is_deleted(pod);
            if !self.pods_of(node).iter().any(goes) {
                break;
            }
            sleep(AGAIN).await;
        }
        let pods = self.pods_of(node);
        for ((uid, class), target) in &called {
            if pods.iter().any(|pod| pod.uid == *uid && !pod.ended) {
                continue;
            }
            let request = NodeUnpublishVolumeRequest {
                volume_id: handle(uid, *class),
                target_path: target.clone(),
            };
            for _ in 0..LOOKS {
                if let Some(mut client) = self.csi_client(node).await
                    && client.node_unpublish_volume(request.clone()).await.is_ok()
                {
                    break;
                }
                sleep(AGAIN).await;
            }
            self.sh(node, REMOVE, &[target]).await?;
        }
        Ok(())
    }
}

/// Returns the volumes of pods that run, or that are being deleted.
fn volumes(pods: &[Watched]) -> impl Iterator<Item = (&Watched, &usize)> {
    let pods = pods.iter().filter(|pod| pod.ready || is_deleted(pod));
    pods.flat_map(|pod| pod.classes.iter().map(move |class| (pod, class)))
}

fn is_deleted(pod: &Watched) -> bool {
    !pod.ready && !pod.ended && pod.waiting.is_none()
}

fn unpublish(request: &NodePublishVolumeRequest) -> NodeUnpublishVolumeRequest {
    NodeUnpublishVolumeRequest {
        volume_id: request.volume_id.clone(),
        target_path: request.target_path.clone(),
    }
}

/// Returns where kubelet has a volume published.
pub(super) fn target(pod: &Watched, class: usize) -> String {
    let target = embedded::target_path(&pod.uid, &volume_name(class));
    target.to_string_lossy().into_owned()
}

/// Returns the volume's id, as kubelet makes it.
fn handle(uid: &str, class: usize) -> String {
    let name = format!("{uid}{}", volume_name(class));
    format!("csi-{}", hex(&Sha256::digest(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    #[test]
    fn what_is_removed_is_empty() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("pods/u");
        let [target, other] = ["v", "w"].map(|name| {
            let target = pod
                .join("volumes/kubernetes.io~csi")
                .join(name)
                .join("mount");
            fs::create_dir_all(&target).unwrap();
            target
        });
        let remove = |target: &Path| {
            let mut sh = std::process::Command::new("sh");
            let done = sh.args(["-c", REMOVE, "sh"]).arg(target).status();
            assert!(done.unwrap().success());
        };
        remove(&target);
        assert!(!target.parent().unwrap().exists() && other.exists());
        fs::write(other.join("somebody's"), "").unwrap();
        remove(&other);
        assert!(other.exists());
        fs::remove_file(other.join("somebody's")).unwrap();
        remove(&other);
        assert!(!pod.exists() && root.path().join("pods").exists());
    }
}
