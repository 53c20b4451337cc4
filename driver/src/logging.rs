//! Writes log lines to standard error, in klog's form or as JSON objects.
//!
//! People and tools already read klog's form, in which the line of a failure starts with `E`. A
//! line has the fields of the spans that it was written in, so that each line of a publish names
//! its pod and volume. Values are quoted, so that none can start a line of its own.
//!
//! Other crates log from `WARN` on, and `kube_client` from `ERROR` on, at every verbosity:
//! `kube_client` logs the body of an answer that it cannot decode, which may be a Secret.

mod fields;
mod queue;

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serializer as _;
use serde_json::Value;
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::SetGlobalDefaultError;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::{LookupSpan, Registry};

use crate::config::Config;
use fields::Fields;
use queue::Queue;

/// The crates whose lines follow the verbosity.
const OURS: [&str; 3] = ["driver", "proto", "secrets_store_csi"];

/// The longest time for which the end of the process waits for a reader of standard error.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// Makes a line of the time, the level, the place in the source, and the fields of an event.
type Form = fn(Timestamp, Level, &str, &Fields) -> String;

/// The log of the process.
#[derive(Clone)]
pub struct Log {
    form: Form,
    queue: Arc<Queue>,
}

impl Log {
    /// Writes the lines on a thread of their own from now on, so that nobody waits for the reader of
    /// standard error. Must be called after the process is hardened, which it is with a single thread.
    pub fn start(&self) {
        let Self { form, queue } = self.clone();
        self.queue.has_writer(true);
        let thread = thread::Builder::new().name("log".to_owned());
        let started =
            thread.spawn(move || queue.write_to(io::stderr(), |lost| about_lost(form, lost)));
        if let Err(error) = started {
            self.queue.has_writer(false);
            tracing::warn!(%error, "there is no thread for the log: calls wait while standard error is not read");
        }
    }

    /// Waits until the lines are written, but for no more than a second.
    pub fn flush(&self) {
        self.queue.flush(FLUSH_WITHIN);
    }

    fn write(&self, line: String) {
        if let Some(line) = self.queue.add(line) {
            // A failure to write to standard error cannot be reported.
            let _ = io::stderr().write_all(line.as_bytes());
        }
    }
}

/// Returns the line that stands in the place of lost ones.
fn about_lost(form: Form, lost: u64) -> String {
    let fields = Fields {
        message: "log lines were lost here, because standard error was not read in time".to_owned(),
        named: vec![("lost", lost.into())],
    };
    let source = source(Some(file!()), Some(line!()));
    form(Timestamp::now(), Level::WARN, &source, &fields)
}

/// Starts logging to standard error, for the whole process.
///
/// # Errors
/// Fails if the process already has a log.
pub fn init(config: &Config) -> Result<Log, SetGlobalDefaultError> {
    let log = Log {
        form: form(config),
        queue: Arc::default(),
    };
    let own = log.clone();
    tracing::subscriber::set_global_default(subscriber(config, move |line| own.write(line)))?;
    Ok(log)
}

fn form(config: &Config) -> Form {
    if config.log_format_json {
        json_line
    } else {
        klog_line
    }
}

/// Returns the subscriber that [`init`] installs, which hands lines to `out`.
fn subscriber<W>(config: &Config, out: W) -> impl Subscriber + Send + Sync + 'static
where
    W: Fn(String) + Send + Sync + 'static,
{
    let form = form(config);
    Registry::default().with(Lines { form, out }.with_filter(filter(config.verbosity)))
}

/// Returns from which level on each crate logs. The verbosity is that of klog: 0 reports changes,
/// 5 adds every call, 6 adds every step.
fn filter(verbosity: u32) -> Targets {
    let ours = match verbosity {
        0..5 => LevelFilter::INFO,
        5 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("kube_client", LevelFilter::ERROR)
        .with_targets(OURS.map(|name| (name, ours)))
}

/// Writes one line for each event.
struct Lines<W> {
    form: Form,
    out: W,
}

impl<S, W> Layer<S> for Lines<W>
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    W: Fn(String) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.inherit(outer);
            }
        }
        let metadata = event.metadata();
        let source = source(metadata.file(), metadata.line());
        (self.out)((self.form)(
            Timestamp::now(),
            *metadata.level(),
            &source,
            &fields,
        ));
    }
}

