//! Checks of a provider that restarts, and of a store that changes.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use super::socket::owner_and_mode;
use super::{Check, Finding, Subject, failed, needs};

/// The time that a provider may take to restart.
const RESTART: Duration = Duration::from_secs(30);

/// The time that a command of the user may take.
const COMMAND: Duration = Duration::from_secs(300);

const DAEMONSET: &str = "https://kubernetes.io/docs/concepts/workloads/controllers/daemonset/";
const SERVICE: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/provider/v1alpha1/service.proto";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "change-new-version",
        rule: "When the content of an object changes, so does its version.",
        source: SERVICE,
        run: |s| Box::pin(change_new_version(s)),
    },
    Check {
        name: "restart-answers",
        rule: "A provider that restarts answers at the same path within 30 seconds.",
        source: DAEMONSET,
        run: |s| Box::pin(restart_answers(s)),
    },
    Check {
        name: "restart-same-socket",
        rule: "The socket has the same owner and mode as before a restart.",
        source: DAEMONSET,
        run: |s| Box::pin(restart_same_socket(s)),
    },
    Check {
        name: "restart-same-objects",
        rule: "A restart changes neither files nor versions.",
        source: SERVICE,
        run: |s| Box::pin(restart_same_objects(s)),
    },
];

/// Runs a shell command of the user.
async fn shell(command: &str) -> Result<(), Finding> {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command).stdin(Stdio::null());
    shell.stdout(Stdio::null()).kill_on_drop(true);
    let reason = match timeout(COMMAND, shell.status()).await {
        Ok(Ok(status)) if status.success() => return Ok(()),
        Ok(Ok(status)) => format!("{command:?} ended with {status}"),
        Ok(Err(error)) => format!("cannot run {command:?}: {error}"),
        Err(_) => format!("{command:?} did not end in {COMMAND:?}"),
    };
    Err(failed(reason))
}

async fn change_new_version(subject: &Subject) -> Result<(), Finding> {
    let command = subject.settings.change.as_ref();
    let command = command.ok_or_else(|| needs("--change"))?;
    let before = subject.succeeds(subject.request()).await?;
    if before.versions.is_empty() {
        return Err(Finding::Skipped("versions-present failed".to_owned()));
    }
    shell(command).await?;
    let after = subject.succeeds(subject.request()).await?;
    if before.files == after.files {
        return Err(failed(
            "the content is the same: the command changed nothing, or the provider answers with what it had",
        ));
    }
    if before.versions == after.versions {
        return Err(failed("the content changed, and no version did"));
    }
    Ok(())
}

/// Restarts the provider and waits until it answers.
async fn restart(subject: &Subject) -> Result<(), Finding> {
    let command = subject.settings.restart.as_ref();
    shell(command.ok_or_else(|| needs("--restart"))?).await?;
    let limit = Instant::now() + RESTART;
    loop {
        match subject.version().await {
            Ok(_) => return Ok(()),
            Err(finding) if Instant::now() > limit => return Err(finding),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn restart_answers(subject: &Subject) -> Result<(), Finding> {
    restart(subject).await
}

async fn restart_same_socket(subject: &Subject) -> Result<(), Finding> {
    let before = owner_and_mode(subject)?;
    restart(subject).await?;
    let after = owner_and_mode(subject)?;
    if before != after {
        return Err(failed(format!("it was {before:?}, and is {after:?}")));
    }
    Ok(())
}

async fn restart_same_objects(subject: &Subject) -> Result<(), Finding> {
    let before = subject.succeeds(subject.request()).await?;
    restart(subject).await?;
    let after = subject.succeeds(subject.request()).await?;
    if before.files != after.files || before.versions != after.versions {
        return Err(failed("the answer changed"));
    }
    Ok(())
}
