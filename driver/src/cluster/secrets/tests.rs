//! Tests decisions on Secrets as the API server would have them.

use super::*;
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

fn class(name: &str, uid: &str) -> ClassState {
    ClassState {
        name: name.into(),
        uid: uid.into(),
        generation: Some(1),
        resource_version: "1".into(),
        annotations: BTreeMap::new(),
    }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let pair = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(pair).collect()
}

fn owner(name: &str, uid: &str) -> Owner {
    Owner {
        api_version: "apps/v1".into(),
        kind: "ReplicaSet".into(),
        name: name.into(),
        uid: uid.into(),
    }
}

/// A desired Secret with everything that it borrows.
struct Fixture {
    class: ClassState,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    data: BTreeMap<String, Secret>,
    owners: Vec<Owner>,
    type_: &'static str,
    since: &'static str,
    order: Option<u64>,
}

impl Fixture {
    fn new() -> Self {
        Self {
            class: class("db", "class-1"),
            labels: map(&[("environment", "test")]),
            annotations: map(&[("note", "x")]),
            data: BTreeMap::from([("password".to_owned(), "hunter2".to_owned().into())]),
            owners: vec![owner("web", "rs-1")],
            type_: "Opaque",
            since: "2026-11-23T10:00:00Z",
            order: Some(3),
        }
    }

    fn desired(&self) -> DesiredSecret<'_> {
        DesiredSecret {
            namespace: "shop",
            name: "creds",
            type_: self.type_,
            labels: &self.labels,
            annotations: &self.annotations,
            data: Data::Values(&self.data),
            class: &self.class,
            since: self.since.parse().unwrap(),
            order: self.order,
            owners: &self.owners,
        }
    }

    /// Returns the Secret as the API server has it after it was created.
    fn stored(&self) -> Value {
        let mut object = serde_json::to_value(self.desired().object(None).unwrap()).unwrap();
        object["metadata"]["uid"] = json!("secret-1");
        object["metadata"]["resourceVersion"] = json!("5");
        let owners = object["metadata"]["ownerReferences"].as_array().unwrap();
        let uids: Vec<_> = owners.iter().map(|o| o["uid"].as_str().unwrap()).collect();
        object["metadata"]["managedFields"] = json!([owned_by(MANAGER, &uids)]);
        object
    }

    fn with(data: &str, since: &'static str, order: Option<u64>) -> Self {
        Self {
            data: BTreeMap::from([("password".to_owned(), data.to_owned().into())]),
            since,
            order,
            ..Self::new()
        }
    }

    fn decides(&self, stored: &Value) -> Value {
        self.decides_if(stored, NamedClass::MayBeLater)
    }

    /// Returns what it decides with a class that, by the API server's store, is the present one.
    fn decides_present(&self, stored: &Value) -> Value {
        assert_eq!(self.decides(stored), "state");
        self.decides_if(stored, NamedClass::IsPresent)
    }

    fn decides_if(&self, stored: &Value, named: NamedClass) -> Value {
        let decision = self.decides_by(stored, named, Data::Values(&self.data));
        let written = |decision: &Value| {
            decision.is_object() && decision.get("of").is_none()
                || decision == "replace"
                || decision == "state"
                || decision == "data"
        };
        if !self.data.is_empty() {
            // With the digest alone the decision is the same, but for what would be written.
            let digest = Data::Digest(Data::digest(&self.data));
            let by_digest = self.decides_by(stored, named, digest);
            assert_eq!(
                written(&by_digest),
                written(&decision),
                "{by_digest} {decision}"
            );
            assert!(
                written(&decision) || by_digest == decision,
                "{by_digest} {decision}"
            );
        }
        decision
    }

    fn decides_by(&self, stored: &Value, named: NamedClass, data: Data<'_>) -> Value {
        let existing: Existing = serde_json::from_value(stored.clone()).unwrap();
        let desired = DesiredSecret {
            data,
            ..self.desired()
        };
        match decide(&existing, &desired, named) {
            Decision::Unchanged => json!("unchanged"),
            Decision::Overtaken { .. } => json!("overtaken"),
            Decision::Unmanaged => json!("unmanaged"),
            Decision::Immutable => json!("immutable"),
            Decision::OtherClass(other) => json!({"of": other}),
            Decision::OtherState => json!("state"),
            Decision::WriteData => json!("data"),
            Decision::Replace => json!("replace"),
            Decision::Write(change) => {
                let mut change = serde_json::to_value(change).unwrap();
                let metadata = change["metadata"].as_object_mut().unwrap();
                assert_eq!(metadata.remove("uid"), Some(json!("secret-1")));
                assert_eq!(metadata.remove("resourceVersion"), Some(json!("5")));
                change
            }
        }
    }
}

