//! One request from its bytes to its answer: authentication, authorisation, verb.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, Request as HttpRequest, Response, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::lock;

use super::{
    Call, Disturbance, Interceptor, Reaction, Request,
    body::{Target, WriteOptions, at_version},
    deletion::DeleteOptions,
    discovery, exec,
    fields::Manager,
    rbac::{self, Identity},
    render::{list, metadata, metadata_list},
    request::RequestInfo,
    selectors::Selector,
    status::{Status, details},
    store::Store,
    tokens::Tokens,
    watch::{Start, Watch},
};

/// The largest body that a real server reads.
const MAX_BODY: usize = 3 * 1024 * 1024;
/// The duration of a watch for which the client names none.
const WATCH_TIMEOUT: Duration = Duration::from_secs(1800);

/// Reviews of tokens, which are answered and not stored.
const TOKEN_REVIEWS: &str = "tokenreviews.authentication.k8s.io";

pub(super) type Answer = Response<BoxBody<Bytes, Infallible>>;

/// The socket of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Entrance {
    /// Everyone who can open it is an administrator.
    Admin,
    /// Requests have the identity of a bearer token, are intercepted, disturbed and recorded.
    Pods,
    /// Everyone without the token of a service account is an administrator; requests are intercepted,
    /// disturbed and recorded.
    Loopback,
}

/// The decision to close a connection without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the connection is refused by a disturbance")]
pub(super) struct Refused;

/// The state that requests share.
pub(super) struct Server {
    pub(super) store: Arc<Store>,
    pub(super) tokens: Tokens,
    pub(super) requests: Mutex<Vec<Request>>,
    pub(super) disturbance: watch::Sender<Disturbance>,
    pub(super) interceptor: Mutex<Option<Arc<Interceptor>>>,
    pub(super) runner: Mutex<Option<Arc<exec::Runner>>>,
}

impl Server {
    /// Answers one request.
    ///
    /// # Errors
    /// Returns [`Refused`] when the connection is to be closed.
    pub(super) async fn serve(
        self: Arc<Self>,
        entrance: Entrance,
        request: HttpRequest<Incoming>,
    ) -> Result<Answer, Refused> {
        let info = match RequestInfo::parse(request.method(), request.uri()) {
            Ok(info) => info,
            Err(status) => return Ok(failure(&status)),
        };
        if exec::is_exec(&info) {
            return self.exec(entrance, info, request).await;
        }
        let (head, body) = request.into_parts();
        let body = collect(body).await;
        let identity = match entrance {
            Entrance::Admin => {
                let answer = self.answer(&Identity::Admin, &info, &head.headers, body);
                return Ok(answer.unwrap_or_else(|status| failure(&status)));
            }
            _ => self.identity(entrance, &head.headers),
        };
        let intercepted = match &body {
            Ok(body) => {
                self.intercept(&Call {
                    method: head.method.as_str(),
                    uri: &head.uri.to_string(),
                    body,
                })
                .await?
            }
            Err(_) => None,
        };
        let answer = match intercepted {
            Some(answer) => Ok(answer),
            None => match (self.disturb(&info).await?, &identity) {
                (Some(status), _) => Err(status),
                (None, Err(status)) => Err(status.clone()),
                (None, Ok(identity)) => self.answer(identity, &info, &head.headers, body),
            },
        };
        let answer = answer.unwrap_or_else(|status| failure(&status));
        self.record(identity.ok(), info, answer.status().as_u16());
        Ok(answer)
    }

    /// Answers a request to run a command in a container.
    async fn exec(
        &self,
        entrance: Entrance,
        info: RequestInfo,
        request: HttpRequest<Incoming>,
    ) -> Result<Answer, Refused> {
        let identity = self.identity(entrance, request.headers());
        if entrance != Entrance::Admin {
            let call = Call {
                method: request.method().as_str(),
                uri: &request.uri().to_string(),
                body: &[],
            };
            if let Some(answer) = self.intercept(&call).await? {
                return Ok(answer);
            }
        }
        let begin = || {
            // As for a POST: a WebSocket can only begin with a GET.
            let asked = info.with_verb("create");
            let identity = identity.as_ref().map_err(Status::clone)?;
            rbac::authorize(&self.store, identity, &asked)?;
            let pod = self.store.current(&self.target(&info)?)?;
            let exec = exec::command(request.uri(), &pod)?;
            exec::begin(request, exec, lock(&self.runner).clone())
        };
        let answer = begin().unwrap_or_else(|status| failure(&status));
        if entrance != Entrance::Admin {
            self.record(identity.ok(), info, answer.status().as_u16());
        }
        Ok(answer)
    }

