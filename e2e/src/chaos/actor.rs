//! Carries out the steps of a schedule on a cluster.

mod calls;
mod compete;
mod disk;
mod features;
mod liveness;
mod mounts;
mod node;
mod once;
mod provider;
mod tenants;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cluster::{Cluster as _, Result};
use crate::namespace::Namespace;

use super::ground::Ground;
use super::lock;
use super::schedule::What;
use super::world::World;
use liveness::Liveness;
pub(super) use mounts::{ALTERATIONS, ALTERED};

/// The port of the provider's control.
const CONTROL: u16 = 8080;
/// The answers of a provider that is wrong: each must not reach a volume.
pub(super) const WRONG: [&str; 11] = [
    "[{status: {code: UNAVAILABLE, message: a fault of the run}}]",
    "[{status: {code: PERMISSION_DENIED, message: a fault of the run}}]",
    "[{status: {code: DATA_LOSS, message: a fault of the run}}]",
    "[{errorCode: ChaosError}]",
    "[{missingVersions: true, spoilt: true}]",
    "[{badPath: ../../../../etc/chaos, spoilt: true}]",
    "[{oversize: 20000000, spoilt: true}]",
    "[{errorCodeBeside: ChaosError, spoilt: true}]",
    "[{badPath: who, spoilt: true}]",
    "[{badPath: who/is, spoilt: true}]",
    "[{status: {code: UNKNOWN}}]",
];

/// What the drivers have done since a run began, as far as it is counted: writes and reads of objects, calls to
/// providers, and time of the processor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    writes: u64,
    reads: u64,
    calls: u64,
    cpu: Duration,
}

/// How often a provider may be asked for a volume in a time of rest: a refresh of two calls, and another one.
const MOST_CALLS: u64 = 3;
/// The reads of objects in it, for a volume and for what there is besides: kubelet's looks and the checks of Secrets
/// need up to nine.
const MOST_READS: u64 = 30;
const MORE_READS: u64 = 60;
/// The time that the drivers may need in it, which the build of the tests needs a quarter of.
const MOST_CPU: Duration = Duration::from_secs(3);

impl Work {
    /// Returns whether the drivers have been at rest since: they write nothing as long as nothing changes, call
    /// providers no more often than the interval of rotation says, and ask the API server no more often than those
    /// do who want to know what is new.
    pub(super) fn is_rest_until(&self, now: &Self, volumes: u64) -> bool {
        let calls = now.calls.saturating_sub(self.calls);
        let reads = now.reads.saturating_sub(self.reads);
        now.writes == self.writes
            && calls <= MOST_CALLS * volumes
            && reads <= MOST_READS * volumes + MORE_READS
            && now.cpu.saturating_sub(self.cpu) <= MOST_CPU
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            writes,
            reads,
            calls,
            cpu,
        } = self;
        write!(
            f,
            "{writes} writes, {reads} reads, {calls} calls to providers and {cpu:.1?} of the processor"
        )
    }
}

/// Acts on a cluster.
pub(super) struct Actor<'a, G> {
    pub(super) ground: &'a G,
    pub(super) world: Arc<World>,
    pub(super) namespace: Namespace,
    /// The namespace of the hostile tenant.
    pub(super) hostile: Namespace,
    nodes: Vec<String>,
    /// Held by the edit of a class whose turn it is, so that their order is known.
    edits: tokio::sync::Mutex<()>,
    /// Held, by node, by the fault of a disk until it is undone: on a slow machine that takes longer than planned,
    /// and what lies over the records is undone in the order in which it was laid there.
    disks: BTreeMap<String, tokio::sync::Mutex<()>>,
    /// The number of faults that last, other than hostile tenants.
    active: Cell<usize>,
    /// The number of things that need names of their own.
    count: Cell<usize>,
    /// What health checks say.
    liveness: Liveness,
}

impl<'a, G: Ground> Actor<'a, G> {
    pub(super) fn new(
        ground: &'a G,
        world: Arc<World>,
        namespace: Namespace,
        hostile: Namespace,
    ) -> Self {
        let nodes = ground.cluster().nodes();
        let disks = nodes
            .iter()
            .map(|node| (node.clone(), tokio::sync::Mutex::default()));
        Self {
            disks: disks.collect(),
            nodes,
            ground,
            world,
            namespace,
            hostile,
            edits: tokio::sync::Mutex::default(),
            active: Cell::new(0),
            count: Cell::new(0),
            liveness: Liveness::default(),
        }
    }

