//! The target path of a volume, checked against the paths that kubelet makes, and the lock that lets
//! only one call work on a target.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fmt,
    path::{Component, Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    quoted::quoted,
    record::Record,
};

/// A target path of the form that kubelet makes:
/// `<root>/pods/<pod uid>/volumes/kubernetes.io~csi/<volume name>/mount`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetPath(PathBuf);

impl TargetPath {
    /// Checks a path from a request. `root` is kubelet's root directory, if it is known; `pod_uid`
    /// is the pod that the path must belong to, if the request names one.
    ///
    /// # Errors
    /// Says what is wrong with the path.
    pub fn parse(path: &str, root: Option<&Path>, pod_uid: Option<&str>) -> Result<Self> {
        let refuse = |why: String| {
            Err(Error::invalid(format!(
                "target path {} {why}",
                quoted(path, 300)
            )))
        };
        let parsed = Path::new(path);
        // Comparing the path with its joined components refuses "//", "/./" and a trailing "/".
        let clean = parsed
            .components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)))
            && parsed.components().collect::<PathBuf>().as_os_str() == path
            && !path.contains('\0');
        if !parsed.is_absolute() || !clean {
            return refuse(
                "is not an absolute path without \".\", \"..\" and doubled slashes".into(),
            );
        }
        let names: Vec<&str> = path.split('/').collect();
        let [.., pods, uid, volumes, plugin, volume, mount] = names.as_slice() else {
            return refuse("is not a path that kubelet makes".into());
        };
        let kubelets = *pods == "pods"
            && *volumes == "volumes"
            && *plugin == "kubernetes.io~csi"
            && *mount == "mount"
            && !uid.is_empty()
            && !volume.is_empty();
        if !kubelets {
            return refuse("is not of the form <kubelet root>/pods/<pod uid>/volumes/kubernetes.io~csi/<volume>/mount".into());
        }
        if let Some(root) = root
            && parsed.ancestors().nth(6) != Some(root)
        {
            return refuse(format!(
                "is not below {}, the --kubelet-root-dir of the driver (chart value linux.kubeletRootDir)",
                root.display()
            ));
        }
        if let Some(pod_uid) = pod_uid
            && pod_uid != *uid
        {
            return refuse(format!(
                "does not belong to the pod with UID {}",
                quoted(pod_uid, 64)
            ));
        }
        Ok(Self(parsed.to_owned()))
    }

    /// Checks that the target path of a record is one that kubelet makes for its pod. `root` is
    /// kubelet's root directory, if it is known.
    ///
    /// # Errors
    /// Says what is wrong with the path.
    pub fn check_record(record: &Record, root: Option<&Path>) -> Result<(), String> {
        let path = record.target_path.to_str().unwrap_or_default();
        match Self::parse(path, root, Some(&record.pod.uid)) {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("its {error}")),
        }
    }

    /// Returns the path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// Returns the path as text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    /// Returns the name of the volume in the pod's spec.
    pub fn volume(&self) -> &str {
        let name = self.0.parent().and_then(Path::file_name);
        name.and_then(OsStr::to_str).unwrap_or_default()
    }

    /// Returns the directory that kubelet makes for the volume.
    pub fn parent(&self) -> PathBuf {
        self.0.parent().unwrap_or(&self.0).to_owned()
    }
}

impl fmt::Display for TargetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The targets that calls are working on: one call at a time for each.
#[derive(Default)]
pub struct Busy(Mutex<HashMap<PathBuf, RunningCall>>);

/// A call that works on a target.
#[derive(Clone)]
struct RunningCall {
    /// Cancels the call.
    stop: CancellationToken,
    /// Is cancelled when the call has ended.
    ended: CancellationToken,
}

/// The time for which an unpublish waits for a publish that it has cancelled, and that undoes its mount.
const STOPS_WITHIN: Duration = Duration::from_secs(10);

