//! Gives the steps of a traced run their names.
//!
//! A name is the kind of a step, what it is about, and the how many-th of those it is. It does not
//! depend on threads, times and directories, so that the same step of another run has the same name.

use std::collections::HashMap;

/// The kinds of frames of HTTP/2 that belong to a call.
const HEADERS: u8 = 1;
const DATA: u8 = 0;

/// The servers to which the driver connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Server {
    Api,
    Provider,
}

/// The names of one run.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    /// The directory of the run, and the volume in it, which have other names in other runs.
    root: String,
    volume: String,
    /// The directories of contents, in the order in which they appeared.
    generations: Vec<String>,
    /// The number of steps so far of each name.
    counts: HashMap<String, usize>,
    /// The request that was sent last by a connection.
    asked: HashMap<i32, String>,
}

/// Returns whether a step of this name is one of the node alone, and not a part of a conversation with a server.
pub(crate) fn is_of_node(name: &str) -> bool {
    !["API server: ", "provider: "]
        .iter()
        .any(|with| name.starts_with(with))
}

impl Names {
    pub(crate) fn new(root: String, volume: String) -> Self {
        Self {
            root,
            volume,
            generations: Vec::new(),
            counts: HashMap::new(),
            asked: HashMap::new(),
        }
    }

    /// Returns the name of a step that is described by these words.
    pub(crate) fn name(&mut self, described: &str) -> String {
        let described = described.replace(&self.volume, "VOLUME");
        let described = described.replace(&self.root, "");
        let words: Vec<String> = described.split(' ').map(|word| self.word(word)).collect();
        self.counted(words.join(" "))
    }

    fn counted(&mut self, name: String) -> String {
        let count = self.counts.entry(name.clone()).or_default();
        *count += 1;
        format!("{name} #{count}")
    }

    fn word(&mut self, word: &str) -> String {
        let parts: Vec<String> = word.split('/').map(|part| self.part(part)).collect();
        parts.join("/")
    }

    /// Replaces what differs from run to run in a part of a path.
    fn part(&mut self, part: &str) -> String {
        let generation = part.strip_prefix("..").and_then(|rest| rest.chars().next());
        if generation.is_some_and(|first| first.is_ascii_digit()) {
            let found = self.generations.iter().position(|known| known == part);
            let index = found.unwrap_or_else(|| {
                self.generations.push(part.to_owned());
                self.generations.len() - 1
            });
            return format!("..T{}", index + 1);
        }
        let words = part.split('.').map(|word| {
            let is = |kind: fn(&u8) -> bool| !word.is_empty() && word.as_bytes().iter().all(kind);
            match word {
                // First: some random names have no letter.
                _ if word.len() > 6 && is(u8::is_ascii_hexdigit) => "RANDOM",
                _ if is(u8::is_ascii_digit) => "N",
                _ => word,
            }
        });
        words.collect::<Vec<_>>().join(".")
    }

    /// Returns the name of the step of sending these bytes by a connection, if it is one.
    pub(crate) fn sent(&mut self, to: Server, connection: i32, bytes: &[u8]) -> Option<String> {
        match to {
            Server::Api => {
                let line = bytes.split(|byte| *byte == b'\r').next()?;
                let line = String::from_utf8_lossy(line);
                let mut words = line.split(' ');
                let (Some(method), Some(path), Some("HTTP/1.1")) =
                    (words.next(), words.next(), words.next())
                else {
                    return Some(self.counted("API server: more of a request sent".to_owned()));
                };
                let asked = format!("{method} {}", short(path));
                self.asked.insert(connection, asked.clone());
                Some(self.counted(format!("API server: {asked} sent")))
            }
            Server::Provider => {
                calls(bytes).then(|| self.counted("provider: request sent".to_owned()))
            }
        }
    }

    /// Returns the name of the step of receiving these bytes, if it is one.
    pub(crate) fn received(
        &mut self,
        from: Server,
        connection: i32,
        bytes: &[u8],
    ) -> Option<String> {
        match from {
            Server::Api => {
                let asked = self.asked.get(&connection)?;
                let name = format!("API server: {asked} answered");
                Some(self.counted(name))
            }
            Server::Provider => {
                calls(bytes).then(|| self.counted("provider: answer received".to_owned()))
            }
        }
    }
}

/// Returns the part of a path that tells what is asked for.
fn short(path: &str) -> String {
    let path = path.split('?').next().unwrap_or(path);
    let (_, after) = path.split_once("/namespaces/shop/").unwrap_or(("", path));
    match after.split_once('/') {
        // The names of events are random.
        Some(("events", _)) => "events/NAME".to_owned(),
        _ => after.to_owned(),
    }
}

/// Whether bytes of HTTP/2 contain a part of a call, and not only settings of the connection.
fn calls(bytes: &[u8]) -> bool {
    let mut rest = bytes
        .strip_prefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .unwrap_or(bytes);
    while let [a, b, c, kind, _, _, _, _, _, after @ ..] = rest {
        if *kind == HEADERS || *kind == DATA {
            return true;
        }
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        rest = after.get(length..).unwrap_or_default();
    }
    false
}
