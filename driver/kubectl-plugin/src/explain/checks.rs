//! What can be wrong, from the ground up: each check looks at one thing, and the first ones explain the others.

mod commands;
mod containers;
mod environment;
mod events;
mod failures;
mod ground;
mod hooks;
mod looks;
mod mended;
mod mount;
mod order;
mod others;
mod over;
mod paths;
mod refresh;
mod refusal;
mod refuser;
mod released;
mod remedy;
mod restarts;
mod sandbox;
mod secret_volumes;
mod secrets;
mod start;
mod sub_path;
mod template;
mod termination;
mod volume;

use std::fmt;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::ResourceExt as _;
use serde::Serialize;

pub(super) use environment::unset;
pub(super) use looks::are_failing as looks_fail;
pub(super) use others::has_persistent;
pub(super) use refresh::{Next, interval, next_refresh, rotates};
pub(super) use restarts::{ends_again, notes as of_hooks};
pub(super) use secrets::outdated;
pub(super) use sub_path::unknown_files;
pub(super) use volume::shown_name;

use self::order::{Place, Stage};
use super::facts::{Facts, VolumeFacts, time_of};
use crate::{
    installation::TELL,
    text::{one_line, visible},
    time::span,
};

/// The longest text of others in a story.
const MAX_SAID: usize = 600;

