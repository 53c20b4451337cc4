//! The decision, on Secrets as the API server would have them.

use super::{
    decision::{ANNOTATIONS, LABELS},
    *,
};
use rstest::rstest;
use serde_json::{Value, json};

fn class(name: &str, uid: &str) -> Class {
    Class {
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

/// What a wanted Secret borrows.
struct Wish {
    class: Class,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    data: BTreeMap<String, Secret>,
    owners: Vec<Owner>,
    type_: &'static str,
    since: &'static str,
}

impl Wish {
    fn new() -> Self {
        Self {
            class: class("db", "class-1"),
            labels: map(&[("environment", "test")]),
            annotations: map(&[("note", "x")]),
            data: BTreeMap::from([("password".to_owned(), "hunter2".to_owned().into())]),
            owners: vec![owner("web", "rs-1")],
            type_: "Opaque",
            since: "2026-11-23T10:00:00Z",
        }
    }

    fn wanted(&self) -> Wanted<'_> {
        Wanted {
            namespace: "shop",
            name: "creds",
            type_: self.type_,
            labels: &self.labels,
            annotations: &self.annotations,
            data: &self.data,
            class: &self.class,
            since: self.since.parse().unwrap(),
            owners: &self.owners,
        }
    }

    /// The Secret as it was created for this wish.
    fn stored(&self) -> Value {
        let mut object = serde_json::to_value(self.wanted().object(None)).unwrap();
        object["metadata"]["uid"] = json!("secret-1");
        object["metadata"]["resourceVersion"] = json!("5");
        object
    }

    fn decides(&self, stored: &Value) -> Value {
        self.decides_if(stored, false)
    }

    fn decides_if(&self, stored: &Value, released: bool) -> Value {
        let existing: Existing = serde_json::from_value(stored.clone()).unwrap();
        match decide(&existing, &self.wanted(), released) {
            Decision::Nothing => json!("nothing"),
            Decision::Unmanaged => json!("unmanaged"),
            Decision::OtherClass(holder) => json!({"of": holder.name}),
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

const HUNTER2: &str = "aHVudGVyMg==";

#[test]
fn a_new_secret_says_whose_it_is_and_has_its_owners() {
    let object = Wish::new().stored();
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
            LABELS: "environment", ANNOTATIONS: "note",
        })
    );
    assert_eq!(
        metadata["ownerReferences"],
        json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1"}])
    );
}

#[test]
fn what_is_as_it_should_be_is_not_written() {
    let wish = Wish::new();
    let mut stored = wish.stored();
    assert_eq!(wish.decides(&stored), "nothing");
    // What others put there is theirs.
    stored["metadata"]["labels"]["foreign"] = json!("1");
    stored["metadata"]["annotations"]["foreign"] = json!("1");
    stored["metadata"]["finalizers"] = json!(["x/y"]);
    let owners = stored["metadata"]["ownerReferences"]
        .as_array_mut()
        .unwrap();
    owners.push(json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "cm-1", "blockOwnerDeletion": true}));
    assert_eq!(wish.decides(&stored), "nothing");
    // Nor is equal content because it was obtained again.
    let later = Wish {
        since: "2026-11-23T11:00:00Z",
        ..Wish::new()
    };
    assert_eq!(later.decides(&stored), "nothing");
}

#[rstest]
#[case::a_value(json!({"data": {"password": "eA=="}}), json!({"data": {"password": HUNTER2}}))]
#[case::a_key_too_many(json!({"data": {"more": "eA=="}}), json!({"data": {"more": null}}))]
#[case::a_key_gone(json!({"data": {"password": null}}), json!({"data": {"password": HUNTER2}}))]
#[case::a_label(json!({"metadata": {"labels": {"environment": "prod", "x": "y"}}}), json!({"metadata": {"labels": {"environment": "test"}}}))]
#[case::our_label(json!({"metadata": {"labels": {MANAGED: null}}}), json!({"metadata": {"labels": {MANAGED: "true"}}}))]
#[case::an_annotation(json!({"metadata": {"annotations": {"note": null}}}), json!({"metadata": {"annotations": {"note": "x"}}}))]
fn what_was_altered_is_put_right(#[case] altered: Value, #[case] written: Value) {
    fn merge(into: &mut Value, patch: &Value) {
        match patch.as_object() {
            Some(patch) => patch.iter().for_each(|(key, value)| match value {
                Value::Null => drop(into.as_object_mut().unwrap().remove(key)),
                value => merge(&mut into[key], value),
            }),
            None => *into = patch.clone(),
        }
    }
    let wish = Wish::new();
    let mut stored = wish.stored();
    merge(&mut stored, &altered);
    let mut expected = written;
    if expected.get("metadata").is_none() {
        expected["metadata"] = json!({});
    }
    assert_eq!(wish.decides(&stored), expected);
}

