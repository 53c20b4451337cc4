//! The table of flags: the name of each, its default, what it sets, and its help text.

use std::{fmt::Write as _, time::Duration};

use super::value::{
    absolute, address, check, count, driver_name, prometheus, put, size, uids, verbosity,
};
use super::{Config, Exit, wrong};

/// One flag of the command line.
pub(super) struct Flag {
    pub(super) name: &'static str,
    /// The placeholder of the value in the help. Empty for a switch.
    pub(super) value: &'static str,
    pub(super) default: &'static str,
    help: &'static str,
    /// Whether the flag changes anything. Others are accepted for the sake of existing manifests.
    pub(super) has_effect: bool,
    pub(super) set: fn(&mut Config, &str) -> Result<(), String>,
}

impl Flag {
    pub(super) fn is_switch(&self) -> bool {
        self.value.is_empty()
    }

    /// Returns whether Go accepts a negative value although it makes no sense.
    pub(super) fn is_signed(&self) -> bool {
        matches!(self.value, "DURATION" | "LEVEL")
    }
}

/// Builds a flag with an effect.
macro_rules! flag {
    ($name:literal $value:literal = $default:literal, $help:literal, $set:expr) => {
        Flag {
            name: $name,
            value: $value,
            default: $default,
            help: $help,
            has_effect: true,
            set: $set,
        }
    };
}

/// Builds a flag without an effect. Its value is checked all the same.
macro_rules! without_effect {
    ($name:literal $value:literal = $default:literal, $help:literal, $set:expr) => {
        Flag { has_effect: false, ..flag!($name $value = $default, $help, $set) }
    };
}

