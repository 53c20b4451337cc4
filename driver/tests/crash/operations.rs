//! What is done to a volume and its Secrets while the driver is stopped, and what follows.

mod end;
mod meanwhile;
mod store;

use std::{fmt, fs, path::PathBuf, sync::Arc, time::Instant};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use embedded::api::Disturbance;
use serde_json::{Value, json};
use tokio::time::{Duration, sleep, timeout};
use tonic::Code;

use crate::{
    node::{Class, KEY_FORMAT, Node, Odd, PATIENCE, REFRESH, SOMEBODY, STATUSES, data, until},
    reader::read_all,
    tracer::{How, Traced},
};
use meanwhile::CHECKS;
pub(crate) use meanwhile::Meanwhile;
use store::{PEM, secret, version};

/// What the driver does when it is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// The first publish of a volume, which makes a Secret.
    Publish,
    /// The first publish, which the provider refuses.
    RefusedPublish,
    /// The first publish after an edit of the class that the API server's cache does not have yet.
    PublishOfEditedClass,
    /// The first publish, which kubelet gives up because the provider hangs, and makes again.
    HungPublish,
    /// A refresh that finds other files and other values.
    Refresh,
    /// The first publish, and a refresh, whose provider is slower than the interval in which the driver asks the API
    /// server for the pod, which does not answer then.
    SlowPublish,
    SlowRefresh,
    /// A refresh that kubelet gives up because the provider hangs, and makes again.
    HungRefresh,
    /// A refresh that finds nothing new.
    RefreshWithoutChange,
    /// A refresh that the provider refuses.
    RefusedRefresh,
    /// A refresh that succeeds after another has failed.
    RecoveredRefresh,
    /// A refresh that somebody asks for, although none is due.
    AskedRefresh,
    /// A refresh after an edit of the class, although none is due: other files, and one more key of the Secret.
    RefreshOfEditedClass,
    /// A refresh after an edit of the class that gives its Secret another type.
    RefreshWithOtherType,
    /// A refresh that finds the same files with other modes.
    RefreshOfModes,
    /// A refresh after the class was deleted and made anew with other keys and fewer objects, so that the record is
    /// shorter.
    RefreshOfNewClass,
    /// A refresh that somebody asks for after one has failed, long before the driver would try again.
    AskedAfterFailure,
    Unpublish,
    /// Somebody has deleted the Secret.
    DeletedSecret,
    /// Somebody has deleted the pod status of a pod without a controller, with which the Secret would go.
    DeletedPodStatus,
    /// Somebody has changed the Secret.
    AlteredSecret,
    /// An edit of the class that asks for another Secret, which nobody publishes.
    ClassWithAnotherSecret,
    /// An edit of an annotation of the class alone, by which one of its Secrets becomes another.
    AnnotatedClass,
    /// Somebody has deleted a Secret that had newer content of another node, which is gone.
    DeletedNewerSecret,
    /// The start of a driver on a node with a volume, and with what a crash has left.
    Start,
    /// The first publish of a volume into which the provider writes the files itself.
    PublishOfWrittenFiles,
    /// A refresh of such a volume.
    RefreshOfWrittenFiles,
    UnpublishOfWrittenFiles,
    /// The first publish for a pod without a controller: the Secret lives with its pod status.
    PublishOfBarePod,
    RefreshOfBarePod,
    /// The last unpublish of a volume whose class makes the Secret.
    UnpublishOfBarePod,
    /// The same for a pod that has ended and stays, as that of a Job does.
    UnpublishOfEndedPod,
    /// The same, and nobody else owns its Secret.
    UnpublishOfLastEndedPod,
    /// The same for a pod that has failed, and whose controller goes on.
    UnpublishOfEvictedPod,
    /// The first publish for a bare pod after one of the same name, whose pod status is still there.
    PublishAfterNamesake,
    /// The publish of a volume whose pod runs and whose record nobody can read.
    PublishOverTornRecord,
    /// The publish of a volume that was mounted before the node lost its power.
    PublishAfterReboot,
    /// The same, with files that the provider writes.
    PublishOfWrittenFilesAfterReboot,
    /// The unpublish of a volume on which somebody has mounted more often than one call takes down.
    UnpublishOfBuriedVolume,
}

/// What follows once the driver has been stopped and started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Then {
    /// kubelet tries again.
    Again,
    /// The same, and meanwhile the store has other values.
    Changed,
    /// The pod has gone meanwhile.
    Unpublish,
    /// The pod has gone meanwhile, and one of the same name runs on another node.
    Replaced,
    /// A node that has the new content, too, writes it to the Secret. It has refreshed its volume before this
    /// one began to.
    Elsewhere,
    /// The records have been torn, and the pod runs on.
    TornRecords,
    /// The node has lost its power, which has torn the records too.
    Reboot,
    /// kubelet tries again after something has happened during the operation.
    Meanwhile(Meanwhile),
}

