//! The binary. kubectl finds it as `kubectl-secrets_store` in the PATH.

mod arguments;
mod files;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use kubectl_secrets_store::{
    doctor::{Scope, doctor},
    explain::{Workload, explain},
    lint::lint,
};
use serde::Serialize;

use arguments::{Arguments, USAGE};

/// The exit code of a command that could not do what it was asked.
const COULD_NOT: u8 = 2;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let parsed = match command.as_str() {
        "help" | "-h" | "--help" => return print(USAGE, 0),
        "lint" | "explain" | "doctor" => Arguments::parse(args),
        _ => return complain(USAGE),
    };
    let arguments = match parsed {
        Ok(arguments) if arguments.help => return print(USAGE, 0),
        Ok(arguments) => arguments,
        Err(why) => return complain(&format!("{why}\n\n{USAGE}")),
    };
    match command.as_str() {
        "lint" => lint_files(&arguments),
        "doctor" => examine(&arguments),
        _ => explain_pod(&arguments),
    }
}

fn lint_files(arguments: &Arguments) -> ExitCode {
    if arguments.words.is_empty() {
        return complain(USAGE);
    }
    let files = match files::read(&arguments.words) {
        Ok(files) => files,
        Err(why) => return complain(&why),
    };
    let found = lint(&files);
    let lines: Vec<_> = found.iter().map(ToString::to_string).collect();
    say(arguments, &found, &lines.join("\n"), found.is_empty())
}

fn explain_pod(arguments: &Arguments) -> ExitCode {
    let split = arguments.words.iter().flat_map(|word| word.split('/'));
    let words: Vec<_> = split.collect();
    let (kind, name) = match words.as_slice() {
        [name] => ("pod", *name),
        [kind, name] => (*kind, *name),
        _ => return complain(USAGE),
    };
    let workload = match (kind, Workload::named(kind)) {
        ("pod" | "pods" | "po", _) => None,
        (_, Some(workload)) => Some(workload),
        _ => {
            return complain(&format!(
                "{kind} is not explained; a pod or its workload is\n\n{USAGE}"
            ));
        }
    };
    let explained = arguments.run(async |client, namespace| {
        let driver = arguments.driver_namespace.as_deref();
        let pod = match workload {
            Some(workload) => workload.pod(client, namespace, name).await?,
            None => name.to_owned(),
        };
        explain(client, namespace, &pod, driver).await
    });
    match explained {
        Ok(story) => say(
            arguments,
            &story,
            story.to_string().trim_end(),
            story.trouble.is_empty(),
        ),
        Err(why) => complain(&why),
    }
}

fn examine(arguments: &Arguments) -> ExitCode {
    if !arguments.words.is_empty() {
        return complain(USAGE);
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
            report.findings.is_empty(),
        ),
        Err(why) => complain(&why),
    }
}

/// Prints what was found, for people or for machines.
fn say(arguments: &Arguments, found: &impl Serialize, text: &str, is_fine: bool) -> ExitCode {
    let code = u8::from(!is_fine);
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

fn complain(text: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "{text}");
    ExitCode::from(COULD_NOT)
}