/// Returns an entry of `managedFields` that gives these owners to a manager.
fn owned_by(manager: &str, uids: &[&str]) -> Value {
    let owners = uids
        .iter()
        .map(|uid| (format!("k:{{\"uid\":\"{uid}\"}}"), json!({})));
    let owners: serde_json::Map<_, _> = owners.collect();
    json!({
        "manager": manager, "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
        "fieldsV1": {"f:metadata": {"f:ownerReferences": owners}},
    })
}

/// Returns a value as messages quote it, in one of eight ways.
pub(super) fn quoted(value: &[u8], how: usize) -> String {
    let text = String::from_utf8_lossy(value).into_owned();
    match how {
        0 => text,
        1 => format!("{text:?}"),
        2 => STANDARD.encode(value),
        3 => URL_SAFE_NO_PAD.encode(value),
        4 => value.iter().map(|byte| format!("{byte:02x}")).collect(),
        5 => json!({"password": text}).to_string(),
        6 => STANDARD.encode(&value[1..]).chars().take(40).collect(),
        _ => text.lines().map(|line| format!("\n\t{line}\\n")).collect(),
    }
}

const HUNTER2: &str = "aHVudGVyMg==";

#[test]
fn a_new_secret_names_its_class_and_has_its_owners() {
    let object = Fixture::new().stored();
    assert_eq!(object["data"], json!({"password": HUNTER2}));
    let metadata = &object["metadata"];
    assert_eq!(
        metadata["labels"],
        json!({"environment": "test", MANAGED: "true"})
    );
    assert_eq!(
        metadata["annotations"],
        json!({
            "note": "x", CLASS: "db", CLASS_UID: "class-1", SINCE: "2026-11-23T10:00:00Z",
            GENERATION: "1", ORDER: "3", LABELS: "environment", ANNOTATIONS: "note",
        })
    );
    assert_eq!(
        metadata["ownerReferences"],
        json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1"}])
    );
}

#[test]
fn what_is_as_it_should_be_is_not_written() {
    let fixture = Fixture::new();
    let mut stored = fixture.stored();
    assert_eq!(fixture.decides(&stored), "unchanged");
    // Metadata of others stays.
    stored["metadata"]["labels"]["foreign"] = json!("1");
    stored["metadata"]["annotations"]["foreign"] = json!("1");
    stored["metadata"]["finalizers"] = json!(["x/y"]);
    let owners = stored["metadata"]["ownerReferences"]
        .as_array_mut()
        .unwrap();
    owners.push(json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "cm-1", "blockOwnerDeletion": true}));
    assert_eq!(fixture.decides(&stored), "unchanged");
    // Equal content is not written because it was fetched again.
    let later = Fixture::with("hunter2", "2026-11-23T11:00:00Z", Some(4));
    assert_eq!(later.decides(&stored), "unchanged");
}

#[rstest]
#[case::a_value(json!({"data": {"password": "eA=="}}), json!({"data": {"password": HUNTER2}}))]
#[case::a_key_too_many(json!({"data": {"more": "eA=="}}), json!({"data": {"more": null}}))]
#[case::a_key_gone(json!({"data": {"password": null}}), json!({"data": {"password": HUNTER2}}))]
#[case::a_label(json!({"metadata": {"labels": {"environment": "prod", "x": "y"}}}), json!({"metadata": {"labels": {"environment": "test"}}}))]
#[case::our_label(json!({"metadata": {"labels": {MANAGED: null}}}), json!({"metadata": {"labels": {MANAGED: "true"}}}))]
#[case::an_annotation(json!({"metadata": {"annotations": {"note": null}}}), json!({"metadata": {"annotations": {"note": "x"}}}))]
fn what_was_altered_is_put_right(#[case] altered: Value, #[case] written: Value) {
    let fixture = Fixture::new();
    let mut stored = fixture.stored();
    merge(&mut stored, &altered);
    let mut expected = written;
    if expected.get("metadata").is_none() {
        expected["metadata"] = json!({});
    }
    assert_eq!(fixture.decides(&stored), expected);
}

