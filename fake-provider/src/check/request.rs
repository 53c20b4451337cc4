//! Checks of requests: what a provider must accept, and what it must refuse.

use std::collections::BTreeMap;

use proto::provider::{MountRequest, ObjectVersion};
use serde_json::json;

use super::subject::error_code;
use super::{Check, Finding, Subject, failed, needs};

/// An attribute, or a key of a Secret, that no provider knows.
const UNKNOWN_KEY: &str = "provider-check.example.com/unknown";

const SERVICE: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/provider/v1alpha1/service.proto";
const UPSTREAM_SERVER: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/pkg/secrets-store/nodeserver.go";
const POD_INFO: &str = "https://kubernetes-csi.github.io/docs/pod-info.html";
const SECRET_SIZE: &str =
    "https://kubernetes.io/docs/concepts/configuration/secret/#restriction-data-size";
const ETCD_LIMIT: &str = "https://etcd.io/docs/v3.5/dev-guide/limit/";
const STATUS_CODES: &str = "https://grpc.github.io/grpc/core/md_doc_statuscodes.html";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "mount-succeeds",
        rule: "A Mount of existing objects succeeds.",
        source: SERVICE,
        run: |s| Box::pin(mount_succeeds(s)),
    },
    Check {
        name: "unknown-attributes",
        rule: "Attributes that the provider does not know are ignored.",
        source: POD_INFO,
        run: |s| Box::pin(unknown_attributes(s)),
    },
    Check {
        name: "unknown-secrets",
        rule: "Keys of the Secret that the provider does not know are ignored.",
        source: UPSTREAM_SERVER,
        run: |s| Box::pin(unknown_secrets(s)),
    },
    Check {
        name: "secrets-empty",
        rule: "A Secret without keys is treated like no Secret.",
        source: UPSTREAM_SERVER,
        run: |s| Box::pin(secrets_empty(s)),
    },
    Check {
        name: "permission-other",
        rule: "Any permission is accepted as a decimal number.",
        source: UPSTREAM_SERVER,
        run: |s| Box::pin(permission_other(s)),
    },
    Check {
        name: "versions-sent",
        rule: "An answer has the whole content, also when the request has the mounted versions.",
        source: SERVICE,
        run: |s| Box::pin(versions_sent(s)),
    },
    Check {
        name: "versions-of-others",
        rule: "Mounted versions of objects that the class no longer names are not in the answer.",
        source: SERVICE,
        run: |s| Box::pin(versions_of_others(s)),
    },
    Check {
        name: "large-attributes",
        rule: "Attributes may be as large as an object of the API server, 1 MiB.",
        source: ETCD_LIMIT,
        run: |s| Box::pin(large_attributes(s)),
    },
    Check {
        name: "large-secrets",
        rule: "Secrets may be as large as a Kubernetes Secret, 1 MiB.",
        source: SECRET_SIZE,
        run: |s| Box::pin(large_secrets(s)),
    },
    Check {
        name: "malformed-attributes",
        rule: "Attributes that are not a JSON object of strings are refused.",
        source: UPSTREAM_SERVER,
        run: |s| Box::pin(malformed_attributes(s)),
    },
    Check {
        name: "malformed-secrets",
        rule: "Malformed secrets and permissions do not keep the provider from answering.",
        source: STATUS_CODES,
        run: |s| Box::pin(malformed_secrets(s)),
    },
    Check {
        name: "empty-request",
        rule: "A request without any field is refused.",
        source: STATUS_CODES,
        run: |s| Box::pin(empty_request(s)),
    },
];

async fn mount_succeeds(subject: &Subject) -> Result<(), Finding> {
    match subject.first_outcome().await {
        Ok(_) => Ok(()),
        Err(status) if subject.settings.parameters.is_empty() => {
            let told = subject.told(status);
            Err(failed(format!("without --parameters it fails: {told}")))
        }
        Err(status) => Err(failed(subject.told(status))),
    }
}

/// Sends a request that has to be answered with the same files as the first one.
async fn same_files(subject: &Subject, request: MountRequest) -> Result<(), Finding> {
    let answer = subject.succeeds(request).await?;
    if answer.paths() != subject.first().await?.paths() {
        return Err(failed("the answer has other files"));
    }
    Ok(())
}

