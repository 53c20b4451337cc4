//! Sends requests to the API server: a bounded number at a time, each with a time limit.

use std::{error::Error as StdError, future::Future, sync::atomic::Ordering, time::Duration};

use kube::core::Status;
use serde::de::DeserializeOwned;
use tonic::Code;

use super::{Cluster, connection::is_too_long};
use crate::error::{Error, Result};

/// The time limit of one request. It is short against kubelet's two minutes, so that a publish can
/// report what hung.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// The number of requests that run at a time while they are answered soon. Each has a connection,
/// which is reused and takes some 70 KB.
pub(super) const MAX_REQUESTS: usize = 8;

/// The longest time that a request waits for its turn, and that its turn lasts. After that it runs beside
/// the others.
const TURN: Duration = Duration::from_secs(1);

/// The most bytes that are read of an answer. An object takes at most 1.5 MiB in etcd, and the largest
/// answer that is asked for is a list of five classes.
pub(super) const LARGEST_ANSWER: usize = 8 * 1024 * 1024;

/// The number of characters of a message of the API server that are kept. kubelet reads no status of a call that is
/// longer than a few KiB, and an event has room for 1,024 bytes.
const LONGEST_MESSAGE: usize = 2_000;

/// The reason why a request failed.
pub(super) enum Failure {
    /// The API server answered with an error.
    Refused {
        code: u16,
        /// One word.
        reason: String,
        /// A sentence for people. Where a Secret is written, it may quote the content.
        message: String,
        /// The name of the object that the error is about, or empty.
        object: String,
        /// Whether the namespace is being deleted, so that nothing can be created in it.
        namespace_ends: bool,
    },
    /// The API server did not answer.
    NoAnswer(String),
    /// The answer is not the object that was asked for.
    WrongObject,
    /// The answer has more than [`LARGEST_ANSWER`] bytes.
    TooLarge,
}

impl Failure {
    /// Returns whether the API server itself says that there is no object of this name. A proxy in
    /// front of it may answer 404 as well, and so does an API server that does not serve the kind.
    pub(super) fn is_not_found(&self, name: &str) -> bool {
        matches!(self, Self::Refused { code: 404, object, .. } if object == name)
    }

    /// Converts the failure for the caller that waits for this request. 404 and 403 are final,
    /// because the user has to change something; everything else is worth another attempt.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::NoAnswer(why) => {
                Error::unavailable(format!("the API server did not answer: {why}"))
            }
            Self::WrongObject => Error::unavailable(
                "the answer of the API server is not the object that was asked for",
            ),
            Self::TooLarge => Error::unavailable(format!(
                "the answer of the API server has more than {} MiB, and no object is that large; is there a broken proxy or aggregated API server in between?",
                LARGEST_ANSWER / 1024 / 1024
            )),
            Self::Refused {
                code,
                message,
                object,
                ..
            } => {
                let help = help(code, &message, &object);
                let message = format!("{message}{help}");
                let code = match code {
                    400 | 422 => Code::InvalidArgument,
                    401 => Code::Unauthenticated,
                    403 => Code::PermissionDenied,
                    // Without an object, the kind is not served, perhaps only not yet.
                    404 if !object.is_empty() => Code::NotFound,
                    _ => Code::Unavailable,
                };
                Error::new(code, message)
            }
        }
    }
}

/// Returns the end of a sentence that says what to do about a refusal.
fn help(code: u16, message: &str, object: &str) -> &'static str {
    match code {
        401 => {
            "; the API server does not accept the driver's credentials. Restart the driver's pod, which gives it a new service account token; with --kubeconfig, renew the credentials in that file"
        }
        403 if message.contains("\" cannot ") => {
            "; the driver's ClusterRole lacks this right: set the chart's value rbac.install to true, or apply deploy/rbac-secretproviderclass.yaml"
        }
        404 if object.is_empty() => {
            "; the API server does not know this kind of object. Install the CRDs: apply deploy/secrets-store.csi.x-k8s.io_*.yaml. Helm creates them when the chart is installed, and not again if they are deleted"
        }
        _ => "",
    }
}

pub(super) trait Request<T>: Future<Output = kube::Result<T>> + Send {}
impl<T, F: Future<Output = kube::Result<T>> + Send> Request<T> for F {}