#[test]
fn what_the_class_no_longer_asks_for_goes_and_nothing_else() {
    let mut stored = Fixture::new().stored();
    stored["metadata"]["labels"]["foreign"] = json!("1");
    let fixture = Fixture {
        labels: map(&[("team", "shop")]),
        annotations: map(&[]),
        ..Fixture::new()
    };
    assert_eq!(
        fixture.decides(&stored),
        json!({"metadata": {
            "labels": {"environment": null, "team": "shop"},
            "annotations": {"note": null, LABELS: "team", ANNOTATIONS: null},
        }})
    );
}

/// The Secret's content has order 3 and its resource version is 5.
#[rstest]
#[case::newer(Some(4), "2026-11-23T09:00:00Z", true)]
#[case::the_same_volumes(Some(3), "2026-11-23T10:00:00Z", true)]
#[case::older_by_a_clock_that_is_ahead(Some(2), "2026-11-23T11:00:00Z", false)]
#[case::unknown_and_newer_by_the_clocks(None, "2026-11-23T10:00:01Z", false)]
#[case::unknown_and_older_by_the_clocks(None, "2026-11-23T09:59:59Z", false)]
fn newer_content_replaces_older_and_never_the_other_way(
    #[case] order: Option<u64>,
    #[case] since: &'static str,
    #[case] written: bool,
) {
    let stored = Fixture::new().stored();
    let fixture = Fixture::with("rotated", since, order);
    let decided = fixture.decides(&stored);
    if !written {
        assert_eq!(decided, "overtaken");
        return;
    }
    assert_eq!(decided["data"], json!({"password": "cm90YXRlZA=="}));
    let annotations = |secret: &Value| secret["metadata"]["annotations"].clone();
    for (key, value) in [
        (ORDER, json!(order.map(|order| order.to_string()))),
        (SINCE, json!(since)),
    ] {
        let differs = annotations(&stored)[key] != value;
        let expected = differs.then_some(&value);
        assert_eq!(annotations(&decided).get(key), expected, "{key}");
    }
}

/// An order that is not below the resource version of its Secret comes from another cluster.
#[rstest]
#[case::of_another_cluster("5", "2026-11-23T09:00:00Z", true)]
#[case::of_another_cluster_by_far("900000", "2026-11-23T09:00:00Z", true)]
#[case::of_another_cluster_and_newer_by_the_clocks("900000", "2026-11-23T11:00:00Z", false)]
#[case::no_number("x", "2026-11-23T09:00:00Z", true)]
#[case::no_number_and_newer_by_the_clocks("-1", "2026-11-23T11:00:00Z", false)]
#[case::a_clock_that_is_far_ahead("x", "2126-01-01T00:00:00Z", true)]
#[case::no_time_and_no_number("x", "soon", true)]
fn an_order_that_cannot_be_true(#[case] order: &str, #[case] since: &str, #[case] written: bool) {
    let mut stored = Fixture::new().stored();
    stored["metadata"]["annotations"][ORDER] = json!(order);
    stored["metadata"]["annotations"][SINCE] = json!(since);
    let fixture = Fixture::with("rotated", "2026-11-23T10:00:00Z", Some(4));
    let decided = fixture.decides(&stored);
    assert_eq!(decided.get("data").is_some(), written, "{decided}");
    // Where the driver has not written the order, the time may be that of other content, too.
    let annotations = json!({"f:metadata": {"f:annotations": {format!("f:{ORDER}"): {}}}});
    for (manager, written) in [(MANAGER, written), ("kubectl-edit", true)] {
        let mut stored = stored.clone();
        let managed = json!({"manager": manager, "operation": "Update", "fieldsV1": annotations});
        let all = stored["metadata"]["managedFields"].as_array_mut().unwrap();
        all.push(managed);
        let decided = fixture.decides(&stored);
        assert_eq!(
            decided.get("data").is_some(),
            written,
            "{manager}: {decided}"
        );
        assert_eq!(Fixture::new().decides(&stored), "unchanged");
    }
    // Equal content is not written because of it, whichever node checks.
    assert_eq!(Fixture::new().decides(&stored), "unchanged");
}