#[rustfmt::skip]
pub(super) const FLAGS: &[Flag] = &[
    flag!("endpoint" "URL" = "unix://tmp/csi.sock",
        "Address of the CSI services: unix://PATH, where PATH starts at the root directory, or tcp://HOST:PORT.",
        |c, v| put(&mut c.endpoint, v)),
    flag!("drivername" "NAME" = "secrets-store.csi.k8s.io",
        "Name of the CSI driver, as pods give it in spec.volumes[].csi.driver.",
        |c, v| { c.driver_name = driver_name(v)?; Ok(()) }),
    flag!("nodeid" "NAME" = "",
        "Name of the node on which the driver runs.",
        |c, v| put(&mut c.node_id, v)),
    flag!("kubelet-root-dir" "DIR" = "",
        "kubelet's root directory: the driver publishes only to paths below pods/ in it. Empty: to any path that has kubelet's form.",
        |c, v| { c.kubelet_root_dir = (!v.is_empty()).then(|| absolute(v)).transpose()?; Ok(()) }),
    flag!("state-dir" "DIR" = "",
        "Directory for the records of published volumes. Empty: records/ beside the CSI socket.",
        |c, v| put(&mut c.state_dir, v)),
    flag!("registration-dir" "DIR" = "",
        "Directory, kubelet's plugins_registry, in which the driver creates a socket to register itself. Empty: a sidecar registers the driver.",
        |c, v| put(&mut c.registration_dir, v)),
    flag!("kubelet-registration-path" "PATH" = "",
        "Path of the CSI socket on the node, for kubelet. Empty: the path in --endpoint.",
        |c, v| put(&mut c.kubelet_registration_path, v)),
    flag!("healthz-addr" "ADDR" = "",
        "Address at which the driver serves /healthz. Empty: nowhere; a sidecar answers kubelet's probe.",
        |c, v| { c.healthz_addr = address(v)?; Ok(()) }),
    flag!("metrics-addr" "ADDR" = ":8095",
        "Address at which the driver serves /metrics; :PORT means all addresses. Empty or 0: nowhere.",
        |c, v| { c.metrics_addr = address(v)?; Ok(()) }),
    flag!("metrics-backend" "NAME" = "Prometheus",
        "Format of the metrics. Only Prometheus is supported.",
        |_, v| prometheus(v)),

    flag!("provider-volume" "DIR" = "/var/run/secrets-store-csi-providers",
        "Directory of provider sockets that the driver searches last.",
        |c, v| put(&mut c.provider_volume, v)),
    flag!("additional-provider-volume-paths" "DIRS" = "/etc/kubernetes/secrets-store-csi-providers",
        "Directories of provider sockets, separated by commas, that the driver searches first, in this order.",
        |c, v| put(&mut c.additional_provider_volume_paths, v)),
    flag!("max-call-recv-msg-size" "BYTES" = "4194304",
        "Largest answer that the driver accepts from a provider.",
        |c, v| { c.max_call_recv_msg_size = size(v)?; Ok(()) }),
    flag!("provider-max-calls" "NUMBER" = "16",
        "Largest number of calls in flight to one provider, shared between namespaces and classes. Other calls wait, and first mounts go before refreshes.",
        |c, v| { c.provider_max_calls = count(v)?; Ok(()) }),
    flag!("provider-max-bytes" "BYTES" = "67108864",
        "Memory for the answers of one provider. Further answers wait until there is memory for them. An answer counts from its arrival until its files are written. A single answer is accepted even if it is larger. The value counts as at most a sixth of the driver's memory limit.",
        |c, v| { c.provider_max_bytes = size(v)?; Ok(()) }),
    flag!("provider-uids" "UIDS" = "",
        "User IDs, separated by commas, as which providers may run besides root and the owner of the directory of their socket; any: as any user.",
        |c, v| { c.provider_uids = uids(v)?; Ok(()) }),
    flag!("provider-health-check" "" = "false",
        "Ask the providers for their version periodically, and log failures.",
        |c, v| put(&mut c.provider_health_check, v)),
    flag!("provider-health-check-interval" "DURATION" = "2m",
        "Time between two health checks of the providers.",
        |c, v| put(&mut c.provider_health_check_interval, v)),

    flag!("enable-secret-rotation" "" = "false",
        "Refresh mounted volumes when kubelet publishes them again, which needs requiresRepublish in the CSIDriver object.",
        |c, v| put(&mut c.enable_secret_rotation, v)),
    flag!("rotation-poll-interval" "DURATION" = "2m",
        "Shortest time between two refreshes of one volume. The class and the volume can set another.",
        |c, v| put(&mut c.rotation_poll_interval, v)),
    flag!("min-rotation-poll-interval" "DURATION" = "30s",
        "Shortest interval that a class or a volume can set.",
        |c, v| put(&mut c.min_rotation_poll_interval, v)),
    flag!("republish-errors" "MODE" = "mask",
        "What kubelet is told when a refresh fails: mask (success; an event on the pod reports the failure) or surface (the error). The volume keeps its content either way.",
        |c, v| put(&mut c.republish_errors, v)),
    flag!("rotation-backoff" "DURATION" = "10s",
        "Wait before a failed refresh is tried again. It doubles with each further failure, and is four times as long after RESOURCE_EXHAUSTED. Waits vary by up to a fifth.",
        |c, v| put(&mut c.rotation_backoff, v)),
    flag!("rotation-backoff-max" "DURATION" = "5m",
        "Longest wait before a failed refresh is tried again, unless the provider asks for a longer one.",
        |c, v| put(&mut c.rotation_backoff_max, v)),

    flag!("sync-errors" "MODE" = "report",
        "What happens when a Secret of secretObjects cannot be written: report (the pod starts, an event reports the failure, and the driver tries again) or fail (the pod waits).",
        |c, v| put(&mut c.sync_errors, v)),
    flag!("sync-interval" "DURATION" = "45s",
        "How often the driver checks whether somebody changed a synced Secret; at least 1s. The class of a volume is read again after the volume's refresh interval, 5 minutes or seven times this, whatever is shortest.",
        |c, v| { put(&mut c.sync_interval, v)?; c.sync_interval = c.sync_interval.max(Duration::from_secs(1)); Ok(()) }),

    flag!("kubeconfig" "FILE" = "",
        "Kubeconfig file for the connection to the API server. Empty: the pod's service account.",
        |c, v| put(&mut c.kubeconfig, v)),

    flag!("hardening" "" = "true",
        "Drop the capabilities that the driver does not need, forbid other processes to read its memory, lock its memory, and allow only the system calls that it uses.",
        |c, v| put(&mut c.hardening, v)),

    flag!("v" "LEVEL" = "0",
        "Verbosity of the log: 0 reports what happened, 5 adds every call, 6 adds every step.",
        |c, v| { c.verbosity = verbosity(v)?; Ok(()) }),
    flag!("log-format-json" "" = "false",
        "Write log lines as JSON objects.",
        |c, v| put(&mut c.log_format_json, v)),
    without_effect!("vmodule" "PATTERNS" = "", "Log levels by source file.", |_, v| check::<String>(v)),
    without_effect!("logtostderr" "" = "true", "Log to standard error instead of files.", |_, v| check::<bool>(v)),
    without_effect!("alsologtostderr" "" = "false", "Log to standard error as well as to files.", |_, v| check::<bool>(v)),
    without_effect!("stderrthreshold" "SEVERITY" = "2", "Lowest severity at which lines for log files also go to standard error.", |_, v| check::<String>(v)),
    without_effect!("log_dir" "DIR" = "", "Directory for log files.", |_, v| check::<String>(v)),
    without_effect!("log_file" "FILE" = "", "Path of the log file.", |_, v| check::<String>(v)),
    without_effect!("log_file_max_size" "MEGABYTES" = "1800", "Largest size of a log file.", |_, v| check::<u64>(v)),
    without_effect!("log_backtrace_at" "FILE:LINE" = ":0", "Source line that logs a stack trace.", |_, v| check::<String>(v)),
    without_effect!("add_dir_header" "" = "false", "Add the directory of the source file to log lines.", |_, v| check::<bool>(v)),
    without_effect!("skip_headers" "" = "false", "Log messages without a header.", |_, v| check::<bool>(v)),
    without_effect!("skip_log_headers" "" = "false", "Start log files without a header.", |_, v| check::<bool>(v)),
    without_effect!("one_output" "" = "false", "Write each line only to the log file of its own severity.", |_, v| check::<bool>(v)),
    without_effect!("enable-pprof" "" = "false", "Serve profiles in the format of Go's pprof.", |_, v| check::<bool>(v)),
    without_effect!("pprof-port" "PORT" = "6065", "Port at which profiles are served.", |_, v| check::<i64>(v)),

    flag!("version" "" = "false", "Print the version as one line of JSON, and exit.", |c, v| put(&mut c.print_version, v)),
];

