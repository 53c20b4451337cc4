//! Answers Mount calls with the objects of the class and the faults that strike it, in the order of
//! upstream's test provider (`test/e2eprovider/server/server.go`).

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use proto::provider::{Error, File, ObjectVersion};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::calls::Calls;
use super::faults::{Caller, Fault, Faults, write_files};
use super::manners::Manners;
use super::objects::{Asked, Material, all_of, parse_objects, pattern};
use super::source::{Source, Stored, StoredObjects};
use super::tokens::audiences_of;
use crate::lock;
use crate::server::{
    Code, Failure, Identity, MountResponse, Object, Provider, Request, TOKENS_KEY,
};

/// The exit code of the process after the fault `crash`: the one that a shell reports for an abort,
/// which would also write a core file.
const CRASH_EXIT_CODE: i32 = 134;
/// The content that the fault `spoilt` gives to files.
const SPOILT: &[u8] = b"spoilt";

/// The fake provider and everything that it remembers until it stops.
pub(super) struct FakeProvider {
    source: Option<Source>,
    rotated: Mutex<String>,
    token_audiences: Mutex<String>,
    /// Objects set over HTTP, which go before those of the source.
    set: Mutex<StoredObjects>,
    /// The UIDs of pods that have mounted: rotation changes only their objects.
    mounted: Mutex<HashSet<String>>,
    /// The permission of the latest request, which AWS's manners give to all files.
    permission: AtomicU32,
    requests: AtomicU64,
    pub(super) calls: Calls,
    pub(super) faults: Faults,
    stop: CancellationToken,
}

impl FakeProvider {
    /// Returns a provider whose delayed and hanging calls end when `stop` is cancelled.
    pub(super) fn new(
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
            permission: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            calls: Calls::default(),
            faults: Faults::default(),
            stop,
        }
    }

    /// Sets the rotation state; only `true` switches rotation on.
    pub(super) fn set_rotated(&self, state: String) {
        *lock(&self.rotated) = state;
    }

    /// Sets the audiences, separated by commas, for which tokens must arrive; empty for none.
    pub(super) fn set_token_audiences(&self, audiences: String) {
        *lock(&self.token_audiences) = audiences;
    }

    /// Sets an object, as a change of the secret in the store would.
    pub(super) fn set_object(&self, name: String, object: Stored) {
        lock(&self.set).insert(name, object);
    }

    /// Forgets the objects that were set, faults, and counts of calls.
    pub(super) fn reset(&self) {
        lock(&self.set).clear();
        self.faults.set(Vec::new());
        self.calls.reset();
    }

    async fn answer(&self, request: &Request) -> Result<MountResponse, Failure> {
        let manners = Manners::parse(request.parameter("manners")).map_err(unknown)?;
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        self.permission
            .store(request.permission(), Ordering::Relaxed);
        let mut stored = match &self.source {
            Some(source) => source.read().await.map_err(unknown)?,
            None => StoredObjects::new(),
        };
        stored.extend(lock(&self.set).clone());
        let asked = self.asked(request, &stored)?;
        let names: Vec<&str> = asked.iter().map(Asked::name).collect();
        let faults = self.strike(request, &names)?;
        let describes = manners.describes() && !request.mounted_versions().is_empty();
        let object = names.first().copied().unwrap_or_default();
        tokio::select! {
            outcome = suffer(&faults, number, describes) => {
                outcome.map_err(|failure| manners.told(failure, object))?;
            }
            () = self.stop.cancelled() => {
                return Err(Failure::new(Code::Unavailable, "the provider is stopping"));
            }
        }
        if let Some(missing) = asked.iter().find(|asked| !asked.is_there(&stored))
            && manners.misses_objects()
        {
            let failure = Failure::new(Code::NotFound, "");
            return Err(manners.told(failure, missing.name()));
        }

        let pod_uid = request.pod().uid.to_owned();
        let rotated = *lock(&self.rotated) == "true" && lock(&self.mounted).contains(&pod_uid);
        let material = Material {
            request,
            stored: &stored,
            rotated,
            mode: manners.mode(
                request.permission(),
                self.permission.load(Ordering::Relaxed),
            ),
            manners,
            number,
        };
        let objects: Result<Vec<Object>, String> =
            asked.iter().map(|asked| asked.resolve(&material)).collect();
        let mut response = MountResponse::from_iter(objects.map_err(unknown)?);
        self.check_tokens(request)?;
        if faults.iter().any(|fault| fault.changed_only) {
            leave_out_unchanged(&mut response, request.mounted_versions());
        }
        manners.echo(&mut response, request.mounted_versions());
        spoil(&mut response, &faults, &names)?;
        if manners.writes_files() || faults.iter().any(|fault| fault.write_files) {
            let files = std::mem::take(&mut response.files);
            write_files(request.target_path(), request.permission(), &files)
                .await
                .map_err(unknown)?;
        }
        // Calls without a UID count as those of one pod, as upstream's own tests expect.
        lock(&self.mounted).insert(pod_uid);
        Ok(response)
    }

    /// Returns the objects that the class asks for, or all stored ones if it names none.
    fn asked(&self, request: &Request, stored: &StoredObjects) -> Result<Vec<Asked>, Failure> {
        match request.parameter("objects").filter(|text| !text.is_empty()) {
            Some(objects) => parse_objects(objects).map_err(unknown),
            None if self.source.is_some() => Ok(all_of(stored)),
            None => Err(unknown("parameter objects is not set")),
        }
    }

    /// Returns the faults that strike this call.
    fn strike(&self, request: &Request, objects: &[&str]) -> Result<Vec<Fault>, Failure> {
        let class = request.parameter("secretProviderClass");
        let caller = Caller {
            pod_uid: request.pod().uid.to_owned(),
            class: class.map_or_else(
                || request.target_path().display().to_string(),
                str::to_owned,
            ),
        };
        self.faults
            .strike(request.parameter("faults"), &caller, objects)
            .map_err(unknown)
    }

    /// Checks that a token arrived for each audience, as upstream's provider does: the audiences
    /// only, not the tokens.
    fn check_tokens(&self, request: &Request) -> Result<(), Failure> {
        let required = lock(&self.token_audiences).trim().to_owned();
        if required.is_empty() {
            return Ok(());
        }
        let tokens = request.parameter(TOKENS_KEY).filter(|t| !t.is_empty());
        let tokens = tokens.ok_or_else(|| unknown("no service account tokens came"))?;
        let audiences = audiences_of(tokens)
            .ok_or_else(|| unknown("the service account tokens are not a JSON object"))?;
        match required
            .split(',')
            .find(|required| !audiences.iter().any(|audience| audience == required))
        {
            Some(missing) => Err(unknown(format!(
                "no service account token came for audience {missing:?}"
            ))),
            None => Ok(()),
        }
    }
}

