//! Answers the calls of `v1alpha1.CSIDriverProvider`: the checks of upstream's test provider in its
//! order (`test/e2eprovider/server/server.go`), with the extensions between them.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;

use proto::provider::csi_driver_provider_server::CsiDriverProvider;
use proto::provider::{
    Error as ProviderError, File, MountRequest, MountResponse, ObjectVersion, VersionRequest,
    VersionResponse,
};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::calls::{Calls, InFlight};
use crate::faults::{Caller, Fault, Faults, write_files};
use crate::lock;
use crate::objects::{Asked, Material, Object, Strings, all_of, parse_objects, pattern};
use crate::source::{Source, Stored, StoredObjects};
use crate::tokens::{TOKENS_KEY, audiences_of};

const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
const POD_UID: &str = "csi.storage.k8s.io/pod.uid";

/// What the process ends with on the fault `crash`: what a shell reports after an abort.
/// An abort itself would leave a core file behind.
const CRASH_EXIT_CODE: i32 = 134;

/// One provider and all that it remembers, which is gone when it stops.
pub(crate) struct Provider {
    source: Option<Source>,
    rotated: Mutex<String>,
    token_audiences: Mutex<String>,
    /// Objects set at run time; they go before those of the source.
    set: Mutex<StoredObjects>,
    /// UIDs of pods that have mounted, which are those that rotation changes.
    mounted: Mutex<HashSet<String>>,
    pub(crate) calls: Calls,
    pub(crate) faults: Faults,
    stop: CancellationToken,
}

impl Provider {
    /// `stop` ends what hangs and what waits, so that the server can end.
    pub(crate) fn new(
        source: Option<Source>,
        token_audiences: String,
        stop: CancellationToken,
    ) -> Self {
        Self {
            source,
            rotated: Mutex::new("false".to_owned()),
            token_audiences: Mutex::new(token_audiences),
            set: Mutex::default(),
            mounted: Mutex::default(),
            calls: Calls::default(),
            faults: Faults::default(),
            stop,
        }
    }

    /// Sets the rotation state; only `true` switches rotation on.
    pub(crate) fn set_rotated(&self, state: String) {
        *lock(&self.rotated) = state;
    }

    /// Sets the audiences, separated by commas, for which tokens must come; empty for none.
    pub(crate) fn set_token_audiences(&self, audiences: String) {
        *lock(&self.token_audiences) = audiences;
    }

    /// Sets an object, as somebody does who changes a secret in the store.
    pub(crate) fn set_object(&self, name: String, object: Stored) {
        lock(&self.set).insert(name, object);
    }

    async fn answer(
        &self,
        request: &MountRequest,
        call: &InFlight<'_>,
    ) -> Result<MountResponse, Status> {
        let attributes: Strings = json("attributes", "object of strings", &request.attributes)?;
        if let (Some(namespace), Some(name)) =
            (attributes.get(POD_NAMESPACE), attributes.get(POD_NAME))
        {
            call.of_pod(namespace, name);
        }
        let secrets: Option<Strings> = json("secrets", "object of strings", &request.secrets)?;
        let permission: u32 = json("permission", "number", &request.permission)?;
        if request.target_path.is_empty() {
            return Err(Status::unknown("target_path is empty"));
        }
        let mut stored = match &self.source {
            Some(source) => source.read().await.map_err(plain)?,
            None => StoredObjects::new(),
        };
        stored.extend(lock(&self.set).clone());
        let asked = self.asked(&attributes, &stored)?;
        let names: Vec<&str> = asked.iter().map(Asked::name).collect();

        let pod_uid = attributes.get(POD_UID).cloned().unwrap_or_default();
        let class = attributes
            .get("secretProviderClass")
            .unwrap_or(&request.target_path)
            .clone();
        let caller = Caller {
            pod_uid: pod_uid.clone(),
            class,
        };
        let faults = self
            .faults
            .strike(
                attributes.get("faults").map(String::as_str),
                &caller,
                &names,
            )
            .map_err(plain)?;
        self.suffer(&faults).await?;
        if let Some(code) = faults.iter().find_map(|fault| fault.error_code.clone()) {
            return Ok(MountResponse {
                error: Some(ProviderError { code }),
                ..MountResponse::default()
            });
        }

        let rotated = *lock(&self.rotated) == "true" && lock(&self.mounted).contains(&pod_uid);
        let secrets = secrets.unwrap_or_default();
        let material = Material {
            request,
            attributes: &attributes,
            secrets: &secrets,
            stored: &stored,
            rotated,
        };
        let objects: Result<Vec<Object>, String> =
            asked.iter().map(|asked| asked.resolve(&material)).collect();
        let mut response = respond(objects.map_err(plain)?);
        self.check_tokens(&attributes)?;

        for fault in &faults {
            fault.spoil_path(&mut response.files, &names);
            if let Some(size) = fault.oversize {
                let contents =
                    pattern(size).map_err(|reason| plain(format!("fault oversize: {reason}")))?;
                response.files.push(File {
                    path: "oversize".to_owned(),
                    mode: 0,
                    contents,
                });
            }
            if fault.missing_versions {
                response.object_version.clear();
            }
        }
        if faults.iter().any(|fault| fault.write_files) {
            let files = std::mem::take(&mut response.files);
            write_files(Path::new(&request.target_path), permission, &files)
                .await
                .map_err(plain)?;
        }
        // Calls without a UID count as one pod's, as upstream's own tests expect.
        lock(&self.mounted).insert(pod_uid);
        Ok(response)
    }

