//! The table of flags: what each is called, its default, what it sets, and what the help says.

use std::{fmt::Write as _, time::Duration};

use super::value::{
    absolute, address, check, count, driver_name, one_of, prometheus, put, size, verbosity,
};
use super::{Config, Exit, wrong};

/// One flag of the command line.
pub(super) struct Flag {
    pub(super) name: &'static str,
    /// What stands for the value in the help; empty for a switch.
    pub(super) value: &'static str,
    pub(super) default: &'static str,
    help: &'static str,
    /// Accepted so that existing manifests start, without an effect so far.
    pub(super) pending: bool,
    pub(super) set: fn(&mut Config, &str) -> Result<(), String>,
}

impl Flag {
    pub(super) fn is_switch(&self) -> bool {
        self.value.is_empty()
    }

    /// Whether Go accepts less than nothing where it makes no sense.
    pub(super) fn is_signed(&self) -> bool {
        matches!(self.value, "DURATION" | "LEVEL")
    }
}

/// A flag with an effect.
macro_rules! flag {
    ($name:literal $value:literal = $default:literal, $help:literal, $set:expr) => {
        Flag {
            name: $name,
            value: $value,
            default: $default,
            help: $help,
            pending: false,
            set: $set,
        }
    };
}

/// A flag without an effect so far. Its value is checked all the same.
macro_rules! pending {
    ($name:literal $value:literal = $default:literal, $help:literal, $set:expr) => {
        Flag { pending: true, ..flag!($name $value = $default, $help, $set) }
    };
}

