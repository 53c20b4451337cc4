//! The Secrets Store CSI driver: the node agent that fetches a pod's secrets from an external
//! store, through a provider, and mounts them into the pod as files on a tmpfs.
//!
//! # Modules
//!
//! These are the modules, from top to bottom. A module uses only those below it: `e2e/tests/modules.rs`
//! checks that, the order of this list, and that the list is complete. `run` below connects the
//! modules.
//!
//! ```text
//! fuzz           for tests: feeds bytes from outside to the modules below
//! csi            the CSI services: the form of a request, the status of an error
//! registration   registers the driver with kubelet
//! status         says what is mounted on the node, for a command
//! logging        the log and its redaction
//! hardening      gives up the rights that the process does not need
//! volume         the life of a volume: what is due, the steps, their undo
//! adopted        the volumes that another driver has published beside this one
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
//! quoted         text of others in messages, with a bounded length
//! ```
//!
//! # Invariants
//!
//! - A volume is published when its record says so, its mount is there and its content is there.
//!   Nothing else means published.
//! - A failed refresh leaves the last good content alone. Each run of the driver announces a failure
//!   once.
//! - A publish never replaces or removes a live mount. A failed first publish leaves no mount,
//!   directory, record or pod status.
//! - Secrets are made only of content that is recorded, mounted and complete. Newer content replaces
//!   older content, by an order that does not depend on clocks.
//! - The driver watches nothing, and lists only a few classes, for a message. It writes to the API only
//!   when something has changed, and an event now and then for as long as trouble lasts. A look of kubelet
//!   at a volume that is not due sends no request, unless its pod was touched.
//! - Unpublish needs neither the API server nor a provider. CSI and registration start without them.
//! - Only `csi`, `registration`, `provider` and `metrics` use the protobuf types, only `cluster` uses
//!   the crate `kube`, and only `hardening`, `mount`, `files` and `socket` use `nix` for system calls.
//! - A secret is a [`secret::Secret`]. Errors never contain the content of a secret, a token or a
//!   Secret.

pub mod adopted;
pub mod cluster;
pub mod config;
pub mod csi;
pub mod error;
pub mod files;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod hardening;
pub mod hex;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod mount;
pub mod provider;
pub mod quoted;
pub mod record;
pub mod registration;
pub mod secret;
pub mod socket;
pub mod status;
pub mod sync;
pub mod turns;
pub mod volume;

