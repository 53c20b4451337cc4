//! Looks again and again whether Secrets are as they should be.
//!
//! One request by name for each Secret and each class of this node in an interval, never in a
//! burst. A class without `secretObjects` is among them, because it may get some while its pods
//! run. A few looks run at once, of a namespace one, and namespaces whose last look failed or was
//! slow share a part of them: whoever's webhook, finalizer or quota is in the way, the Secrets of
//! others do not wait for it. Only when the API server is away everything waits, longer and longer.

use std::{collections::HashMap, sync::Arc, time::Duration};

use rand::Rng as _;
use tokio::{
    task::{Id, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    How, Sync, Volume, desired,
    known::{Mounted, SecretKey, Task},
    made::Ahead,
};
use crate::{
    cluster::{Class, pod_status},
    record::Age,
};

/// How many looks run at once, and how many of them in namespaces that are in trouble.
const LOOKS: usize = 8;
const TROUBLED_LOOKS: usize = 4;
/// How long a namespace counts as in trouble after a look that failed or was slow: longer than
/// the interval in which the next one fails.
const TROUBLE_LASTS: Duration = Duration::from_secs(300);
/// A look that takes longer is slow.
const SLOW: Duration = Duration::from_secs(1);
/// How long a look goes on with other Secrets of the class whose content is at hand.
const LONGEST_RUN: Duration = Duration::from_secs(5);
/// At most this much of an interval is left between the beginnings of two looks.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// The longest wait for an API server that is away.
const LONGEST_AWAY: Duration = Duration::from_secs(20);

/// The looks that run, and which namespaces are in trouble.
#[derive(Default)]
struct Looks {
    running: JoinSet<Ended>,
    namespaces: HashMap<Id, String>,
    /// When a look failed or was slow, by namespace. One that succeeds beside it ends no trouble.
    troubled: HashMap<String, Instant>,
}

/// Whether a look found everything in order, and at once.
struct Ended {
    in_order: bool,
}

impl Looks {
    /// Returns whether a look may begin in this namespace.
    fn may_begin(&self, namespace: &str) -> bool {
        let is_troubled = |namespace: &str| self.troubled.contains_key(namespace);
        let troubled = self.namespaces.values().filter(|ns| is_troubled(ns));
        self.namespaces.len() < LOOKS
            && self.namespaces.values().all(|running| running != namespace)
            && (!is_troubled(namespace) || troubled.count() < TROUBLED_LOOKS)
    }

    fn begin(&mut self, sync: &Arc<Sync>, task: Task) {
        let namespace = task.namespace().to_owned();
        let sync = Arc::clone(sync);
        let look = self.running.spawn(async move {
            let started = Instant::now();
            let in_order = sync.look(task).await;
            Ended {
                in_order: in_order && started.elapsed() < SLOW,
            }
        });
        self.namespaces.insert(look.id(), namespace);
    }

    /// Waits until a look ends; for ever when none runs.
    async fn ended(&mut self) {
        let Some(ended) = self.running.join_next_with_id().await else {
            return std::future::pending().await;
        };
        let (id, ended) = match ended {
            Ok(ended) => ended,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // Nobody cancels one.
                Err(_) => return,
            },
        };
        let now = Instant::now();
        self.troubled
            .retain(|_, since| now.duration_since(*since) < TROUBLE_LASTS);
        if let Some(namespace) = self.namespaces.remove(&id)
            && !ended.in_order
        {
            self.troubled.insert(namespace, now);
        }
    }
}