#[test]
fn a_secret_of_an_earlier_driver_gets_an_order_once() {
    let mut stored = Fixture::new().stored();
    stored["metadata"]["annotations"]
        .as_object_mut()
        .unwrap()
        .remove(ORDER);
    let older = Fixture::with("old", "2026-11-23T09:00:00Z", Some(4));
    assert_eq!(older.decides(&stored), "unchanged");
    let newer = Fixture::with("new", "2026-11-23T11:00:00Z", Some(4));
    assert_eq!(
        newer.decides(&stored)["metadata"]["annotations"][ORDER],
        "4"
    );
    assert_eq!(
        Fixture::new().decides(&stored),
        json!({"metadata": {"annotations": {ORDER: "3"}}})
    );
}

#[test]
fn nothing_never_takes_the_place_of_something() {
    let stored = Fixture::new().stored();
    for type_ in ["Opaque", "kubernetes.io/basic-auth"] {
        let fixture = Fixture {
            data: BTreeMap::new(),
            type_,
            order: Some(4),
            ..Fixture::new()
        };
        assert_eq!(fixture.decides(&stored), "unchanged");
    }
}

proptest! {
    /// Contents are fetched on several nodes, one after the other, and each node checks the Secret at
    /// any time, with a clock of its own. Whatever the clocks say, the Secret never goes back, and it
    /// has the newest content as soon as the node of that content has checked it.
    #[test]
    fn the_secret_follows_the_newest_content_whatever_the_clocks_say(
        skews in prop::collection::vec(-300_i64..300, 2..5),
        steps in prop::collection::vec((0..5_usize, any::<bool>(), 1..4_u64), 1..40),
    ) {
        let start: Timestamp = "2026-11-23T10:00:00Z".parse().unwrap();
        let mut revision = 10_u64;
        let mut fetched = 0_u64;
        // The content of each node's volume, its order, and the time since when by the node's clock.
        let mut volumes: Vec<Option<(u64, u64, Timestamp)>> = vec![None; skews.len()];
        let mut stored: Option<Value> = None;
        let mut shown = 0_u64;
        for (at, (node, fetches, others)) in steps.into_iter().enumerate() {
            let node = node % skews.len();
            // Others write to the API server, too.
            revision += others;
            if fetches {
                (fetched, revision) = (fetched + 1, revision + 1);
                let by_its_clock = start + jiff::SignedDuration::from_secs(at as i64 + skews[node]);
                volumes[node] = Some((fetched, revision, by_its_clock));
                continue;
            }
            let Some((content, order, since)) = volumes[node] else { continue };
            let fixture = Fixture {
                data: BTreeMap::from([("n".to_owned(), content.to_string().into())]),
                order: Some(order),
                ..Fixture::new()
            };
            let desired = DesiredSecret { since, ..fixture.desired() };
            revision += 1;
            let version = json!(revision.to_string());
            match &mut stored {
                None => {
                    let mut made = serde_json::to_value(desired.object(None).unwrap()).unwrap();
                    made["metadata"]["resourceVersion"] = version;
                    stored = Some(made);
                    shown = content;
                }
                Some(secret) => {
                    let existing: Existing = serde_json::from_value(secret.clone()).unwrap();
                    if let Decision::Write(change) = decide(&existing, &desired, NamedClass::MayBeLater) {
                        let mut change = serde_json::to_value(change).unwrap();
                        change["metadata"]["resourceVersion"] = version;
                        merge(secret, &change);
                    }
                    let text = secret["data"]["n"].as_str().unwrap();
                    let text = String::from_utf8(STANDARD.decode(text).unwrap()).unwrap();
                    let now: u64 = text.parse().unwrap();
                    prop_assert!(now >= shown, "from {shown} back to {now}");
                    prop_assert!(now >= content, "{now}, although a node has seen {content}");
                    shown = now;
                }
            }
        }
    }

    /// A class is edited and made anew while nodes get new contents, and each node knows the edit at any time: once
    /// it reads the class, or once a Secret lets it ask. Key, type and label of the Secret follow the class
    /// and never go back to an earlier state of it.
    #[test]
    fn the_secret_never_goes_back_to_an_earlier_state_of_its_class(
        steps in prop::collection::vec((0..3_usize, 0..8_u8), 1..60),
        parts in 1..8_u8,
        claims in prop::option::weighted(0.2, 0..60_usize),
    ) {
        // What an edit changes.
        let [keys, types, labels] = [1, 2, 4].map(|part| parts & part != 0);
        let mut revision = 10_u64;
        // The class's state: its number, its UID and its generation. States are numbered in their order.
        let mut states = vec![(1_u64, 1_i64)];
        let mut known = [0_usize; 3];
        let mut orders: [Option<u64>; 3] = [None; 3];
        let mut stored: Option<Value> = None;
        let mut shown = [0; 3];
        for (at, (node, step)) in steps.into_iter().enumerate() {
            revision += 2;
            let (uid, generation) = states[states.len() - 1];
            match step {
                0 => states.push((uid, generation + 1)),
                1 => states.push((uid + 1, 1)),
                2 => known[node] = states.len() - 1,
                3 => orders[node] = Some(revision - 1),
                _ => {
                    let state = known[node];
                    let is_present = state == states.len() - 1;
                    let (uid, generation) = states[state];
                    let of = |follows: bool| if follows { state } else { 0 };
                    let fixture = Fixture {
                        class: ClassState { generation: Some(generation), ..class("db", &format!("class-{uid}")) },
                        data: BTreeMap::from([(format!("key-{}", of(keys)), "x".to_owned().into())]),
                        labels: map(&[("state", &of(labels).to_string())]),
                        order: orders[node],
                        ..Fixture::new()
                    };
                    let type_ = format!("example.com/{}", of(types));
                    let desired = DesiredSecret { type_: &type_, ..fixture.desired() };
                    let version = json!(revision.to_string());
                    let create = || {
                        let mut made = serde_json::to_value(desired.object(None).unwrap()).unwrap();
                        made["metadata"]["resourceVersion"] = version.clone();
                        made
                    };
                    let Some(secret) = &mut stored else {
                        stored = Some(create());
                        // A node that knows an earlier state may be the one that makes it.
                        shown = [of(keys), of(types), of(labels)];
                        continue;
                    };
                    if claims == Some(at) {
                        secret["metadata"]["annotations"][GENERATION] = json!("1000");
                    }
                    let existing: Existing = serde_json::from_value(secret.clone()).unwrap();
                    let mut decision = decide(&existing, &desired, NamedClass::MayBeLater);
                    if matches!(decision, Decision::OtherState) && is_present {
                        decision = decide(&existing, &desired, NamedClass::IsPresent);
                        prop_assert!(!matches!(decision, Decision::OtherState));
                    }
                    match decision {
                        Decision::Write(change) => {
                            let mut change = serde_json::to_value(change).unwrap();
                            change["metadata"]["resourceVersion"] = version;
                            merge(secret, &change);
                        }
                        Decision::Replace => *secret = create(),
                        _ => {}
                    }
                    let key = secret["data"].as_object().unwrap().keys().next().unwrap();
                    let label = secret["metadata"]["labels"]["state"].as_str().unwrap();
                    let type_ = secret["type"].as_str().unwrap();
                    let now = [key.strip_prefix("key-").unwrap(), type_.strip_prefix("example.com/").unwrap(), label]
                        .map(|number| number.parse::<usize>().unwrap());
                    prop_assert!((0..3).all(|part| now[part] >= shown[part]), "{now:?} after {shown:?}");
                    if is_present && orders[node].is_some() && orders[node] >= *orders.iter().max().unwrap() {
                        prop_assert_eq!(now, [of(keys), of(types), of(labels)]);
                    }
                    shown = now;
                }
            }
        }
    }

    /// The driver removes only owners that it has added, and only from Secrets of its own.
    #[test]
    fn no_owner_of_anybody_else_is_taken_away(
        owners in prop::collection::vec((0..3_usize, 0..6_usize), 0..6),
        labelled in any::<bool>(),
        signed in any::<bool>(),
        going in 0..6_usize,
    ) {
        let managers = [MANAGER, "kubectl", "controller"];
        let uids: Vec<_> = (0..6).map(|n| format!("uid-{n}")).collect();
        let mut managed = Vec::new();
        let (mut references, mut ours) = (Vec::new(), Vec::new());
        for (manager, owner) in owners {
            let uid = uids[owner].as_str();
            if references.iter().any(|r: &Value| r["uid"] == uid) {
                continue;
            }
            references.push(json!({"apiVersion": "batch/v1", "kind": "Job", "name": "job", "uid": uid}));
            managed.push(owned_by(managers[manager], &[uid]));
            if managers[manager] == MANAGER {
                ours.push(uid);
            }
        }
        let mut secret = json!({
            "metadata": {
                "uid": "secret-1", "resourceVersion": "5", "labels": {}, "annotations": {},
                "ownerReferences": references, "managedFields": managed,
            },
            "type": "Opaque", "data": {"theirs": "eA=="},
        });
        if labelled {
            secret["metadata"]["labels"] = json!({MANAGED: "true"});
        }
        if signed {
            secret["metadata"]["annotations"] = json!({CLASS: "db", CLASS_UID: "class-1"});
        }
        let existing: Existing = serde_json::from_value(secret).unwrap();
        let going = uids[going].as_str();
        let change = without_owner(&existing, going);
        let may = (labelled || signed) && ours.contains(&going) && references.len() > 1;
        prop_assert_eq!(change.is_some(), may);
        if let Some(change) = change {
            let change = serde_json::to_value(change).unwrap();
            let rest = change["metadata"]["ownerReferences"].as_array().unwrap();
            let expected: Vec<_> = references.iter().filter(|r| r["uid"] != going).collect();
            prop_assert_eq!(rest.iter().collect::<Vec<_>>(), expected);
        }
        // Another object of the same name takes nobody's place: the one that is gone is collected.
        let fixture = Fixture {
            owners: vec![Owner { kind: "Job".into(), api_version: "batch/v1".into(), ..owner("job", "new") }],
            ..Fixture::new()
        };
        let kept = owners::owners(&existing, &fixture.owners).unwrap();
        let uids = references.iter().map(|reference| reference["uid"].as_str().unwrap());
        prop_assert!(kept.iter().map(|owner| owner.uid.as_str()).eq(uids.chain(["new"])));
    }
}