impl fmt::Display for Then {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Meanwhile(meanwhile) => return write!(f, "meanwhile {meanwhile}"),
            Self::Again => "again",
            Self::Changed => "changed",
            Self::Unpublish => "unpublish",
            Self::Replaced => "replaced",
            Self::Elsewhere => "elsewhere",
            Self::TornRecords => "torn records",
            Self::Reboot => "reboot",
        })
    }
}

impl Operation {
    /// Returns what may follow.
    pub(crate) fn follows(self) -> &'static [Then] {
        match self {
            Self::Publish => &[
                Then::Again,
                Then::Changed,
                Then::Unpublish,
                Then::Replaced,
                Then::TornRecords,
                Then::Reboot,
            ],
            Self::Refresh => &[
                Then::Again,
                Then::Changed,
                Then::Unpublish,
                Then::Replaced,
                Then::Elsewhere,
                Then::TornRecords,
                Then::Reboot,
            ],
            Self::RefusedPublish
            | Self::RefreshOfEditedClass
            | Self::Start
            | Self::PublishOfWrittenFiles
            | Self::RefreshOfWrittenFiles
            | Self::PublishOfBarePod
            | Self::PublishAfterNamesake
            | Self::PublishAfterReboot
            | Self::PublishOfWrittenFilesAfterReboot => &[Then::Again, Then::Unpublish],
            Self::RefreshWithoutChange | Self::RefusedRefresh => &[Then::Again, Then::Changed],
            Self::HungPublish | Self::HungRefresh => &[Then::Again, Then::Unpublish],
            Self::RefreshWithOtherType
            | Self::SlowPublish
            | Self::SlowRefresh
            | Self::PublishOverTornRecord
            | Self::AskedRefresh
            | Self::AskedAfterFailure
            | Self::RefreshOfModes
            | Self::RefreshOfNewClass
            | Self::UnpublishOfWrittenFiles
            | Self::RefreshOfBarePod
            | Self::RecoveredRefresh
            | Self::UnpublishOfBarePod
            | Self::UnpublishOfEndedPod
            | Self::UnpublishOfLastEndedPod
            | Self::UnpublishOfEvictedPod
            | Self::UnpublishOfBuriedVolume
            | Self::PublishOfEditedClass
            | Self::Unpublish
            | Self::DeletedSecret
            | Self::DeletedPodStatus
            | Self::AlteredSecret
            | Self::AnnotatedClass
            | Self::DeletedNewerSecret
            | Self::ClassWithAnotherSecret => &[Then::Again],
        }
    }

    pub(crate) fn is_first(self) -> bool {
        matches!(
            self,
            Self::Publish
                | Self::RefusedPublish
                | Self::HungPublish
                | Self::SlowPublish
                | Self::PublishOfEditedClass
                | Self::PublishOfWrittenFiles
                | Self::PublishOfBarePod
                | Self::PublishAfterNamesake
        )
    }

    pub(crate) fn is_unpublish(self) -> bool {
        matches!(
            self,
            Self::Unpublish
                | Self::UnpublishOfWrittenFiles
                | Self::UnpublishOfBarePod
                | Self::UnpublishOfEndedPod
                | Self::UnpublishOfLastEndedPod
                | Self::UnpublishOfEvictedPod
                | Self::UnpublishOfBuriedVolume
        )
    }

    /// Whether the provider writes the files itself.
    fn is_written(self) -> bool {
        matches!(
            self,
            Self::PublishOfWrittenFiles
                | Self::PublishOfWrittenFilesAfterReboot
                | Self::RefreshOfWrittenFiles
                | Self::UnpublishOfWrittenFiles
        )
    }

    /// Whether the provider writes files itself into a volume without any.
    fn is_first_of_written(self) -> bool {
        matches!(
            self,
            Self::PublishOfWrittenFiles | Self::PublishOfWrittenFilesAfterReboot
        )
    }

    /// Whether the pod has no controller.
    fn is_bare(self) -> bool {
        matches!(
            self,
            Self::PublishOfBarePod
                | Self::PublishAfterNamesake
                | Self::RefreshOfBarePod
                | Self::UnpublishOfBarePod
                | Self::UnpublishOfEndedPod
                | Self::UnpublishOfLastEndedPod
                | Self::DeletedPodStatus
        )
    }

    fn is_refused(self) -> bool {
        matches!(self, Self::RefusedPublish | Self::RefusedRefresh)
    }

    /// Whether the driver does it by itself.
    fn is_by_itself(self) -> bool {
        matches!(
            self,
            Self::DeletedSecret
                | Self::DeletedPodStatus
                | Self::AlteredSecret
                | Self::AnnotatedClass
                | Self::DeletedNewerSecret
                | Self::ClassWithAnotherSecret
        )
    }

    /// Whether it takes most of its time to wait for an interval of the driver or for kubelet.
    pub(crate) fn mostly_waits(self) -> bool {
        self.is_by_itself()
            || matches!(
                self,
                Self::UnpublishOfEndedPod | Self::HungPublish | Self::HungRefresh
            )
    }

    /// Whether the provider is asked.
    pub(crate) fn asks_provider(self) -> bool {
        !self.is_unpublish()
            && !self.is_by_itself()
            && !matches!(self, Self::Start | Self::UnpublishOfBuriedVolume)
    }

    /// Whether the content of the volume becomes another.
    fn changes_content(self) -> bool {
        matches!(
            self,
            Self::Refresh
                | Self::HungRefresh
                | Self::SlowRefresh
                | Self::AskedRefresh
                | Self::AskedAfterFailure
                | Self::RefreshOfEditedClass
                | Self::RefreshOfNewClass
                | Self::RefreshOfModes
                | Self::RefreshOfBarePod
                | Self::RecoveredRefresh
        )
    }
}

