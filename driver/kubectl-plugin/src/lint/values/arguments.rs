//! The driver's arguments in values: the driver's own command line says what is wrong with them.

use driver::config::Config;

use super::{refused::at, schema::Add};
use crate::lint::yaml::Node;

/// Finds the first argument with which the driver does not start.
pub(super) fn check(values: &Node, add: Add<'_>) {
    let Some((_, list)) = at(values, "linux.driver.extraArgs") else {
        return;
    };
    let items = list.items();
    let texts: Option<Vec<&str>> = items.iter().map(Node::text).collect();
    // What is no text is another mistake. What a variable has is not known.
    let Some(all) = texts.filter(|all| !all.iter().any(|text| text.contains("$("))) else {
        return;
    };
    let Some(why) = refusal(&all) else { return };
    // A flag whose value is the next argument is not wrong without it.
    let is_it = |&n: &usize| refusal(all.get(..=n).unwrap_or_default()).as_ref() == Some(&why);
    let Some(n) = (0..all.len()).find(is_it) else {
        return;
    };
    let line = items.get(n).map_or(list.line, |item| item.line);
    add(line, format!("linux.driver.extraArgs[{n}]: {why}"));
}

/// Returns what the driver says to arguments, if it does not start with them.
fn refusal(args: &[&str]) -> Option<String> {
    let parsed = Config::parse(args.iter().map(Into::into));
    parsed
        .err()
        .filter(|exit| exit.code != 0)
        .map(|exit| exit.text)
}