/// Lays a merge patch over an object.
fn merge(into: &mut Value, patch: &Value) {
    match patch.as_object() {
        Some(patch) => patch.iter().for_each(|(key, value)| match value {
            Value::Null => drop(into.as_object_mut().unwrap().remove(key)),
            value => merge(&mut into[key], value),
        }),
        None => *into = patch.clone(),
    }
}

/// A class that was deleted and created again under its name makes the Secret under its new UID.
#[rstest]
#[case::equal_content("hunter2", Some(9))]
#[case::older_content("old", Some(1))]
fn a_class_that_was_created_again_goes_on(#[case] content: &str, #[case] order: Option<u64>) {
    let stored = Fixture::new().stored();
    let again = Fixture {
        class: class("db", "class-3"),
        ..Fixture::with(content, "2026-11-23T10:00:00Z", order)
    };
    assert_eq!(
        again.decides_present(&stored),
        json!({"metadata": {"annotations": {CLASS_UID: "class-3"}}})
    );
}

#[test]
fn an_older_volume_still_adds_its_owner() {
    let stored = Fixture::new().stored();
    let fixture = Fixture {
        data: BTreeMap::from([("password".to_owned(), "old".to_owned().into())]),
        order: Some(2),
        owners: vec![owner("other", "rs-2")],
        ..Fixture::new()
    };
    let written = fixture.decides(&stored);
    assert_eq!(written.get("data"), None);
    let owners = written["metadata"]["ownerReferences"].as_array().unwrap();
    let uids: Vec<_> = owners.iter().map(|owner| owner["uid"].clone()).collect();
    assert_eq!(uids, ["rs-1", "rs-2"]);
}

