//! Says what is mounted on a node and which providers are there, for `secrets-store-csi status --json`.
//!
//! It is a process of its own, which `kubectl exec` starts in the driver's container. It reads the
//! records and looks at mounts and sockets, and changes nothing. Nothing that it says is secret: records
//! have no content.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;
use tokio::{net::UnixStream, time::timeout};

use crate::{
    config::{BUILD_VERSION, Config, Endpoint},
    mount::{self, TargetState},
    provider,
    record::{Object, Pod, Record, Records},
};

/// The time for which a socket may take to accept a connection.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);

/// What a node's driver has on it. The fields are stable: others may be added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The version of this binary.
    version: &'static str,
    /// The node's name.
    node: String,
    /// The time by the node's clock.
    time: Timestamp,
    /// The driver's own socket.
    driver: Socket,
    /// Whether volumes are refreshed.
    refreshes: bool,
    /// The seconds between two refreshes of a volume that sets no interval.
    refresh_interval_seconds: u64,
    /// The directories in which sockets of providers are searched, in this order.
    provider_directories: Vec<PathBuf>,
    /// The providers with a socket.
    providers: Vec<Provider>,
    /// The volumes that are recorded, by namespace and pod.
    volumes: Vec<Volume>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Socket {
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    /// Whether a connection was accepted.
    answers: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Provider {
    name: String,
    #[serde(flatten)]
    socket: Socket,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Volume {
    id: String,
    pod: Pod,
    target_path: PathBuf,
    class: String,
    provider: String,
    pod_status: String,
    /// Whether a tmpfs is mounted at the target path.
    mounted: bool,
    /// Why that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    last_success: Timestamp,
    last_change: Timestamp,
    /// The time since when refreshes fail.
    #[serde(skip_serializing_if = "Option::is_none")]
    stale_since: Option<Timestamp>,
    objects: Vec<Object>,
}

impl Status {
    /// Looks at the node of a driver with these settings.
    ///
    /// # Errors
    /// When the records cannot be listed.
    pub async fn read(config: &Config) -> io::Result<Self> {
        let mut volumes = Vec::new();
        let records = Records::existing(&config.state_dir);
        match records.each(|record| volumes.push(Volume::of(record))) {
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
            version: BUILD_VERSION,
            node: config.node_id.clone(),
            time: Timestamp::now(),
            driver: Socket::look(own).await,
            refreshes: config.enable_secret_rotation,
            refresh_interval_seconds: config.rotation_poll_interval.as_secs(),
            provider_directories: config.provider_dirs(),
            providers,
            volumes,
        })
    }
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
        Self {
            mounted: matches!(state, Ok(TargetState::Mounted)),
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
