//! Replaces a Secret whose type has to change, because the type of a Secret is immutable.
//!
//! Nothing is deleted before the API server has accepted the new Secret in a dry run, which passes
//! through all its rules and webhooks. The deletion and what follows run in a task of their own,
//! which is finished even if the caller has given up. If the new Secret is refused all the same, the
//! former one is put back as it was, annotated with the type that was refused. It is left alone
//! until the class asks for another type, or until somebody removes the annotation.
//!
//! If the API server accepts neither, or does not answer, the Secret is missing for a while. Each
//! later check tries again in the background, as long as a pod needs the Secret, and adds what others
//! had put on the former one. If the process ends before, those labels, annotations and owners are
//! lost: the next process creates the Secret as the class asks for it.

use std::{sync::Arc, time::Duration};

use kube::{
    api::{DeleteParams, GetParams, PostParams, Preconditions},
    core::Request,
};
use serde::{Serialize, de::IgnoredAny};
use tokio::time::{Instant, sleep, timeout};
use zeroize::Zeroizing;

use super::{
    super::request::Failure,
    Cluster, DesiredSecret, REFUSED_TYPE, Reconciled, SyncError,
    error::{ErrorType, error_type},
    missing::Replacing,
    object::Existing,
    owners::MANAGER,
    path,
    refusal::{Subject, describe},
};
use crate::quoted::quoted;

/// The waits before further attempts to create a Secret, after an attempt without a clear answer.
const WAITS: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

/// The time in which attempts begin. After that, the next check of the Secret tries again.
const ATTEMPTS_WITHIN: Duration = Duration::from_secs(5);

/// The time for which a caller waits for the task. Other Secrets of the namespace wait for the
/// caller.
const CALLER_WAIT: Duration = Duration::from_secs(4);

/// A Secret that is being replaced, with everything that the task needs.
struct Replacement {
    cluster: Cluster,
    key: (String, String),
    type_: String,
    new: Zeroizing<Vec<u8>>,
    former: Zeroizing<Vec<u8>>,
}

/// The result of an attempt to create a Secret.
enum Created {
    Yes(Box<Existing>),
    /// A Secret of this name exists: created by another client, or by an attempt whose answer got
    /// lost.
    Exists,
    /// The API server refuses it.
    Refused(Failure),
    /// There was no clear answer.
    Unclear(Failure),
}

/// The Secret that is there at the end of a replacement.
enum Replaced {
    /// The new one.
    New,
    /// A new one, of another type than was asked for.
    OtherType(Box<Existing>),
    /// The former one, because the new one was refused.
    PutBack(Failure),
    /// One that another client has created.
    Other,
    /// None, for this reason.
    Missing(String),
}

impl Cluster {
    /// Replaces an existing Secret by a new one, which keeps what others have put on it. Returns
    /// `None` if the Secret changed since it was read.
    ///
    /// # Errors
    /// Fails if the new Secret is refused; the existing one is there as before then. Fails without a
    /// clear answer, too; the Secret may be missing for now then.
    pub(super) async fn replace(
        &self,
        desired: &DesiredSecret<'_>,
        existing: &Arc<Existing>,
    ) -> Result<Option<Reconciled>, SyncError> {
        if existing.annotation(REFUSED_TYPE).map(String::as_str) == Some(desired.type_) {
            let (namespace, name) = (desired.namespace, desired.name);
            return Err(SyncError::type_stays(
                desired.type_,
                format_args!(
                    "a new Secret of that type has been refused before, and the former one was put back. To try again: kubectl annotate secret -n {namespace} {name} {REFUSED_TYPE}-"
                ),
            ));
        }
        if let Some(finalizer) = existing.metadata.finalizers.iter().flatten().next() {
            return Err(SyncError::type_stays(
                desired.type_,
                format_args!(
                    "finalizer {} keeps the Secret from being deleted",
                    quoted(finalizer, 100)
                ),
            ));
        }
        let replacement = self.replacement(desired, existing)?;
        let dry_run = PostParams {
            dry_run: true,
            field_manager: Some(MANAGER.to_owned()),
        };
        let tried = self.create(desired.namespace, &replacement.new, &dry_run);
        match tried.await {
            // The API server looks for the name last, after all rules and webhooks.
            Created::Yes(_) | Created::Exists => {}
            Created::Refused(failure) => {
                return Err(replacement.type_stays(failure, "the dry run was refused"));
            }
            Created::Unclear(failure) => return Err(replacement.error(failure)),
        }
        let only_this = DeleteParams {
            preconditions: Some(Preconditions {
                uid: existing.metadata.uid.clone(),
                resource_version: existing.metadata.resource_version.clone(),
            }),
            ..DeleteParams::default()
        };
        self.missing.begin(&replacement.key, existing)?;
        self.in_background(replacement, Some(only_this)).await
    }