/// One run of an operation.
pub(crate) struct Run {
    pub(crate) node: Node,
    operation: Operation,
    then: Then,
    class: Class,
    /// How the provider refuses, if it is to.
    refusal: &'static str,
    /// The number of the values in the store.
    version: u32,
    /// The order of the new content of another node.
    elsewhere: Option<String>,
    /// The owners of the Secret that somebody else has applied, too, if somebody has.
    adorned: Option<Vec<String>>,
    /// Whether the files in the store have other modes than at first.
    has_other_modes: bool,
    /// Whether a step of the operation has failed.
    pub(crate) has_failed: bool,
    /// Whether a request has not gone out, or its answer was lost.
    pub(crate) was_cut_off: bool,
}

impl Run {
    /// Makes all that is there before an operation, with a traced driver. Fails if nothing can be
    /// traced here.
    pub(crate) async fn start(operation: Operation, then: Then, how: How) -> std::io::Result<Self> {
        // Checks that are not the operation would be among its steps.
        let sync_interval = match then {
            Then::Meanwhile(_) => CHECKS,
            _ if operation.is_by_itself() => "1s",
            _ => "10m",
        };
        let mut node = Node::start(!operation.is_bare()).await;
        let has_reason = matches!(
            operation,
            Operation::AskedRefresh
                | Operation::RefreshOfEditedClass
                | Operation::RefreshOfNewClass
        );
        // What a failed step has left, and what happens meanwhile, may need another refresh.
        let is_due = !has_reason || how != How::Stopped;
        if operation == Operation::AskedAfterFailure {
            node.backoff = "10m";
        }
        node.start_traced(sync_interval, is_due)?;
        node.secret.lock().unwrap().add(None);
        let creds = secret("creds", "Opaque", &[("pw", "pw")]);
        let certificate = secret(
            "certificate",
            "kubernetes.io/tls",
            &[(PEM, "tls.crt"), (PEM, "tls.key")],
        );
        let class = Class {
            incarnation: 0,
            generation: 1,
            annotation: None,
            objects: None,
            secret_objects: match operation {
                Operation::AnnotatedClass => json!([creds, certificate]),
                _ => json!([creds]),
            },
            faults: operation.is_written().then_some("[{writeFiles: true}]"),
        };
        let mut run = Self {
            node,
            operation,
            then,
            class,
            refusal: match how {
                How::Stopped | How::Held => {
                    "[{status: {code: PERMISSION_DENIED, message: refused by the test}}]"
                }
                // With files beside the error.
                How::Failed => "[{errorCodeBeside: refused by the test}]",
            },
            version: 0,
            elsewhere: None,
            adorned: None,
            has_other_modes: false,
            has_failed: false,
            was_cut_off: false,
        };
        run.put_class();
        run.put_store();
        Ok(run)
    }

