//! A model of the Secrets of these classes: what they have to be, from what they were and what the classes say now.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::classes::{DEEP, ENCODED, FIELD, JSON, TEXT, decoded, field, files};
use super::{CLASSES, LISTS, SHARED};

/// The Secret that two classes list.
pub(super) const OF_TWO: &str = "features-of-two";
/// The Secret with all objects, and the one with the values of some, of different types.
const OF_ALL: &str = "features-all";
const OF_SOME: &str = "features-some";
const OPAQUE: &str = "Opaque";
const BASIC_AUTH: &str = "kubernetes.io/basic-auth";

/// The Secrets by name.
pub(super) type Secrets = BTreeMap<&'static str, Expected>;

/// All names that a Secret of these classes can have.
pub(super) const NAMES: [&str; 3] = [OF_TWO, OF_ALL, OF_SOME];

/// What a Secret has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) of_type: &'static str,
    pub(super) data: BTreeMap<String, String>,
    /// The class that holds it; none once that lists it no more.
    pub(super) holder: Option<usize>,
    /// The class that held it last. The Secret may name it, if the driver did not see the class change.
    pub(super) last: usize,
}

/// The Secrets that a class lists.
#[derive(Debug, Default)]
pub(super) struct Listed {
    pub(super) secrets: Vec<ListedSecret>,
    /// Whether it lists one that somebody else has made.
    pub(super) taken: bool,
    /// Whether it lists more than a class may.
    pub(super) too_many: bool,
}

/// A Secret that a class lists.
#[derive(Debug)]
pub(super) struct ListedSecret {
    pub(super) name: &'static str,
    pub(super) of_type: &'static str,
    pub(super) entries: Vec<Entry>,
}

