//! Makes a Secret anew, because its type has to change and the type of a Secret cannot.
//!
//! Nothing is deleted before the API server has said that it would take the new Secret, in a
//! trial (a dry run) that passes through all rules and all webhooks. What comes after that is done
//! by a task of its own, so that it is finished when whoever asked for it has gone. If the new
//! Secret is refused all the same, the former one is put back as it was, and says which type it
//! could not get: from then on it is left alone until the class asks for another type, or until
//! somebody takes that annotation away.
//!
//! Where the API server takes neither, or does not answer, the Secret is missing for a while. Each
//! later look at it tries again in the background, as long as a pod needs it, and what others had
//! put on the former Secret is remembered for that. If the process ends before, their labels and
//! annotations are lost: the next one makes the Secret as the class says.

use std::{sync::Arc, time::Duration};

use kube::{
    api::{DeleteParams, GetParams, PostParams, Preconditions},
    core::Request,
};
use serde::{Serialize, de::IgnoredAny};
use tokio::time::{Instant, sleep, timeout};
use zeroize::Zeroizing;

use super::{
    Cluster, Failure, Kept, REFUSED_TYPE, Refusal, Wanted, decision::Existing, missing::Step,
    owners::MANAGER, path,
};
use crate::error::Error;

/// Waits before the next attempt to create a Secret, where the last one had no clear answer.
const WAITS: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

/// No attempt begins later than this after the first one. The next look tries again.
const ATTEMPTS_LAST: Duration = Duration::from_secs(5);

/// How long a caller waits for the task. Others of its namespace wait for the caller.
const PATIENCE: Duration = Duration::from_secs(4);

/// Everything that the task needs, owned by it.
struct Replacement {
    cluster: Cluster,
    key: (String, String),
    new: Zeroizing<Vec<u8>>,
    former: Zeroizing<Vec<u8>>,
}

/// What became of an attempt to create a Secret.
enum Created {
    /// It was made.
    Yes,
    /// One of this name is there: made by somebody else, or by an attempt without an answer.
    There,
    /// The API server does not take it.
    Refused(Refusal),
    /// There was no clear answer.
    Unclear(Refusal),
}

impl Cluster {
    /// Puts a new Secret in the place of an existing one, with what others had put on that.
    ///
    /// # Errors
    /// When the Secret changed since it was read, as `Ok(None)`; when the new Secret is not taken:
    /// then the existing one is there as before.
    pub(super) async fn replace(
        &self,
        wanted: &Wanted<'_>,
        existing: &Arc<Existing>,
    ) -> Result<Option<Kept>, Refusal> {
        if existing.annotation(REFUSED_TYPE).map(String::as_str) == Some(wanted.type_) {
            return Err(Refusal::TypeStays(format!(
                "a new Secret of that type has been refused before, and the former one was put back. To try again: kubectl annotate secret -n {} {} {REFUSED_TYPE}-",
                wanted.namespace, wanted.name
            )));
        }
        if let Some(finalizer) = existing.metadata.finalizers.iter().flatten().next() {
            return Err(Refusal::TypeStays(format!(
                "finalizer {finalizer:.100?} keeps the Secret from being deleted"
            )));
        }
        let replacement = self.replacement(wanted, existing)?;
        let trial = PostParams {
            dry_run: true,
            field_manager: Some(MANAGER.to_owned()),
        };
        match self
            .create(wanted.namespace, &replacement.new, &trial)
            .await
        {
            // In a trial too this is said last, after all rules and webhooks.
            Created::Yes | Created::There => {}
            Created::Refused(refusal) => return Err(type_stays(refusal, "a trial says no")),
            Created::Unclear(refusal) => return Err(refusal),
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

    /// Makes a Secret that this process has deleted and that is still missing, with what others
    /// had put on the former one.
    ///
    /// # Errors
    /// As [`Self::replace`], and when it stays missing for now.
    pub(super) async fn make_again(
        &self,
        wanted: &Wanted<'_>,
        former: &Existing,
    ) -> Result<Option<Kept>, Refusal> {
        let replacement = self.replacement(wanted, former)?;
        self.missing.is_at(&replacement.key, Step::Making);
        self.in_background(replacement, None).await
    }

    fn replacement(&self, wanted: &Wanted<'_>, former: &Existing) -> Result<Replacement, Refusal> {
        Ok(Replacement {
            cluster: self.clone(),
            key: wanted.key(),
            new: body(&wanted.object(Some(former))?)?,
            former: body(&former.object(wanted, wanted.type_))?,
        })
    }

    /// Runs a replacement to its end, and waits a while for that.
    async fn in_background(
        &self,
        replacement: Replacement,
        delete: Option<DeleteParams>,
    ) -> Result<Option<Kept>, Refusal> {
        let key = replacement.key.clone();
        let task = self.replacing.spawn(replacement.run(delete));
        match timeout(PATIENCE, task).await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Refusal::Failed(Error::unavailable("the driver is ending"))),
            },
            Err(_) => match self.missing.find(&key) {
                Some((step, _)) => Err(step.refusal()),
                None => Ok(None),
            },
        }
    }

    /// Creates a Secret.
    async fn create(&self, namespace: &str, body: &[u8], how: &PostParams) -> Created {
        let request = Request::new(path(namespace)).create(how, body.to_vec());
        match self.ask::<IgnoredAny>(request).await {
            Ok(_) => Created::Yes,
            Err(Failure::Refused {
                code: 409, reason, ..
            }) if reason == "AlreadyExists" => Created::There,
            Err(failure) => match Refusal::from(failure) {
                refusal @ Refusal::Failed(_) => Created::Unclear(refusal),
                refusal => Created::Refused(refusal),
            },
        }
    }
}

