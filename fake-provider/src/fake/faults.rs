//! Faults on request: which ones a class or a test asks for, and how often each one has struck a pod.

use std::collections::HashMap;
use std::path::{Component, Path};
use std::sync::Mutex;
use std::time::Duration;

use proto::provider::File;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use tonic::{Code, Status};

use super::yaml::parse_yaml;
use crate::lock;

/// One fault as written in YAML. The documentation of [`crate::fake`] has the table.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(super) struct Fault {
    object: Option<String>,
    times: Option<u32>,
    #[serde(deserialize_with = "duration_field")]
    pub(super) delay: Duration,
    #[serde(deserialize_with = "duration_field")]
    jitter: Duration,
    pub(super) crash: bool,
    pub(super) hang: bool,
    status: Option<FaultStatus>,
    pub(super) error_code: Option<String>,
    pub(super) error_code_beside: Option<String>,
    pub(super) spoilt: bool,
    bad_path: Option<String>,
    pub(super) oversize: Option<usize>,
    pub(super) missing_versions: bool,
    pub(super) write_files: bool,
    pub(super) describe_denied: bool,
    pub(super) changed_only: bool,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct FaultStatus {
    #[serde(deserialize_with = "code_field")]
    code: Code,
    #[serde(default)]
    message: String,
}

/// The caller whose Mount calls `times` counts: one pod with one class.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Caller {
    pub(super) pod_uid: String,
    /// The class's name, or the volume's target path if the driver did not send the name.
    pub(super) class: String,
}

/// All faults, and how often each one has struck.
#[derive(Default)]
pub(super) struct Faults(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    at_run_time: Vec<Fault>,
    struck: HashMap<(Origin, usize, Caller), u32>,
}

/// The list that a fault is in.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Origin {
    /// The parameter of a class, identified by its text: a changed text counts from zero.
    Class(String),
    RunTime,
}

/// Parses the YAML of a list of faults.
///
/// # Errors
///
/// A sentence with the place of the mistake.
pub(super) fn parse_faults(text: &str) -> Result<Vec<Fault>, String> {
    let faults: Option<Vec<Fault>> =
        parse_yaml(text).map_err(|reason| format!("faults: {reason}"))?;
    Ok(faults.unwrap_or_default())
}

impl Faults {
    /// Replaces the faults that hold for all classes, and counts them from zero. An empty list
    /// clears them.
    pub(super) fn set(&self, faults: Vec<Fault>) {
        let mut inner = lock(&self.0);
        inner.at_run_time = faults;
        inner
            .struck
            .retain(|(origin, ..), _| matches!(origin, Origin::Class(_)));
    }

    /// Returns the faults that strike this call, those of the class first, and counts them.
    ///
    /// # Errors
    ///
    /// The error of [`parse_faults`] for the class's parameter.
    pub(super) fn strike(
        &self,
        parameter: Option<&str>,
        caller: &Caller,
        objects: &[&str],
    ) -> Result<Vec<Fault>, String> {
        let text = parameter.unwrap_or_default();
        let of_class = parse_faults(text).map_err(|reason| format!("parameter {reason}"))?;

        let mut inner = lock(&self.0);
        let at_run_time = inner.at_run_time.clone();
        let lists = [
            (Origin::Class(text.to_owned()), of_class),
            (Origin::RunTime, at_run_time),
        ];
        let mut striking = Vec::new();
        for (origin, list) in lists {
            for (index, fault) in list.into_iter().enumerate() {
                if !fault.concerns(objects) {
                    continue;
                }
                if let Some(times) = fault.times {
                    let struck = inner
                        .struck
                        .entry((origin.clone(), index, caller.clone()))
                        .or_default();
                    if *struck >= times {
                        continue;
                    }
                    *struck += 1;
                }
                striking.push(fault);
            }
        }
        Ok(striking)
    }
}

impl Fault {
    /// Returns the time that the call with this number waits: the delay, and a part of the jitter that
    /// looks random.
    pub(super) fn wait(&self, number: u64) -> Duration {
        let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        self.delay + self.jitter.mul_f64(mixed as f64 / f64::from(1 << 24))
    }