#[test]
fn owners_are_told_by_uid_and_another_of_a_name_takes_no_place() {
    let mut stored = Fixture::new().stored();
    let owners = stored["metadata"]["ownerReferences"]
        .as_array_mut()
        .unwrap();
    owners.push(json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "web", "uid": "cm-1", "controller": true}));
    let fixture = Fixture {
        owners: vec![owner("web", "rs-new")],
        ..Fixture::new()
    };
    let written = &fixture.decides(&stored)["metadata"]["ownerReferences"];
    assert_eq!(
        *written,
        json!([
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1"},
            {"apiVersion": "v1", "kind": "ConfigMap", "name": "web", "uid": "cm-1", "controller": true},
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-new"},
        ])
    );
}

#[test]
fn the_last_owner_is_not_taken_away() {
    let fixture = Fixture {
        owners: vec![owner("web", "rs-1"), owner("job", "job-1")],
        ..Fixture::new()
    };
    let existing: Existing = serde_json::from_value(fixture.stored()).unwrap();
    let change = without_owner(&existing, "job-1").unwrap();
    let change = serde_json::to_value(change).unwrap();
    let owners = change["metadata"]["ownerReferences"].as_array().unwrap();
    assert_eq!((owners.len(), &owners[0]["uid"]), (1, &json!("rs-1")));
    assert!(without_owner(&existing, "unknown").is_none());
    let alone: Existing = serde_json::from_value(Fixture::new().stored()).unwrap();
    assert!(without_owner(&alone, "rs-1").is_none());
}

