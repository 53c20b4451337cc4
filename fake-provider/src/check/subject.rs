//! The provider that is checked, and the calls to it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proto::provider::csi_driver_provider_client::CsiDriverProviderClient;
use proto::provider::{File, MountRequest, ObjectVersion, VersionRequest, VersionResponse};
use serde_json::json;
use tokio::sync::OnceCell;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

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
    targets: AtomicU32,
    first: OnceCell<Result<Answer, Status>>,
}

/// The content of a volume after a successful Mount.
#[derive(Clone)]
pub(super) struct Answer {
    /// The files, sorted by path.
    pub(super) files: Vec<File>,
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
            Ok(Err(status)) => Err(failed(format!("Version failed: {}", told(&status)))),
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
        let mut attributes = self.attributes(&self.settings.parameters);
        attributes.insert(name.to_owned(), value.to_owned());
        MountRequest {
            attributes: json!(attributes).to_string(),
            ..self.request()
        }
    }

    /// Makes a new target path.
    pub(super) fn target(&self) -> Result<Target, Finding> {
        let number = self.targets.fetch_add(1, Ordering::Relaxed);
        let name = format!("provider-check-{}-{number}", std::process::id());
        let path = self.settings.target_dir.join(name);
        let mut directory = fs::DirBuilder::new();
        match directory.recursive(true).mode(0o755).create(&path) {
            Ok(()) => Ok(Target(path)),
            Err(error) => {
                let path = path.display();
                Err(Finding::Skipped(format!("cannot make {path}: {error}")))
            }
        }
    }

    /// Sends a Mount request on a connection of its own.
    pub(super) async fn mount(&self, request: MountRequest) -> Result<Answer, Status> {
        self.mount_on(self.client().map_err(unusable)?, request)
            .await
    }

    /// Sends a Mount request on a given connection. A request without a target path gets a new one.
    pub(super) async fn mount_on(
        &self,
        mut client: CsiDriverProviderClient<Channel>,
        mut request: MountRequest,
    ) -> Result<Answer, Status> {
        let target = self.target().map_err(unusable)?;
        request.target_path = target.path();
        let calling = tokio::time::timeout(self.settings.timeout, client.mount(request));
        let response = calling.await.map_err(|_| {
            let limit = self.settings.timeout;
            Status::deadline_exceeded(format!("Mount did not answer in {limit:?}"))
        })??;
        let response = response.into_inner();
        let bytes = prost::Message::encoded_len(&response);
        if let Some(error) = response.error.filter(|error| !error.code.is_empty()) {
            return Err(Status::unknown(format!("error code {:?}", error.code)));
        }
        let written = target.files().map_err(|error| {
            Status::internal(format!(
                "cannot read what is below the target path: {error}"
            ))
        })?;
        let wrote_beside = !response.files.is_empty() && !written.is_empty();
        let mut files = response.files;
        if files.is_empty() {
            files = written;
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Answer {
            files,
            versions: response.object_version,
            bytes,
            wrote_beside,
        })
    }

    /// Sends a Mount request that has to succeed, as the first one did.
    pub(super) async fn succeeds(&self, request: MountRequest) -> Result<Answer, Finding> {
        self.first().await?;
        let answer = self.mount(request).await;
        answer.map_err(|status| failed(format!("Mount failed: {}", told(&status))))
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

/// Returns a status as a reason shows it.
pub(super) fn told(status: &Status) -> String {
    let message: String = status.message().chars().take(200).collect();
    match message.as_str() {
        "" => format!("{:?}", status.code()),
        message => format!("{:?}, {message:?}", status.code()),
    }
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

/// A target path. Dropping it removes the directory with everything in it.
pub(super) struct Target(PathBuf);

impl Target {
    pub(super) fn path(&self) -> String {
        self.0.display().to_string()
    }

    /// Returns the files that the provider wrote, through links, as a pod would read them.
    fn files(&self) -> io::Result<Vec<File>> {
        let mut files = Vec::new();
        collect(&self.0, "", &mut files)?;
        Ok(files)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // It fails if the provider made files that only another user can remove.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn collect(dir: &Path, prefix: &str, files: &mut Vec<File>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
        // Directories behind `..data` hold what the links show.
        if path.starts_with("..") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), &format!("{path}/"), files)?;
            continue;
        }
        let metadata = fs::metadata(entry.path())?;
        files.push(File {
            path,
            mode: (metadata.permissions().mode() & 0o7777).cast_signed(),
            contents: fs::read(entry.path())?,
        });
    }
    Ok(())
}