impl Step {
    /// What is said of a Secret that is missing.
    pub(super) fn refusal(self) -> Refusal {
        match self {
            Self::Deleting => Refusal::Failed(Error::unavailable(
                "its type is to change, and the API server has not answered the request to delete it yet",
            )),
            Self::Making => Refusal::Missing("the API server has not answered yet".to_owned()),
            Self::Failed(why) => Refusal::Missing(why),
        }
    }
}

impl Replacement {
    /// Deletes the former Secret, if that is still to be done, and makes the new one. The Secret
    /// counts as missing until one of the two is there.
    async fn run(self, delete: Option<DeleteParams>) -> Result<Option<Kept>, Refusal> {
        let missing = &self.cluster.missing;
        if let Some(only_this) = delete {
            match self.delete(&only_this).await {
                Ok(true) => missing.is_at(&self.key, Step::Making),
                stays => {
                    missing.is_there(&self.key);
                    return stays.map(|_| None);
                }
            }
        }
        let made = self.make().await;
        match &made {
            Ok(Some(_)) | Err(Refusal::TypeStays(_)) => missing.is_there(&self.key),
            // One that somebody else has made gets what the former one had.
            Ok(None) => missing.is_at(&self.key, Step::Failed("it kept changing".to_owned())),
            Err(Refusal::Missing(why)) => missing.is_at(&self.key, Step::Failed(why.clone())),
            Err(refusal) => missing.is_at(&self.key, Step::Failed(refusal.said())),
        }
        made
    }

    /// Deletes the former Secret. False: it has changed or gone since it was read.
    async fn delete(&self, only_this: &DeleteParams) -> Result<bool, Refusal> {
        let (namespace, name) = &self.key;
        let request = Request::new(path(namespace)).delete(name, only_this);
        match self.cluster.ask::<IgnoredAny>(request).await {
            Ok(_) => Ok(true),
            Err(Failure::Refused {
                code: 404 | 409, ..
            }) => Ok(false),
            Err(failure @ Failure::Refused { .. }) => {
                Err(type_stays(failure.into(), "it cannot be deleted"))
            }
            Err(failure) => match self.is_there().await {
                true => Err(failure.into()),
                false => Ok(true),
            },
        }
    }

    /// Makes the new Secret, or else the former one. None: one of that name is there.
    async fn make(&self) -> Result<Option<Kept>, Refusal> {
        let refusal = match self.create_at_last(&self.new).await {
            Created::Yes => return Ok(Some(Kept::Recreated)),
            Created::There => return Ok(None),
            Created::Unclear(refusal) => return Err(Refusal::Missing(refusal.said())),
            Created::Refused(refusal) => refusal,
        };
        match self.create_at_last(&self.former).await {
            Created::Yes => Err(type_stays(
                refusal,
                "the new Secret was refused although a trial had succeeded, and the former one has been put back",
            )),
            Created::There => Ok(None),
            Created::Refused(_) | Created::Unclear(_) => Err(Refusal::Missing(refusal.said())),
        }
    }

    /// Whether the former Secret is still there after a request to delete it that nobody answered.
    /// While nobody answers it counts as gone: to create it then harms nothing.
    async fn is_there(&self) -> bool {
        for wait in WAITS {
            let (namespace, name) = &self.key;
            let how = GetParams::default();
            match self.cluster.existing(namespace, name, &how).await {
                Ok(Some(found)) => return found.metadata.deletion_timestamp.is_none(),
                Ok(None) => return false,
                Err(_) => sleep(wait).await,
            }
        }
        false
    }

    /// Creates a Secret, a few times while there is no clear answer.
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
                (Created::Unclear(_), Some(wait)) if started.elapsed() + wait < ATTEMPTS_LAST => {
                    sleep(wait).await;
                }
                (created, _) => return created,
            }
        }
    }
}

/// Says that the type stays as it is, unless the reason is something that passes or that somebody
/// else has to mend.
fn type_stays(refusal: Refusal, how: &str) -> Refusal {
    match refusal {
        Refusal::Invalid(said) => Refusal::TypeStays(format!("{how}: {said}")),
        other => other,
    }
}

fn body(object: &impl Serialize) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    let body = serde_json::to_vec(object);
    body.map(Zeroizing::new)
        .map_err(|_| Refusal::Failed(Error::internal("the Secret cannot be written as JSON")))
}
