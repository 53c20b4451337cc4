//! Asks the provider of a volume for its content.

use std::future::Future;

use tokio::time::{Duration, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{Origin, PublishRequest, TOKENS, Volumes, policy::is_another, threads::blocking};
use crate::{
    cluster::Class,
    error::{Error, Result},
    files::read,
    provider::{MountCall, Reply, Urgency},
    record::{Names, Object, Pod, Record, Writer},
    secret::SecretMap,
};

/// The time between two checks of whether a pod whose provider has not answered is being deleted.
const CHECK_POD_EVERY: Duration = Duration::from_secs(10);

impl Volumes {
    /// Asks the provider for the content of a new volume.
    pub(super) async fn ask_first(
        &self,
        class: &Class,
        request: &PublishRequest,
        cancelled: &CancellationToken,
    ) -> Result<Reply> {
        let ask = self.ask_provider(request, class, &[], Urgency::FirstMount);
        self.while_needed(&request.pod, cancelled, ask).await
    }

    /// Asks the provider of a published volume. If the class allows it, and the content is whole and
    /// of this class, the provider is told which versions are mounted. Some providers need more
    /// rights for that or answer wrongly, so that a failure is followed by a call without versions.
    pub(super) async fn ask_again(
        &self,
        record: &Record,
        class: &Class,
        sends_versions: bool,
        request: &PublishRequest,
        cancelled: &CancellationToken,
    ) -> Result<Reply> {
        let mut versions: &[Object] = &[];
        if !is_another(&record.class, &class.identity)
            && record.files.is_some()
            && self.names(request, sends_versions).await == record.files
        {
            versions = &record.objects;
        }
        let ask = self.ask_provider(request, class, versions, Urgency::Refresh);
        let reply = self.while_needed(&request.pod, cancelled, ask).await;
        if versions.is_empty() {
            return reply;
        }
        let mounted = record.files.as_ref().map_or(0, |names| names.files);
        match &reply {
            Err(error) => {
                tracing::info!(%error, "the provider failed when it was sent the mounted versions; asking again without versions");
            }
            // The provider left out what is mounted already; but an answer is the whole content.
            Ok(reply) if record.writer == Writer::Driver && reply.files.len() < mounted => {
                tracing::info!(
                    "the provider, which was sent the mounted versions, answered with fewer files than are mounted; asking again without versions"
                );
            }
            Ok(_) => return reply,
        }
        // An answer holds memory until it is dropped.
        drop(reply);
        let ask = self.ask_provider(request, class, &[], Urgency::Refresh);
        self.while_needed(&request.pod, cancelled, ask).await
    }

    /// Returns the names of the files of a volume whose class sends versions to the provider.
    /// Returns nothing for other classes, and if the names cannot be read: then no versions are sent.
    pub(super) async fn names(
        &self,
        request: &PublishRequest,
        sends_versions: bool,
    ) -> Option<Names> {
        if !sends_versions {
            return None;
        }
        let volume = request.target.as_path().to_owned();
        let names = blocking(move || read::all_names(&volume)).await;
        names
            .inspect_err(|error| tracing::debug!(%error, "no versions are sent to the provider"))
            .map(|(files, digest)| Names { files, digest })
            .ok()
    }

    async fn ask_provider(
        &self,
        request: &PublishRequest,
        class: &Class,
        current: &[Object],
        urgency: Urgency,
    ) -> Result<Reply> {
        let failed = |error: Error| {
            error.context(format_args!(
                "failed to mount secrets store objects for pod {}",
                request.pod
            ))
        };
        let no_json = |error| {
            failed(Error::internal(format!(
                "the request cannot be written as JSON: {error}"
            )))
        };
        let secrets = if request.secrets.is_empty() {
            "null".to_owned().into()
        } else {
            request.secrets.expose_json().map_err(no_json)?
        };
        let attributes = attributes(class, request);
        self.providers
            .mount(MountCall {
                provider: &class.provider,
                namespace: &request.pod.namespace,
                class: &request.class,
                attributes: attributes.expose_json().map_err(no_json)?,
                with_tokens: attributes.expose(TOKENS).is_some(),
                secrets,
                target: request.target.as_path(),
                current,
                urgency,
                deadline: request.deadline,
            })
            .await
            .map_err(failed)
    }

    /// Awaits a provider's answer until the publish is cancelled or the pod is being deleted. kubelet
    /// does not unpublish a volume before its publish has ended, so the API server is asked for that.
    async fn while_needed(
        &self,
        pod: &Pod,
        cancelled: &CancellationToken,
        ask: impl Future<Output = Result<Reply>>,
    ) -> Result<Reply> {
        let leaves = async {
            loop {
                sleep(CHECK_POD_EVERY).await;
                if matches!(self.cluster.is_alive(pod).await, Ok(false)) {
                    break;
                }
            }
            tracing::info!(pod = %pod, "the pod is being deleted; its provider is not waited for");
            cancelled.cancel();
        };
        let (ask, leaves) = (unless(cancelled, Box::pin(ask)), Box::pin(leaves));
        tokio::pin!(ask);
        tokio::select! {
            reply = &mut ask => return reply,
            () = leaves => {}
        }
        ask.await
    }
}

/// Returns what a provider is told: the class's parameters, the volume's attributes over them, and
/// the tokens, in the order in which upstream merges them (`NodePublishVolume` in
/// `pkg/secrets-store/nodeserver.go`). A parameter under a key of kubelet is not passed on.
fn attributes(class: &Class, request: &PublishRequest) -> SecretMap {
    let mut attributes: SecretMap = class
        .parameters
        .iter()
        .filter(|(key, _)| Origin::of(key) == Origin::User)
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    attributes.extend(&request.attributes);
    if let Some(tokens) = &request.tokens {
        attributes.insert(TOKENS, tokens.as_str());
    }
    attributes
}

/// Awaits a step until the publish is cancelled.
///
/// # Errors
/// The step's error, or CANCELLED.
pub(super) async fn unless<T>(
    cancelled: &CancellationToken,
    step: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        () = cancelled.cancelled() => Err(Error::new(Code::Cancelled, "the publish was cancelled: its caller went away, its pod is being deleted, or the volume is being unpublished")),
        result = step => result,
    }
}
