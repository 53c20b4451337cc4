//! A run in which everything goes wrong that can, and an observer checks all the time that the driver
//! keeps its promises.
//!
//! ```text
//! schedule     what happens when: made from a seed, printed, read, cut
//! random       numbers of a seed
//! actor        carries out the steps of a schedule
//!   tenants    the objects of well-behaved and hostile tenants
//! observer     checks volumes, Secrets, pods, traces and leaks
//! editions     what the classes say, and their history
//! features     what two pods ask for besides, and its exact outcome
//! store        the contents of the external store, and their history
//! good         minutes in which only single requests fail, and their bounds
//! world        what these share: bounds, the pods that are there
//! report       timeline, numbers, findings
//! reduce       makes a schedule that fails smaller
//! ground       the cluster under it: how faults are made there, and what cannot be made
//!   embedded   API server and kubelets of our own
//!   local      real Kubernetes on this machine
//! ```
//!
//! A run has rounds. In a round, tenants act and faults strike for half a minute. After the last one
//! everything has to converge. At the end all pods are deleted, and nothing may be left.

mod actor;
mod editions;
mod features;
mod good;
mod ground;
mod observer;
mod random;
mod reduce;
mod report;
mod schedule;
mod store;
mod tenants;
mod world;

use std::fmt;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use jiff::Timestamp;

use crate::cluster::{Cluster as _, Error, Result};
use crate::namespace::Namespace;
use actor::Actor;
use features::Features;
pub use ground::Site;
use ground::{Ground, OnEmbedded, OnLocal};
use observer::{Observer, Usage, excess, lacking, left, untraced, untrue, usage, warned};
pub use report::{Finding, Outcome};
pub use schedule::Schedule;
use schedule::{Step, What, is_patient};
use store::Store;
use world::World;

/// The driver's flags: everything that it waits for is short.
const FLAGS: [&str; 6] = [
    "--enable-secret-rotation=true",
    "--rotation-poll-interval=4s",
    "--min-rotation-poll-interval=1s",
    "--rotation-backoff=500ms",
    "--rotation-backoff-max=3s",
    "--sync-interval=1s",
];
/// The calls in flight to a provider: the default, or fewer than the pods of a node can need at once.
const MOST_CALLS: [u64; 2] = [16, 3];
/// The intervals at which kubelet looks at a volume: shorter than half of the time for which the driver
/// remembers a class, so that each look asks for the class anew, or longer, so that it answers from memory.
const LOOKS_EVERY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
/// The times for which kubelet waits for an answer: shorter than the driver waits for that of a provider to a
/// refresh, so that a run sees many deadlines, or longer, as a real one does.
const KUBELET_WAITS: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(60)];
/// The flag of every second seed: a publish fails as long as its Secrets cannot be written.
const SECRETS_FIRST: &str = "--sync-errors=fail";
/// A time longer than the interval of rotation.
const REST: Duration = Duration::from_secs(5);
/// The interval at which the state is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// The share of the clock's time by which the time of a run goes on, on a machine that is not too slow for
/// the deadlines of calls.
const QUIET: f64 = 0.7;
/// The time in which all steps end after the last has begun. A stop and a reboot take half a minute at most each,
/// and volumes that somebody has altered have a minute and a half, on a machine without other work.
const STEPS_END: Duration = Duration::from_secs(300);

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
    Timestamp::now().as_millisecond().unsigned_abs() % 1_000_000_000
}

/// Runs a schedule on a cluster of its own, and on failure shorter ones. Prints what happened. Returns
/// whether the run was good.
///
/// # Errors
/// When the cluster does not start or breaks, or the run itself fails.
pub async fn run(site: Site, options: &Options) -> Result<bool> {
    let outcome = run_once(site, &options.schedule, options.limit).await?;
    if options.verbose || !outcome.is_good() {
        print(outcome.timeline())?;
    }
    print(format_args!("seed {}\n{outcome}", options.schedule.seed))?;
    if let Some(why) = outcome.broken_off {
        let text = format!("the run itself failed and says nothing about the driver: {why}");
        return Err(Error::Impossible(text));
    }
    let Some(first) = outcome.findings.first() else {
        print("no promise was broken")?;
        return Ok(true);
    };
    print("broken promises")?;
    for finding in &outcome.findings {
        print(finding)?;
    }
    let reduced = reduce::reduce(
        &options.schedule,
        first.invariant,
        options.reductions,
        async |schedule| run_once(site, &schedule, Duration::MAX).await,
    )
    .await;
    // The promise is broken all the same.
    let smallest = reduced.unwrap_or_else(|error| {
        eprintln!("the schedule does not become smaller, because a run failed: {error}");
        options.schedule.clone()
    });
    let which = match options.reductions {
        0 => "the schedule that breaks it, which was not reduced",
        _ => "the smallest schedule that was found to break it",
    };
    print(format_args!(
        "\n{which}, of {} steps; e2e chaos --schedule FILE runs it:\n{smallest}",
        smallest.len()
    ))?;
    Ok(false)
}