    /// Creates a Secret that this process has deleted and that is still missing, with what others
    /// had put on the former one. Returns `None` if another client has created it.
    ///
    /// # Errors
    /// Fails if the new Secret is refused and the former one put back, or if it stays missing for now.
    pub(super) async fn recreate(
        &self,
        desired: &DesiredSecret<'_>,
        former: &Existing,
    ) -> Result<Option<Reconciled>, SyncError> {
        let replacement = self.replacement(desired, former)?;
        self.missing.set_step(&replacement.key, Replacing::Creating);
        self.in_background(replacement, None).await
    }

    fn replacement(
        &self,
        desired: &DesiredSecret<'_>,
        former: &Existing,
    ) -> Result<Replacement, SyncError> {
        let former_again = former.to_put_back((desired.namespace, desired.name), desired.type_);
        Ok(Replacement {
            cluster: self.clone(),
            key: desired.key(),
            type_: desired.type_.to_owned(),
            new: body(&desired.object(Some(former))?)?,
            former: body(&former_again)?,
        })
    }

    /// Runs a replacement to its end in a task, and waits for it for a while.
    async fn in_background(
        &self,
        replacement: Replacement,
        delete: Option<DeleteParams>,
    ) -> Result<Option<Reconciled>, SyncError> {
        let (key, type_) = (replacement.key.clone(), replacement.type_.clone());
        let task = self.replacing.spawn(replacement.run(delete));
        match timeout(CALLER_WAIT, task).await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(SyncError::unavailable("the driver is ending")),
            },
            Err(_) => match self.missing.find(&key) {
                Some((step, _)) => Err(step.error(&key.0, &type_)),
                None => Ok(None),
            },
        }
    }

    async fn create(&self, namespace: &str, body: &[u8], how: &PostParams) -> Created {
        let request = Request::new(path(namespace)).create(how, body.to_vec());
        match self.ask::<Existing>(request).await {
            Ok(stored) => Created::Yes(Box::new(stored)),
            Err(Failure::Refused {
                code: 409, reason, ..
            }) if reason == "AlreadyExists" => Created::Exists,
            Err(failure) if error_type(&failure) == ErrorType::Unavailable => {
                Created::Unclear(failure)
            }
            Err(failure) => Created::Refused(failure),
        }
    }
}

impl Replacement {
    /// Deletes the former Secret, if that is still to be done, and creates the new one. The Secret
    /// counts as missing until one of the two is there.
    async fn run(self, delete: Option<DeleteParams>) -> Result<Option<Reconciled>, SyncError> {
        let missing = &self.cluster.missing;
        if let Some(only_this) = delete {
            match self.delete(&only_this).await {
                Ok(true) => missing.set_step(&self.key, Replacing::Creating),
                stays => {
                    missing.remove(&self.key);
                    return stays.map(|_| None);
                }
            }
        }
        match self.create_either().await {
            Replaced::New => {
                missing.remove(&self.key);
                Ok(Some(Reconciled::Recreated))
            }
            Replaced::OtherType(stored) => {
                missing.remove(&self.key);
                Err(self.cluster.note_type(&self.type_, &stored).await)
            }
            Replaced::PutBack(failure) => {
                missing.remove(&self.key);
                Err(self.type_stays(
                    failure,
                    "the new Secret was refused although the dry run had succeeded, and the former one has been put back",
                ))
            }
            // The next attempt adds what the former one had.
            Replaced::Other => {
                missing.set_step(&self.key, Replacing::Failed("it kept changing".to_owned()));
                Ok(None)
            }
            Replaced::Missing(why) => {
                let step = Replacing::Failed(why);
                missing.set_step(&self.key, step.clone());
                Err(step.error(&self.key.0, &self.type_))
            }
        }
    }