impl Busy {
    /// Takes a target for a publish that `stop` cancels.
    ///
    /// # Errors
    /// ABORTED while another call has the target.
    pub fn publishing(
        &self,
        target: &TargetPath,
        stop: &CancellationToken,
    ) -> Result<BusyGuard<'_>> {
        self.enter(target, stop.clone())
            .map_err(|_| running(target))
    }

    /// Takes a target for an unpublish. Cancels a publish that is running, so that a hung provider
    /// does not delay a pod that is going away, and waits a while for its end.
    ///
    /// # Errors
    /// ABORTED if another call still has the target then.
    pub async fn unpublishing(&self, target: &TargetPath) -> Result<BusyGuard<'_>> {
        let free = async {
            loop {
                match self.enter(target, CancellationToken::new()) {
                    Ok(guard) => return guard,
                    Err(other) => {
                        other.stop.cancel();
                        other.ended.cancelled().await;
                    }
                }
            }
        };
        timeout(STOPS_WITHIN, free)
            .await
            .map_err(|_| running(target))
    }

    /// Cancels all publishes, which undo what they have not finished.
    pub fn cancel_all(&self) {
        let targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        targets.values().for_each(|call| call.stop.cancel());
    }

    /// Takes a target, or returns the call that has it.
    fn enter(
        &self,
        target: &TargetPath,
        stop: CancellationToken,
    ) -> std::result::Result<BusyGuard<'_>, RunningCall> {
        let mut targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = targets.get(&target.0) {
            return Err(running.clone());
        }
        let call = RunningCall {
            stop,
            ended: CancellationToken::new(),
        };
        targets.insert(target.0.clone(), call);
        Ok(BusyGuard {
            busy: self,
            target: target.0.clone(),
        })
    }
}

fn running(target: &TargetPath) -> Error {
    Error::aborted(format!("another call for {target} is still running"))
}

/// A target that a call has taken. Dropping it lets the next call take it.
#[must_use]
pub struct BusyGuard<'a> {
    busy: &'a Busy,
    target: PathBuf,
}

impl Drop for BusyGuard<'_> {
    fn drop(&mut self) {
        let mut targets = self.busy.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(call) = targets.remove(&self.target) {
            call.ended.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use tokio::time::sleep;
    use tonic::Code;

    const TARGET: &str = "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/secrets/mount";

    #[rstest]
    #[case::any_root(TARGET, None, None)]
    #[case::the_root(TARGET, Some("/var/lib/kubelet"), Some("u-1"))]
    #[case::another_root(
        "/k/pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        Some("/k"),
        None
    )]
    fn kubelets_targets_are_accepted(
        #[case] path: &str,
        #[case] root: Option<&str>,
        #[case] uid: Option<&str>,
    ) {
        assert_eq!(
            TargetPath::parse(path, root.map(Path::new), uid)
                .unwrap()
                .as_str(),
            path
        );
    }

    #[rstest]
    #[case::relative(
        "var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "absolute"
    )]
    #[case::climbs(
        "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/../mount",
        "\"..\""
    )]
    #[case::doubled(
        "/var/lib/kubelet//pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "doubled"
    )]
    #[case::dot(
        "/var/lib/kubelet/./pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "\".\""
    )]
    #[case::trailing(
        "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/secrets/mount/",
        "absolute"
    )]
    #[case::short("/mount", "kubelet makes")]
    #[case::another_plugin(
        "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~secret/secrets/mount",
        "form"
    )]
    #[case::another_place(
        "/etc/pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "--kubelet-root-dir"
    )]
    #[case::deeper(
        "/var/lib/kubelet/x/pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "--kubelet-root-dir"
    )]
    #[case::another_pod(
        "/var/lib/kubelet/pods/u-2/volumes/kubernetes.io~csi/secrets/mount",
        "does not belong"
    )]
    fn other_targets_are_refused(#[case] path: &str, #[case] why: &str) {
        let root = Some(Path::new("/var/lib/kubelet"));
        let error = TargetPath::parse(path, root, Some("u-1")).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        assert_eq!(error.code(), Code::InvalidArgument);
    }

    #[tokio::test(start_paused = true)]
    async fn one_call_at_a_time_for_a_target_and_unpublish_stops_a_publish() {
        let busy = Busy::default();
        let target = TargetPath::parse(TARGET, None, None).unwrap();
        let stop = CancellationToken::new();
        let publish = busy.publishing(&target, &stop).unwrap();
        let second = busy
            .publishing(&target, &CancellationToken::new())
            .err()
            .unwrap();
        assert_eq!(second.code(), Code::Aborted);
        assert!(!stop.is_cancelled());
        let unpublish = busy.unpublishing(&target).await.err().unwrap();
        assert_eq!(unpublish.code(), Code::Aborted);
        assert!(stop.is_cancelled());
        let stops = async {
            sleep(STOPS_WITHIN / 2).await;
            drop(publish);
        };
        let (unpublish, ()) = tokio::join!(busy.unpublishing(&target), stops);
        let unpublish = unpublish.unwrap();
        // The second one starts when the first has ended.
        let ends = async {
            sleep(STOPS_WITHIN / 2).await;
            drop(unpublish);
        };
        let (second, ()) = tokio::join!(busy.unpublishing(&target), ends);
        assert!(second.is_ok());
    }
}