pub(super) trait Answered<T>: Future<Output = Result<T, Failure>> + Send {}
impl<T, F: Future<Output = Result<T, Failure>> + Send> Answered<T> for F {}

impl Cluster {
    /// Runs a request that only reads, as [`limited`] does, and notes whether it was answered.
    pub(super) fn read<'a, T: 'a>(
        &'a self,
        request: impl Request<T> + 'a,
    ) -> impl Answered<T> + 'a {
        let answer = self.in_turn(request);
        async move {
            let answer = answer.await;
            let away = matches!(
                answer,
                Err(Failure::NoAnswer(_)
                    | Failure::Refused {
                        // Too many requests, or a proxy whose API server is not there.
                        code: 429 | 502..=504,
                        ..
                    })
            );
            self.away.store(away, Ordering::Relaxed);
            answer
        }
    }

    /// Runs a request as [`limited`] does, after those that run already. It waits for them for a
    /// moment only, and those that hang, because of one namespace's webhook for example, have no turn any
    /// more after a moment: many of them would make each request of the others wait. The time limit begins
    /// when the request is sent.
    pub(super) fn in_turn<'a, T: 'a>(
        &'a self,
        request: impl Request<T> + 'a,
    ) -> impl Answered<T> + 'a {
        let request = limited(request);
        async move {
            let turn = tokio::time::timeout(TURN, self.requests.acquire()).await;
            let mut request = std::pin::pin!(request);
            if let Ok(answer) = tokio::time::timeout(TURN, &mut request).await {
                return answer;
            }
            drop(turn);
            request.await
        }
    }

    /// Sends a request and deserializes its answer.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, Failure> {
        let no_answer = |error: &dyn StdError| Failure::NoAnswer(error.to_string());
        let request = request.map_err(|error| no_answer(&error))?;
        let client = self.client().await.map_err(|error| no_answer(&error))?;
        match *request.method() {
            http::Method::GET => self.read(client.request(request)).await,
            _ => limited(client.request(request)).await,
        }
    }
}

/// Runs a request within [`REQUEST_TIMEOUT`]. No error carries a response's body.
pub(super) fn limited<'a, T: 'a>(request: impl Request<T> + 'a) -> impl Answered<T> + 'a {
    // The library's futures take kilobytes, and so would every future that awaits one directly.
    let request = Box::pin(request);
    async move {
        match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(kube::Error::Api(status))) => Err(Failure::Refused {
                code: status.code,
                namespace_ends: is_about_an_ending_namespace(&status),
                object: bounded(status.details.map(|about| about.name).unwrap_or_default()),
                reason: status.reason,
                message: bounded(status.message),
            }),
            Ok(Err(kube::Error::SerdeError(_))) => Err(Failure::WrongObject),
            Ok(Err(error)) => {
                let innermost = innermost(&error);
                Err(if is_too_long(innermost) {
                    Failure::TooLarge
                } else {
                    Failure::NoAnswer(innermost.to_string())
                })
            }
            Err(_) => Err(Failure::NoAnswer(format!(
                "no answer within {} seconds",
                REQUEST_TIMEOUT.as_secs()
            ))),
        }
    }
}

/// Returns a text of the API server, cut after [`LONGEST_MESSAGE`] characters.
fn bounded(text: String) -> String {
    match text.char_indices().nth(LONGEST_MESSAGE) {
        None => text,
        Some((end, _)) => format!("{}... ({} bytes)", &text[..end], text.len()),
    }
}

fn is_about_an_ending_namespace(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes
        .into_iter()
        .any(|cause| cause.reason == "NamespaceTerminating")
}

/// Returns the error at the bottom of a chain: "connection refused" rather than "service error".
fn innermost<'e>(error: &'e (dyn StdError + 'static)) -> &'e (dyn StdError + 'static) {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_message_of_the_api_server_is_bounded() {
        for (text, expected) in [
            ("no".to_owned(), "no".to_owned()),
            (
                "é".repeat(100_000),
                format!("{}... (200000 bytes)", "é".repeat(LONGEST_MESSAGE)),
            ),
        ] {
            let status = Status::failure(&text, "Forbidden").with_code(403);
            let answer: kube::Result<()> = Err(kube::Error::Api(status.boxed()));
            let failure = limited(std::future::ready(answer)).await.unwrap_err();
            assert_eq!(failure.into_error().to_string(), expected);
        }
    }
}
