//! Says of a container that is not ready what it does, since when, and what its latest warning is.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerState, ContainerStatus, Event};
use kube::ResourceExt as _;

use super::{Step, hook, since};
use crate::explain::{
    checks::{
        Found,
        events::{is_about, is_warning, text},
        order::stage_of,
        restarts::restarts_always,
    },
    facts::{Facts, time_of},
    state::{self, is_sidecar},
};
use crate::time::shown;

/// The reasons for which a container waits that kubelet has not come to, as far as it reports.
const NOT_BEGUN: [Option<&str>; 3] = [None, Some("ContainerCreating"), Some("PodInitializing")];

/// A container and what kubelet says of it.
struct Seen<'a> {
    container: &'a Container,
    is_init: bool,
    is_sidecar: bool,
    status: Option<&'a ContainerStatus>,
}

/// Returns the init container for which the others wait.
pub(super) fn init(facts: &Facts) -> Option<Step> {
    let mut all = seen(facts).filter(|seen| seen.is_init);
    let seen = all.find(|seen| !seen.is_through())?;
    Some(seen.step(facts))
}

/// Returns the containers that are not ready, among them sidecars.
pub(super) fn others(facts: &Facts) -> Vec<Step> {
    let all = seen(facts).filter(|seen| !seen.is_init || seen.is_sidecar);
    let waiting: Vec<_> = all.filter(|seen| !seen.is_fine(facts)).collect();
    // kubelet starts one after another: those that it has not come to wait for one before them, and while a hook
    // runs, it reports of none.
    let hook = hook::running(facts).map(|(container, _)| container.name.as_str());
    let begun = waiting.iter().position(|seen| seen.has_begun(facts));
    let is_first = |index: usize| index == begun.unwrap_or(0);
    let held_up = waiting
        .iter()
        .enumerate()
        .filter(|(index, seen)| match hook {
            Some(name) => seen.container.name == name,
            None => is_first(*index) || seen.has_begun(facts),
        });
    held_up.map(|(_, seen)| seen.step(facts)).collect()
}

fn seen(facts: &Facts) -> impl Iterator<Item = Seen<'_>> {
    facts.containers().map(|container| {
        let name = container.name.as_str();
        let mut statuses = state::statuses(&facts.pod);
        let status = statuses.find(|(_, status)| status.name == name);
        let spec = facts.pod.spec.iter();
        let mut init = spec.flat_map(|spec| spec.init_containers.iter().flatten());
        Seen {
            container,
            is_init: init.any(|init| init.name == name),
            is_sidecar: is_sidecar(&facts.pod, name),
            status: status.map(|(_, status)| status),
        }
    })
}

