//! Sets of fields, as in `metadata.managedFields` (`FieldsV1`), and their managers.
//!
//! In contrast to a real server, the type of a list is known by field name, for built-in kinds and
//! for `metadata` of every kind. All other lists are owned as a whole.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

/// The identity of a list's items.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum ListKind {
    /// There is none: the list is replaced as a whole.
    Atomic,
    /// Items are identified by their value.
    Set,
    /// Items are objects identified by this field.
    Map(&'static str),
}

/// The kinds of the lists of an object.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) built_in: bool,
}

impl Layout {
    pub(super) fn list(self, field: &str) -> ListKind {
        match field {
            "ownerReferences" => ListKind::Map("uid"),
            "finalizers" => ListKind::Set,
            _ if !self.built_in => ListKind::Atomic,
            "conditions" | "addresses" => ListKind::Map("type"),
            "containers"
            | "initContainers"
            | "ephemeralContainers"
            | "volumes"
            | "env"
            | "imagePullSecrets"
            | "drivers" => ListKind::Map("name"),
            "volumeMounts" => ListKind::Map("mountPath"),
            "ports" => ListKind::Map("containerPort"),
            _ => ListKind::Atomic,
        }
    }
}

/// A set of fields. A node that is itself in the set may have children that are in it too.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Fields {
    owned: bool,
    children: BTreeMap<String, Fields>,
}

/// Fields without an owner: the server writes them, or they are the object's identity.
const UNOWNED_METADATA: &[&str] = &[
    "name",
    "namespace",
    "generateName",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
];

impl Fields {
    fn leaf() -> Fields {
        Fields {
            owned: true,
            children: BTreeMap::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.owned && self.children.is_empty()
    }

    /// Returns all fields of a whole object that can have an owner.
    pub(super) fn of_object(object: &Value, layout: Layout) -> Fields {
        ownable(Fields::changed(None, object, "", layout))
    }

    /// Returns the fields of `new` that `old` lacks or has with another value.
    pub(super) fn changed_in_object(old: &Value, new: &Value, layout: Layout) -> Fields {
        ownable(Fields::changed(Some(old), new, "", layout))
    }

    fn changed(old: Option<&Value>, new: &Value, field: &str, layout: Layout) -> Fields {
        let mut set = Fields::default();
        if old == Some(new) {
            return set;
        }
        match new {
            Value::Object(entries) if !entries.is_empty() && old.is_none_or(Value::is_object) => {
                for (name, value) in entries {
                    let before = old.and_then(|old| old.get(name));
                    set.add(
                        format!("f:{name}"),
                        Fields::changed(before, value, name, layout),
                    );
                }
            }
            Value::Array(items) if !items.is_empty() && layout.list(field) != ListKind::Atomic => {
                for item in items {
                    let Some(element) = element(item, layout.list(field)) else {
                        return Fields::leaf();
                    };
                    let before = old.and_then(|old| find(old, &element));
                    let mut inner = match item {
                        Value::Object(_) => Fields::changed(before, item, "", layout),
                        _ => Fields::default(),
                    };
                    inner.owned = before.is_none();
                    set.add(element, inner);
                }
            }
            _ => return Fields::leaf(),
        }
        set
    }

    fn add(&mut self, element: String, child: Fields) {
        if !child.is_empty() {
            self.children.insert(element, child);
        }
    }

    pub(super) fn minus(&self, other: &Fields) -> Fields {
        let mut rest = Fields {
            owned: self.owned && !other.owned,
            children: BTreeMap::new(),
        };
        for (element, child) in &self.children {
            let child = match other.children.get(element) {
                Some(other) => child.minus(other),
                None => child.clone(),
            };
            rest.add(element.clone(), child);
        }
        rest
    }

    pub(super) fn plus(&mut self, other: &Fields) {
        self.owned |= other.owned;
        for (element, child) in &other.children {
            self.children
                .entry(element.clone())
                .or_default()
                .plus(child);
        }
    }

    /// Returns the fields of both sets whose values differ in `config` and `live`.
    pub(super) fn contested(&self, other: &Fields, live: &Value, config: &Value) -> Fields {
        let mut found = Fields::default();
        if self.owned
            && other.owned
            && (self.children.is_empty() || other.children.is_empty())
            && live != config
        {
            found.owned = true;
        }
        for (element, child) in &self.children {
            if let Some(other) = other.children.get(element) {
                let at = |value| find(value, element).unwrap_or(&Value::Null);
                found.add(
                    element.clone(),
                    child.contested(other, at(live), at(config)),
                );
            }
        }
        found
    }

    /// Removes these fields from `value`, and the containers that are empty then.
    pub(super) fn remove_from(&self, value: &mut Value) {
        for (element, child) in &self.children {
            let whole = child.children.is_empty() || (child.owned && element.starts_with("k:"));
            match value {
                Value::Object(entries) => {
                    let Some(name) = element.strip_prefix("f:") else {
                        continue;
                    };
                    let Some(inner) = entries.get_mut(name) else {
                        continue;
                    };
                    if !whole {
                        child.remove_from(inner);
                    }
                    if whole || is_empty_container(inner) {
                        entries.remove(name);
                    }
                }
                Value::Array(items) => {
                    let Some(index) = position(items, element) else {
                        continue;
                    };
                    if whole {
                        items.remove(index);
                    } else {
                        child.remove_from(&mut items[index]);
                    }
                }
                _ => {}
            }
        }
    }

    /// Returns the paths as in messages: `.spec.driver`, `.metadata.ownerReferences[uid="..."]`.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect_paths("", &mut paths);
        paths
    }

