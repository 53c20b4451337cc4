//! A run in which everything goes wrong that can, and an observer checks all the time that the driver
//! keeps its promises.
//!
//! ```text
//! schedule     what happens when: made from a seed, printed, read, cut
//! actor        carries out the steps of a schedule
//!   tenants    the objects of well-behaved and hostile tenants
//!   api_faults the API server as the driver sees it
//! observer     checks volumes, Secrets, pods, traces and leaks
//! store        the contents of the external store, and their history
//! world        what these share: bounds, the pods that are there
//! report       timeline, numbers, findings
//! reduce       makes a schedule that fails smaller
//! ground       the cluster under it
//! ```
//!
//! A run has rounds. In a round, tenants act and faults strike for half a minute. After the last one
//! everything has to converge. At the end all pods are deleted, and nothing may be left.

mod actor;
mod api_faults;
mod ground;
mod observer;
mod reduce;
mod report;
mod schedule;
mod store;
mod tenants;
mod world;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;

use crate::binaries::Binaries;
use crate::cluster::{Error, Result};
use crate::embedded::{Embedded, standard};
use crate::manifest::{add_arguments, change_container};
use crate::namespace::Namespace;
use actor::Actor;
use ground::Ground;
use observer::{Observer, Usage, lacking, left, untraced, usage};
pub use report::{Finding, Outcome};
pub use schedule::Schedule;
use schedule::Step;
use store::Store;
use world::Bounds;
use world::World;

/// The driver's flags: everything that it waits for is short.
const FLAGS: [&str; 7] = [
    "--enable-secret-rotation=true",
    "--rotation-poll-interval=4s",
    "--min-rotation-poll-interval=1s",
    "--rotation-backoff=500ms",
    "--rotation-backoff-max=3s",
    "--sync-interval=3s",
    "--provider-max-calls=16",
];
/// The bounds on the embedded cluster. One interval of rotation (4.4 s), the longest pause after a
/// failure (3 s of the driver, 4 s of kubelet), kubelet's deadline (10 s) and its period (1 s) are 22
/// seconds; the rest is for a machine with other work. A refresh that begins an interval and a period
/// after the last one may take until kubelet's deadline before it has failed.
const BOUNDS: Bounds = Bounds {
    converge: Duration::from_secs(45),
    publish: Duration::from_secs(20),
    fetch: Duration::from_secs(25),
    silence: Duration::from_secs(20),
};
/// The interval at which the state is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// The time in which all steps end after the last has begun. A stop and a reboot take half a minute
/// at most each.
const STEPS_END: Duration = Duration::from_secs(180);
/// The time in which nothing is left after all pods were deleted.
const END: Duration = Duration::from_secs(60);

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The schedule.
    pub schedule: Schedule,
    /// The time after which no further round begins.
    pub limit: Duration,
    /// The number of runs to make a schedule smaller that failed.
    pub reductions: usize,
    /// Whether the timeline is printed while it happens.
    pub verbose: bool,
}

/// Returns a seed that no run had.
pub fn fresh_seed() -> u64 {
    // Short enough to be typed.
    jiff::Timestamp::now().as_millisecond().unsigned_abs() % 1_000_000_000
}

/// Runs a schedule on an embedded cluster of its own, and on failure shorter ones. Prints what
/// happened. Returns whether the run was good.
///
/// # Errors
/// When the cluster does not start or breaks.
pub async fn run(options: &Options) -> Result<bool> {
    if let Some(other) = std::env::var("E2E_CLUSTER")
        .ok()
        .filter(|name| name != "embedded")
    {
        let reason =
            format!("E2E_CLUSTER={other}: faults of all kinds strike the embedded cluster only");
        return Err(Error::Impossible(reason));
    }
    let outcome = run_embedded(&options.schedule, options.limit).await?;
    if options.verbose || !outcome.is_good() {
        println!("{}", outcome.timeline());
    }
    println!("seed {}\n{outcome}", options.schedule.seed);
    let Some(first) = outcome.findings.first() else {
        println!("no promise was broken");
        return Ok(true);
    };
    println!("broken promises");
    for finding in &outcome.findings {
        println!("{finding}");
    }
    let smallest = reduce::reduce(
        &options.schedule,
        first.invariant,
        options.reductions,
        async |schedule| run_embedded(&schedule, Duration::MAX).await,
    )
    .await?;
    println!(
        "\nthe smallest schedule that breaks it, of {} steps; e2e chaos --schedule FILE runs it:\n{smallest}",
        smallest.len()
    );
    Ok(false)
}

/// Runs a schedule on an embedded cluster of its own.
///
/// # Errors
/// When the cluster does not start or breaks.
pub async fn run_embedded(schedule: &Schedule, limit: Duration) -> Result<Outcome> {
    let failed = |what: &str, error: std::io::Error| Error::Start(format!("{what}: {error}"));
    let binaries = tokio::task::spawn_blocking(|| Binaries::find(|_| {})).await;
    let binaries = binaries.map_err(|error| Error::Start(error.to_string()))?;
    let binaries = binaries.map_err(|error| Error::Start(error.to_string()))?;
    let shared = tempfile::tempdir().map_err(|error| failed("make a directory", error))?;
    let file = shared.path().join("objects.json");
    let store = Store::create(file).map_err(|error| failed("write the store", error))?;
    let cluster = Embedded::start(options(&binaries, shared.path().to_owned())?).await?;
    run_on(&cluster, store, BOUNDS, schedule, limit).await
}

