//! Keeps Kubernetes Secrets that mirror what is mounted.
//!
//! A class's `secretObjects` become Secrets before the publish that mounts them returns, so that
//! a container may take its environment from them at its first start. After that they are kept
//! so: `Sync::volume_mounted` is told of every content that changed, and [`Sync::run`] looks at
//! each Secret and each class about every `--sync-interval`, one request by name for each, and
//! writes nothing while all is as it should be.
//!
//! A Secret is made from the newest content of its class's volumes on this node; what other nodes
//! hold, the Secret itself says (see [`crate::cluster::secrets`], which also says what newest
//! means). Where the Secret has gone, what it said last decides for a while (the module `newer`).
//! Content always comes from the volume, so that a driver that starts anew knows as much
//! as one that has run for long; what counts as content, the module `content` says.

mod content;
pub mod desired;
mod heal;
mod known;
mod made;
mod newer;
mod parsing;
mod tls;

use std::{fmt, path::PathBuf, slice, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout};
use tonic::Code;

use crate::{
    cluster::{
        Class, Cluster,
        events::Severity,
        resources::SecretObject,
        secrets::{ADOPT, Data, Kept, Owner, PodOwners, Refusal, Wanted},
    },
    error::{Error, Result},
    metrics::Metrics,
    mount::Tmpfs,
    record::{Pod, Record, Records},
};
use content::Stamp;
use known::{Known, Mounted, SecretKey};
use made::Ahead;
use parsing::{Parsing, Refusals};

/// How long a publish waits for its Secrets. What is not done by then is done by the loop.
const WITHIN: Duration = Duration::from_secs(20);

/// How often a volume is read whose content is replaced meanwhile.
const ATTEMPTS: usize = 3;

/// The objects that one Secret is made of are read as long as they have no more bytes together.
/// More than a Secret holds, because a part of an object can be picked.
const MOST_READ: u64 = 8 * 1024 * 1024;

/// In place of a Secret's name: what concerns all Secrets of a class.
const WHOLE_CLASS: &str = "";

/// The reason of an event about a Secret that is not as it should be, as in the existing driver.
const FAILED: &str = "FailedToCreateSecret";

/// A mounted volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// kubelet's volume handle.
    pub id: String,
    /// Whose it is.
    pub pod: Pod,
    /// Where it is mounted.
    pub target: PathBuf,
    /// The name of its SecretProviderClassPodStatus.
    pub pod_status: String,
}

impl Volume {
    /// The volume that a record is about.
    pub fn of(record: &Record) -> Self {
        Self {
            id: record.volume_id.clone(),
            pod: record.pod.clone(),
            target: record.target_path.clone(),
            pod_status: record.pod_status.clone(),
        }
    }
}

/// Why a Secret is not as it should be: the `error_type` of `sync_k8s_secret_error_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The class says something that cannot be.
    InvalidClass,
    /// There is no such object in the volume.
    ObjectNotFound,
    /// An object is not what the class says it is.
    InvalidValue,
    /// No certificate or key can be made of an object.
    InvalidCertificate,
    /// The type needs a key that is not there.
    MissingKey,
    /// More than a Secret holds.
    TooLarge,
    /// A Secret of that name belongs to somebody else.
    Unmanaged,
    /// Two classes make different Secrets of one name.
    Conflict,
    /// The driver may not write Secrets.
    Forbidden,
    /// The API server does not take the Secret.
    Refused,
    /// It was deleted because its type was to change, and the API server does not take the new one.
    Missing,
    /// It did not work, and may later.
    Unavailable,
}

impl Trouble {
    /// The label's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::InvalidClass => "InvalidClass",
            Self::ObjectNotFound => "ObjectNotFound",
            Self::InvalidValue => "InvalidValue",
            Self::InvalidCertificate => "InvalidCertificate",
            Self::MissingKey => "MissingKey",
            Self::TooLarge => "TooLarge",
            Self::Unmanaged => "Unmanaged",
            Self::Conflict => "Conflict",
            Self::Forbidden => "Forbidden",
            Self::Refused => "Refused",
            Self::Missing => "Missing",
            Self::Unavailable => "Unavailable",
        }
    }
}

/// Why a Secret is not as it should be, in a sentence for whoever runs the pod.
#[derive(Debug, Clone)]
pub struct Problem {
    trouble: Trouble,
    sentence: String,
}

