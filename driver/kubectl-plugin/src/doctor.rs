//! Examines the cluster and its nodes: what the driver needs, whether it has it, and what to do where it has not.
//!
//! A large cluster is not read as a whole: lists have a limit, and of the nodes only some are asked, those first
//! that look ill. The report says how many.

mod access;
mod checks;
mod facts;
mod nodes;
mod overdue;

use std::fmt;

use jiff::Timestamp;
use kube::Client;
use serde::Serialize;

/// What to look at.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The namespace of the driver, for someone who may not look for it.
    pub driver_namespace: Option<String>,
    /// The number of nodes that are asked.
    pub nodes: usize,
}

impl Default for Scope {
    fn default() -> Self {
        Self {
            driver_namespace: None,
            nodes: 20,
        }
    }
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The time of the report.
    pub time: Timestamp,
    /// What was looked at, in words.
    pub looked_at: Vec<String>,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// What could not be found out, and why.
    pub unknown: Vec<String>,
    /// Whether what the driver stands on could be read: without that, nothing wrong means nothing.
    pub known: bool,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The name of the check, which stays the same.
    pub check: &'static str,
    /// The nodes that it is about, if it is about nodes: some of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
    /// What is wrong, and what to do.
    pub what: String,
    /// The next command to type.
    pub next: String,
}

/// Examines a cluster.
///
/// # Errors
/// When the API server does not answer.
pub async fn doctor(client: &Client, scope: &Scope) -> Result<Report, String> {
    let facts = facts::Facts::read(client, scope).await?;
    Ok(Report {
        time: facts.now,
        looked_at: facts.looked_at(),
        findings: checks::all(&facts),
        unknown: facts.unknown(scope),
        known: facts.is_known(),
    })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Looked at:")?;
        for line in &self.looked_at {
            writeln!(f, "  - {line}")?;
        }
        match self.findings.as_slice() {
            [] if self.unknown.is_empty() => writeln!(f, "\nNothing is wrong.")?,
            [] => writeln!(
                f,
                "\nNothing is known to be wrong, but not all could be read; what could not is at the end."
            )?,
            _ => writeln!(f, "\nWrong:")?,
        }
        for finding in &self.findings {
            writeln!(f, "  - {}", finding.what)?;
            writeln!(f, "    next: {}", finding.next)?;
        }
        if !self.unknown.is_empty() {
            writeln!(f, "\nNot known:")?;
        }
        for line in &self.unknown {
            writeln!(f, "  - {line}")?;
        }
        Ok(())
    }
}