/// Prints a line. A full disk is no fault of the driver's, and no reason to panic.
fn print(line: impl fmt::Display) -> Result<()> {
    let failed = |error| Error::Impossible(format!("print what happened: {error}"));
    writeln!(std::io::stdout().lock(), "{line}").map_err(failed)
}

/// Runs a schedule once, on a cluster of its own.
async fn run_once(site: Site, schedule: &Schedule, limit: Duration) -> Result<Outcome> {
    let failed = |what: &str, error: std::io::Error| Error::Start(format!("{what}: {error}"));
    let shared = tempfile::tempdir().map_err(|error| failed("make a directory", error))?;
    let file = shared.path().join("objects.json");
    let store = Store::create(file).map_err(|error| failed("write the store", error))?;
    let mut flags = FLAGS.to_vec();
    let most_calls = format!("--provider-max-calls={}", most_calls(schedule));
    flags.push(&most_calls);
    if has_secrets_first(schedule) {
        flags.push(SECRETS_FIRST);
    }
    match site {
        Site::Embedded => {
            let (looks_every, waits) = (looks_every(schedule), kubelet_waits(schedule));
            let ground = OnEmbedded::start(shared.path(), &flags, looks_every, waits).await?;
            let outcome = run_on(&ground, store, schedule, limit).await;
            if !outcome.as_ref().is_ok_and(Outcome::is_good) {
                ground.keep_logs()?;
            }
            outcome
        }
        Site::Local => {
            let ground = OnLocal::start(shared.path(), &flags).await?;
            let outcome = run_on(&ground, store, schedule, limit).await;
            let is_good = outcome.as_ref().is_ok_and(Outcome::is_good);
            ground.end(is_good).await?;
            outcome
        }
    }
}

/// Returns whether a publish fails in this run as long as its Secrets cannot be written.
fn has_secrets_first(schedule: &Schedule) -> bool {
    !schedule.seed.is_multiple_of(2)
}

/// Returns how often the driver of this run calls a provider at once.
fn most_calls(schedule: &Schedule) -> u64 {
    MOST_CALLS[usize::from(!(schedule.seed / 2).is_multiple_of(2))]
}

/// Returns the interval at which kubelet looks at a volume in this run.
fn looks_every(schedule: &Schedule) -> Duration {
    LOOKS_EVERY[usize::from(!(schedule.seed / 4).is_multiple_of(2))]
}

/// Returns the time for which kubelet waits for an answer in this run.
fn kubelet_waits(schedule: &Schedule) -> Duration {
    KUBELET_WAITS[usize::from(is_patient(schedule.seed))]
}

/// Runs a schedule on a cluster that has only the driver and the provider.
///
/// # Errors
/// When the cluster breaks.
async fn run_on<G: Ground>(
    ground: &G,
    store: Store,
    schedule: &Schedule,
    limit: Duration,
) -> Result<Outcome> {
    let namespace = Namespace::create(ground.cluster()).await?;
    let hostile = Namespace::create(ground.cluster()).await?;
    let (name, bounds) = (namespace.name().to_owned(), ground.bounds());
    let mut world = World::new(store, name, bounds, ground.seldom());
    world.has_secrets_first = has_secrets_first(schedule);
    world.features = Features::start(world.has_secrets_first);
    world.most_calls = most_calls(schedule);
    for object in [tenants::set(), tenants::credentials(1)] {
        let made = namespace.apply(&object.to_string()).await?;
        if object["metadata"]["name"] == tenants::SET {
            let uid = made.into_iter().find_map(|made| made.metadata.uid);
            world.set = uid.unwrap_or_default();
        }
    }
    let world = Arc::new(world);
    let mut idle = Vec::new();
    for node in ground.cluster().nodes() {
        let root = ground.root(&node).await?;
        let driver = usage(ground, &node).await?;
        let driver = driver.ok_or_else(|| Error::Start(format!("no driver on {node}")))?;
        idle.push((node.clone(), driver));
        lock(&world.roots).insert(node, root);
    }
    let actor = Actor::new(ground, Arc::clone(&world), namespace, hostile);
    for class in 0..store::CLASSES.len() {
        if let Some(spec) = actor.world.editions.now(class) {
            let object = tenants::class(class, spec, actor.world.seldom);
            actor.namespace.apply(&object.to_string()).await?;
        }
    }
    actor.begin_features().await?;
    let observer = Observer::start(&world, &ground.cluster().client());
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
        // A run has one round at least.
        if number > 0 && started.elapsed() > limit || world.log.is_over() {
            break;
        }
        world.log.tell(format!("round {} begins", number + 1));
        let (begun, counted) = (Timestamp::now(), (Instant::now(), world.now()));
        world.good.set(is_good(round));
        run_round(actor, round).await?;
        if !world.log.is_over() {
            settle(actor, ground, idle).await?;
        }
        if !world.log.is_over() {
            rest(actor).await;
        }
        world.good.set(false);
        let share = (world.now() - counted.1).div_duration_f64(counted.0.elapsed());
        world.log.tell(format!(
            "the time of the run was {share:.2} of that of the clock"
        ));
        // The deadlines of kubelet's calls do not wait for a machine with too much other work.
        let promise = match (is_good(round), is_hostile(round)) {
            (true, _) => "nobody is told of a single failure for longer than it lasts",
            (_, true) => "a hostile tenant lets nothing of another fail",
            _ => continue,
        };
        if share > QUIET && !world.log.is_over() {
            let warned = warned(world, &ground.cluster().client(), begun).await?;
            for what in warned {
                world.log.find(promise, what);
            }
        }
    }
    if world.log.is_over() {
        return Ok(());
    }
    end(actor, ground, idle).await
}

