//! What happens to a volume and its Secrets while a thread of the driver is held after a step.
//!
//! Nobody is stopped here, so that nothing may need another attempt: once the thread goes on, Secret, volume and pod
//! status belong together without a further call of kubelet. In the end all is as if it had happened after the
//! operation.

use std::{fmt, sync::Arc};

use embedded::api::Disturbance;
use serde_json::{Value, json};
use tokio::time::{Duration, sleep};

use super::{Operation, Run, Then, store::secret};
use crate::{
    node::{Odd, data, until},
    reader::read_all,
    tracer::Traced,
};

/// The time for which a thread is held: others come as far as they can without it.
const HOLD: Duration = Duration::from_millis(150);
/// The same, so that a check of Secrets is made meanwhile.
const HOLD_FOR_CHECK: Duration = Duration::from_millis(1_300);
/// The time for which the API server is away, longer than the thread is held.
const AWAY: Duration = Duration::from_millis(700);
/// The time in which the driver checks Secrets twice.
const TWO_CHECKS: Duration = Duration::from_millis(2_300);
/// The time within which a thread comes to its step, or it will not.
const COMES: Duration = Duration::from_secs(8);
/// The interval in which the driver checks Secrets: longer than most operations take.
pub(super) const CHECKS: &str = "1s";

/// What happens meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Meanwhile {
    /// kubelet makes its call once more.
    CalledAgain,
    /// kubelet gives its call up.
    GivenUp,
    /// Another pod of the same class comes and goes.
    Visited,
    /// The pod has gone, and kubelet unpublishes the volume.
    Unpublished,
    /// Somebody deletes the Secret.
    SecretDeleted,
    /// Somebody changes the Secret.
    SecretAltered,
    /// Somebody deletes the pod status.
    StatusDeleted,
    /// An edit of the class asks for another Secret.
    ClassEdited,
    /// The store has other values.
    StoreChanged,
    /// A node that has the new content, too, writes it to the Secret.
    Elsewhere,
    /// The driver checks the class and its Secrets.
    Checked,
    /// Somebody unmounts the volume.
    Unmounted,
    /// The API server goes away, and comes back.
    ApiAway,
    /// The API server's cache has the objects of before the operation, for two checks.
    ApiPast,
    /// The API server fails to read the class, for two checks.
    NoClass,
}

impl Meanwhile {
    /// Whether pods may be told of trouble with the API server.
    pub(crate) fn is_trouble(self) -> bool {
        matches!(self, Self::ApiAway | Self::ApiPast | Self::NoClass)
    }
}

impl fmt::Display for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CalledAgain => "called again",
            Self::GivenUp => "given up",
            Self::Visited => "visited",
            Self::Unpublished => "unpublished",
            Self::SecretDeleted => "Secret deleted",
            Self::SecretAltered => "Secret altered",
            Self::StatusDeleted => "status deleted",
            Self::ClassEdited => "class edited",
            Self::StoreChanged => "store changed",
            Self::Elsewhere => "written elsewhere",
            Self::Checked => "checked",
            Self::Unmounted => "unmounted",
            Self::ApiAway => "API server away",
            Self::ApiPast => "API server in the past",
            Self::NoClass => "class not read",
        })
    }
}

