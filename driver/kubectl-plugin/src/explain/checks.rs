//! What can be wrong, from the ground up: each check looks at one thing, and the first ones explain the others.

mod containers;
mod events;
mod ground;
mod mended;
mod mount;
mod others;
mod paths;
mod refresh;
mod refusal;
mod restarts;
mod secret_volumes;
mod secrets;
mod sub_path;
mod termination;
mod volume;

use std::fmt;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::ResourceExt as _;
use serde::Serialize;

pub(super) use refresh::{Next, interval, next_refresh, rotates};
pub(super) use restarts::{ends_again, notes as of_containers};
pub(super) use secrets::outdated;

use super::facts::{Facts, VolumeFacts, is_running, time_of};
use crate::{
    cluster::Read,
    installation::{Installed, TELL},
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

/// The checks of the pod that find that the driver is away or cut off.
const OF_DRIVER: [&str; 7] = [
    "csi-driver",
    "driver-installed",
    "driver-pod",
    "driver-restarts",
    "registration",
    "driver-socket",
    "mount-propagation",
];

/// The checks of a volume. Of those that prevent a mount, the first one is the reason.
const PREVENTS_MOUNT: &[(&str, OfVolume)] = &[
    ("class-attribute", volume::class_attribute),
    ("read-only", volume::read_only),
    ("unused", volume::unused),
    ("class", volume::class),
    ("class-fields", volume::class_fields),
    ("provider", volume::provider),
    ("publish-secret", volume::publish_secret),
    ("mount", mount::mount),
];

/// The checks of a volume that is mounted, or was.
const OF_MOUNTED: &[(&str, OfVolume)] = &[
    ("mount-gone", volume::mount_gone),
    ("sub-path-file", sub_path::without_file),
    ("class-gone", volume::class_gone),
    ("provider-socket", volume::provider_socket),
    ("refresh", refresh::fails),
    ("republish", refresh::republish),
    ("overdue", refresh::overdue),
    ("asked", refresh::asked),
    ("sub-path", sub_path::outdated),
    ("secrets", secrets::out_of_step),
    ("secret-missing", secrets::missing),
];

/// A check of the pod, which is told whether something was found before.
type OfRest = fn(&Facts, bool) -> Option<Found>;

/// The checks of what else the pod waits for.
const LAST: &[(&str, OfRest)] = &[
    ("env-secret", secrets::env_secret),
    ("env-key", |facts, _| secrets::env_key(facts)),
    ("termination", |facts, _| termination::termination(facts)),
];

/// Finds what is wrong with a pod's volumes; the reason comes first.
pub(super) fn all(facts: &Facts) -> Vec<Trouble> {
    let mut troubles = Vec::new();
    let trouble = |check, volume: Option<&VolumeFacts>, found| {
        facts.trouble(check, volume.map(|volume| volume.name.as_str()), found)
    };
    troubles.extend(termination::finalizers(facts).map(|found| trouble("finalizers", None, found)));
    for (name, found) in others::misnamed(facts) {
        troubles.push(facts.trouble("driver-name", Some(&name), found));
    }
    let ground = OF_POD
        .iter()
        .filter(|(name, _)| !facts.volumes.is_empty() || *name == "unscheduled")
        .find_map(|(name, check)| Some((name, check(facts)?)));
    let has_ground = ground.is_none();
    troubles.extend(ground.map(|(name, found)| trouble(name, None, found)));
    for volume in &facts.volumes {
        let is_mounted = facts.is_mounted(volume);
        let is_over = facts.has_ended() || facts.may_outlive_its_volumes();
        if is_mounted != Some(true) && !is_over {
            let reason = PREVENTS_MOUNT
                .iter()
                .filter(|(name, _)| has_ground || *name != "mount")
                .find_map(|(name, check)| Some((name, check(facts, volume)?)));
            troubles.extend(reason.map(|(name, found)| trouble(name, Some(volume), found)));
        }
        for (name, check) in OF_MOUNTED {
            let found = check(facts, volume);
            troubles.extend(found.map(|found| trouble(name, Some(volume), found)));
        }
    }
    let of_secrets = secret_volumes::wrong(facts);
    let names: Vec<_> = of_secrets.iter().map(|(name, _)| name.clone()).collect();
    for (name, found) in of_secrets {
        troubles.push(facts.trouble("volume-secret", Some(&name), found));
    }
    let is_told = |name: &Option<String>| name.as_ref().is_some_and(|name| names.contains(name));
    let others = others::failed(facts).into_iter();
    for (name, found) in others.filter(|(name, _)| !is_told(name)) {
        troubles.push(facts.trouble("other-volume", name.as_deref(), found));
    }
    let has_reason = !troubles.is_empty();
    for (name, check) in LAST {
        let check = |facts: &Facts| check(facts, has_reason);
        troubles.extend(check(facts).map(|found| trouble(name, None, found)));
    }
    let mut checks = troubles.iter().map(|trouble| trouble.check);
    let is_told = checks.any(|check| ["env-secret", "env-key"].contains(&check));
    let of_containers = containers::wrong(facts, is_told);
    add_of_containers(facts, &mut troubles, of_containers);
    troubles
}

/// Adds what keeps containers from running. Where the volumes are mounted, it is not for want of a driver: it comes
/// before that, unless it is a Secret, which the driver makes.
fn add_of_containers(facts: &Facts, troubles: &mut Vec<Trouble>, added: Vec<Trouble>) {
    let mut used = facts.volumes.iter().filter(|volume| facts.is_used(volume));
    let are_mounted = used.all(|volume| facts.is_mounted(volume) == Some(true));
    let of_driver = troubles
        .iter()
        .position(|trouble| OF_DRIVER.contains(&trouble.check));
    let (first, last) = added.into_iter().partition::<Vec<_>, _>(|trouble| {
        let said = trouble.said.as_deref();
        let is_sure = trouble.check != "container-config"
            || said.is_some_and(|said| !containers::is_about_secret(said));
        are_mounted && is_sure
    });
    let at = of_driver.unwrap_or(troubles.len());
    troubles.splice(at..at, first);
    troubles.extend(last);
}

impl Facts {
    /// Makes a trouble of what a check found.
    fn trouble(&self, check: &'static str, volume: Option<&str>, found: Found) -> Trouble {
        let said = found.said.map(|said| told(&said, found.at, self.now));
        let what = visible(&found.what);
        let next = match found.next {
            Then::Do(command) => visible(&command),
            Then::Tell => {
                let (namespace, pod) = (
                    self.pod.namespace().unwrap_or_default(),
                    self.pod.name_any(),
                );
                let node = self.node.as_ref();
                let node = node.map_or_else(String::new, |node| format!(" on node {}", node.name));
                let said = said.as_ref();
                let said = said.map_or_else(String::new, |said| format!(": {said}"));
                format!("{TELL}: pod {namespace}/{pod}{node}: {what}{said}")
            }
        };
        Trouble {
            check,
            volume: volume.map(visible),
            what,
            said,
            next,
        }
    }

    /// Returns the beginning of commands about the pod's namespace.
    fn kubectl(&self) -> String {
        format!("kubectl -n {}", self.pod.namespace().unwrap_or_default())
    }

    /// Returns the command that shows the pod.
    fn describe(&self) -> String {
        format!("{} describe pod {}", self.kubectl(), self.pod.name_any())
    }

    /// Returns the command that shows the class of a volume; for someone who may not read it, what the pod says of
    /// it.
    fn show_class(&self, volume: &VolumeFacts) -> String {
        if volume.class.unknown().is_some() {
            return self.describe();
        }
        format!(
            "{} get secretproviderclass {} -o yaml",
            self.kubectl(),
            volume.class_name
        )
    }

    /// Returns the command that edits the class of a volume.
    fn edit_class(&self, volume: &VolumeFacts) -> String {
        format!(
            "{} edit secretproviderclass {}",
            self.kubectl(),
            volume.class_name
        )
    }

    /// Returns how to give the driver a right: a value of the chart, or a role of `deploy/`.
    fn grant(&self, value: &str, role: &str) -> Then {
        match self.may_not_see_the_driver() {
            true => Then::Tell,
            false => Then::Do(format!(
                "kubectl apply -f deploy/{role} # or, of the chart, {value}=true"
            )),
        }
    }

    /// Returns the command that gets a pod like this one. A pod without a controller is not made again by itself.
    fn new_pod(&self) -> String {
        let (kubectl, pod) = (self.kubectl(), self.pod.name_any());
        match self.has_controller() {
            true => format!("{kubectl} delete pod {pod}"),
            false => format!("{kubectl} get pod {pod} -o yaml | kubectl replace --force -f -"),
        }
    }

    /// Returns whether something makes a pod like this one once it is deleted.
    fn has_controller(&self) -> bool {
        let mut owners = self.pod.owner_references().iter();
        owners.any(|owner| owner.controller == Some(true))
    }

    /// Returns the command that shows the log of the node's driver.
    fn driver_log(&self) -> Then {
        let driver = self.node.as_ref().and_then(|node| node.driver.found());
        match driver.and_then(Option::as_ref) {
            Some((installed, pod)) => Then::Do(format!(
                "kubectl -n {} logs {} -c {} --since=15m",
                installed.namespace(),
                pod.name_any(),
                installed.container
            )),
            None => self.driver_pods(),
        }
    }

    /// Returns the command that shows what the node's driver logged as it started.
    fn driver_start(&self) -> Then {
        match self.driver_log() {
            Then::Do(command) => Then::Do(command.replace(" --since=15m", " | head -50")),
            Then::Tell => Then::Tell,
        }
    }

    /// Returns the command that shows the driver's pods.
    fn driver_pods(&self) -> Then {
        if self.may_not_see_the_driver() {
            return Then::Tell;
        }
        let node = self
            .node
            .as_ref()
            .map(|node| format!(" --field-selector spec.nodeName={}", node.name));
        let node = node.unwrap_or_default();
        let command = match self.installed.found().and_then(|all| all.first()) {
            Some(installed) => format!(
                "kubectl -n {} get pods -l {} -o wide{node}",
                installed.namespace(),
                installed.selector()
            ),
            None => "kubectl get daemonsets -A".to_owned(),
        };
        Then::Do(command)
    }

    /// Returns whether it is known that no driver runs on the pod's node.
    pub(super) fn lacks_driver(&self) -> bool {
        let node = self.node.as_ref();
        node.is_some_and(|node| match &node.driver {
            Read::Is(Some((installed, pod))) => !is_running(pod, &installed.container),
            Read::Is(None) => true,
            _ => false,
        })
    }

    /// Returns whether the driver's DaemonSet or its pods could not be read.
    fn may_not_see_the_driver(&self) -> bool {
        let node = self.node.as_ref();
        self.installed.unknown().is_some()
            || node.is_some_and(|node| node.driver.unknown().is_some())
    }

    /// Returns the command that shows all pods of the node, among them that of a provider.
    fn pods_of_node(&self) -> Then {
        if self.may_not_see_the_driver() {
            return Then::Tell;
        }
        let node = self.node.as_ref().map_or("NODE", |node| node.name.as_str());
        Then::Do(format!(
            "kubectl get pods -A -o wide --field-selector spec.nodeName={node}"
        ))
    }

    /// Returns the DaemonSet and the pod of the node's driver.
    fn driver(&self) -> Option<&(Installed, k8s_openapi::api::core::v1::Pod)> {
        self.node.as_ref()?.driver.found()?.as_ref()
    }
}