    /// Brings the volume into the state in which the operation finds it.
    pub(crate) async fn set_up(&mut self) -> Result<(), String> {
        self.node.is_ready().await?;
        if !self.operation.is_first() {
            let published = self.node.publish().await;
            published.map_err(|status| format!("cannot be set up: {status}"))?;
            self.start_pod()?;
            // Only the driver that deletes a Secret to change its type knows what others had put on it, and what
            // somebody deletes is gone.
            if !matches!(
                self.operation,
                Operation::RefreshWithOtherType
                    | Operation::UnpublishOfLastEndedPod
                    | Operation::Start
            ) {
                let whole = self.operation != Operation::UnpublishOfEvictedPod;
                self.node.adorn_secret(whole);
                self.adorned = Some(self.node.owners_of_secret());
            }
        }
        self.node.remember_past();
        match self.operation {
            Operation::DeletedNewerSecret => {
                self.elsewhere = Some(self.node.later_version().await);
                let newer = Some(self.secret_data_of("creds", self.version + 1));
                self.node.secret.lock().unwrap().add(newer.flatten());
                self.overtake_with(self.version + 1).await;
                // Longer than the interval in which the driver finds that out.
                sleep(Duration::from_millis(1_500)).await;
            }
            Operation::UnpublishOfBuriedVolume => {
                self.node.end_pod().await;
                self.node.bury().map_err(|error| error.to_string())?;
            }
            Operation::UnpublishOfEndedPod | Operation::UnpublishOfLastEndedPod => {
                self.node.end_pod().await;
                self.node.put_pod(false, "Succeeded");
            }
            Operation::UnpublishOfEvictedPod => {
                self.node.end_pod().await;
                self.node.put_pod(true, "Failed");
            }
            operation if operation.is_unpublish() => self.node.end_pod().await,
            Operation::PublishAfterNamesake => self.node.put_status_of_namesake(),
            Operation::PublishAfterReboot | Operation::PublishOfWrittenFilesAfterReboot => {
                self.node.lose_mounts().await;
                let started = self.node.start_traced("10m", true);
                started.map_err(|error| error.to_string())?;
                self.node.is_ready().await?;
            }
            Operation::Refresh | Operation::RefreshOfWrittenFiles | Operation::RefreshOfBarePod => {
                self.put_store();
            }
            Operation::PublishOverTornRecord => self.node.tear_records(),
            Operation::Start => {
                self.node.kill_driver().await;
                self.node.leave_records();
            }
            Operation::RefusedPublish | Operation::RefusedRefresh => self.refuse(),
            Operation::HungPublish => self.hang(),
            Operation::SlowPublish => self.slow(),
            Operation::SlowRefresh => {
                self.put_store();
                self.slow();
            }
            Operation::HungRefresh => {
                self.put_store();
                self.hang();
            }
            Operation::RecoveredRefresh => {
                self.refuse();
                match self.node.publish().await {
                    Err(status) if status.message().contains("refused by the test") => {}
                    answer => return Err(format!("the first refresh is answered with {answer:?}")),
                }
                until("the pod is told that refreshes fail", || self.is_stale()).await?;
                self.put_store();
                self.admit();
            }
            Operation::AskedRefresh => {
                // The driver remembers of this look that there is nothing to do.
                for _ in 0..2 {
                    self.publish().await?;
                }
                self.put_store();
                self.class.annotation = Some((REFRESH, "now"));
                self.put_class();
            }
            Operation::RefreshOfEditedClass => {
                self.class.objects = Some(vec!["pw", "db/password", "token"]);
                let keys = [("pw", "pw"), ("db/password", "db")];
                self.class.secret_objects = json!([secret("creds", "Opaque", &keys)]);
                self.edit_class();
            }
            Operation::PublishOfEditedClass => {
                self.class.objects = Some(vec!["pw", "db/password"]);
                self.edit_class();
                self.node.set_answers(Odd::Past);
            }
            Operation::RefreshOfNewClass => {
                self.class.objects = Some(vec!["pw", "db/password"]);
                let keys = [("pw", "pw"), ("db/password", "db")];
                self.class.secret_objects = json!([secret("creds", "Opaque", &keys)]);
                self.class.incarnation += 1;
                self.class.generation = 0;
                self.edit_class();
            }
            Operation::RefreshOfModes => {
                self.has_other_modes = true;
                self.serve_store();
            }
            Operation::AskedAfterFailure => {
                self.node.put_store(&json!("no list of objects"));
                if let Ok(()) = self.node.publish().await {
                    return Err("a refresh without a store succeeds".to_owned());
                }
                until("the pod is told that refreshes fail", || self.is_stale()).await?;
                self.node.backoff = "1ns";
                self.put_store();
                self.class.annotation = Some((REFRESH, "now"));
                self.put_class();
            }
            Operation::RefreshWithOtherType => {
                let objects = json!([secret("creds", "example.com/creds", &[("pw", "pw")])]);
                self.class.secret_objects = objects;
                self.node.secret.lock().unwrap().add(None);
                self.edit_class();
            }
            _ => {}
        }
        if matches!(
            self.then,
            Then::Elsewhere | Then::Meanwhile(Meanwhile::Elsewhere)
        ) {
            self.elsewhere = Some(self.node.later_version().await);
        }
        Ok(())
    }

    /// Has the tracer note the steps of the operation, and stop the driver after one of them or have that fail.
    pub(crate) fn arm(&mut self, at: Option<(&str, How)>) -> Result<Arc<Traced>, String> {
        if self.operation == Operation::Start {
            let started = self.node.start_traced_from_the_start(at);
            started.map_err(|error| error.to_string())?;
            return self.node.traced().ok_or("it is not traced".to_owned());
        }
        let traced = self.node.traced().ok_or("it is not traced")?;
        traced.arm(self.node.armed(at));
        Ok(traced)
    }

    /// Does the operation, and waits for its end.
    pub(crate) async fn act(&mut self) -> Result<(), String> {
        match self.operation {
            Operation::Start => return self.node.is_ready().await,
            Operation::HungPublish | Operation::HungRefresh => {
                self.give_up().await?;
                return match self.then {
                    Then::Unpublish => Ok(()),
                    _ => self.ends().await,
                };
            }
            Operation::SlowPublish | Operation::SlowRefresh => {
                let (away, published) = tokio::join!(self.api_is_away(), self.finish());
                return published.and(away);
            }
            _ => {}
        }
        self.begin();
        self.finish().await
    }