    /// Deletes the former Secret. Returns `false` if it has changed or gone since it was read.
    async fn delete(&self, only_this: &DeleteParams) -> Result<bool, SyncError> {
        let (namespace, name) = &self.key;
        let request = Request::new(path(namespace)).delete(name, only_this);
        match self.cluster.ask::<IgnoredAny>(request).await {
            Ok(_) => Ok(true),
            Err(Failure::Refused {
                code: 404 | 409, ..
            }) => Ok(false),
            Err(failure @ Failure::Refused { .. }) => {
                Err(self.type_stays(failure, "it cannot be deleted"))
            }
            Err(failure) if self.is_there(only_this).await => Err(failure.into()),
            Err(_) => Ok(true),
        }
    }

    /// Creates the new Secret, or else the former one.
    async fn create_either(&self) -> Replaced {
        let refused = match self.create_at_last(&self.new).await {
            Created::Yes(stored) if stored.type_ != self.type_ => {
                return Replaced::OtherType(stored);
            }
            Created::Yes(_) => return Replaced::New,
            Created::Exists => return Replaced::Other,
            Created::Unclear(failure) => {
                return Replaced::Missing(self.error(failure).to_string());
            }
            Created::Refused(failure) => failure,
        };
        match self.create_at_last(&self.former).await {
            Created::Yes(_) => Replaced::PutBack(refused),
            Created::Exists => Replaced::Other,
            Created::Refused(_) | Created::Unclear(_) => Replaced::Missing(self.describe(&refused)),
        }
    }

    /// Returns whether the former Secret is still there, after a request to delete it that got no
    /// answer. Another node may have made another Secret of the name since. Without an answer to this
    /// either, it counts as gone: creating it then does no harm.
    async fn is_there(&self, deleted: &DeleteParams) -> bool {
        let uid = deleted
            .preconditions
            .as_ref()
            .and_then(|only| only.uid.as_ref());
        let (namespace, name) = &self.key;
        for wait in WAITS {
            let how = GetParams::default();
            match self.cluster.existing(namespace, name, &how).await {
                Ok(Some(found)) => {
                    return found.metadata.uid.as_ref() == uid
                        && found.metadata.deletion_timestamp.is_none();
                }
                Ok(None) => return false,
                Err(_) => sleep(wait).await,
            }
        }
        false
    }

    /// Creates a Secret, with further attempts while there is no clear answer.
    async fn create_at_last(&self, body: &[u8]) -> Created {
        let how = PostParams {
            dry_run: false,
            field_manager: Some(MANAGER.to_owned()),
        };
        let started = Instant::now();
        let mut waits = WAITS.into_iter();
        loop {
            let created = self.cluster.create(&self.key.0, body, &how).await;
            match (created, waits.next()) {
                (Created::Unclear(_), Some(wait)) if started.elapsed() + wait < ATTEMPTS_WITHIN => {
                    sleep(wait).await;
                }
                (created, _) => return created,
            }
        }
    }

    /// Converts a failure: the type stays as it is if the Secret is refused. Missing permissions and
    /// failures that may pass say nothing about the type.
    fn type_stays(&self, failure: Failure, step: &str) -> SyncError {
        match error_type(&failure) {
            ErrorType::Refused => SyncError::type_stays(
                &self.type_,
                format_args!("{step}: {}", self.describe(&failure)),
            ),
            _ => self.error(failure),
        }
    }

    fn error(&self, failure: Failure) -> SyncError {
        self.about_it(|subject| SyncError::refused(failure, subject))
    }

    fn describe(&self, failure: &Failure) -> String {
        self.about_it(|subject| describe(failure, subject))
    }

    /// Calls a function with what a refusal is about: the values of the new Secret and of the former
    /// one. They are read from the bodies, so that there are no copies until something is refused.
    fn about_it<T>(&self, tell: impl FnOnce(Option<&Subject<'_>>) -> T) -> T {
        let read = |body: &[u8]| serde_json::from_slice::<Existing>(body).ok();
        let (Some(new), Some(former)) = (read(&self.new), read(&self.former)) else {
            return tell(None);
        };
        let (namespace, name) = &self.key;
        tell(Some(&Subject {
            namespace,
            name,
            values: new.values().chain(former.values()).collect(),
        }))
    }
}

fn body(object: &impl Serialize) -> Result<Zeroizing<Vec<u8>>, SyncError> {
    let body = serde_json::to_vec(object);
    body.map(Zeroizing::new)
        .map_err(|_| SyncError::unavailable("the Secret cannot be written as JSON"))
}
