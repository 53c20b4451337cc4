//! Looks again and again whether Secrets are as they should be.
//!
//! One request by name for each Secret and each class of this node in an interval, one after the
//! other and never in a burst. A class without `secretObjects` is among them, because it may get
//! some while its pods run. When the API server is away everything waits, longer and longer.

use std::{sync::Arc, time::Duration};

use rand::Rng as _;
use tokio::time::{sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    How, Problem, Sync, Trouble, Volume, desired,
    known::{Mounted, SecretKey, Task},
};
use crate::{
    cluster::Class,
    volume::record::{Age, Records},
};

/// At most this much of an interval is left between two requests.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// The longest wait for an API server that is away.
const LONGEST_AWAY: Duration = Duration::from_secs(20);

/// Whether the API server answered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Yes,
    No,
}

impl Sync {
    /// Keeps looking until `stop`. Begins with the volumes that were mounted before this driver
    /// ran, which the records know.
    pub async fn run(&self, records: &Records, stop: CancellationToken) {
        self.remember(records).await;
        let mut away = 0_u32;
        loop {
            let step = async {
                let Some((due, task)) = self.known.next() else {
                    self.known.sooner.notified().await;
                    return None;
                };
                tokio::select! {
                    () = sleep_until(due) => {}
                    () = self.known.sooner.notified() => return None,
                }
                Some(self.look(task).await)
            };
            let answer = tokio::select! {
                () = stop.cancelled() => return,
                answer = step => answer,
            };
            let pause = match answer {
                None => continue,
                Some(Answer::Yes) => {
                    away = 0;
                    let tasks = u32::try_from(self.known.count().max(1)).unwrap_or(u32::MAX);
                    LONGEST_PAUSE.min(self.interval / 2 / tasks)
                }
                Some(Answer::No) => {
                    away += 1;
                    let wait = Duration::from_millis(500) * 2_u32.saturating_pow(away.min(8));
                    wait.min(LONGEST_AWAY)
                        .mul_f64(rand::rng().random_range(0.5..1.0))
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }

    async fn remember(&self, records: &Records) {
        let records = records.clone();
        let found = tokio::task::spawn_blocking(move || records.all()).await;
        let found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the records of mounted volumes cannot be read; their Secrets are kept from their next change on");
                return;
            }
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        for record in found {
            let volume = Volume {
                id: record.volume_id,
                pod: record.pod,
                target: record.target_path,
                pod_status: record.pod_status,
            };
            self.known
                .remembered(volume, record.class.name, self.interval);
        }
    }

    async fn look(&self, task: Task) -> Answer {
        match task {
            Task::Class(namespace, name) => self.look_at_class(&namespace, &name).await,
            Task::Secret(key) => self.look_at_secret(&key).await,
            Task::Left(mounted, class) => self.look_after(&mounted, &class).await,
        }
    }

    async fn look_at_class(&self, namespace: &str, name: &str) -> Answer {
        let known = self.known.class(namespace, name);
        let unsure = |class: &Class| {
            let known = known.as_ref();
            known.is_some_and(|known| class.identity.age(&known.identity) == Age::Unsure)
        };
        let read = match self.cluster.remembered_class(namespace, name).await {
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
                return match error.code() {
                    Code::Unavailable => Answer::No,
                    _ => Answer::Yes,
                };
            }
        };
        let released = self
            .known
            .class_read(namespace, name, class.clone(), self.interval);
        if let Some(class) = class {
            self.release(namespace, &class, &released).await;
        }
        Answer::Yes
    }

    async fn look_at_secret(&self, key: &SecretKey) -> Answer {
        let Some(class) = self.known.class(&key.namespace, &key.class) else {
            self.known
                .looked_at(&key.namespace, &key.class, &key.name, false, self.interval);
            return Answer::Yes;
        };
        let entry = class
            .secret_objects
            .iter()
            .find(|object| object.secret_name.trim() == key.name);
        let Some(object) = entry else {
            return Answer::Yes;
        };
        let kept = self.keep(&key.namespace, &class, object, How::Look).await;
        let volumes = self.known.volumes_of(&key.namespace, &key.class);
        let volumes: Vec<Volume> = volumes.into_iter().map(|mounted| mounted.volume).collect();
        self.report(&class, &key.name, &volumes, kept.as_ref().map(|kept| *kept));
        match kept {
            Err(Problem {
                trouble: Trouble::Unavailable,
                ..
            }) => Answer::No,
            _ => Answer::Yes,
        }
    }

    /// A pod that has ended but is still there must not hold a Secret that others live with.
    async fn look_after(&self, left: &Mounted, class: &Arc<Class>) -> Answer {
        let volume = &left.volume;
        self.known.has_left(&volume.id);
        let holder = match self.cluster.holder(&volume.pod, &volume.pod_status).await {
            Ok(Some(holder)) if holder.owners_end => holder,
            Ok(_) => return Answer::Yes,
            Err(error) => {
                tracing::debug!(pod = %volume.pod, %error, "its Secrets keep their owner until it goes");
                return Answer::No;
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
        Answer::Yes
    }
}
