//! Tests that were skipped, listed at the end of a run.
//!
//! The test harness of Rust counts a test that returns early as passed, and keeps what it prints to
//! itself. The list therefore belongs to a process that outlives the tests: it reads lines until
//! the test process is gone, and then writes them to standard error.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

/// Collects lines; at the end of its input, counts and prints them.
const LIST: &str = r#"
lines=$(sort) && count=$(printf '%s\n' "$lines" | wc -l)
printf '\nskipped tests: %s\n%s\n' "$count" "$lines" >&2
"#;

static LISTING: Mutex<Option<Child>> = Mutex::new(None);

/// Lists the test that runs on this thread as skipped, with the reason.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("  {}: {reason}", thread.name().unwrap_or("a test"));
    if list(&line).is_none() {
        // A macro would write to where the test harness does not show it.
        let _unwritten = writeln!(std::io::stderr(), "skipped:{line}");
    }
}

/// Hands a line to the process that prints the list; none when it cannot be started.
fn list(line: &str) -> Option<()> {
    let mut listing = LISTING.lock().ok()?;
    if listing.is_none() {
        let mut shell = Command::new("sh");
        // An interrupt at the terminal ends the tests, and the list is printed all the same.
        shell
            .args(["-c", LIST])
            .process_group(0)
            .stdin(Stdio::piped());
        *listing = Some(shell.stdout(Stdio::null()).spawn().ok()?);
    }
    let input = listing.as_mut()?.stdin.as_mut()?;
    writeln!(input, "{line}").ok()
}