    /// Returns who sends a request.
    fn identity(&self, entrance: Entrance, headers: &HeaderMap) -> Result<Identity, Status> {
        match entrance {
            Entrance::Admin => Ok(Identity::Admin),
            Entrance::Loopback if !headers.contains_key(header::AUTHORIZATION) => {
                Ok(Identity::Admin)
            }
            // Tests give the driver tokens of their own.
            Entrance::Loopback => Ok(self.identify(headers).unwrap_or(Identity::Admin)),
            Entrance::Pods => self.identify(headers),
        }
    }

    fn identify(&self, headers: &HeaderMap) -> Result<Identity, Status> {
        let Some(credentials) = headers.get(header::AUTHORIZATION) else {
            return Ok(Identity::anonymous());
        };
        let token = credentials
            .to_str()
            .ok()
            .and_then(|value| value.strip_prefix("Bearer "));
        self.tokens
            .identify(&self.store, token.ok_or_else(Status::unauthorized)?)
    }

    /// Applies the interceptor's reaction; returns none when the request is to be served.
    async fn intercept(&self, call: &Call<'_>) -> Result<Option<Answer>, Refused> {
        let interceptor = lock(&self.interceptor).clone();
        let mut reaction = interceptor.map_or(Reaction::Serve, |interceptor| interceptor(call));
        while let Reaction::Delay(delay, next) = reaction {
            tokio::time::sleep(delay).await;
            reaction = *next;
        }
        match reaction {
            Reaction::Serve | Reaction::Delay(..) => Ok(None),
            Reaction::Answer(code, body) => Ok(Some(json_answer(code, body.into_bytes()))),
            Reaction::Hang => std::future::pending().await,
            Reaction::Close => Err(Refused),
        }
    }

    /// Applies the current disturbance; returns none when the request is to be served.
    async fn disturb(&self, info: &RequestInfo) -> Result<Option<Status>, Refused> {
        let mut changes = self.disturbance.subscribe();
        loop {
            let current = changes.borrow_and_update().clone();
            match current {
                Disturbance::None => return Ok(None),
                Disturbance::Refuse => return Err(Refused),
                Disturbance::Slow(delay) => {
                    tokio::time::sleep(delay).await;
                    return Ok(None);
                }
                Disturbance::Hang => {
                    if changes.changed().await.is_err() {
                        return Err(Refused);
                    }
                }
                Disturbance::Fail { .. } => {
                    return Ok(self.take_failure(info).map(Status::disturbed));
                }
            }
        }
    }

    /// Returns the status with which to fail this request, and counts it.
    fn take_failure(&self, info: &RequestInfo) -> Option<u16> {
        let mut taken = None;
        self.disturbance.send_if_modified(|disturbance| {
            let Disturbance::Fail {
                status,
                verb,
                resource,
                times,
            } = disturbance
            else {
                return false;
            };
            let hit = verb.as_ref().is_none_or(|verb| verb == info.verb)
                && resource
                    .as_ref()
                    .is_none_or(|resource| *resource == info.resource)
                && *times > 0;
            if hit {
                taken = Some(*status);
                *times -= 1;
            }
            if *times == 0 {
                *disturbance = Disturbance::None;
            }
            hit
        });
        taken
    }

    fn record(&self, identity: Option<Identity>, info: RequestInfo, status: u16) {
        let user = match identity {
            Some(Identity::User { name, .. }) => name,
            Some(Identity::Admin) | None => String::new(),
        };
        let request = Request {
            user,
            verb: info.verb.to_owned(),
            group: info.group,
            resource: info.resource,
            subresource: info.subresource,
            namespace: info.namespace,
            name: info.name,
            status,
        };
        lock(&self.requests).push(request);
    }

