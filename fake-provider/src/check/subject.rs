//! The provider that is checked, and the calls to it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proto::provider::csi_driver_provider_client::CsiDriverProviderClient;
use proto::provider::{
    File, MountRequest, MountResponse, ObjectVersion, VersionRequest, VersionResponse,
};
use serde_json::json;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::forms::{forms, hide};
use super::secrecy::own_values;
use super::target::Target;
use super::{Finding, Settings, failed};
use crate::server::{INTERFACE, TOKENS_KEY};

/// The largest answer that the checker reads: more than the driver does, to measure it.
pub(super) const LARGEST_ANSWER: usize = 256 << 20;

/// The time within which `Version` has to answer, as in the existing driver's health check.
const HEALTH_CHECK: Duration = Duration::from_secs(5);

/// The permission that the driver asks for.
pub(super) const PERMISSION: u32 = 0o644;

/// The provider that is checked.
pub(super) struct Subject {
    pub(super) settings: Settings,
    /// The forms in which a text may quote the tokens and secrets of the settings.
    pub(super) own: Vec<String>,
    targets: AtomicU32,
    first: OnceCell<Result<Answer, Status>>,
}

/// The content of a volume after a successful Mount.
#[derive(Clone)]
pub(super) struct Answer {
    /// The files, sorted by path.
    pub(super) files: Vec<File>,
    /// Whether the provider wrote the files below the target path.
    is_written: bool,
    /// The versions, sorted by id: an answer may have them in any order.
    pub(super) versions: Vec<ObjectVersion>,
    /// The size of the whole answer on the wire.
    pub(super) bytes: usize,
    /// Whether the answer had files, and there were files below the target path as well.
    pub(super) wrote_beside: bool,
}

impl Answer {
    pub(super) fn paths(&self) -> Vec<&str> {
        self.files.iter().map(|file| file.path.as_str()).collect()
    }
}

