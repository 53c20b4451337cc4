//! The Secrets Store CSI driver: the node agent that fetches a pod's secrets from an external
//! store, through a provider, and mounts them into the pod as files on a tmpfs.
//!
//! # The walk
//!
//! A `NodePublishVolume` goes down through these modules, from `csi` to `record`, and comes back
//! up. Each module is a room that uses only rooms below it: `tests/rooms.rs` checks that, the order
//! of this list, and that the list is complete. This file is the only wiring.
//!
//! ```text
//! csi            the CSI services: the form of a request, the status of an error
//! registration   registers the driver with kubelet
//! logging        the log and its redaction
//! volume         the life of a volume: what is due, the steps, their undo
//! sync           the Secrets that a class declares, made and kept
//! memory         what mounted content takes of the driver's memory limit, and what fits
//! provider       the calls to providers: sockets, bounds, turns, the wire
//! cluster        everything asked of the API server
//! metrics        /metrics and /healthz
//! mount          mounts and unmounts a tmpfs, and tells whether it is there
//! files          checked paths and modes, and the atomic swap of ..data
//! record         what this node knows of a volume, on disk, without secrets
//! config         the command line
//! socket         sockets that others dial
//! error          the error of a CSI call
//! secret         values that cannot be printed
//! turns          who goes next
//! hex            bytes as hexadecimal digits
//! ```
//!
//! # Invariants
//!
//! - A volume is published when its record says so, its mount is there and its content is there.
//!   Nothing else means published.
//! - A failed refresh leaves the last good content alone, and is announced once.
//! - A live mount is never replaced or taken away by a publish; a failed first publish leaves
//!   nothing behind.
//! - Only what is recorded, mounted and complete is content that a Secret may be made of; newer
//!   content replaces older by an order that hangs on no clock, and nothing replaces something.
//! - Nothing is watched or listed. An API write happens only when something changed.
//! - Unpublish needs neither the API server nor a provider; CSI and registration come up without
//!   them.
//! - Protobuf types stop at `csi`, `registration`, `provider` and `metrics`, the kube crate at
//!   `cluster`, system calls at `mount`, `files` and `socket`.
//! - A secret is a [`secret::Secret`]; errors never embed their input.

