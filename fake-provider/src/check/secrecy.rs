//! Checks that tokens, secrets and malformed input do not come back in answers, errors or the log.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use proto::provider::MountRequest;
use serde_json::json;

use super::subject::tokens_json;
use super::{Check, Finding, Settings, Subject, failed, needs};
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
        name: "secrets-not-in-log",
        rule: "No token and no secret is in the provider's log.",
        source: SECRETS,
        run: |s| Box::pin(secrets_not_in_log(s)),
    },
];

/// Returns a request with one more token, the canary.
fn with_canary_token(subject: &Subject) -> MountRequest {
    let mut tokens = subject.settings.tokens.clone();
    tokens.insert(AUDIENCE.to_owned(), CANARY.to_owned());
    subject.request_with(TOKENS_KEY, &tokens_json(&tokens))
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

/// Returns the values that are long enough to be found in a text only if they were put there.
pub(super) fn telling(mut values: Vec<&str>) -> Vec<&str> {
    const SHORTEST: usize = 8;
    values.retain(|value| value.len() >= SHORTEST);
    values
}

/// Returns the forms in which a text may quote values: whole or a line of them, as they are or
/// escaped as in JSON and in the reasons of findings.
pub(super) fn forms(values: &[&str]) -> Vec<String> {
    let lines = values.iter().flat_map(|value| value.lines()).map(str::trim);
    let pieces: BTreeSet<&str> = telling(lines.chain(values.iter().copied()).collect())
        .into_iter()
        .collect();
    let mut forms = BTreeSet::new();
    for piece in pieces {
        let json = unquoted(&json!(piece).to_string());
        forms.extend([
            unquoted(&format!("{piece:?}")),
            unquoted(&format!("{json:?}")),
        ]);
        forms.extend([json, piece.to_owned()]);
    }
    forms.into_iter().collect()
}

/// Returns a text without its first and last character.
fn unquoted(text: &str) -> String {
    text.get(1..text.len() - 1).unwrap_or_default().to_owned()
}

/// Returns a text with `<secret>` in the place of each of the values.
pub(super) fn hide(text: &str, values: &[String]) -> String {
    let mut hidden = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let found = values.iter().filter(|value| rest.starts_with(&***value));
        match found.map(String::len).max() {
            None | Some(0) => {
                hidden.push(next);
                rest = &rest[next.len_utf8()..];
            }
            Some(length) => {
                hidden.push_str("<secret>");
                rest = &rest[length..];
            }
        }
    }
    hidden
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

/// Sends requests that are wrong, and looks for the canary in the errors.
async fn not_in_errors(
    subject: &Subject,
    requests: impl IntoIterator<Item = MountRequest>,
) -> Result<(), Finding> {
    for request in requests {
        if let Err(status) = subject.answered(request).await? {
            let details = String::from_utf8_lossy(status.details());
            let metadata = format!("{:?}", status.metadata());
            if [status.message(), &details, &metadata]
                .iter()
                .any(|text| text.contains(CANARY))
            {
                return Err(failed("the error quotes the request"));
            }
        }
    }
    Ok(())
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
    for request in [with_canary_token(subject), with_secrets] {
        // It may fail, which is logged as well.
        let _ = subject.mount(request).await;
    }
    let log = fs::read(path)
        .map_err(|error| Finding::Skipped(format!("cannot read {}: {error}", path.display())))?;
    let log = String::from_utf8_lossy(&log);
    let values = telling(own_values(&subject.settings));
    if values.iter().any(|value| log.contains(value)) {
        return Err(failed("the log has a token or a secret"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const PEM: &str =
        "-----BEGIN KEY-----\nsupersecretline1\nsupersecretline2\n-----END KEY-----\n";
    const JSON: &str = r#"{"password": "hunter2\\hunter2"}"#;

    /// A provider quotes a secret in any way, and a finding quotes the provider.
    #[rstest]
    fn secrets_are_hidden_however_they_are_quoted(
        #[values(PEM, JSON, "hunter2-hunter2", "with \u{202e} and \"quotes\"")] secret: &str,
        #[values(false, true)] as_json: bool,
        #[values(false, true)] as_debug: bool,
        #[values(false, true)] in_lines: bool,
    ) {
        let mut quoted = secret.to_owned();
        if in_lines {
            quoted = quoted.replace('\n', " in the middle\n");
        }
        if as_json {
            quoted = json!({"of": quoted}).to_string();
        }
        if as_debug {
            quoted = format!("failed: {quoted:?}");
        }
        let hidden = hide(&format!("it says {quoted}"), &forms(&[secret, "short"]));
        assert!(hidden.contains("<secret>"), "{hidden}");
        for piece in ["supersecret", "hunter2", "quotes"] {
            assert!(!hidden.contains(piece), "{hidden}");
        }
        assert!(hidden.starts_with("it says"));
    }
}
