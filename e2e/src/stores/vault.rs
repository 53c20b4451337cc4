//! [Vault's HTTP API](https://developer.hashicorp.com/vault/api-docs), which is also
//! [OpenBao's](https://openbao.org/api-docs/): login with a service account token, and version 2 of
//! the KV engine at any mount.

use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Service;
use super::proxy::{Answer, Asked};
use super::state::{SESSION, State};

/// The body of a login.
#[derive(Deserialize)]
struct Login {
    jwt: String,
    role: String,
}

pub(super) fn answer(state: &mut State, asked: &Asked) -> Answer {
    let parts: Vec<_> = asked.path.trim_start_matches('/').split('/').collect();
    match parts[..] {
        ["v1", "auth", _, "login"] => login(state, asked),
        ["v1", _, "data", ref name @ ..] if asked.method == Method::GET => {
            read(state, asked, &name.join("/"))
        }
        _ => errors(404, &["no handler for route"]),
    }
}

fn login(state: &mut State, asked: &Asked) -> Answer {
    let Ok(login) = serde_json::from_slice::<Login>(&asked.body) else {
        return errors(400, &["missing client token or role"]);
    };
    // A real one asks the API server for the review of the token.
    let is_token = login.jwt.split('.').count() == 3;
    if !state.allows(Service::Vault, "login", &login.role) || !is_token {
        return errors(403, &["permission denied"]);
    }
    Answer::json(
        200,
        &json!({"auth": {
            "client_token": SESSION, "accessor": "accessor", "policies": ["default"],
            "lease_duration": 3600, "renewable": true,
        }}),
    )
}

fn read(state: &mut State, asked: &Asked, name: &str) -> Answer {
    let allowed = state.allows(Service::Vault, "read", name);
    if !allowed || asked.header("x-vault-token") != SESSION {
        return errors(403, &["1 error occurred:\n\t* permission denied\n\n"]);
    }
    let request = state.calls.len();
    let Some(version) = state.latest(Service::Vault, name) else {
        return errors(404, &[]);
    };
    let data = match serde_json::from_str(version.value) {
        Ok(Value::Object(keys)) => Value::Object(keys),
        _ => json!({"value": version.value}),
    };
    Answer::json(
        200,
        &json!({
            "request_id": format!("00000000-0000-4000-8000-{request:012}"),
            "lease_id": "", "renewable": false, "lease_duration": 0, "mount_type": "kv",
            "data": {
                "data": data,
                "metadata": {"created_time": "2026-01-01T00:00:00Z", "version": version.number},
            },
        }),
    )
}

fn errors(status: u16, errors: &[&str]) -> Answer {
    Answer::json(status, &json!({"errors": errors}))
}
