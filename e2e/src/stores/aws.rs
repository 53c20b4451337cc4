//! AWS [Secrets Manager](https://docs.aws.amazon.com/secretsmanager/latest/apireference/),
//! [Parameter Store](https://docs.aws.amazon.com/systems-manager/latest/APIReference/) and
//! [Security Token Service](https://docs.aws.amazon.com/STS/latest/APIReference/).

use serde::Deserialize;
use serde_json::{Value, json};

use super::Service;
use super::proxy::{Answer, Asked};
use super::state::{SESSION, State};

/// The parameters of `GetSecretValue` and `DescribeSecret` that are read here.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct OneSecret {
    secret_id: String,
}

/// The parameters of `GetParameters` that are read here.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Names {
    names: Vec<String>,
}

pub(super) fn secrets_manager(state: &mut State, asked: &Asked) -> Answer {
    let operation = operation(asked);
    let Ok(OneSecret { secret_id: name }) = serde_json::from_slice(&asked.body) else {
        return error("ValidationException", "there is no SecretId");
    };
    if let Some(refusal) = refusal(state, asked, Service::SecretsManager, operation, &name) {
        return refusal;
    }
    let Some(version) = state.latest(Service::SecretsManager, &name) else {
        let message = "Secrets Manager can't find the specified secret.";
        return error("ResourceNotFoundException", message);
    };
    let id = uuid(&version.id);
    let arn = format!("arn:aws:secretsmanager:us-east-1:111122223333:secret:{name}-AbCdEf");
    match operation {
        "GetSecretValue" => success(&json!({
            "ARN": arn, "Name": name, "VersionId": id, "SecretString": version.value,
            "VersionStages": ["AWSCURRENT"], "CreatedDate": 1_767_225_600,
        })),
        "DescribeSecret" => success(&json!({
            "ARN": arn, "Name": name, "VersionIdsToStages": {id: ["AWSCURRENT"]},
        })),
        _ => error("UnknownOperationException", operation),
    }
}

pub(super) fn parameter_store(state: &mut State, asked: &Asked) -> Answer {
    let operation = operation(asked);
    let Ok(Names { names }) = serde_json::from_slice(&asked.body) else {
        return error("ValidationException", "there are no Names");
    };
    let listed = names.join(",");
    if let Some(refusal) = refusal(state, asked, Service::ParameterStore, operation, &listed) {
        return refusal;
    }
    if operation != "GetParameters" {
        return error("UnknownOperationException", operation);
    }
    let (mut found, mut invalid) = (Vec::new(), Vec::new());
    for name in names {
        match state.latest(Service::ParameterStore, &name) {
            Some(version) => found.push(json!({
                "Name": name, "Type": "SecureString", "Value": version.value,
                "Version": version.number, "DataType": "text",
                "ARN": format!("arn:aws:ssm:us-east-1:111122223333:parameter/{name}"),
            })),
            None => invalid.push(name),
        }
    }
    success(&json!({"Parameters": found, "InvalidParameters": invalid}))
}

/// Answers `AssumeRoleWithWebIdentity`, the only operation that needs no signature.
pub(super) fn sts(state: &mut State, asked: &Asked) -> Answer {
    const OPERATION: &str = "AssumeRoleWithWebIdentity";
    let form = String::from_utf8_lossy(&asked.body);
    let field = |name: &str| {
        let mut fields = form.split('&').filter_map(|field| field.split_once('='));
        let found = fields.find(|(key, _)| *key == name);
        found.map(|(_, value)| value).unwrap_or_default()
    };
    let role = field("RoleArn").replace("%3A", ":").replace("%2F", "/");
    let is_token = field("WebIdentityToken").split('.').count() == 3;
    let allowed = state.allows(Service::Sts, OPERATION, &role);
    if field("Action") != OPERATION || !allowed || !is_token {
        let message = format!("Not authorized to perform sts:{OPERATION}");
        return xml(
            403,
            format!(
                "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code>\
                 <Message>{message}</Message></Error></ErrorResponse>"
            ),
        );
    }
    xml(
        200,
        format!(
            "<{OPERATION}Response><{OPERATION}Result><Credentials>\
             <AccessKeyId>{SESSION}</AccessKeyId><SecretAccessKey>example</SecretAccessKey>\
             <SessionToken>example</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>\
             </Credentials></{OPERATION}Result></{OPERATION}Response>"
        ),
    )
}

/// Returns the operation of a call by the JSON protocol.
fn operation(asked: &Asked) -> &str {
    let target = asked.header("x-amz-target");
    target.rsplit('.').next().unwrap_or_default()
}

/// Records a call; returns the refusal if its caller may not call.
fn refusal(
    state: &mut State,
    asked: &Asked,
    service: Service,
    operation: &str,
    object: &str,
) -> Option<Answer> {
    let allowed = state.allows(service, operation, object);
    let signed = format!("Credential={SESSION}/");
    if !asked.header("authorization").contains(&signed) {
        let message = "The security token included in the request is invalid.";
        return Some(error("UnrecognizedClientException", message));
    }
    let message = format!(
        "User: arn:aws:sts::111122223333:assumed-role/test is not authorized to perform: \
         {operation} on resource: {object} because no identity-based policy allows it"
    );
    (!allowed).then(|| error("AccessDeniedException", &message))
}

fn success(body: &Value) -> Answer {
    in_json(200, body)
}

fn error(code: &str, message: &str) -> Answer {
    in_json(400, &json!({"__type": code, "message": message}))
}

fn in_json(status: u16, body: &Value) -> Answer {
    Answer {
        headers: vec![("content-type", "application/x-amz-json-1.1".to_owned())],
        ..Answer::json(status, body)
    }
}

fn xml(status: u16, body: String) -> Answer {
    Answer {
        status,
        headers: vec![("content-type", "text/xml".to_owned())],
        body: body.into_bytes(),
        trailers: Vec::new(),
    }
}

/// Returns an id of 32 digits in the form of a UUID.
fn uuid(id: &str) -> String {
    let part = |from: usize, to: usize| id.get(from..to).unwrap_or_default();
    format!(
        "{}-{}-{}-{}-{}",
        part(0, 8),
        part(8, 12),
        part(12, 16),
        part(16, 20),
        part(20, 32)
    )
}
