//! Registers the driver with kubelet, without a sidecar.
//!
//! kubelet watches a directory. For each socket that appears it calls `GetInfo`, calls the CSI
//! endpoint that is named there, and reports the outcome by `NotifyRegistrationStatus`. When the
//! socket goes away, the driver is no longer registered. So the registrar keeps its socket in that
//! directory as long as it runs: it waits for a missing directory, creates a removed socket again,
//! and after a refusal logs the reason and creates the socket again.
//!
//! The rest of the driver does not depend on it: kubelet may be away for any time.

mod authority;

use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use proto::registration::registration_server::{Registration, RegistrationServer};
use proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport};
use tracing::{error, info, warn};

use crate::socket::{Accepting, AtPath, listen_privately};
use authority::AnyAuthority;
#[cfg(any(test, fuzzing))]
pub(crate) use authority::fuzz as fuzz_authority;

/// The plugin type that kubelet registers as a CSI driver.
const PLUGIN_TYPE: &str = "CSIPlugin";
/// The supported versions of CSI. kubelet accepts 0.x and 1.x.
const SUPPORTED_VERSIONS: [&str; 1] = ["1.0.0"];
/// The time between two checks of whether the socket and the directory are still there.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// The bounds of the pause before another offer after a failure. Each pause is twice the one before.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The time that an answer to kubelet may take when the socket is removed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Registers one driver with the kubelet of this node.
#[derive(Clone, Debug)]
pub struct Registrar {
    /// kubelet's directory of registration sockets, usually `/var/lib/kubelet/plugins_registry`.
    pub dir: PathBuf,
    /// The CSI driver's name.
    pub driver_name: String,
    /// The CSI socket, as kubelet sees it.
    pub endpoint: PathBuf,
}

/// The reason why an offer ended.
enum End {
    Stopped,
    /// The socket is gone, because kubelet or a person cleaned the directory.
    Wiped,
    /// Another file has taken the socket's place.
    Replaced,
    /// kubelet refused the driver, with this reason.
    Refused(String),
}

impl Registrar {
    /// Offers the driver to kubelet until `stop`, then removes the socket. Logs each failure and tries
    /// again.
    pub async fn run(self, stop: CancellationToken) {
        let socket = self.dir.join(format!("{}-reg.sock", self.driver_name));
        let socket = socket.as_path();
        let mut pause = SHORTEST_PAUSE;
        loop {
            if !self.directory_exists(&stop).await {
                return;
            }
            let started = Instant::now();
            match self.offer(socket, &stop).await {
                Ok(End::Stopped) => return,
                Ok(End::Wiped) => {
                    info!(socket = %socket.display(), "the registration socket was removed; creating it again");
                    continue;
                }
                Ok(End::Replaced) => warn!(
                    socket = %socket.display(),
                    "another process replaced the registration socket; does a node-driver-registrar run beside --registration-dir?"
                ),
                Ok(End::Refused(reason)) => error!(
                    driver = self.driver_name,
                    endpoint = %self.endpoint.display(),
                    reason,
                    "kubelet refused to register the driver; --kubelet-registration-path must be the CSI socket as kubelet sees it"
                ),
                Err(error) => error!(%error, "cannot offer the driver to kubelet"),
            }
            if started.elapsed() > LONGEST_PAUSE {
                pause = SHORTEST_PAUSE;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }

    /// Waits for the directory that kubelet creates when it starts. Returns false if it was stopped.
    async fn directory_exists(&self, stop: &CancellationToken) -> bool {
        let mut told = false;
        while !self.dir.is_dir() {
            if !told {
                warn!(dir = %self.dir.display(), "waiting for the registration directory, which kubelet creates");
                told = true;
            }
            tokio::select! {
                () = stop.cancelled() => return false,
                () = tokio::time::sleep(CHECK_EVERY) => {}
            }
        }
        true
    }

    /// Creates the socket and serves it until there is a reason to end.
    async fn offer(&self, socket: &Path, stop: &CancellationToken) -> io::Result<End> {
        let (listener, file) = listen_privately(socket)?;
        let incoming = Accepting::new("registration", UnixListenerStream::new(listener));
        let (outcome, mut outcomes) = mpsc::channel(1);
        let service = RegistrationServer::new(Service {
            info: PluginInfo {
                r#type: PLUGIN_TYPE.to_owned(),
                name: self.driver_name.clone(),
                endpoint: self.endpoint.display().to_string(),
                supported_versions: SUPPORTED_VERSIONS.map(str::to_owned).to_vec(),
            },
            outcome,
        });
        let ended = CancellationToken::new();
        let mut server = pin!(
            transport::Server::builder()
                .add_service(service)
                .serve_with_incoming_shutdown(
                    incoming.map(|stream| stream.map(AnyAuthority::new)),
                    ended.clone().cancelled_owned(),
                )
        );
        info!(socket = %socket.display(), endpoint = %self.endpoint.display(), "offering the driver to kubelet");

        let mut look = tokio::time::interval(CHECK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            tokio::select! {
                () = stop.cancelled() => break End::Stopped,
                result = &mut server => return match result {
                    Ok(()) => Err(io::Error::other("the registration server ended by itself")),
                    Err(error) => Err(io::Error::other(error)),
                },
                Some(outcome) = outcomes.recv() => match outcome {
                    Ok(()) => info!(driver = self.driver_name, "kubelet registered the driver"),
                    Err(reason) => break End::Refused(reason),
                },
                _ = look.tick() => match file.look()? {
                    AtPath::Ours => {}
                    AtPath::Another => break End::Replaced,
                    AtPath::Nothing => break End::Wiped,
                },
            }
        };

        ended.cancel();
        // kubelet waits for the answer to its refusal. It may also keep the connection open, so a
        // timeout is no failure.
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, server).await;
        file.remove()?;
        Ok(end)
    }
}

/// The service that kubelet calls.
struct Service {
    info: PluginInfo,
    outcome: mpsc::Sender<Result<(), String>>,
}

#[tonic::async_trait]
impl Registration for Service {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        let outcome = if status.plugin_registered {
            Ok(())
        } else {
            Err(status.error)
        };
        // Sending fails if this offer has ended; the next one gets its own outcome.
        let _ = self.outcome.send(outcome).await;
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// Serves a connection that sends these bytes, and no more. The server closes it.
#[cfg(any(test, fuzzing))]
pub(crate) async fn fuzz(bytes: &[u8]) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let Ok((mut client, server)) = tokio::net::UnixStream::pair() else {
        unreachable!("no pair of sockets");
    };
    let (outcome, mut outcomes) = mpsc::channel(1);
    let service = RegistrationServer::new(Service {
        info: PluginInfo::default(),
        outcome,
    });
    let stream = Ok::<_, io::Error>(AnyAuthority::new(server));
    let served = transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(tokio_stream::once(stream));
    let called = async {
        // The server may close the connection before it has read everything.
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
    };
    let drained = async { while outcomes.recv().await.is_some() {} };
    let _ = tokio::join!(served, called, drained);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::registration::registration_client::RegistrationClient;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    use tokio::task::JoinHandle;
    use tonic::transport::Channel;