    fn collect_paths(&self, prefix: &str, paths: &mut Vec<String>) {
        if self.owned {
            paths.push(prefix.to_owned());
        }
        for (element, child) in &self.children {
            let path = match element.split_once(':') {
                Some(("f", name)) => format!("{prefix}.{name}"),
                Some(("v", value)) => format!("{prefix}[={value}]"),
                Some(("k", key)) => {
                    let key: Map<String, Value> = serde_json::from_str(key).unwrap_or_default();
                    let parts: Vec<String> = key
                        .iter()
                        .map(|(name, value)| format!("{name}={value}"))
                        .collect();
                    format!("{prefix}[{}]", parts.join(","))
                }
                _ => prefix.to_owned(),
            };
            child.collect_paths(&path, paths);
        }
    }

    pub(super) fn to_value(&self) -> Value {
        let mut map = Map::new();
        if self.owned && !self.children.is_empty() {
            map.insert(".".to_owned(), json!({}));
        }
        for (element, child) in &self.children {
            map.insert(element.clone(), child.to_value());
        }
        Value::Object(map)
    }

    pub(super) fn from_value(value: &Value) -> Fields {
        let mut set = Fields::node(value);
        set.owned = false;
        set
    }

    fn node(value: &Value) -> Fields {
        let mut set = Fields::default();
        let Some(map) = value.as_object() else {
            return set;
        };
        set.owned = map.is_empty() || map.contains_key(".");
        for (element, child) in map.iter().filter(|(element, _)| *element != ".") {
            set.children.insert(element.clone(), Fields::node(child));
        }
        set
    }
}

fn ownable(mut set: Fields) -> Fields {
    set.owned = false;
    set.children
        .retain(|element, _| element != "f:apiVersion" && element != "f:kind");
    if let Some(metadata) = set.children.get_mut("f:metadata") {
        metadata
            .children
            .retain(|element, _| !UNOWNED_METADATA.contains(&element.trim_start_matches("f:")));
        metadata.owned = false;
        if metadata.is_empty() {
            set.children.remove("f:metadata");
        }
    }
    set
}