    fn asked(&self, attributes: &Strings, stored: &StoredObjects) -> Result<Vec<Asked>, Status> {
        match attributes
            .get("objects")
            .filter(|objects| !objects.is_empty())
        {
            Some(parameter) => parse_objects(parameter).map_err(plain),
            None if self.source.is_some() => Ok(all_of(stored)),
            None => Err(Status::unknown("parameter objects is not set")),
        }
    }

    /// Waits for all delays, then does the worst that the faults ask for.
    async fn suffer(&self, faults: &[Fault]) -> Result<(), Status> {
        let worst = async {
            tokio::time::sleep(faults.iter().map(|fault| fault.delay).sum()).await;
            if faults.iter().any(|fault| fault.crash) {
                tracing::warn!("crashing as a fault asks for");
                std::process::exit(CRASH_EXIT_CODE);
            }
            if faults.iter().any(|fault| fault.hang) {
                std::future::pending::<()>().await;
            }
            faults.iter().find_map(Fault::status).map_or(Ok(()), Err)
        };
        tokio::select! {
            outcome = worst => outcome,
            () = self.stop.cancelled() => Err(Status::unavailable("the provider is stopping")),
        }
    }

    fn check_tokens(&self, attributes: &Strings) -> Result<(), Status> {
        let wanted = lock(&self.token_audiences).trim().to_owned();
        if wanted.is_empty() {
            return Ok(());
        }
        let tokens = attributes
            .get(TOKENS_KEY)
            .filter(|tokens| !tokens.is_empty());
        let tokens = tokens.ok_or_else(|| Status::unknown("no service account tokens came"))?;
        let audiences = audiences_of(tokens)
            .ok_or_else(|| Status::unknown("the service account tokens are not a JSON object"))?;
        match wanted
            .split(',')
            .find(|wanted| !audiences.iter().any(|audience| audience == wanted))
        {
            Some(missing) => Err(Status::unknown(format!(
                "no service account token came for audience {missing:?}"
            ))),
            None => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl CsiDriverProvider for Provider {
    async fn version(
        &self,
        _: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        self.calls.version();
        Ok(Response::new(VersionResponse {
            version: "v1alpha1".to_owned(),
            runtime_name: "E2EMockProvider".to_owned(),
            runtime_version: "v0.0.10".to_owned(),
        }))
    }

    async fn mount(
        &self,
        request: Request<MountRequest>,
    ) -> Result<Response<MountResponse>, Status> {
        let call = self.calls.mount();
        let answer = self.answer(request.get_ref(), &call).await;
        match &answer {
            Ok(response) => {
                tracing::debug!(
                    files = response.files.len(),
                    failed = response.error.is_some(),
                    "Mount"
                );
            }
            Err(status) => {
                tracing::info!(code = ?status.code(), reason = status.message(), "Mount failed")
            }
        }
        answer.map(Response::new)
    }
}

fn respond(objects: Vec<Object>) -> MountResponse {
    let mut response = MountResponse::default();
    for object in objects {
        let id = format!("secret/{}", object.name);
        response.object_version.push(ObjectVersion {
            id,
            version: object.version,
        });
        let Object {
            path,
            mode,
            contents,
            ..
        } = object;
        response.files.push(File {
            path,
            mode,
            contents,
        });
    }
    response
}

/// What a plain Go error becomes on the wire.
fn plain(reason: impl ToString) -> Status {
    Status::unknown(reason.to_string())
}

/// Parses a field of the request. The parser's own words quote the input, tokens included,
/// so only the place is said.
fn json<T: DeserializeOwned>(field: &str, expected: &str, text: &str) -> Result<T, Status> {
    serde_json::from_str(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        Status::unknown(format!(
            "{field} is not a JSON {expected} (line {line}, column {column})"
        ))
    })
}