impl Seen<'_> {
    fn state(&self) -> Option<&ContainerState> {
        self.status?.state.as_ref()
    }

    fn is_running(&self) -> bool {
        self.state().is_some_and(|state| state.running.is_some())
    }

    fn has_done_its_work(&self) -> bool {
        let ended = self.state().and_then(|state| state.terminated.as_ref());
        ended.is_some_and(|ended| ended.exit_code == 0)
    }

    fn has_started(&self) -> bool {
        self.status
            .is_some_and(|status| status.started == Some(true))
    }

    /// Returns kubelet's last event about it.
    fn last_event<'b>(&self, facts: &'b Facts) -> Option<&'b Event> {
        let mut events = facts.events.found()?.iter();
        events.find(|event| is_about(event, &self.container.name))
    }

    /// Returns whether kubelet has come to it.
    fn has_begun(&self, facts: &Facts) -> bool {
        let waiting = self.state().and_then(|state| state.waiting.as_ref());
        let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
        let is_new = self.state().is_none() || waiting.is_some() && NOT_BEGUN.contains(&reason);
        !is_new || self.last_event(facts).is_some()
    }

    /// Returns whether kubelet goes on to the container behind it.
    fn is_through(&self) -> bool {
        match self.is_sidecar {
            true => self.has_started(),
            false => self.has_done_its_work(),
        }
    }

    /// Returns whether a pod does not wait for it.
    fn is_fine(&self, facts: &Facts) -> bool {
        let is_ready = self.status.is_some_and(|status| status.ready);
        let is_done =
            self.has_done_its_work() && !restarts_always(facts, self.is_init, &self.container.name);
        is_ready && self.is_running() || is_done
    }

    fn name(&self) -> String {
        let name = &self.container.name;
        match (self.is_sidecar, self.is_init) {
            (true, _) => format!("sidecar container {name}"),
            (false, true) => format!("init container {name}"),
            (false, false) => format!("container {name}"),
        }
    }

    fn step(&self, facts: &Facts) -> Step {
        let name = &self.container.name;
        Step {
            stage: stage_of(facts, name),
            container: Some(name.clone()),
            found: self.found(facts),
        }
    }

    fn found(&self, facts: &Facts) -> Found {
        let name = self.name();
        if let Some((container, started)) = hook::running(facts)
            && container.name == self.container.name
        {
            return self.hook(facts, started);
        }
        let state = self.state();
        if let Some(running) = state.and_then(|state| state.running.as_ref()) {
            let started = running.started_at.as_ref().map(|time| time.0);
            return self.running(
                facts,
                &format!("{name}, which runs{}", since(started, facts)),
            );
        }
        if let Some(ended) = state.and_then(|state| state.terminated.as_ref()) {
            let what = format!("{name}, which has ended: {}", state::end(ended, facts.now));
            return self.quote(facts, Found::new(what, self.log(facts)), |_| true);
        }
        self.waiting(facts)
    }

    /// Its postStart hook runs.
    fn hook(&self, facts: &Facts, started: Timestamp) -> Found {
        let what = format!(
            "the postStart hook of {}, which has run{}: until the hook ends, kubelet starts no further container of the pod, reports nothing of it and does not look at its volumes",
            self.name(),
            since(Some(started), facts)
        );
        let next = hook_command(facts, &self.container.name, self.is_init);
        self.quote(facts, Found::new(what, next), |event| {
            time_of(event).is_none_or(|time| time >= started)
        })
    }

    fn running(&self, facts: &Facts, begin: &str) -> Found {
        let has_startup = self.container.startup_probe.is_some() && !self.has_started();
        let is_through = self.is_through();
        let (rest, probe) = match (self.is_init, self.is_sidecar) {
            _ if has_startup => (
                match self.is_init {
                    true => {
                        ", and its startup probe has not succeeded yet; the containers after it wait for that"
                    }
                    false => ", and its startup probe has not succeeded yet",
                },
                "startup probe",
            ),
            (true, false) => (": the containers after it wait until it has ended", ""),
            (true, true) if !is_through => (
                ", and which kubelet does not report as started yet; the containers after it wait for that",
                "",
            ),
            _ if self.container.readiness_probe.is_some() => (
                ", and its readiness probe does not succeed",
                "readiness probe",
            ),
            _ => (", and which kubelet does not report as ready yet", ""),
        };
        let found = Found::new(format!("{begin}{rest}"), self.log(facts));
        self.quote(facts, found, |event| {
            text(event).to_lowercase().contains(probe)
        })
    }

    fn waiting(&self, facts: &Facts) -> Found {
        let name = self.name();
        let waiting = self.state().and_then(|state| state.waiting.as_ref());
        let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
        let said = waiting.and_then(|waiting| waiting.message.clone());
        let said = said.filter(|said| !said.is_empty());
        let last = self.last_event(facts);
        let at = last.and_then(time_of);
        let what = match (last.and_then(|event| event.reason.as_deref()), reason) {
            (Some("Pulling"), reason) if NOT_BEGUN.contains(&reason) => format!(
                "{name}: the node pulls its image {}{}",
                self.container.image.as_deref().unwrap_or_default(),
                since(at, facts)
            ),
            (Some(event), reason) if NOT_BEGUN.contains(&reason) => {
                let at = at.map_or_else(String::new, |at| format!(", {}", shown(at, facts.now)));
                format!(
                    "{name}, which kubelet does not report as running yet; the last event about it is {event}{at}"
                )
            }
            (_, Some(reason)) if !NOT_BEGUN.contains(&Some(reason)) => {
                format!("{name}, which waits ({reason}){}", since(at, facts))
            }
            _ => {
                let status = facts.pod.status.as_ref();
                let taken = status.and_then(|status| status.start_time.as_ref());
                let taken = since(taken.map(|time| time.0), facts);
                format!("{name}, which kubelet has not started yet; it has the pod{taken}")
            }
        };
        let found = Found::new(what, facts.describe());
        match said {
            Some(said) => found.said(Some(said)),
            None => self.quote(facts, found, |_| true),
        }
    }

    /// Adds the latest warning about the container that fits.
    fn quote(&self, facts: &Facts, found: Found, fits: impl Fn(&Event) -> bool) -> Found {
        let name = &self.container.name;
        let events = facts.events.found().into_iter().flatten();
        let mut warnings = events.filter(|event| is_warning(event) && is_about(event, name));
        match warnings.find(|event| fits(event)) {
            Some(event) => found.said_by(Some(event)),
            None => found,
        }
    }

    fn log(&self, facts: &Facts) -> String {
        state::log(facts, &self.container.name, "")
    }
}

/// Returns the command that shows the postStart hook of a container. `kubectl describe` does not show hooks.
pub(in crate::explain::checks) fn hook_command(
    facts: &Facts,
    container: &str,
    is_init: bool,
) -> String {
    let list = match is_init {
        true => "initContainers",
        false => "containers",
    };
    format!(
        "{} get pod {} -o jsonpath='{{.spec.{list}[?(@.name==\"{container}\")].lifecycle.postStart}}'",
        facts.kubectl(),
        facts.pod.name_any()
    )
}