impl Operation {
    /// Returns what may happen during the operation.
    pub(crate) fn meanwhile(self) -> Vec<Then> {
        use Meanwhile::{
            ApiAway, ApiPast, CalledAgain, Checked, ClassEdited, Elsewhere, GivenUp, NoClass,
            SecretAltered, SecretDeleted, StatusDeleted, StoreChanged, Unmounted, Unpublished,
            Visited,
        };
        let all: &[Meanwhile] = match self {
            Self::Publish => &[
                Unmounted,
                Visited,
                CalledAgain,
                GivenUp,
                Unpublished,
                SecretDeleted,
                SecretAltered,
                ClassEdited,
                StoreChanged,
                Checked,
                ApiAway,
                ApiPast,
                NoClass,
            ],
            // Each takes long, and much is as with an edited class.
            Self::RefreshOfNewClass => &[Checked, ApiPast, NoClass],
            Self::RefreshOfEditedClass => &[
                Visited,
                CalledAgain,
                GivenUp,
                Unpublished,
                SecretDeleted,
                SecretAltered,
                ClassEdited,
                StoreChanged,
                Checked,
                ApiAway,
                ApiPast,
                NoClass,
            ],
            Self::Refresh => &[
                Visited,
                CalledAgain,
                GivenUp,
                Unpublished,
                SecretDeleted,
                SecretAltered,
                StatusDeleted,
                ClassEdited,
                StoreChanged,
                Elsewhere,
                Checked,
                ApiAway,
                ApiPast,
            ],
            Self::RefreshWithOtherType => &[
                CalledAgain,
                SecretDeleted,
                SecretAltered,
                Checked,
                ApiAway,
                ApiPast,
            ],
            Self::PublishOfBarePod | Self::RefreshOfBarePod => {
                &[Unpublished, StatusDeleted, SecretDeleted]
            }
            // A provider that is asked writes its files also when the volume is not there any more.
            Self::PublishOfWrittenFiles | Self::RefreshOfWrittenFiles => &[CalledAgain, GivenUp],
            Self::Unpublish => &[Visited, CalledAgain, GivenUp],
            Self::UnpublishOfBarePod => &[CalledAgain, GivenUp],
            Self::DeletedSecret | Self::AlteredSecret => &[
                CalledAgain,
                Unpublished,
                SecretDeleted,
                SecretAltered,
                ApiAway,
                ApiPast,
            ],
            Self::ClassWithAnotherSecret => &[
                CalledAgain,
                Unpublished,
                SecretDeleted,
                ApiAway,
                ApiPast,
                NoClass,
            ],
            _ => &[],
        };
        all.iter().copied().map(Then::Meanwhile).collect()
    }
}

impl Run {
    /// Does the operation, and has something happen while it is held at its step, or else after it.
    pub(crate) async fn disturb(
        &mut self,
        meanwhile: Meanwhile,
        traced: &Arc<Traced>,
        is_held: bool,
    ) -> Result<(), String> {
        if meanwhile == Meanwhile::Unpublished {
            self.node.end_pod().await;
        }
        self.begin();
        if is_held {
            self.expect(meanwhile);
            self.meet(meanwhile, traced).await?;
        } else {
            self.finish().await?;
            traced.disarm();
            self.expect(meanwhile);
            self.happens(meanwhile).await?;
            if meanwhile == Meanwhile::Unmounted {
                self.publish().await?;
            }
        }
        if meanwhile == Meanwhile::Unpublished {
            return self.is_gone().await;
        }
        self.belongs_together(meanwhile).await
    }

    /// Has something happen as soon as a thread is held, and lets it go on then.
    async fn meet(&self, meanwhile: Meanwhile, traced: &Arc<Traced>) -> Result<(), String> {
        let mut operation = Box::pin(async {
            match meanwhile {
                // Nothing comes after the answer about a volume that is gone.
                Meanwhile::Unpublished if !self.operation.is_by_itself() => self.call().await,
                _ => self.finish().await,
            }
        });
        let ended = tokio::select! {
            ended = &mut operation => Some(ended),
            () = comes(traced) => None,
        };
        let hold = match meanwhile {
            Meanwhile::Checked => HOLD_FOR_CHECK,
            _ => HOLD,
        };
        let let_go = async {
            sleep(hold).await;
            traced.release();
        };
        if let Some(ended) = ended {
            traced.release();
            self.happens(meanwhile).await?;
            return ended;
        }
        let is_given_up = match meanwhile {
            Meanwhile::GivenUp => true,
            // Nobody waits for a Secret of a pod that has gone.
            Meanwhile::Unpublished => self.operation.is_by_itself(),
            _ => false,
        };
        if is_given_up {
            drop(operation);
            let (happened, ()) = tokio::join!(self.happens(meanwhile), let_go);
            return happened;
        }
        // The last look at the mount comes before that.
        let is_recorded = traced.has_step("write /state/csi-1.N.tmp #2");
        let (happened, (), ended) = tokio::join!(self.happens(meanwhile), let_go, operation);
        happened?;
        match meanwhile {
            // kubelet tries again, or looks again.
            Meanwhile::Unmounted if ended.is_err() || is_recorded => self.publish().await,
            Meanwhile::Unmounted if read_all(&self.node.target().join("..data")).is_err() => {
                Err("it is published without content".to_owned())
            }
            // The call of a pod that has gone may be answered with anything.
            Meanwhile::Unpublished => Ok(()),
            // kubelet tries again what has failed without an API server.
            trouble if trouble.is_trouble() && ended.is_err() && !self.operation.is_by_itself() => {
                self.publish().await
            }
            _ => ended,
        }
    }