/// Returns the flag with this name. The error for an unknown name suggests a similar one.
pub(super) fn find(name: &str) -> Result<&'static Flag, Exit> {
    FLAGS.iter().find(|flag| flag.name == name).ok_or_else(|| {
        let nearest = FLAGS
            .iter()
            .map(|flag| (distance(name, flag.name), flag.name))
            .min()
            .filter(|(distance, candidate)| *distance <= candidate.len() / 4);
        wrong(match nearest {
            Some((_, nearest)) => format!("unknown flag --{name}; did you mean --{nearest}?"),
            None => format!("unknown flag --{name}; --help lists the flags"),
        })
    })
}

/// Returns how many characters must be inserted, removed or replaced to turn one name into the
/// other.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (removed, a) in from.chars().enumerate() {
        let mut next = vec![removed + 1];
        for ((above_left, above), b) in row.iter().zip(row.iter().skip(1)).zip(&to) {
            let left = next.last().copied().unwrap_or_default();
            let replaced = above_left + usize::from(a != *b);
            next.push(replaced.min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

/// Renders the text of `--help`.
pub(super) fn help() -> String {
    let mut text = String::from("Usage: secrets-store-csi [flags]\n");
    for flag in FLAGS {
        let value = if flag.is_switch() {
            String::new()
        } else {
            format!("={}", flag.value)
        };
        let default = match flag.default {
            "" | "false" => String::new(),
            default => format!(" [{default}]"),
        };
        let note = if flag.has_effect {
            ""
        } else {
            " The driver accepts this flag and ignores it."
        };
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n  --{}{value}{default}\n      {}{note}",
            flag.name, flag.help
        );
    }
    text
}
