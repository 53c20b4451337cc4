//! Compares names, to tell what somebody meant.

use super::{Findings, yaml::Node};

/// Returns the name that is meant by one that is not known, if it is only a little different.
pub(super) fn meant<'a>(wrong: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_', '.'], "");
    let wrong = plain(wrong);
    let close = known
        .iter()
        .map(|name| (distance(&wrong, &plain(name)), *name));
    let (distance, name) = close.min()?;
    (distance <= 2 && distance * 3 <= name.len()).then_some(name)
}

/// Returns the name that is meant by one of which it is known that it is wrong.
pub(crate) fn closest<'a>(wrong: &str, known: &[&'a str]) -> Option<&'a str> {
    slip(wrong, known).or_else(|| meant(wrong, known))
}

/// Returns the number of letters that have to be changed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let changed = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = changed.min(corner + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}

/// Adds a finding for each field of a map that is not known. `what` is the map, in words.
pub(super) fn check_fields(map: &Node, what: &str, known: &[&str], file: &mut Findings<'_>) {
    for (key, _) in map.fields() {
        if known.contains(&key.text.as_str()) {
            continue;
        }
        let instead = match meant(&key.text, known) {
            Some(name) => format!("write {name}"),
            None => format!("it has {}", known.join(", ")),
        };
        file.add(
            key.line,
            format!("{what} has no field {}; {instead}", key.text),
        );
    }
}

/// Returns the key that is meant by one that differs from it in case or by one letter.
pub(super) fn slip<'a>(wrong: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_'], "");
    let wrong = plain(wrong);
    let mut known = known.iter().copied();
    known.find(|name| {
        let (a, b) = rest(&wrong, &plain(name));
        matches!(a.len().max(b.len()), 0 | 1) || is_swap(&a, &b)
    })
}

/// Returns whether a name of an object is most likely another one with a slip of the finger. Names of a family
/// are not: `db-1` and `db-2`, `db-ro` and `db-rw`, `web` and `web-a`.
pub(super) fn is_slip(wrong: &str, right: &str) -> bool {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_', '.'], "");
    if wrong.len() < 4 || wrong == right {
        return false;
    }
    if plain(wrong) == plain(right) {
        return true;
    }
    let (a, b) = rest(wrong, right);
    let changed = a.iter().chain(&b);
    if !changed.clone().all(|c| c.is_ascii_lowercase()) {
        return false;
    }
    // The part between dashes in which the names differ. A short one is a name of its own.
    let begin = wrong.chars().zip(right.chars()).take_while(|(x, y)| x == y);
    let parts = right.char_indices().collect::<Vec<_>>();
    let at = begin.count().min(parts.len().saturating_sub(1));
    let ends = |c: &&(usize, char)| "-.".contains(c.1);
    let before = parts[..at].iter().rev().take_while(|c| !ends(c)).count();
    let part = before + parts[at..].iter().take_while(|c| !ends(c)).count();
    match (a.len(), b.len()) {
        (1, 1) => part > 3,
        (0, 1) | (1, 0) => part > 2,
        _ => is_swap(&a, &b),
    }
}

fn is_swap(a: &[char], b: &[char]) -> bool {
    matches!((a, b), ([a1, a2], [b1, b2]) if a1 == b2 && a2 == b1)
}

/// Returns what is left of two texts without their common begin and end.
fn rest(a: &str, b: &str) -> (Vec<char>, Vec<char>) {
    let (mut a, mut b): (Vec<_>, Vec<_>) = (a.chars().collect(), b.chars().collect());
    while !a.is_empty() && a.last() == b.last() {
        a.pop();
        b.pop();
    }
    let same = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    (a.split_off(same), b.split_off(same))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_not_a_name_of_the_same_family() {
        for (wrong, right) in [
            ("shop-bd", "shop-db"),
            ("shopdb", "shop-db"),
            ("shop-secret", "shop-secrets"),
            ("shop-credentails", "shop-credentials"),
            ("sohp-db", "shop-db"),
            ("Shop-db", "shop-db"),
        ] {
            assert!(is_slip(wrong, right), "{wrong} {right}");
        }
        for (wrong, right) in [
            ("shop-db", "shop-db"),
            ("shop-db1", "shop-db2"),
            ("shop-db", "shop-db2"),
            ("shop-ro", "shop-rw"),
            ("shop", "shop-a"),
            ("shop-tls", "shop-db"),
            ("shop-db-ro", "shop-db"),
            ("db", "bd"),
        ] {
            assert!(!is_slip(wrong, right), "{wrong} {right}");
        }
    }

    #[test]
    fn a_key_is_meant_by_another_case_or_letter() {
        let known = ["objectName", "tenantId"];
        for (wrong, right) in [
            ("objectname", Some("objectName")),
            ("objectNmae", Some("objectName")),
            ("object-name", Some("objectName")),
            ("objectNames", Some("objectName")),
            ("tenatId", Some("tenantId")),
            ("clientId", None),
            ("objectAlias", None),
        ] {
            assert_eq!(slip(wrong, &known), right, "{wrong}");
        }
    }
}
