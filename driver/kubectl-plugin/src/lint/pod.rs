//! Checks pods, and the templates of pods in Deployments and the like.

use std::collections::BTreeSet;

use driver::volume::policy::{Every, INTERVAL};

use super::{Classes, Findings, identity, meant, yaml::Node};

const DRIVER: &str = "secrets-store.csi.k8s.io";
const CLASS: &str = "secretProviderClass";
const MODE: &str = "secrets-store.csi.k8s.io/default-mode";

/// Checks an object of any kind. Kinds without a pod have nothing to check.
pub(super) fn check(object: &Node, classes: &Classes, file: &mut Findings<'_>) {
    let Some(spec) = pod_spec(object) else { return };
    let namespace = identity(object).0;
    let containers: Vec<_> = ["initContainers", "containers"]
        .iter()
        .flat_map(|kind| spec.items_of(kind))
        .collect();
    let mounts = |name: &str| {
        let mut mounts = containers.iter().flat_map(|c| c.items_of("volumeMounts"));
        mounts.find(|mount| mount.text_of("name") == Some(name))
    };
    let mut made = Vec::new();
    for volume in spec.items_of("volumes") {
        let Some(csi) = volume.get("csi") else {
            continue;
        };
        let Some(class) = check_volume(csi, file) else {
            continue;
        };
        let name = volume.text_of("name").unwrap_or_default();
        let known = find(classes, &namespace, class, csi, file);
        let secrets = known.map(|key| &classes[&key].secrets);
        if mounts(name).is_none() && !is_meant(&containers, name) {
            let makes = secrets.is_some_and(|secrets| !secrets.is_empty());
            let and = if makes {
                ", and the Secrets of its class are not made"
            } else {
                ""
            };
            file.add(volume.line, format!("no container mounts the volume {name}, so kubelet does not mount it either{and}; add it to volumeMounts of a container"));
        }
        if let Some(secrets) = secrets {
            made.extend(secrets.iter());
        }
        for mount in containers.iter().flat_map(|c| c.items_of("volumeMounts")) {
            let sub = mount.get("subPath").or_else(|| mount.get("subPathExpr"));
            if let Some(sub) = sub.filter(|_| mount.text_of("name") == Some(name)) {
                file.add(sub.line, format!("a mount with subPath keeps the content with which the container started, also when the volume {name} is refreshed; mount the whole volume and read the file in it"));
            }
        }
    }
    for (container, (name, key)) in containers
        .iter()
        .flat_map(|c| references(c).map(move |r| (c, r)))
    {
        let found = made
            .iter()
            .find(|(secret, _)| Some(secret.as_str()) == name.text());
        if let Some((secret, Some(keys))) = found
            && let Some(wrong) = key.filter(|key| !keys.contains(key.text().unwrap_or_default()))
        {
            let all: Vec<_> = keys.iter().map(String::as_str).collect();
            let container = container.text_of("name").unwrap_or_default();
            file.add(wrong.line, format!("container {container} takes the key {} of the Secret {secret}, which its class does not make; it makes {}", wrong.text().unwrap_or_default(), all.join(", ")));
        }
    }
    check_mounts(spec, &containers, file);
}

/// Returns whether a container mounts a volume whose name is a little different, which is a finding of its own.
fn is_meant(containers: &[&Node], name: &str) -> bool {
    let mut mounts = containers.iter().flat_map(|c| c.items_of("volumeMounts"));
    mounts.any(|mount| {
        mount
            .text_of("name")
            .is_some_and(|other| meant(other, &[name]).is_some())
    })
}

