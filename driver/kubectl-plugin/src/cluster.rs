//! Reads the cluster with the rights of the person who asks. What may not be read, or does not answer in time,
//! is not an error: the rest goes on, and the story says what is missing.

use std::{cell::Cell, path::PathBuf, time::Duration};

use k8s_openapi::api::authorization::v1::{SubjectAccessReview, SubjectAccessReviewSpec};
use kube::{
    Api, Client, Config, Resource,
    api::{ListParams, ObjectList, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::Request,
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::timeout;

use crate::text::one_line;

pub use k8s_openapi::api::authorization::v1::ResourceAttributes;

/// The time that one request may take.
const REQUEST: Duration = Duration::from_secs(10);
/// The time in which the API server has to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// The objects that one page of a list has.
const PAGE: u32 = 500;

/// Where the cluster is, as kubectl's flags say it.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// `--kubeconfig`; else `$KUBECONFIG`, `~/.kube/config`, or the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// `--context`; else the current one.
    pub context: Option<String>,
    /// `--namespace`; else that of the context.
    pub namespace: Option<String>,
}

impl Place {
    /// Connects. Returns the client and the namespace.
    ///
    /// # Errors
    /// Says which file or entry cannot be used.
    pub async fn connect(&self) -> Result<(Client, String), String> {
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        let config = match &self.kubeconfig {
            Some(path) => match Kubeconfig::read_from(path) {
                Ok(read) => Config::from_custom_kubeconfig(read, &options).await,
                Err(error) => return Err(format!("{}: {error}", path.display())),
            },
            None if self.context.is_none() => match Config::infer().await {
                Ok(config) => Ok(config),
                Err(error) => {
                    return Err(format!("there is no kubeconfig that can be used: {error}"));
                }
            },
            None => Config::from_kubeconfig(&options).await,
        };
        let mut config =
            config.map_err(|error| format!("the kubeconfig cannot be used: {error}"))?;
        config.connect_timeout = Some(CONNECT);
        let namespace = self.namespace.clone();
        let namespace = namespace.unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config)
            .map_err(|error| format!("the kubeconfig cannot be used: {error}"))?;
        Ok((client, namespace))
    }
}

/// What came of a request.
#[derive(Debug, Clone)]
pub enum Read<T> {
    /// It is there.
    Is(T),
    /// There is no such object.
    Missing,
    /// The API server does not know the kind.
    NoKind,
    /// It could not be read: why.
    Unknown(String),
}

impl<T> Read<T> {
    /// Returns what is there.
    pub fn found(&self) -> Option<&T> {
        match self {
            Self::Is(value) => Some(value),
            _ => None,
        }
    }

    /// Returns whether it is known that there is no such object.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Missing)
    }

    /// Returns why it is not known.
    pub fn unknown(&self) -> Option<&str> {
        match self {
            Self::Unknown(why) => Some(why),
            _ => None,
        }
    }

    fn of(answer: Result<T, kube::Error>) -> Self {
        match answer {
            Ok(value) => Self::Is(value),
            Err(kube::Error::Api(status)) if status.code == 404 => {
                // A kind that is not served has no object in the details.
                let details = status.details.as_ref();
                match details.is_some_and(|details| !details.name.is_empty()) {
                    true => Self::Missing,
                    false => Self::NoKind,
                }
            }
            Err(error) => Self::Unknown(why(&error)),
        }
    }

    /// Returns the same of another value.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Read<U> {
        match self {
            Self::Is(value) => Read::Is(change(value)),
            Self::Missing => Read::Missing,
            Self::NoKind => Read::NoKind,
            Self::Unknown(why) => Read::Unknown(why),
        }
    }
}

/// Returns why a request failed, in one line.
fn why(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 403 => "forbidden".to_owned(),
        kube::Error::Api(status) if status.code == 401 => {
            "the API server does not know you (Unauthorized)".to_owned()
        }
        kube::Error::Api(status) if !status.message.is_empty() => one_line(&status.message, 200),
        // A proxy answers without a body, of which the client makes an object that has nothing to show.
        kube::Error::Api(status) => format!(
            "the API server, or a proxy before it, answered with HTTP status {} and without words",
            status.code
        ),
        other => one_line(&with_sources(other), 200),
    }
}

