//! The HTTP interface: upstream's two switches, objects and faults at run time, and the counts of calls.

use std::sync::Arc;

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, put};
use http::header::CONTENT_TYPE;
use http::{Method, StatusCode, Uri};
use serde::Deserialize;

use super::faults::parse_faults;
use super::provider::FakeProvider;
use super::source::Stored;

/// The largest form that is read, in bytes.
const MAX_FORM: usize = 64 << 10;

/// Returns the routes that the documentation of [`crate::fake`] lists.
pub(super) fn router(provider: Arc<FakeProvider>) -> Router {
    Router::new()
        .route("/rotation", any(rotation))
        .route("/validate-token-requests", any(validate_token_requests))
        .route("/objects", any(set_object))
        .route("/calls", get(calls))
        .route("/calls/reset", any(reset_calls))
        .route(
            "/faults",
            put(set_faults).delete(clear_faults).get(query_faults),
        )
        .route("/reset", any(reset))
        .with_state(provider)
}

async fn rotation(
    State(provider): State<Arc<FakeProvider>>,
    request: Request,
) -> Result<(), Refusal> {
    let state = value("rotated", request).await?;
    tracing::info!(rotated = state, "rotation set");
    provider.set_rotated(state);
    Ok(())
}

async fn validate_token_requests(
    State(provider): State<Arc<FakeProvider>>,
    request: Request,
) -> Result<(), Refusal> {
    let audiences = value("audience", request).await?;
    tracing::info!(audiences, "token audiences set");
    provider.set_token_audiences(audiences);
    Ok(())
}

/// The query of `/objects`.
#[derive(Deserialize)]
struct Setting {
    name: String,
    content: String,
    version: Option<String>,
}

async fn set_object(State(provider): State<Arc<FakeProvider>>, Query(setting): Query<Setting>) {
    tracing::info!(
        object = setting.name,
        version = setting.version,
        "object set"
    );
    let object = Stored::of_text(setting.content, setting.version);
    provider.set_object(setting.name, object);
}

async fn calls(State(provider): State<Arc<FakeProvider>>) -> Result<Response, Refusal> {
    let json = serde_json::to_string(&provider.calls.read())
        .map_err(|error| Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(([(CONTENT_TYPE, "application/json")], json).into_response())
}

async fn reset_calls(State(provider): State<Arc<FakeProvider>>) {
    provider.calls.reset();
}

async fn set_faults(
    State(provider): State<Arc<FakeProvider>>,
    yaml: String,
) -> Result<(), Refusal> {
    let faults = parse_faults(&yaml).map_err(|reason| Refusal(StatusCode::BAD_REQUEST, reason))?;
    tracing::info!(count = faults.len(), "faults set");
    provider.faults.set(faults);
    Ok(())
}

/// The query of `/faults`.
#[derive(Deserialize)]
struct FaultsQuery {
    set: String,
}

async fn query_faults(
    state: State<Arc<FakeProvider>>,
    Query(query): Query<FaultsQuery>,
) -> Result<(), Refusal> {
    set_faults(state, query.set).await
}

async fn reset(State(provider): State<Arc<FakeProvider>>) {
    tracing::info!("objects, faults and counts reset");
    provider.reset();
}

async fn clear_faults(State(provider): State<Arc<FakeProvider>>) {
    tracing::info!("faults cleared");
    provider.faults.set(Vec::new());
}

/// A refused request: the status, and the reason for the body.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, self.1 + "\n").into_response()
    }
}

/// Returns a value as Go's `Request.FormValue` does: the first one of the form in the body, else of
/// the query; empty if there is none (<https://pkg.go.dev/net/http#Request.FormValue>).
async fn value(key: &str, request: Request) -> Result<String, Refusal> {
    let (parts, body) = request.into_parts();
    let is_form = [Method::POST, Method::PUT, Method::PATCH].contains(&parts.method)
        && parts.headers.get(CONTENT_TYPE).is_some_and(|kind| {
            kind.as_bytes()
                .starts_with(b"application/x-www-form-urlencoded")
        });
    let mut pairs = Vec::new();
    if is_form {
        let form = to_bytes(body, MAX_FORM)
            .await
            .map_err(|error| Refusal(StatusCode::BAD_REQUEST, error.to_string()))?;
        // A form and a query are written the same way, and axum reads queries out of URIs.
        let uri = Uri::try_from([b"/?", &form[..]].concat())
            .map_err(|error| Refusal(StatusCode::BAD_REQUEST, error.to_string()))?;
        pairs.extend(query_pairs(&uri)?);
    }
    pairs.extend(query_pairs(&parts.uri)?);
    Ok(pairs
        .into_iter()
        .find(|(name, _)| name == key)
        .map(|(_, value)| value)
        .unwrap_or_default())
}

fn query_pairs(uri: &Uri) -> Result<Vec<(String, String)>, Refusal> {
    let pairs = Query::try_from_uri(uri);
    pairs
        .map(|Query(pairs)| pairs)
        .map_err(|error| Refusal(StatusCode::BAD_REQUEST, error.body_text()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use rstest::rstest;

    #[rstest]
    #[case("GET", "/rotation?rotated=true", "", "true")]
    #[case("DELETE", "/rotation?x=1&rotated=a%2Cb+c&rotated=2", "", "a,b c")]
    #[case("POST", "/rotation?rotated=query", "rotated=form%20body", "form body")]
    #[case("POST", "/rotation?rotated=query", "other=1", "query")]
    #[case("GET", "/rotation", "rotated=ignored", "")]
    #[tokio::test]
    async fn a_value_is_found_as_in_go(
        #[case] method: &str,
        #[case] uri: &str,
        #[case] form: &'static str,
        #[case] expected: &str,
    ) {
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(Body::from(form))
            .unwrap();
        assert_eq!(value("rotated", request).await.ok().unwrap(), expected);
    }
}
