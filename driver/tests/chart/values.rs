//! Checks what the chart says to values that cannot work, such as those in a wrong place. It accepts what charts
//! without a schema accepted: switches in quotes, and what a parent chart adds.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::DaemonSet;
use rstest::rstest;
use serde_json::{Map, Value, json};

use crate::helm::{Chart, Helm};
use crate::objects::{keep, objects};
use crate::schema;

/// Returns the objects of the schema that have a fixed set of keys, with the keys of each.
fn known() -> BTreeMap<String, Vec<String>> {
    let mut known = BTreeMap::new();
    let mut open = vec![(String::new(), schema())];
    while let Some((object, schema)) = open.pop() {
        // Anything is accepted below `windows`, as there is no driver for Windows.
        if schema["description"].is_string() || object == "windows" {
            continue;
        }
        let properties = schema["properties"].as_object().unwrap();
        known.insert(object.clone(), properties.keys().cloned().collect());
        for (key, schema) in properties {
            open.push((below(&object, key), schema.clone()));
        }
    }
    known
}

fn below(object: &str, key: &str) -> String {
    let full = format!("{object}.{key}");
    full.trim_start_matches('.').to_owned()
}

/// Sets a value by the keys on the way to it.
fn set(values: &mut Value, object: &str, key: &str, value: Value) {
    let mut place = values;
    for part in object.split('.').filter(|part| !part.is_empty()) {
        place = &mut place[part];
        if place.is_null() {
            *place = json!({});
        }
    }
    place[key] = value;
}

#[test]
fn the_templates_know_the_values_of_the_schema() {
    let mut template = String::from(
        "{{/* The values in values.schema.json by the objects that they are in. Written by `just manifests`. */}}\n{{- define \"sscd.known\" -}}\n",
    );
    for (object, keys) in known() {
        let object = if object.is_empty() { "\"\"" } else { &object };
        template.push_str(&format!("{object}: [{}]\n", keys.join(", ")));
    }
    template.push_str("{{- end -}}\n");
    keep("chart/templates/_known.tpl", &template);
}

/// Returns the full keys by their last part, without those that have no effect.
fn places(known: &BTreeMap<String, Vec<String>>) -> BTreeMap<&str, Vec<String>> {
    let mut places = BTreeMap::<&str, Vec<String>>::new();
    let effective = known
        .iter()
        .filter(|(object, _)| !object.starts_with("linux.crds"));
    for (object, keys) in effective {
        for key in keys {
            places.entry(key).or_default().push(below(object, key));
        }
    }
    places
}

/// Renders the chart with wrong values, and returns what it says about each.
fn said(helm: &Helm, values: &Value) -> Vec<String> {
    let refusal = helm
        .render(&Chart::ours(), "1.34.2", &values.to_string())
        .unwrap_err();
    let mut lines = refusal.lines();
    let first = lines.next().unwrap();
    assert!(
        first.ends_with("this chart does not have all of these values:"),
        "{refusal}"
    );
    let lines = lines.map(str::trim).take_while(|line| !line.is_empty());
    lines.map(str::to_owned).collect()
}

/// Values of other charts whose names alone say too little, and what is said of them.
const ELSEWHERE: [(&str, &str); 15] = [
    ("logLevel", "did you mean logVerbosity?"),
    ("linux.logLevel", "did you mean logVerbosity?"),
    ("enableRotation", "did you mean enableSecretRotation?"),
    (
        "enabledSecretRotation",
        "did you mean enableSecretRotation?",
    ),
    (
        "installCRDs",
        "did you mean linux.crds.enabled, which has no effect, as Helm installs the CRDs?",
    ),
    ("csiDriver.annotations", "csiDriver has labels"),
    (
        "podMonitor.interval",
        "did you mean podMonitor.endpoint.interval?",
    ),
    (
        "podMonitor.scrapeTimeout",
        "did you mean podMonitor.endpoint.scrapeTimeout?",
    ),
    (
        "serviceMonitor.interval",
        "did you mean serviceMonitor.endpoint.interval?",
    ),
    (
        "serviceMonitor.scrapeTimeout",
        "did you mean serviceMonitor.endpoint.scrapeTimeout?",
    ),
    (
        "linux.hostNetwork",
        "did you mean linux.podSpec.hostNetwork?",
    ),
    ("linux.dnsPolicy", "did you mean linux.podSpec.dnsPolicy?"),
    (
        "linux.securityContext",
        "did you mean linux.podSpec.securityContext or linux.driver.container.securityContext?",
    ),
    ("linux.extraVolumes", "did you mean linux.volumes?"),
    (
        "linux.extraVolumeMounts",
        "did you mean linux.volumeMounts?",
    ),
];