/// Formats a line in klog's form: `I1123 16:19:05.123456       1 volume.rs:42] "message" key="value"`.
/// The time is in UTC, and the process id follows it.
fn klog_line(now: Timestamp, level: Level, source: &str, fields: &Fields) -> String {
    let severity = match level {
        Level::ERROR => 'E',
        Level::WARN => 'W',
        Level::INFO | Level::DEBUG | Level::TRACE => 'I',
    };
    let mut line = format!(
        "{severity}{} {:7} {source}] {:?}",
        now.strftime("%m%d %H:%M:%S.%6f"),
        std::process::id(),
        fields.message,
    );
    for (name, value) in &fields.named {
        // Writing to a String cannot fail.
        let _ = match value {
            Value::String(text) => write!(line, " {name}={text:?}"),
            other => write!(line, " {name}={other}"),
        };
    }
    line.push('\n');
    line
}

/// Formats a line as one JSON object: `ts`, `level`, `caller`, `msg`, then the fields.
fn json_line(now: Timestamp, level: Level, source: &str, fields: &Fields) -> String {
    let head = [
        (
            "ts",
            Value::from(now.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()),
        ),
        ("level", level.as_str().to_ascii_lowercase().into()),
        ("caller", source.into()),
        ("msg", fields.message.as_str().into()),
    ];
    let mut line = Vec::new();
    let members = head
        .iter()
        .chain(&fields.named)
        .map(|(name, value)| (name, value));
    match serde_json::Serializer::new(&mut line).collect_map(members) {
        Ok(()) => String::from_utf8_lossy(&line).into_owned() + "\n",
        // Keys and values are plain JSON values, so that this is not expected.
        Err(error) => format!("{{\"level\":\"error\",\"msg\":{:?}}}\n", error.to_string()),
    }
}