/// An entry of the data of a Secret.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entry {
    /// All objects under their names.
    All,
    /// The content of a file, as it is.
    Whole(&'static str, &'static str),
    /// The field of the JSON.
    Field(&'static str),
    /// What is encoded.
    Decoded(&'static str),
}

impl Entry {
    /// Returns the entry as a class says it.
    pub(super) fn declared(&self) -> Value {
        match self {
            Self::All => json!({"objectName": "*"}),
            Self::Whole(key, file) => json!({"objectName": file, "key": key}),
            Self::Field(key) => json!({"objectName": JSON, "jsonKey": FIELD, "key": key}),
            Self::Decoded(key) => json!({"objectName": ENCODED, "encoding": "base64", "key": key}),
        }
    }

    /// Returns the keys and values that it makes.
    fn values(&self, class: usize, number: u64) -> Vec<(String, String)> {
        match self {
            Self::All => files(class, number)
                .into_iter()
                .map(|(file, content)| (file.replace('/', "."), content))
                .collect(),
            Self::Whole(key, file) => {
                let content = files(class, number)
                    .into_iter()
                    .find(|(name, _)| name == file);
                let content = content.map(|(_, content)| content).unwrap_or_default();
                vec![((*key).to_owned(), content)]
            }
            Self::Field(key) => vec![((*key).to_owned(), field(number))],
            Self::Decoded(key) => vec![((*key).to_owned(), decoded(number))],
        }
    }
}

/// Returns the Secrets that a class lists. With `waits` it lists none that has to fail: its pod would not start
/// again after the node lost its power.
pub(super) fn lists(class: usize, number: u64, waits: bool) -> Listed {
    let bit = |bit: u32| number >> bit & 1 == 1;
    if SHARED.contains(&class) {
        let is_listed = bit(0) && !(waits && class == SHARED[1]);
        let entry = Entry::Whole("value", "value");
        let secret = ListedSecret {
            name: OF_TWO,
            of_type: OPAQUE,
            entries: vec![entry],
        };
        return Listed {
            secrets: is_listed.then_some(secret).into_iter().collect(),
            ..Listed::default()
        };
    }
    if class != LISTS {
        return Listed::default();
    }
    let mut all = vec![Entry::All];
    if bit(0) {
        // What is named goes before what is among all.
        all.insert(number as usize / 2 % 2, Entry::Field(TEXT));
        all.push(Entry::Decoded(ENCODED));
    }
    let mut secrets = vec![ListedSecret {
        name: OF_ALL,
        of_type: OPAQUE,
        entries: all,
    }];
    if bit(1) {
        let of_type = if bit(2) { BASIC_AUTH } else { OPAQUE };
        let entries = vec![
            Entry::Field("username"),
            Entry::Decoded("password"),
            Entry::Whole("deep", DEEP),
        ];
        secrets.push(ListedSecret {
            name: OF_SOME,
            of_type,
            entries,
        });
    }
    Listed {
        secrets,
        taken: bit(3) && !waits,
        too_many: bit(4) && bit(5) && !waits,
    }
}

/// Returns what the Secrets have to be, and the classes with one that has to fail.
pub(super) fn outcome(
    before: &Secrets,
    numbers: &[u64; CLASSES],
    waits: bool,
) -> (Secrets, BTreeSet<usize>) {
    let mut after = before.clone();
    let mut trouble = BTreeSet::new();
    for (class, number) in numbers.iter().enumerate() {
        let listed = lists(class, *number, waits);
        if listed.too_many {
            trouble.insert(class);
            continue;
        }
        if listed.taken {
            trouble.insert(class);
        }
        let is_listed = |name: &str| listed.secrets.iter().any(|secret| secret.name == name);
        for (name, secret) in &mut after {
            if secret.holder == Some(class) && !is_listed(name) {
                secret.holder = None;
            }
        }
    }
    for (class, number) in numbers.iter().enumerate() {
        let listed = lists(class, *number, waits);
        for secret in listed.secrets.iter().filter(|_| !listed.too_many) {
            let holder = after.get(secret.name).and_then(|there| there.holder);
            if holder.is_some_and(|holder| holder != class) {
                trouble.insert(class);
                continue;
            }
            // Those that are named replace those that come with all.
            let is_named = |entry: &&Entry| !matches!(entry, Entry::All);
            let (named, all): (Vec<&Entry>, Vec<&Entry>) =
                secret.entries.iter().partition(is_named);
            let entries = all.into_iter().chain(named);
            let data = entries
                .flat_map(|entry| entry.values(class, *number))
                .collect();
            let expected = Expected {
                of_type: secret.of_type,
                data,
                holder: Some(class),
                last: class,
            };
            after.insert(secret.name, expected);
        }
    }
    (after, trouble)
}

#[cfg(test)]
mod tests {
    use super::super::FIRST;
    use super::super::classes::content;
    use super::*;

    /// The numbers with another one for a class.
    fn with(class: usize, number: u64) -> [u64; CLASSES] {
        let mut numbers = FIRST;
        numbers[class] = number;
        numbers
    }

    #[test]
    fn who_listed_a_secret_first_holds_it_until_it_lists_it_no_more() {
        let [a, b] = SHARED;
        let (first, trouble) = outcome(&Secrets::new(), &FIRST, false);
        assert_eq!(first[OF_TWO].holder, Some(a));
        assert!(!trouble.contains(&a) && !trouble.contains(&b));
        let mut both = with(b, 5);
        let (second, trouble) = outcome(&first, &both, false);
        assert_eq!(second, first);
        assert!(trouble.contains(&b) && !trouble.contains(&a));
        both[a] = 4;
        let (third, trouble) = outcome(&second, &both, false);
        assert_eq!(third[OF_TWO].holder, Some(b));
        assert_eq!(third[OF_TWO].data["value"], content(b, "value", 5));
        assert!(!trouble.contains(&b));
        both[b] = 6;
        let (fourth, _) = outcome(&third, &both, false);
        assert_eq!(fourth[OF_TWO].holder, None);
        assert_eq!(fourth[OF_TWO].data, third[OF_TWO].data);
    }

    #[test]
    fn what_is_named_goes_before_what_is_among_all_and_too_many_change_nothing() {
        for number in [1, 3] {
            let (secrets, _) = outcome(&Secrets::new(), &with(LISTS, number), false);
            let all = &secrets[OF_ALL];
            assert_eq!(all.data[TEXT], field(number));
            assert_eq!(all.data[ENCODED], decoded(number));
            assert_eq!(all.data["deep.x"], content(LISTS, DEEP, number));
            assert_eq!(secrets.contains_key(OF_SOME), number == 3);
            let (after, trouble) = outcome(&secrets, &with(LISTS, 0b110_000), false);
            assert_eq!(after, secrets);
            assert!(trouble.contains(&LISTS));
            let (after, trouble) = outcome(&secrets, &with(LISTS, 0b111_000), true);
            assert_ne!(after, secrets);
            assert!(trouble.is_empty());
        }
    }
}
