//! Says in a bounded text why an aspect of a volume is in trouble: a line for each cause.

use std::hash::{DefaultHasher, Hash, Hasher as _};

use jiff::Timestamp;

use super::super::super::events::clipped;

/// The longest reason, and the longest line of it, in bytes.
pub(super) const MAX_REASON: usize = 2048;
const MAX_LINE: usize = 1024;
/// The number of causes that a reason names.
const MOST_LINES: usize = 5;
/// Stands at the end of a line that is cut.
const CUT: &str = "…";

/// One cause of trouble.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// The digest of what makes it another cause.
    identity: u64,
    line: String,
}

impl Cause {
    /// Makes a cause. `identity` is equal for causes that are the same to the pod's owner, although their
    /// messages vary. `message` contains no secret.
    pub fn new(identity: &str, message: &str) -> Self {
        let line = match message.chars().any(char::is_control) {
            true => cut(&message.replace(char::is_control, " "), MAX_LINE),
            false => cut(message, MAX_LINE),
        };
        Self {
            identity: digest(identity),
            line,
        }
    }
}

/// The trouble of one aspect of a volume.
#[derive(Debug, Clone)]
pub struct Trouble {
    pub(super) since: Timestamp,
    /// The digest of the identities of all causes.
    pub(super) identity: u64,
    pub(super) reason: String,
}

impl Trouble {
    /// Makes trouble that began at `since`, with its causes in the order in which they are told.
    pub fn new<'a>(since: Timestamp, causes: impl IntoIterator<Item = &'a Cause>) -> Self {
        let causes: Vec<&Cause> = causes.into_iter().collect();
        let identities: Vec<u64> = causes.iter().map(|cause| cause.identity).collect();
        let lines: Vec<&str> = causes.iter().map(|cause| cause.line.as_str()).collect();
        Self {
            since,
            identity: digest(&identities),
            reason: text(&lines),
        }
    }
}

fn digest(of: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Returns as much of a text as fits into a number of bytes, marked if that is not all.
fn cut(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    format!("{}{CUT}", clipped(text, most.saturating_sub(CUT.len())))
}

/// Returns the first lines, and how many there are beyond them. Lines that need less than their share
/// leave it to the others.
fn text(lines: &[&str]) -> String {
    let (named, others) = lines.split_at(lines.len().min(MOST_LINES));
    let rest = match others.len() {
        0 => String::new(),
        more => format!("\nand {more} more"),
    };
    let mut room = MAX_REASON - rest.len() - named.len().saturating_sub(1);
    let mut by_length: Vec<usize> = (0..named.len()).collect();
    by_length.sort_by_key(|index| named[*index].len());
    let mut told = vec![String::new(); named.len()];
    for (done, index) in by_length.into_iter().enumerate() {
        told[index] = cut(named[index], room / (named.len() - done));
        room -= told[index].len();
    }
    told.join("\n") + &rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// As many causes as fit are named in their order, each with its beginning, and the text is bounded.
        #[test]
        fn a_reason_names_its_causes(
            lengths in prop::collection::vec(0_usize..3000, 1..120),
            filling in prop::sample::select(vec!["x", "ü", "\n", "a\u{7}"]),
        ) {
            let causes: Vec<Cause> = lengths.iter().enumerate().map(|(number, length)| {
                Cause::new("same", &format!("Secret s-{number}: {}", filling.repeat(*length)))
            }).collect();
            let Trouble { reason, .. } = Trouble::new(Timestamp::UNIX_EPOCH, &causes);
            prop_assert!(reason.len() <= MAX_REASON, "{}", reason.len());
            let lines: Vec<&str> = reason.split('\n').collect();
            let named = causes.len().min(MOST_LINES);
            let others = causes.len() - named;
            prop_assert_eq!(lines.len(), named + usize::from(others > 0));
            let shortest = MAX_REASON / named - 16;
            for (number, line) in lines[..named].iter().enumerate() {
                prop_assert!(line.starts_with(&format!("Secret s-{number}: ")), "{line}");
                prop_assert!(!line.chars().any(char::is_control));
                let whole = causes[number].line.as_str();
                let is_cut = line.len() >= shortest.min(MAX_LINE - 4) && line.ends_with(CUT);
                prop_assert!(*line == whole || is_cut, "{line}");
            }
            if others > 0 {
                prop_assert_eq!(lines[named], format!("and {others} more"));
            }
        }

        /// Trouble is the same exactly if its causes are, whatever their messages say.
        #[test]
        fn the_identity_is_that_of_the_causes(
            before in prop::collection::vec(("[ab]", "[xy]"), 1..4),
            after in prop::collection::vec(("[ab]", "[xy]"), 1..4),
        ) {
            let identity = |of: &[(String, String)]| {
                let causes: Vec<_> = of.iter().map(|(id, said)| Cause::new(id, said)).collect();
                Trouble::new(Timestamp::UNIX_EPOCH, &causes).identity
            };
            let ids = |of: &[(String, String)]| of.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>();
            prop_assert_eq!(identity(&before) == identity(&after), ids(&before) == ids(&after));
        }
    }
}