use std::{future::Future, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use tokio::{net::TcpListener, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use adopted::Adoption;
use cluster::{Cluster, interval::Intervals};
use config::{BUILD_VERSION, Config, SyncErrors};
use csi::{Csi, Listener};
use memory::Memory;
use metrics::{Metrics, http};
use mount::Tmpfs;
use provider::{Limits, Providers, Trusted};
use record::{Records, Writer};
use registration::Registrar;
use sync::{Options, SecretSync};
use volume::{Parts, Volumes, target::TargetPath};

/// The time for which running calls may continue after `stop`. Calls that have not finished by then
/// are undone, before Kubernetes' usual grace period of 30 seconds ends with a SIGKILL.
const FINISH_WITHIN: Duration = Duration::from_secs(20);

/// The variable that kubelet sets in each container. In a container, kubelet sees the driver's mounts
/// only if they propagate; elsewhere the two are expected to share a mount namespace.
const IN_A_POD: &str = "KUBERNETES_SERVICE_HOST";

/// The time between two measurements of the mounted volumes for the metrics, and of the memory limit.
const MEASURE_EVERY: Duration = Duration::from_secs(10);

/// The least time between two looks for volumes that another driver has published.
const ADOPT_EVERY: Duration = Duration::from_secs(1);

/// Runs the driver until `stop`, then finishes the running calls.
///
/// # Errors
/// Names the socket, the state directory or the address that the driver cannot use, and says why.
pub async fn run(config: Config, stop: CancellationToken) -> io::Result<()> {
    warn_about_flags(&config);
    hardening::check_directories(&config)?;
    let parts = parts(&config)?;
    let (cluster, metrics) = (parts.cluster.clone(), parts.metrics.clone());
    let (memory, sync) = (Arc::clone(&parts.memory), Arc::clone(&parts.sync));
    let adoption = Adoption {
        records: parts.records.clone(),
        sync: Arc::clone(&sync),
        memory: Arc::clone(&memory),
        metrics: metrics.clone(),
    };
    let interval = config.sync_interval.max(ADOPT_EVERY);
    let volumes = Arc::new(Volumes::new(&config, parts));
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

    let mut tasks = Tasks::new(stop);
    tasks.start(|stop| measure(memory, metrics.clone(), stop));
    if let Some(address) = config.metrics_addr {
        let listener = listen("--metrics-addr", address).await?;
        tasks.start(|stop| http::serve(listener, metrics, stop));
    }
    if let Some(address) = config.healthz_addr {
        let listener = listen("--healthz-addr", address).await?;
        tasks.start(|stop| http::serve_health(listener, config.endpoint, stop));
    }
    if let Some(dir) = config.registration_dir {
        let registrar = Registrar {
            dir,
            driver_name: config.driver_name,
            endpoint: config.kubelet_registration_path,
        };
        tasks.start(async move |stop| {
            registrar.run(stop).await;
            Ok(())
        });
    }
    if config.provider_health_check {
        let (volumes, interval) = (Arc::clone(&volumes), config.provider_health_check_interval);
        tasks.start(async move |stop| {
            volumes.watch_providers(interval, stop).await;
            Ok(())
        });
    }
    tasks.start(async move |stop| {
        sync.run(stop).await;
        Ok(())
    });
    tasks.start(async move |stop| {
        adoption.run(interval, stop).await;
        Ok(())
    });
    let stopped = tasks.stop.clone();
    tokio::spawn(async move {
        stopped.cancelled().await;
        tokio::time::sleep(FINISH_WITHIN).await;
        volumes.cancel_publishes();
    });
    tasks.start(async move |stop| csi.serve(listener, stop).await.map_err(io::Error::other));
    let outcome = tasks.end().await;
    // A Secret that was deleted to change its type is created again before the driver ends.
    if timeout(FINISH_WITHIN, cluster.finish()).await.is_err() {
        tracing::error!(
            "the driver stops before it could re-create a Secret that it deleted to change its type"
        );
    }
    outcome
}

/// Opens the state directory, and makes the parts of the driver that volumes use.
fn parts(config: &Config) -> io::Result<Parts> {
    let records = open_records(config)?;
    let metrics = Metrics::new();
    let memory = find_volumes(config, &records, &metrics);
    let cluster = Cluster::new(config.kubeconfig.clone(), BUILD_VERSION, &config.node_id);
    let tmpfs = Arc::new(
        Tmpfs::bounded_by(config.max_call_recv_msg_size as u64)
            .in_a_pod(std::env::var_os(IN_A_POD).is_some()),
    );
    let sync = SecretSync::new(
        cluster.clone(),
        records.clone(),
        Arc::clone(&tmpfs),
        metrics.clone(),
        Options {
            errors_fail_publish: config.sync_errors == SyncErrors::Fail,
            intervals: Intervals::from(config),
            refreshes: config.enable_secret_rotation,
        },
    );
    let limits = Limits {
        max_calls: config.provider_max_calls,
        max_bytes: usize::try_from(memory.budget().answer_bytes()).unwrap_or(usize::MAX),
        max_message_bytes: config.max_call_recv_msg_size,
    };
    Ok(Parts {
        records,
        cluster,
        providers: Providers::new(
            config.provider_dirs(),
            Trusted {
                uids: config.provider_uids.clone(),
                own: hardening::user(),
            },
            limits,
            metrics.clone(),
        ),
        tmpfs,
        memory,
        sync: Arc::new(sync),
        metrics,
    })
}

/// The tasks of the driver. When one of them ends, the others are stopped.
struct Tasks {
    running: JoinSet<io::Result<()>>,
    stop: CancellationToken,
}

impl Tasks {
    fn new(stop: CancellationToken) -> Self {
        Self {
            running: JoinSet::new(),
            stop,
        }
    }

    fn start<F>(&mut self, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        self.running.spawn(task(self.stop.clone()));
    }

    /// Waits for the end of all tasks. Returns the first error.
    async fn end(mut self) -> io::Result<()> {
        let mut outcome = Ok(());
        while let Some(ended) = self.running.join_next().await {
            let ended = ended.unwrap_or_else(|panic| Err(io::Error::other(panic)));
            outcome = outcome.and(ended);
            self.stop.cancel();
        }
        outcome
    }
}

fn warn_about_flags(config: &Config) {
    for flag in config.without_effect() {
        tracing::warn!(flag, "this flag is accepted and has no effect");
    }
    for flag in config.below_zero() {
        tracing::warn!(flag, "this flag's value is below zero and counts as zero");
    }
    if config.node_id.is_empty() {
        tracing::warn!("--nodeid is empty; kubelet does not register a driver without a node name");
    }
}

/// Opens the records, and removes those of volumes whose pods are gone.
fn open_records(config: &Config) -> io::Result<Records> {
    let directory = &config.state_dir;
    let records = Records::open(directory).map_err(|error| {
        about(
            error,
            format!("the state directory {}", directory.display()),
        )
    })?;
    let root = config.kubelet_root_dir.clone();
    let records =
        records.checked_by(move |record| TargetPath::check_record(record, root.as_deref()));
    match records.remove_orphans() {
        Ok(0) => {}
        Ok(removed) => tracing::info!(
            removed,
            "removed records that belong to no volume: their pods are gone, or they were not valid"
        ),
        Err(error) => {
            tracing::warn!(%error, "the records of volumes whose pods are gone could not be removed")
        }
    }
    Ok(records)
}

/// Finds the volumes that are mounted already: for the memory that they take, and for the metrics.
fn find_volumes(config: &Config, records: &Records, metrics: &Metrics) -> Arc<Memory> {
    let memory = Memory::new(
        memory::limit(Path::new("/")),
        config.provider_max_bytes as u64,
    );
    let read = records.each(|record| {
        metrics.success(&record.provider, &record.volume_id, record.last_success);
        metrics.volume_fresh(&record.volume_id, record.is_fresh());
        let is_charged = record.writer == Writer::Driver;
        memory.found(&record.target_path, &record.pod.namespace, is_charged);
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
    memory
}

/// Measures mounted volumes until `stop`, and reads the memory limit again, which Kubernetes can change
/// while the pod runs.
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

/// Binds the address of a flag.
async fn listen(flag: &str, address: SocketAddr) -> io::Result<TcpListener> {
    let listener = http::listen(address).await;
    listener.map_err(|error| about(error, format!("{flag} {address}")))
}

/// Adds to an error what it is about.
fn about(error: io::Error, what: String) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
