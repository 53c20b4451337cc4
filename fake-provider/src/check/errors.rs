//! Checks of failures: which code, which message, and that there are no files.

use std::collections::BTreeMap;

use proto::provider::{MountRequest, MountResponse};
use tonic::{Code, Status};

use super::subject::{error_code, may_pass};
use super::{Check, Finding, Subject, failed, needs};

/// The longest part of a message that this repository's driver shows, in bytes.
const LONGEST_MESSAGE: usize = 700;

/// The longest error code that this repository's driver counts by.
const LONGEST_CODE: usize = 100;

const STATUS_CODES: &str = "https://grpc.github.io/grpc/core/md_doc_statuscodes.html";
const SERVICE: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/provider/v1alpha1/service.proto";
const KUBELET: &str =
    "https://github.com/kubernetes/kubernetes/blob/master/pkg/volume/csi/csi_client.go";
const EVENTS: &str =
    "https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/validation/events.go";
const METRICS: &str = "https://prometheus.io/docs/practices/naming/#labels";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "missing-object",
        rule: "A Mount of an object that does not exist fails, without files.",
        source: SERVICE,
        run: |s| Box::pin(missing_object(s)),
    },
    Check {
        name: "missing-object-code",
        rule: "It fails with a code that does not ask to try again at once.",
        source: STATUS_CODES,
        run: |s| Box::pin(missing_object_code(s)),
    },
    Check {
        name: "error-message",
        rule: "A failure has a message of at most 700 bytes without control characters.",
        source: EVENTS,
        run: |s| Box::pin(error_message(s)),
    },
    Check {
        name: "error-code",
        rule: "An error code is a short word, as it becomes a metric label.",
        source: METRICS,
        run: |s| Box::pin(error_code_short(s)),
    },
    Check {
        name: "no-parameters",
        rule: "A class without parameters is not answered with UNAVAILABLE.",
        source: STATUS_CODES,
        run: |s| Box::pin(no_parameters(s)),
    },
    Check {
        name: "outage-code",
        rule: "A store that cannot be reached fails the Mount with a code after which kubelet tries again and keeps the volume.",
        source: KUBELET,
        run: |s| Box::pin(outage_code(s)),
    },
];

/// Mounts the object that does not exist, and returns the answer as it is on the wire.
async fn mount_missing(subject: &Subject) -> Result<Result<MountResponse, Status>, Finding> {
    let missing = subject.settings.missing.as_ref();
    let missing = missing.ok_or_else(|| needs("--missing"))?;
    // A provider that refuses every Mount tells nothing about this one.
    subject.first().await?;
    mount_raw(subject, subject.request_for(missing)).await
}

/// Sends a request, and returns the answer as it is on the wire.
pub(super) async fn mount_raw(
    subject: &Subject,
    request: MountRequest,
) -> Result<Result<MountResponse, Status>, Finding> {
    let target = subject.target()?;
    let request = MountRequest {
        target_path: target.path(),
        ..request
    };
    let mut client = subject.client()?;
    let calling = client.mount(subject.timed(request));
    match tokio::time::timeout(subject.settings.timeout, calling).await {
        Ok(answer) => Ok(answer.map(tonic::Response::into_inner)),
        Err(_) => Err(failed(format!(
            "no answer in {:?}",
            subject.settings.timeout
        ))),
    }
}

async fn missing_object(subject: &Subject) -> Result<(), Finding> {
    let Ok(answer) = mount_missing(subject).await? else {
        return Ok(());
    };
    match error_code(&answer) {
        None => Err(failed("it succeeds")),
        Some(_) if !answer.files.is_empty() => Err(failed("the answer has an error and files")),
        Some(_) => Ok(()),
    }
}

async fn missing_object_code(subject: &Subject) -> Result<(), Finding> {
    match mount_missing(subject).await? {
        Err(status) if may_pass(status.code()) => Err(failed(subject.told(&status))),
        _ => Ok(()),
    }
}

async fn error_message(subject: &Subject) -> Result<(), Finding> {
    let Err(status) = mount_missing(subject).await? else {
        return Err(Finding::Skipped("the failure has no status".to_owned()));
    };
    let message = status.message();
    if message.is_empty() {
        return Err(failed("the message is empty"));
    }
    if message.len() > LONGEST_MESSAGE {
        return Err(failed(format!("the message has {} bytes", message.len())));
    }
    if message.chars().any(char::is_control) {
        return Err(failed("the message has control characters"));
    }
    Ok(())
}

async fn error_code_short(subject: &Subject) -> Result<(), Finding> {
    let error = mount_missing(subject)
        .await?
        .ok()
        .and_then(|answer| answer.error);
    let Some(error) = error else {
        return Err(Finding::Skipped("the failure has no error code".to_owned()));
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if error.code.is_empty() || error.code.len() > LONGEST_CODE || !error.code.chars().all(allowed)
    {
        return Err(failed(format!("the code is {:?}", error.code)));
    }
    Ok(())
}

async fn no_parameters(subject: &Subject) -> Result<(), Finding> {
    match mount_raw(subject, subject.request_for(&BTreeMap::new())).await? {
        Err(status) if status.code() == Code::Unavailable => Err(failed(subject.told(&status))),
        _ => Ok(()),
    }
}

async fn outage_code(subject: &Subject) -> Result<(), Finding> {
    let outage = subject.settings.outage.as_ref();
    let outage = outage.ok_or_else(|| needs("--outage"))?;
    match mount_raw(subject, subject.request_for(outage)).await? {
        Err(status) if may_pass(status.code()) => Ok(()),
        Err(status) => Err(failed(subject.told(&status))),
        Ok(answer) => match error_code(&answer) {
            Some(code) => Err(failed(format!("error code {code:?}"))),
            None => Err(failed("it succeeds")),
        },
    }
}
