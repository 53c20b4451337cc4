//! Reads the files that are to be linted.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _},
    path::Path,
};

use kubectl_secrets_store::lint::{CHART, File};

/// The largest file, and the largest number of files, that are read.
const MAX_FILE: u64 = 16 * 1024 * 1024;
const MAX_FILES: usize = 10_000;

/// Reads files, the YAML files of directories and those below them, and standard input.
///
/// # Errors
/// Names the one that cannot be read.
pub(crate) fn read(names: &[String]) -> Result<Vec<File>, String> {
    let mut files = Vec::new();
    for name in names {
        read_one(name, &mut files).map_err(|error| format!("{name}: {error}"))?;
    }
    add_charts(&mut files);
    Ok(files)
}

/// Adds the `Chart.yaml` beside each file, if it names the driver's chart: it says below which name a parent chart
/// has the values of that. One that cannot be read is as none, for nobody asked for it.
fn add_charts(files: &mut Vec<File>) {
    let mut charts = Vec::new();
    let mut tried: BTreeSet<_> = files.iter().map(|file| file.name.clone()).collect();
    for file in &*files {
        let path = Path::new(&file.name).with_file_name("Chart.yaml");
        let name = path.display().to_string();
        // Standard input has no directory.
        if !Path::new(&file.name).is_file() || !tried.insert(name.clone()) {
            continue;
        }
        let mut found = Vec::new();
        let read = fs::File::open(&path).and_then(|mut chart| add(&name, &mut chart, &mut found));
        if read.is_ok() {
            charts.extend(found.into_iter().filter(|chart| chart.text.contains(CHART)));
        }
    }
    files.extend(charts);
}

fn read_one(name: &str, files: &mut Vec<File>) -> io::Result<()> {
    if name == "-" {
        return add("standard input", &mut io::stdin(), files);
    }
    if !Path::new(name).is_dir() {
        return add(name, &mut fs::File::open(name)?, files);
    }
    let mut left = vec![Path::new(name).to_owned()];
    while let Some(directory) = left.pop() {
        let mut entries = fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, kind) = (entry.path(), entry.file_type()?);
            let is_yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
            if kind.is_dir() {
                left.push(path);
            } else if is_yaml && kind.is_file() {
                if files.len() == MAX_FILES {
                    let why = format!("it has more than {MAX_FILES} files");
                    return Err(io::Error::other(why));
                }
                let name = path.display().to_string();
                add(&name, &mut fs::File::open(&path)?, files)?;
            }
        }
    }
    Ok(())
}

fn add(name: &str, from: &mut dyn io::Read, files: &mut Vec<File>) -> io::Result<()> {
    let mut text = String::new();
    from.take(MAX_FILE).read_to_string(&mut text)?;
    files.push(File {
        name: name.to_owned(),
        text,
    });
    Ok(())
}