impl Problem {
    /// A problem. The sentence names the class, the Secret and the key.
    pub fn new(trouble: Trouble, sentence: String) -> Self {
        Self { trouble, sentence }
    }

    /// What makes a problem the same as before. How an API server does not answer varies.
    fn identity(&self) -> &str {
        match self.trouble {
            Trouble::Unavailable | Trouble::Missing => self.trouble.label(),
            _ => &self.sentence,
        }
    }

    fn into_error(self) -> Error {
        let code = match self.trouble {
            Trouble::Unavailable | Trouble::Missing => Code::Unavailable,
            _ => Code::FailedPrecondition,
        };
        Error::new(code, self.sentence)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

/// Keeps the Secrets of the volumes of this node.
pub struct Sync {
    cluster: Cluster,
    records: Records,
    tmpfs: Arc<Tmpfs>,
    metrics: Metrics,
    /// Whether a Secret that cannot be kept fails the publish.
    fail: bool,
    interval: Duration,
    known: Arc<Known>,
    parsing: Parsing,
    refusals: Arc<Refusals>,
}

/// How sure one is that there is something to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// Something changed.
    Now,
    /// Perhaps somebody changed something.
    Look,
}

impl Sync {
    /// Looks at each Secret about every `interval`. With `fail`, a Secret that cannot be kept
    /// fails the publish. `tmpfs` knows what is a volume.
    pub fn new(
        cluster: Cluster,
        records: Records,
        tmpfs: Arc<Tmpfs>,
        metrics: Metrics,
        fail: bool,
        interval: Duration,
    ) -> Self {
        Self {
            cluster,
            records,
            tmpfs,
            metrics,
            fail,
            interval,
            known: Arc::default(),
            parsing: Parsing::default(),
            refusals: Arc::default(),
        }
    }

    /// Makes the Secrets of a volume that has been mounted, or whose content or class changed.
    /// Asks nobody anything for a class without `secretObjects`. The record is the volume's, which
    /// a publish writes only after this.
    ///
    /// # Errors
    /// Only if they are to fail the publish: the first of the Secrets that could not be kept.
    pub async fn volume_mounted(&self, record: &Record, class: &Class) -> Result<()> {
        let volume = &Volume::of(record);
        let released = self.known.mounted(volume, class, self.interval);
        // The newest state that is known, where this volume was mounted with an older one.
        let known = self
            .known
            .class(&volume.pod.namespace, &class.identity.name);
        let class = known.as_deref().unwrap_or(class);
        if let Err(problem) = self.within_bounds(class, slice::from_ref(volume)) {
            return self.outcome(volume, Err(problem));
        }
        if class.secret_objects.is_empty() && released.is_empty() {
            return Ok(());
        }
        let outcome = match timeout(WITHIN, self.sync(record, volume, class, &released)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let problem = Problem::new(
                    Trouble::Unavailable,
                    format!(
                        "SecretProviderClass {}: its {} Secrets were not all written within {} seconds; the driver writes the rest in the background. Does the class make too many Secrets of large objects, or is the API server slow?",
                        class.identity.name,
                        class.secret_objects.len(),
                        WITHIN.as_secs()
                    ),
                );
                for object in &class.secret_objects {
                    let (namespace, class) = (&volume.pod.namespace, &class.identity.name);
                    let name = &object.secret_name;
                    self.known
                        .looked_at(namespace, class, name, true, self.interval);
                }
                // Once for all of them, however many there are.
                self.report(class, WHOLE_CLASS, slice::from_ref(volume), Err(&problem));
                Err(problem)
            }
        };
        self.outcome(volume, outcome)
    }