impl Subject {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            own: forms(&own_values(&settings)),
            settings,
            targets: AtomicU32::new(0),
            first: OnceCell::new(),
        }
    }

    /// Returns a client that makes a connection of its own, with `:authority: localhost`.
    pub(super) fn client(&self) -> Result<CsiDriverProviderClient<Channel>, Finding> {
        Ok(CsiDriverProviderClient::new(self.channel()?).max_decoding_message_size(LARGEST_ANSWER))
    }

    /// Returns a connection that its first call makes.
    pub(super) fn channel(&self) -> Result<Channel, Finding> {
        let socket = std::path::absolute(&self.settings.socket)
            .map_err(|error| failed(format!("the socket's path: {error}")))?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .map_err(|error| failed(format!("the socket's path: {error}")))?;
        let localhost = http::Uri::from_static("http://localhost");
        Ok(endpoint.origin(localhost).connect_lazy())
    }

    /// Calls `Version` on a connection of its own.
    pub(super) async fn version(&self) -> Result<VersionResponse, Finding> {
        let request = VersionRequest {
            version: INTERFACE.to_owned(),
        };
        let mut client = self.client()?;
        match tokio::time::timeout(HEALTH_CHECK, client.version(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(failed(format!("Version failed: {}", self.told(&status)))),
            Err(_) => Err(failed("Version did not answer in 5 seconds")),
        }
    }

    /// Checks that the provider still answers after `event`.
    pub(super) async fn answers_after(&self, event: &str) -> Result<(), Finding> {
        match self.version().await {
            Ok(_) => Ok(()),
            Err(Finding::Failed(reason)) => Err(failed(format!("after {event}: {reason}"))),
            Err(skipped) => Err(skipped),
        }
    }

    /// Returns the attributes that the driver sends for a class with these parameters.
    fn attributes(&self, parameters: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut attributes = parameters.clone();
        attributes.extend(self.settings.pod.clone());
        if !self.settings.tokens.is_empty() {
            attributes.insert(TOKENS_KEY.to_owned(), tokens_json(&self.settings.tokens));
        }
        attributes
    }

    /// Returns a request like the driver's, for a class with these parameters.
    pub(super) fn request_for(&self, parameters: &BTreeMap<String, String>) -> MountRequest {
        MountRequest {
            attributes: json!(self.attributes(parameters)).to_string(),
            secrets: json!(self.settings.secrets).to_string(),
            target_path: String::new(),
            permission: PERMISSION.to_string(),
            current_object_version: Vec::new(),
        }
    }

    /// Returns a request for the objects that exist.
    pub(super) fn request(&self) -> MountRequest {
        self.request_for(&self.settings.parameters)
    }

    /// Returns the request with one more attribute, or with another value of one.
    pub(super) fn request_with(&self, name: &str, value: &str) -> MountRequest {
        self.changed_request(&self.settings.parameters, name, value)
    }

    /// Returns a request for a class with these parameters, with one more attribute, or with another
    /// value of one.
    pub(super) fn changed_request(
        &self,
        parameters: &BTreeMap<String, String>,
        name: &str,
        value: &str,
    ) -> MountRequest {
        let mut attributes = self.attributes(parameters);
        attributes.insert(name.to_owned(), value.to_owned());
        MountRequest {
            attributes: json!(attributes).to_string(),
            ..self.request_for(parameters)
        }
    }

    /// Makes a new target path, which only its owner can enter: provider and checker write secrets
    /// into it.
    pub(super) fn target(&self) -> Result<Target, Finding> {
        let number = self.targets.fetch_add(1, Ordering::Relaxed);
        let name = format!("provider-check-{}-{number}", std::process::id());
        let path = self.settings.target_dir.join(name);
        Target::create(path.clone()).map_err(|error| {
            let path = path.display();
            Finding::Skipped(format!("cannot make the target path {path}: {error}"))
        })
    }

    /// Returns a request with the deadline of a call, which the driver tells the provider as well.
    /// tonic ends the call at that time with CANCELLED; half a second more lets the checker end it
    /// first.
    pub(super) fn timed<M>(&self, message: M) -> Request<M> {
        let mut request = Request::new(message);
        request.set_timeout(self.settings.timeout + Duration::from_millis(500));
        request
    }

    /// Sends a Mount request on a connection of its own.
    pub(super) async fn mount(&self, request: MountRequest) -> Result<Answer, Status> {
        self.mount_on(self.client().map_err(unusable)?, request)
            .await
    }

    /// Sends a Mount request on a given connection, with a new target path. If the request has
    /// mounted versions, the content of the first answer is there already.
    pub(super) async fn mount_on(
        &self,
        mut client: CsiDriverProviderClient<Channel>,
        mut request: MountRequest,
    ) -> Result<Answer, Status> {
        let target = self.target().map_err(unusable)?;
        request.target_path = target.path();
        let mounted = match self.first.get() {
            Some(Ok(first)) if !request.current_object_version.is_empty() => Some(first),
            _ => None,
        };
        // Files that the provider wrote are its own, so that it writes them again.
        let is_own = mounted.is_some_and(|first| first.is_written);
        if is_own {
            let mut first_mount = request.clone();
            first_mount.current_object_version.clear();
            self.send(&mut client, first_mount).await?;
        } else if let Some(first) = mounted {
            target.fill(&first.files);
        }
        let before = if is_own { Vec::new() } else { target.files()? };
        let response = self.send(&mut client, request).await?;
        let bytes = prost::Message::encoded_len(&response);
        if let Some(code) = error_code(&response) {
            return Err(Status::unknown(format!("error code {code:?}")));
        }
        let mut written = target.files()?;
        written.retain(|file| !before.contains(file));
        let is_written = response.files.is_empty();
        let wrote_beside = !is_written && !written.is_empty();
        let mut files = if is_written { written } else { response.files };
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut versions = response.object_version;
        versions.sort_by(|a, b| (&a.id, &a.version).cmp(&(&b.id, &b.version)));
        Ok(Answer {
            files,
            is_written,
            versions,
            bytes,
            wrote_beside,
        })
    }

    async fn send(
        &self,
        client: &mut CsiDriverProviderClient<Channel>,
        request: MountRequest,
    ) -> Result<MountResponse, Status> {
        let limit = self.settings.timeout;
        match tokio::time::timeout(limit, client.mount(self.timed(request))).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "Mount did not answer in {limit:?}"
            ))),
        }
    }

    /// Sends a Mount request that may fail, but has to be answered.
    pub(super) async fn answered(
        &self,
        request: MountRequest,
    ) -> Result<Result<Answer, Status>, Finding> {
        match self.mount(request).await {
            Err(status) if status.code() == Code::DeadlineExceeded => {
                Err(failed(self.told(&status)))
            }
            answer => Ok(answer),
        }
    }

    /// Sends a Mount request that has to succeed, as the first one did.
    pub(super) async fn succeeds(&self, request: MountRequest) -> Result<Answer, Finding> {
        self.first().await?;
        let answer = self.mount(request).await;
        answer.map_err(|status| failed(format!("Mount failed: {}", self.told(&status))))
    }

    /// Returns the answer to the first request for the objects that exist. A check that needs it is
    /// skipped if that request failed.
    pub(super) async fn first(&self) -> Result<&Answer, Finding> {
        let outcome = self.first_outcome().await.as_ref();
        outcome.map_err(|_| Finding::Skipped("mount-succeeds failed".to_owned()))
    }

    /// Returns the outcome of the first request for the objects that exist.
    pub(super) async fn first_outcome(&self) -> &Result<Answer, Status> {
        self.first.get_or_init(|| self.mount(self.request())).await
    }

    /// Returns whether the first Mount has been answered with success.
    pub(super) fn has_mounted(&self) -> bool {
        matches!(self.first.get(), Some(Ok(_)))
    }

    /// Checks that a Mount succeeds soon: calls that nobody waits for may take a moment to end.
    pub(super) async fn recovers(&self) -> Result<(), Finding> {
        const PAUSE: Duration = Duration::from_millis(100);
        const SOON: Duration = Duration::from_secs(2);
        let limit = Instant::now() + SOON;
        loop {
            // The provider may not have noticed yet that nobody waits.
            sleep(PAUSE).await;
            match self.succeeds(self.request()).await {
                Err(_) if Instant::now() < limit => {}
                outcome => return outcome.map(drop),
            }
        }
    }

    /// Returns whether a text has a token or a secret of the checker's in any form.
    pub(super) fn has_own(&self, text: &str) -> bool {
        self.own.iter().any(|form| text.contains(&**form))
    }

    /// Returns a status as a reason shows it: the beginning of its message, without the tokens and
    /// secrets of the settings, which the provider may quote.
    pub(super) fn told(&self, status: &Status) -> String {
        let message = hide(status.message(), &self.own);
        let message: String = message.chars().take(200).collect();
        match message.as_str() {
            "" => format!("{:?}", status.code()),
            message => format!("{:?}, {message:?}", status.code()),
        }
    }
}

/// Returns the error code of an answer. An error with an empty code is none for the driver.
pub(super) fn error_code(response: &MountResponse) -> Option<&str> {
    let code = response.error.as_ref()?.code.as_str();
    (!code.is_empty()).then_some(code)
}

fn unusable(finding: Finding) -> Status {
    let (Finding::Failed(reason) | Finding::Skipped(reason)) = finding;
    Status::internal(reason)
}

/// Returns tokens in the form that kubelet sends.
pub(super) fn tokens_json(tokens: &BTreeMap<String, String>) -> String {
    let tokens: BTreeMap<_, _> = tokens
        .iter()
        .map(|(audience, token)| {
            let token = json!({"token": token, "expirationTimestamp": "2100-01-01T00:00:00Z"});
            (audience, token)
        })
        .collect();
    json!(tokens).to_string()
}

/// Returns whether kubelet takes the code for a failure that may pass.
pub(super) fn may_pass(code: Code) -> bool {
    [
        Code::Cancelled,
        Code::DeadlineExceeded,
        Code::Unavailable,
        Code::ResourceExhausted,
        Code::Aborted,
    ]
    .contains(&code)
}