    /// Calls a provider that hangs, gives the call up, and makes it again when the provider is well.
    async fn give_up(&mut self) -> Result<(), String> {
        if self.then == Then::Unpublish {
            self.node.end_pod().await;
        }
        let mut publish = Box::pin(self.node.publish());
        if let Ok(answer) = timeout(GIVEN_UP, &mut publish).await {
            return Err(format!(
                "the provider hangs, and kubelet is answered with {answer:?}"
            ));
        }
        if self.then == Then::Unpublish {
            // kubelet still waits for the publish, whatever its answer is then.
            let unpublish = timeout(ENDED, self.unpublish());
            let (gone, _answer) = tokio::join!(unpublish, publish);
            return gone.map_err(|_| format!("it is not unpublished after {ENDED:?}"))?;
        }
        drop(publish);
        self.admit();
        let again = timeout(CANCELLED, self.publish()).await;
        again.map_err(|_| format!("the call that was given up runs after {CANCELLED:?}"))?
    }

    /// Has the API server away while the driver asks for the pod of a volume whose provider is slow.
    async fn api_is_away(&self) -> Result<(), String> {
        sleep(BEFORE_LOOK_AT_POD).await;
        self.node.api().disturb(Disturbance::Refuse);
        sleep(AROUND_LOOK_AT_POD).await;
        self.node.api().disturb(Disturbance::None);
        Ok(())
    }

    /// Does that to which the driver answers by itself.
    fn begin(&mut self) {
        match self.operation {
            Operation::DeletedSecret | Operation::DeletedNewerSecret => {
                self.node.secret.lock().unwrap().add(None);
                self.expect_secret();
                self.node.remove_secret("creds");
                self.adorned = None;
            }
            Operation::AnnotatedClass => {
                self.class.annotation = Some((KEY_FORMAT, "original"));
                self.put_class();
            }
            Operation::DeletedPodStatus => {
                self.pod_status_goes();
                self.node.remove_pod_statuses();
            }
            Operation::AlteredSecret => {
                if let Some(mut altered) = self.node.secret("creds") {
                    altered["data"]["pw"] = json!("YWx0ZXJlZA==");
                    let seen = Some(data(&altered));
                    self.node.secret.lock().unwrap().add(seen);
                    self.expect_secret();
                    self.node.put_secret("creds", altered);
                }
            }
            Operation::ClassWithAnotherSecret => {
                let another = secret("more", "Opaque", &[("db/password", "db")]);
                self.class.secret_objects = json!([self.class.secret_objects[0], another]);
                self.edit_class();
            }
            _ => {}
        }
    }

    /// Expects that the owners of the Secret that are pod statuses go, which the garbage collector removes.
    fn pod_status_goes(&mut self) {
        if self.operation.is_bare()
            && let Some(owners) = &mut self.adorned
        {
            owners.retain(|owner| owner == SOMEBODY);
        }
    }

    /// Makes the calls of kubelet, and waits for the end of the operation.
    async fn finish(&self) -> Result<(), String> {
        self.call().await?;
        if self.operation.is_unpublish() {
            return self.owners_are_checked().await;
        }
        self.ends().await?;
        self.class_is_checked().await
    }

    /// Makes the calls of kubelet.
    async fn call(&self) -> Result<(), String> {
        match self.operation {
            // One call does not take all down, and kubelet calls again.
            Operation::UnpublishOfBuriedVolume => self.unpublish().await,
            operation if operation.is_unpublish() => {
                let unpublished = self.node.unpublish().await;
                unpublished.map_err(|status| status.to_string())
            }
            operation if operation.is_by_itself() => Ok(()),
            _ => self.publish_once().await,
        }
    }

    /// Checks that a volume whose pod runs has its pod status, although a call has failed.
    pub(crate) fn has_pod_status(&self) -> Result<(), String> {
        let goes = self.operation.is_first()
            || self.operation.is_unpublish()
            || matches!(
                self.operation,
                // A container has not started yet.
                Operation::PublishAfterReboot
                    | Operation::PublishOfWrittenFilesAfterReboot
                    | Operation::DeletedPodStatus
            );
        match goes || !self.node.api().all(STATUSES).is_empty() {
            true => Ok(()),
            false => Err("the pod status of a volume that is mounted has gone".to_owned()),
        }
    }

    /// Returns the directory of the present content and the objects that the pod status names.
    pub(crate) fn told(&self) -> (Option<PathBuf>, Vec<Value>) {
        let statuses = self.node.api().all(STATUSES);
        let objects = statuses
            .into_iter()
            .map(|status| status["status"]["objects"].clone());
        let content = fs::read_link(self.node.target().join("..data")).ok();
        (content, objects.collect())
    }