#[test]
fn a_value_of_another_chart_is_refused_with_the_one_of_this() {
    let Some(helm) = Helm::find() else { return };
    let (mut values, mut expected) = (json!({}), Vec::new());
    for (full, hint) in ELSEWHERE {
        let (object, key) = full.rsplit_once('.').unwrap_or(("", full));
        set(&mut values, object, key, json!(1));
        expected.push(format!("{full}: {hint}"));
    }
    let mut said = said(&helm, &values);
    said.sort();
    expected.sort();
    assert_eq!(said, expected);
}

/// Every value at every level where it is not.
#[test]
fn a_value_in_a_wrong_place_is_refused_with_the_right_one() {
    let Some(helm) = Helm::find() else { return };
    let known = known();
    let places = places(&known);
    let (mut values, mut expected) = (json!({}), Vec::new());
    for (object, keys) in &known {
        for (name, right) in &places {
            let for_parents = object.is_empty() && ["enabled", "install"].contains(name);
            let full = below(object, name);
            if ELSEWHERE.iter().any(|(key, _)| *key == full) {
                continue;
            }
            if keys.iter().any(|key| key == name) || for_parents {
                continue;
            }
            set(&mut values, object, name, json!(1));
            expected.push(format!("{full}: did you mean {}?", right.join(" or ")));
        }
    }
    assert!(expected.len() > 500, "{}", expected.len());
    let mut said = said(&helm, &values);
    said.sort();
    expected.sort();
    assert_eq!(said, expected);
}

#[test]
fn a_key_with_dots_is_refused_with_the_nested_one() {
    let Some(helm) = Helm::find() else { return };
    let known = known();
    let (mut values, mut expected) = (Map::new(), Vec::new());
    for full in places(&known).into_values().flatten() {
        if full.contains('.') {
            values.insert(full.clone(), json!(1));
            let braces = "}".repeat(full.matches('.').count());
            let nested = full.replace('.', ": {");
            expected.push(format!("{full:?}: the dot is part of this key's name; write {full} as nested keys, {nested}: …{braces}"));
        }
    }
    assert!(expected.len() > 40, "{}", expected.len());
    let mut said = said(&helm, &Value::Object(values));
    said.sort();
    expected.sort();
    assert_eq!(said, expected);
}

/// Every key without its last letter, and with one more.
#[test]
fn a_misspelt_key_is_refused_with_the_right_one() {
    let Some(helm) = Helm::find() else { return };
    let known = known();
    let places = places(&known);
    let (mut values, mut expected) = (json!({}), Vec::new());
    for (name, right) in &places {
        for misspelt in [name[..name.len() - 1].to_owned(), format!("{name}x")] {
            if misspelt.len() < 4 || places.contains_key(misspelt.as_str()) {
                continue;
            }
            for full in right {
                let object = full.rsplit_once('.').map_or("", |(object, _)| object);
                set(&mut values, object, &misspelt, json!(1));
                expected.push((below(object, &misspelt), full));
            }
        }
    }
    assert!(expected.len() > 100, "{}", expected.len());
    let said = said(&helm, &values);
    assert_eq!(said.len(), expected.len());
    for (wrong, right) in expected {
        let line = said
            .iter()
            .find(|line| line.starts_with(&format!("{wrong}: ")));
        let (_, meant) = line.unwrap().split_once(": did you mean ").unwrap();
        let meant = meant.trim_end_matches('?');
        assert!(
            meant.split(" or ").any(|meant| meant == right),
            "{wrong}: {meant}"
        );
    }
}

#[rstest]
#[case(
    "secrets-store-csi-driver: {enableSecretRotation: true}",
    "secrets-store-csi-driver.enableSecretRotation: write enableSecretRotation (that is for charts that this one is a part of)"
)]
#[case(
    "linux: {image: {name: x}}",
    "linux.image.name: linux.image has digest, pullPolicy, repository, tag"
)]
#[case(
    "hostAliases: []",
    "hostAliases: the top level has automountServiceAccountToken, "
)]
#[case("autoscaling: true", "autoscaling: the top level has ")]
#[case(
    "enableSecretsRotation: true",
    "enableSecretsRotation: did you mean enableSecretRotation?"
)]
#[case(
    "secrets-store-csi-driver: {install: true}",
    "secrets-store-csi-driver.install: leave it out (that is for charts that this one is a part of)"
)]
fn other_wrong_values_are_refused(#[case] values: &str, #[case] sentence: &str) {
    let Some(helm) = Helm::find() else { return };
    let values: Value = serde_saphyr::from_str(values).unwrap();
    let said = said(&helm, &values);
    assert!(said.len() == 1 && said[0].starts_with(sentence), "{said:?}");
}

