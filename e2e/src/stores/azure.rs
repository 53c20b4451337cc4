//! [Azure Key Vault](https://learn.microsoft.com/en-us/rest/api/keyvault/secrets/), and the
//! [login](https://learn.microsoft.com/en-us/entra/identity-platform/v2-oauth2-client-creds-grant-flow)
//! of its callers.

use serde_json::{Value, json};

use super::Service;
use super::proxy::{Answer, Asked};
use super::state::{SESSION, State};

const LOGIN: &str = "https://login.microsoftonline.com";

pub(super) fn entra_id(state: &mut State, asked: &Asked) -> Answer {
    let parts: Vec<_> = asked.path.trim_start_matches('/').split('/').collect();
    match parts[..] {
        ["common", "discovery", "instance"] => Answer::json(
            200,
            &json!({
                "tenant_discovery_endpoint":
                    format!("{LOGIN}/common/v2.0/.well-known/openid-configuration"),
                "api-version": "1.1",
                "metadata": [{
                    "preferred_network": "login.microsoftonline.com",
                    "preferred_cache": "login.windows.net",
                    "aliases": ["login.microsoftonline.com", "login.windows.net"],
                }],
            }),
        ),
        [tenant, "v2.0", ".well-known", "openid-configuration"] => Answer::json(
            200,
            &json!({
                "token_endpoint": format!("{LOGIN}/{tenant}/oauth2/v2.0/token"),
                "authorization_endpoint": format!("{LOGIN}/{tenant}/oauth2/v2.0/authorize"),
                "issuer": format!("{LOGIN}/{tenant}/v2.0"),
                "jwks_uri": format!("{LOGIN}/{tenant}/discovery/v2.0/keys"),
            }),
        ),
        [_, "oauth2", "v2.0", "token"] => token(state, asked),
        _ => error(404, "NotFound", &asked.path),
    }
}

fn token(state: &mut State, asked: &Asked) -> Answer {
    let form = String::from_utf8_lossy(&asked.body);
    let client = form
        .split('&')
        .find_map(|field| field.strip_prefix("client_id="))
        .unwrap_or_default();
    if !state.allows(Service::EntraId, "token", client) {
        return Answer::json(
            401,
            &json!({
                "error": "invalid_client",
                "error_description": format!("AADSTS700016: Application {client:?} was not found."),
            }),
        );
    }
    Answer::json(
        200,
        &json!({
            "token_type": "Bearer", "access_token": SESSION, "expires_in": 3600,
            "ext_expires_in": 3600,
        }),
    )
}

pub(super) fn key_vault(state: &mut State, asked: &Asked) -> Answer {
    if asked.header("authorization") != format!("Bearer {SESSION}") {
        let mut answer = error(401, "Unauthorized", "AKV10000: Request is missing a token.");
        let challenge = format!(
            "Bearer authorization=\"{LOGIN}/tenant\", resource=\"https://vault.azure.net\""
        );
        answer.headers.push(("www-authenticate", challenge));
        return answer;
    }
    let parts: Vec<_> = asked.path.trim_matches('/').split('/').collect();
    let ["secrets", name, ..] = parts[..] else {
        return error(404, "NotFound", &asked.path);
    };
    if !state.allows(Service::KeyVault, "GetSecret", name) {
        let message = "Caller is not authorized to perform action on resource.";
        return error(403, "Forbidden", message);
    }
    let Some(version) = state.latest(Service::KeyVault, name) else {
        let message = format!("A secret with (name/id) {name} was not found in this key vault.");
        return error(404, "SecretNotFound", &message);
    };
    Answer::json(
        200,
        &json!({
            "value": version.value,
            "id": format!("https://{}/secrets/{name}/{}", asked.host, version.id),
            "attributes": {"enabled": true, "created": 1_767_225_600, "updated": 1_767_225_600},
        }),
    )
}

fn error(status: u16, code: &str, message: &str) -> Answer {
    let body: Value = json!({"error": {"code": code, "message": message}});
    Answer::json(status, &body)
}
