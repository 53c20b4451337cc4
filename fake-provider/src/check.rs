//! A conformance checker for providers: it calls a provider over its socket as the driver does, and
//! compares the answers with the rules of the interface.
//!
//! [`GROUPS`] is the table of all checks. Each check names the rule that it tests and where the rule
//! comes from. The program `provider-check` runs them.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, timeout_at};

mod answer;
mod connection;
mod errors;
mod forms;
mod request;
mod restart;
mod secrecy;
mod socket;
mod subject;
mod target;
mod versions;

use subject::Subject;

/// All checks in the order in which they run, by group.
pub const GROUPS: [(&str, &[Check]); 7] = [
    ("socket", socket::CHECKS),
    ("connection", connection::CHECKS),
    ("request", request::CHECKS),
    ("answer", answer::CHECKS),
    ("errors", errors::CHECKS),
    ("secrecy", secrecy::CHECKS),
    ("restart", restart::CHECKS),
];

/// The check that all others depend on: a provider that fails it answers nothing.
const FIRST_CALL: &str = "authority-localhost";

/// One check.
pub struct Check {
    /// The name of the check, unique among all.
    pub name: &'static str,
    /// The rule that a provider has to keep.
    pub rule: &'static str,
    /// The public source of the rule.
    pub source: &'static str,
    run: for<'a> fn(&'a Subject) -> Running<'a>,
}

/// A check that runs.
type Running<'a> = Pin<Box<dyn Future<Output = Result<(), Finding>> + Send + 'a>>;

/// The reason why a check did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Finding {
    /// The provider breaks the rule.
    Failed(String),
    /// The check cannot run.
    Skipped(String),
}

/// Returns that the provider breaks the rule of a check.
fn failed(reason: impl Into<String>) -> Finding {
    Finding::Failed(reason.into())
}

/// Returns that a check needs an option that is not set.
fn needs(option: &str) -> Finding {
    Finding::Skipped(format!("needs {option}"))
}

/// The settings of a run. They have no [`Debug`](std::fmt::Debug), because they contain secrets and
/// tokens.
#[derive(Clone)]
pub struct Settings {
    /// The provider's socket.
    pub socket: PathBuf,
    /// The parameters of a class whose objects exist.
    pub parameters: BTreeMap<String, String>,
    /// The parameters of a class that asks for an object that does not exist.
    pub missing: Option<BTreeMap<String, String>>,
    /// The parameters of a class whose store cannot be reached.
    pub outage: Option<BTreeMap<String, String>>,
    /// The data of the Secret of `nodePublishSecretRef`.
    pub secrets: Option<BTreeMap<String, String>>,
    /// Service account tokens by audience.
    pub tokens: BTreeMap<String, String>,
    /// The name, namespace, UID and service account of the pod, as attributes.
    pub pod: BTreeMap<String, String>,
    /// A directory that provider and checker both see at this path, for target paths.
    pub target_dir: PathBuf,
    /// The provider's log.
    pub log: Option<PathBuf>,
    /// A shell command that restarts the provider.
    pub restart: Option<String>,
    /// A shell command that changes the content of an object in the store.
    pub change: Option<String>,
    /// The time that one call may take.
    pub timeout: Duration,
    /// The time that all checks may take.
    pub total_timeout: Duration,
    /// The checks to run.
    pub selection: Selection,
}

/// A selection of checks.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Names of the checks or groups to run. Empty for all.
    pub only: Vec<String>,
    /// Names of checks or groups not to run.
    pub skip: Vec<String>,
}

impl Selection {
    /// Returns the selected checks with their groups, in the order in which they run.
    pub fn checks(&self) -> impl Iterator<Item = (&'static str, &'static Check)> {
        let all = GROUPS.into_iter();
        let all = all.flat_map(|(group, checks)| checks.iter().map(move |check| (group, check)));
        all.filter(|(group, check)| self.has(group, check.name))
    }

    fn has(&self, group: &str, check: &str) -> bool {
        let named = |names: &[String]| names.iter().any(|name| name == group || name == check);
        (self.only.is_empty() || named(&self.only)) && !named(&self.skip)
    }
}

/// The outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The provider keeps the rule.
    Passed,
    /// The provider breaks the rule.
    Failed,
    /// The check could not run.
    Skipped,
}

/// The result of one check.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// The check's group.
    pub group: &'static str,
    /// The check's name.
    pub name: &'static str,
    /// The rule that it tested.
    pub rule: &'static str,
    /// The source of the rule.
    pub source: &'static str,
    /// The outcome.
    pub outcome: Outcome,
    /// The reason for a failed or skipped check.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Runs all checks that the settings select, one after another, and passes each result to `report` as
/// soon as it is there. Once the provider no longer answers as it did, the rest is skipped.
pub async fn run(settings: Settings, mut report: impl FnMut(&Checked)) -> Vec<Checked> {
    let subject = Subject::new(settings);
    let hide = |reason: String| forms::hide(&reason, &subject.own);
    let limit = Instant::now() + subject.settings.total_timeout;
    let mut results: Vec<Checked> = Vec::new();
    let mut skipped = None;
    for (group, check) in subject.settings.selection.checks() {
        let finding = match &skipped {
            Some(reason) => Some(Finding::Skipped(String::clone(reason))),
            None => run_one(check, &subject, limit).await,
        };
        if skipped.is_none() && matches!(finding, Some(Finding::Failed(_))) {
            skipped = ends_with(check, &subject, limit).await;
        }
        let (outcome, reason) = match finding {
            None => (Outcome::Passed, None),
            Some(Finding::Failed(reason)) => (Outcome::Failed, Some(hide(reason))),
            Some(Finding::Skipped(reason)) => (Outcome::Skipped, Some(hide(reason))),
        };
        let checked = Checked {
            group,
            name: check.name,
            rule: check.rule,
            source: check.source,
            outcome,
            reason,
        };
        report(&checked);
        results.push(checked);
    }
    results
}

async fn run_one(check: &Check, subject: &Subject, limit: Instant) -> Option<Finding> {
    match timeout_at(limit, (check.run)(subject)).await {
        Ok(outcome) => outcome.err(),
        Err(_) => {
            let total = subject.settings.total_timeout;
            Some(failed(format!("all checks together took {total:?}")))
        }
    }
}

/// Returns why nothing can be checked after a check that failed.
async fn ends_with(check: &Check, subject: &Subject, limit: Instant) -> Option<String> {
    let name = check.name;
    if name == FIRST_CALL {
        return Some(format!("{FIRST_CALL} failed"));
    }
    if !subject.has_mounted() {
        return (Instant::now() >= limit).then(|| "the time is over".to_owned());
    }
    match timeout_at(limit, subject.recovers()).await {
        Ok(Ok(())) => None,
        Ok(Err(_)) => Some(format!("since {name}, no Mount succeeds")),
        Err(_) => Some("the time is over".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_check_has_a_name_of_its_own_a_rule_and_a_public_source() {
        let checks = GROUPS.iter().flat_map(|(_, checks)| checks.iter());
        let mut names: BTreeSet<&str> = GROUPS.iter().map(|(group, _)| *group).collect();
        for check in checks {
            assert!(names.insert(check.name), "{} is there twice", check.name);
            assert!(check.rule.ends_with('.'), "{}", check.rule);
            assert!(check.source.starts_with("https://"), "{}", check.source);
        }
    }
}
