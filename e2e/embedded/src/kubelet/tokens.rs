//! Tokens of service accounts, from the API server.

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{PodSpec, ServiceAccount};
use kube::api::{Api, PostParams};
use serde::Serialize;

/// A token as it is written into a volume's context. It has no `Debug`, because it is a secret.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Token {
    pub(crate) token: String,
    expiration_timestamp: String,
}

/// Returns the service account of a pod.
pub(crate) fn service_account(pod: &PodSpec) -> &str {
    match pod.service_account_name.as_deref() {
        None | Some("") => "default",
        Some(name) => name,
    }
}

/// Requests a token of a service account.
///
/// # Errors
/// Returns kubelet's text, which names the account.
pub(crate) async fn request(
    client: &kube::Client,
    namespace: &str,
    account: &str,
    spec: TokenRequestSpec,
) -> Result<Token, String> {
    let failed =
        |reason: &str| format!("failed to fetch token for {namespace}/{account}: {reason}");
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let request = TokenRequest {
        spec: Some(spec),
        ..TokenRequest::default()
    };
    let answer = accounts
        .create_token_request(account, &PostParams::default(), &request)
        .await
        .map_err(|error| failed(&error.to_string()))?;
    let status = answer.status.unwrap_or_default();
    match (status.token, status.expiration_timestamp) {
        (Some(token), Some(expiration)) => Ok(Token {
            token,
            expiration_timestamp: expiration.0.to_string(),
        }),
        _ => Err(failed("the answer holds no token")),
    }
}
