//! The demo: shows the driver's main job on an embedded cluster, step by step.

use std::io::{self, IsTerminal as _, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use embedded::Options;
use kube::api::{DynamicObject, ListParams};

use crate::binaries::Binaries;
use crate::cluster::{Cluster as _, Component, Error, Result, poll};
use crate::embedded::{Embedded, standard};
use crate::install;
use crate::manifest::add_arguments;
use crate::namespace::Namespace;
use crate::tree::{Content, Entry, Kind, View};

const MANIFEST: &str = include_str!("../demo/shop.yaml");
const POD: &str = "shop";
const MOUNT: &str = "/mnt/secrets";
const LIMIT: Duration = Duration::from_secs(60);
/// The secrets in the provider's store, as parameters of its control: name, version and content.
const STORE: [&str; 2] = [
    "name=db-password&version=7&content=correct horse battery staple",
    "name=api-token&version=2026-11-23&content=tok_4f9a27",
];
const ROTATED: &str = "name=db-password&version=8&content=incorrect zebra charger";
/// The interval at which kubelet publishes a volume again; a minute by default.
const SYNC: Duration = Duration::from_millis(500);

/// Runs the demo, printing to standard output.
///
/// # Errors
/// The error of the first step that fails.
pub async fn run() -> Result<()> {
    let mut told = Told::default();
    let started = Instant::now();
    told.title("The main job of the Secrets Store CSI driver, end to end");

    told.step("Build the driver, a provider and a probe");
    let binaries = binaries(&told).await?;
    told.done(started);

    // The first build takes minutes, and is no part of what the driver does.
    let built = Instant::now();
    let moment = built;
    told.step("Bring up a cluster: an API server, and a node with kubelet, driver and provider");
    let cluster = Embedded::start(options(&binaries)?).await?;
    let namespace = Namespace::create(&cluster).await?;
    let node = cluster.nodes().remove(0);
    for secret in STORE {
        store(&cluster, &node, secret).await?;
    }
    told.done(moment);

    let moment = Instant::now();
    told.step("Apply a SecretProviderClass and a Pod");
    told.quote(MANIFEST);
    namespace.apply(MANIFEST).await?;
    let pod = namespace.wait_ready(POD, LIMIT).await?;
    told.done(moment);

    told.step(&format!("Look into the pod, at {MOUNT}"));
    let tree = cluster
        .tree(namespace.name(), POD, MOUNT, View::Reader)
        .await?;
    for entry in tree.entries.iter().filter(|entry| entry.kind == Kind::File) {
        told.fact(&format!("{} {}", entry.mode, entry.path), &shown(entry));
    }
    let kubelet_dir = format!(
        "/var/lib/kubelet/pods/{}",
        pod.metadata.uid.unwrap_or_default()
    );
    for mount in cluster.mounts(&node, Path::new(&kubelet_dir)).await? {
        told.fact("tmpfs on the node", &mount.display().to_string());
    }

    told.step("Read what the driver reports: the SecretProviderClassPodStatus");
    for status in pod_statuses(&cluster, namespace.name()).await? {
        told.fact("name", status.metadata.name.as_deref().unwrap_or_default());
        let yaml = serde_saphyr::to_string(&status.data["status"]).unwrap_or_default();
        told.quote(&yaml);
    }

    let moment = Instant::now();
    told.step(
        "Change the password in the store, while a program in the pod reads it over and over",
    );
    rotate(&mut told, &cluster, namespace.name(), &node).await?;
    for status in pod_statuses(&cluster, namespace.name()).await? {
        let objects = serde_saphyr::to_string(&status.data["status"]["objects"]);
        told.quote(&objects.unwrap_or_default());
    }
    told.done(moment);

    let moment = Instant::now();
    told.step("Delete the pod, and see that nothing is left");
    namespace.delete_pod(POD).await?;
    namespace.wait_gone(POD, LIMIT).await?;
    told.fact(
        "mounts",
        &left(cluster.mounts(&node, Path::new(&kubelet_dir)).await?.len()),
    );
    let directory = cluster.node_tree(&node, Path::new(&kubelet_dir)).await?;
    told.fact("directories", &left(usize::from(directory.is_some())));
    // The pod owns them, and they are collected after it.
    poll("the pod statuses to be gone", LIMIT, async || {
        let statuses = pod_statuses(&cluster, namespace.name()).await?;
        Ok(match statuses.len() {
            0 => ControlFlow::Break(()),
            count => ControlFlow::Continue(format!("there are {count}")),
        })
    })
    .await?;
    told.fact("pod statuses", &left(0));
    told.done(moment);

    told.title(&format!(
        "Done, in {:.1} s without the build.",
        built.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Returns the options of a cluster with the driver as `deploy/` installs it, and frequent rotation.
fn options(binaries: &Binaries) -> Result<Options> {
    let mut options = standard(binaries)?;
    let rotation = [
        "--enable-secret-rotation=true",
        "--rotation-poll-interval=1s",
    ];
    let driver = Component::Driver;
    add_arguments(&mut options.manifests, driver.container(), &rotation)?;
    options.sync_period = Some(SYNC);
    Ok(options)
}

/// Puts a secret into the provider's store.
async fn store(cluster: &Embedded, node: &str, secret: &str) -> Result<()> {
    let path = format!("/objects?{}", secret.replace(' ', "%20"));
    let provider = cluster.provider(node, "fake-provider");
    let answer = provider.get(8080, &path).await?;
    match answer.status {
        200 => Ok(()),
        _ => Err(Error::Impossible(answer.body)),
    }
}

/// Changes the password and shows what a program in the pod reads, until that is the new one.
async fn rotate(told: &mut Told, cluster: &Embedded, namespace: &str, node: &str) -> Result<()> {
    let started = Instant::now();
    let mut last = None;
    for read in 1.. {
        let tree = cluster.tree(namespace, POD, MOUNT, View::Reader).await?;
        let now = tree.get("db/password").map(shown).unwrap_or_default();
        if last.as_ref() != Some(&now) {
            let after = started.elapsed().as_secs_f64();
            told.fact(&format!("read {read}, at {after:.2} s"), &now);
            if last.is_some() {
                return Ok(());
            }
            last = Some(now);
            store(cluster, node, ROTATED).await?;
        }
        if started.elapsed() > LIMIT {
            break;
        }
    }
    Err(Error::Timeout {
        what: "the new password in the pod".to_owned(),
        after: LIMIT,
        last: last.unwrap_or_default(),
    })
}

/// Finds or builds the executables; shows the name of each crate that is compiled.
async fn binaries(told: &Told) -> Result<Binaries> {
    let terminal = told.terminal;
    let found = tokio::task::spawn_blocking(move || {
        let mut built = 0_usize;
        let found = Binaries::find(|name| {
            built += 1;
            if terminal {
                let mut out = io::stdout();
                // A lost progress line is no reason to stop.
                let _ = write!(out, "\r\x1b[2K      {built} crates, {name}");
                let _ = out.flush();
            }
        });
        if terminal {
            print!("\r\x1b[2K");
        }
        found
    });
    let failed = |error: &dyn std::fmt::Display| crate::cluster::Error::Start(error.to_string());
    found
        .await
        .map_err(|error| failed(&error))?
        .map_err(|error| failed(&error))
}

async fn pod_statuses(cluster: &Embedded, namespace: &str) -> Result<Vec<DynamicObject>> {
    let statuses = install::pod_statuses(&cluster.client(), namespace);
    let list = statuses.list(&ListParams::default()).await;
    let list = list.map_err(crate::cluster::api("list pod statuses".to_owned()))?;
    Ok(list.items)
}

fn shown(entry: &Entry) -> String {
    match &entry.content {
        Some(Content::Text(text)) => format!("{text:?}"),
        Some(Content::Base64(text)) => format!("base64 {text}"),
        Some(Content::Denied) => "permission denied".to_owned(),
        Some(Content::Digest { size, .. }) => format!("{size} bytes"),
        None => String::new(),
    }
}

fn left(count: usize) -> String {
    match count {
        0 => "none".to_owned(),
        count => format!("{count} left!"),
    }
}

/// The demo's output, with colours on a terminal.
struct Told {
    terminal: bool,
    steps: usize,
}

impl Default for Told {
    fn default() -> Self {
        let terminal = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { terminal, steps: 0 }
    }
}

impl Told {
    fn styled(&self, style: &str, text: &str) -> String {
        if self.terminal {
            format!("\x1b[{style}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn title(&self, text: &str) {
        println!("\n{}", self.styled("1", text));
    }

    fn step(&mut self, text: &str) {
        self.steps += 1;
        println!(
            "\n{}",
            self.styled("1;36", &format!("{:>3}. {text}", self.steps))
        );
    }

    fn quote(&self, text: &str) {
        for line in text.lines() {
            println!("{}", self.styled("2", &format!("     | {line}")));
        }
    }

    fn fact(&self, name: &str, value: &str) {
        println!("     {name:<22} {}", self.styled("32", value));
    }

    fn done(&self, since: Instant) {
        let took = format!("{:.2} s", since.elapsed().as_secs_f64());
        println!("     {}", self.styled("32", &format!("ok, {took}")));
    }
}
