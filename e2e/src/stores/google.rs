//! [Google Secret Manager](https://cloud.google.com/secret-manager/docs/reference/rpc) over gRPC, and
//! the exchange of service account tokens.

use prost::Message;
use serde::Deserialize;
use serde_json::json;

use super::Service;
use super::proxy::{Answer, Asked};
use super::state::{SESSION, State};

/// The path of the method of Secret Manager that providers use.
const ACCESS: &str = "/google.cloud.secretmanager.v1.SecretManagerService/AccessSecretVersion";

/// `AccessSecretVersionRequest`.
#[derive(Clone, PartialEq, Message)]
struct AccessRequest {
    #[prost(string, tag = "1")]
    name: String,
}

/// `AccessSecretVersionResponse`.
#[derive(Clone, PartialEq, Message)]
struct AccessResponse {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    payload: Option<Payload>,
}

/// `SecretPayload`.
#[derive(Clone, PartialEq, Message)]
struct Payload {
    #[prost(bytes = "vec", tag = "1")]
    data: Vec<u8>,
}

/// The body of an exchange that is read here.
#[derive(Deserialize)]
struct Exchange {
    subject_token: String,
    audience: String,
}

pub(super) fn token_exchange(state: &mut State, asked: &Asked) -> Answer {
    let Ok(exchange) = serde_json::from_slice::<Exchange>(&asked.body) else {
        return Answer::json(400, &json!({"error": "invalid_request"}));
    };
    let is_token = exchange.subject_token.split('.').count() == 3;
    if !state.allows(Service::GoogleSts, "exchange", &exchange.audience) || !is_token {
        return Answer::json(403, &json!({"error": "access_denied"}));
    }
    Answer::json(
        200,
        &json!({"access_token": SESSION, "token_type": "Bearer", "expires_in": 3600}),
    )
}

pub(super) fn secret_manager(state: &mut State, asked: &Asked) -> Answer {
    // A message has five bytes in front: whether it is compressed, and its length.
    let message = asked.body.get(5..).unwrap_or_default();
    let (ACCESS, Ok(AccessRequest { name })) = (&*asked.path, AccessRequest::decode(message))
    else {
        return failure(tonic::Code::Unimplemented, &asked.path);
    };
    let allowed = state.allows(Service::SecretManager, "AccessSecretVersion", &name);
    if asked.header("authorization") != format!("Bearer {SESSION}") {
        let message = "Request had invalid authentication credentials.";
        return failure(tonic::Code::Unauthenticated, message);
    }
    if !allowed {
        let message = format!(
            "Permission 'secretmanager.versions.access' denied for resource '{name}' (or it may not exist)."
        );
        return failure(tonic::Code::PermissionDenied, &message);
    }
    let secret = name.split("/versions/").next().unwrap_or_default();
    let Some(version) = state.latest(Service::SecretManager, secret) else {
        let message = format!("Secret [{secret}] not found or has no versions.");
        return failure(tonic::Code::NotFound, &message);
    };
    let response = AccessResponse {
        name: format!("{secret}/versions/{}", version.number),
        payload: Some(Payload {
            data: version.value.as_bytes().to_vec(),
        }),
    };
    let message = response.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let mut body = vec![0];
    body.extend(length.to_be_bytes());
    body.extend(message);
    Answer {
        status: 200,
        headers: vec![("content-type", "application/grpc".to_owned())],
        body,
        trailers: vec![("grpc-status", "0".to_owned())],
    }
}

fn failure(code: tonic::Code, message: &str) -> Answer {
    Answer {
        status: 200,
        headers: vec![
            ("content-type", "application/grpc".to_owned()),
            ("grpc-status", i32::from(code).to_string()),
            ("grpc-message", message.to_owned()),
        ],
        ..Answer::default()
    }
}
