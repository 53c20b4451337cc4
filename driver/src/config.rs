//! Reads the command line: every flag of the existing driver with its default, and some flags that
//! only this driver has.
//!
//! The syntax is that of Go's `flag` package, because installed manifests rely on it: a flag has
//! one or two dashes and is written as `--flag=value` or `--flag value`, a switch only as `--flag`
//! or `--flag=bool`. A repeated flag takes its last value. Unlike there, an argument that is not a flag
//! is an error: Go ignores it and all flags after it. A wrong command line ends the process with
//! code 2 and an error message, before anything has started.
//!
//! This module does not touch the system: it does not check, for example, that directories exist.

mod flag;
mod go;
mod value;

use std::ffi::OsString;
use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flag::Flag;

/// The version of this build, from `BUILD_VERSION` at compile time.
pub const BUILD_VERSION: &str = match option_env!("BUILD_VERSION") {
    Some(version) => version,
    None => "local-dev",
};
const GIT_COMMIT: &str = match option_env!("GIT_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};
const BUILD_DATE: &str = match option_env!("BUILD_DATE") {
    Some(date) => date,
    None => "unknown",
};

/// The settings that the command line gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The address of the CSI services.
    pub endpoint: Endpoint,
    /// The name of the CSI driver, as pods give it in their volumes.
    pub driver_name: String,
    /// The name of the node on which this driver runs.
    pub node_id: String,
    /// kubelet's root directory, below whose `pods/` targets must lie. `None` accepts any target
    /// that has kubelet's form.
    pub kubelet_root_dir: Option<PathBuf>,
    /// The directory of the records of published volumes.
    pub state_dir: PathBuf,
    /// The directory of the built-in registrar's socket. `None` if a sidecar registers the driver.
    pub registration_dir: Option<PathBuf>,
    /// The path of the CSI socket as kubelet sees it.
    pub kubelet_registration_path: PathBuf,
    /// The address of `/healthz`. `None` if a sidecar answers kubelet's probe.
    pub healthz_addr: Option<SocketAddr>,
    /// The address of `/metrics`. `None` if metrics are not served.
    pub metrics_addr: Option<SocketAddr>,
    /// The directory of provider sockets that is searched last.
    pub provider_volume: PathBuf,
    /// The directories of provider sockets that are searched first, in this order.
    pub additional_provider_volume_paths: Vec<PathBuf>,
    /// The largest answer of a provider that is accepted, in bytes.
    pub max_call_recv_msg_size: usize,
    /// The largest number of calls in flight to one provider.
    pub provider_max_calls: usize,
    /// The memory for the answers of one provider, in bytes. A single answer may exceed it.
    pub provider_max_bytes: usize,
    /// Whether mounted volumes are refreshed.
    pub enable_secret_rotation: bool,
    /// The shortest time between two refreshes of one volume.
    pub rotation_poll_interval: Duration,
    /// The shortest interval that a class or a volume can set.
    pub min_rotation_poll_interval: Duration,
    /// The answer to kubelet when a refresh fails.
    pub republish_errors: RepublishErrors,
    /// The wait before a failed refresh is tried again. It doubles with each further failure.
    pub rotation_backoff: Duration,
    /// The longest wait before a failed refresh is tried again.
    pub rotation_backoff_max: Duration,
    /// The outcome of a publish when a Secret cannot be written.
    pub sync_errors: SyncErrors,
    /// The time in which each synced Secret and the class of each volume are checked once.
    pub sync_interval: Duration,
    /// The users, besides root, the driver's own and a socket directory's owner, as which a provider may
    /// run. `None` for any user.
    pub provider_uids: Option<Vec<u32>>,
    /// Whether the providers are asked for their version periodically.
    pub provider_health_check: bool,
    /// The time between two health checks of the providers.
    pub provider_health_check_interval: Duration,
    /// The kubeconfig file for the connection to the API server. `None` for the pod's service
    /// account.
    pub kubeconfig: Option<PathBuf>,
    /// Whether the process drops capabilities and other things that it does not need.
    pub hardening: bool,
    /// Whether log lines are JSON objects.
    pub log_format_json: bool,
    /// The verbosity of the log: 0 reports what happened, 5 adds every call, 6 every step.
    pub verbosity: u32,
    without_effect: Vec<&'static str>,
    below_zero: Vec<&'static str>,
    print_version: bool,
}

