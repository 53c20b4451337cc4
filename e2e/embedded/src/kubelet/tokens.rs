//! Tokens of service accounts, asked of the API server.

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, PostParams};
use serde::Serialize;

/// A token as it stands in a volume's context. Without `Debug`: it is a secret.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Token {
    pub(crate) token: String,
    expiration_timestamp: String,
}

/// Asks for a token of a service account.
///
/// # Errors
/// kubelet's words, which name the account.
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
