//! Checks that tokens, secrets and malformed input do not come back in answers, errors or the log.

use std::collections::BTreeMap;
use std::fs;

use proto::provider::{MountRequest, MountResponse};
use serde_json::json;
use tonic::Status;
use tonic::metadata::KeyAndValueRef;

use super::errors::mount_raw;
use super::forms::telling;
use super::subject::tokens_json;
use super::{Check, Finding, Settings, Subject, failed, needs, versions};
use crate::server::TOKENS_KEY;

/// A value that the checks plant wherever secrets arrive, and look for.
const CANARY: &str = "canary-a4f2c81d7e";

const AUDIENCE: &str = "provider-check.example.com";

const TOKEN_REQUESTS: &str = "https://kubernetes-csi.github.io/docs/token-requests.html";
const SECRETS: &str = "https://kubernetes.io/docs/concepts/security/secrets-good-practices/";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "tokens-accepted",
        rule: "Tokens for audiences that the provider does not use are ignored.",
        source: TOKEN_REQUESTS,
        run: |s| Box::pin(tokens_accepted(s)),
    },
    Check {
        name: "tokens-not-in-answers",
        rule: "No token is in the answer.",
        source: TOKEN_REQUESTS,
        run: |s| Box::pin(tokens_not_in_answers(s)),
    },
    Check {
        name: "tokens-not-in-errors",
        rule: "Malformed tokens are not in the error.",
        source: TOKEN_REQUESTS,
        run: |s| Box::pin(tokens_not_in_errors(s)),
    },
    Check {
        name: "secrets-not-in-errors",
        rule: "Malformed attributes and secrets are not in the error.",
        source: SECRETS,
        run: |s| Box::pin(secrets_not_in_errors(s)),
    },
    Check {
        name: "secrets-not-in-failures",
        rule: "A failure shows no token and no secret of its request, as it is or encoded.",
        source: SECRETS,
        run: |s| Box::pin(secrets_not_in_failures(s)),
    },
    Check {
        name: "versions-reveal-nothing",
        rule: "A version shows neither content nor a digest of it that needs no key.",
        source: SECRETS,
        run: |s| Box::pin(versions::reveal_nothing(s)),
    },
    Check {
        name: "secrets-not-in-log",
        rule: "No token and no secret is in the provider's log.",
        source: SECRETS,
        run: |s| Box::pin(secrets_not_in_log(s)),
    },
];

/// Returns a request for objects that exist, with one more token, the canary.
fn with_canary_token(subject: &Subject) -> MountRequest {
    canary_token_for(subject, &subject.settings.parameters)
}

fn canary_token_for(subject: &Subject, parameters: &BTreeMap<String, String>) -> MountRequest {
    let mut tokens = subject.settings.tokens.clone();
    tokens.insert(AUDIENCE.to_owned(), CANARY.to_owned());
    subject.changed_request(parameters, TOKENS_KEY, &tokens_json(&tokens))
}

async fn tokens_accepted(subject: &Subject) -> Result<(), Finding> {
    let answer = subject.succeeds(with_canary_token(subject)).await?;
    if answer.paths() != subject.first().await?.paths() {
        return Err(failed("the answer has other files"));
    }
    Ok(())
}

/// Returns the tokens and secrets of the settings, and the canary.
pub(super) fn own_values(settings: &Settings) -> Vec<&str> {
    let secrets = settings.secrets.iter().flat_map(BTreeMap::values);
    let values = settings.tokens.values().chain(secrets);
    values.map(String::as_str).chain([CANARY]).collect()
}

async fn tokens_not_in_answers(subject: &Subject) -> Result<(), Finding> {
    subject.first().await?;
    let Ok(answer) = subject.mount(with_canary_token(subject)).await else {
        return Err(Finding::Skipped("tokens-accepted failed".to_owned()));
    };
    let tokens = subject.settings.tokens.values().map(String::as_str);
    for token in telling(tokens.chain([CANARY]).collect()) {
        let in_version = answer
            .versions
            .iter()
            .any(|v| v.id.contains(token) || v.version.contains(token));
        if in_version {
            return Err(failed("a token is in an object version"));
        }
        let in_file = answer.files.iter().find(|file| {
            let contents = String::from_utf8_lossy(&file.contents);
            file.path.contains(token) || contents.contains(token)
        });
        if let Some(file) = in_file {
            return Err(failed(format!("a token is in {:?}", file.path)));
        }
    }
    Ok(())
}

