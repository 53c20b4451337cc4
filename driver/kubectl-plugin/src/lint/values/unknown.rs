//! Keys that the chart does not have, each with the one that was probably meant. The chart's own templates do the
//! same (`_check.tpl`).

use std::collections::BTreeMap;

use super::schema::{Schema, below, listed};
use crate::lint::{
    names::meant,
    yaml::{Key, Node},
};

/// Keys of which the names say too little, and the right ones.
const MOVED: [(&str, &str); 5] = [
    ("syncSecret.enable", "syncSecret.enabled"),
    ("linux.resources", "linux.driver.resources"),
    ("linux.extraArgs", "linux.driver.extraArgs"),
    ("linux.logVerbosity", "logVerbosity"),
    ("enableRotation", "enableSecretRotation"),
];

/// Keys of other charts of which the names say too little, and this chart's for the same. The chart has the same list
/// (`_check.tpl`).
const OF_OTHER_CHARTS: [(&str, &str); 12] = [
    ("podMonitor.interval", "podMonitor.endpoint.interval"),
    (
        "podMonitor.scrapeTimeout",
        "podMonitor.endpoint.scrapeTimeout",
    ),
    (
        "serviceMonitor.interval",
        "serviceMonitor.endpoint.interval",
    ),
    (
        "serviceMonitor.scrapeTimeout",
        "serviceMonitor.endpoint.scrapeTimeout",
    ),
    ("linux.hostNetwork", "linux.podSpec.hostNetwork"),
    ("linux.dnsPolicy", "linux.podSpec.dnsPolicy"),
    (
        "linux.securityContext",
        "linux.podSpec.securityContext or linux.driver.container.securityContext",
    ),
    ("linux.extraVolumes", "linux.volumes"),
    ("linux.extraVolumeMounts", "linux.volumeMounts"),
    ("logLevel", "logVerbosity"),
    ("linux.logLevel", "logVerbosity"),
    (
        "installCRDs",
        "linux.crds.enabled, which has no effect, as Helm installs the CRDs",
    ),
];

/// A key of which the name says nothing: what has annotations elsewhere is something else.
const NOWHERE: &str = "csiDriver.annotations";

/// Keys at the top level that are not for this chart: a parent chart gives them, or charts before 1.1 had them.
const OTHERS: [&str; 6] = [
    "global",
    "enabled",
    "install",
    "filteredWatchSecret",
    "grpcSupportedProviders",
    "minimumProviderVersions",
];

/// What a key that the chart does not have is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A known key, misspelt or with dots in it.
    Misspelt,
    /// The name of a key at another place.
    Elsewhere,
    /// Nothing like a known key.
    Foreign,
}

/// A key that the chart does not have.
#[derive(Debug)]
pub(super) struct Unknown {
    pub(super) kind: Kind,
    /// Its full name.
    pub(super) path: String,
    pub(super) line: usize,
    pub(super) message: String,
    is_at_top: bool,
}

impl Unknown {
    pub(super) fn is_at_top(&self) -> bool {
        self.is_at_top
    }
}

/// Finds keys that the chart does not have.
pub(super) struct Finder {
    root: &'static Schema,
    /// The full keys by their last part, without those that have no effect.
    places: BTreeMap<&'static str, Vec<String>>,
}

impl Finder {
    pub(super) fn new(root: &'static Schema) -> Self {
        let mut places = BTreeMap::new();
        collect(root, "", &mut places);
        Self { root, places }
    }

    /// Returns the keys of some values that the chart does not have.
    pub(super) fn find(&self, values: &Node) -> Vec<Unknown> {
        let mut found = Vec::new();
        self.search(values, self.root, "", &mut found);
        found
    }

    /// Returns whether some values have a key of the chart's top level, or a misspelt one.
    pub(super) fn has_key(&self, values: &Node) -> bool {
        let names: Vec<_> = self.root.properties.keys().map(String::as_str).collect();
        let mut fields = values.fields().iter();
        fields.any(|(key, _)| {
            let text = key.text.as_str();
            let is_known = names.contains(&text);
            is_known || !is_for_others(text) && self.meaning(key, "", &names).0 == Kind::Misspelt
        })
    }

