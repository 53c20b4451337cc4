//! A provider with one flaw.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::Request as HttpRequest;
use axum::http::HeaderValue;
use axum::middleware::{Next, from_fn};
use axum::response::Response as HttpResponse;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use md5::Md5;
use proto::provider::csi_driver_provider_server::{CsiDriverProvider, CsiDriverProviderServer};
use proto::provider::{
    Error, File, MountRequest, MountResponse, ObjectVersion, VersionRequest, VersionResponse,
};
use serde_json::Value;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use tokio::net::UnixListener;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::metadata::MetadataValue;
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status};

/// The content of the object of a provider whose versions show it.
const CONTENT: &str = "correct horse battery staple";

const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// The header that marks a request with an unknown field.
const UNKNOWN_FIELD: &str = "x-unknown-field";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    /// No flaw: the order of versions and files is another one each time.
    AnyOrder,
    /// No flaw: it reads content that has the mounted version below the target path, as AWS's does.
    ReadsMounted,
    /// No flaw: it writes the files itself.
    WritesItself,
    /// No flaw: it writes them behind links, as an atomic writer does.
    WritesLinks,
    WritesDevice,
    SocketType,
    UnknownMethod,
    RefusesUnknownFields,
    FailsUnknownFields,
    /// It refuses all calls after one whose deadline passed.
    SuffersFromDeadlines,
    /// It refuses all calls after one that was given up.
    SuffersFromCancelledCalls,
    OtherSocketAfterRestart,
    OtherVersionAfterRestart,
    SocketMode,
    SocketName,
    SocketDirectory,
    OtherInterface,
    NoName,
    OneConnection,
    OneCall,
    /// A Mount answers with the objects of the latest one.
    MixesClasses,
    /// Two Mounts at the same time have the same content in all files.
    MixesContents,
    /// While the store does not answer, nor does `Version`.
    BlocksVersion,
    DirectoryAbove,
    RefusesUnknownAttributes,
    RefusesUnknownSecrets,
    RefusesEmptySecrets,
    RefusesPermission,
    OnlyChanges,
    NothingIfUnchanged,
    EchoesVersions,
    SmallRequests,
    AcceptsAnything,
    EmptyErrorCode,
    HangsOnMalformedAttributes,
    HangsOnMalformedSecrets,
    NoFiles,
    WritesBesideAnswer,
    LargeAnswer,
    NoVersions,
    SameIds,
    ManyVersions,
    Path(&'static str),
    Mode(i32),
    OddMode,
    GlobalMode,
    ContentChanges,
    VersionsChange,
    MissingSucceeds,
    MissingUnavailable,
    Message(&'static str),
    ErrorCode(&'static str),
    NoParametersUnavailable,
    OutageNotFound,
    RefusesTokens,
    EchoesTokens,
    QuotesTokens,
    QuotesSecrets,
    LogsSecrets,
    EchoesOwnToken,
    LogsOwnToken,
    LogsOwnSecret,
    LogsEscaped,
    LogsEncoded,
    /// It shows a token or secret, in this way, when an object does not exist.
    ShowsInFailure(&'static str),
    /// It shows a token when the store does not answer.
    ShowsInOutage,
    /// Its versions are made of the content in this way.
    Version(&'static str),
    /// It refuses each Mount with a message that quotes the request.
    RefusesAndQuotes,
    ChangeKeepsVersion,
}

impl Flaw {
    /// The time that the checker waits for a call.
    pub(crate) fn patience(self) -> Duration {
        match self {
            Self::HangsOnMalformedAttributes | Self::HangsOnMalformedSecrets => {
                Duration::from_millis(300)
            }
            _ => Duration::from_secs(10),
        }
    }
}

/// A provider that runs until it is dropped.
pub(crate) struct Flawed {
    pub(crate) socket: PathBuf,
    pub(crate) log: PathBuf,
    /// The content of the object.
    pub(crate) store: PathBuf,
    /// The command that restarts it.
    pub(crate) restart: String,
    hangs: Arc<AtomicBool>,
    serving: JoinHandle<()>,
}

impl Flawed {
    /// Returns whether a Mount hangs.
    pub(crate) fn hangs(&self) -> bool {
        self.hangs.load(Ordering::SeqCst)
    }
}

impl Drop for Flawed {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

pub(crate) fn start(flaw: Flaw, dir: &Path) -> Flawed {
    let folder = dir.join("providers");
    fs::create_dir(&folder).unwrap();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(
        &folder,
        if flaw == Flaw::SocketDirectory {
            0o777
        } else {
            0o755
        },
    );
    let name = match flaw {
        Flaw::SocketName => "not.a.name.sock",
        _ => "flawed.sock",
    };
    let socket = folder.join(name);
    let listener = UnixListener::bind(&socket).unwrap();
    if flaw == Flaw::SocketType {
        fs::remove_file(&socket).unwrap();
        fs::write(&socket, "").unwrap();
    }
    if flaw == Flaw::DirectoryAbove {
        mode(dir, 0o777);
    }
    mode(
        &socket,
        if flaw == Flaw::SocketMode {
            0o777
        } else {
            0o600
        },
    );
    let (log, store) = (dir.join("log"), dir.join("store"));
    fs::write(&log, "started\n").unwrap();
    let content = match flaw {
        Flaw::Version(_) => CONTENT,
        _ => "1",
    };
    fs::write(&store, content).unwrap();
    let restart = match flaw {
        Flaw::OtherSocketAfterRestart => {
            let socket = socket.display();
            format!("[ $(stat -c %a {socket}) = 600 ] && chmod 640 {socket} || chmod 600 {socket}")
        }
        _ => format!("echo restarted >> {}", log.display()),
    };
    let hangs = Arc::new(AtomicBool::new(false));
    let provider = Provider {
        flaw,
        hangs: Arc::clone(&hangs),
        log: log.clone(),
        store: store.clone(),
        calls: AtomicU32::new(0),
        mode: AtomicU32::new(0),
        suffers: Arc::default(),
        busy: Mutex::default(),
        latest: Mutex::default(),
        under_way: Arc::default(),
    };
    let limit = match flaw {
        Flaw::SmallRequests => 256 << 10,
        _ => 4 << 20,
    };
    let service = CsiDriverProviderServer::new(provider).max_decoding_message_size(limit);
    let router = Routes::new(service).into_axum_router();
    let routes = Routes::from(router.layer(from_fn(move |request, next| {
        before_the_service(flaw, request, next)
    })));
    let server = tonic::transport::Server::builder().add_routes(routes);
    let serving = tokio::spawn(async move {
        let ended = if flaw == Flaw::OneConnection {
            server.serve_with_incoming(one_at_a_time(listener)).await
        } else {
            server
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
        };
        ended.unwrap();
    });
    Flawed {
        socket,
        log,
        store,
        restart,
        hangs,
        serving,
    }
}

/// Looks for methods and fields that are not of the interface.
async fn before_the_service(flaw: Flaw, request: HttpRequest, next: Next) -> HttpResponse {
    if flaw == Flaw::UnknownMethod && request.uri().path().ends_with("/Unknown") {
        return Status::internal("unknown method").into_http();
    }
    let (mut head, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let field_1000 = b"\xc2\x3e\x07unknown";
    if body
        .windows(field_1000.len())
        .any(|part| part == field_1000)
    {
        let mark = HeaderValue::from_static("");
        head.headers.insert(UNKNOWN_FIELD, mark);
    }
    next.run(HttpRequest::from_parts(head, Body::from(body)))
        .await
}

/// Accepts a connection only when the one before it is closed.
fn one_at_a_time(
    listener: UnixListener,
) -> ReceiverStream<std::io::Result<tokio::io::DuplexStream>> {
    let (sender, accepted) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Ok((mut outside, _)) = listener.accept().await {
            let (mut inside, served) = tokio::io::duplex(1 << 16);
            sender.send(Ok(served)).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
        }
    });
    ReceiverStream::new(accepted)
}

struct Provider {
    flaw: Flaw,
    log: PathBuf,
    store: PathBuf,
    hangs: Arc<AtomicBool>,
    calls: AtomicU32,
    mode: AtomicU32,
    /// Whether it refuses each Mount from now on.
    suffers: Arc<AtomicBool>,
    busy: Mutex<()>,
    /// The objects of the latest Mount.
    latest: Mutex<String>,
    /// Each Mount under way has a share of it.
    under_way: Arc<()>,
}

/// A call, of a provider that suffers if it is given up.
struct UnderWay(Option<Arc<AtomicBool>>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some(suffers) = &self.0 {
            suffers.store(true, Ordering::SeqCst);
        }
    }
}

fn strings(text: &str) -> Result<BTreeMap<String, String>, Status> {
    serde_json::from_str(text).map_err(|_| Status::invalid_argument("malformed"))
}

/// Returns the version that shows the content.
fn shown(how: &str, content: &str) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>();
    match how {
        "plain" => content.to_owned(),
        "base64" => STANDARD.encode(content),
        "md5" => hex(&Md5::digest(content)).concat(),
        "sha1" => STANDARD.encode(Sha1::digest(content)),
        "ten digits" => hex(&Sha256::digest(content))[..5].concat(),
        _ => format!("sha256:{}", hex(&Sha256::digest(content)).concat()),
    }
}

/// Returns a failure that shows a token or secret of a request.
fn showing(how: &str, request: &MountRequest, attributes: &BTreeMap<String, String>) -> Status {
    let token = own_token(attributes).unwrap_or_default();
    let message = |text: String| Status::not_found(format!("there is no object: {text}"));
    match how {
        "token" => message(token),
        "attributes" => message(format!("{attributes:?}")),
        "secrets" => message(request.secrets.clone()),
        "basic" => message(STANDARD.encode(format!("jwt:{token}"))),
        "details" => Status::with_details(Code::NotFound, "no object", token.into()),
        _ => {
            let mut status = Status::not_found("no object");
            let trailer = MetadataValue::from_bytes(token.as_bytes());
            status.metadata_mut().insert_bin("sent-bin", trailer);
            status
        }
    }
}

/// Returns the token that the settings have.
fn own_token(attributes: &BTreeMap<String, String>) -> Option<String> {
    let tokens: Value = serde_json::from_str(attributes.get(TOKENS)?).ok()?;
    tokens["vault"]["token"].as_str().map(str::to_owned)
}

impl Provider {
    /// Fails as a provider without a flaw does, but for the flaw.
    fn object(&self, object: Option<&str>) -> Result<Option<MountResponse>, Status> {
        match (object, self.flaw) {
            (None, Flaw::AcceptsAnything) => Ok(None),
            (None, Flaw::NoParametersUnavailable) => Err(Status::unavailable("no parameters")),
            (None, _) => Err(Status::invalid_argument("the parameter objects is not set")),
            (Some("outage"), Flaw::OutageNotFound) => Err(Status::not_found("no store")),
            (Some("outage"), _) => Err(Status::unavailable("the store does not answer")),
            (Some("missing"), Flaw::MissingSucceeds) => Ok(None),
            (Some("missing"), Flaw::MissingUnavailable) => Err(Status::unavailable("no object")),
            (Some("missing"), Flaw::Message(message)) => Err(Status::not_found(message)),
            (Some("missing"), Flaw::ErrorCode(code)) => Ok(Some(MountResponse {
                error: Some(Error { code: code.into() }),
                ..MountResponse::default()
            })),
            (Some("missing"), _) => Err(Status::not_found("there is no object \"missing\"")),
            _ => Ok(None),
        }
    }

    async fn check(&self, request: &MountRequest) -> Result<BTreeMap<String, String>, Status> {
        let quoted = |what: &str| Status::invalid_argument(format!("malformed: {what}"));
        let parsed = strings(&request.attributes).or_else(|error| match self.flaw {
            Flaw::AcceptsAnything => Ok(BTreeMap::new()),
            Flaw::QuotesSecrets => Err(quoted(&request.attributes)),
            _ => Err(error),
        });
        if parsed.is_err() && self.flaw == Flaw::HangsOnMalformedAttributes {
            self.hangs.store(true, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        let attributes = parsed?;
        let secrets: Option<BTreeMap<String, String>> = match request.secrets.as_str() {
            "null" => None,
            text => match strings(text) {
                Ok(secrets) => Some(secrets),
                Err(_) if self.flaw == Flaw::AcceptsAnything => None,
                Err(_) if self.flaw == Flaw::HangsOnMalformedSecrets => {
                    std::future::pending().await
                }
                Err(_) if self.flaw == Flaw::QuotesSecrets => return Err(quoted(text)),
                Err(error) => return Err(error),
            },
        };
        let logged = match self.flaw {
            Flaw::LogsSecrets => secrets.as_ref().map(|secrets| format!("{secrets:?}")),
            Flaw::LogsOwnSecret => secrets.as_ref().and_then(|s| s.get("password").cloned()),
            Flaw::LogsOwnToken => own_token(&attributes),
            Flaw::LogsEscaped => secrets.as_ref().map(|s| format!("{:?}", s.get("password"))),
            Flaw::LogsEncoded => {
                own_token(&attributes).map(|t| STANDARD.encode(format!("jwt:{t}")))
            }
            _ => None,
        };
        if let Some(logged) = logged {
            let mut log = fs::OpenOptions::new().append(true).open(&self.log)?;
            writeln!(log, "{logged}")?;
        }
        let unknown = |key: &String| key.contains("unknown");
        let refused = match self.flaw {
            Flaw::RefusesUnknownAttributes => attributes.keys().any(unknown),
            Flaw::RefusesUnknownSecrets => secrets.iter().flat_map(|s| s.keys()).any(unknown),
            Flaw::RefusesEmptySecrets => secrets.is_some_and(|secrets| secrets.is_empty()),
            Flaw::RefusesPermission => request.permission != "420",
            Flaw::RefusesTokens => attributes.contains_key(TOKENS),
            _ => false,
        };
        if refused {
            return Err(Status::invalid_argument("refused"));
        }
        if let Some(tokens) = attributes.get(TOKENS)
            && serde_json::from_str::<BTreeMap<String, Value>>(tokens).is_err()
        {
            return Err(match self.flaw {
                Flaw::QuotesTokens => quoted(tokens),
                _ => Status::invalid_argument("malformed tokens"),
            });
        }
        Ok(attributes)
    }

    async fn answer(&self, request: MountRequest) -> Result<MountResponse, Status> {
        if self.flaw == Flaw::EmptyErrorCode && request.attributes.is_empty() {
            return Ok(MountResponse {
                error: Some(Error::default()),
                ..MountResponse::default()
            });
        }
        let attributes = self.check(&request).await?;
        if self.flaw == Flaw::RefusesAndQuotes {
            let (token, secrets) = (own_token(&attributes), &request.secrets);
            let quoted = format!("{token:?} {} {secrets}", "x".repeat(160));
            return Err(Status::permission_denied(quoted));
        }
        let objects = attributes.get("objects").map(String::as_str);
        let shows = match (objects, self.flaw) {
            (Some("missing"), Flaw::ShowsInFailure(how)) => Some(how),
            (Some("outage"), Flaw::ShowsInOutage) => Some("token"),
            _ => None,
        };
        if let Some(how) = shows {
            let mut status = showing(how, &request, &attributes);
            if objects == Some("outage") {
                status = Status::unavailable(status.message());
            }
            return Err(status);
        }
        if objects == Some("outage")
            && self.flaw == Flaw::BlocksVersion
            && let Ok(_busy) = self.busy.try_lock()
        {
            // The Mount lasts as long as it blocks: a caller that asks for the version until it
            // ends meets the flaw, however slow the machine is.
            tokio::time::sleep(Duration::from_secs(7)).await;
        }
        let mixed;
        let mut objects = objects;
        if self.flaw == Flaw::MixesClasses {
            *self.latest.lock().await = objects.unwrap_or_default().to_owned();
            tokio::time::sleep(Duration::from_millis(20)).await;
            mixed = self.latest.lock().await.clone();
            objects = Some(&mixed);
        }
        let _under_way = Arc::clone(&self.under_way);
        if let Some(answer) = self.object(objects)? {
            return Ok(answer);
        }
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let permission: u32 = request.permission.parse().unwrap_or(0o644);
        self.mode.store(permission, Ordering::SeqCst);
        let takes = match self.flaw {
            Flaw::SuffersFromCancelledCalls => 50,
            // Calls have to overlap, also on a busy machine.
            Flaw::OneCall | Flaw::MixesContents | Flaw::GlobalMode => 20,
            _ => 2,
        };
        tokio::time::sleep(Duration::from_millis(takes)).await;
        let mode = match self.flaw {
            Flaw::Mode(mode) => mode,
            Flaw::OddMode => (permission ^ 0o001).cast_signed(),
            Flaw::GlobalMode => self.mode.load(Ordering::SeqCst).cast_signed(),
            _ => permission.cast_signed(),
        };
        let content = match self.flaw {
            Flaw::ContentChanges => call.to_string(),
            Flaw::MixesContents if Arc::strong_count(&self.under_way) > 2 => "mixed".to_owned(),
            Flaw::EchoesTokens => attributes.get(TOKENS).cloned().unwrap_or_default(),
            Flaw::EchoesOwnToken => own_token(&attributes).unwrap_or_default(),
            Flaw::ReadsMounted if !request.current_object_version.is_empty() => {
                fs::read_to_string(Path::new(&request.target_path).join("user"))?
            }
            _ => fs::read_to_string(&self.store)?,
        };
        let version = match self.flaw {
            Flaw::VersionsChange => call.to_string(),
            Flaw::ChangeKeepsVersion => "1".to_owned(),
            Flaw::Version(how) => shown(how, &content),
            Flaw::OtherVersionAfterRestart => {
                let restarts = fs::metadata(&self.log)?.len();
                format!("{restarts}{}", fs::read_to_string(&self.store)?)
            }
            _ => format!("v{}", fs::read_to_string(&self.store)?.trim()),
        };
        let file = |path: &str| File {
            path: path.to_owned(),
            mode,
            contents: content.clone().into_bytes(),
        };
        let object = |id: &str| ObjectVersion {
            id: id.to_owned(),
            version: version.clone(),
        };
        let mut answer = MountResponse {
            object_version: vec![object("user"), object("key")],
            error: None,
            files: vec![file("user"), file("key")],
        };
        match self.flaw {
            Flaw::Path(path) => answer.files.push(file(path)),
            Flaw::LargeAnswer => answer.files[0].contents = vec![b'a'; 4 << 20],
            Flaw::NoFiles => answer.files.clear(),
            Flaw::NoVersions => answer.object_version.clear(),
            Flaw::SameIds => answer.object_version.push(object("user")),
            Flaw::ManyVersions => {
                let ids = (0..5000).map(|number| object(&number.to_string()));
                answer.object_version = ids.collect();
            }
            Flaw::AnyOrder if call % 2 == 1 => {
                answer.files.reverse();
                answer.object_version.reverse();
            }
            Flaw::NothingIfUnchanged if !request.current_object_version.is_empty() => {
                answer.files.clear();
            }
            Flaw::OnlyChanges if !request.current_object_version.is_empty() => {
                answer.files.truncate(1);
            }
            Flaw::EchoesVersions if !request.current_object_version.is_empty() => {
                answer.object_version = request.current_object_version;
            }
            Flaw::WritesBesideAnswer => {
                fs::write(Path::new(&request.target_path).join("user"), "1")?;
            }
            Flaw::WritesItself => {
                for file in answer.files.drain(..) {
                    let path = Path::new(&request.target_path).join(file.path);
                    fs::write(&path, file.contents)?;
                    fs::set_permissions(path, fs::Permissions::from_mode(permission))?;
                }
            }
            Flaw::WritesLinks => {
                answer.files.clear();
                let target = Path::new(&request.target_path);
                let _ = fs::remove_file(target.join("db"));
                fs::create_dir_all(target.join("..1/db"))?;
                fs::write(target.join("..1/db/user"), content)?;
                symlink("..1/db", target.join("db"))?;
            }
            Flaw::WritesDevice => {
                answer.files.clear();
                symlink("/dev/zero", Path::new(&request.target_path).join("user"))?;
            }
            _ => {}
        }
        Ok(answer)
    }
}

#[tonic::async_trait]
impl CsiDriverProvider for Provider {
    async fn version(
        &self,
        _: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        if self.flaw == Flaw::BlocksVersion {
            drop(self.busy.lock().await);
        }
        let answer = |version: &str, name: &str| VersionResponse {
            version: version.to_owned(),
            runtime_name: name.to_owned(),
            runtime_version: "1".to_owned(),
        };
        Ok(Response::new(match self.flaw {
            Flaw::OtherInterface => answer("v2", "flawed"),
            Flaw::NoName => answer("v1alpha1", ""),
            _ => answer("v1alpha1", "flawed"),
        }))
    }

    async fn mount(
        &self,
        request: Request<MountRequest>,
    ) -> Result<Response<MountResponse>, Status> {
        let headers = request.metadata();
        let timeout = headers.get("grpc-timeout").map(|t| t.to_str().unwrap());
        let timeout = timeout.ok_or_else(|| Status::failed_precondition("no deadline"))?;
        // A deadline of seconds has another unit.
        let is_short = timeout.ends_with('n');
        if headers.contains_key(UNKNOWN_FIELD) {
            match self.flaw {
                Flaw::RefusesUnknownFields => return Err(Status::invalid_argument("refused")),
                Flaw::FailsUnknownFields => {
                    let code = "UnknownField".to_owned();
                    return Ok(Response::new(MountResponse {
                        error: Some(Error { code }),
                        ..MountResponse::default()
                    }));
                }
                _ => {}
            }
        }
        // A short deadline harms it even where it would answer in time.
        if is_short && self.flaw == Flaw::SuffersFromDeadlines {
            self.suffers.store(true, Ordering::SeqCst);
        }
        if self.suffers.load(Ordering::SeqCst) {
            return Err(Status::internal("suffers"));
        }
        let mut under_way = UnderWay(match self.flaw {
            Flaw::SuffersFromCancelledCalls => Some(Arc::clone(&self.suffers)),
            _ => None,
        });
        let _alone = if self.flaw == Flaw::OneCall {
            let busy = self.busy.try_lock();
            Some(busy.map_err(|_| Status::resource_exhausted("busy"))?)
        } else {
            None
        };
        let answer = self.answer(request.into_inner()).await;
        under_way.0 = None;
        answer.map(Response::new)
    }
}