    struct Run {
        dir: tempfile::TempDir,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Run {
        fn start(dir: tempfile::TempDir) -> Self {
            let stop = CancellationToken::new();
            let registrar = Registrar {
                dir: dir.path().join("plugins_registry"),
                driver_name: "driver.example".into(),
                endpoint: "/var/lib/kubelet/plugins/driver/csi.sock".into(),
            };
            let task = tokio::spawn(registrar.run(stop.clone()));
            Self { dir, stop, task }
        }

        fn with_directory() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("plugins_registry")).unwrap();
            Self::start(dir)
        }

        fn socket(&self) -> PathBuf {
            socket_in(&self.dir)
        }

        /// Waits for a registration socket that can be connected to.
        async fn client(&self) -> RegistrationClient<Channel> {
            let uri = format!("unix://{}", self.socket().display());
            let endpoint = transport::Endpoint::from_shared(uri).unwrap();
            let connected = async {
                loop {
                    if let Ok(channel) = endpoint.connect().await {
                        return RegistrationClient::new(channel);
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(5), connected)
                .await
                .expect("a registration socket")
        }

        async fn end(self) {
            self.stop.cancel();
            tokio::time::timeout(Duration::from_secs(2), self.task)
                .await
                .unwrap()
                .unwrap();
            assert!(!socket_in(&self.dir).exists());
        }
    }

    fn socket_in(dir: &tempfile::TempDir) -> PathBuf {
        dir.path().join("plugins_registry/driver.example-reg.sock")
    }

    fn refused() -> RegistrationStatus {
        RegistrationStatus {
            plugin_registered: false,
            error: "no such socket".into(),
        }
    }

    #[tokio::test]
    async fn kubelet_shakes_hands() {
        let run = Run::with_directory();
        let mut client = run.client().await;
        let info = client.get_info(InfoRequest {}).await.unwrap().into_inner();
        assert_eq!(
            info,
            PluginInfo {
                r#type: "CSIPlugin".into(),
                name: "driver.example".into(),
                endpoint: "/var/lib/kubelet/plugins/driver/csi.sock".into(),
                supported_versions: vec!["1.0.0".into()],
            }
        );
        let status = RegistrationStatus {
            plugin_registered: true,
            error: String::new(),
        };
        client.notify_registration_status(status).await.unwrap();
        assert_eq!(
            fs::metadata(run.socket()).unwrap().permissions().mode() & 0o7777,
            0o600
        );
        let inode = || fs::metadata(run.socket()).unwrap().ino();
        let before = inode();
        tokio::time::sleep(CHECK_EVERY * 2).await;
        assert_eq!(inode(), before, "a registered driver stays");
        run.end().await;
    }

    /// kubelet's gRPC library makes the socket's path the request's authority.
    #[tokio::test]
    async fn kubelet_may_name_the_socket_as_the_authority() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let run = Run::with_directory();
        run.client().await;
        let path = "/pluginregistration.Registration/GetInfo";
        let authority = "%2Fvar%2Flib%2Fkubelet%2Fplugins_registry%2Fdriver.example-reg.sock";
        // `:method POST`, `:scheme http`, then fields with names of the static table.
        let mut block = vec![0x83, 0x86];
        let fields = [(0x44, path), (0x41, authority), (0x5f, "application/grpc")];
        for (field, value) in fields {
            block.extend([field, u8::try_from(value.len()).unwrap()]);
            block.extend(value.as_bytes());
        }
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]); // SETTINGS
        let length = u8::try_from(block.len()).unwrap();
        bytes.extend([0, 0, length, 1, 4, 0, 0, 0, 1]); // HEADERS, and no more of them
        bytes.extend(block);
        bytes.extend([0, 0, 5, 0, 1, 0, 0, 0, 1]); // DATA: an empty message, and the end
        bytes.extend([0; 5]);
        let mut stream = tokio::net::UnixStream::connect(run.socket()).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        // The answer holds the driver's name as it is.
        let mut answer = Vec::new();
        let name = b"driver.example";
        let answered = async {
            while !answer.windows(name.len()).any(|part| part == name) {
                assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "{answer:?}");
            }
        };
        tokio::time::timeout(Duration::from_secs(5), answered)
            .await
            .unwrap();
        drop(stream);
        run.end().await;
    }

    #[tokio::test]
    async fn a_refusal_is_answered_and_the_driver_offered_anew() {
        let run = Run::with_directory();
        let mut client = run.client().await;
        // kubelet hears the answer to its refusal, and sees the socket go and come again.
        client.notify_registration_status(refused()).await.unwrap();
        let refused_at = Instant::now();
        let gone = async {
            while run.socket().exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(SHORTEST_PAUSE * 2, gone)
            .await
            .unwrap();
        let mut client = run.client().await;
        assert!(refused_at.elapsed() >= SHORTEST_PAUSE);
        client.get_info(InfoRequest {}).await.unwrap();
        run.end().await;
    }

    #[tokio::test]
    async fn the_socket_comes_back_when_it_or_the_directory_is_wiped() {
        let run = Run::with_directory();
        run.client().await;
        fs::remove_file(run.socket()).unwrap();
        run.client().await.get_info(InfoRequest {}).await.unwrap();

        let registry = run.dir.path().join("plugins_registry");
        fs::remove_dir_all(&registry).unwrap();
        tokio::time::sleep(CHECK_EVERY * 2).await;
        assert!(!registry.exists(), "the directory is kubelet's to make");
        fs::create_dir(&registry).unwrap();
        run.client().await.get_info(InfoRequest {}).await.unwrap();
        run.end().await;
    }

    #[tokio::test]
    async fn a_missing_directory_is_waited_for() {
        let run = Run::start(tempfile::tempdir().unwrap());
        tokio::time::sleep(Duration::from_millis(100)).await;
        fs::create_dir(run.dir.path().join("plugins_registry")).unwrap();
        run.client().await.get_info(InfoRequest {}).await.unwrap();
        run.end().await;
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("plugins_registry")).unwrap();
        // A listener that is dropped leaves its file behind, as a killed process does.
        drop(std::os::unix::net::UnixListener::bind(socket_in(&dir)).unwrap());
        assert!(socket_in(&dir).exists());
        let run = Run::start(dir);
        run.client().await.get_info(InfoRequest {}).await.unwrap();
        run.end().await;
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone_and_registration_follows_its_removal() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("plugins_registry")).unwrap();
        fs::write(socket_in(&dir), "precious").unwrap();
        let error = listen_privately(&socket_in(&dir)).unwrap_err();
        assert!(
            error.to_string().ends_with(
                "driver.example-reg.sock: there is a file that is not a socket; remove it"
            )
        );
        let run = Run::start(dir);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(fs::read_to_string(run.socket()).unwrap(), "precious");
        fs::remove_file(run.socket()).unwrap();
        run.client().await.get_info(InfoRequest {}).await.unwrap();
        run.end().await;
    }

    #[tokio::test]
    async fn the_socket_of_another_process_is_not_taken_away_at_the_end() {
        let run = Run::with_directory();
        run.client().await;
        fs::remove_file(run.socket()).unwrap();
        let _other = std::os::unix::net::UnixListener::bind(run.socket()).unwrap();
        run.stop.cancel();
        run.task.await.unwrap();
        assert!(socket_in(&run.dir).exists());
    }
}
