//! The nodes: their drivers, their volumes, and what is measured of them.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinSet;

use super::kubelet::{self, Socket};
use super::record::{Phase, Record};
use super::sampler::Sampler;
use super::{FILE, Options, class_name, seconds};
use crate::bench::{ControlPlane, Node, Process, Provider, Settings, Stopped, Volume, failed};
use crate::binaries::Binaries;
use crate::cluster::{Result, poll, wait_until};

/// The time between two samples. The metrics of a real API server are large.
const SAMPLE: Duration = Duration::from_secs(1);
const SAMPLE_OF_REAL: Duration = Duration::from_secs(5);
/// The number of drivers that are started, and nodes that get their pods, at the same time.
const AT_ONCE: usize = 50;
/// The driver's default of --min-rotation-poll-interval.
const LEAST_INTERVAL: Duration = Duration::from_secs(30);
/// The time for which a driver is away when its pod is replaced.
const REPLACEMENT: Duration = Duration::from_secs(2);
/// The time in which all volumes have to be published.
const PATIENCE: Duration = Duration::from_secs(600);

/// A node and its pods.
struct Member {
    settings: Settings,
    volumes: Vec<Arc<Volume>>,
    socket: Socket,
    node: Option<Node>,
}

/// All nodes, the API server and the provider.
pub(super) struct Fleet {
    members: Vec<Member>,
    plane: Arc<ControlPlane>,
    provider: Arc<Mutex<Provider>>,
    look: Duration,
    record: Arc<Record>,
    kubelets: JoinSet<()>,
    sampler: Arc<Sampler>,
    sampling: JoinSet<()>,
    phase: Option<(&'static str, Instant)>,
    /// The last start of all nodes.
    started: Instant,
}

impl Fleet {
    /// Creates nodes and pods; no driver runs yet.
    pub(super) async fn prepare(
        options: &Options,
        binaries: &Binaries,
        plane: ControlPlane,
        directory: &Path,
    ) -> Result<Self> {
        let providers = directory.join("providers");
        let provider = Provider::start(&binaries.fake_provider, &providers).await?;
        let least = options.interval.min(LEAST_INTERVAL);
        let flags = [
            "--enable-secret-rotation=true".to_owned(),
            format!(
                "--rotation-poll-interval={}ms",
                options.interval.as_millis()
            ),
            format!("--min-rotation-poll-interval={}ms", least.as_millis()),
        ];
        let members = stream::iter(0..options.nodes).map(|number| {
            let name = format!("n{number}");
            let settings = Settings {
                e2e: binaries.e2e.clone(),
                driver: binaries.driver.clone(),
                directory: directory.join(&name),
                name,
                kubeconfig: plane.kubeconfig().to_owned(),
                providers: providers.clone(),
                flags: flags.to_vec(),
            };
            member(settings, &plane, options)
        });
        let members = members.buffered(4).try_collect().await?;
        let plane = Arc::new(plane);
        let provider = Arc::new(Mutex::new(provider));
        let record = Arc::<Record>::default();
        let sampler = Sampler::new(
            Arc::clone(&plane),
            Arc::clone(&provider),
            Arc::clone(&record),
        );
        let (sampler, mut sampling) = (Arc::new(sampler), JoinSet::new());
        let every = if options.real { SAMPLE_OF_REAL } else { SAMPLE };
        sampling.spawn(Arc::clone(&sampler).run(every));
        Ok(Self {
            members,
            plane,
            provider,
            look: options.look,
            record,
            kubelets: JoinSet::new(),
            sampler,
            sampling,
            phase: None,
            started: Instant::now(),
        })
    }

    pub(super) fn plane(&self) -> &ControlPlane {
        &self.plane
    }

    pub(super) async fn provider(&self) -> MutexGuard<'_, Provider> {
        self.provider.lock().await
    }

    /// Ends the phase, if there is one, and begins the next.
    ///
    /// # Errors
    /// When a driver has ended.
    pub(super) async fn begin(&mut self, name: &'static str) -> Result<()> {
        self.end_phase().await?;
        eprintln!("{name}");
        self.phase = Some((name, Instant::now()));
        Ok(())
    }

    async fn end_phase(&mut self) -> Result<()> {
        // Each sample is of one phase.
        self.sampler.take().await;
        let running: Vec<Process> = self.running()?;
        if let Some((name, begin)) = self.phase.take() {
            let (mut sum, mut peak, mut count) = (0.0, 0.0_f64, 0.0);
            for process in &running {
                sum += process.rss()?;
                peak = peak.max(process.peak()?);
                count += 1.0;
            }
            self.record.phase(Phase {
                name,
                begin,
                end: Instant::now(),
                memory: sum / count,
                peak,
            });
        }
        running.iter().try_for_each(|process| process.forget_peak())
    }

    fn running(&self) -> Result<Vec<Process>> {
        let nodes = self
            .members
            .iter()
            .filter_map(|member| member.node.as_ref());
        nodes.map(Node::process).collect()
    }