#[test]
fn a_secret_of_somebody_else_is_left_alone_until_it_may_be_adopted() {
    let fixture = Fixture::new();
    let mut stored = json!({
        "metadata": {"uid": "secret-1", "resourceVersion": "5", "labels": {"app": "x"}},
        "type": "Opaque", "data": {"theirs": "eA=="},
    });
    assert_eq!(fixture.decides(&stored), "unmanaged");
    stored["metadata"]["annotations"] = json!({ADOPT: "true"});
    let written = fixture.decides(&stored);
    assert_eq!(
        written["data"],
        json!({"theirs": null, "password": HUNTER2})
    );
    assert_eq!(written["metadata"]["labels"][MANAGED], "true");
    assert_eq!(written["metadata"]["annotations"][CLASS_UID], "class-1");
    stored["type"] = json!("kubernetes.io/basic-auth");
    assert_eq!(fixture.decides(&stored), "replace");
}

#[test]
fn the_content_of_an_immutable_secret_is_not_written() {
    let mut stored = Fixture::new().stored();
    stored["immutable"] = json!(true);
    assert_eq!(Fixture::new().decides(&stored), "unchanged");
    let newer = Fixture::with("rotated", "2026-11-23T11:00:00Z", Some(4));
    assert_eq!(newer.decides(&stored), "immutable");
    let older = Fixture::with("old", "2026-11-23T09:00:00Z", Some(2));
    assert_eq!(older.decides(&stored), "overtaken");
    let labelled = Fixture {
        labels: map(&[("environment", "prod")]),
        ..Fixture::new()
    };
    let written = labelled.decides(&stored);
    assert_eq!(
        written,
        json!({"metadata": {"labels": {"environment": "prod"}}})
    );
    // Another type takes a new Secret anyway.
    let typed = Fixture {
        type_: "kubernetes.io/basic-auth",
        ..newer
    };
    assert_eq!(typed.decides(&stored), "replace");
    stored["immutable"] = json!(false);
    let newer = Fixture::with("rotated", "2026-11-23T11:00:00Z", Some(4));
    assert_eq!(newer.decides(&stored)["data"]["password"], "cm90YXRlZA==");
}