    /// Returns whether the fault strikes a call for these objects.
    fn concerns(&self, objects: &[&str]) -> bool {
        self.object
            .as_deref()
            .is_none_or(|object| objects.contains(&object))
    }

    /// Returns the status to fail with.
    pub(super) fn status(&self) -> Option<Status> {
        self.status
            .as_ref()
            .map(|status| Status::new(status.code, status.message.clone()))
    }

    /// Gives the file of this fault's object the bad path, or adds a file with it. `files` have the
    /// order of `objects`.
    pub(super) fn spoil_path(&self, files: &mut Vec<File>, objects: &[&str]) {
        let Some(path) = &self.bad_path else { return };
        let index = self
            .object
            .as_deref()
            .and_then(|name| objects.iter().position(|o| *o == name));
        match index.and_then(|index| files.get_mut(index)) {
            Some(file) => file.path.clone_from(path),
            None => {
                let contents = b"a file with a bad path".to_vec();
                files.push(File {
                    path: path.clone(),
                    mode: 0,
                    contents,
                });
            }
        }
    }
}

/// Writes the files below `target`, as providers do that the driver leaves the writing to.
///
/// # Errors
///
/// A sentence that names the path that leaves `target`, or the file that cannot be written.
pub(super) async fn write_files(
    target: &Path,
    permission: u32,
    files: &[File],
) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    for file in files {
        let relative = Path::new(&file.path);
        if !relative
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            return Err(format!(
                "the path {:?} is not below the target path; not written",
                file.path
            ));
        }
        let path = target.join(relative);
        let mode = if file.mode == 0 {
            permission
        } else {
            file.mode.cast_unsigned()
        };
        let write = async {
            if let Some(parent) = path.parent() {
                tokio::fs::create_dir_all(parent).await?;
            }
            // As the AWS provider does, which may have no right to write into its own files again.
            let new = path.with_file_name(".new");
            tokio::fs::write(&new, &file.contents).await?;
            let permissions = std::fs::Permissions::from_mode(mode);
            tokio::fs::set_permissions(&new, permissions).await?;
            tokio::fs::rename(&new, &path).await
        };
        write
            .await
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    Ok(())
}

fn code_field<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Code, D::Error> {
    let name = String::deserialize(deserializer)?;
    code_named(&name).ok_or_else(|| D::Error::custom("not the name of a gRPC error code"))
}

/// Returns the code with this name in the gRPC documentation
/// (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>), or `None` for `OK` and any other text.
fn code_named(name: &str) -> Option<Code> {
    Some(match name {
        "CANCELLED" => Code::Cancelled,
        "UNKNOWN" => Code::Unknown,
        "INVALID_ARGUMENT" => Code::InvalidArgument,
        "DEADLINE_EXCEEDED" => Code::DeadlineExceeded,
        "NOT_FOUND" => Code::NotFound,
        "ALREADY_EXISTS" => Code::AlreadyExists,
        "PERMISSION_DENIED" => Code::PermissionDenied,
        "RESOURCE_EXHAUSTED" => Code::ResourceExhausted,
        "FAILED_PRECONDITION" => Code::FailedPrecondition,
        "ABORTED" => Code::Aborted,
        "OUT_OF_RANGE" => Code::OutOfRange,
        "UNIMPLEMENTED" => Code::Unimplemented,
        "INTERNAL" => Code::Internal,
        "UNAVAILABLE" => Code::Unavailable,
        "DATA_LOSS" => Code::DataLoss,
        "UNAUTHENTICATED" => Code::Unauthenticated,
        _ => return None,
    })
}

fn duration_field<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    duration_of(&text).ok_or_else(|| D::Error::custom("not a duration such as 2s or 1m30s"))
}

