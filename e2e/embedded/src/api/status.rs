//! Error answers. The texts are those of Kubernetes 1.37, because messages of drivers quote them.

use serde_json::{Value, json};

use super::{field_error::FieldError, resources::Resource};

/// An error answer: HTTP code, machine-readable reason, sentence and details.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Status {
    pub(super) code: u16,
    /// Empty where a real server leaves the reason out.
    pub(super) reason: &'static str,
    pub(super) message: String,
    pub(super) details: Option<Value>,
}

impl Status {
    fn about(
        resource: &Resource,
        name: &str,
        code: u16,
        reason: &'static str,
        message: String,
    ) -> Status {
        Status {
            details: Some(details(resource, name, &resource.plural)),
            ..Status::plain(code, reason, message)
        }
    }

    fn plain(code: u16, reason: &'static str, message: impl Into<String>) -> Status {
        Status {
            code,
            reason,
            message: message.into(),
            details: None,
        }
    }

    pub(super) fn not_found(resource: &Resource, name: &str) -> Status {
        let message = format!("{} \"{name}\" not found", resource.qualified);
        Status::about(resource, name, 404, "NotFound", message)
    }

    /// Returns the answer for a kind or subresource that is not served.
    pub(super) fn no_such_resource() -> Status {
        Status {
            details: Some(json!({})),
            ..Status::plain(
                404,
                "NotFound",
                "the server could not find the requested resource",
            )
        }
    }

    pub(super) fn already_exists(resource: &Resource, name: &str) -> Status {
        let message = format!("{} \"{name}\" already exists", resource.qualified);
        Status::about(resource, name, 409, "AlreadyExists", message)
    }

    pub(super) fn conflict(resource: &Resource, name: &str, why: &str) -> Status {
        let message = format!(
            "Operation cannot be fulfilled on {} \"{name}\": {why}",
            resource.qualified
        );
        Status::about(resource, name, 409, "Conflict", message)
    }

    /// Returns the answer to a writer that read an older version.
    pub(super) fn modified(resource: &Resource, name: &str) -> Status {
        Status::conflict(
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// Returns the refusal of admission or authorisation. The name is empty in a request to create.
    pub(super) fn forbidden(resource: &Resource, name: &str, why: &str) -> Status {
        let message = match name {
            "" => format!("{} is forbidden: {why}", resource.qualified),
            name => format!("{} \"{name}\" is forbidden: {why}", resource.qualified),
        };
        Status::about(resource, name, 403, "Forbidden", message)
    }

    /// Returns the refusal of authorisation for an unknown resource or a path that is no resource.
    pub(super) fn forbidden_text(message: String) -> Status {
        Status {
            details: Some(json!({})),
            ..Status::plain(403, "Forbidden", message)
        }
    }

    pub(super) fn namespace_terminating(
        resource: &Resource,
        name: &str,
        namespace: &str,
    ) -> Status {
        let why = format!(
            "unable to create new content in namespace {namespace} because it is being terminated"
        );
        let mut status = Status::forbidden(resource, name, &why);
        if let Some(details) = &mut status.details {
            details["causes"] = json!([{
                "reason": "NamespaceTerminating",
                "message": format!("namespace {namespace} is being terminated"),
                "field": "metadata.namespace",
            }]);
        }
        status
    }

    /// Returns the refusal of an invalid object. `errors` must not be empty.
    pub(super) fn invalid(resource: &Resource, name: &str, errors: &[FieldError]) -> Status {
        let sentences: Vec<String> = errors.iter().map(FieldError::sentence).collect();
        let text = match sentences.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let causes: Vec<Value> = errors
            .iter()
            .map(|e| json!({ "reason": e.reason, "message": e.message, "field": e.field }))
            .collect();
        let mut details = details(resource, name, &resource.kind);
        details["causes"] = Value::Array(causes);
        Status {
            details: Some(details),
            ..Status::plain(
                422,
                "Invalid",
                format!(
                    "{} \"{name}\" is invalid: {text}",
                    resource.qualified_kind()
                ),
            )
        }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Status {
        Status::plain(400, "BadRequest", message)
    }

    /// Returns the refusal of a body that is not an object of a kind.
    pub(super) fn undecodable(resource: &Resource, version: &str, why: &str) -> Status {
        Status::bad_request(format!(
            "{} in version \"{version}\" cannot be handled as a {}: {why}",
            resource.kind, resource.kind
        ))
    }

    pub(super) fn unauthorized() -> Status {
        Status::plain(401, "Unauthorized", "Unauthorized")
    }

    pub(super) fn method_not_allowed() -> Status {
        Status {
            details: Some(json!({})),
            ..Status::plain(
                405,
                "MethodNotAllowed",
                "the server does not allow this method on the requested resource",
            )
        }
    }

    /// Returns the refusal of a media type; `known` are the supported ones.
    pub(super) fn unsupported_media_type(known: &str) -> Status {
        Status::plain(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format - accepted media types include: {known}"
            ),
        )
    }

    /// Returns the refusal of a client that accepts none of the forms in which objects are served.
    pub(super) fn not_acceptable() -> Status {
        Status::plain(
            406,
            "NotAcceptable",
            "only the following media types are accepted: application/json",
        )
    }

    pub(super) fn too_large(limit: usize) -> Status {
        Status::plain(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit}"),
        )
    }

    pub(super) fn expired(asked: u64, oldest: u64) -> Status {
        Status::plain(
            410,
            "Expired",
            format!("too old resource version: {asked} ({oldest})"),
        )
    }

    pub(super) fn internal(message: impl Into<String>) -> Status {
        Status::plain(
            500,
            "InternalError",
            format!("Internal error occurred: {}", message.into()),
        )
    }

    /// Returns the answer to a create with a resourceVersion: real servers give no reason, either.
    pub(super) fn version_on_create() -> Status {
        Status::plain(
            500,
            "",
            "resourceVersion should not be set on objects to be created",
        )
    }

    /// Returns the answer of a disturbance.
    pub(super) fn disturbed(code: u16) -> Status {
        let (reason, message) = match code {
            401 => ("Unauthorized", "Unauthorized"),
            403 => ("Forbidden", "forbidden: refused by a disturbance"),
            404 => (
                "NotFound",
                "the server could not find the requested resource",
            ),
            409 => (
                "Conflict",
                "Operation cannot be fulfilled: refused by a disturbance",
            ),
            410 => ("Expired", "too old resource version: 1 (2)"),
            429 => (
                "TooManyRequests",
                "too many requests, please try again later",
            ),
            503 => (
                "ServiceUnavailable",
                "the server is currently unable to handle the request",
            ),
            504 => (
                "Timeout",
                "Timeout: request did not complete within requested timeout",
            ),
            _ => (
                "InternalError",
                "Internal error occurred: refused by a disturbance",
            ),
        };
        Status::plain(code, reason, message)
    }

    /// Returns the status as a `metav1.Status`.
    pub(super) fn to_value(&self) -> Value {
        let mut value = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "code": self.code,
        });
        if !self.reason.is_empty() {
            value["reason"] = json!(self.reason);
        }
        if let Some(details) = &self.details {
            value["details"] = details.clone();
        }
        value
    }
}

/// Returns the `details` of a status about an object.
pub(super) fn details(resource: &Resource, name: &str, kind: &str) -> Value {
    let mut details = json!({ "name": name, "kind": kind });
    if !resource.group.is_empty() {
        details["group"] = json!(resource.group);
    }
    details
}
