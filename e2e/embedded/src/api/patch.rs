//! The two ways to patch an object: merge patch and server-side apply.

use serde_json::{Map, Value};

use super::{
    fields::{Fields, Layout, ListKind, Manager, Ownership, element, position},
    status::Status,
};

/// Applies a JSON merge patch (RFC 7386).
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    let mut merged = take_object(target);
    for (name, value) in patch {
        if value.is_null() {
            merged.remove(name);
        } else {
            merge(merged.entry(name).or_insert(Value::Null), value);
        }
    }
    *target = Value::Object(merged);
}

/// Takes the fields of an object; none when it is not an object.
fn take_object(value: &mut Value) -> Map<String, Value> {
    match value.take() {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Applies `config` to `live`, or creates it, and returns the object with its managed fields.
///
/// Fields of `config` win. Fields that `manager` applied before and no longer applies are removed,
/// unless another manager owns them, too.
///
/// # Errors
/// Returns 409 when a field with another value belongs to another manager and `force` is off.
pub(super) fn apply(
    live: Option<&Value>,
    mut config: Value,
    manager: &Manager,
    force: bool,
    layout: Layout,
) -> Result<Value, Status> {
    drop_nulls(&mut config);
    let wanted = Fields::of_object(&config, layout);
    let Some(live) = live else {
        let mut created = config;
        let mut entries = Vec::new();
        Ownership::set(&mut entries, manager, wanted);
        Ownership::write(&entries, &mut created);
        return Ok(created);
    };

    let mut entries = Ownership::read(live);
    let is_own = |entry: &Ownership| {
        entry.manager.apply
            && entry.manager.name == manager.name
            && entry.manager.subresource == manager.subresource
    };
    let mut conflicts = Vec::new();
    for entry in entries.iter_mut().filter(|entry| !is_own(entry)) {
        let contested = wanted.contested(&entry.fields, live, &config);
        if !contested.is_empty() {
            let who = entry.described();
            conflicts.extend(
                contested
                    .paths()
                    .into_iter()
                    .map(|path| (who.clone(), path)),
            );
            entry.fields = entry.fields.minus(&contested);
        }
    }
    if !conflicts.is_empty() && !force {
        return Err(Status::apply_conflict(
            conflict_message(&conflicts),
            &conflicts,
        ));
    }

    let before = entries
        .iter()
        .find(|entry| is_own(entry))
        .map(|entry| entry.fields.clone())
        .unwrap_or_default();
    let mut given_up = before.minus(&wanted);
    for entry in entries.iter().filter(|entry| !is_own(entry)) {
        given_up = given_up.minus(&entry.fields);
    }
    let mut merged = live.clone();
    given_up.remove_from(&mut merged);
    merge_applied(&mut merged, &config, "", layout);
    Ownership::set(&mut entries, manager, wanted);
    Ownership::write(&entries, &mut merged);
    Ok(merged)
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn merge_applied(target: &mut Value, config: &Value, field: &str, layout: Layout) {
    match config {
        Value::Object(config) => {
            let mut merged = take_object(target);
            for (name, value) in config {
                merge_applied(
                    merged.entry(name).or_insert(Value::Null),
                    value,
                    name,
                    layout,
                );
            }
            *target = Value::Object(merged);
        }
        Value::Array(items) if layout.list(field) != ListKind::Atomic => {
            if !target.is_array() {
                *target = Value::Array(Vec::new());
            }
            let Value::Array(merged) = target else { return };
            for item in items {
                let place = element(item, layout.list(field))
                    .and_then(|element| position(merged, &element));
                match place {
                    Some(index) => merge_applied(&mut merged[index], item, "", layout),
                    None => merged.push(item.clone()),
                }
            }
        }
        _ => *target = config.clone(),
    }
}

fn conflict_message(conflicts: &[(String, String)]) -> String {
    if let [(who, path)] = conflicts {
        return format!("Apply failed with 1 conflict: conflict with {who}: {path}");
    }
    let mut lines: Vec<String> = Vec::new();
    let mut last = "";
    for (who, path) in conflicts {
        if who != last {
            lines.push(format!("conflicts with {who}:"));
            last = who;
        }
        lines.push(format!("- {path}"));
    }
    format!(
        "Apply failed with {} conflicts: {}",
        conflicts.len(),
        lines.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const BUILT_IN: Layout = Layout { built_in: true };

    fn manager(name: &str) -> Manager {
        Manager {
            name: name.to_owned(),
            apply: true,
            api_version: "v1".to_owned(),
            subresource: String::new(),
        }
    }

    #[test]
    fn managers_keep_what_is_theirs() {
        let owner = |uid: &str| json!([{"uid": uid, "name": "p"}]);
        let one =
            json!({"metadata": {"ownerReferences": owner("1")}, "data": {"a": "1", "b": "1"}});
        let live = apply(None, one, &manager("one"), false, BUILT_IN).unwrap();
        let two =
            json!({"metadata": {"ownerReferences": owner("2")}, "data": {"b": "1", "c": "1"}});
        let live = apply(Some(&live), two, &manager("two"), false, BUILT_IN).unwrap();

        // `b` has two managers and stays; `a` and the first owner reference had one and are removed.
        let less = json!({"metadata": {}, "data": {}});
        let live = apply(Some(&live), less, &manager("one"), false, BUILT_IN).unwrap();
        assert_eq!(live["data"], json!({"b": "1", "c": "1"}));
        assert_eq!(live["metadata"]["ownerReferences"], owner("2"));
    }

    #[test]
    fn a_contested_field_needs_force() {
        let live = apply(
            None,
            json!({"metadata": {}, "data": {"a": "1"}}),
            &manager("one"),
            false,
            BUILT_IN,
        )
        .unwrap();
        let other = json!({"metadata": {}, "data": {"a": "2"}});
        let refused =
            apply(Some(&live), other.clone(), &manager("two"), false, BUILT_IN).unwrap_err();
        assert_eq!(
            refused.message,
            "Apply failed with 1 conflict: conflict with \"one\": .data.a"
        );
        let forced = apply(Some(&live), other, &manager("two"), true, BUILT_IN).unwrap();
        assert_eq!(forced["data"]["a"], "2");
        let owners: Vec<String> = Ownership::read(&forced)
            .into_iter()
            .map(|entry| entry.manager.name)
            .collect();
        assert_eq!(owners, ["two"]);
    }

    #[test]
    fn applying_the_same_again_changes_nothing() {
        let config = json!({"metadata": {"labels": {"x": "y"}}, "data": {"a": "1"}});
        let live = apply(None, config.clone(), &manager("one"), false, BUILT_IN).unwrap();
        assert_eq!(
            apply(Some(&live), config, &manager("one"), false, BUILT_IN).unwrap(),
            live
        );
    }
}