async fn unknown_attributes(subject: &Subject) -> Result<(), Finding> {
    same_files(subject, subject.request_with(UNKNOWN_KEY, "value")).await
}

fn with_secrets(subject: &Subject, secrets: &BTreeMap<String, String>) -> MountRequest {
    MountRequest {
        secrets: json!(secrets).to_string(),
        ..subject.request()
    }
}

async fn unknown_secrets(subject: &Subject) -> Result<(), Finding> {
    let mut secrets = subject.settings.secrets.clone();
    let secrets = secrets.as_mut().ok_or_else(|| needs("--secrets"))?;
    secrets.insert(UNKNOWN_KEY.to_owned(), "value".to_owned());
    same_files(subject, with_secrets(subject, secrets)).await
}

async fn secrets_empty(subject: &Subject) -> Result<(), Finding> {
    if subject.settings.secrets.is_some() {
        return Err(Finding::Skipped("--secrets is set".to_owned()));
    }
    same_files(subject, with_secrets(subject, &BTreeMap::new())).await
}

async fn permission_other(subject: &Subject) -> Result<(), Finding> {
    for permission in [0o400, 0o777] {
        let request = MountRequest {
            permission: u32::to_string(&permission),
            ..subject.request()
        };
        same_files(subject, request).await?;
    }
    Ok(())
}

async fn versions_sent(subject: &Subject) -> Result<(), Finding> {
    let first = subject.first().await?;
    let request = MountRequest {
        current_object_version: first.versions.clone(),
        ..subject.request()
    };
    same_files(subject, request).await
}

async fn versions_of_others(subject: &Subject) -> Result<(), Finding> {
    let mut versions = subject.first().await?.versions.clone();
    versions.push(ObjectVersion {
        id: UNKNOWN_KEY.to_owned(),
        version: "1".to_owned(),
    });
    let request = MountRequest {
        current_object_version: versions,
        ..subject.request()
    };
    let answer = subject.succeeds(request).await?;
    if answer
        .versions
        .iter()
        .any(|version| version.id == UNKNOWN_KEY)
    {
        return Err(failed(
            "the answer has the version of an object that it was not asked for",
        ));
    }
    Ok(())
}

async fn large_attributes(subject: &Subject) -> Result<(), Finding> {
    let request = subject.request_with(UNKNOWN_KEY, &"a".repeat(1 << 20));
    same_files(subject, request).await
}

async fn large_secrets(subject: &Subject) -> Result<(), Finding> {
    let mut secrets = subject.settings.secrets.clone().unwrap_or_default();
    secrets.insert(UNKNOWN_KEY.to_owned(), "a".repeat(1 << 20));
    same_files(subject, with_secrets(subject, &secrets)).await
}

async fn malformed_attributes(subject: &Subject) -> Result<(), Finding> {
    for attributes in ["", "{", "[]", "\"text\"", "{\"key\": 1}"] {
        let request = MountRequest {
            attributes: attributes.to_owned(),
            ..subject.request()
        };
        if subject.answered(request).await?.is_ok() {
            return Err(failed(format!("it accepts {attributes:?}")));
        }
    }
    subject.answers_after("malformed attributes").await
}

async fn malformed_secrets(subject: &Subject) -> Result<(), Finding> {
    for malformed in ["", "{", "[]", "rw", "-1"] {
        let request = subject.request();
        let secrets = MountRequest {
            secrets: malformed.to_owned(),
            ..request.clone()
        };
        let permission = MountRequest {
            permission: malformed.to_owned(),
            ..request
        };
        for request in [secrets, permission] {
            // It may succeed or fail.
            let _ = subject.answered(request).await?;
        }
    }
    subject.answers_after("malformed secrets").await
}

async fn empty_request(subject: &Subject) -> Result<(), Finding> {
    let mut client = subject.client()?;
    let calling = client.mount(subject.timed(MountRequest::default()));
    let answer = tokio::time::timeout(subject.settings.timeout, calling).await;
    drop(client);
    match answer {
        Ok(Ok(answer)) if error_code(answer.get_ref()).is_none() => Err(failed("it succeeds")),
        Ok(_) => subject.answers_after("an empty request").await,
        Err(_) => Err(failed("no answer in time")),
    }
}
