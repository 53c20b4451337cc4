//! The program `provider-check`: command line and output around [`fake_provider::check`].

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use fake_provider::check::{Checked, GROUPS, Outcome, Settings, run};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Checks whether a provider of the Secrets Store CSI driver keeps the rules of the interface.
///
/// FILE arguments are YAML or JSON maps of strings. Exit code: 0 if no check failed, 1 if one did, 2
/// if nothing could be checked.
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

    /// Run only these checks or groups
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,

    /// Do not run these checks or groups
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    skip: Vec<String>,

    /// The form of the output
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,

    /// List the checks with their rules and sources, and check nothing
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

impl Arguments {
    fn into_settings(self) -> Result<Settings, String> {
        let socket = self.socket.unwrap_or_default();
        for name in self.only.iter().chain(&self.skip) {
            let known = GROUPS
                .iter()
                .any(|(group, checks)| group == name || checks.iter().any(|c| c.name == name));
            if !known {
                return Err(format!("there is no check or group {name:?}; see --list"));
            }
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
        Ok(Settings {
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
            only: self.only,
            skip: self.skip,
        })
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
    let arguments = Arguments::parse();
    if arguments.list {
        print(&list());
        return ExitCode::SUCCESS;
    }
    let output = arguments.output;
    let settings = match arguments.into_settings() {
        Ok(settings) => settings,
        Err(reason) => {
            eprintln!("provider-check: {reason}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = fs::metadata(&settings.socket) {
        eprintln!("provider-check: {}: {error}", settings.socket.display());
        return ExitCode::from(2);
    }
    let results = run(settings).await;
    let counts = Counts::of(&results);
    print(&match output {
        Output::Text => text(&results, &counts),
        Output::Json => json(&results, &counts),
    });
    if counts.failed > 0 {
        ExitCode::FAILURE
    } else if counts.passed == 0 {
        eprintln!("provider-check: nothing was checked");
        ExitCode::from(2)
    } else {
        ExitCode::SUCCESS
    }
}

/// Prints to stdout. A reader that has seen enough may have closed it.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
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
}

fn list() -> String {
    let checks = GROUPS
        .iter()
        .flat_map(|(group, checks)| checks.iter().map(move |check| (group, check)));
    checks.fold(String::new(), |all, (group, check)| {
        let (name, rule, source) = (check.name, check.rule, check.source);
        all + &format!("{group}: {name}\n    {rule}\n    {source}\n")
    })
}

fn text(results: &[Checked], counts: &Counts) -> String {
    let lines = results.iter().map(|result| {
        let reason = result.reason.as_deref().unwrap_or_default();
        match result.outcome {
            Outcome::Passed => format!("ok      {}\n", result.name),
            Outcome::Skipped => format!("skipped {}: {reason}\n", result.name),
            Outcome::Failed => format!(
                "FAILED  {}: {reason}\n        {}\n        {}\n",
                result.name, result.rule, result.source
            ),
        }
    });
    let Counts {
        passed,
        failed,
        skipped,
    } = counts;
    lines.collect::<String>() + &format!("{passed} passed, {failed} failed, {skipped} skipped\n")
}

fn json(results: &[Checked], counts: &Counts) -> String {
    let report = serde_json::json!({"checks": results, "counts": counts});
    format!("{report:#}\n")
}