    fn search(&self, values: &Node, schema: &Schema, path: &str, found: &mut Vec<Unknown>) {
        // Anything is accepted below windows, for which there is no driver.
        if path == "windows" || !schema.is_closed() {
            return;
        }
        let names: Vec<_> = schema.properties.keys().map(String::as_str).collect();
        for (key, value) in values.fields() {
            match schema.properties.get(&key.text) {
                Some(inside) => self.search(value, inside, &below(path, &key.text), found),
                None if path.is_empty() && is_for_others(&key.text) => {}
                None => found.push(self.unknown(key, path, &names)),
            }
        }
    }

    fn unknown(&self, key: &Key, object: &str, names: &[&str]) -> Unknown {
        let path = below(object, &key.text);
        let (kind, message) = self.meaning(key, object, names);
        Unknown {
            kind,
            line: key.line,
            message,
            path,
            is_at_top: object.is_empty(),
        }
    }

    /// Returns what a key is, and says so.
    fn meaning(&self, key: &Key, object: &str, names: &[&str]) -> (Kind, String) {
        let path = below(object, &key.text);
        let is = |right: &str| format!("the chart has no value {path}; it is {right}");
        if let Some((_, right)) = MOVED.iter().find(|(wrong, _)| *wrong == path) {
            return (Kind::Misspelt, is(right));
        }
        if let Some(nested) = self.nested(&key.text, names) {
            let how = "is one key with dots in it, which Helm does not take apart";
            return (
                Kind::Misspelt,
                format!("{} {how}; write {nested}", key.text),
            );
        }
        if let Some((_, right)) = OF_OTHER_CHARTS.iter().find(|(other, _)| *other == path) {
            return (Kind::Elsewhere, is(right));
        }
        let places = self.places.get(key.text.as_str());
        if let Some(places) = places.filter(|_| path != NOWHERE) {
            return (Kind::Elsewhere, is(&listed(places)));
        }
        if let Some(name) = meant(&key.text, names).or_else(|| related(&key.text, names)) {
            let message = format!("the chart has no value {path}; write {name}");
            return (Kind::Misspelt, message);
        }
        let all: Vec<_> = self.places.keys().copied().collect();
        let far = meant(&key.text, &all).or_else(|| related(&key.text, &all));
        let far = far.and_then(|name| self.places.get(name));
        if let Some(places) = far.filter(|_| path != NOWHERE) {
            return (Kind::Elsewhere, is(&listed(places)));
        }
        let instead = match object.is_empty() {
            true => "docs/chart.md lists what it has".to_owned(),
            false => format!("{object} has {}", names.join(", ")),
        };
        let message = format!("the chart has no value {path}; {instead}");
        (Kind::Foreign, message)
    }

    /// Returns how a key with dots is written, if a known one is meant.
    fn nested(&self, key: &str, names: &[&str]) -> Option<String> {
        let parts: Vec<_> = key.split('.').collect();
        let (first, last) = (parts.first()?, parts.last()?);
        let is_known = names.contains(&name_of(first))
            || self
                .places
                .get(name_of(last))
                .is_some_and(|places| places.iter().any(|place| place == key));
        if parts.len() < 2 || !is_known {
            return None;
        }
        let mut nested = "...".to_owned();
        for (n, part) in parts.iter().enumerate().rev() {
            // In the way of --set, a list has its items in brackets.
            let inside = match part.contains('[') {
                true => format!("[{nested}]"),
                false => nested,
            };
            nested = format!("{}: {inside}", name_of(part));
            if n > 0 {
                nested = format!("{{{nested}}}");
            }
        }
        Some(nested)
    }
}

/// Returns a part of a key without the place in a list that `--set` writes behind it.
fn name_of(part: &str) -> &str {
    part.split('[').next().unwrap_or(part)
}

/// Returns whether a key at the top level is not for this chart. By custom, some hold anchors and notes.
fn is_for_others(key: &str) -> bool {
    OTHERS.contains(&key) || key.starts_with("x-") || key.starts_with(['_', '.'])
}

fn collect(schema: &'static Schema, path: &str, places: &mut BTreeMap<&'static str, Vec<String>>) {
    if ["windows", "linux.crds"].contains(&path) || !schema.is_closed() {
        return;
    }
    for (name, inside) in &schema.properties {
        let full = below(path, name);
        // The keys of list items have no place of their own.
        places.entry(name).or_default().push(full.clone());
        collect(inside, &full, places);
    }
}

