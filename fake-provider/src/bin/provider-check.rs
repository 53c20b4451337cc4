//! The program `provider-check`: command line and output around [`fake_provider::check`].

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use fake_provider::check::{Check, Checked, GROUPS, Outcome, Selection, Settings, run};
use fake_provider::server::termination;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Checks whether a provider of the Secrets Store CSI driver keeps the rules of the interface.
///
/// FILE arguments are YAML or JSON maps of strings. Exit code: 0 if no check failed, 1 if one did, 2
/// if nothing could be checked or what --only names could not, if the report could not be written, or
/// after SIGINT or SIGTERM.
#[derive(Debug, Parser)]
struct Arguments {
    /// The provider's socket
    #[arg(required_unless_present = "list")]
    socket: Option<PathBuf>,

    /// The parameters of a class whose objects exist
    #[arg(long, value_name = "FILE")]
    parameters: Option<PathBuf>,

    /// The parameters of a class that asks for an object that does not exist
    #[arg(long, value_name = "FILE")]
    missing: Option<PathBuf>,

    /// The parameters of a class whose store cannot be reached
    #[arg(long, value_name = "FILE")]
    outage: Option<PathBuf>,

    /// The data of the Secret that nodePublishSecretRef of the pod names
    #[arg(long, value_name = "FILE")]
    secrets: Option<PathBuf>,

    /// Service account tokens by audience
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,

    /// More attributes, in place of a made-up pod's: csi.storage.k8s.io/pod.name and so on
    #[arg(long, value_name = "FILE")]
    attributes: Option<PathBuf>,

    /// A directory that provider and checker see at the same path, for target paths
    #[arg(long, value_name = "DIR")]
    target_dir: Option<PathBuf>,

    /// The provider's log, to look for tokens and secrets in it
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    /// A shell command that restarts the provider
    #[arg(long, value_name = "COMMAND")]
    restart: Option<String>,

    /// A shell command that changes the content of an object in the store
    #[arg(long, value_name = "COMMAND")]
    change: Option<String>,

    /// The seconds that one call may take
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,

    /// The seconds that all checks together may take
    #[arg(long, value_name = "SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    total_timeout: u64,

    /// Run only these checks or groups
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,

    /// Do not run these checks or groups
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    skip: Vec<String>,

    /// The form of the output
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,

    /// List the checks that would run with their rules and sources, and check nothing
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

impl Arguments {
    fn selection(&self) -> Result<Selection, String> {
        for name in self.only.iter().chain(&self.skip) {
            let known = GROUPS
                .iter()
                .any(|(group, checks)| group == name || checks.iter().any(|c| c.name == name));
            if !known {
                return Err(format!("there is no check or group {name:?}; see --list"));
            }
        }
        Ok(Selection {
            only: self.only.clone(),
            skip: self.skip.clone(),
        })
    }

    fn into_settings(self) -> Result<Settings, String> {
        let selection = self.selection()?;
        let socket = self.socket.unwrap_or_default();
        if let Some(log) = &self.log {
            fs::File::open(log).map_err(|error| format!("{}: {error}", log.display()))?;
        }
        let pod = [
            ("csi.storage.k8s.io/pod.name", "provider-check"),
            ("csi.storage.k8s.io/pod.namespace", "default"),
            (
                "csi.storage.k8s.io/pod.uid",
                "6d1c3b0a-0f4e-4f0e-9a57-5c1f2d9b7e11",
            ),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("secretProviderClass", "provider-check"),
        ];
        let mut pod: BTreeMap<String, String> = pod
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        pod.extend(map(self.attributes.as_deref())?.unwrap_or_default());
        let settings = Settings {
            socket,
            parameters: map(self.parameters.as_deref())?.unwrap_or_default(),
            missing: map(self.missing.as_deref())?,
            outage: map(self.outage.as_deref())?,
            secrets: map(self.secrets.as_deref())?,
            tokens: map(self.tokens.as_deref())?.unwrap_or_default(),
            pod,
            target_dir: self.target_dir.unwrap_or_else(std::env::temp_dir),
            log: self.log,
            restart: self.restart,
            change: self.change,
            timeout: Duration::from_secs(self.timeout),
            total_timeout: Duration::from_secs(self.total_timeout),
            selection,
        };
        fs::metadata(&settings.socket)
            .map_err(|error| format!("{}: {error}", settings.socket.display()))?;
        Ok(settings)
    }
}

/// Reads a map of strings, if a file is given.
fn map(path: Option<&Path>) -> Result<Option<BTreeMap<String, String>>, String> {
    path.map(read).transpose()
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    // The parser's own message quotes the file, which may have tokens.
    let options = serde_saphyr::options! { with_snippet: false };
    serde_saphyr::from_str_with_options(&text, options)
        .map_err(|_| format!("{} is not a map of strings in YAML or JSON", path.display()))
}

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    match checked(Arguments::parse()).await {
        Ok(code) => code,
        Err(reason) => {
            eprintln!("provider-check: {reason}");
            ExitCode::from(2)
        }
    }
}