pub mod cluster;
pub mod config;
pub mod csi;
pub mod error;
pub mod files;
pub mod hex;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod mount;
pub mod provider;
pub mod record;
pub mod registration;
pub mod secret;
pub mod socket;
pub mod sync;
pub mod turns;
pub mod volume;

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use tokio::{net::TcpListener, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use cluster::Cluster;
use config::{BUILD_VERSION, Config, RepublishErrors, SyncErrors};
use csi::{Csi, Listener};
use memory::Memory;
use metrics::{Metrics, http};
use mount::Tmpfs;
use provider::{Limits, Providers};
use record::{Content, Records};
use registration::Registrar;
use sync::{Options, SecretSync};
use volume::{
    Clock, Volumes,
    policy::{Failing, Policy},
    restless::Restless,
    target::{Busy, TargetPath},
    threads::Health,
};

/// How long calls that run may go on after `stop`. What is not finished by then is undone, before
/// Kubernetes' usual grace period of 30 seconds ends with a SIGKILL.
const FINISH_WITHIN: Duration = Duration::from_secs(20);

/// What kubelet sets in each container. Where it is, kubelet does not see what the driver mounts unless
/// mounts spread; elsewhere the two are expected to share a table of mounts.
const IN_A_POD: &str = "KUBERNETES_SERVICE_HOST";

/// How often mounted volumes are measured for the metrics, and the memory limit is read again.
const MEASURE_EVERY: Duration = Duration::from_secs(10);

/// Runs the driver until `stop`, then finishes the calls that run.
///
/// # Errors
/// When it cannot start: the socket, the state directory or an address cannot be had. Names
/// which, and what to do.
pub async fn run(config: Config, stop: CancellationToken) -> io::Result<()> {
    for flag in config.without_effect() {
        tracing::warn!(flag, "this flag is accepted and has no effect");
    }
    for flag in config.below_zero() {
        tracing::warn!(flag, "this flag's value is below zero and counts as zero");
    }
    for argument in &config.ignored_arguments {
        tracing::warn!(
            argument,
            "this argument is ignored, because it is or follows an argument that is not a flag"
        );
    }
    if config.node_id.is_empty() {
        tracing::warn!("--nodeid is empty; kubelet does not register a driver without a node name");
    }
    let records = Records::open(&config.state_dir).map_err(|error| {
        about(
            error,
            format!("the state directory {}", config.state_dir.display()),
        )
    })?;
    let root = config.kubelet_root_dir.clone();
    let records =
        records.checked_by(move |record| TargetPath::check_record(record, root.as_deref()));
    match records.remove_orphans() {
        Ok(0) => {}
        Ok(removed) => tracing::info!(
            removed,
            "removed the records of volumes whose pods are gone"
        ),
        Err(error) => {
            tracing::warn!(%error, "the records of volumes whose pods are gone could not be removed")
        }
    }

    let metrics = Metrics::new();
    let memory = Memory::new(
        memory::limit(Path::new("/")),
        config.provider_max_bytes as u64,
    );
    let read = records.each(|record| {
        metrics.success(&record.provider, &record.volume_id, record.last_success);
        let charged = record.content == Content::Driver;
        memory.found(&record.target_path, &record.pod.namespace, charged);
    });
    if let Err(error) = read {
        tracing::warn!(%error, "the records of volumes could not be read; metrics show a last success only after the next refresh or publish");
    }
    memory.find_others(&config.driver_name);
    let budget = memory.budget();
    tracing::info!(
        limit = budget.limit().bytes,
        source = ?budget.limit().source,
        room = budget.room(),
        mounted = memory.readings().mounted,
        "memory for mounted content, in bytes"
    );
    let limits = Limits {
        max_calls: config.provider_max_calls,
        max_bytes: usize::try_from(budget.answer_bytes()).unwrap_or(usize::MAX),
        max_message_bytes: config.max_call_recv_msg_size,
    };
    let cluster = Cluster::new(config.kubeconfig.clone(), BUILD_VERSION, &config.node_id);
    let tmpfs = Arc::new(
        Tmpfs::bounded_by(config.max_call_recv_msg_size as u64)
            .in_a_pod(std::env::var_os(IN_A_POD).is_some()),
    );
    let sync = Arc::new(SecretSync::new(
        cluster.clone(),
        records.clone(),
        Arc::clone(&tmpfs),
        metrics.clone(),
        Options {
            errors_fail_publish: config.sync_errors == SyncErrors::Fail,
            interval: config.sync_interval,
        },
    ));
    let finishing = cluster.clone();
    let volumes = Arc::new(Volumes {
        node: config.node_id.clone(),
        kubelet_root: config.kubelet_root_dir.clone(),
        records,
        cluster,
        providers: Providers::new(config.provider_dirs(), limits, metrics.clone()),
        tmpfs,
        memory: Arc::clone(&memory),
        busy: Busy::default(),
        policy: Policy {
            enabled: config.enable_secret_rotation,
            interval: config.rotation_poll_interval,
            least_interval: config.min_rotation_poll_interval,
            surface_errors: config.republish_errors == RepublishErrors::Surface,
            first_wait: config.rotation_backoff,
            longest_wait: config.rotation_backoff_max,
        },
        failing: Failing::default(),
        restless: Restless::default(),
        metrics: metrics.clone(),
        sync: Arc::clone(&sync),
        clock: Clock::start(),
        health: Health::default(),
    });
    let csi = Csi {
        driver_name: config.driver_name.clone(),
        version: BUILD_VERSION.to_owned(),
        node_id: config.node_id.clone(),
        metrics: metrics.clone(),
        volumes: Arc::clone(&volumes),
    };
    let listener = Listener::bind(&config.endpoint)
        .await
        .map_err(|error| about(error, format!("--endpoint {}", config.endpoint)))?;
    tracing::info!(endpoint = %config.endpoint, driver = config.driver_name, version = BUILD_VERSION, "listening");

    // Each of these ends at `stop`. The first that fails before ends the others with it.
    let mut tasks = JoinSet::new();
    tasks.spawn(measure(memory, metrics.clone(), stop.clone()));
    if let Some(address) = config.metrics_addr {
        let listener = listen("--metrics-addr", address).await?;
        tasks.spawn(http::serve(listener, metrics, stop.clone()));
    }
    if let Some(address) = config.healthz_addr {
        let listener = listen("--healthz-addr", address).await?;
        tasks.spawn(http::serve_health(listener, config.endpoint, stop.clone()));
    }
    if let Some(dir) = config.registration_dir {
        let registrar = Registrar {
            dir,
            driver_name: config.driver_name,
            endpoint: config.kubelet_registration_path,
        };
        let stop = stop.clone();
        tasks.spawn(async move {
            registrar.run(stop).await;
            Ok(())
        });
    }
    if config.provider_health_check {
        let (volumes, stop) = (Arc::clone(&volumes), stop.clone());
        tasks.spawn(async move {
            let providers = &volumes.providers;
            providers
                .watch_health(config.provider_health_check_interval, stop)
                .await;
            Ok(())
        });
    }
    {
        let stop = stop.clone();
        tasks.spawn(async move {
            sync.run(stop).await;
            Ok(())
        });
    }
    let stopped = stop.clone();
    tokio::spawn(async move {
        stopped.cancelled().await;
        tokio::time::sleep(FINISH_WITHIN).await;
        volumes.busy.give_up();
    });
    let serving = stop.clone();
    tasks.spawn(async move {
        let served = csi.serve(listener, serving).await;
        served.map_err(io::Error::other)
    });

    let mut outcome = Ok(());
    while let Some(ended) = tasks.join_next().await {
        let ended = ended.unwrap_or_else(|panic| Err(io::Error::other(panic)));
        if outcome.is_ok() {
            outcome = ended;
        }
        stop.cancel();
    }
    // A Secret that was deleted to be made anew is made, or put back.
    if timeout(FINISH_WITHIN, finishing.finish()).await.is_err() {
        tracing::error!(
            "the driver stops while a Secret that it deleted to change its type is not there again"
        );
    }
    outcome
}

/// Measures mounted volumes until `stop`, and notices when the limit of the driver's pod changes.
async fn measure(memory: Arc<Memory>, metrics: Metrics, stop: CancellationToken) -> io::Result<()> {
    loop {
        let measured = Arc::clone(&memory);
        let readings = tokio::task::spawn_blocking(move || {
            measured.set_limit(memory::limit(Path::new("/")));
            measured.readings()
        });
        let readings = readings.await.map_err(io::Error::other)?;
        metrics.memory(readings.mounted, readings.room, readings.limit);
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(MEASURE_EVERY) => {}
        }
    }
}

async fn listen(flag: &str, address: SocketAddr) -> io::Result<TcpListener> {
    let listener = http::listen(address).await;
    listener.map_err(|error| about(error, format!("{flag} {address}")))
}

fn about(error: io::Error, what: String) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