#[test]
fn what_the_class_no_longer_asks_for_goes_and_nothing_else() {
    let mut stored = Wish::new().stored();
    stored["metadata"]["labels"]["foreign"] = json!("1");
    let wish = Wish {
        labels: map(&[("team", "shop")]),
        annotations: map(&[]),
        ..Wish::new()
    };
    assert_eq!(
        wish.decides(&stored),
        json!({"metadata": {
            "labels": {"environment": null, "team": "shop"},
            "annotations": {"note": null, LABELS: "team", ANNOTATIONS: null},
        }})
    );
}

#[rstest]
#[case::newer("2026-11-23T10:00:01Z", true)]
#[case::the_same("2026-11-23T10:00:00Z", true)]
#[case::older("2026-11-23T09:59:59Z", false)]
fn newer_content_replaces_older_and_never_the_other_way(
    #[case] since: &'static str,
    #[case] written: bool,
) {
    let stored = Wish::new().stored();
    let wish = Wish {
        data: BTreeMap::from([("password".to_owned(), "rotated".to_owned().into())]),
        since,
        ..Wish::new()
    };
    let mut expected = json!({"metadata": {}, "data": {"password": "cm90YXRlZA=="}});
    if since == "2026-11-23T10:00:01Z" {
        expected["metadata"] = json!({"annotations": {SINCE: since}});
    }
    let decided = wish.decides(&stored);
    assert_eq!(decided, if written { expected } else { json!("nothing") });
    // A clock that is far ahead does not hold a Secret for ever.
    let mut stored = stored;
    stored["metadata"]["annotations"][SINCE] = json!("2126-01-01T00:00:00Z");
    assert_eq!(wish.decides(&stored)["data"]["password"], "cm90YXRlZA==");
}

#[test]
fn an_older_volume_still_gives_its_owner() {
    let stored = Wish::new().stored();
    let wish = Wish {
        data: BTreeMap::from([("password".to_owned(), "old".to_owned().into())]),
        since: "2026-11-23T09:00:00Z",
        owners: vec![owner("other", "rs-2")],
        ..Wish::new()
    };
    let written = wish.decides(&stored);
    assert_eq!(written.get("data"), None);
    let owners = written["metadata"]["ownerReferences"].as_array().unwrap();
    let uids: Vec<_> = owners.iter().map(|owner| owner["uid"].clone()).collect();
    assert_eq!(uids, ["rs-1", "rs-2"]);
}

#[test]
fn owners_are_told_by_uid_and_dead_ones_of_a_name_go() {
    let mut stored = Wish::new().stored();
    let owners = stored["metadata"]["ownerReferences"]
        .as_array_mut()
        .unwrap();
    owners.push(json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "web", "uid": "cm-1", "controller": true}));
    let wish = Wish {
        owners: vec![owner("web", "rs-new")],
        ..Wish::new()
    };
    let written = &wish.decides(&stored)["metadata"]["ownerReferences"];
    assert_eq!(
        *written,
        json!([
            {"apiVersion": "v1", "kind": "ConfigMap", "name": "web", "uid": "cm-1", "controller": true},
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-new"},
        ])
    );
}

#[test]
fn the_last_owner_is_not_taken_away() {
    let wish = Wish {
        owners: vec![owner("web", "rs-1"), owner("job", "job-1")],
        ..Wish::new()
    };
    let existing: Existing = serde_json::from_value(wish.stored()).unwrap();
    let change = without_owner(&existing, "job-1").unwrap();
    let change = serde_json::to_value(change).unwrap();
    let owners = change["metadata"]["ownerReferences"].as_array().unwrap();
    assert_eq!((owners.len(), &owners[0]["uid"]), (1, &json!("rs-1")));
    assert!(without_owner(&existing, "unknown").is_none());
    let alone: Existing = serde_json::from_value(Wish::new().stored()).unwrap();
    assert!(without_owner(&alone, "rs-1").is_none());
}