    /// Checks that the pod status names other objects than before if and only if the content is another.
    pub(crate) fn check_told(&self, before: &(Option<PathBuf>, Vec<Value>)) -> Result<(), String> {
        if !matches!(
            self.operation,
            Operation::Refresh | Operation::RefreshOfEditedClass | Operation::RecoveredRefresh
        ) {
            return Ok(());
        }
        let now = self.told();
        match (now.0 == before.0) == (now.1 == before.1) {
            true => Ok(()),
            false => Err(format!(
                "content and objects were {before:?} and are {now:?}"
            )),
        }
    }

    async fn publish_once(&self) -> Result<(), String> {
        match (self.node.publish().await, self.operation.is_refused()) {
            (Ok(()), false) => Ok(()),
            (Err(status), true) if status.message().contains("refused by the test") => Ok(()),
            (answer, _) => Err(format!("kubelet is answered with {answer:?}")),
        }
    }

    /// Waits for what comes after the answer to kubelet.
    async fn ends(&self) -> Result<(), String> {
        if self.operation.is_by_itself() {
            let node = &self.node;
            until("the Secrets are as they should be", || self.has_secrets()).await?;
            if self.operation.is_bare() {
                let lives = || node.secret_lives_with_status();
                until("the Secret lives with the pod status", lives).await?;
            }
            node.look_at_secret();
        }
        if self.operation == Operation::PublishOfEditedClass {
            let files = read_all(&self.node.target().join("..data"));
            let files = files.map_err(|error| error.to_string())?;
            if files != self.tree() {
                let names: Vec<_> = files.keys().collect();
                return Err(format!(
                    "it is published with the files {names:?} of the class of before"
                ));
            }
        }
        if self.operation.changes_content() {
            let one = || self.node.generations().len() == 1;
            until("the content from before has been removed", one).await?;
            let right = || self.with_wrong_modes().is_empty();
            until("the files have their modes", right).await?;
        }
        Ok(())
    }

    /// Waits for the check of the class, which the driver makes as often as that of the Secret: else it
    /// would be among the steps now and then.
    async fn class_is_checked(&self) -> Result<(), String> {
        let Some(traced) = self.node.traced() else {
            return Ok(());
        };
        if !self.operation.is_by_itself() {
            return Ok(());
        }
        until("the driver has read the class", || {
            traced.has_step("API server: GET secretproviderclasses/db answered")
        })
        .await
    }

    /// Waits for what the driver does with the owners of a pod that has ended, some seconds later.
    async fn owners_are_checked(&self) -> Result<(), String> {
        let Some(traced) = self.node.traced() else {
            return Ok(());
        };
        if !matches!(
            self.operation,
            Operation::UnpublishOfEndedPod
                | Operation::UnpublishOfLastEndedPod
                | Operation::UnpublishOfEvictedPod
        ) {
            return Ok(());
        }
        if self.operation == Operation::UnpublishOfEvictedPod {
            // It may read no Secret for it.
            return until("the driver has read the pod that has failed", || {
                traced.has_step("API server: GET pods/web answered")
            })
            .await;
        }
        until(
            "the driver has read the Secret of the pod that has ended",
            || traced.has_step("API server: GET secrets/creds answered"),
        )
        .await?;
        // It may write the Secret then.
        sleep(Duration::from_millis(500)).await;
        Ok(())
    }

    fn has_secrets(&self) -> bool {
        let wanted = self.class.secret_objects.as_array().into_iter().flatten();
        wanted.into_iter().all(|wanted| {
            let name = wanted["secretName"].as_str().unwrap_or_default();
            let found = self.node.secret(name);
            let has = |secret: &Value| {
                secret["type"] == wanted["type"] && Some(data(secret)) == self.secret_data(name)
            };
            found.as_ref().is_some_and(has)
        })
    }

    /// Starts a driver in the place of one that was killed, and does what follows. `steps` are those that
    /// it came to.
    pub(crate) async fn go_on(&mut self, was_killed: bool, steps: &[String]) -> Result<(), String> {
        let was = |what: &str| steps.iter().any(|step| step.starts_with(what));
        self.node.set_answers(Odd::Nothing);
        if was_killed && was("provider: request sent") && !was("provider: answer received") {
            self.interrupt_provider();
        }
        match self.then {
            Then::Again => self.heal(),
            Then::Meanwhile(_) => {}
            Then::Changed => {
                self.heal();
                self.put_store();
            }
            Then::Unpublish => self.node.end_pod().await,
            Then::Replaced => {
                self.node.end_pod().await;
                self.node.replace_pod();
            }
            Then::Elsewhere => self.overtake().await,
            Then::TornRecords => {
                self.node.kill_driver().await;
                self.node.tear_records();
            }
            Then::Reboot => self.node.reboot().await,
        }
        let looks = matches!(self.then, Then::Again | Then::Elsewhere);
        if was_killed && looks && !self.is_to_go() && !self.is_refused() {
            self.look().await?;
        }
        if was_killed || matches!(self.then, Then::TornRecords | Then::Reboot) {
            self.node.start_driver(self.operation == Operation::Start);
            self.node.is_ready().await?;
        }
        if was_killed && self.operation == Operation::Start && self.then == Then::Again {
            // It has found the volume among the records.
            self.node.secret.lock().unwrap().add(None);
            self.expect_secret();
            self.node.remove_secret("creds");
            until("the Secret is kept without a call", || self.has_secrets()).await?;
        }
        if self.then == Then::Replaced {
            return self.leave_to_successor().await;
        }
        if self.is_to_go() {
            return self.unpublish().await;
        }
        self.publish().await?;
        self.settle().await
    }