/// Returns the name that is meant by its beginning, or by one that goes on, or by another plural.
fn related<'a>(wrong: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_'], "");
    let wrong = plain(wrong);
    let is_it = |name: &&&str| {
        let name = plain(name);
        let without = |text: &str| text.replace('s', "");
        without(&name) == without(&wrong)
            || name.starts_with(&wrong) && wrong.len() >= 3 && name.len() <= wrong.len() + 4
            || wrong.starts_with(&name) && name.len() >= 4 && wrong.len() <= name.len() + 4
    };
    known.iter().find(is_it).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lint::{values::schema::of_chart, yaml::document};

    fn finder() -> Finder {
        Finder::new(of_chart().unwrap())
    }

    /// Returns the objects with known keys, and these.
    fn objects(schema: &'static Schema, path: &str, found: &mut Vec<(String, Vec<&'static str>)>) {
        if path == "windows" || !schema.is_closed() {
            return;
        }
        found.push((
            path.to_owned(),
            schema.properties.keys().map(String::as_str).collect(),
        ));
        for (key, inside) in &schema.properties {
            objects(inside, &below(path, key), found);
        }
    }

    /// Returns what is said of a key in an object.
    fn said(finder: &Finder, object: &str, key: &str) -> String {
        let parts = object.split('.').filter(|part| !part.is_empty());
        let open: String = parts.clone().map(|part| format!("{part}: {{")).collect();
        let text = format!("{{{open}{key}: 1{}}}", "}".repeat(parts.count()));
        let mut found = finder.find(&document(&text).unwrap().unwrap());
        assert_eq!(found.len(), 1, "{text}");
        let found = found.remove(0);
        assert_ne!(found.kind, Kind::Foreign, "{text}");
        assert_eq!(found.path, below(object, key.trim_matches('"')));
        found.message
    }

    #[test]
    fn a_key_at_a_wrong_place_gets_the_right_one() {
        let finder = finder();
        let (mut all, mut count) = (Vec::new(), 0);
        objects(finder.root, "", &mut all);
        for (object, keys) in &all {
            for (name, places) in &finder.places {
                if keys.contains(name) || object.is_empty() && is_for_others(name) {
                    continue;
                }
                let path = below(object, name);
                if path == NOWHERE || OF_OTHER_CHARTS.iter().any(|(other, _)| *other == path) {
                    continue;
                }
                let said = said(&finder, object, name);
                let is_named = places.iter().any(|place| {
                    said.ends_with(place)
                        || said.contains(&format!("{place} or "))
                        || said.contains(&format!("{place}, "))
                });
                assert!(is_named, "{object} {name}: {said}");
                count += 1;
            }
        }
        assert!(count > 500, "{count}");
    }

    #[test]
    fn a_key_of_another_chart_gets_this_charts() {
        let finder = finder();
        for (path, right) in OF_OTHER_CHARTS {
            let (object, key) = path.split_once('.').unwrap_or(("", path));
            let said = said(&finder, object, key);
            assert_eq!(
                said,
                format!("the chart has no value {path}; it is {right}")
            );
            for right in right.split(" or ") {
                let root = right.split('.').next().unwrap();
                assert!(finder.root.properties.contains_key(root), "{right}");
            }
        }
        let text = "{csiDriver: {annotations: 1}}";
        let found = finder.find(&document(text).unwrap().unwrap());
        assert!(found[0].message.ends_with("csiDriver has labels"));
    }

    /// Every key without its last letter, and with one more.
    #[test]
    fn a_misspelt_key_gets_the_right_one() {
        let finder = finder();
        let mut count = 0;
        for (name, places) in &finder.places {
            for wrong in [name[..name.len() - 1].to_owned(), format!("{name}x")] {
                if wrong.len() < 4 || finder.places.contains_key(wrong.as_str()) {
                    continue;
                }
                for place in places {
                    let object = place.rsplit_once('.').map_or("", |(object, _)| object);
                    let said = said(&finder, object, &wrong);
                    assert!(said.contains(name), "{object} {wrong}: {said}");
                    count += 1;
                }
            }
        }
        assert!(count > 100, "{count}");
    }

    #[test]
    fn a_key_with_dots_gets_the_nested_one() {
        let finder = finder();
        let places: Vec<_> = finder.places.values().flatten().cloned().collect();
        let with_dots = places.iter().filter(|place| place.contains('.'));
        assert!(with_dots.clone().count() > 40);
        for place in with_dots {
            let nested =
                place.replace('.', ": {") + ": ..." + &"}".repeat(place.matches('.').count());
            let said = said(&finder, "", &format!("{place:?}"));
            assert!(said.ends_with(&nested), "{said}");
        }
    }
}