    fn answer(
        &self,
        identity: &Identity,
        info: &RequestInfo,
        headers: &HeaderMap,
        body: Result<Bytes, Status>,
    ) -> Result<Answer, Status> {
        rbac::authorize(&self.store, identity, info)?;
        let body = body?;
        if !info.is_resource() {
            return self.plain_path(info);
        }
        if info.verb == "create" && info.qualified() == TOKEN_REVIEWS && info.version == "v1" {
            let review = read_body(headers, &body)?;
            let review = self.tokens.review(&self.store, review)?;
            return Ok(json_answer(201, review.to_string().into_bytes()));
        }
        if info.verb == "create" && rbac::is_review(info) {
            let review = read_body(headers, &body)?;
            let review = rbac::review(&self.store, identity, review);
            return Ok(json_answer(201, review.to_string().into_bytes()));
        }
        let target = self.target(info)?;
        if !accepts_whole_objects(headers) && !accepts_metadata(info, headers) {
            return Err(Status::not_acceptable());
        }
        self.resource(info, &target, headers, &body)
    }

    fn plain_path(&self, info: &RequestInfo) -> Result<Answer, Status> {
        if info.verb != "get" {
            return Err(Status::method_not_allowed());
        }
        if matches!(info.path.as_str(), "/healthz" | "/livez" | "/readyz") {
            return Ok(text(200, "ok"));
        }
        match discovery::document(&self.store, &info.path) {
            Some(document) => Ok(json_answer(200, document.to_string().into_bytes())),
            None => Ok(text(404, "404 page not found\n")),
        }
    }

    pub(super) fn target(&self, info: &RequestInfo) -> Result<Target, Status> {
        let resource = self
            .store
            .resource(&info.qualified())
            .filter(|resource| resource.version(&info.version).is_some())
            .ok_or_else(Status::no_such_resource)?;
        let namespaced_path = !info.namespace.is_empty() && resource.qualified != "namespaces";
        // Paths of namespaced kinds contain a namespace, those of cluster-scoped kinds never do.
        if namespaced_path != resource.namespaced
            && (namespaced_path
                || !info.name.is_empty()
                || info.verb == "create"
                || info.verb == "deletecollection")
        {
            return Err(Status::no_such_resource());
        }
        Ok(Target {
            version: info.version.clone(),
            namespace: if resource.namespaced {
                info.namespace.clone()
            } else {
                String::new()
            },
            name: info.name.clone(),
            subresource: info.subresource.clone(),
            resource,
        })
    }

    fn resource(
        &self,
        info: &RequestInfo,
        target: &Target,
        headers: &HeaderMap,
        body: &Bytes,
    ) -> Result<Answer, Status> {
        match (info.verb, info.subresource.as_str()) {
            ("create", "token") if target.resource.qualified == "serviceaccounts" => {
                let token = self
                    .tokens
                    .issue(&self.store, target, read_body(headers, body)?)?;
                return Ok(json_answer(201, token.to_string().into_bytes()));
            }
            ("create", "binding") if target.resource.qualified == "pods" => {
                self.store.bind(target, &read_body(headers, body)?)?;
                let done = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
                return Ok(json_answer(201, done.to_string().into_bytes()));
            }
            (_, "") => {}
            ("get" | "update" | "patch", "status") if target.has_status() => {}
            _ => return Err(Status::no_such_resource()),
        }
        match info.verb {
            "get" => {
                let object = self
                    .store
                    .get(&target.resource.qualified, &target.namespace, &target.name)
                    .ok_or_else(|| Status::not_found(&target.resource, &target.name))?;
                if accepts_metadata(info, headers) && !accepts_whole_objects(headers) {
                    return Ok(json_answer(200, metadata(&object).to_string().into_bytes()));
                }
                Ok(object_answer(200, target, &object))
            }
            "list" => {
                let selector = selector(info, target)?;
                let namespace = (!target.namespace.is_empty()).then_some(target.namespace.as_str());
                let (revision, mut objects) =
                    self.store.list(&target.resource.qualified, namespace);
                objects.retain(|object| selector.matches(object));
                let (next, objects) = page(info, objects)?;
                let accept = headers
                    .get(header::ACCEPT)
                    .and_then(|value| value.to_str().ok());
                let rendered = match accept {
                    Some(accept) if accept.contains("as=PartialObjectMetadataList") => {
                        metadata_list(revision, next, &objects)
                    }
                    _ => list(target, revision, next, &objects),
                };
                Ok(json_answer(200, rendered))
            }
            "watch" => self.watch(info, target),
            "create" if target.name.is_empty() => {
                let options = write_options(info, target, headers);
                let body = read_body(headers, body)?;
                let object = self.store.create(target, body, &options)?;
                Ok(object_answer(201, target, &object))
            }
            "update" => {
                let options = write_options(info, target, headers);
                let body = read_body(headers, body)?;
                let object = self.store.update(target, body, &options)?;
                Ok(object_answer(200, target, &object))
            }
            "patch" => {
                let options = write_options(info, target, headers);
                let patch = read_patch(headers, body)?;
                let object = self.store.patch(target, &patch, &options)?;
                Ok(object_answer(200, target, &object))
            }
            "delete" => {
                let options = delete_options(info, &read_body(headers, body)?);
                self.delete(target, &options)
            }
            _ => Err(Status::method_not_allowed()),
        }
    }

