//! Makes a Secret anew, because its type has to change and the type of a Secret cannot.
//!
//! Nothing is deleted before the API server has said that it would take the new Secret, in a
//! trial (a dry run) that passes through all rules and all webhooks. What comes after that is done
//! by a task of its own, so that it is finished when whoever asked for it has gone. If the new
//! Secret is refused all the same, the former one is put back as it was, and says which type it
//! could not get: from then on it is left alone until the class asks for another type, or until
//! somebody takes that annotation away.

use std::time::Duration;

use kube::{
    api::{DeleteParams, GetParams, PostParams, Preconditions},
    core::Request,
};
use serde::{Serialize, de::IgnoredAny};
use tokio::time::sleep;
use zeroize::Zeroizing;

use super::{
    Cluster, Failure, Kept, REFUSED_TYPE, Refusal, Wanted, decision::Existing, owners::MANAGER,
    path,
};
use crate::error::Error;

/// Waits before the next attempt to create a Secret, where the last one had no clear answer.
const WAITS: [Duration; 6] = [
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
];

/// How often a former Secret is tried to be put back, with the waits above one after the other.
const ROUNDS: usize = 3;

/// Everything that the task needs, owned by it.
struct Replacement {
    cluster: Cluster,
    namespace: String,
    name: String,
    only_this: DeleteParams,
    new: Zeroizing<Vec<u8>>,
    former: Zeroizing<Vec<u8>>,
}

/// What became of an attempt to create a Secret.
enum Created {
    /// It is there: made by this attempt, or by somebody else meanwhile.
    Yes,
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
        existing: &Existing,
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
        let new = body(&wanted.object(Some(existing))?)?;
        let trial = PostParams {
            dry_run: true,
            field_manager: Some(MANAGER.to_owned()),
        };
        match self.create(wanted.namespace, &new, &trial).await {
            Created::Yes => {}
            Created::Refused(refusal) => return Err(type_stays(refusal, "a trial says no")),
            Created::Unclear(refusal) => return Err(refusal),
        }
        let replacement = Replacement {
            cluster: self.clone(),
            namespace: wanted.namespace.to_owned(),
            name: wanted.name.to_owned(),
            only_this: DeleteParams {
                preconditions: Some(Preconditions {
                    uid: existing.metadata.uid.clone(),
                    resource_version: existing.metadata.resource_version.clone(),
                }),
                ..DeleteParams::default()
            },
            new,
            former: body(&existing.object(wanted, wanted.type_))?,
        };
        match self.replacing.spawn(replacement.run()).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Refusal::Failed(Error::unavailable("the driver is ending"))),
            },
        }
    }

    /// Creates a Secret. That one of this name is there already is as good.
    async fn create(&self, namespace: &str, body: &[u8], how: &PostParams) -> Created {
        let request = Request::new(path(namespace)).create(how, body.to_vec());
        match self.ask::<IgnoredAny>(request).await {
            Ok(_) => Created::Yes,
            // In a trial too this is said last, after all rules and webhooks.
            Err(Failure::Refused {
                code: 409, reason, ..
            }) if reason == "AlreadyExists" => Created::Yes,
            Err(failure) => match Refusal::from(failure) {
                refusal @ Refusal::Failed(_) => Created::Unclear(refusal),
                refusal => Created::Refused(refusal),
            },
        }
    }
}

impl Replacement {
    async fn run(self) -> Result<Option<Kept>, Refusal> {
        let request = Request::new(path(&self.namespace)).delete(&self.name, &self.only_this);
        match self.cluster.ask::<IgnoredAny>(request).await {
            Ok(_) => {}
            // Changed or gone since it was read: nothing was deleted.
            Err(Failure::Refused {
                code: 404 | 409, ..
            }) => return Ok(None),
            Err(failure @ Failure::Refused { .. }) => {
                return Err(type_stays(failure.into(), "it cannot be deleted"));
            }
            Err(failure) => {
                if self.is_there().await {
                    return Err(failure.into());
                }
            }
        }
        let refusal = match self.create_at_last(&self.new, 1).await {
            Ok(()) => return Ok(Some(Kept::Recreated)),
            Err(refusal) => refusal,
        };
        match self.create_at_last(&self.former, ROUNDS).await {
            Ok(()) => Err(type_stays(
                refusal,
                "a new one was refused although a trial had said yes, and the former one has been put back",
            )),
            Err(lost) => {
                let (namespace, name) = (&self.namespace, &self.name);
                tracing::error!(namespace, secret = name, refusal = ?lost, "a Secret that was to be made anew could not be put back");
                Err(refusal)
            }
        }
    }

    /// Whether the former Secret is still there after a request to delete it that nobody answered.
    /// While nobody answers it counts as gone: to create it then harms nothing.
    async fn is_there(&self) -> bool {
        for wait in WAITS {
            let request =
                Request::new(path(&self.namespace)).get(&self.name, &GetParams::default());
            match self.cluster.ask::<Existing>(request).await {
                Ok(found) => return found.metadata.deletion_timestamp.is_none(),
                Err(Failure::Refused { code: 404, .. }) => return false,
                Err(_) => sleep(wait).await,
            }
        }
        false
    }

    /// Creates a Secret, again and again while there is no clear answer.
    async fn create_at_last(&self, body: &[u8], rounds: usize) -> Result<(), Refusal> {
        let how = PostParams {
            dry_run: false,
            field_manager: Some(MANAGER.to_owned()),
        };
        let mut waits = std::iter::repeat_n(WAITS, rounds).flatten();
        loop {
            let refusal = match self.cluster.create(&self.namespace, body, &how).await {
                Created::Yes => return Ok(()),
                Created::Refused(refusal) => return Err(refusal),
                Created::Unclear(refusal) => refusal,
            };
            match waits.next() {
                Some(wait) => sleep(wait).await,
                None => return Err(refusal),
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