/// Returns the file, without its directories, and the line that wrote the event.
fn source(file: Option<&str>, line: Option<u32>) -> String {
    let file = file.and_then(|path| path.rsplit('/').next());
    format!("{}:{}", file.unwrap_or("unknown"), line.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::fields::LONGEST_VALUE;
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;
    use std::sync::Mutex;
    use tracing::{debug, error, info, info_span, trace, warn};

    /// Runs `body` with the subscriber for `flags`, and returns the lines that it logs.
    fn logged(flags: &[&str], body: impl FnOnce()) -> Vec<String> {
        let text = Arc::new(Mutex::new(String::new()));
        let out = Arc::clone(&text);
        let config = Config::parse(flags.iter().map(Into::into)).unwrap();
        let subscriber = subscriber(&config, move |line| out.lock().unwrap().push_str(&line));
        tracing::subscriber::with_default(subscriber, body);
        let text = text.lock().unwrap();
        text.lines().map(str::to_owned).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// A line is bounded for values of any length and kind, and short values are complete.
        #[test]
        fn every_value_of_a_line_is_bounded(
            piece in ".{1,12}",
            bytes in prop_oneof![0..20_000_usize, Just(LONGEST_VALUE), Just(3_000_000)],
            form in prop::sample::select(vec!["--log-format-json=true", "--log-format-json=false"]),
        ) {
            let long = piece.repeat(bytes / piece.len());
            let many = vec![long.clone(); 3];
            let lines = logged(&["-v=5", form], || {
                let _span = info_span!("publish", pod = long).entered();
                debug!(text = long, shown = %long, many = ?many, last = 7, "{long}");
            });
            prop_assert_eq!(lines.len(), 1);
            // A byte takes six where it must be escaped, and quoted text is escaped again.
            let most = 5 * (LONGEST_VALUE + 20) * 12 + 1000;
            prop_assert!(lines[0].len() < most, "{} bytes", lines[0].len());
            prop_assert!(lines[0].contains("last"), "what comes after is there");
            let cut = lines[0].matches("… (cut)").count();
            let expected = match long.len() {
                length if length > LONGEST_VALUE => 5,
                _ if format!("{many:?}").len() > LONGEST_VALUE => 1,
                _ => 0,
            };
            prop_assert!(cut >= expected, "{cut} are cut, not {expected}");
        }
    }

    #[test]
    fn klog_lines_have_a_header_and_quoted_values() {
        let lines = logged(&[], || {
            let _span = info_span!("publish", pod = "shop/web", volume = "csi-1").entered();
            info!(
                files = 2,
                ok = true,
                volume = "csi-2",
                "volume \"published\""
            );
            error!(error = %"first\nE1123 forged", "publish failed");
            warn!("slow");
        });
        let pid = format!(" {:7} logging.rs:", std::process::id());
        let texts: Vec<String> = lines
            .iter()
            .map(|line| {
                let (header, text) = line.split_once("] ").unwrap();
                let (stamp, number) = header.split_once(&pid).unwrap();
                assert!(number.parse::<u32>().is_ok(), "{line}");
                let shape = stamp.replace(|c: char| c.is_ascii_digit(), "0");
                assert_eq!(&shape[1..], "0000 00:00:00.000000", "{line}");
                format!("{} {text}", &stamp[..1])
            })
            .collect();
        assert_eq!(
            texts,
            [
                r#"I "volume \"published\"" files=2 ok=true volume="csi-2" pod="shop/web""#,
                r#"E "publish failed" error="first\nE1123 forged" pod="shop/web" volume="csi-1""#,
                r#"W "slow" pod="shop/web" volume="csi-1""#,
            ]
        );
    }

    #[test]
    fn json_lines_are_objects_with_the_fields_flattened() {
        let lines = logged(&["--log-format-json"], || {
            let span = info_span!(
                "publish",
                pod = "shop/web",
                provider = tracing::field::Empty
            );
            let _span = span.enter();
            span.record("provider", "vault");
            warn!(attempt = 3, took = 0.5, "provider is \"away\"\n");
        });
        let [line] = lines.as_slice() else {
            panic!("{lines:?}")
        };
        let mut value: Value = serde_json::from_str(line).unwrap();
        let members = value.as_object_mut().unwrap();
        let ts = members.remove("ts").unwrap();
        let ts: Timestamp = ts.as_str().unwrap().parse().unwrap();
        assert!(Timestamp::now().duration_since(ts).as_secs() < 60, "{ts}");
        let caller = members.remove("caller").unwrap();
        assert!(
            caller.as_str().unwrap().starts_with("logging.rs:"),
            "{caller}"
        );
        assert_eq!(
            value,
            serde_json::json!({
                "level": "warn", "msg": "provider is \"away\"\n",
                "attempt": 3, "took": 0.5, "pod": "shop/web", "provider": "vault",
            })
        );
        assert!(line.starts_with(r#"{"ts":"#), "{line}");
    }

    fn every_level() {
        error!("error");
        warn!("warn");
        info!("info");
        debug!("debug");
        trace!("trace");
    }

    #[rstest]
    #[case("-v=0", &["error", "warn", "info"])]
    #[case("-v=4", &["error", "warn", "info"])]
    #[case("-v=5", &["error", "warn", "info", "debug"])]
    #[case("-v=6", &["error", "warn", "info", "debug", "trace"])]
    fn our_lines_follow_the_verbosity(#[case] flag: &str, #[case] expected: &[&str]) {
        let messages: Vec<String> = logged(&[flag], every_level)
            .iter()
            .map(|line| line.split('"').nth(1).unwrap_or_default().to_owned())
            .collect();
        assert_eq!(messages, expected);
    }

    #[test]
    fn crates_of_others_are_quiet_however_verbose_we_are() {
        let lines = logged(&["-v=9"], || {
            warn!(target: "kube_client::client", "a body with a secret");
            error!(target: "kube_client::client", "kept: kube_client");
            for_each_crate();
        });
        let kept: Vec<&str> = lines
            .iter()
            .filter_map(|line| line.split('"').nth(1))
            .collect();
        assert_eq!(
            kept,
            [
                "kept: kube_client",
                "kept: h2",
                "kept: hyper",
                "kept: tower",
                "kept: rustls"
            ]
        );
    }

    fn for_each_crate() {
        macro_rules! emit {
            ($($target:literal)*) => { $(
                warn!(target: $target, "kept: {}", $target.split("::").next().unwrap());
                info!(target: $target, "dropped");
                trace!(target: $target, "dropped");
            )* };
        }
        emit!("h2::codec" "hyper::client" "tower::buffer" "rustls::client");
    }
}
