//! Says what is mounted on a node and which providers are there, for `secrets-store-csi status --json`.
//!
//! It is a process of its own, which `kubectl exec` starts in the driver's container. It reads the
//! records and looks at mounts and sockets, and changes nothing. Nothing that it says is secret: records
//! have no content.

mod calls;

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{net::UnixStream, time::timeout};

use crate::{
    config::{BUILD_VERSION, Config, Endpoint},
    files,
    memory::{self, Memory},
    mount::{self, TargetState, Tmpfs},
    provider,
    record::{Object, Pod, Record, Records, Writer},
};

pub use calls::Calls;

/// The time for which a socket may take to accept a connection.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);

/// The number of files of a volume that are named.
const SHOWN_FILES: usize = 8;

/// What a node's driver has on it. The fields are stable: others may be added. Those that an earlier version
/// did not have are optional for a reader.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The version of this binary.
    pub version: String,
    /// The node's name.
    pub node: String,
    /// The time by the node's clock.
    pub time: Timestamp,
    /// The driver's own socket.
    pub driver: Socket,
    /// Whether volumes are refreshed.
    pub refreshes: bool,
    /// The seconds between two refreshes of a volume that sets no interval.
    pub refresh_interval_seconds: u64,
    /// The shortest interval that a class or a volume may set, in seconds.
    #[serde(default)]
    pub shortest_refresh_interval_seconds: u64,
    /// The directories in which sockets of providers are searched, in this order.
    pub provider_directories: Vec<PathBuf>,
    /// The providers with a socket.
    pub providers: Vec<Provider>,
    /// The memory of the driver that content takes. Absent if it could not be measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryUse>,
    /// The mount point in this container below which mounts are not seen outside of it, so that pods would get
    /// empty directories.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unseen_below: Option<PathBuf>,
    /// How the calls to providers ended since the driver started, as its metrics page counts them. Empty if
    /// that cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub calls: Vec<Calls>,
    /// The volumes that are recorded, by namespace and pod.
    pub volumes: Vec<Volume>,
}

/// The memory of the driver, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryUse {
    /// The memory limit of the container.
    pub limit: u64,
    /// What of it content that the driver writes may take.
    pub room: u64,
    /// What of the room the recorded volumes take.
    pub used: u64,
}

/// A socket, and whether a connection to it was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Socket {
    /// Its path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether a connection was accepted.
    pub answers: bool,
    /// Why none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A provider with a socket on the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provider {
    /// Its name, as in `spec.provider` of a class.
    pub name: String,
    /// Its socket.
    #[serde(flatten)]
    pub socket: Socket,
}

/// A published volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// kubelet's volume handle.
    pub id: String,
    /// The pod that mounts it.
    pub pod: Pod,
    /// Where it is mounted on the node.
    pub target_path: PathBuf,
    /// The name of its class.
    pub class: String,
    /// The name of its provider.
    pub provider: String,
    /// The name of its SecretProviderClassPodStatus.
    pub pod_status: String,
    /// Whether a tmpfs is mounted at the target path.
    pub mounted: bool,
    /// Why that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The last time that the provider answered.
    pub last_success: Timestamp,
    /// The last time that the content changed.
    pub last_change: Timestamp,
    /// The time since when refreshes fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<Timestamp>,
    /// The objects that it holds.
    pub objects: Vec<Object>,
    /// The paths of its first eight files, in the order of their names.
    #[serde(default)]
    pub files: Vec<String>,
    /// The number of its files; none if that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_count: Option<usize>,
}

