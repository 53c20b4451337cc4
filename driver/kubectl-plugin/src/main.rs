//! The binary. kubectl finds it as `kubectl-secrets_store` in the PATH.

use std::{
    io::{self, Read as _, Write as _},
    path::Path,
    process::ExitCode,
};

use kubectl_secrets_store::lint::{File, lint};

const USAGE: &str = "\
Finds mistakes in SecretProviderClasses, pods and Helm values.

usage: kubectl secrets-store lint [-o json] FILE...

FILE is a YAML file, a directory of them, or - for standard input. Files are read together: give the classes and
the pods that use them in one call.

exit codes: 0 no mistake, 1 mistakes, 2 a wrong command line or a file that cannot be read";

/// The largest file, and the largest number of files, that are read.
const MAX_FILE: u64 = 16 * 1024 * 1024;
const MAX_FILES: usize = 10_000;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).peekable();
    match args.next().as_deref() {
        Some("lint") => {}
        Some("help" | "-h" | "--help") => return print(USAGE, 0),
        _ => return complain(USAGE),
    }
    let (mut json, mut names) = (false, Vec::new());
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-h" | "--help" => return print(USAGE, 0),
            "-o" | "--output" if args.peek().is_some_and(|form| form == "json") => {
                args.next();
                json = true;
            }
            "-ojson" | "-o=json" | "--output=json" => json = true,
            flag if flag.starts_with('-') && flag != "-" => {
                return complain(&format!(
                    "{flag} is not known, or has another value than json\n\n{USAGE}"
                ));
            }
            _ => names.push(arg),
        }
    }
    if names.is_empty() {
        return complain(USAGE);
    }
    let mut files = Vec::new();
    for name in &names {
        if let Err(error) = read(name, &mut files) {
            return complain(&format!("{name}: {error}"));
        }
    }
    let found = lint(&files);
    let code = u8::from(!found.is_empty());
    if json {
        return match serde_json::to_string_pretty(&found) {
            Ok(text) => print(&text, code),
            Err(error) => complain(&error.to_string()),
        };
    }
    let lines: Vec<_> = found.iter().map(ToString::to_string).collect();
    if lines.is_empty() {
        return ExitCode::SUCCESS;
    }
    print(&lines.join("\n"), code)
}

/// Reads a file, the YAML files of a directory and those below it, or standard input.
fn read(name: &str, files: &mut Vec<File>) -> io::Result<()> {
    let mut add = |name: &str, from: &mut dyn io::Read| {
        let mut text = String::new();
        from.take(MAX_FILE).read_to_string(&mut text)?;
        files.push(File {
            name: name.to_owned(),
            text,
        });
        Ok(())
    };
    if name == "-" {
        return add("standard input", &mut io::stdin());
    }
    if !Path::new(name).is_dir() {
        return add(name, &mut std::fs::File::open(name)?);
    }
    let mut left = vec![Path::new(name).to_owned()];
    let mut count = 0;
    while let Some(directory) = left.pop() {
        let mut entries = std::fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let (path, kind) = (entry.path(), entry.file_type()?);
            let is_yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
            if kind.is_dir() {
                left.push(path);
            } else if is_yaml && kind.is_file() {
                count += 1;
                if count > MAX_FILES {
                    return Err(io::Error::other(format!(
                        "it has more than {MAX_FILES} files"
                    )));
                }
                add(
                    &path.display().to_string(),
                    &mut std::fs::File::open(&path)?,
                )?;
            }
        }
    }
    Ok(())
}

/// Prints a text. A reader that has gone away is no error.
fn print(text: &str, code: u8) -> ExitCode {
    let _ = writeln!(io::stdout(), "{text}");
    ExitCode::from(code)
}

fn complain(text: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "{text}");
    ExitCode::from(2)
}