/// The answer to kubelet when a refresh fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepublishErrors {
    /// Success.
    Mask,
    /// The error.
    Surface,
}

/// The outcome of a publish when a Secret cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncErrors {
    /// The publish succeeds and an event reports the failure.
    Report,
    /// The publish fails.
    Fail,
}

/// Reads a duration as Go writes it, such as `90s` or `1h30m`. The driver reads all durations so.
///
/// # Errors
/// Returns the end of a sentence that says what is wrong.
pub fn duration(text: &str) -> Result<Duration, String> {
    if text.starts_with('-') {
        return Err("the duration is negative".to_owned());
    }
    value::FlagValue::read(text)
}

/// The address of the CSI services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A unix socket at an absolute path.
    Unix(PathBuf),
    /// A TCP address, for tests: kubelet only connects to unix sockets.
    Tcp(SocketAddr),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// The end of a process that does not start the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code: 0 after `--help` and `--version`, 2 after an error.
    pub code: i32,
    /// The text for standard output with code 0, otherwise for standard error, without a final
    /// newline.
    pub text: String,
}

impl Config {
    /// Reads the command line, without the program's name.
    ///
    /// # Errors
    /// Returns an [`Exit`] with code 2 for a wrong command line, and with code 0 for `--help` and
    /// `--version`.
    pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Self, Exit> {
        let mut config = Self::default();
        let args = args
            .map(|arg| arg.into_string())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|arg| wrong(format!("argument {arg:?} is not UTF-8")))?;
        let mut args = args.into_iter().peekable();
        let mut last_switch = None;
        while let Some(argument) = args.next_if(|arg| arg.len() > 1 && arg.starts_with('-')) {
            if argument == "--" {
                break;
            }
            let (name, value) = split(&argument)?;
            if name == "h" || name == "help" {
                return Err(Exit {
                    code: 0,
                    text: flag::help(),
                });
            }
            let flag = flag::find(name)?;
            last_switch = (value.is_none() && flag.is_switch()).then(|| name.to_owned());
            let value = match value {
                Some(value) => value.to_owned(),
                None if flag.is_switch() => "true".to_owned(),
                None => args.next().ok_or_else(|| {
                    wrong(format!(
                        "flag --{name} needs a value: --{name}={}",
                        flag.value
                    ))
                })?,
            };
            config.set(flag, name, &value)?;
        }
        if let Some(argument) = args.next() {
            return Err(unexpected(&argument, last_switch.as_deref()));
        }
        if config.print_version {
            return Err(Exit {
                code: 0,
                text: version_line(),
            });
        }
        config.resolve()
    }

    /// Sets a flag, which was given as `name`.
    fn set(&mut self, flag: &Flag, name: &str, value: &str) -> Result<(), Exit> {
        (flag.set)(self, value)
            .map_err(|problem| wrong(format!("invalid value {value:?} for --{name}: {problem}")))?;
        self.without_effect.retain(|earlier| *earlier != flag.name);
        self.below_zero.retain(|earlier| *earlier != flag.name);
        if flag.is_signed() && value.starts_with('-') && value != "-0" {
            self.below_zero.push(flag.name);
        }
        if !flag.has_effect && value != flag.default {
            self.without_effect.push(flag.name);
        }
        Ok(())
    }

    /// Returns the flags that have no effect and were given a value other than their default.
    pub fn without_effect(&self) -> Vec<&'static str> {
        self.without_effect.clone()
    }

    /// Returns the flags with a negative value that counts as zero. Go's flags accept such values.
    pub fn below_zero(&self) -> Vec<&'static str> {
        self.below_zero.clone()
    }

    /// Returns the directories of provider sockets, in the order in which they are searched.
    pub fn provider_dirs(&self) -> Vec<PathBuf> {
        let last = Some(&self.provider_volume).filter(|dir| !dir.as_os_str().is_empty());
        self.additional_provider_volume_paths
            .iter()
            .chain(last)
            .cloned()
            .collect()
    }

    /// Fills in the settings whose default depends on other flags.
    fn resolve(mut self) -> Result<Self, Exit> {
        let socket = match &self.endpoint {
            Endpoint::Unix(path) => Some(path.clone()),
            Endpoint::Tcp(_) => None,
        };
        if self.state_dir.as_os_str().is_empty() {
            self.state_dir = socket
                .as_deref()
                .and_then(Path::parent)
                .map(|dir| dir.join("records"))
                .ok_or_else(|| wrong("--state-dir is needed with a tcp:// endpoint".to_owned()))?;
        }
        if self.kubelet_registration_path.as_os_str().is_empty() {
            match socket {
                Some(socket) => self.kubelet_registration_path = socket,
                None if self.registration_dir.is_some() => {
                    let text = "--registration-dir needs a unix:// endpoint: kubelet reaches drivers by a socket";
                    return Err(wrong(text.to_owned()));
                }
                None => {}
            }
        }
        Ok(self)
    }
}