    /// Changes what is expected in the end.
    fn expect(&mut self, meanwhile: Meanwhile) {
        match meanwhile {
            // What somebody else has applied goes with it.
            Meanwhile::SecretDeleted => self.adorned = None,
            Meanwhile::StatusDeleted => self.pod_status_goes(),
            Meanwhile::ClassEdited => {
                let another = secret("more", "Opaque", &[("db/password", "db")]);
                self.class.secret_objects = json!([self.class.secret_objects[0], another]);
                self.class.generation += 1;
            }
            Meanwhile::StoreChanged => self.expect_store(),
            _ => {}
        }
    }

    /// Has it happen.
    async fn happens(&self, meanwhile: Meanwhile) -> Result<(), String> {
        match meanwhile {
            Meanwhile::CalledAgain if self.operation.is_unpublish() => self.unpublish().await?,
            Meanwhile::CalledAgain => self.publish().await?,
            Meanwhile::GivenUp | Meanwhile::Checked => {}
            Meanwhile::ApiAway => {
                self.node.api().disturb(Disturbance::Refuse);
                sleep(AWAY).await;
                self.node.api().disturb(Disturbance::None);
            }
            Meanwhile::Unmounted => self.node.unmount(),
            Meanwhile::ApiPast | Meanwhile::NoClass => {
                self.node.set_answers(match meanwhile {
                    Meanwhile::ApiPast => Odd::Past,
                    _ => Odd::NoClass,
                });
                sleep(TWO_CHECKS).await;
                self.node.set_answers(Odd::Nothing);
            }
            Meanwhile::Visited => {
                let visited = self.node.visit().await;
                visited.map_err(|status| format!("the other pod is answered with {status}"))?;
            }
            Meanwhile::Unpublished => self.unpublish().await?,
            Meanwhile::SecretDeleted => {
                self.expect_altered(None);
                self.node.remove_secret("creds");
            }
            Meanwhile::SecretAltered => {
                // The driver may write it, too.
                while let Some(mut altered) = self.node.secret("creds") {
                    altered["data"]["pw"] = json!("bWVhbndoaWxl");
                    self.expect_altered(Some(&altered));
                    if self.node.replace_secret("creds", &altered).await {
                        break;
                    }
                }
            }
            Meanwhile::StatusDeleted => self.node.remove_pod_statuses(),
            Meanwhile::ClassEdited => self.put_class(),
            Meanwhile::StoreChanged => self.serve_store(),
            Meanwhile::Elsewhere => self.overtake().await,
        }
        Ok(())
    }

    /// Expects that the Secret is another one, and then as it is now or will be.
    fn expect_altered(&self, altered: Option<&Value>) {
        self.node.look_at_secret();
        let now = self.node.secret("creds");
        let mut history = self.node.secret.lock().unwrap();
        let newest = history.newest().cloned().flatten();
        history.add(altered.map(data));
        if let Some(now) = now {
            history.add(Some(data(&now)));
        }
        if self.operation == Operation::RefreshWithOtherType {
            // It is deleted and made anew.
            history.add(None);
        }
        history.add(newest);
    }

    /// Looks that nothing is left of a volume that kubelet takes for gone.
    async fn is_gone(&self) -> Result<(), String> {
        sleep(HOLD).await;
        match self.left() {
            left if left.is_empty() => Ok(()),
            left => Err(format!(
                "the unpublish was answered, and there are {left:?}"
            )),
        }
    }

    /// Waits until Secret, volume and pod status belong together, without a call of kubelet.
    async fn belongs_together(&self, meanwhile: Meanwhile) -> Result<(), String> {
        let is_unfinished = meanwhile == Meanwhile::GivenUp && self.operation.is_first();
        if self.operation.is_unpublish() || self.operation.is_written() || is_unfinished {
            return Ok(());
        }
        let has_it = || self.has_secret_of_volume();
        until("the Secret has what is mounted", has_it).await?;
        if meanwhile == Meanwhile::ClassEdited {
            let both = || self.has_secrets();
            until("there are both Secrets of the class", both).await?;
        }
        let tells = || self.tells_of_volume();
        until("the pod status names what is mounted", tells).await?;
        let is_well = || self.node.trouble().is_empty();
        let well = until("the pod status tells of no trouble", is_well).await;
        well.map_err(|why| format!("{why}; it has {:?}", self.node.trouble()))?;
        if self.operation.is_bare() {
            let lives = || self.node.secret_lives_with_status();
            until("the Secret lives with the pod status", lives).await?;
        }
        self.node.look_at_secret();
        Ok(())
    }
}

/// Waits until a thread is held, or will not be.
async fn comes(traced: &Traced) {
    let hit = async {
        while !traced.is_hit() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    let _comes_or_not = tokio::time::timeout(COMES, hit).await;
}