impl Sync {
    /// Keeps looking until `stop`. Begins with the volumes that were mounted before this driver
    /// ran, which the records know.
    pub async fn run(self: &Arc<Self>, stop: CancellationToken) {
        self.remember().await;
        let mut looks = Looks::default();
        let mut away = 0_u32;
        let mut not_before = Instant::now();
        loop {
            let next = self.known.next(|namespace| looks.may_begin(namespace));
            let begins = async {
                match next {
                    Some((due, task)) => {
                        sleep_until(due.max(not_before)).await;
                        task
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.known.sooner.notified() => {}
                () = looks.ended() => match self.cluster.is_away() {
                    false => away = 0,
                    // One of several that ran when it went is enough.
                    true if not_before > Instant::now() + LONGEST_PAUSE => {}
                    true => {
                        away += 1;
                        not_before = Instant::now() + wait_for_api_server(away);
                    }
                },
                task = begins => {
                    looks.begin(self, task);
                    let tasks = u32::try_from(self.known.count().max(1)).unwrap_or(u32::MAX);
                    let pause = LONGEST_PAUSE.min(self.interval / 2 / tasks);
                    not_before = Instant::now() + pause;
                }
            }
        }
    }

    async fn remember(&self) {
        let records = self.records.clone();
        // Without the objects, of which there may be many.
        let found = tokio::task::spawn_blocking(move || {
            let mut found = Vec::new();
            records.each(|record| found.push((Volume::of(&record), record.class)))?;
            Ok::<_, std::io::Error>(found)
        })
        .await;
        let found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the records of mounted volumes cannot be read; the driver checks their Secrets only after the next change of each volume");
                return;
            }
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        for (volume, class) in found {
            self.known.remembered(volume, class, self.interval);
        }
    }

    /// Looks at one thing. Returns whether it is in order.
    async fn look(&self, task: Task) -> bool {
        match task {
            Task::PodStatus(volume) => self.look_at_pod_status(&volume).await,
            Task::Class(namespace, name) => self.look_at_class(&namespace, &name).await,
            Task::Secret(key) => self.look_at_secret(&key).await,
            Task::Left(mounted, class) => self.look_after(&mounted, &class).await,
        }
    }

    async fn look_at_class(&self, namespace: &str, name: &str) -> bool {
        let known = self.known.newest_state(namespace, name);
        // What the API server remembers may be behind what was mounted.
        let unsure = |class: &Class| {
            let known = known.as_ref();
            known.is_some_and(|known| {
                matches!(class.identity.age(known), Age::Unsure | Age::OlderContent)
            })
        };
        let read = match self.cluster.cached_class(namespace, name).await {
            Ok(class) if unsure(&class) => self.cluster.class(namespace, name).await,
            read => read,
        };
        let class = match read {
            Ok(class) => Some(class),
            // Its Secrets stay as they are while there is none.
            Err(error) if error.code() == Code::NotFound => None,
            Err(error) => {
                tracing::debug!(namespace, class = name, %error, "the class could not be read");
                self.known.class_not_read(namespace, name, self.interval);
                return false;
            }
        };
        let released = self
            .known
            .class_read(namespace, name, class.as_ref(), self.interval);
        let Some(class) = class else {
            return true;
        };
        let volumes = self.known.volumes_of(namespace, name);
        let volumes: Vec<Volume> = volumes.into_iter().map(|mounted| mounted.volume).collect();
        let within_bounds = self.within_bounds(&class, &volumes);
        self.release(namespace, &class, &released).await;
        within_bounds.is_ok()
    }

    /// Makes sure of the pod status of a volume. What it should say, the record knows.
    async fn look_at_pod_status(&self, volume: &Volume) -> bool {
        let (records, id) = (self.records.clone(), volume.id.clone());
        let record = match tokio::task::spawn_blocking(move || records.get(&id)).await {
            Ok(record) => record,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let kept = match &record {
            Some(record) => {
                let mounted = pod_status::DesiredPodStatus {
                    pod: &record.pod,
                    class: &record.class.name,
                    target_path: &record.target_path.to_string_lossy(),
                    node: self.cluster.node(),
                    objects: &record.objects,
                    changed: None,
                };
                self.cluster
                    .keep_pod_status(&mounted, &record.pod_status)
                    .await
            }
            // Another driver, which served here for a while, has taken it down.
            None if volume.target.parent().is_some_and(|pod| !pod.exists()) => {
                self.forget(&volume.id);
                self.metrics.volume_gone(&volume.id);
                return true;
            }
            // Being published, or taken down.
            None => Ok(false),
        };
        self.known
            .status_looked_at(&volume.id, kept.is_err(), self.interval);
        match kept {
            Ok(false) => {}
            Ok(true) => self.pod_status_is_new(&volume.pod, &volume.id),
            Err(ref error) => tracing::debug!(%error, "trying again"),
        }
        kept.is_ok()
    }

    async fn look_at_secret(&self, key: &SecretKey) -> bool {
        let Some(class) = self.known.class(&key.namespace, &key.class) else {
            self.known
                .looked_at(&key.namespace, &key.class, &key.name, false, self.interval);
            return true;
        };
        let mut ahead = Ahead::default();
        let started = Instant::now();
        let mut in_order = self.look_at_one(key, &class, &mut ahead).await;
        // What had to be made ahead for it is used while it is here.
        for name in ahead.names() {
            let other = SecretKey {
                name,
                ..key.clone()
            };
            let is_same = self.known.class(&key.namespace, &key.class);
            let is_same = is_same.is_some_and(|now| Arc::ptr_eq(&now, &class));
            if !is_same || started.elapsed() > LONGEST_RUN {
                break;
            }
            if self.known.is_due_within(&other, self.interval / 2) {
                in_order &= self.look_at_one(&other, &class, &mut ahead).await;
            }
        }
        in_order
    }

    async fn look_at_one(&self, key: &SecretKey, class: &Arc<Class>, ahead: &mut Ahead) -> bool {
        let entry = class
            .secret_objects
            .iter()
            .find(|object| object.secret_name == key.name);
        let Some(object) = entry else {
            return true;
        };
        let kept = self
            .keep(&key.namespace, class, object, How::Look, None, ahead)
            .await;
        let volumes = self.known.volumes_of(&key.namespace, &key.class);
        let volumes: Vec<Volume> = volumes.into_iter().map(|mounted| mounted.volume).collect();
        self.report(class, &key.name, &volumes, kept.as_ref().map(|kept| *kept));
        kept.is_ok()
    }

    /// A pod that has ended but is still there must not hold a Secret that others live with.
    async fn look_after(&self, left: &Mounted, class: &Arc<Class>) -> bool {
        let volume = &left.volume;
        self.known.has_left(&volume.id);
        let holder = match self
            .cluster
            .pod_owners(&volume.pod, &volume.pod_status)
            .await
        {
            Ok(Some(holder)) if holder.owners_ended => holder,
            Ok(_) => return true,
            Err(error) => {
                tracing::debug!(pod = %volume.pod, %error, "the owners of the pod could not be read; if the pod has ended, its Secrets keep their owner until it is deleted");
                return false;
            }
        };
        let namespace = &volume.pod.namespace;
        let others = self.known.volumes_of(namespace, &left.class);
        let still_needed = |uid: &str| {
            let holders = others.iter().filter_map(|other| other.holder.as_ref());
            holders
                .flat_map(|holder| &holder.owners)
                .any(|owner| owner.uid == uid)
        };
        for object in &class.secret_objects {
            let Ok(name) = desired::name(class, object) else {
                continue;
            };
            for owner in holder
                .owners
                .iter()
                .filter(|owner| !still_needed(&owner.uid))
            {
                let _turn = self.known.turn(namespace, name).await;
                let disowned = self
                    .cluster
                    .disown_secret(namespace, name, &owner.uid)
                    .await;
                if let Err(refusal) = disowned {
                    tracing::debug!(
                        namespace,
                        secret = name,
                        ?refusal,
                        "keeps an owner that has ended"
                    );
                }
            }
        }
        true
    }
}

/// How long nothing is looked at, when the API server has been away for so many looks.
fn wait_for_api_server(looks: u32) -> Duration {
    let wait = Duration::from_millis(500) * 2_u32.saturating_pow(looks.min(8));
    wait.min(LONGEST_AWAY)
        .mul_f64(rand::rng().random_range(0.5..1.0))
}
