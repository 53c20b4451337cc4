//! The binary. kubectl finds it as `kubectl-secrets_store` in the PATH.

mod arguments;
mod files;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use kubectl_secrets_store::{
    doctor::{Scope, doctor},
    explain::{Chosen, Explained, Missing, Workload, explain},
    lint::{lint_in, nothing_to_check},
};
use serde::Serialize;

use arguments::{Arguments, USAGE};

/// The exit code of a command that could not do what it was asked.
const COULD_NOT: u8 = 2;

fn main() -> ExitCode {
    let mut arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(why) => return misused(&why),
    };
    if arguments.help {
        return print(USAGE, 0);
    }
    // Flags may stand before the command, as with kubectl.
    if arguments.words.is_empty() {
        return misused("name a command: explain, doctor or lint");
    }
    let command = arguments.words.remove(0);
    match command.as_str() {
        "lint" => lint_files(&arguments),
        "explain" => explain_pod(&arguments),
        "doctor" => examine(&arguments),
        "help" => print(USAGE, 0),
        other => misused(&format!(
            "{other:?} is not a command; they are explain, doctor and lint"
        )),
    }
}

fn lint_files(arguments: &Arguments) -> ExitCode {
    if arguments.words.is_empty() {
        return misused("lint needs a file, a directory, or - for standard input");
    }
    let files = match files::read(&arguments.words) {
        Ok(files) => files,
        Err(why) => return complain(&why),
    };
    if let Some(nothing) = nothing_to_check(&files) {
        // Not on standard output, which may be read by a machine.
        let _ = writeln!(io::stderr(), "{nothing}");
    }
    let found = lint_in(&files, arguments.place.namespace.as_deref());
    let lines: Vec<_> = found.iter().map(ToString::to_string).collect();
    let code = code(found.is_empty(), true);
    say(arguments, &found, &lines.join("\n"), code)
}

fn explain_pod(arguments: &Arguments) -> ExitCode {
    let (workload, name) = match subject(&arguments.words) {
        Ok(subject) => subject,
        Err(why) => return misused(&why),
    };
    let name = name.as_str();
    let explained = arguments.run(async |client, namespace| {
        let driver = arguments.driver_namespace.as_deref();
        let (pod, missing) = match workload {
            Some(workload) => match workload.pod(client, namespace, name).await? {
                Chosen::Pod(pod, missing) => (pod, missing),
                Chosen::NoPods(none) => return Ok(Explained::NoPods(none)),
            },
            None => (name.to_owned(), Missing::default()),
        };
        let story = explain(client, namespace, &pod, driver).await?;
        Ok(Explained::Pod(Box::new(story.with(missing))))
    });
    match explained {
        Ok(explained) => say(
            arguments,
            &explained,
            explained.to_string().trim_end(),
            code(explained.trouble().is_empty(), explained.is_known()),
        ),
        Err(why) => complain(&why),
    }
}

/// Returns what `explain` is asked for: a workload, or a pod, and its name.
fn subject(words: &[String]) -> Result<(Option<Workload>, String), String> {
    let is_pod = |kind: &str| matches!(kind, "pod" | "pods" | "po");
    let split: Vec<_> = words.iter().flat_map(|word| word.split('/')).collect();
    let (kind, name) = match split.as_slice() {
        [] | [""] => return Err("the pod's name is missing: explain pod NAME".to_owned()),
        [kind] | [kind, ""] if is_pod(kind) || Workload::named(kind).is_some() => {
            return Err(format!("the {kind}'s name is missing: explain {kind} NAME"));
        }
        [name] => ("pod", *name),
        [kind, name] => (*kind, *name),
        _ => {
            return Err(format!(
                "explain takes one kind and one name, and not {}",
                words.join(" ")
            ));
        }
    };
    match Workload::named(kind) {
        None if is_pod(kind) => Ok((None, name.to_owned())),
        Some(workload) => Ok((Some(workload), name.to_owned())),
        None => Err(format!(
            "{kind:?} is not explained; a pod or its workload is"
        )),
    }
}

fn examine(arguments: &Arguments) -> ExitCode {
    if let Some(word) = arguments.words.first() {
        return misused(&format!(
            "doctor takes no {word:?}; it examines the whole cluster"
        ));
    }
    let scope = Scope {
        driver_namespace: arguments.driver_namespace.clone(),
        nodes: arguments.nodes.unwrap_or(Scope::default().nodes),
    };
    match arguments.run(async |client, _| doctor(client, &scope).await) {
        Ok(report) => say(
            arguments,
            &report,
            report.to_string().trim_end(),
            code(report.findings.is_empty(), report.known),
        ),
        Err(why) => complain(&why),
    }
}

/// Returns the exit code of a command that found nothing, or something.
fn code(is_fine: bool, is_known: bool) -> u8 {
    match (is_fine, is_known) {
        (false, _) => 1,
        (true, true) => 0,
        (true, false) => COULD_NOT,
    }
}

/// Prints what was found, for people or for machines.
fn say(arguments: &Arguments, found: &impl Serialize, text: &str, code: u8) -> ExitCode {
    if !arguments.json {
        return match text.is_empty() {
            true => ExitCode::from(code),
            false => print(text, code),
        };
    }
    match serde_json::to_string_pretty(found) {
        Ok(text) => print(&text, code),
        Err(error) => complain(&error.to_string()),
    }
}

/// Prints a text. A reader that has gone away is no error.
fn print(text: &str, code: u8) -> ExitCode {
    let _ = writeln!(io::stdout(), "{text}");
    ExitCode::from(code)
}

/// Says why a command line is wrong, before all that it could be.
fn misused(why: &str) -> ExitCode {
    complain(&format!("{why}\n\n{USAGE}"))
}

fn complain(text: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "{text}");
    ExitCode::from(COULD_NOT)
}