    /// What a publish says of its Secrets.
    fn outcome(&self, volume: &Volume, outcome: Result<(), Problem>) -> Result<()> {
        match outcome {
            Err(problem) if self.fail => Err(problem.into_error().context(format_args!(
                "failed to keep the Secrets of pod {}",
                volume.pod
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses a class that asks for more than is made of one, and tells these pods so, once.
    fn within_bounds(&self, class: &Class, volumes: &[Volume]) -> Result<(), Problem> {
        let Some(why) = &class.too_much else {
            for volume in volumes {
                // Its Secrets say themselves how they are.
                self.known.tell(&volume.id, WHOLE_CLASS, None, |_| true);
            }
            return Ok(());
        };
        let problem = Problem::new(
            Trouble::InvalidClass,
            format!("SecretProviderClass {}: {why}", class.identity.name),
        );
        self.report(class, WHOLE_CLASS, volumes, Err(&problem));
        Err(problem)
    }

    /// A volume is being taken down: it feeds no Secret any more. Asks nobody anything.
    pub fn forget(&self, volume_id: &str) {
        self.known.forget(volume_id);
    }

    /// Whether a Secret of a class was last seen with other content, of a higher order, than the
    /// newest volume on this node. Says so once: whoever hears it gives the content that the
    /// provider confirmed a new order. Asks nobody anything.
    pub fn was_overtaken(&self, namespace: &str, class: &str) -> bool {
        self.known.take_overtaken(namespace, class)
    }

    /// The pod status of a volume was written again: Secrets that lived with the one before live with
    /// it from now on. Asks nobody anything.
    pub fn pod_status_is_new(&self, pod: &Pod, volume_id: &str) {
        tracing::info!(pod = %pod, "the pod status of this volume was missing or emptied, and is written again");
        self.known.status_is_new(volume_id);
    }

    async fn sync(
        &self,
        record: &Record,
        volume: &Volume,
        class: &Class,
        released: &[String],
    ) -> Result<(), Problem> {
        self.release(&volume.pod.namespace, class, released).await;
        let holder = match self
            .cluster
            .pod_owners(&volume.pod, &volume.pod_status)
            .await
        {
            Ok(Some(holder)) if holder.pod_ended => return Ok(()),
            Ok(Some(holder)) => Ok(holder),
            Ok(None) => Err(unavailable(class, &"the pod is gone")),
            Err(error) => Err(unavailable(class, &error)),
        };
        let mut first = Ok(());
        let class = Arc::new(class.without_parameters());
        if let Ok(holder) = &holder {
            self.known.set_holder(&volume.id, holder.clone());
        }
        let mut ahead = Ahead::default();
        for object in &class.secret_objects {
            let kept = match &holder {
                Ok(_) => {
                    let namespace = &volume.pod.namespace;
                    self.keep(
                        namespace,
                        &class,
                        object,
                        How::Now,
                        Some(record),
                        &mut ahead,
                    )
                    .await
                }
                Err(problem) => Err(problem.clone()),
            };
            let name = &object.secret_name;
            self.report(
                &class,
                name,
                slice::from_ref(volume),
                kept.as_ref().map(|kept| *kept),
            );
            if let Err(problem) = kept {
                first = first.and(Err(problem));
            }
        }
        first
    }

    /// Lets go of Secrets that a class no longer makes.
    async fn release(&self, namespace: &str, class: &Class, names: &[String]) {
        for name in names {
            let released = self
                .cluster
                .release_secret(namespace, name, &class.identity)
                .await;
            if let Err(refusal) = released {
                // Whoever makes it next finds that this class does not.
                tracing::debug!(namespace, secret = name, ?refusal, "could not be released");
            }
        }
    }

    /// Keeps one Secret as the newest volume of its class on this node says. None when none of
    /// them says anything. `pending` is the record of a publish that is at its last step.
    async fn keep(
        &self,
        namespace: &str,
        class: &Arc<Class>,
        object: &SecretObject,
        how: How,
        pending: Option<&Record>,
        ahead: &mut Ahead,
    ) -> Result<Option<Kept>, Problem> {
        let name = desired::name(class, object)?;
        let same = |other: &&SecretObject| other.secret_name == name;
        if class.secret_objects.iter().filter(same).count() > 1 {
            return Err(Problem::new(
                Trouble::InvalidClass,
                format!(
                    "SecretProviderClass {}, Secret {name}: two entries of secretObjects have this secretName; put their data into one",
                    class.identity.name
                ),
            ));
        }
        let key = &SecretKey {
            namespace: namespace.to_owned(),
            class: class.identity.name.clone(),
            name: name.to_owned(),
        };
        let _turn = self.known.turn(namespace, name).await;
        let mut volumes = self.known.volumes_of(namespace, &class.identity.name);
        if how == How::Look {
            // Nobody has made sure yet that the Secret lives with those.
            let (mut known, unknown): (Vec<_>, Vec<_>) =
                volumes.into_iter().partition(|v| v.holder.is_some());
            known.extend(self.live(class, unknown).await?);
            volumes = known;
        }
        if how == How::Look {
            let looked = self.looked(key, class, object, &volumes, ahead).await?;
            if let Some(kept) = looked {
                self.known.secret_was(key, kept);
                return Ok(Some(kept));
            }
            // Something is to be written: only for pods that live.
            volumes = self.live(class, volumes).await?;
        }
        let made = self.made(class, object, &volumes, pending, ahead).await?;
        let Some((desired, stamp)) = made else {
            return Ok(None);
        };
        let owners = owners(&volumes);
        if owners.is_empty() {
            return Err(unavailable(class, &"the pods' owners are not known yet"));
        }
        let left = self
            .known
            .is_left_to_others(key, stamp.order, self.interval);
        let data = Data::Values(&desired.data);
        let wanted = Wanted {
            create: !left,
            ..wanted(namespace, class, object, data, stamp, &owners)
        };
        let started = Instant::now();
        let kept = self.cluster.keep_secret(&wanted).await;
        let kept = kept.map_err(|refusal| problem(&wanted, refusal))?;
        self.known.secret_was(key, kept);
        if kept == Kept::Absent {
            tracing::debug!(
                namespace,
                secret = name,
                "it is missing; a node with newer content, if there is one, creates it first"
            );
            return Ok(None);
        }
        if !matches!(kept, Kept::Unchanged | Kept::Overtaken { .. }) {
            tracing::info!(
                namespace,
                secret = name,
                class = class.identity.name,
                ?kept,
                "Secret written"
            );
            self.metrics
                .secret_synced(&class.provider, started.elapsed());
        }
        Ok(Some(kept))
    }

    /// Looks whether a Secret is as the volumes say, without reading them again while nothing of
    /// them or of the class has changed. None when something is to be written, or may be.
    async fn looked(
        &self,
        key: &SecretKey,
        class: &Arc<Class>,
        object: &SecretObject,
        volumes: &[Mounted],
        ahead: &mut Ahead,
    ) -> Result<Option<Kept>, Problem> {
        let owners = owners(volumes);
        let namespace = &key.namespace;
        let mut made = None;
        let (data, stamp) = match self.made_before(key, class, volumes).await? {
            Some((digest, stamp)) => (Data::Digest(digest), stamp),
            None => {
                made = self.made(class, object, volumes, None, ahead).await?;
                let Some((desired, stamp)) = &made else {
                    return Ok(None);
                };
                (Data::Values(&desired.data), *stamp)
            }
        };
        let wanted = wanted(namespace, class, object, data, stamp, &owners);
        let kept = self.cluster.secret_is_kept(&wanted).await;
        let kept = kept.map_err(|refusal| problem(&wanted, refusal))?;
        if let (None, Some((desired, _))) = (kept, made) {
            ahead.put_back(desired);
        }
        Ok(kept)
    }

    /// The volumes whose pods still need Secrets, with who their Secrets live with.
    async fn live(&self, class: &Class, volumes: Vec<Mounted>) -> Result<Vec<Mounted>, Problem> {
        let mut live = Vec::new();
        for mut mounted in volumes {
            let volume = &mounted.volume;
            let holder = self
                .cluster
                .pod_owners(&volume.pod, &volume.pod_status)
                .await;
            match holder.map_err(|error| unavailable(class, &error))? {
                Some(holder) if !holder.pod_ended => {
                    self.known.set_holder(&volume.id, holder.clone());
                    mounted.holder = Some(holder);
                    live.push(mounted);
                }
                Some(_) => {}
                // The pod is gone, or only its pod status is.
                None => self.known.status_is_due(&volume.id),
            }
        }
        Ok(live)
    }

    /// Counts and tells what became of a Secret, and says when it is looked at again. Of trouble
    /// that goes on, a pod hears once.
    fn report(
        &self,
        class: &Class,
        name: &str,
        volumes: &[Volume],
        outcome: Result<Option<Kept>, &Problem>,
    ) {
        let Some(first) = volumes.first() else {
            return;
        };
        let namespace = &first.pod.namespace;
        let failed = outcome.is_err();
        self.known
            .looked_at(namespace, &class.identity.name, name, failed, self.interval);
        match outcome {
            Err(problem) => {
                self.metrics
                    .secret_failed(&class.provider, problem.trouble.label());
                for volume in volumes {
                    let news = (Severity::Warning, FAILED, problem.sentence.as_str());
                    self.tell(volume, name, Some(problem.identity()), news);
                }
            }
            // There is nothing to be in step with.
            Ok(None) => {}
            Ok(Some(kept)) => {
                if kept == Kept::Recreated {
                    // The log has it in any case, and it is no trouble.
                    let _ = self.cluster.announce(
                        &first.pod,
                        Severity::Normal,
                        "SecretRecreated",
                        &format!(
                            "Secret {name} was made anew, because its type changed and the type of a Secret cannot"
                        ),
                        |_| {},
                    );
                }
                for volume in self.known.volumes_of(namespace, &class.identity.name) {
                    let sentence = format!("Secret {name} is in step with the volume again");
                    let news = (Severity::Normal, "SecretSynced", sentence.as_str());
                    self.tell(&volume.volume, name, None, news);
                }
            }
        }
    }

    /// Tells a volume's pod what became of a Secret, unless it knows. What cannot be posted counts
    /// as not told.
    fn tell(
        &self,
        volume: &Volume,
        secret: &str,
        trouble: Option<&str>,
        (severity, reason, sentence): (Severity, &'static str, &str),
    ) {
        self.known.tell(&volume.id, secret, trouble, |before| {
            let known = Arc::clone(&self.known);
            let (id, secret) = (volume.id.clone(), secret.to_owned());
            let trouble = trouble.map(str::to_owned);
            let ended = move |posted: bool| {
                if !posted {
                    known.untold(&id, &secret, trouble.as_deref(), before);
                }
            };
            self.cluster
                .announce(&volume.pod, severity, reason, sentence, ended)
        });
    }
}

/// Everybody that the volumes' Secrets live with, each once.
fn owners(volumes: &[Mounted]) -> Vec<Owner> {
    PodOwners::merged(volumes.iter().filter_map(|volume| volume.holder.as_ref()))
}

fn wanted<'a>(
    namespace: &'a str,
    class: &'a Class,
    object: &'a SecretObject,
    data: Data<'a>,
    stamp: Stamp,
    owners: &'a [Owner],
) -> Wanted<'a> {
    Wanted {
        namespace,
        name: &object.secret_name,
        type_: &object.type_,
        labels: &object.labels,
        annotations: &object.annotations,
        data,
        class: &class.identity,
        since: stamp.since,
        order: stamp.order,
        owners,
        create: true,
    }
}

fn unavailable(class: &Class, why: &dyn fmt::Display) -> Problem {
    Problem::new(
        Trouble::Unavailable,
        format!("SecretProviderClass {}: {why}", class.identity.name),
    )
}

fn problem(wanted: &Wanted<'_>, refusal: Refusal) -> Problem {
    let (namespace, name) = (wanted.namespace, wanted.name);
    let (trouble, what) = match refusal {
        Refusal::Unmanaged => (
            Trouble::Unmanaged,
            format!(
                "there is a Secret of this name that is not the driver's, and it is left as it is. To let the driver have it, and replace its content: kubectl annotate secret -n {namespace} {name} {ADOPT}=true"
            ),
        ),
        Refusal::OtherClass(other) => (
            Trouble::Conflict,
            format!(
                "SecretProviderClass {other} makes other content of this Secret, and it is left as it is; give one of the two another secretName"
            ),
        ),
        Refusal::Forbidden(said) => (
            Trouble::Forbidden,
            format!(
                "the API server answers {said}. The driver may write Secrets only when the chart's value syncSecret.enabled is true, or deploy/rbac-secretprovidersyncing.yaml is applied"
            ),
        ),
        Refusal::Invalid(said) => (
            Trouble::Refused,
            format!("the API server refuses it: {said}"),
        ),
        Refusal::TypeStays(why) => (
            Trouble::Refused,
            format!(
                "its type should be {:.100}, which needs a new Secret in its place, and the one that is there stays as it is: {why}",
                wanted.type_
            ),
        ),
        Refusal::Missing(why) => (
            Trouble::Missing,
            format!(
                "it is missing: its type was changed to {:.100}, for which it was deleted, and the API server does not take the new one: {why}. The driver tries again, every few minutes at least, as long as a pod needs it. Look for a webhook, a policy or a quota that is in the way of Secrets in namespace {namespace}, or give the entry of the class its former type",
                wanted.type_
            ),
        ),
        Refusal::Failed(error) => (Trouble::Unavailable, error.to_string()),
    };
    Problem::new(
        trouble,
        format!(
            "SecretProviderClass {}, Secret {name}: {what}",
            wanted.class.name
        ),
    )
}