/// Does what the arguments say.
///
/// # Errors
/// Why that cannot be done.
async fn checked(arguments: Arguments) -> Result<ExitCode, String> {
    let output = arguments.output;
    let no_output = |error| format!("cannot write the report: {error}");
    if arguments.list {
        let listed = list(&arguments.selection()?, output);
        print(&listed).map_err(no_output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let settings = arguments.into_settings()?;
    let only = settings.selection.only.clone();
    let interrupted = termination().map_err(|error| error.to_string())?;
    let mut printed = Ok(());
    let checks = run(settings, |checked| {
        if printed.is_ok() && matches!(output, Output::Text) {
            printed = print(&line(checked));
        }
    });
    // Whatever ends the checks early, their target paths are removed.
    let results = tokio::select! {
        results = checks => results,
        () = interrupted => return Err("interrupted".to_owned()),
    };
    printed.map_err(no_output)?;
    let counts = Counts::of(&results);
    print(&match output {
        Output::Text => counts.text(),
        Output::Json => json(&results, &counts),
    })
    .map_err(no_output)?;
    if counts.failed > 0 {
        return Ok(ExitCode::FAILURE);
    }
    for name in &only {
        was_checked(name, &results)?;
    }
    if counts.passed == 0 {
        return Err("nothing was checked".to_owned());
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks that a check or group that was asked for could run.
fn was_checked(name: &str, results: &[Checked]) -> Result<(), String> {
    let mut reason = "--skip leaves nothing of it";
    for result in results {
        if result.name == name || result.group == name {
            match &result.reason {
                None => return Ok(()),
                Some(skipped) => reason = skipped,
            }
        }
    }
    Err(format!("nothing was checked of {name}: {reason}"))
}

/// Prints to stdout at once.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // A reader that has seen enough may have closed it.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

/// The numbers of checks by outcome.
#[derive(Serialize)]
struct Counts {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Counts {
    fn of(results: &[Checked]) -> Self {
        let count = |outcome| results.iter().filter(|r| r.outcome == outcome).count();
        Self {
            passed: count(Outcome::Passed),
            failed: count(Outcome::Failed),
            skipped: count(Outcome::Skipped),
        }
    }

    fn text(&self) -> String {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        format!("{passed} passed, {failed} failed, {skipped} skipped\n")
    }
}

fn list(selection: &Selection, output: Output) -> String {
    let text = |(group, check): (&str, &Check)| {
        let (name, rule, source) = (check.name, check.rule, check.source);
        format!("{group}: {name}\n    {rule}\n    {source}\n")
    };
    let object = |(group, check): (&str, &Check)| {
        let (name, rule, source) = (check.name, check.rule, check.source);
        serde_json::json!({"group": group, "name": name, "rule": rule, "source": source})
    };
    match output {
        Output::Text => selection.checks().map(text).collect(),
        Output::Json => {
            let checks: Vec<_> = selection.checks().map(object).collect();
            format!("{:#}\n", serde_json::json!({"checks": checks}))
        }
    }
}

fn line(result: &Checked) -> String {
    let reason = result.reason.as_deref().unwrap_or_default();
    match result.outcome {
        Outcome::Passed => format!("ok      {}\n", result.name),
        Outcome::Skipped => format!("skipped {}: {reason}\n", result.name),
        Outcome::Failed => format!(
            "FAILED  {}: {reason}\n        {}\n        {}\n",
            result.name, result.rule, result.source
        ),
    }
}

fn json(results: &[Checked], counts: &Counts) -> String {
    let report = serde_json::json!({"checks": results, "counts": counts});
    format!("{report:#}\n")
}