impl Status {
    /// Looks at the node of a driver with these settings.
    ///
    /// # Errors
    /// When the records cannot be listed.
    pub async fn read(config: &Config) -> io::Result<Self> {
        let mut volumes = Vec::new();
        let memory = Memory::new(
            memory::limit(Path::new("/")),
            config.provider_max_bytes as u64,
        );
        let records = Records::existing(&config.state_dir);
        let read = records.each(|record| {
            let is_charged = record.writer == Writer::Driver;
            memory.found(&record.target_path, &record.pod.namespace, is_charged);
            volumes.push(Volume::of(record));
        });
        match read {
            // No volume has been published yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            read => read?,
        }
        let key = |volume: &Volume| {
            let pod = &volume.pod;
            (pod.namespace.clone(), pod.name.clone(), volume.id.clone())
        };
        volumes.sort_by_cached_key(key);
        let mut providers = Vec::new();
        for (name, path) in provider::sockets(config.provider_dirs()) {
            let socket = Socket::look(Some(path)).await;
            providers.push(Provider { name, socket });
        }
        let own = match &config.endpoint {
            Endpoint::Unix(path) => Some(path.clone()),
            Endpoint::Tcp(_) => None,
        };
        Ok(Self {
            version: BUILD_VERSION.to_owned(),
            node: config.node_id.clone(),
            time: Timestamp::now(),
            driver: Socket::look(own).await,
            refreshes: config.enable_secret_rotation,
            refresh_interval_seconds: config.rotation_poll_interval.as_secs(),
            shortest_refresh_interval_seconds: config.min_rotation_poll_interval.as_secs(),
            provider_directories: config.provider_dirs(),
            providers,
            memory: Some(MemoryUse {
                limit: memory.budget().limit().bytes,
                room: memory.budget().room(),
                used: memory.in_use(),
            }),
            unseen_below: unseen_below(config),
            calls: match config.metrics_addr {
                // A driver that has no page, or does not answer, has no figures.
                Some(address) => calls::read(address).await.unwrap_or_default(),
                None => Vec::new(),
            },
            volumes,
        })
    }
}

/// Returns the mount point below which this container's mounts are not seen outside of it. What cannot be
/// found out, a publish reports.
fn unseen_below(config: &Config) -> Option<PathBuf> {
    let root = config.kubelet_root_dir.as_deref();
    let pods = root.unwrap_or(Path::new("/var/lib/kubelet")).join("pods");
    let in_a_pod = std::env::var_os(crate::IN_A_POD).is_some();
    let tmpfs = Tmpfs::bounded_by(0).in_a_pod(in_a_pod);
    tmpfs.unseen(&pods).ok().flatten()
}

impl Socket {
    async fn look(path: Option<PathBuf>) -> Self {
        let error = match &path {
            None => Some("it is not a socket of this node's file system".to_owned()),
            Some(path) => match timeout(ANSWERS_WITHIN, UnixStream::connect(path)).await {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some(format!(
                    "no connection within {} second",
                    ANSWERS_WITHIN.as_secs()
                )),
            },
        };
        Self {
            path,
            answers: error.is_none(),
            error,
        }
    }
}

impl Volume {
    fn of(record: Record) -> Self {
        let state = mount::state(&record.target_path);
        let mounted = matches!(state, Ok(TargetState::Mounted));
        // A volume that goes away meanwhile has no files that anybody asks for.
        let found = mounted.then(|| files::read::first_paths(&record.target_path, SHOWN_FILES));
        let (files, file_count) = match found {
            Some(Ok((files, count))) => (files, Some(count)),
            Some(Err(_)) | None => (Vec::new(), None),
        };
        Self {
            mounted,
            error: state.err().map(|error| error.to_string()),
            id: record.volume_id,
            pod: record.pod,
            target_path: record.target_path,
            class: record.class.name,
            provider: record.provider,
            pod_status: record.pod_status,
            last_success: record.last_success,
            last_change: record.last_change,
            stale_since: record.failing_since,
            objects: record.objects,
            files,
            file_count,
        }
    }
}

/// Returns the flags of the driver that runs in this container as its first process, if one does.
pub fn flags_of_the_driver(proc: &Path) -> Option<Vec<OsString>> {
    let line = fs::read(proc.join("1/cmdline")).ok()?;
    let mut words = line
        .split(|byte| *byte == 0)
        .map(|word| OsString::from_vec(word.to_vec()));
    let program = words.next()?;
    let is_driver = Path::new(&program).file_name()? == "secrets-store-csi";
    let mut flags: Vec<_> = words.collect();
    // The line ends with a NUL.
    flags.pop();
    is_driver.then_some(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_those_of_a_driver() {
        let proc = tempfile::tempdir().unwrap();
        assert_eq!(flags_of_the_driver(proc.path()), None);
        fs::create_dir(proc.path().join("1")).unwrap();
        for (line, flags) in [
            ("", None),
            ("/bin/sh\0-c\0x\0", None),
            ("/secrets-store-csi\0", Some(vec![])),
            (
                "/secrets-store-csi\0--nodeid=a b\0--x\0\0",
                Some(vec!["--nodeid=a b", "--x", ""]),
            ),
        ] {
            fs::write(proc.path().join("1/cmdline"), line).unwrap();
            let expected = flags.map(|f| f.into_iter().map(OsString::from).collect());
            assert_eq!(flags_of_the_driver(proc.path()), expected, "{line:?}");
        }
    }
}