#[rustfmt::skip]
pub(super) const FLAGS: &[Flag] = &[
    flag!("endpoint" "URL" = "unix://tmp/csi.sock",
        "Where the CSI services listen: unix://PATH, which starts at the root, or tcp://HOST:PORT.",
        |c, v| put(&mut c.endpoint, v)),
    flag!("drivername" "NAME" = "secrets-store.csi.k8s.io",
        "The CSI driver's name, as pods name it in their volumes.",
        |c, v| { c.driver_name = driver_name(v)?; Ok(()) }),
    flag!("nodeid" "NAME" = "",
        "Name of the node that this driver runs on.",
        |c, v| put(&mut c.node_id, v)),
    flag!("kubelet-root-dir" "DIR" = "",
        "Publish only below the pods/ of this kubelet root directory; empty: wherever a target has kubelet's form.",
        |c, v| { c.kubelet_root_dir = (!v.is_empty()).then(|| absolute(v)).transpose()?; Ok(()) }),
    flag!("state-dir" "DIR" = "",
        "Where the records of published volumes are kept; empty: records/ beside the CSI socket.",
        |c, v| put(&mut c.state_dir, v)),
    flag!("registration-dir" "DIR" = "",
        "Register with kubelet by a socket in this directory, kubelet's plugins_registry; empty: a sidecar does it.",
        |c, v| put(&mut c.registration_dir, v)),
    flag!("kubelet-registration-path" "PATH" = "",
        "The CSI socket as kubelet sees it; empty: as in --endpoint.",
        |c, v| put(&mut c.kubelet_registration_path, v)),
    flag!("healthz-addr" "ADDR" = "",
        "Serve /healthz at this address; empty: a sidecar does it.",
        |c, v| { c.healthz_addr = address(v)?; Ok(()) }),
    flag!("metrics-addr" "ADDR" = ":8095",
        "Serve /metrics at this address, :PORT for all addresses; empty or 0: nowhere.",
        |c, v| { c.metrics_addr = address(v)?; Ok(()) }),
    flag!("metrics-backend" "NAME" = "Prometheus",
        "The form of the metrics. There is only Prometheus.",
        |_, v| prometheus(v)),

    flag!("provider-volume" "DIR" = "/var/run/secrets-store-csi-providers",
        "Directory of provider sockets, searched last.",
        |c, v| put(&mut c.provider_volume, v)),
    flag!("additional-provider-volume-paths" "DIRS" = "/etc/kubernetes/secrets-store-csi-providers",
        "Directories of provider sockets, separated by commas, searched first.",
        |c, v| put(&mut c.additional_provider_volume_paths, v)),
    flag!("max-call-recv-msg-size" "BYTES" = "4194304",
        "Largest answer of a provider that is accepted.",
        |c, v| { c.max_call_recv_msg_size = size(v)?; Ok(()) }),
    flag!("provider-max-calls" "NUMBER" = "16",
        "Calls in flight to one provider, at most, shared between namespaces and classes; others wait, first mounts before refreshes.",
        |c, v| { c.provider_max_calls = count(v)?; Ok(()) }),
    flag!("provider-max-bytes" "BYTES" = "67108864",
        "Memory for the answers of one provider, from the arrival of each until its files are written; others wait. One answer always goes. At most a sixth of the memory limit.",
        |c, v| { c.provider_max_bytes = size(v)?; Ok(()) }),
    flag!("provider-health-check" "" = "false",
        "Ask the providers for their version from time to time and log failures.",
        |c, v| put(&mut c.provider_health_check, v)),
    flag!("provider-health-check-interval" "DURATION" = "2m",
        "Time between two health checks of the providers.",
        |c, v| put(&mut c.provider_health_check_interval, v)),

    flag!("enable-secret-rotation" "" = "false",
        "Refresh mounted volumes when kubelet publishes them again (CSIDriver: requiresRepublish).",
        |c, v| put(&mut c.enable_secret_rotation, v)),
    flag!("rotation-poll-interval" "DURATION" = "2m",
        "Shortest time between two refreshes of one volume, where neither its class nor the volume says another.",
        |c, v| put(&mut c.rotation_poll_interval, v)),
    flag!("min-rotation-poll-interval" "DURATION" = "30s",
        "The shortest interval that a class or a volume may ask for.",
        |c, v| put(&mut c.min_rotation_poll_interval, v)),
    flag!("republish-errors" "MODE" = "mask",
        "Whether kubelet hears of a failed refresh: mask (the pod keeps its content, an event tells) or surface.",
        |c, v| { c.surface_republish_errors = one_of(v, ["mask", "surface"])? == 1; Ok(()) }),
    flag!("rotation-backoff" "DURATION" = "10s",
        "How long a volume is left alone after a failed refresh; doubles with each failure.",
        |c, v| put(&mut c.rotation_backoff, v)),
    flag!("rotation-backoff-max" "DURATION" = "5m",
        "The longest that a volume is left alone, unless its provider asks for more.",
        |c, v| put(&mut c.rotation_backoff_max, v)),

    flag!("sync-errors" "MODE" = "report",
        "What a Secret of secretObjects that cannot be kept comes to: report (an event, and tried again) or fail (the pod waits).",
        |c, v| { c.sync_errors_fail = one_of(v, ["report", "fail"])? == 1; Ok(()) }),
    flag!("sync-interval" "DURATION" = "45s",
        "How often each synced Secret and the class of each volume are looked at, whether somebody changed them; at least 1s.",
        |c, v| { put(&mut c.sync_interval, v)?; c.sync_interval = c.sync_interval.max(Duration::from_secs(1)); Ok(()) }),

    flag!("kubeconfig" "FILE" = "",
        "How to reach the API server; empty: as a pod does.",
        |c, v| put(&mut c.kubeconfig, v)),

    flag!("v" "LEVEL" = "0",
        "How much to log: 0 what happened, 5 also every call, 6 also every step.",
        |c, v| { c.verbosity = verbosity(v)?; Ok(()) }),
    flag!("log-format-json" "" = "false",
        "Log lines are JSON objects.",
        |c, v| put(&mut c.log_format_json, v)),
    pending!("vmodule" "PATTERNS" = "", "Log levels by source file.", |_, v| check::<String>(v)),
    pending!("logtostderr" "" = "true", "Log to standard error, never to files.", |_, v| check::<bool>(v)),
    pending!("alsologtostderr" "" = "false", "Log to standard error and to files.", |_, v| check::<bool>(v)),
    pending!("stderrthreshold" "SEVERITY" = "2", "From where on lines for files go to standard error too.", |_, v| check::<String>(v)),
    pending!("log_dir" "DIR" = "", "Write log files here.", |_, v| check::<String>(v)),
    pending!("log_file" "FILE" = "", "Write this log file.", |_, v| check::<String>(v)),
    pending!("log_file_max_size" "MEGABYTES" = "1800", "Largest log file.", |_, v| check::<u64>(v)),
    pending!("log_backtrace_at" "FILE:LINE" = ":0", "Where to log a stack trace.", |_, v| check::<String>(v)),
    pending!("add_dir_header" "" = "false", "Log the directory of the source file.", |_, v| check::<bool>(v)),
    pending!("skip_headers" "" = "false", "Log the message only.", |_, v| check::<bool>(v)),
    pending!("skip_log_headers" "" = "false", "Log files start without a header.", |_, v| check::<bool>(v)),
    pending!("one_output" "" = "false", "Write a line to one log file only.", |_, v| check::<bool>(v)),
    pending!("enable-pprof" "" = "false", "Serve profiles in Go's form.", |_, v| check::<bool>(v)),
    pending!("pprof-port" "PORT" = "6065", "Where to serve profiles.", |_, v| check::<i64>(v)),

    flag!("version" "" = "false", "Print the version as one line of JSON.", |c, v| put(&mut c.print_version, v)),
];

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

/// How many characters to insert, remove or replace to turn one name into the other.
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
        let pending = if flag.pending { " No effect yet." } else { "" };
        // Writing to a String does not fail.
        let _ = write!(
            text,
            "\n  --{}{value}{default}\n      {}{pending}",
            flag.name, flag.help
        );
    }
    text
}