/// Parses a duration in the notation of Go (<https://pkg.go.dev/time#ParseDuration>): numbers with
/// units, such as `1m30s`, `1.5s` or `200ms`, or `0`.
fn duration_of(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    loop {
        let (number, after) = rest.split_at(rest.find(|c: char| c != '.' && !c.is_ascii_digit())?);
        let unit_end = after
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(after.len());
        let seconds = match &after[..unit_end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let part = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        total = total.checked_add(part)?;
        rest = &after[unit_end..];
        if rest.is_empty() {
            return Some(total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn caller(pod_uid: &str) -> Caller {
        Caller {
            pod_uid: pod_uid.into(),
            class: "c".into(),
        }
    }

    #[test]
    fn a_jitter_is_another_one_in_each_call_and_stays_below_its_bound() {
        let faults = parse_faults("[{delay: 1s, jitter: 2s}]").unwrap();
        let waits: Vec<Duration> = (0..100).map(|number| faults[0].wait(number)).collect();
        let (least, most) = (waits.iter().min().unwrap(), waits.iter().max().unwrap());
        assert!(*least >= Duration::from_secs(1) && *least < Duration::from_millis(1_100));
        assert!(*most < Duration::from_secs(3) && *most > Duration::from_millis(2_900));
    }

    #[test]
    fn times_counts_the_calls_of_each_pod() {
        let faults = Faults::default();
        let class = Some("[{times: 2, hang: true}]");
        let struck = |uid| faults.strike(class, &caller(uid), &[]).unwrap().len();
        assert_eq!(
            [struck("a"), struck("a"), struck("a"), struck("b")],
            [1, 1, 0, 1]
        );
    }

    #[test]
    fn a_fault_of_an_object_waits_for_that_object() {
        let faults = Faults::default();
        let class = Some("[{object: foo, times: 1, hang: true}]");
        let struck = |objects: &[&str]| faults.strike(class, &caller("a"), objects).unwrap().len();
        assert_eq!(
            [struck(&["bar"]), struck(&["bar", "foo"]), struck(&["foo"])],
            [0, 1, 0]
        );
    }

    #[test]
    fn faults_set_at_run_time_strike_all_classes_and_anew_when_set_again() {
        let faults = Faults::default();
        let struck = || faults.strike(None, &caller("a"), &[]).unwrap().len();
        let set = || faults.set(parse_faults("[{times: 1, hang: true}]").unwrap());
        set();
        assert_eq!([struck(), struck()], [1, 0]);
        set();
        assert_eq!(struck(), 1);
        faults.set(Vec::new());
        assert_eq!(struck(), 0);
    }

    #[rstest]
    #[case("0", Some(0))]
    #[case("2s", Some(2_000))]
    #[case("1m30s", Some(90_000))]
    #[case("1.5s200ms", Some(1_700))]
    #[case("2", None)]
    #[case("-1s", None)]
    #[case("s", None)]
    #[case("1d", None)]
    #[case("1..2s", None)]
    #[case("", None)]
    fn durations_are_those_of_go(#[case] text: &str, #[case] milliseconds: Option<u64>) {
        assert_eq!(duration_of(text), milliseconds.map(Duration::from_millis));
    }

    #[rstest]
    #[case::typo("[{tims: 1}]")]
    #[case::code("[{status: {code: OK}}]")]
    #[case::duration("[{delay: 2}]")]
    #[case::not_a_list("{hang: true}")]
    fn what_is_not_a_fault_is_refused(#[case] text: &str) {
        let error = parse_faults(text).err().unwrap();
        assert!(
            error.starts_with("faults: YAML not understood at line 1"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn files_are_written_below_the_target_only() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("volume");
        let file = |path: &str| File {
            path: path.into(),
            mode: 0,
            contents: b"x".to_vec(),
        };
        write_files(&target, 0o640, &[file("a/b")]).await.unwrap();
        assert_eq!(std::fs::read(target.join("a/b")).unwrap(), b"x");
        for path in ["../c", "/tmp/c", "a/../../c"] {
            let error = write_files(&target, 0o640, &[file(path)])
                .await
                .unwrap_err();
            assert!(error.contains("not below the target path"), "{error}");
        }
        assert!(!dir.path().join("c").exists());
    }
}
