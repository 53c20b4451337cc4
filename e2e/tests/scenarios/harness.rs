//! The start of every scenario, and the text of its snapshots.

use std::{
    fmt::{self, Write as _},
    fs::File,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use e2e::{
    cluster::{Cluster, Component, poll, wait_until},
    install::{classes, pod_statuses},
    namespace::Namespace,
    tree::{Content, Entry, Kind, Tree, View},
};
use kube::api::{DeleteParams, DynamicObject, ListParams};
use serde_json::{Value, json};

use crate::{objects::MOUNT, settings::Need, target::Target};

/// The limit of waits for something that should happen at once; the machine may be busy.
pub const SOON: Duration = Duration::from_secs(60);

/// Starts a scenario with what it needs. Where that is missing, ends the test, which the list at
/// the end of the run names.
macro_rules! scenario {
    ($needs:expr) => {
        match $crate::harness::Scenario::needing(&$needs).await {
            Some(scenario) => scenario,
            None => return,
        }
    };
}
pub(crate) use scenario;

/// A cluster with a namespace of its own.
pub struct Scenario {
    pub cluster: Target,
    pub namespace: Namespace,
    /// UIDs of pods whose directories existed before: those of driver and provider, and those that
    /// kubelet has not yet cleaned up.
    earlier_pods: Vec<String>,
}

/// Returns what is at a path of a node, where kubelet may be removing files of pods that go.
async fn tree_of(cluster: &Target, node: &str, path: &str) -> Option<Tree> {
    let mut last = None;
    for _ in 0..50 {
        match cluster.node_tree(node, path.as_ref()).await {
            Ok(tree) => return tree,
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{path} of {node} cannot be read: {}", last.unwrap());
}

impl Scenario {
    /// Starts a scenario on one node with the driver, as `deploy/` installs it, and the fake
    /// provider.
    pub async fn start() -> Self {
        let scenario = Self::needing(&[]).await;
        scenario.expect("every cluster has a node")
    }

    /// Starts a scenario with what it needs. Returns `None` where that is missing; the macro
    /// `scenario!` ends the test then.
    pub async fn needing(needs: &[Need]) -> Option<Self> {
        let cluster = Target::find(needs).await?;
        let mut earlier_pods = Vec::new();
        for node in cluster.nodes() {
            let tree = tree_of(&cluster, &node, "/var/lib/kubelet/pods").await;
            let entries = tree.into_iter().flat_map(|tree| tree.entries);
            earlier_pods.extend(entries.map(|entry| entry.path));
        }
        // Only the directories themselves, not the paths below them.
        earlier_pods.retain(|path| !path.contains('/'));
        let namespace = Namespace::create(&cluster)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        Some(Self {
            cluster,
            namespace,
            earlier_pods,
        })
    }

    /// Returns the node on which a scenario with one node runs.
    pub fn node(&self) -> String {
        self.cluster.nodes().remove(0)
    }

    /// Applies objects: of `objects.rs`, or YAML.
    pub async fn apply(&self, manifest: impl fmt::Display) {
        self.namespace
            .apply(&manifest.to_string())
            .await
            .unwrap_or_else(|error| panic!("{error}"));
    }

    pub async fn ready(&self, pod: &str) {
        self.namespace
            .wait_ready(pod, SOON)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
    }

    pub async fn delete(&self, pod: &str) {
        self.namespace.delete_pod(pod).await.unwrap();
        self.gone(pod).await;
    }

    pub async fn gone(&self, pod: &str) {
        self.namespace
            .wait_gone(pod, SOON)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
    }

    /// Waits for kubelet's event that a volume cannot be mounted, and until the pod's status says that its containers
    /// wait, which comes apart from it; returns the message.
    pub async fn failed_mount(&self, pod: &str, says: &str) -> String {
        let event = self
            .namespace
            .wait_event(pod, "FailedMount", |message| message.contains(says), SOON)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        self.namespace
            .wait_reported(pod, SOON)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        self.redacted(&event.message.unwrap_or_default())
    }

    /// Returns the tree that the pod's container reads below a path.
    pub async fn reads(&self, pod: &str, path: &str) -> Tree {
        self.cluster
            .tree(self.namespace.name(), pod, path, View::Reader)
            .await
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Returns that tree as text, one line for each entry.
    pub async fn listing(&self, pod: &str, path: &str) -> String {
        lines(&self.reads(pod, path).await, true)
    }

    /// Returns the volume as the container reads it: contents, modes and owners. The layout on disk
    /// is checked, and not part of the text.
    pub async fn volume(&self, pod: &str, path: &str) -> String {
        let disk = self.settled_disk(pod, path).await;
        let reads = self.reads(pod, path).await;
        assert_layout(&disk, &reads);
        self.redacted(&format!("{pod} reads in {path}\n{}", lines(&reads, true)))
    }

    /// Returns the volume as the container reads it, and as it is on disk, with its links.
    pub async fn volume_and_disk(&self, pod: &str, path: &str) -> String {
        let disk = self.settled_disk(pod, path).await;
        let reads = self.reads(pod, path).await;
        self.redacted(&format!(
            "{pod} reads in {path}\n{}on disk\n{}",
            lines(&reads, true),
            lines(&disk, false)
        ))
    }

    /// Returns the volume as it is on disk, once the previous content is gone, which the driver
    /// keeps for a moment for programs that read it.
    pub async fn settled_disk(&self, pod: &str, path: &str) -> Tree {
        let settled = poll("what was replaced is gone", SOON, async || {
            let disk = self.disk(pod, path).await;
            Ok(
                if disk.entries.iter().filter(|e| is_content(e)).count() <= 1 {
                    ControlFlow::Break(disk)
                } else {
                    ControlFlow::Continue("it is there".to_owned())
                },
            )
        });
        settled.await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Returns the tree of the volume as it is on disk. Content that is written again has another name.
    pub async fn disk(&self, pod: &str, path: &str) -> Tree {
        self.cluster
            .tree(self.namespace.name(), pod, path, View::Disk)
            .await
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Returns the pod statuses of the namespace as text.
    pub async fn pod_statuses(&self) -> String {
        let mut text = "pod statuses\n".to_owned();
        for object in self.pod_status_objects().await {
            let labels = object.metadata.labels.unwrap_or_default();
            let owners: Vec<_> = object
                .metadata
                .owner_references
                .unwrap_or_default()
                .iter()
                .map(|o| json!({"apiVersion": o.api_version, "kind": o.kind, "name": o.name, "uid": o.uid, "controller": o.controller}))
                .collect();
            let shown = json!({
                "name": object.metadata.name, "labels": labels, "owners": owners,
                "status": object.data.get("status"),
            });
            let yaml = serde_saphyr::to_string(&without_nulls(shown)).unwrap();
            for (number, line) in yaml.lines().enumerate() {
                writeln!(text, "  {} {line}", if number == 0 { "-" } else { " " }).unwrap();
            }
        }
        self.redacted(&text)
    }

    /// Returns volume and pod statuses as text: the snapshot of most scenarios.
    pub async fn state(&self, pod: &str) -> String {
        format!(
            "{}{}",
            self.volume(pod, MOUNT).await,
            self.pod_statuses().await
        )
    }

    /// Returns the pod statuses of the namespace, sorted by name.
    pub async fn pod_status_objects(&self) -> Vec<DynamicObject> {
        let api = pod_statuses(&self.cluster.client(), self.namespace.name());
        api.list(&ListParams::default()).await.unwrap().items
    }

    /// Deletes the pod statuses of the namespace, as an administrator might.
    pub async fn delete_pod_statuses(&self) {
        let api = pod_statuses(&self.cluster.client(), self.namespace.name());
        for status in self.pod_status_objects().await {
            let name = status.metadata.name.unwrap();
            api.delete(&name, &DeleteParams::default()).await.unwrap();
        }
    }

    /// Returns what is left of pods on a node, as text: mounts, directories of their volumes,
    /// records.
    pub async fn leftovers(&self, node: &str) -> String {
        let mut text = String::new();
        for mount in self
            .cluster
            .mounts(node, "/var/lib/kubelet/pods".as_ref())
            .await
            .unwrap()
        {
            // kubelet's root itself is a mount of the node.
            if mount.components().count() > 5 && self.is_of_a_volume(&mount.to_string_lossy()) {
                writeln!(text, "mount {}", mount.display()).unwrap();
            }
        }
        for below in ["pods", "plugins/csi-secrets-store/records"] {
            let path = format!("/var/lib/kubelet/{below}");
            if let Some(tree) = tree_of(&self.cluster, node, &path).await {
                for entry in tree.entries.iter().filter(|entry| entry.path != ".") {
                    if below != "pods" || self.is_of_a_volume(&entry.path) {
                        writeln!(text, "{below}/{}", entry.path).unwrap();
                    }
                }
            }
        }
        if text.is_empty() {
            "nothing\n".to_owned()
        } else {
            self.redacted(&text)
        }
    }

    /// Returns whether a path below kubelet's pods belongs to a CSI volume of this scenario, or is
    /// a parent of one. A real kubelet has more files and pods there.
    fn is_of_a_volume(&self, path: &str) -> bool {
        let path = path.strip_prefix("/var/lib/kubelet/pods/").unwrap_or(path);
        let parts: Vec<&str> = path.split('/').collect();
        if self.earlier_pods.iter().any(|uid| uid == parts[0]) {
            return false;
        }
        match parts[1..] {
            [] | ["volumes"] => true,
            ["volumes", plugin, ..] => plugin == "kubernetes.io~csi",
            _ => false,
        }
    }

    /// Returns the same without the directories that kubelet keeps between attempts.
    async fn leftovers_of_the_driver(&self, node: &str) -> String {
        let all = self.leftovers(node).await;
        let kept = |line: &&str| {
            line.starts_with("mount ") || line.starts_with("plugins") || line.ends_with("/mount")
        };
        all.lines()
            .filter(kept)
            .fold(String::new(), |text, line| text + line + "\n")
    }

    /// Waits until nothing of pods and their volumes is left on the node: a pod without grace
    /// period leaves the API server before kubelet has taken down its volumes.
    pub async fn nothing_is_left(&self) {
        self.nothing_is_left_on(&self.node()).await;
    }

    /// Waits until nothing of pods and their volumes is left on one of several nodes.
    pub async fn nothing_is_left_on(&self, node: &str) {
        until("nothing is left on the node", async || {
            self.leftovers(node).await == "nothing\n"
        })
        .await;
    }

    /// Waits until nothing of the driver is left on the node. kubelet repeats a failed publish, and
    /// an attempt that runs has a mount.
    pub async fn nothing_of_the_driver_is_left(&self) {
        until("nothing of the driver is left on the node", async || {
            self.leftovers_of_the_driver(&self.node()).await.is_empty()
        })
        .await;
    }

    /// Waits until the pod statuses are collected after their pods. Kubernetes' controller may take
    /// half a minute after its start.
    pub async fn no_pod_statuses(&self) {
        self.pod_statuses_left(0).await;
    }

    /// Waits until this number of pod statuses is left.
    pub async fn pod_statuses_left(&self, count: usize) {
        until("no pod status is left of pods that have gone", async || {
            self.pod_status_objects().await.len() == count
        })
        .await;
    }

    /// Returns the number of Mount calls for a pod since the provider started.
    pub async fn provider_calls(&self, pod: &str) -> u64 {
        self.provider_counts().await["mountCallsByPod"][format!("{}/{pod}", self.namespace)]
            .as_u64()
            .unwrap_or(0)
    }

    /// Returns the provider's counters since its start.
    pub async fn provider_counts(&self) -> Value {
        serde_json::from_str(&self.provider_control("/calls").await).unwrap()
    }

    /// Sends a request to the provider's control; returns the answer.
    pub async fn provider_control(&self, path: &str) -> String {
        let provider = Component::Provider("fake-provider".to_owned());
        let answer = self.cluster.get(&self.node(), &provider, 8080, path).await;
        let answer = answer.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }

    /// Waits until the provider has been called for a pod.
    pub async fn provider_is_called(&self, pod: &str) {
        until("the provider is called", async || {
            self.provider_calls(pod).await > 0
        })
        .await;
    }

    pub async fn delete_class(&self, name: &str) {
        let classes = classes(&self.cluster.client(), self.namespace.name());
        let deleted = classes.delete(name, &DeleteParams::default()).await;
        deleted.unwrap();
    }

    /// Returns the paths of the driver's records.
    pub async fn records(&self) -> Vec<PathBuf> {
        let files = self
            .files("/var/lib/kubelet/plugins/csi-secrets-store/records")
            .await;
        // A record that is not valid yet has another extension.
        let is_record = |file: &PathBuf| file.extension().is_some_and(|ending| ending == "json");
        files.into_iter().filter(is_record).collect()
    }

    /// Returns the paths of all entries below a directory of the node.
    pub async fn files(&self, directory: &str) -> Vec<PathBuf> {
        let dir = Path::new(directory);
        let tree = self.cluster.node_tree(&self.node(), dir).await.unwrap();
        let entries = tree.unwrap().entries.into_iter();
        entries
            .filter(|entry| entry.path != ".")
            .map(|entry| dir.join(entry.path))
            .collect()
    }

    /// Removes the records, as if an earlier driver had published the volumes.
    pub async fn forget_records(&self) {
        for record in self.records().await {
            self.cluster.remove_file(&self.node(), &record).await;
        }
    }

    /// Returns whether the node's one volume has its content.
    pub async fn written(&self) -> bool {
        let pods = tree_of(&self.cluster, &self.node(), "/var/lib/kubelet/pods").await;
        pods.is_some_and(|tree| {
            tree.entries
                .iter()
                .any(|entry| self.is_of_a_volume(&entry.path) && entry.path.ends_with("/..data"))
        })
    }

    /// Opens the root of the node's one volume, which a running container holds, too.
    pub async fn hold_volume(&self) -> Option<File> {
        let pods = Path::new("/var/lib/kubelet/pods");
        let mounts = self.cluster.mounts(&self.node(), pods).await.unwrap();
        let target = mounts.iter().find(|path| path.ends_with("mount")).unwrap();
        let root = self.cluster.root_of(&self.node()).await?;
        Some(File::open(root.join(target.strip_prefix("/").unwrap())).unwrap())
    }

    /// Returns the lines of the kernel's mount table that are volumes, as kubelet sees them.
    pub async fn mounts(&self) -> Vec<String> {
        let table = self.cluster.mount_table(&self.node()).await;
        table
            .lines()
            .filter(|line| line.contains("/kubernetes.io~csi/"))
            .map(str::to_owned)
            .collect()
    }

    /// Returns a counter of the driver: the sum of all series whose line contains each of `parts`.
    pub async fn metric(&self, name: &str, parts: &[&str]) -> f64 {
        let page = self.cluster.driver(&self.node()).metrics().await.unwrap();
        page.lines()
            .filter(|line| {
                line.starts_with(&format!("{name}{{"))
                    && parts.iter().all(|part| line.contains(part))
            })
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    }

    /// Replaces what differs from run to run by a name.
    pub fn redacted(&self, text: &str) -> String {
        let mut out = text.replace(self.namespace.name(), "[namespace]");
        let nodes = self.cluster.nodes().into_iter();
        let mut nodes: Vec<_> = nodes.enumerate().collect();
        // A name may begin with another one.
        nodes.sort_by_key(|(_, name)| std::cmp::Reverse(name.len()));
        for (number, name) in nodes {
            out = out.replace(&name, &format!("[node {}]", number + 1));
        }
        // Done at the end, because a replacement must not contain another node's name.
        out = out.replace("[node ", "[node-");
        redact_words(&out)
    }
}

/// Waits until something holds.
#[track_caller]
pub fn until(what: &str, holds: impl AsyncFn() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        let waited = wait_until(what, SOON, holds).await;
        waited.unwrap_or_else(|error| panic!("{caller}: {error}"));
    }
}

/// Replaces UIDs and the names of timestamped directories. Each UID has a number, so that a
/// snapshot shows which are the same.
fn redact_words(text: &str) -> String {
    let mut uids: Vec<String> = Vec::new();
    let mut out = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if let Some(uid) = rest.get(..36).filter(|word| is_uid(word)) {
            let number = uids
                .iter()
                .position(|known| known == uid)
                .unwrap_or_else(|| {
                    uids.push(uid.to_owned());
                    uids.len() - 1
                });
            write!(out, "[uid {}]", number + 1).unwrap();
            rest = &rest[36..];
        } else if rest.starts_with("..20") {
            let end = rest
                .find(|c: char| !(c.is_ascii_digit() || "._".contains(c)))
                .unwrap_or(rest.len());
            out.push_str("..[time]");
            rest = &rest[end..];
        } else if let Some(hex) = rest
            .strip_prefix("csi-")
            .and_then(|r| r.get(..64))
            .filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            out.push_str("csi-[handle]");
            rest = &rest[4 + hex.len()..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

fn is_uid(word: &str) -> bool {
    word.bytes().enumerate().all(|(at, byte)| match at {
        8 | 13 | 18 | 23 => byte == b'-',
        _ => byte.is_ascii_hexdigit(),
    })
}

/// Returns whether an entry of a volume is a directory with the content of one time.
fn is_content(entry: &Entry) -> bool {
    entry.kind == Kind::Dir && entry.path.starts_with("..") && !entry.path.contains('/')
}

/// Checks that a volume has one directory with the content that is read, and links to it.
fn assert_layout(disk: &Tree, reads: &Tree) {
    let content = disk.entries.iter().find(|entry| is_content(entry));
    let Entry {
        path: content,
        mode,
        uid,
        gid,
        ..
    } = content.unwrap_or_else(|| panic!("no content: {disk:?}"));
    // No scenario whose volume has a group comes here.
    assert_eq!((mode.as_str(), *uid, *gid), ("0755", 0, 0), "{content}");
    assert!(content.starts_with("..20"), "{content}");
    let below = format!("{content}/");
    let mut expected = vec!["..data".to_owned(), content.clone(), ".".to_owned()];
    for entry in reads.entries.iter().filter(|entry| entry.path != ".") {
        let written = disk.get(&format!("{below}{}", entry.path));
        assert_eq!(
            written,
            Some(&Entry {
                path: format!("{below}{}", entry.path),
                ..entry.clone()
            })
        );
        expected.push(format!("{below}{}", entry.path));
        if !entry.path.contains('/') {
            let link = disk.get(&entry.path).and_then(|link| link.target.clone());
            assert_eq!(link, Some(format!("..data/{}", entry.path)));
            expected.push(entry.path.clone());
        }
    }
    let data = disk.get("..data").and_then(|link| link.target.as_ref());
    assert_eq!(data, Some(content));
    expected.sort();
    let paths: Vec<_> = disk
        .entries
        .iter()
        .map(|entry| entry.path.clone())
        .collect();
    assert_eq!(paths, expected, "nothing else");
}

/// Returns one line for each entry: mode, owner, path and content.
fn lines(tree: &Tree, with_content: bool) -> String {
    tree.entries.iter().fold(String::new(), |mut text, entry| {
        writeln!(text, "  {}", line(entry, with_content)).unwrap();
        text
    })
}

fn line(entry: &Entry, with_content: bool) -> String {
    let Entry {
        path,
        mode,
        uid,
        gid,
        ..
    } = entry;
    match (&entry.kind, &entry.target, &entry.content) {
        (Kind::Link, Some(target), _) => format!("link         {path} -> {target}"),
        (Kind::Dir, _, Some(Content::Denied)) => {
            format!("{mode} {uid}:{gid}     {path}/ permission denied")
        }
        (Kind::Dir, ..) => format!("{mode} {uid}:{gid}     {path}/"),
        (_, _, Some(content)) if with_content => {
            format!("{mode} {uid}:{gid}     {path} = {}", shown(content))
        }
        _ => format!("{mode} {uid}:{gid}     {path}"),
    }
}

fn shown(content: &Content) -> String {
    match content {
        Content::Text(text) => format!("{text:?}"),
        Content::Base64(text) => format!("base64 {text}"),
        Content::Denied => "permission denied".to_owned(),
        Content::Digest { size, sha256 } => format!("{size} bytes, sha256 {sha256}"),
    }
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => map
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key, without_nulls(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        other => other,
    }
}