    /// Publishes once more, as a kubelet does that has not heard yet that its pod is gone, and unpublishes.
    /// What is of the pod's successor stays as it is.
    async fn leave_to_successor(&self) -> Result<(), String> {
        let before = self.node.successor();
        // Whether it is answered with an error does not matter any more.
        let _answer = self.node.publish().await;
        self.unpublish().await?;
        let now = self.node.successor();
        if now == before {
            return Ok(());
        }
        Err(format!(
            "the status of the new pod was {before:?} and is {now:?}"
        ))
    }

    /// Has another driver publish before, one for which no refresh is due: what the stopped one left has
    /// to do, or is seen to be unfinished. A refresh would hide it.
    async fn look(&mut self) -> Result<(), String> {
        let registers = self.operation == Operation::Start;
        self.node.start_driver_without_refreshes(registers);
        self.node.is_ready().await?;
        self.publish().await?;
        self.start_pod()?;
        if self.operation.is_first_of_written() {
            let files = read_all(&self.node.target()).map_err(|error| error.to_string())?;
            if !self.node.files.lock().unwrap().all().contains(&files) {
                let names: Vec<_> = files.keys().collect();
                return Err(format!("it is published with the files {names:?}"));
            }
        }
        self.former_content_goes().await?;
        self.names_agree()?;
        if !self.node.has_failing_record() {
            until("the pod status tells of no failure", || !self.is_stale()).await?;
        }
        if self.then == Then::Elsewhere {
            // Longer than the interval in which it checks the Secret.
            sleep(Duration::from_millis(1_300)).await;
            self.node.look_at_secret();
        } else {
            let is_so = || self.has_secret_of_volume();
            until("the Secret has what is mounted", is_so).await?;
        }
        self.node.kill_driver().await;
        Ok(())
    }

    /// Checks that the names at the root of the volume are those of its content.
    fn names_agree(&self) -> Result<(), String> {
        if self.operation.is_written() {
            return Ok(());
        }
        let read = |path| read_all(path).map_err(|error| error.to_string());
        let target = self.node.target();
        let content = read(&target.join("..data"))?;
        // A directory at the root is a link, whose files are among the content.
        let is_there = |name: &&String| target.join(name).is_file();
        match content.keys().find(|name| !is_there(name)) {
            Some(name) => Err(format!("{name} is in the content, and not at the root")),
            None => Ok(()),
        }
    }

    /// Returns whether the Secret has the contents of the files that are mounted now, whichever these are.
    fn has_secret_of_volume(&self) -> bool {
        let Some(secret) = self.node.secret("creds") else {
            return false;
        };
        let objects = [("pw", "pw"), ("db", "db/password")];
        let data = data(&secret);
        !data.is_empty()
            && data.into_iter().all(|(key, value)| {
                let object = objects.iter().find(|(of, _)| *of == key);
                let file = object.map(|(_, object)| fs::read(self.node.target().join(object)));
                // A class may take a file away whose key goes at the next refresh.
                let file = file.and_then(Result::ok);
                file.is_none_or(|file| BASE64_STANDARD.encode(file) == value)
            })
    }

    /// Returns whether the pod status names the files that are mounted now, in their versions.
    fn tells_of_volume(&self) -> bool {
        let Ok(files) = read_all(&self.node.target().join("..data")) else {
            return false;
        };
        let files = files.into_iter().map(|(name, content)| {
            let version = version(&String::from_utf8_lossy(&content));
            json!({"id": format!("secret/{name}"), "version": version})
        });
        let files: Vec<Value> = files.collect();
        matches!(&self.node.api().all(STATUSES)[..], [status] if status["status"]["objects"] == json!(files))
    }

    /// Has another node write the new content to the Secret, unless the Secret has it.
    async fn overtake(&self) {
        self.overtake_with(self.version).await;
    }

    /// The same with the values of a version.
    async fn overtake_with(&self, version: u32) {
        let (Some(secret), Some(order)) = (self.node.secret("creds"), &self.elsewhere) else {
            return;
        };
        let now = secret["metadata"]["annotations"][ORDER].as_str();
        let now: Option<u64> = now.and_then(|now| now.parse().ok());
        if now >= order.parse().ok() {
            return;
        }
        let annotations = json!({ORDER: order});
        let change = json!({
            "metadata": {"annotations": annotations}, "data": self.secret_data_of("creds", version),
        });
        self.node.patch_secret("creds", &change).await;
        self.node.look_at_secret();
    }

    /// Takes back a file that the provider has written, as if it had not come to it yet.
    fn interrupt_provider(&self) {
        if self.operation.is_first_of_written() {
            let _not_yet = fs::remove_file(self.node.target().join("pw"));
        }
    }