impl Default for Config {
    /// Returns the defaults of the single flags. Settings that follow from other flags are empty.
    fn default() -> Self {
        Self {
            endpoint: Endpoint::Unix("/tmp/csi.sock".into()),
            driver_name: "secrets-store.csi.k8s.io".to_owned(),
            node_id: String::new(),
            kubelet_root_dir: None,
            state_dir: PathBuf::new(),
            registration_dir: None,
            kubelet_registration_path: PathBuf::new(),
            healthz_addr: None,
            metrics_addr: Some(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 8095))),
            provider_volume: "/var/run/secrets-store-csi-providers".into(),
            additional_provider_volume_paths: vec![
                "/etc/kubernetes/secrets-store-csi-providers".into(),
            ],
            max_call_recv_msg_size: 4 * 1024 * 1024,
            provider_max_calls: 16,
            provider_max_bytes: 64 * 1024 * 1024,
            provider_uids: Some(Vec::new()),
            enable_secret_rotation: false,
            rotation_poll_interval: Duration::from_secs(120),
            min_rotation_poll_interval: Duration::from_secs(30),
            republish_errors: RepublishErrors::Mask,
            rotation_backoff: Duration::from_secs(10),
            rotation_backoff_max: Duration::from_secs(300),
            sync_errors: SyncErrors::Report,
            sync_interval: Duration::from_secs(45),
            provider_health_check: false,
            provider_health_check_interval: Duration::from_secs(120),
            kubeconfig: None,
            hardening: true,
            log_format_json: false,
            verbosity: 0,
            without_effect: Vec::new(),
            below_zero: Vec::new(),
            print_version: false,
        }
    }
}

/// Splits an argument that starts with a dash into the flag's name and its value, if it has one.
fn split(argument: &str) -> Result<(&str, Option<&str>), Exit> {
    let flag = argument
        .strip_prefix("--")
        .or_else(|| argument.strip_prefix('-'))
        .unwrap_or(argument);
    let (name, value) = match flag.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (flag, None),
    };
    if name.is_empty() || name.starts_with('-') {
        return Err(wrong(format!(
            "{argument:?} is not a flag: write --flag=value"
        )));
    }
    Ok((name, value))
}

/// Refuses an argument that is not a flag. `last_switch` is the flag before it, if that is a switch
/// without a value.
fn unexpected(argument: &str, last_switch: Option<&str>) -> Exit {
    let hint = match (argument, last_switch) {
        ("help" | "version", _) => format!("did you mean --{argument}?"),
        (_, Some(name)) => format!("a value of --{name} follows an equals sign: --{name}=false"),
        _ => "the program takes only flags, as --flag=value; --help lists them".to_owned(),
    };
    wrong(format!("unexpected argument {argument:?}; {hint}"))
}