#[test]
fn a_secret_of_somebody_else_is_left_alone_until_it_may_be_had() {
    let wish = Wish::new();
    let mut stored = json!({
        "metadata": {"uid": "secret-1", "resourceVersion": "5", "labels": {"app": "x"}},
        "type": "Opaque", "data": {"theirs": "eA=="},
    });
    assert_eq!(wish.decides(&stored), "unmanaged");
    stored["metadata"]["annotations"] = json!({ADOPT: "true"});
    let written = wish.decides(&stored);
    assert_eq!(
        written["data"],
        json!({"theirs": null, "password": HUNTER2})
    );
    assert_eq!(written["metadata"]["labels"][MANAGED], "true");
    assert_eq!(written["metadata"]["annotations"][CLASS_UID], "class-1");
    stored["type"] = json!("kubernetes.io/basic-auth");
    assert_eq!(wish.decides(&stored), "replace");
}

/// The existing driver's Secrets have its label and no more.
#[test]
fn a_secret_of_the_existing_driver_is_signed_and_its_content_left() {
    let wish = Wish::new();
    let stored = json!({
        "metadata": {
            "uid": "secret-1", "resourceVersion": "5",
            "labels": {"environment": "test", MANAGED: "true"}, "annotations": {"note": "x"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1"}],
        },
        "type": "Opaque", "data": {"password": HUNTER2},
    });
    let written = wish.decides(&stored);
    assert_eq!(written.get("data"), None);
    let metadata = written["metadata"].as_object().unwrap();
    assert_eq!(metadata.keys().collect::<Vec<_>>(), ["annotations"]);
}

#[test]
fn two_classes_share_equal_content_and_do_not_fight_over_other() {
    let stored = Wish::new().stored();
    let other = || Wish {
        class: class("other", "class-2"),
        labels: map(&[]),
        since: "2026-11-23T12:00:00Z",
        ..Wish::new()
    };
    assert_eq!(other().decides(&stored), "nothing");
    let different = Wish {
        data: BTreeMap::from([("password".to_owned(), "else".to_owned().into())]),
        ..other()
    };
    assert_eq!(different.decides(&stored), json!({"of": "db"}));
    // The first no longer makes it.
    let written = different.decides_if(&stored, true);
    assert_eq!(written["metadata"]["annotations"][CLASS], "other");
    assert_eq!(written["data"]["password"], "ZWxzZQ==");
    // A class made anew under its name goes on.
    let again = Wish {
        class: class("db", "class-3"),
        ..different
    };
    assert_eq!(again.decides(&stored)["data"]["password"], "ZWxzZQ==");
}

#[test]
fn a_type_that_changed_needs_a_new_secret_which_keeps_what_is_not_ours() {
    let mut stored = Wish::new().stored();
    stored["metadata"]["labels"]["foreign"] = json!("1");
    let wish = Wish {
        type_: "kubernetes.io/basic-auth",
        labels: map(&[]),
        owners: vec![owner("other", "rs-2")],
        ..Wish::new()
    };
    assert_eq!(wish.decides(&stored), "replace");
    let existing: Existing = serde_json::from_value(stored).unwrap();
    let object = serde_json::to_value(wish.wanted().object(Some(&existing))).unwrap();
    assert_eq!(
        object["metadata"]["labels"],
        json!({"foreign": "1", MANAGED: "true"})
    );
    let owners = object["metadata"]["ownerReferences"].as_array().unwrap();
    assert_eq!(owners.len(), 2);
    assert_eq!(object["metadata"].get("resourceVersion"), None);
}

#[rstest]
#[case::raw("admission webhook says hunter2 is weak", true)]
#[case::encoded("data: aHVudGVyMg is weak", true)]
#[case::neither("secrets \"creds\" is forbidden", false)]
fn a_message_that_quotes_a_value_is_withheld(#[case] message: &str, #[case] withheld: bool) {
    let wish = Wish::new();
    let said = wish.wanted().scrubbed(message.to_owned());
    assert_eq!(said != message, withheld, "{said}");
}
