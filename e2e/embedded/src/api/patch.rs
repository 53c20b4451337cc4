//! The four ways to patch an object: merge patch, strategic merge patch, JSON patch, server-side apply.
//!
//! Strategic merge knows list keys by field name (see [`Layout`]); lists without a key are replaced,
//! and of its directives only `$patch: delete` (in keyed lists) is understood.

use serde_json::{Map, Value};

use super::{
    fields::{Fields, Layout, ListKind, Manager, Ownership, element, position},
    status::Status,
};

/// RFC 7386.
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

/// The object's fields, or none when it is not an object.
fn take_object(value: &mut Value) -> Map<String, Value> {
    match value.take() {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// A merge patch that merges keyed lists by their key.
pub(super) fn strategic_merge(target: &mut Value, patch: &Value, layout: Layout) {
    strategic(target, patch, "", layout);
}

fn strategic(target: &mut Value, patch: &Value, field: &str, layout: Layout) {
    match patch {
        Value::Object(patch) => {
            let mut merged = take_object(target);
            for (name, value) in patch {
                if value.is_null() {
                    merged.remove(name);
                } else {
                    strategic(
                        merged.entry(name).or_insert(Value::Null),
                        value,
                        name,
                        layout,
                    );
                }
            }
            *target = Value::Object(merged);
        }
        Value::Array(items) if layout.list(field) != ListKind::Atomic => {
            let mut merged = match target.take() {
                Value::Array(existing) => existing,
                _ => Vec::new(),
            };
            for item in items {
                let place = element(item, layout.list(field))
                    .and_then(|element| position(&merged, &element));
                match place {
                    Some(index) if item["$patch"] == "delete" => {
                        merged.remove(index);
                    }
                    Some(index) => strategic(&mut merged[index], item, "", layout),
                    None if item["$patch"] == "delete" => {}
                    None => merged.push(item.clone()),
                }
            }
            *target = Value::Array(merged);
        }
        _ => *target = patch.clone(),
    }
}

/// RFC 6902.
///
/// # Errors
/// 400 for a patch that is not one, 422 for one that does not fit the object.
pub(super) fn json_patch(target: &mut Value, patch: &Value) -> Result<(), Status> {
    let operations = patch.as_array().ok_or_else(|| {
        Status::bad_request("error decoding patch: a JSON patch is a list of operations")
    })?;
    for operation in operations {
        apply_operation(target, operation).ok_or_else(|| {
            Status::unprocessable("the server rejected our request due to an error in our request")
        })?;
    }
    Ok(())
}

fn apply_operation(target: &mut Value, operation: &Value) -> Option<()> {
    let path = operation["path"].as_str()?;
    let value = || operation.get("value").cloned();
    match operation["op"].as_str()? {
        "add" => add_at(target, path, value()?),
        "remove" => remove_at(target, path).map(drop),
        "replace" => {
            *target.pointer_mut(path)? = value()?;
            Some(())
        }
        "test" => (target.pointer(path)? == operation.get("value")?).then_some(()),
        "copy" => {
            let copied = target.pointer(operation["from"].as_str()?)?.clone();
            add_at(target, path, copied)
        }
        "move" => {
            let moved = remove_at(target, operation["from"].as_str()?)?;
            add_at(target, path, moved)
        }
        _ => None,
    }
}

/// The parent of a JSON pointer's target, and the last token unescaped.
fn parent_of<'a>(target: &'a mut Value, path: &str) -> Option<(&'a mut Value, String)> {
    let (parent, last) = path.rsplit_once('/')?;
    Some((
        target.pointer_mut(parent)?,
        last.replace("~1", "/").replace("~0", "~"),
    ))
}

fn add_at(target: &mut Value, path: &str, value: Value) -> Option<()> {
    match parent_of(target, path)? {
        (Value::Object(map), name) => {
            map.insert(name, value);
        }
        (Value::Array(items), index) if index == "-" => items.push(value),
        (Value::Array(items), index) => {
            let index: usize = index.parse().ok().filter(|&index| index <= items.len())?;
            items.insert(index, value);
        }
        _ => return None,
    }
    Some(())
}

fn remove_at(target: &mut Value, path: &str) -> Option<Value> {
    match parent_of(target, path)? {
        (Value::Object(map), name) => map.remove(&name),
        (Value::Array(items), index) => {
            let index: usize = index.parse().ok().filter(|&index| index < items.len())?;
            Some(items.remove(index))
        }
        _ => None,
    }
}

/// Server-side apply of `config` onto `live` (or onto nothing): the result, ownership included.
///
/// Fields of `config` win; fields `manager` applied before and no longer applies go, unless another
/// manager owns them too.
///
/// # Errors
/// 409 when a field with another value belongs to another manager and `force` is off.
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
    use rstest::rstest;
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
    fn a_strategic_merge_meets_items_by_key() {
        let mut pod = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}, {"type": "X"}]},
            "metadata": {"ownerReferences": [{"uid": "1"}, {"uid": "2"}], "labels": {"a": "1"}}});
        let patch = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]},
            "metadata": {"ownerReferences": [{"uid": "3"}, {"$patch": "delete", "uid": "1"}], "labels": {"a": null}}});
        strategic_merge(&mut pod, &patch, BUILT_IN);
        assert_eq!(
            pod,
            json!({"status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "X"}]},
                "metadata": {"ownerReferences": [{"uid": "2"}, {"uid": "3"}], "labels": {}}})
        );
    }

    #[rstest]
    #[case(json!([{"op": "add", "path": "/a/-", "value": 3}]), Some(json!({"a": [1, 2, 3]})))]
    #[case(json!([{"op": "test", "path": "/a/0", "value": 1}, {"op": "remove", "path": "/a/0"}]), Some(json!({"a": [2]})))]
    #[case(json!([{"op": "move", "from": "/a", "path": "/b~1c"}]), Some(json!({"b/c": [1, 2]})))]
    #[case(json!([{"op": "test", "path": "/a/0", "value": 2}]), None)]
    #[case(json!([{"op": "replace", "path": "/x", "value": 2}]), None)]
    fn json_patches(#[case] patch: Value, #[case] expected: Option<Value>) {
        let mut target = json!({"a": [1, 2]});
        let result = json_patch(&mut target, &patch);
        match expected {
            Some(expected) => assert_eq!((result, target), (Ok(()), expected)),
            None => assert_eq!(result.unwrap_err().code, 422),
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

        // `b` has two owners and stays; `a` had one and goes, as does its owner reference.
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