    fn watch(&self, info: &RequestInfo, target: &Target) -> Result<Answer, Status> {
        let number = |name: &str| {
            let value = info.query(name).map(str::parse::<u64>).transpose();
            value.map_err(|error| Status::bad_request(format!("invalid value for {name}: {error}")))
        };
        let start = Start {
            resource_version: number("resourceVersion")?,
            initial_events: info.flag("sendInitialEvents"),
            timeout: number("timeoutSeconds")?.map_or(WATCH_TIMEOUT, Duration::from_secs),
        };
        let selector = selector(info, target)?;
        let watch = Watch::begin(self.store.clone(), target.clone(), selector, &start)?;
        let frames = watch.into_stream().map(|lines| Ok(Frame::data(lines)));
        let mut answer = Response::new(BoxBody::new(StreamBody::new(frames)));
        answer.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        Ok(answer)
    }

    fn delete(&self, target: &Target, options: &DeleteOptions) -> Result<Answer, Status> {
        let deleted = self.store.delete(target, options)?;
        let returns_object = matches!(
            target.resource.qualified.as_str(),
            "pods" | "serviceaccounts"
        );
        if !deleted.gone || returns_object {
            return Ok(object_answer(200, target, &deleted.object));
        }
        let mut details = details(&target.resource, &target.name, &target.resource.plural);
        details["uid"] = deleted.object["metadata"]["uid"].clone();
        let done = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
        Ok(json_answer(200, done.to_string().into_bytes()))
    }
}

/// Cuts a list into the page that a request asks for. Returns the token of the next page, too: the number of
/// objects before it, because nothing is remembered of a list.
fn page(
    info: &RequestInfo,
    objects: Vec<Arc<Value>>,
) -> Result<(Option<usize>, Vec<Arc<Value>>), Status> {
    let number = |name: &str| {
        let value = info.query(name).map(str::parse::<usize>).transpose();
        value.map_err(|error| Status::bad_request(format!("invalid value for {name}: {error}")))
    };
    let before = number("continue")?.unwrap_or(0);
    let Some(limit) = number("limit")?.filter(|limit| *limit > 0) else {
        return Ok((None, objects.into_iter().skip(before).collect()));
    };
    let next = before.saturating_add(limit);
    let next = (next < objects.len()).then_some(next);
    let page = objects.into_iter().skip(before).take(limit);
    Ok((next, page.collect()))
}

fn selector(info: &RequestInfo, target: &Target) -> Result<Selector, Status> {
    let labels = info.query("labelSelector").unwrap_or_default();
    Selector::parse(
        &target.resource,
        labels,
        info.query("fieldSelector").unwrap_or_default(),
    )
}

fn write_options(info: &RequestInfo, target: &Target, headers: &HeaderMap) -> WriteOptions {
    let agent = headers
        .get(header::USER_AGENT)
        .and_then(|value| value.to_str().ok());
    let program = agent
        .and_then(|agent| agent.split('/').next())
        .filter(|program| !program.is_empty());
    let name = info.query("fieldManager").or(program).unwrap_or("unknown");
    WriteOptions {
        manager: Manager {
            name: name.to_owned(),
            api_version: target.resource.api_version(&target.version),
            subresource: target.subresource.clone(),
        },
        dry_run: info.query("dryRun").is_some(),
    }
}