fn wrong(text: String) -> Exit {
    Exit { code: 2, text }
}

fn version_line() -> String {
    serde_json::to_string(&BuildInfo {
        build_version: BUILD_VERSION,
        git_commit: GIT_COMMIT,
        build_date: BUILD_DATE,
    })
    .unwrap_or_default()
}

#[derive(serde::Serialize)]
#[serde(rename_all = "PascalCase")]
struct BuildInfo {
    build_version: &'static str,
    git_commit: &'static str,
    build_date: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;
    use flag::FLAGS;
    use rstest::rstest;

    fn parse(line: &str) -> Result<Config, Exit> {
        Config::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_defaults_in_the_help_are_the_defaults() {
        for flag in FLAGS {
            let mut config = Config::default();
            (flag.set)(&mut config, flag.default)
                .unwrap_or_else(|e| panic!("--{}: {e}", flag.name));
            assert_eq!(config, Config::default(), "--{}", flag.name);
        }
        let config = parse("").unwrap();
        assert_eq!(config.state_dir, Path::new("/tmp/records"));
        assert_eq!(config.kubelet_registration_path, Path::new("/tmp/csi.sock"));
        assert_eq!(
            config.provider_dirs(),
            [
                "/etc/kubernetes/secrets-store-csi-providers",
                "/var/run/secrets-store-csi-providers"
            ]
            .map(PathBuf::from)
        );
    }

    #[rstest]
    #[case::one_dash("-nodeid=a", "a", 0, false)]
    #[case::two_dashes("--nodeid=a", "a", 0, false)]
    #[case::separate_value("-nodeid a -v 5", "a", 5, false)]
    #[case::value_that_looks_like_a_flag("--nodeid --v=5 --v=3", "--v=5", 3, false)]
    #[case::value_with_equals("--nodeid=a=b", "a=b", 0, false)]
    #[case::empty_value("--nodeid=a --nodeid=", "", 0, false)]
    #[case::last_one_wins("-v=5 --nodeid=a --v=2 --nodeid=b", "b", 2, false)]
    #[case::switch("--log-format-json -v=1", "", 1, true)]
    #[case::switch_off("--log-format-json --log-format-json=F", "", 0, false)]
    #[case::terminator("-v=1 --", "", 1, false)]
    #[case::below_zero("-v=-1", "", 0, false)]
    fn syntax(#[case] line: &str, #[case] node: &str, #[case] v: u32, #[case] json: bool) {
        let config = parse(line).unwrap();
        assert_eq!(
            (
                config.node_id.as_str(),
                config.verbosity,
                config.log_format_json
            ),
            (node, v, json)
        );
    }

    #[rstest]
    #[case(
        "--filtered-watch-secret",
        "unknown flag --filtered-watch-secret; --help lists the flags"
    )]
    #[case("--node-id=a", "unknown flag --node-id; did you mean --nodeid?")]
    #[case(
        "-metric-addr=:1",
        "unknown flag --metric-addr; did you mean --metrics-addr?"
    )]
    #[case("help", "unexpected argument \"help\"; did you mean --help?")]
    #[case(
        "--log-format-json false -v=9",
        "unexpected argument \"false\"; a value of --log-format-json follows an equals sign: --log-format-json=false"
    )]
    #[case(
        "-v=1 -- -v=9",
        "unexpected argument \"-v=9\"; the program takes only flags, as --flag=value; --help lists them"
    )]
    #[case(
        "--log-format-json -v=1 -",
        "unexpected argument \"-\"; the program takes only flags, as --flag=value; --help lists them"
    )]
    #[case(
        "--version now",
        "unexpected argument \"now\"; a value of --version follows an equals sign: --version=false"
    )]
    #[case("---v=1", "\"---v=1\" is not a flag: write --flag=value")]
    #[case("--=1", "\"--=1\" is not a flag: write --flag=value")]
    #[case("--nodeid", "flag --nodeid needs a value: --nodeid=NAME")]
    #[case("-v=high", "invalid value \"high\" for --v: write a number")]
    #[case(
        "--log-format-json=yes",
        "invalid value \"yes\" for --log-format-json: write true or false"
    )]
    #[case(
        "--metrics-backend=stackdriver",
        "invalid value \"stackdriver\" for --metrics-backend: the only metrics backend is Prometheus"
    )]
    #[case(
        "--max-call-recv-msg-size=0",
        "invalid value \"0\" for --max-call-recv-msg-size: the size must be at least 1"
    )]
    #[case(
        "--drivername=../x",
        "invalid value \"../x\" for --drivername: write 1 to 63 letters, digits, dashes and dots, with a letter or digit at both ends"
    )]
    #[case(
        "--kubelet-root-dir=var",
        "invalid value \"var\" for --kubelet-root-dir: the path must start with /"
    )]
    #[case(
        "--rotation-poll-interval=x --rotation-poll-interval=2m",
        "invalid value \"x\" for --rotation-poll-interval: write a duration such as 30s, 2m or 1h30m"
    )]
    #[case("--endpoint=tcp://:1", "--state-dir is needed with a tcp:// endpoint")]
    #[case(
        "--endpoint=tcp://:1 --state-dir=/s --registration-dir=/r",
        "--registration-dir needs a unix:// endpoint: kubelet reaches drivers by a socket"
    )]
    #[case(
        "--version --nonsense",
        "unknown flag --nonsense; --help lists the flags"
    )]
    fn a_wrong_command_line_says_what_is_wrong(#[case] line: &str, #[case] text: &str) {
        assert_eq!(
            parse(line),
            Err(Exit {
                code: 2,
                text: text.to_owned()
            })
        );
    }

    #[rstest]
    #[case("--additional-provider-volume-paths=/a,,/b, --provider-volume=/c", &["/a", "/b", "/c"])]
    #[case("--additional-provider-volume-paths= --provider-volume=/c", &["/c"])]
    #[case("--additional-provider-volume-paths=/a --provider-volume=", &["/a"])]
    fn providers_are_searched_in_order(#[case] line: &str, #[case] dirs: &[&str]) {
        let expected: Vec<PathBuf> = dirs.iter().map(PathBuf::from).collect();
        assert_eq!(parse(line).unwrap().provider_dirs(), expected);
    }

    #[rstest]
    #[case("--endpoint=unix:///csi/csi.sock --nodeid=n --enable-secret-rotation=false --rotation-poll-interval=2m", &[])]
    #[case("--log_dir=/x --one_output --log_dir=/y", &["one_output", "log_dir"])]
    #[case("--enable-pprof --enable-pprof=false", &[])]
    fn flags_that_do_nothing_yet_are_known(#[case] line: &str, #[case] names: &[&str]) {
        assert_eq!(parse(line).unwrap().without_effect(), names);
    }

    #[test]
    fn an_argument_that_cannot_be_read_is_not_guessed_at() {
        let argument = std::os::unix::ffi::OsStringExt::from_vec(b"--state-dir=/\xff".to_vec());
        let exit = Config::parse(std::iter::once(argument)).unwrap_err();
        assert_eq!(exit.code, 2);
        assert_eq!(exit.text, r#"argument "--state-dir=/\xFF" is not UTF-8"#);
    }

    #[test]
    fn version_is_one_line_of_json() {
        let exit = parse("--version -v=1").unwrap_err();
        assert_eq!(exit.code, 0);
        assert_eq!(
            exit.text,
            r#"{"BuildVersion":"local-dev","GitCommit":"unknown","BuildDate":"unknown"}"#
        );
        assert!(parse("--version --version=false").is_ok());
    }

    #[rstest]
    #[case("-h")]
    #[case("--help")]
    #[case("-v=1 -help --nonsense")]
    fn help_lists_every_flag(#[case] line: &str) {
        let exit = parse(line).unwrap_err();
        assert_eq!(exit.code, 0);
        for flag in FLAGS {
            assert!(
                exit.text.contains(&format!("\n  --{}", flag.name)),
                "{}",
                flag.name
            );
        }
    }
}