/// Returns a text of others as one line, with how long ago it was said: what was the cause then may have been mended
/// since.
pub(super) fn told(text: &str, at: Option<Timestamp>, now: Timestamp) -> String {
    let line = one_line(text, MAX_SAID);
    match at {
        Some(at) => format!("{line} ({} ago)", span(now.duration_since(at))),
        None => line,
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trouble {
    /// The name of the check, which stays the same.
    pub check: &'static str,
    /// The volume, unless it is about the whole pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// What is wrong, and what to do.
    pub what: String,
    /// What kubelet or the driver said about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub said: Option<String>,
    /// The next command to type.
    pub next: String,
}

impl Trouble {
    /// Writes it as the lines of a list.
    pub(super) fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  - {}", self.what)?;
        if let Some(said) = &self.said {
            writeln!(f, "    it says: {said}")?;
        }
        writeln!(f, "    next:    {}", self.next)
    }
}

/// A check of the pod and all below it.
type OfPod = fn(&Facts) -> Option<Found>;
/// A check of one volume.
type OfVolume = fn(&Facts, &VolumeFacts) -> Option<Found>;

/// What a check found.
struct Found {
    what: String,
    said: Option<String>,
    /// When it was said, if that is not now.
    at: Option<Timestamp>,
    next: Then,
}

/// What to do next.
enum Then {
    /// A command, or words where there is none.
    Do(String),
    /// To tell those who run the driver, because the person who asks may not look at it.
    Tell,
    /// To tell those who run this, who are others than those who run the driver.
    Ask(String),
}

impl From<String> for Then {
    fn from(command: String) -> Self {
        Self::Do(command)
    }
}

impl From<&str> for Then {
    fn from(command: &str) -> Self {
        Self::Do(command.to_owned())
    }
}

impl Found {
    fn new(what: impl Into<String>, next: impl Into<Then>) -> Self {
        Self {
            what: what.into(),
            said: None,
            at: None,
            next: next.into(),
        }
    }

    /// Adds what an event says.
    fn said_by(self, event: Option<&Event>) -> Self {
        Self {
            at: event.and_then(time_of),
            ..self.said(event.and_then(|event| event.message.clone()))
        }
    }

    fn said(mut self, said: Option<String>) -> Self {
        self.said = said;
        self
    }
}

/// The checks of the pod. The first one that finds something is the reason, and the others are left out: without
/// a node, there is no driver.
const OF_POD: &[(&str, OfPod)] = &[
    ("unscheduled", ground::unscheduled),
    ("kinds", ground::kinds),
    ("csi-driver", ground::csi_driver),
    ("node", ground::node),
    ("driver-installed", ground::installed),
    ("driver-pod", ground::driver_pod),
    ("driver-restarts", ground::restarts),
    ("registration", ground::registration),
    ("driver-socket", ground::socket),
    ("mount-propagation", ground::propagation),
];

/// The checks of a volume that find what prevents a mount, in the order in which kubelet and the driver come to it. Each
/// is a mistake of its own; only what kubelet says of the mount counts where no other one finds anything.
const PREVENTS_MOUNT: &[(&str, OfVolume)] = &[
    ("unused", volume::unused),
    ("publish-secret", volume::publish_secret),
    ("read-only", volume::read_only),
    ("class-attribute", volume::class_attribute),
    ("class", volume::class),
    ("class-fields", volume::class_fields),
    ("provider", volume::provider),
    ("mount", mount::mount),
];

/// The checks of a volume that is mounted, or was.
const OF_MOUNTED: &[(&str, OfVolume)] = &[
    ("mount-gone", volume::mount_gone),
    ("publish-secret", looks::publish_secret),
    ("sub-path-file", sub_path::without_file),
    ("class-gone", volume::class_gone),
    ("provider-socket", volume::provider_socket),
    ("refresh", refresh::fails),
    ("republish", refresh::republish),
    ("look", looks::fail),
    ("overdue", refresh::overdue),
    ("asked", refresh::asked),
    ("sub-path", sub_path::outdated),
];

/// The checks of a mounted volume that tell why kubelet's looks fail, or why it does not look.
const OF_LOOKS: [&str; 5] = [
    "mount-gone",
    "publish-secret",
    "class-gone",
    "refresh",
    "republish",
];

/// The checks that are in no table.
const OTHERS: [&str; 18] = [
    "container-config",
    "container-crash",
    "driver-name",
    "earlier-template",
    "env-key",
    "env-secret",
    "finalizers",
    "image",
    "image-pull-secret",
    "other-volume",
    "pod-failed",
    "sandbox",
    "secret-missing",
    "secret-released",
    "secrets",
    "start",
    "termination",
    "volume-secret",
];

/// Returns whether a check has this name. docs/plugin.md lists all.
fn is_named(check: &str) -> bool {
    let of_pod = OF_POD.iter().map(|(name, _)| *name);
    let of_volume = PREVENTS_MOUNT.iter().chain(OF_MOUNTED);
    let of_volume = of_volume.map(|(name, _)| *name);
    let mut all = of_pod.chain(of_volume).chain(OTHERS);
    all.any(|name| name == check)
}

/// Finds what is wrong with a pod's volumes, the reason first, and what its start waits for besides.
pub(super) fn all(facts: &Facts) -> (Vec<Trouble>, Vec<Trouble>) {
    let mut all = of_ground(facts);
    let others = of_containers(facts);
    all.extend(others);
    let steps = start::steps(facts);
    // A deleted pod does not start any more.
    if !facts.is_deleted() {
        order::sort(&mut all, &steps);
    }
    let waits = order::untold(steps, &all).into_iter();
    let waits = waits.map(|step| facts.trouble("start", None, step.found));
    let waits = waits.collect();
    (all.into_iter().map(|(_, trouble)| trouble).collect(), waits)
}

/// Finds what is wrong with the pod, and with its volumes.
fn of_ground(facts: &Facts) -> Vec<(Place, Trouble)> {
    let mut all = Vec::new();
    let mut add = |place: Place, check, volume: Option<&str>, found| {
        all.push((place, facts.trouble(check, volume, found)));
    };
    if let Some(found) = termination::finalizers(facts) {
        add(Place::of_check("finalizers"), "finalizers", None, found);
    }
    if let Some(found) = template::earlier(facts) {
        let check = "earlier-template";
        add(Place::of_check(check), check, None, found);
    }
    for (name, found) in others::misnamed(facts) {
        let place = Place::of_check("driver-name");
        add(place, "driver-name", Some(&name), found);
    }
    let ground = OF_POD
        .iter()
        .filter(|(name, _)| !facts.volumes.is_empty() || *name == "unscheduled")
        .find_map(|(name, check)| Some((name, check(facts)?)));
    let has_ground = ground.is_none();
    if let Some((name, found)) = ground {
        let place = Place::of_check(name);
        // A driver that is away keeps nothing from starting whose volumes are mounted.
        let place = match place.stage == Some(Stage::Volumes) && facts.has_volumes() {
            true => Place::at(Stage::Mounted),
            false => place,
        };
        add(place, name, None, found);
    }
    for volume in &facts.volumes {
        let is_mounted = facts.is_mounted(volume);
        let is_over = facts.has_ended() || facts.may_outlive_its_volumes();
        if is_mounted != Some(true) && !is_over {
            // kubelet goes on without a volume that no container mounts.
            let stage = match facts.is_used(volume) {
                true => Stage::Volumes,
                false => Stage::Mounted,
            };
            for (name, found) in prevents_mount(facts, volume, has_ground) {
                add(Place::at(stage), name, Some(&volume.name), found);
            }
        }
        for (name, place, found) in of_mounted(facts, volume, has_ground) {
            add(place, name, Some(&volume.name), found);
        }
    }
    let of_secrets = secret_volumes::wrong(facts);
    let names: Vec<_> = of_secrets
        .iter()
        .map(|(volume, _)| volume.name.clone())
        .collect();
    for (volume, found) in of_secrets {
        let place = Place {
            needs_driver: secrets::awaits_driver(facts, &volume.secret),
            ..Place::at(Stage::Volumes)
        };
        add(place, "volume-secret", Some(&volume.name), found);
    }
    for found in released::wrong(facts) {
        add(Place::at(Stage::Mounted), "secret-released", None, found);
    }
    let is_told = |name: &Option<String>| name.as_ref().is_some_and(|name| names.contains(name));
    let others = others::failed(facts).into_iter();
    for (name, found) in others.filter(|(name, _)| !is_told(name)) {
        let place = Place::at(Stage::Volumes);
        add(place, "other-volume", name.as_deref(), found);
    }
    all
}

/// Finds what prevents the mount of a volume. `has_ground` is whether the driver and its node are in order.
fn prevents_mount(
    facts: &Facts,
    volume: &VolumeFacts,
    has_ground: bool,
) -> Vec<(&'static str, Found)> {
    let mut all = Vec::new();
    for (name, check) in PREVENTS_MOUNT {
        let is_told = *name == "mount" && (!has_ground || !all.is_empty());
        if !is_told && let Some(found) = check(facts, volume) {
            all.push((*name, found));
        }
    }
    all
}

/// Finds what is wrong with a volume that is mounted. That kubelet's looks fail, or that it does not look, is said where
/// nothing else tells why. `has_ground` is whether the driver and its node are in order.
fn of_mounted(
    facts: &Facts,
    volume: &VolumeFacts,
    has_ground: bool,
) -> Vec<(&'static str, Place, Found)> {
    let mut all: Vec<(&'static str, Place, Found)> = Vec::new();
    for (name, check) in OF_MOUNTED {
        let is_told = match *name {
            "look" => !has_ground || all.iter().any(|(name, ..)| OF_LOOKS.contains(name)),
            "overdue" => all
                .iter()
                .any(|(name, ..)| OF_LOOKS.contains(name) || *name == "look"),
            _ => false,
        };
        let Some(found) = check(facts, volume).filter(|_| !is_told) else {
            continue;
        };
        // A container that ends for it waits for nothing else.
        let container = match *name {
            "sub-path-file" => sub_path::missing_file(facts, volume),
            _ => None,
        };
        let place = match container {
            Some(container) => Place::of_container(facts, &container.name),
            None => Place::at(Stage::Mounted),
        };
        all.push((name, place, found));
    }
    let of_secrets = secrets::wrong(facts, volume).into_iter();
    all.extend(of_secrets.map(|(name, found)| (name, Place::at(Stage::Mounted), found)));
    all
}

/// Finds what is wrong with the containers, and what keeps a deleted pod.
fn of_containers(facts: &Facts) -> Vec<(Place, Trouble)> {
    let trouble = |(place, check, found)| (place, facts.trouble(check, None, found));
    let environment = environment::wrong(facts);
    let told: Vec<_> = environment
        .iter()
        .filter_map(|(place, ..)| place.container.clone())
        .collect();
    let mut all: Vec<_> = environment.into_iter().map(trouble).collect();
    all.extend(termination::termination(facts).map(|found| {
        let check = "termination";
        trouble((Place::of_check(check), check, found))
    }));
    let of_containers = containers::wrong(facts, |name| told.iter().any(|told| told == name));
    let of_images = environment::of_images(facts);
    all.extend(of_containers.into_iter().chain(of_images).map(trouble));
    all
}

impl Facts {
    /// Makes a trouble of what a check found.
    fn trouble(&self, check: &'static str, volume: Option<&str>, found: Found) -> Trouble {
        debug_assert!(is_named(check), "{check} is in no list of checks");
        let said = found.said.map(|said| told(&said, found.at, self.now));
        let what = visible(&found.what);
        let next = match found.next {
            Then::Do(command) => visible(&command),
            Then::Tell => format!("{TELL}: {}", self.report(&what, said.as_deref())),
            Then::Ask(who) => format!(
                "give this to those who run {}: {}",
                visible(&who),
                self.report(&what, said.as_deref())
            ),
        };
        Trouble {
            check,
            volume: volume.map(visible),
            what,
            said,
            next,
        }
    }

    /// Returns a trouble of the pod as one line for somebody else.
    fn report(&self, what: &str, said: Option<&str>) -> String {
        let (namespace, pod) = (
            self.pod.namespace().unwrap_or_default(),
            self.pod.name_any(),
        );
        let node = self.node.as_ref();
        let node = node.map_or_else(String::new, |node| format!(" on node {}", node.name));
        let said = said.map_or_else(String::new, |said| format!(": {said}"));
        format!("pod {namespace}/{pod}{node}: {what}{said}")
    }
}