fn delete_options(info: &RequestInfo, body: &Value) -> DeleteOptions {
    let text = |value: &Value| {
        value
            .as_str()
            .filter(|value| !value.is_empty())
            .map(str::to_owned)
    };
    DeleteOptions {
        grace_period: body["gracePeriodSeconds"]
            .as_u64()
            .or_else(|| info.query("gracePeriodSeconds")?.parse().ok()),
        uid: text(&body["preconditions"]["uid"]),
        resource_version: text(&body["preconditions"]["resourceVersion"]),
        dry_run: body["dryRun"]
            .as_array()
            .is_some_and(|list| !list.is_empty())
            || info.query("dryRun").is_some(),
    }
}

/// Returns whether a client takes objects as they are, and not only as tables or
/// `PartialObjectMetadata`.
fn accepts_whole_objects(headers: &HeaderMap) -> bool {
    let accepted = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok());
    let is_whole = |kind: &str| !kind.split(';').any(|part| part.trim().starts_with("as="));
    accepted.is_none_or(|kinds| kinds.split(',').any(is_whole))
}

/// Returns whether a client reads the metadata of objects, as `PartialObjectMetadata`.
fn accepts_metadata(info: &RequestInfo, headers: &HeaderMap) -> bool {
    let accepted = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok());
    let form = match info.verb {
        "get" => "as=PartialObjectMetadata;",
        "list" => "as=PartialObjectMetadataList;",
        _ => return false,
    };
    accepted.is_some_and(|kinds| kinds.contains(form))
}

async fn collect(body: Incoming) -> Result<Bytes, Status> {
    let body = Limited::new(body, MAX_BODY).collect().await;
    let body = body.map_err(|error| {
        if error.is::<LengthLimitError>() {
            Status::too_large(MAX_BODY)
        } else {
            Status::bad_request(format!("the body of the request broke off: {error}"))
        }
    })?;
    Ok(body.to_bytes())
}

/// Reads a body as JSON; an empty one is `null`.
fn read_body(headers: &HeaderMap, bytes: &Bytes) -> Result<Value, Status> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    let kind = content_type(headers);
    if !kind.is_empty() && !kind.ends_with("json") {
        return Err(Status::unsupported_media_type("application/json"));
    }
    serde_json::from_slice(bytes).map_err(|error| {
        Status::bad_request(format!("error decoding the body of the request: {error}"))
    })
}

fn read_patch(headers: &HeaderMap, body: &Bytes) -> Result<Value, Status> {
    match content_type(headers) {
        "application/merge-patch+json" => read_body(headers, body),
        _ => Err(Status::unsupported_media_type(
            "application/merge-patch+json",
        )),
    }
}

fn content_type(headers: &HeaderMap) -> &str {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

fn object_answer(code: u16, target: &Target, object: &Value) -> Answer {
    let object = at_version(&target.resource, &target.version, object);
    json_answer(code, object.to_string().into_bytes())
}

fn failure(status: &Status) -> Answer {
    let mut answer = json_answer(status.code, status.to_value().to_string().into_bytes());
    if status.code == 429 {
        answer
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    answer
}

fn json_answer(code: u16, body: Vec<u8>) -> Answer {
    let mut answer = with_type(code, "application/json", body);
    if code == 429 {
        // As a real server does that has too many requests.
        let headers = answer.headers_mut();
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    answer
}

fn text(code: u16, body: &'static str) -> Answer {
    with_type(code, "text/plain; charset=utf-8", body.as_bytes().to_vec())
}

fn with_type(code: u16, kind: &'static str, body: Vec<u8>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)).boxed());
    // A disturbance may name any number; one that is no HTTP status becomes a server error.
    *answer.status_mut() =
        http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_with_too_many_requests_says_when_to_come_back() {
        for (code, expected) in [(200, None), (429, Some("1")), (503, None)] {
            let answer = json_answer(code, Vec::new());
            let after = answer.headers().get(header::RETRY_AFTER);
            assert_eq!(after.and_then(|after| after.to_str().ok()), expected);
        }
    }
}