fn options(binaries: &Binaries, shared: PathBuf) -> Result<embedded::Options> {
    let mut options = embedded::Options {
        nodes: 2,
        csi_timeout: Duration::from_secs(10),
        sync_period: Some(Duration::from_secs(1)),
        longest_pause: Duration::from_secs(4),
        shared: Some(shared),
        ..standard(binaries)?
    };
    let manifests = &mut options.manifests;
    add_arguments(manifests, "secrets-store", &FLAGS)?;
    let objects = format!("--objects={}/objects.json", embedded::SHARED);
    add_arguments(manifests, "fake-provider", &[&objects])?;
    // So that the driver has another disk below its directory when one is mounted there.
    change_container(manifests, "secrets-store", |container| {
        let mounts = container["volumeMounts"].as_array_mut();
        for mount in mounts.into_iter().flatten() {
            if mount["name"] == "plugin-dir" {
                mount["mountPropagation"] = "HostToContainer".into();
            }
        }
    })?;
    Ok(options)
}

/// Runs a schedule on a cluster that has only the driver and the provider.
///
/// # Errors
/// When the cluster breaks.
async fn run_on<G: Ground>(
    ground: &G,
    store: Store,
    bounds: Bounds,
    schedule: &Schedule,
    limit: Duration,
) -> Result<Outcome> {
    let namespace = Namespace::create(ground).await?;
    let hostile = Namespace::create(ground).await?;
    let world = Arc::new(World::new(store, namespace.name().to_owned(), bounds));
    let mut idle = Vec::new();
    for node in ground.nodes() {
        let root = ground.root(&node).await?;
        let driver = usage(ground, &node).await?;
        let driver = driver.ok_or_else(|| Error::Start(format!("no driver on {node}")))?;
        idle.push((node.clone(), driver));
        lock(&world.roots).insert(node, root);
    }
    let actor = Actor::new(ground, Arc::clone(&world), namespace, hostile);
    for class in 0..store::CLASSES.len() {
        let object = tenants::class(class, false).to_string();
        actor.namespace.apply(&object).await?;
    }
    let observer = Observer::start(&world, &ground.client());
    tokio::select! {
        done = run_rounds(&actor, ground, schedule, limit, &idle) => done?,
        () = actor.probe_liveness() => {}
    }
    drop(observer);
    Ok(world.log.outcome())
}

/// Runs the rounds, and checks at the end that nothing is left.
async fn run_rounds<G: Ground>(
    actor: &Actor<'_, G>,
    ground: &G,
    schedule: &Schedule,
    limit: Duration,
    idle: &[(String, Usage)],
) -> Result<()> {
    let world = &actor.world;
    let started = Instant::now();
    for (number, round) in schedule.rounds.iter().enumerate() {
        if started.elapsed() > limit || world.log.has_found() {
            break;
        }
        world.log.tell(format!("round {} begins", number + 1));
        run_round(actor, round).await?;
        if !world.log.has_found() {
            settle(world, ground).await?;
        }
    }
    if world.log.has_found() {
        return Ok(());
    }
    end(actor, ground, idle).await
}

/// Carries out the steps of a round at their times; returns when all are over, or soon after a promise
/// was broken.
async fn run_round<G: Ground>(actor: &Actor<'_, G>, round: &[Step]) -> Result<()> {
    let begun = tokio::time::Instant::now();
    let mut running = FuturesUnordered::new();
    for step in round {
        let at = begun + Duration::from_millis(step.at);
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(at) => break,
                Some(()) = running.next(), if !running.is_empty() => {}
            }
        }
        if actor.world.log.has_found() {
            return Ok(());
        }
        running.push(actor.act(step.what));
    }
    let rest = async { while running.next().await.is_some() {} };
    let ended = tokio::time::timeout(STEPS_END, rest).await;
    ended.map_err(|_| Error::Timeout {
        what: "the steps of a round to end".to_owned(),
        after: STEPS_END,
        last: actor.world.log.outcome().timeline(),
    })
}

/// Waits until everything is as it should be after the faults.
async fn settle<G: Ground>(world: &World, ground: &G) -> Result<()> {
    let begun = world.now();
    world.log.tell("the last fault is over");
    loop {
        let lacking = lacking(world, &ground.client()).await?;
        if lacking.is_empty() || world.log.has_found() {
            break;
        }
        if world.now() - begun > world.bounds.converge {
            let invariant = "after the last fault all converges";
            world.log.find(invariant, lacking.join("; "));
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
    world
        .log
        .took("convergence after the last fault", world.now() - begun);
    world.log.tell("all has converged");
    for failure in untraced(world, ground).await? {
        world.log.find("each failure leaves a trace", failure);
    }
    Ok(())
}

/// Deletes all pods, and waits until nothing is left.
async fn end<G: Ground>(actor: &Actor<'_, G>, ground: &G, idle: &[(String, Usage)]) -> Result<()> {
    let world = &actor.world;
    world.log.tell("all pods are deleted");
    actor.delete_all().await?;
    let begun = world.now();
    let namespaces = [actor.namespace.name(), actor.hostile.name()];
    loop {
        let mut all = Vec::new();
        for (node, idle) in idle {
            all.extend(left(world, ground, node, *idle, &namespaces).await?);
        }
        if all.is_empty() {
            break;
        }
        if world.now() - begun > END {
            world.log.find("nothing is left", all.join("; "));
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
    world
        .log
        .took("until nothing was left", world.now() - begun);
    Ok(())
}

/// Locks a mutex, also one that a panic poisoned: no holder leaves a value incomplete.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