    /// Starts the drivers of all nodes at once. kubelet publishes all volumes of a node when its driver is
    /// there.
    ///
    /// # Errors
    /// When a driver does not start.
    pub(super) async fn start(&mut self) -> Result<()> {
        self.started = Instant::now();
        let (look, record, kubelets) = (self.look, &self.record, &mut self.kubelets);
        for member in &self.members {
            for volume in &member.volumes {
                let (socket, volume) = (member.socket.clone(), Arc::clone(volume));
                kubelets.spawn(kubelet::run(socket, volume, look, Arc::clone(record)));
            }
        }
        let starting = self.members.iter_mut().map(|member| async {
            let node = Node::start(member.settings.clone()).await?;
            member.socket.set(Some(node.client()));
            member.node = Some(node);
            Ok(())
        });
        let started: Result<()> = stream::iter(starting)
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await;
        started?;
        self.tell_sampler()
    }

    fn tell_sampler(&self) -> Result<()> {
        self.sampler.set_processes(self.running()?);
        Ok(())
    }

    /// Waits until each volume has been published since the last start of all nodes.
    ///
    /// # Errors
    /// When that takes too long.
    pub(super) async fn all_published(&self) -> Result<()> {
        let volumes: usize = self.members.iter().map(|member| member.volumes.len()).sum();
        wait_until("all volumes to be published", PATIENCE, async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            self.record.first_publishes(self.started) >= volumes
        })
        .await
    }

    /// Replaces the drivers of all nodes, so many at a time. Mounts stay.
    ///
    /// # Errors
    /// When a driver does not stop or start.
    pub(super) async fn roll(&mut self, at_once: usize) -> Result<()> {
        let rolling = self.members.iter_mut().map(|member| async {
            member.socket.set(None);
            let Some(node) = member.node.take() else {
                return Err(failed(&member.settings.name, &"has no driver"));
            };
            let stopped: Stopped = node.stop().await?;
            tokio::time::sleep(REPLACEMENT).await;
            let node = stopped.start().await?;
            member.socket.set(Some(node.client()));
            member.node = Some(node);
            Ok(())
        });
        let rolled: Result<()> = stream::iter(rolling)
            .buffer_unordered(at_once)
            .try_collect()
            .await;
        rolled?;
        self.tell_sampler()
    }

    /// Takes the power from all nodes: drivers and mounts are gone, the disks are not.
    ///
    /// # Errors
    /// When a driver cannot be killed.
    pub(super) async fn cut_power(&mut self) -> Result<()> {
        self.kubelets.shutdown().await;
        for member in &mut self.members {
            member.socket.set(None);
            if let Some(node) = member.node.take() {
                node.cut_power().await?;
            }
        }
        Ok(())
    }

    /// Waits until each volume has this content; notes how long it took.
    ///
    /// # Errors
    /// When that takes too long.
    pub(super) async fn wait_content(&self, content: &str, what: &str) -> Result<()> {
        let started = Instant::now();
        poll(
            "all volumes to have the newest content",
            PATIENCE,
            async || {
                tokio::time::sleep(Duration::from_millis(200)).await;
                Ok(match self.stale(content) {
                    0 => ControlFlow::Break(()),
                    stale => ControlFlow::Continue(format!("{stale} have not")),
                })
            },
        )
        .await?;
        let took = seconds(started);
        self.record
            .note(format!("{what}: all volumes have it after {took:.0} s"));
        Ok(())
    }

    /// Checks that each volume has this content.
    ///
    /// # Errors
    /// Names the number of those that have not.
    pub(super) fn check(&self, content: &str) -> Result<()> {
        match self.stale(content) {
            0 => Ok(()),
            stale => Err(failed(
                "content",
                &format!("{stale} volumes have not the newest"),
            )),
        }
    }

    fn stale(&self, content: &str) -> usize {
        let volumes = self.members.iter().flat_map(|member| {
            let volumes = member.volumes.iter();
            volumes.map(|volume| (member.node.as_ref(), volume))
        });
        let is_stale = |(node, volume): &(Option<&Node>, &Arc<Volume>)| {
            let read = node.map(|node| node.read(volume, FILE));
            !matches!(read, Some(Ok(text)) if text == content)
        };
        volumes.filter(is_stale).count()
    }

    /// Ends the last phase and all processes; returns the record.
    ///
    /// # Errors
    /// When something could not be measured.
    pub(super) async fn end(mut self) -> Result<Arc<Record>> {
        self.end_phase().await?;
        self.sampling.shutdown().await;
        self.cut_power().await?;
        Ok(self.record)
    }
}

async fn member(settings: Settings, plane: &ControlPlane, options: &Options) -> Result<Member> {
    plane.create_node(&settings.name).await?;
    let mut volumes = Vec::new();
    for number in 0..options.classes {
        let more = usize::from(number < options.volumes % options.classes);
        let count = options.volumes / options.classes + more;
        let (class, run) = (class_name(number), format!("{}-{number}", settings.name));
        let made = Node::volumes(&settings, plane.namespace(), (&class, &run), count).await?;
        volumes.extend(made.into_iter().map(Arc::new));
    }
    Ok(Member {
        settings,
        volumes,
        socket: Socket::default(),
        node: None,
    })
}