/// Returns the path element of a list's item, if the item has its key.
pub(super) fn element(item: &Value, kind: ListKind) -> Option<String> {
    match kind {
        ListKind::Atomic => None,
        ListKind::Set => Some(format!("v:{item}")),
        ListKind::Map(key) => item
            .get(key)
            .map(|value| format!("k:{}", json!({ key: value }))),
    }
}

/// Returns the index of a list's item by its path element.
pub(super) fn position(items: &[Value], element: &str) -> Option<usize> {
    let (kind, text) = element.split_once(':')?;
    let wanted: Value = serde_json::from_str(text).ok()?;
    items.iter().position(|item| match kind {
        "v" => *item == wanted,
        "k" => wanted.as_object().is_some_and(|key| {
            key.iter()
                .all(|(name, value)| item.get(name) == Some(value))
        }),
        _ => false,
    })
}

fn find<'a>(value: &'a Value, element: &str) -> Option<&'a Value> {
    match value {
        Value::Object(entries) => entries.get(element.strip_prefix("f:")?),
        Value::Array(items) => items.get(position(items, element)?),
        _ => None,
    }
}

fn is_empty_container(value: &Value) -> bool {
    match value {
        Value::Object(entries) => entries.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// A field manager.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Manager {
    pub(super) name: String,
    /// Whether it writes by server-side apply.
    pub(super) apply: bool,
    /// `apiVersion` of the request.
    pub(super) api_version: String,
    /// Empty for the object itself.
    pub(super) subresource: String,
}

/// One entry of `metadata.managedFields`.
#[derive(Debug, Clone)]
pub(super) struct Ownership {
    pub(super) manager: Manager,
    pub(super) fields: Fields,
    time: String,
}

impl Manager {
    /// Returns the manager as in messages. `time` is that of its entry.
    pub(super) fn described(&self, time: &str) -> String {
        let mut text = format!("{:?}", self.name);
        if !self.subresource.is_empty() {
            text = format!("{text} with subresource {:?}", self.subresource);
        }
        if !self.apply {
            text = format!("{text} using {} at {time}", self.api_version);
        }
        text
    }
}

impl Ownership {
    /// Reads an object's entries.
    pub(super) fn read(object: &Value) -> Vec<Ownership> {
        let entries = object["metadata"]["managedFields"].as_array();
        entries
            .into_iter()
            .flatten()
            .map(|entry| {
                let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
                Ownership {
                    manager: Manager {
                        name: text("manager"),
                        apply: entry["operation"] == "Apply",
                        api_version: text("apiVersion"),
                        subresource: text("subresource"),
                    },
                    fields: Fields::from_value(&entry["fieldsV1"]),
                    time: text("time"),
                }
            })
            .collect()
    }

    /// Writes the entries into the object; entries without fields vanish.
    pub(super) fn write(entries: &[Ownership], object: &mut Value) {
        let list: Vec<Value> = entries
            .iter()
            .filter(|entry| !entry.fields.is_empty())
            .map(|entry| {
                let manager = &entry.manager;
                let mut value = json!({
                    "manager": manager.name,
                    "operation": if manager.apply { "Apply" } else { "Update" },
                    "apiVersion": manager.api_version,
                    "time": entry.time,
                    "fieldsType": "FieldsV1",
                    "fieldsV1": entry.fields.to_value(),
                });
                if !manager.subresource.is_empty() {
                    value["subresource"] = json!(manager.subresource);
                }
                value
            })
            .collect();
        if list.is_empty() {
            if let Some(metadata) = object["metadata"].as_object_mut() {
                metadata.remove("managedFields");
            }
        } else {
            object["metadata"]["managedFields"] = Value::Array(list);
        }
    }

    /// Sets the fields of a manager after a write. The time changes only when the fields do.
    pub(super) fn set(entries: &mut Vec<Ownership>, manager: &Manager, fields: Fields) {
        let same = |entry: &&mut Ownership| {
            entry.manager.name == manager.name
                && entry.manager.apply == manager.apply
                && entry.manager.subresource == manager.subresource
        };
        match entries.iter_mut().find(same) {
            Some(entry) if entry.fields == fields => {
                entry.manager.api_version.clone_from(&manager.api_version)
            }
            Some(entry) => {
                entry.fields = fields;
                entry.manager.api_version.clone_from(&manager.api_version);
                entry.time = now();
            }
            None => entries.push(Ownership {
                manager: manager.clone(),
                fields,
                time: now(),
            }),
        }
    }

    pub(super) fn described(&self) -> String {
        self.manager.described(&self.time)
    }
}

/// Records in `new` that `manager` changed `old` into it by a create, update or patch.
pub(super) fn track_update(
    old: Option<&Value>,
    new: &mut Value,
    manager: &Manager,
    layout: Layout,
) {
    let mut entries = old.map(Ownership::read).unwrap_or_default();
    let (changed, gone) = match old {
        None => (Fields::of_object(new, layout), Fields::default()),
        Some(old) => (
            Fields::changed_in_object(old, new, layout),
            Fields::of_object(old, layout).minus(&Fields::of_object(new, layout)),
        ),
    };
    if !changed.is_empty() || !gone.is_empty() {
        for entry in &mut entries {
            entry.fields = entry.fields.minus(&changed).minus(&gone);
        }
        let mut own = entries
            .iter()
            .find(|entry| {
                !entry.manager.apply
                    && entry.manager.name == manager.name
                    && entry.manager.subresource == manager.subresource
            })
            .map(|entry| entry.fields.clone())
            .unwrap_or_default();
        own.plus(&changed);
        Ownership::set(&mut entries, manager, own);
    }
    Ownership::write(&entries, new);
}

/// Returns the current time in the form of `metav1.Time`: UTC, whole seconds.
pub(super) fn now() -> String {
    time_text(Timestamp::now())
}

/// Formats a time as `metav1.Time` does.
pub(super) fn time_text(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUSTOM: Layout = Layout { built_in: false };

    #[test]
    fn fields_are_written_as_a_real_server_writes_them() {
        let object = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": "s", "uid": "1", "labels": {"a": "b"},
                "ownerReferences": [{"uid": "u", "name": "n"}], "finalizers": ["x/y"]},
            "data": {"k": "djE="},
            "list": [1, 2],
        });
        let fields = Fields::of_object(&object, CUSTOM);
        let written = fields.to_value();
        assert_eq!(
            written,
            json!({
                "f:metadata": {
                    "f:labels": {"f:a": {}},
                    "f:ownerReferences": {"k:{\"uid\":\"u\"}": {".": {}, "f:name": {}, "f:uid": {}}},
                    "f:finalizers": {"v:\"x/y\"": {}},
                },
                "f:data": {"f:k": {}},
                "f:list": {},
            })
        );
        assert_eq!(Fields::from_value(&written), fields);
    }

    #[test]
    fn a_changed_field_changes_hands() {
        let manager = |name: &str| Manager {
            name: name.to_owned(),
            apply: false,
            api_version: "v1".to_owned(),
            subresource: String::new(),
        };
        let mut first = json!({"metadata": {}, "data": {"a": "1", "b": "1", "c": "1"}});
        track_update(None, &mut first, &manager("one"), CUSTOM);
        let mut second = json!({"metadata": {}, "data": {"a": "2", "b": "1"}});
        track_update(Some(&first), &mut second, &manager("two"), CUSTOM);
        let owners: Vec<_> = Ownership::read(&second)
            .into_iter()
            .map(|entry| (entry.manager.name, entry.fields.paths()))
            .collect();
        assert_eq!(
            owners,
            [
                ("one".to_owned(), vec![".data.b".to_owned()]),
                ("two".to_owned(), vec![".data.a".to_owned()])
            ]
        );
    }
}