/// The Secrets of the existing driver have its label and none of the annotations.
#[test]
fn a_secret_of_the_existing_driver_is_signed_and_its_content_left() {
    let fixture = Fixture::new();
    let stored = json!({
        "metadata": {
            "uid": "secret-1", "resourceVersion": "5",
            "labels": {"environment": "test", MANAGED: "true"}, "annotations": {"note": "x"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1"}],
        },
        "type": "Opaque", "data": {"password": HUNTER2},
    });
    let written = fixture.decides(&stored);
    assert_eq!(written.get("data"), None);
    let metadata = written["metadata"].as_object().unwrap();
    assert_eq!(metadata.keys().collect::<Vec<_>>(), ["annotations"]);
}

#[test]
fn two_classes_share_equal_content_and_do_not_fight_over_other() {
    let stored = Fixture::new().stored();
    let other = || Fixture {
        class: class("other", "class-2"),
        labels: map(&[]),
        order: Some(4),
        ..Fixture::new()
    };
    assert_eq!(other().decides(&stored), "unchanged");
    let different = Fixture {
        data: BTreeMap::from([("password".to_owned(), "else".to_owned().into())]),
        ..other()
    };
    assert_eq!(different.decides(&stored), json!({"of": "db"}));
    // The first class no longer makes it.
    let written = different.decides_if(&stored, NamedClass::HasReleasedIt);
    assert_eq!(written["metadata"]["annotations"][CLASS], "other");
    assert_eq!(written["data"]["password"], "ZWxzZQ==");
    // A class that was deleted and created again goes on.
    let again = Fixture {
        class: class("db", "class-3"),
        ..different
    };
    assert_eq!(
        again.decides_present(&stored)["data"]["password"],
        "ZWxzZQ=="
    );
}

#[test]
fn a_type_that_changed_needs_a_new_secret_which_keeps_what_is_not_ours() {
    let mut stored = Fixture::new().stored();
    stored["metadata"]["labels"]["foreign"] = json!("1");
    let fixture = Fixture {
        type_: "kubernetes.io/basic-auth",
        labels: map(&[]),
        owners: vec![owner("other", "rs-2")],
        ..Fixture::new()
    };
    assert_eq!(fixture.decides(&stored), "replace");
    let existing: Existing = serde_json::from_value(stored).unwrap();
    let object = serde_json::to_value(fixture.desired().object(Some(&existing)).unwrap()).unwrap();
    assert_eq!(
        object["metadata"]["labels"],
        json!({"foreign": "1", MANAGED: "true"})
    );
    let owners = object["metadata"]["ownerReferences"].as_array().unwrap();
    assert_eq!(owners.len(), 2);
    assert_eq!(object["metadata"].get("resourceVersion"), None);
    // It is put back when the new one is refused.
    let former = serde_json::to_value(existing.to_put_back(("shop", "creds"), "x/y")).unwrap();
    assert_eq!(former["type"], "Opaque");
    assert_eq!(former["data"], json!({"password": HUNTER2}));
    for part in ["labels", "ownerReferences"] {
        let expected = serde_json::to_value(&existing.metadata).unwrap()[part].clone();
        assert_eq!(former["metadata"][part], expected);
    }
    let annotations = &former["metadata"]["annotations"];
    assert_eq!(
        (&annotations["note"], &annotations[REFUSED_TYPE]),
        (&json!("x"), &json!("x/y"))
    );
    for server in ["uid", "resourceVersion", "managedFields"] {
        assert_eq!(former["metadata"].get(server), None);
    }
    // The annotation goes when the type is accepted at last.
    let mut again = fixture.stored();
    again["metadata"]["annotations"][REFUSED_TYPE] = json!("x/y");
    assert_eq!(
        fixture.decides(&again),
        json!({"metadata": {"annotations": {REFUSED_TYPE: null}}})
    );
}

#[rstest]
#[case::without_a_controller(None, Some(true))]
#[case::beside_another_controller(Some(true), None)]
fn a_secret_in_the_place_of_another_gets_the_owners_of_others_only(
    #[case] controller: Option<bool>,
    #[case] expected: Option<bool>,
) {
    let mut former = Fixture {
        owners: vec![owner("web", "rs-1"), owner("old", "rs-0")],
        ..Fixture::new()
    }
    .stored();
    let theirs = json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "cm-1", "controller": true});
    let owners = former["metadata"]["ownerReferences"].as_array_mut();
    owners.unwrap().push(theirs);
    let former: Existing = serde_json::from_value(former).unwrap();
    let mut existing = Fixture::new().stored();
    existing["metadata"]["ownerReferences"][0]["controller"] = json!(controller);
    let existing: Existing = serde_json::from_value(existing).unwrap();
    let change = existing.with_foreign_of(&former).unwrap();
    let owners = change.metadata.owner_references.unwrap();
    let owners = owners.iter().map(|o| (o.uid.as_str(), o.controller));
    assert_eq!(
        owners.collect::<Vec<_>>(),
        [("rs-1", controller), ("cm-1", expected)]
    );
}
