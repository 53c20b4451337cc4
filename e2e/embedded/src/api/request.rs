//! The verb and object of a request, from its method and URI.

use std::collections::HashMap;

use axum::extract::Query;
use http::{Method, Uri};
use serde_json::Value;

use super::{resources::qualified, status::Status};

/// The verb and object of a request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RequestInfo {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`; for a path
    /// that is no resource, the method in lower case.
    pub(super) verb: &'static str,
    pub(super) path: String,
    pub(super) group: String,
    pub(super) version: String,
    /// Empty for paths that are no resource.
    pub(super) resource: String,
    pub(super) subresource: String,
    /// The name for the kind `namespaces`, as in real servers.
    pub(super) namespace: String,
    pub(super) name: String,
    query: HashMap<String, String>,
}

impl RequestInfo {
    /// Parses a request.
    ///
    /// # Errors
    /// Returns 400 for a query that cannot be parsed.
    pub(super) fn parse(method: &Method, uri: &Uri) -> Result<RequestInfo, Status> {
        let Query(query) = Query::<HashMap<String, String>>::try_from_uri(uri)
            .map_err(|error| Status::bad_request(error.to_string()))?;
        let mut info = RequestInfo {
            verb: match *method {
                Method::GET => "get",
                Method::HEAD => "head",
                Method::POST => "post",
                Method::PUT => "put",
                Method::PATCH => "patch",
                Method::DELETE => "delete",
                _ => "options",
            },
            path: uri.path().to_owned(),
            group: String::new(),
            version: String::new(),
            resource: String::new(),
            subresource: String::new(),
            namespace: String::new(),
            name: String::new(),
            query,
        };
        let parts: Vec<&str> = uri
            .path()
            .split('/')
            .filter(|part| !part.is_empty())
            .collect();
        let rest = match parts.as_slice() {
            ["api", version, rest @ ..] => {
                info.version = (*version).to_owned();
                rest
            }
            ["apis", group, version, rest @ ..] => {
                info.group = (*group).to_owned();
                info.version = (*version).to_owned();
                rest
            }
            _ => &[],
        };
        let object = match rest {
            [] => return Ok(info),
            ["namespaces", namespace, resource, object @ ..]
                if !matches!(*resource, "status" | "finalize") =>
            {
                info.namespace = (*namespace).to_owned();
                info.resource = (*resource).to_owned();
                object
            }
            [resource, object @ ..] => {
                info.resource = (*resource).to_owned();
                object
            }
        };
        info.name = object.first().copied().unwrap_or_default().to_owned();
        info.subresource = object.get(1..).unwrap_or_default().join("/");
        if info.resource == "namespaces" && info.group.is_empty() {
            info.namespace.clone_from(&info.name);
        }
        info.verb = match (info.verb, info.name.is_empty()) {
            ("get", true) if info.flag("watch") => "watch",
            ("get", true) => "list",
            ("post", _) => "create",
            ("put", _) => "update",
            ("delete", true) => "deletecollection",
            (verb, _) => verb,
        };
        Ok(info)
    }

    /// Returns a request without a query, of which another user asks whether it is allowed.
    pub(super) fn asked(attributes: &Value) -> RequestInfo {
        const VERBS: [&str; 8] = [
            "get",
            "list",
            "watch",
            "create",
            "update",
            "patch",
            "delete",
            "deletecollection",
        ];
        let text = |name: &str| attributes[name].as_str().unwrap_or_default().to_owned();
        let verb = text("verb");
        RequestInfo {
            verb: VERBS
                .into_iter()
                .find(|known| *known == verb)
                .unwrap_or("*"),
            path: String::new(),
            group: text("group"),
            version: text("version"),
            resource: text("resource"),
            subresource: text("subresource"),
            namespace: text("namespace"),
            name: text("name"),
            query: HashMap::new(),
        }
    }

    /// Returns the same request with another verb.
    pub(super) fn with_verb(&self, verb: &'static str) -> RequestInfo {
        RequestInfo {
            verb,
            ..self.clone()
        }
    }

    pub(super) fn is_resource(&self) -> bool {
        !self.resource.is_empty()
    }

    /// Returns the resource with its group.
    pub(super) fn qualified(&self) -> String {
        qualified(&self.resource, &self.group)
    }

    /// Returns a query parameter that is present and not empty.
    pub(super) fn query(&self, name: &str) -> Option<&str> {
        self.query
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        matches!(self.query(name), Some("true" | "1"))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("GET /api/v1/pods?watch=1", "watch pods in  named  below ")]
    #[case("GET /api/v1/namespaces/a", "get namespaces in a named a below ")]
    #[case(
        "PUT /api/v1/namespaces/a/status",
        "update namespaces in a named a below status"
    )]
    #[case(
        "POST /api/v1/namespaces/a/pods/b/binding",
        "create pods in a named b below binding"
    )]
    #[case(
        "DELETE /apis/x.io/v1/namespaces/a/y",
        "deletecollection y.x.io in a named  below "
    )]
    #[case("GET /apis/x.io/v1", "get .x.io in  named  below ")]
    fn reads_addresses(#[case] request: &str, #[case] expected: &str) {
        let (method, uri) = request.split_once(' ').unwrap();
        let info = RequestInfo::parse(&method.parse().unwrap(), &uri.parse().unwrap()).unwrap();
        let (verb, resource) = (info.verb, info.qualified());
        let (namespace, name, subresource) = (info.namespace, info.name, info.subresource);
        let found = format!("{verb} {resource} in {namespace} named {name} below {subresource}");
        assert_eq!(found, expected);
    }
}