    /// Carries out a step; returns when it is over. What a cluster cannot do is left out.
    pub(super) async fn act(&self, what: What) {
        if let Some(why) = self.ground.cannot(what) {
            return self.world.log.leave_out(what.kind(), why);
        }
        self.world.log.step(what.kind());
        self.world.log.tell(what.to_string());
        let begun = Instant::now();
        // No pod can be ready without its class.
        let is_remade = matches!(what, What::RemakeClass { .. });
        let is_hostile = matches!(what, What::Hostile { .. });
        // A single failure keeps nobody waiting for long, see the bounds of good minutes.
        let is_single = what.is_single();
        let is_fault = is_remade || !what.is_action() && !is_hostile && !is_single;
        if let What::AnswersCompete { .. } = what {
            self.alone().await;
        }
        if is_fault {
            self.fault_begins();
        }
        let done = match what.is_action() {
            true => self.act_as_tenant(what).await,
            false => self.strike(what).await,
        };
        if let Some(node) = what.restarts_driver_of() {
            self.world.driver_restarts(self.node(node));
        }
        if is_fault {
            self.fault_ends();
        }
        match done {
            Err(error) => {
                self.world.log.tell(format!("{}: {error}", what.kind()));
                let why = "it could not be made, see the timeline of --verbose";
                self.world.log.leave_out(what.kind(), why);
            }
            Ok(()) if begun.elapsed() > Duration::from_secs(1) => {
                self.world.log.tell(format!("{} is over", what.kind()));
            }
            Ok(()) => {}
        }
    }

    /// Takes note of whether a fault was undone. If not, what is seen after that is not the driver's.
    fn undone(&self, what: What, undone: Result<()>) {
        if let Err(error) = undone {
            let text = format!("{}: it was not undone: {error}", what.kind());
            self.world.log.break_off(text);
        }
    }

    fn fault_begins(&self) {
        self.active.set(self.active.get() + 1);
        *lock(&self.world.calm) = None;
    }

    fn fault_ends(&self) {
        self.active.set(self.active.get() - 1);
        if self.active.get() == 0 {
            *lock(&self.world.calm) = Some(self.world.now());
        }
    }

    /// Waits until no fault is active.
    async fn alone(&self) {
        while self.active.get() > 0 && !self.world.log.is_over() {
            sleep(100).await;
        }
    }

    async fn strike(&self, what: What) -> Result<()> {
        match what {
            What::ApiSlow { .. }
            | What::ApiRefuses { .. }
            | What::ApiConflicts { .. }
            | What::ApiPast { .. }
            | What::SecretsRefused { .. }
            | What::ApiGone { .. }
            | What::ApiHung { .. } => {
                let lies = matches!(what, What::ApiPast { .. });
                if lies {
                    self.world.lies(true);
                }
                self.world.api_is_struck();
                let struck = self.ground.strike_api(what).await;
                if lies {
                    self.world.lies(false);
                }
                self.world.api_is_struck();
                self.world.log.struck(&what.kind(), struck?);
                Ok(())
            }
            What::ProviderSlow { node, lasts, by } => {
                let faults = format!("[{{delay: {}ms, jitter: {by}ms}}]", by / 4);
                self.provider_faults(what, self.node(node), lasts, &faults)
                    .await
            }
            What::ProviderWrong { node, lasts, how } => {
                let faults = WRONG.get(how).copied().unwrap_or_default();
                self.provider_faults(what, self.node(node), lasts, faults)
                    .await
            }
            What::ProviderHung { node, lasts } => {
                self.provider_hung(what, self.node(node), lasts).await
            }
            What::ApiFailsOnce { kind, how } => self.api_fails_once(what, kind, how).await,
            What::ProviderFailsOnce { node, hangs } => {
                self.provider_fails_once(what, self.node(node), hangs).await
            }
            What::RepeatCalls { node, lasts, by } => {
                self.repeat_calls(what, self.node(node), lasts, by).await
            }
            What::Hostile { node, lasts, how } => self.hostile(self.node(node), lasts, how).await,
            _ => self.strike_node(what).await,
        }
    }

    /// Returns what the drivers have done.
    pub(super) async fn work(&self) -> Work {
        let mut calls = 0;
        let mut cpu = Duration::ZERO;
        for node in &self.nodes {
            calls += self.provider_calls(node).await;
            let process = self.ground.driver_process(node).await.ok().flatten();
            cpu += process.map(cpu_of).unwrap_or_default();
        }
        let (writes, reads) = self.ground.requests().unwrap_or_default();
        Work {
            writes,
            reads,
            calls,
            cpu,
        }
    }

    fn node(&self, number: usize) -> &str {
        let number = number % self.nodes.len().max(1);
        self.nodes.get(number).map_or("", String::as_str)
    }

    fn next(&self) -> usize {
        self.count.set(self.count.get() + 1);
        self.count.get()
    }
}

/// Returns the time of the processor that a process has needed (proc_pid_stat(5)); zero if it does not run.
fn cpu_of(process: i32) -> Duration {
    /// The ticks of a second on Linux (`USER_HZ`).
    const TICKS: u32 = 100;
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The name of the program may have spaces.
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    let times = fields.split(' ').skip(11).take(2);
    let ticks: u32 = times.filter_map(|ticks| ticks.parse::<u32>().ok()).sum();
    Duration::from_secs(1) * ticks / TICKS
}

/// Waits for so many milliseconds.
async fn sleep(milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}

/// Returns a text as it is written in a query.
fn escaped(text: &str) -> String {
    text.bytes()
        .fold(String::new(), |escaped, byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => escaped + &char::from(byte).to_string(),
            _ => escaped + &format!("%{byte:02X}"),
        })
}