/// Returns the full keys of the schema.
fn keys(schema: &Value, object: &str) -> Vec<String> {
    let properties = schema["properties"].as_object().into_iter().flatten();
    let of_key = properties.flat_map(|(key, inside)| {
        let full = below(object, key);
        let mut keys = keys(inside, &full);
        keys.push(full);
        keys
    });
    of_key.collect()
}

/// A null takes the chart's own value away. Each key as null renders, or is refused by name.
#[test]
fn a_null_renders_or_is_refused_by_name() {
    let Some(helm) = Helm::find() else { return };
    let keys = keys(&schema(), "");
    assert!(keys.len() > 100, "{}", keys.len());
    let render = |full: &String| {
        let mut values = json!({});
        let (object, key) = full.rsplit_once('.').unwrap_or(("", full));
        set(&mut values, object, key, Value::Null);
        let rendered = helm.render(&Chart::ours(), "1.34.2", &values.to_string());
        match rendered {
            Ok(objects) => {
                let empty = ["<nil>", "<no value>", "containerPort: 0\n", "image: :"];
                let found = empty.iter().find(|text| objects.contains(*text));
                assert_eq!(found, None, "{full}");
                None
            }
            // The image by hand is one of the values, which the null takes away.
            Err(why) if full.starts_with("linux.image") => {
                assert!(why.contains("names no registry to pull it from"), "{why}");
                None
            }
            Err(why) => {
                let sentence = "the chart cannot do without them";
                let line = format!("\n  {full}\n");
                assert!(why.contains(sentence) && why.contains(&line), "{why}");
                Some(full.clone())
            }
        }
    };
    let refused: Vec<_> = std::thread::scope(|scope| {
        let quarters = keys.chunks(keys.len().div_ceil(4));
        let threads: Vec<_> = quarters
            .map(|some| scope.spawn(|| some.iter().filter_map(render).collect::<Vec<_>>()))
            .collect();
        let ended = threads.into_iter().map(|thread| thread.join().unwrap());
        ended.flatten().collect()
    });
    for full in ["linux", "rbac", "linux.driver", "linux.metricsAddr"] {
        assert!(refused.iter().any(|name| name == full), "{refused:?}");
    }
    // The plugin's check of values has the same list: driver/kubectl-plugin/src/lint/values/refused.rs.
    assert_eq!(refused.len(), 16, "{refused:?}");
}

#[rstest]
#[case(
    "sidecars: builtin\nlinux: {registrar: null, registrarImage: null, livenessProbeImage: {tag: ''}}"
)]
#[case("linux: {enabled: false, driver: null, kubeletRootDir: null}")]
#[case(
    "linux: {registrarImage: {tag: null, digest: 'sha256:0000000000000000000000000000000000000000000000000000000000000000'}}"
)]
fn what_an_installation_does_not_use_may_be_null(#[case] values: &str) {
    let Some(helm) = Helm::find() else { return };
    helm.render(&Chart::ours(), "1.34.2", values).unwrap();
}

#[test]
fn a_parent_chart_may_add_what_charts_get() {
    let Some(helm) = Helm::find() else { return };
    let as_part = |values: &str| {
        let values = format!(
            "global: {{region: eu}}\nsecrets-store-csi-driver:\n  install: true\n  withDriver: true\n  linux: {{image: {{pullPolicy: Never}}}}\n{values}"
        );
        helm.render(&Chart::parent("withDriver"), "1.34.2", &values)
    };
    let rendered = as_part("  enableSecretRotation: 'true'\n").unwrap();
    assert_eq!(objects::<DaemonSet>(&rendered).len(), 1);
    let refusal = as_part("  syncSecret: {enable: true}\n").unwrap_err();
    assert!(
        refusal.contains("syncSecret.enable: did you mean syncSecret.enabled?"),
        "{refusal}"
    );
}

/// The charts before had no schema, so that `--set-string` and quotes did not matter.
#[rstest]
#[case(true)]
#[case(false)]
fn a_switch_may_be_in_quotes(#[case] on: bool) {
    let Some(helm) = Helm::find() else { return };
    let (mut bare, mut quoted, mut switches) = (json!({}), json!({}), 0);
    for (object, keys) in known() {
        for key in keys {
            let mut described = schema();
            let full = below(&object, &key);
            for part in full.split('.') {
                described = described["properties"][part].take();
            }
            if described["enum"] == json!([true, false, "true", "false"]) {
                set(&mut bare, &object, &key, json!(on));
                set(&mut quoted, &object, &key, json!(on.to_string()));
                switches += 1;
            }
        }
    }
    set(&mut bare, "windows", "enabled", json!(false));
    set(&mut quoted, "windows", "enabled", json!("false"));
    assert!(switches >= 15, "{switches}");
    let render = |values: Value| helm.render(&Chart::ours(), "1.34.2", &values.to_string());
    assert_eq!(render(quoted).unwrap(), render(bare).unwrap());
}
