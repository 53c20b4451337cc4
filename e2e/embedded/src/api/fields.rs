//! Sets of fields, as in `metadata.managedFields` (`FieldsV1`), and their managers.
//!
//! In contrast to a real server, all lists but owner references and finalizers are owned as a whole.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::body::items;

/// The identity of a list's items.
#[derive(Debug, Clone, Copy, PartialEq)]
enum ListKind {
    /// There is none: the list is replaced as a whole.
    Atomic,
    /// Items are identified by their value.
    Set,
    /// Items are objects identified by this field.
    Map(&'static str),
}

/// Returns the kind of a list by the name of its field.
fn list_kind(field: &str) -> ListKind {
    match field {
        "ownerReferences" => ListKind::Map("uid"),
        "finalizers" => ListKind::Set,
        _ => ListKind::Atomic,
    }
}

/// A set of fields. A node that is itself in the set may have children that are in it too.
#[derive(Debug, Clone, Default, PartialEq)]
struct Fields {
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

    fn is_empty(&self) -> bool {
        !self.owned && self.children.is_empty()
    }

    /// Returns all fields of a whole object that can have an owner.
    fn of_object(object: &Value) -> Fields {
        ownable(Fields::changed(None, object, ""))
    }

    /// Returns the fields of `new` that `old` lacks or has with another value.
    fn changed_in_object(old: &Value, new: &Value) -> Fields {
        ownable(Fields::changed(Some(old), new, ""))
    }

    fn changed(old: Option<&Value>, new: &Value, field: &str) -> Fields {
        let mut set = Fields::default();
        if old == Some(new) {
            return set;
        }
        match new {
            Value::Object(entries) if !entries.is_empty() && old.is_none_or(Value::is_object) => {
                for (name, value) in entries {
                    let before = old.and_then(|old| old.get(name));
                    set.add(format!("f:{name}"), Fields::changed(before, value, name));
                }
            }
            Value::Array(items) if !items.is_empty() && list_kind(field) != ListKind::Atomic => {
                for item in items {
                    let Some(element) = element(item, list_kind(field)) else {
                        return Fields::leaf();
                    };
                    let before = old.and_then(|old| find(old, &element));
                    let mut inner = match item {
                        Value::Object(_) => Fields::changed(before, item, ""),
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

    fn minus(&self, other: &Fields) -> Fields {
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

    fn plus(&mut self, other: &Fields) {
        self.owned |= other.owned;
        for (element, child) in &other.children {
            self.children
                .entry(element.clone())
                .or_default()
                .plus(child);
        }
    }

    fn to_value(&self) -> Value {
        let mut map = Map::new();
        if self.owned && !self.children.is_empty() {
            map.insert(".".to_owned(), json!({}));
        }
        for (element, child) in &self.children {
            map.insert(element.clone(), child.to_value());
        }
        Value::Object(map)
    }

    fn from_value(value: &Value) -> Fields {
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
fn element(item: &Value, kind: ListKind) -> Option<String> {
    match kind {
        ListKind::Atomic => None,
        ListKind::Set => Some(format!("v:{item}")),
        ListKind::Map(key) => item
            .get(key)
            .map(|value| format!("k:{}", json!({ key: value }))),
    }
}

/// Returns the index of a list's item by its path element.
fn position(items: &[Value], element: &str) -> Option<usize> {
    let (kind, text) = element.split_once(':')?;
    let expected: Value = serde_json::from_str(text).ok()?;
    items.iter().position(|item| match kind {
        "v" => *item == expected,
        "k" => expected.as_object().is_some_and(|key| {
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

/// The operation of every write but server-side apply.
const UPDATE: &str = "Update";

/// A field manager.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Manager {
    pub(super) name: String,
    /// `apiVersion` of the request.
    pub(super) api_version: String,
    /// Empty for the object itself.
    pub(super) subresource: String,
}

/// One entry of `metadata.managedFields`.
struct Ownership {
    manager: Manager,
    /// `Update`, or `Apply`, which this server preserves and never writes itself.
    operation: String,
    fields: Fields,
    time: String,
}

impl Ownership {
    /// Reads an object's entries.
    fn read(object: &Value) -> Vec<Ownership> {
        items(&object["metadata"]["managedFields"])
            .map(|entry| {
                let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
                Ownership {
                    manager: Manager {
                        name: text("manager"),
                        api_version: text("apiVersion"),
                        subresource: text("subresource"),
                    },
                    operation: text("operation"),
                    fields: Fields::from_value(&entry["fieldsV1"]),
                    time: text("time"),
                }
            })
            .collect()
    }

    /// Writes the entries into the object; entries without fields vanish.
    fn write(entries: &[Ownership], object: &mut Value) {
        let list: Vec<Value> = entries
            .iter()
            .filter(|entry| !entry.fields.is_empty())
            .map(|entry| {
                let manager = &entry.manager;
                let mut value = json!({
                    "manager": manager.name,
                    "operation": entry.operation,
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
}

/// Records in `new` that `manager` changed `old` into it by a create, update or patch.
pub(super) fn track_update(old: Option<&Value>, new: &mut Value, manager: &Manager) {
    let mut entries = old.map(Ownership::read).unwrap_or_default();
    let (changed, gone) = match old {
        None => (Fields::of_object(new), Fields::default()),
        Some(old) => (
            Fields::changed_in_object(old, new),
            Fields::of_object(old).minus(&Fields::of_object(new)),
        ),
    };
    if !changed.is_empty() || !gone.is_empty() {
        for entry in &mut entries {
            entry.fields = entry.fields.minus(&changed).minus(&gone);
        }
        let own = entries.iter_mut().find(|entry| {
            entry.operation == UPDATE
                && entry.manager.name == manager.name
                && entry.manager.subresource == manager.subresource
        });
        match own {
            Some(own) => {
                own.fields.plus(&changed);
                own.manager.api_version.clone_from(&manager.api_version);
                own.time = now();
            }
            None => entries.push(Ownership {
                manager: manager.clone(),
                operation: UPDATE.to_owned(),
                fields: changed,
                time: now(),
            }),
        }
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

    #[test]
    fn fields_are_written_as_a_real_server_writes_them() {
        let object = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": "s", "uid": "1", "labels": {"a": "b"},
                "ownerReferences": [{"uid": "u", "name": "n"}], "finalizers": ["x/y"]},
            "data": {"k": "djE="},
            "list": [1, 2],
        });
        let fields = Fields::of_object(&object);
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
            api_version: "v1".to_owned(),
            subresource: String::new(),
        };
        let mut first = json!({"metadata": {}, "data": {"a": "1", "b": "1", "c": "1"}});
        track_update(None, &mut first, &manager("one"));
        let mut second = json!({"metadata": {}, "data": {"a": "2", "b": "1"}});
        track_update(Some(&first), &mut second, &manager("two"));
        let owners: Vec<_> = Ownership::read(&second)
            .into_iter()
            .map(|entry| (entry.manager.name, entry.fields.to_value()))
            .collect();
        assert_eq!(
            owners,
            [
                ("one".to_owned(), json!({"f:data": {"f:b": {}}})),
                ("two".to_owned(), json!({"f:data": {"f:a": {}}})),
            ]
        );
    }
}