/// Checks the source of a volume. Returns its class, if the volume is the driver's.
fn check_volume<'a>(csi: &'a Node, file: &mut Findings<'_>) -> Option<&'a str> {
    let driver = csi.text_of("driver")?;
    let attributes = csi.get("volumeAttributes");
    if driver != DRIVER {
        let is_ours = attributes.is_some_and(|a| a.get(CLASS).is_some())
            || [
                "secrets-store.csi.x-k8s.io",
                "secret-store.csi.k8s.io",
                "secrets-store.csi.k8s",
            ]
            .contains(&driver);
        if is_ours {
            let line = csi.get("driver").map_or(csi.line, |d| d.line);
            file.add(line, format!("the driver is called {DRIVER}, not {driver}"));
        }
        return None;
    }
    let read_only = csi.get("readOnly");
    let is_true = matches!(read_only.map(|r| &r.value), Some(super::yaml::Value::Other(text)) if text == "true");
    if !is_true {
        let line = read_only.map_or(csi.line, |r| r.line);
        file.add(
            line,
            "the volume must be read-only: write readOnly: true below csi",
        );
    }
    if let Some(secret) = csi.get("nodePublishSecretRef")
        && secret.text_of("name").is_none()
    {
        file.add(
            secret.line,
            "nodePublishSecretRef needs the name of a Secret in the pod's namespace",
        );
    }
    let Some(attributes) = attributes else {
        file.add(csi.line, format!("volumeAttributes is missing; write volumeAttributes: and below it {CLASS}: and the name of a class"));
        return None;
    };
    let known = [CLASS, INTERVAL, MODE];
    for (key, value) in attributes.fields() {
        if let Some(name) = meant(&key.text, &known).filter(|name| *name != key.text) {
            file.add(
                key.line,
                format!("volumeAttributes has {}; write {name}", key.text),
            );
        }
        let Some(text) = value.text() else {
            file.add(
                value.line,
                format!(
                    "the attribute {} must be a text; put it in quotes",
                    key.text
                ),
            );
            continue;
        };
        if key.text == INTERVAL
            && let Err(why) = Every::parse(text)
        {
            file.add(
                value.line,
                format!("the attribute {INTERVAL} is {text:?}: {why}"),
            );
        }
        if key.text == MODE && u32::from_str_radix(text, 8).map_or(true, |mode| mode > 0o777) {
            file.add(value.line, format!("the attribute {MODE} is {text:?}; it is an octal number up to 0777, such as \"0440\""));
        }
    }
    let class = attributes.text_of(CLASS);
    let is_misspelt = attributes
        .fields()
        .iter()
        .any(|(key, _)| meant(&key.text, &[CLASS]).is_some());
    if class.is_none() && !is_misspelt {
        file.add(
            attributes.line,
            format!("volumeAttributes has no {CLASS}: the name of a class in the pod's namespace"),
        );
    }
    class
}

/// Finds the class of a volume in the files. Without any class in them nothing is known.
fn find(
    classes: &Classes,
    namespace: &str,
    class: &str,
    csi: &Node,
    file: &mut Findings<'_>,
) -> Option<(String, String)> {
    let same = |other: &str| other == namespace || other.is_empty() || namespace.is_empty();
    let named = |key: &&(String, String)| key.1 == class;
    if let Some(key) = classes.keys().find(|key| named(key) && same(&key.0)) {
        return Some(key.clone());
    }
    let attributes = csi.get("volumeAttributes");
    let line = attributes
        .and_then(|a| a.get(CLASS))
        .map_or(csi.line, |c| c.line);
    if let Some((other, _)) = classes.keys().find(named) {
        file.add(line, format!("the class {class} is in the namespace {other}; a class must be in the namespace of the pod, {namespace}"));
        return None;
    }
    let there: Vec<_> = classes
        .keys()
        .filter(|key| same(&key.0))
        .map(|key| key.1.as_str())
        .collect();
    if let Some(name) = meant(class, &there) {
        file.add(
            line,
            format!("there is no class {class} in these files; is {name} meant?"),
        );
    }
    None
}

/// Returns the Secrets from which a container takes environment variables, with the key if it is one.
fn references(container: &Node) -> impl Iterator<Item = (&Node, Option<&Node>)> {
    let one = container.items_of("env").iter().filter_map(|env| {
        let secret = env.get("valueFrom")?.get("secretKeyRef")?;
        Some((secret.get("name")?, secret.get("key")))
    });
    let all = container.items_of("envFrom").iter();
    let all = all.filter_map(|from| Some((from.get("secretRef")?.get("name")?, None)));
    one.chain(all)
}

/// Checks that containers mount only volumes that there are, in pods with a volume of the driver.
fn check_mounts(spec: &Node, containers: &[&Node], file: &mut Findings<'_>) {
    let volumes = spec.items_of("volumes");
    let is_ours =
        |volume: &Node| volume.get("csi").and_then(|csi| csi.text_of("driver")) == Some(DRIVER);
    if !volumes.iter().any(is_ours) {
        return;
    }
    let names: BTreeSet<_> = volumes.iter().filter_map(|v| v.text_of("name")).collect();
    let list: Vec<_> = names.iter().copied().collect();
    for mount in containers.iter().flat_map(|c| c.items_of("volumeMounts")) {
        let Some(name) = mount.get("name") else {
            continue;
        };
        let text = name.text().unwrap_or_default();
        // The names of a StatefulSet's claims are not in the template.
        if !names.contains(text)
            && let Some(close) = meant(text, &list)
        {
            file.add(
                name.line,
                format!("there is no volume {text}; is {close} meant?"),
            );
        }
    }
}

/// Returns the specification of the pod, or of the template of pods.
fn pod_spec(object: &Node) -> Option<&Node> {
    let spec = object.get("spec")?;
    match object.text_of("kind")? {
        "Pod" => Some(spec),
        "CronJob" => spec
            .get("jobTemplate")?
            .get("spec")?
            .get("template")?
            .get("spec"),
        "Deployment"
        | "StatefulSet"
        | "DaemonSet"
        | "ReplicaSet"
        | "Job"
        | "ReplicationController"
        | "Rollout" => spec.get("template")?.get("spec"),
        _ => None,
    }
}
