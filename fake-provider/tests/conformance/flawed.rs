//! A provider with one flaw.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proto::provider::csi_driver_provider_server::{CsiDriverProvider, CsiDriverProviderServer};
use proto::provider::{
    Error, File, MountRequest, MountResponse, ObjectVersion, VersionRequest, VersionResponse,
};
use serde_json::Value;
use tokio::net::UnixListener;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    SocketMode,
    SocketName,
    SocketDirectory,
    OtherInterface,
    NoName,
    OneConnection,
    OneCall,
    RefusesUnknownAttributes,
    RefusesUnknownSecrets,
    RefusesEmptySecrets,
    RefusesPermission,
    OnlyChanges,
    EchoesVersions,
    SmallRequests,
    AcceptsAnything,
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
    ChangeKeepsVersion,
}

impl Flaw {
    /// The time that the checker waits for a call.
    pub(crate) fn patience(self) -> Duration {
        match self {
            Self::HangsOnMalformedSecrets => Duration::from_millis(300),
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
    serving: JoinHandle<()>,
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
    fs::write(&store, "1").unwrap();
    let provider = Provider {
        flaw,
        log: log.clone(),
        store: store.clone(),
        calls: AtomicU32::new(0),
        mode: AtomicU32::new(0),
        busy: Mutex::new(()),
    };
    let limit = match flaw {
        Flaw::SmallRequests => 256 << 10,
        _ => 4 << 20,
    };
    let service = CsiDriverProviderServer::new(provider).max_decoding_message_size(limit);
    let server = tonic::transport::Server::builder().add_service(service);
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
        serving,
    }
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
    calls: AtomicU32,
    mode: AtomicU32,
    busy: Mutex<()>,
}

fn strings(text: &str) -> Result<BTreeMap<String, String>, Status> {
    serde_json::from_str(text).map_err(|_| Status::invalid_argument("malformed"))
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
        if self.flaw == Flaw::LogsSecrets && secrets.is_some() {
            let mut log = fs::OpenOptions::new().append(true).open(&self.log)?;
            writeln!(log, "{secrets:?}")?;
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
        let attributes = self.check(&request).await?;
        if let Some(answer) = self.object(attributes.get("objects").map(String::as_str))? {
            return Ok(answer);
        }
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let permission: u32 = request.permission.parse().unwrap_or(0o644);
        self.mode.store(permission, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(2)).await;
        let mode = match self.flaw {
            Flaw::Mode(mode) => mode,
            Flaw::OddMode => (permission ^ 0o001).cast_signed(),
            Flaw::GlobalMode => self.mode.load(Ordering::SeqCst).cast_signed(),
            _ => permission.cast_signed(),
        };
        let content = match self.flaw {
            Flaw::ContentChanges => call.to_string(),
            Flaw::EchoesTokens => attributes.get(TOKENS).cloned().unwrap_or_default(),
            _ => fs::read_to_string(&self.store)?,
        };
        let version = match self.flaw {
            Flaw::VersionsChange => call.to_string(),
            Flaw::ChangeKeepsVersion => "1".to_owned(),
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
            Flaw::OnlyChanges if !request.current_object_version.is_empty() => {
                answer.files.truncate(1);
            }
            Flaw::EchoesVersions if !request.current_object_version.is_empty() => {
                answer.object_version = request.current_object_version;
            }
            Flaw::WritesBesideAnswer => {
                fs::write(Path::new(&request.target_path).join("user"), "1")?;
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
        let _alone = if self.flaw == Flaw::OneCall {
            let busy = self.busy.try_lock();
            Some(busy.map_err(|_| Status::resource_exhausted("busy"))?)
        } else {
            None
        };
        self.answer(request.into_inner()).await.map(Response::new)
    }
}