/// Returns whether a failure has a form of a token or secret in anything that it shows to others.
fn quotes(subject: &Subject, failure: &Result<MountResponse, Status>) -> bool {
    let shown = match failure {
        Ok(answer) => answer
            .error
            .iter()
            .map(|error| error.code.clone())
            .collect(),
        Err(status) => texts(status),
    };
    shown.iter().any(|text| subject.has_own(text))
}

/// Returns the message, the details and the trailers of a status.
fn texts(status: &Status) -> Vec<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let trailers = status.metadata().iter().map(|trailer| match trailer {
        KeyAndValueRef::Ascii(key, value) => format!("{key}: {}", text(value.as_encoded_bytes())),
        KeyAndValueRef::Binary(key, value) => {
            let value = value.to_bytes().unwrap_or_default();
            format!("{key}: {}", text(&value))
        }
    });
    let mut texts: Vec<_> = trailers.collect();
    texts.extend([status.message().to_owned(), text(status.details())]);
    texts
}

/// Sends requests that are wrong, and looks for tokens and secrets in the errors.
async fn not_in_errors(
    subject: &Subject,
    requests: impl IntoIterator<Item = MountRequest>,
) -> Result<(), Finding> {
    for request in requests {
        if let Err(status) = subject.answered(request).await?
            && quotes(subject, &Err(status))
        {
            return Err(failed("the error quotes the request"));
        }
    }
    Ok(())
}

async fn secrets_not_in_failures(subject: &Subject) -> Result<(), Finding> {
    let settings = &subject.settings;
    let classes = [("missing", &settings.missing), ("outage", &settings.outage)];
    let mut checked = 0;
    for (name, parameters) in classes {
        let Some(parameters) = parameters else {
            continue;
        };
        // Another check tells that a Mount is not answered.
        let request = canary_token_for(subject, parameters);
        if let Ok(failure) = mount_raw(subject, request).await {
            if quotes(subject, &failure) {
                return Err(failed(format!("the failure of --{name} shows one")));
            }
            checked += 1;
        }
    }
    match checked {
        0 => Err(needs("--missing or --outage, with an answer")),
        _ => Ok(()),
    }
}

async fn tokens_not_in_errors(subject: &Subject) -> Result<(), Finding> {
    let malformed = [
        CANARY.to_owned(),
        json!([CANARY]).to_string(),
        json!({AUDIENCE: CANARY}).to_string(),
        json!({AUDIENCE: {"token": [CANARY]}}).to_string(),
    ];
    let requests = malformed.map(|tokens| subject.request_with(TOKENS_KEY, &tokens));
    not_in_errors(subject, requests).await
}

async fn secrets_not_in_errors(subject: &Subject) -> Result<(), Finding> {
    let malformed = [
        CANARY.to_owned(),
        json!([CANARY]).to_string(),
        json!({"key": [CANARY]}).to_string(),
    ];
    let requests = malformed.into_iter().flat_map(|text| {
        let attributes = MountRequest {
            attributes: text.clone(),
            ..subject.request()
        };
        let secrets = MountRequest {
            secrets: text,
            ..subject.request()
        };
        [attributes, secrets]
    });
    not_in_errors(subject, requests).await
}

async fn secrets_not_in_log(subject: &Subject) -> Result<(), Finding> {
    let path = subject
        .settings
        .log
        .as_ref()
        .ok_or_else(|| needs("--log"))?;
    let secrets = BTreeMap::from([("key".to_owned(), CANARY.to_owned())]);
    let with_secrets = MountRequest {
        secrets: json!(secrets).to_string(),
        ..subject.request()
    };
    let missing = subject.settings.missing.as_ref();
    let missing = missing.map(|parameters| canary_token_for(subject, parameters));
    let requests = [with_canary_token(subject), with_secrets];
    for request in requests.into_iter().chain(missing) {
        // It may fail, which is logged as well.
        let _ = subject.mount(request).await;
    }
    let log = fs::read(path)
        .map_err(|error| failed(format!("cannot read {}: {error}", path.display())))?;
    if subject.has_own(&String::from_utf8_lossy(&log)) {
        return Err(failed("the log has a token or a secret"));
    }
    Ok(())
}