    /// Starts a container that reads the volume, unless it runs. Nothing is promised to readers of files
    /// that the provider writes.
    fn start_pod(&mut self) -> Result<(), String> {
        if self.node.has_pod() || self.operation.is_written() {
            return Ok(());
        }
        self.node.start_pod()
    }

    fn is_to_go(&self) -> bool {
        matches!(
            self.then,
            Then::Unpublish | Then::Replaced | Then::Meanwhile(Meanwhile::Unpublished)
        ) || self.operation.is_unpublish()
    }

    fn is_refused(&self) -> bool {
        self.operation.is_refused() && self.then == Then::Again
    }

    /// Makes a call for a volume that is mounted in a form that the driver refuses. kubelet forgets a volume after an
    /// answer that is final, and never unpublishes it.
    pub(crate) async fn refused_form_is_not_final(&self) -> Result<(), String> {
        match self.node.publish_without_pod().await {
            Err(status) if is_final(status.code()) => {
                Err(format!("kubelet forgets a mounted volume after {status}"))
            }
            _ => Ok(()),
        }
    }

    /// Publishes as kubelet does, which tries again unless the answer is final.
    async fn publish(&self) -> Result<(), String> {
        let started = Instant::now();
        loop {
            let status = match self.node.publish().await {
                Ok(()) if self.is_refused() => return Err("it is published all the same".into()),
                Ok(()) => return Ok(()),
                Err(status) => status,
            };
            let is_final = is_final(status.code());
            let is_expected = self.is_refused() && status.message().contains("refused by the test");
            if is_expected && (!is_final || !self.node.target().exists()) {
                return Ok(());
            }
            if is_final || started.elapsed() > PATIENCE {
                return Err(format!("kubelet's next attempt is answered with {status}"));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn unpublish(&self) -> Result<(), String> {
        let started = Instant::now();
        while let Err(status) = self.node.unpublish().await {
            if started.elapsed() > PATIENCE {
                return Err(format!("the volume cannot be unpublished: {status}"));
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Lets the pod run for a while, with another look of kubelet.
    async fn settle(&mut self) -> Result<(), String> {
        if self.is_refused() && self.operation.is_first() {
            return Ok(());
        }
        self.start_pod()?;
        if let Some(status) = self.node.status_of_namesake() {
            return Err(format!("the status goes with the earlier pod: {status}"));
        }
        until("the Secrets are as they should be", || self.has_secrets()).await?;
        self.former_content_goes().await?;
        if matches!(
            self.operation,
            Operation::RefusedRefresh | Operation::RecoveredRefresh | Operation::AskedAfterFailure
        ) {
            until("the pod is told whether refreshes fail", || self.is_told()).await?;
        }
        Ok(())
    }

    /// Returns whether event and pod status say that refreshes fail, as long as they do. The driver writes
    /// both in the background.
    fn is_told(&self) -> bool {
        let mut events = self.node.api().all("events").into_iter();
        if self.is_refused() {
            self.is_stale() && events.any(|event| event["reason"] == "MountRotationFailed")
        } else {
            !self.is_stale()
        }
    }

    /// Returns whether the pod status says that refreshes fail.
    fn is_stale(&self) -> bool {
        let annotation = "/metadata/annotations/secrets-store.csi.k8s.io~1stale-since";
        let is_stale = |status: &Value| status.pointer(annotation).is_some();
        self.node.api().all(STATUSES).iter().any(is_stale)
    }

    /// Waits until nothing but the present content is left in the volume, with further looks of kubelet.
    async fn former_content_goes(&self) -> Result<(), String> {
        let started = Instant::now();
        loop {
            self.node.age_content();
            self.publish().await?;
            let contents = usize::from(!self.operation.is_written());
            if self.node.generations().len() == contents {
                return Ok(());
            }
            if started.elapsed() > PATIENCE {
                return Err("content from before stays".to_owned());
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// The time before the driver asks whether the pod is still there, ten seconds after the call to the provider, and the
/// time around that. The provider answers after both.
const BEFORE_LOOK_AT_POD: Duration = Duration::from_millis(9_000);
const AROUND_LOOK_AT_POD: Duration = Duration::from_millis(2_000);

/// The time for which kubelet waits for a provider that hangs.
const GIVEN_UP: Duration = Duration::from_millis(700);
/// The time in which a call that was given up has to end. Ten seconds are documented (docs/rotation.md).
const CANCELLED: Duration = Duration::from_secs(25);

/// The time in which an unpublish ends a call to a provider that hangs.
const ENDED: Duration = Duration::from_secs(8);

/// The annotation of a Secret with the order of its content (docs/secrets.md).
const ORDER: &str = "secrets-store.csi.k8s.io/content-order";

/// Returns whether kubelet takes an answer for the end of a volume: it removes the volume's directory then, and never
/// unpublishes it.
fn is_final(code: Code) -> bool {
    !matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    )
}