/// Returns whether nothing disturbs in a round but single failures.
fn is_good(round: &[Step]) -> bool {
    let mut steps = round.iter().map(|step| step.what);
    // No volume is refreshed while its class is away.
    steps.all(|what| match what {
        What::RemakeClass { .. } => false,
        what => what.is_action() || what.is_single(),
    })
}

/// Returns whether nobody disturbs in a round but the hostile tenant.
fn is_hostile(round: &[Step]) -> bool {
    let mut steps = round.iter().map(|step| step.what);
    // No volume is refreshed while its class is away.
    steps.all(|what| match what {
        What::RemakeClass { .. } => false,
        What::Hostile { .. } => true,
        what => what.is_action(),
    })
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
        if actor.world.log.is_over() {
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
async fn settle<G: Ground>(
    actor: &Actor<'_, G>,
    ground: &G,
    idle: &[(String, Usage)],
) -> Result<()> {
    let world = &actor.world;
    let namespaces = [actor.namespace.name(), actor.hostile.name()];
    let begun = world.now();
    world.log.tell("the last fault is over");
    actor.touch_features().await?;
    loop {
        let client = ground.cluster().client();
        let mut lacking = lacking(world, &client).await?;
        lacking.extend(features::lacking(world, &client).await?);
        for (node, idle) in idle {
            // A driver that is not killed at the end of the run has what it has not closed only now.
            lacking.extend(excess(ground, node, *idle).await?);
            lacking.extend(untrue(world, ground, node, &namespaces).await?);
        }
        if lacking.is_empty() || world.log.is_over() {
            break;
        }
        if world.now() - begun > world.bounds_since(begun).converge {
            let invariant = "after the last fault all converges";
            world.log.find(invariant, lacking.join("; "));
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
    world
        .log
        .took("convergence after the last fault", world.now() - begun);
    world.features.settles();
    world.log.tell("all has converged");
    for failure in untraced(world, ground).await? {
        world.log.find("each failure leaves a trace", failure);
    }
    if let Some(untold) = features::untold(world, &ground.cluster().client()).await? {
        world.log.find("a pod is told what does not follow", untold);
    }
    Ok(())
}

/// Waits until the drivers have been at rest for longer than the interval of rotation, see [`Work`](actor::Work).
async fn rest<G: Ground>(actor: &Actor<'_, G>) {
    let world = &actor.world;
    let begun = world.now();
    let mut since = (Instant::now(), actor.work().await);
    while since.0.elapsed() < REST {
        if world.now() - begun > world.bounds_since(begun).converge + REST {
            let text = format!("{} since {:.1?}", actor.work().await, since.0.elapsed());
            let invariant = "a driver is at rest when nothing changes";
            return world
                .log
                .find(invariant, format!("{text}, after {}", since.1));
        }
        tokio::time::sleep(LOOK).await;
        let work = actor.work().await;
        if !since.1.is_rest_until(&work, world.refreshed()) {
            since = (Instant::now(), work);
        }
    }
    world.log.checked("times of rest", 1);
    world
        .log
        .took("until the driver was at rest", world.now() - begun);
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
            all.extend(untrue(world, ground, node, &namespaces).await?);
        }
        if all.is_empty() {
            break;
        }
        if world.now() - begun > world.bounds.gone {
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