/// Returns an error with its causes: "client error (Connect)" alone helps nobody.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

/// Waits for a request, but not for ever.
pub async fn read<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Read<T> {
    match timeout(REQUEST, request).await {
        Ok(answer) => Read::of(answer),
        Err(_) => Read::Unknown(format!(
            "the API server did not answer within {} seconds",
            REQUEST.as_secs()
        )),
    }
}

/// The objects of a list, and whether all were read.
#[derive(Debug, Clone)]
pub struct Listed<T> {
    /// The objects that were read.
    pub items: Vec<T>,
    /// Whether there are more, or some that cannot be understood.
    pub is_cut: bool,
}

/// Reads a list page by page, up to `most` objects. An object that cannot be understood, such as an event with a
/// time that no clock shows, hides only itself: anybody may have made it.
pub async fn list<K>(api: &Api<K>, params: ListParams, most: usize) -> Read<Listed<K>>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    let client = api.clone().into_client();
    let left_out = Cell::new(false);
    let page = async |params| {
        let request = Request::new(api.resource_url()).list(&params);
        let request = request.map_err(kube::Error::BuildRequest)?;
        let page: ObjectList<Value> = client.request(request).await?;
        let count = page.items.len();
        let items = page.items.into_iter();
        let items: Vec<K> = items
            .filter_map(|item| serde_json::from_value(item).ok())
            .collect();
        left_out.set(left_out.get() || items.len() < count);
        Ok(ObjectList {
            types: page.types,
            metadata: page.metadata,
            items,
        })
    };
    pages(most, params, page).await.map(|listed| Listed {
        is_cut: listed.is_cut || left_out.get(),
        ..listed
    })
}

/// Reads the metadata of a list's objects page by page, up to `most` objects.
pub async fn list_metadata<K>(
    api: &Api<K>,
    params: ListParams,
    most: usize,
) -> Read<Listed<kube::core::PartialObjectMeta<K>>>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    pages(most, params, async |params| {
        api.list_metadata(&params).await
    })
    .await
}

async fn pages<T: Clone>(
    most: usize,
    mut params: ListParams,
    page: impl AsyncFn(ListParams) -> Result<ObjectList<T>, kube::Error>,
) -> Read<Listed<T>> {
    let mut items = Vec::new();
    loop {
        let left = u32::try_from(most - items.len()).unwrap_or(PAGE);
        params.limit = Some(left.clamp(1, PAGE));
        let list = match read(page(params.clone())).await {
            Read::Is(list) => list,
            failed => {
                return failed.map(|list| Listed {
                    items: list.items,
                    is_cut: true,
                });
            }
        };
        items.extend(list.items);
        let next = list.metadata.continue_.filter(|token| !token.is_empty());
        let is_cut = next.is_some();
        match next {
            Some(token) if items.len() < most => params.continue_token = Some(token),
            _ => {
                let is_cut = is_cut || items.len() > most;
                items.truncate(most);
                return Read::Is(Listed { items, is_cut });
            }
        }
    }
}

/// Asks whether a service account may do something.
pub async fn may(client: &Client, account: (&str, &str), what: ResourceAttributes) -> Read<bool> {
    let (namespace, name) = account;
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!("system:serviceaccount:{namespace}:{name}")),
            groups: Some(vec![
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated".to_owned(),
            ]),
            resource_attributes: Some(what),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let api: Api<SubjectAccessReview> = Api::all(client.clone());
    let answer = read(api.create(&PostParams::default(), &review)).await;
    answer.map(|review| review.status.is_some_and(|status| status.allowed))
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    /// A proxy that answers without a body has no object of the client shown.
    #[test]
    fn an_answer_without_words_has_its_code() {
        for (said, expected) in [
            ("bad gateway", "bad gateway"),
            (
                "",
                "the API server, or a proxy before it, answered with HTTP status 502 and without words",
            ),
        ] {
            let status = Status::failure(said, "Failed to parse error data").with_code(502);
            assert_eq!(why(&kube::Error::Api(status.boxed())), expected);
        }
    }
}