impl Provider for FakeProvider {
    /// Returns the identity of upstream's provider.
    fn identity(&self) -> Identity {
        self.calls.version();
        Identity {
            name: "E2EMockProvider".to_owned(),
            version: "v0.0.10".to_owned(),
        }
    }

    async fn mount(&self, request: Request) -> Result<MountResponse, Failure> {
        let _in_flight = self.calls.mount(request.pod());
        self.answer(&request).await
    }
}

/// Waits for all delays of the request with this number, then does the worst that the faults ask for.
/// `describes` says whether the provider asks the store for versions first.
async fn suffer(faults: &[Fault], number: u64, describes: bool) -> Result<(), Failure> {
    let wait: Duration = faults.iter().map(|fault| fault.wait(number)).sum();
    // A sleep of no time takes up to a millisecond.
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
    if faults.iter().any(|fault| fault.crash) {
        tracing::warn!("crashing as a fault asks for");
        std::process::exit(CRASH_EXIT_CODE);
    }
    if faults.iter().any(|fault| fault.hang) {
        std::future::pending::<()>().await;
    }
    if describes && faults.iter().any(|fault| fault.describe_denied) {
        return Err(unknown("describing is denied"));
    }
    if let Some(status) = faults.iter().find_map(Fault::status) {
        return Err(Failure::Status(status));
    }
    match faults.iter().find_map(|fault| fault.error_code.clone()) {
        Some(code) => Err(Failure::ErrorCode(code)),
        None => Ok(()),
    }
}

/// Removes the files of objects that are mounted already in the same version.
fn leave_out_unchanged(response: &mut MountResponse, mounted: &[ObjectVersion]) {
    let mut versions = response.object_version.iter();
    response.files.retain(|_| {
        let version = versions.next();
        version.is_none_or(|version| !mounted.contains(version))
    });
}

/// Applies the faults of contents, paths, sizes, versions and errors. `names` are those of the objects in `response`.
fn spoil(response: &mut MountResponse, faults: &[Fault], names: &[&str]) -> Result<(), Failure> {
    for fault in faults {
        if fault.spoilt {
            for file in &mut response.files {
                file.contents = SPOILT.to_vec();
            }
        }
        fault.spoil_path(&mut response.files, names);
        if let Some(code) = &fault.error_code_beside {
            response.error = Some(Error { code: code.clone() });
        }
        if let Some(size) = fault.oversize {
            let contents =
                pattern(size).map_err(|reason| unknown(format!("fault oversize: {reason}")))?;
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
    Ok(())
}

/// Returns a failure with the code that an error of a Go program has on the wire unless it sets one.
fn unknown(reason: impl ToString) -> Failure {
    Failure::Status(Status::unknown(reason.to_string()))
}
