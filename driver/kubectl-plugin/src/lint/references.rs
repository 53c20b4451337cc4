//! Checks the Secrets that a pod takes: into the environment of its containers, as volumes, and for its images.

use driver::record::is_object_name;

use super::{
    Findings, Surroundings,
    class::Made,
    names::is_slip,
    yaml::{Node, Value},
};

/// The Secrets that the classes of a pod make.
type OfPod<'a> = [(&'a String, &'a Made)];

/// A place at which a pod takes a Secret.
struct Reference<'a> {
    /// Who takes it, in words.
    who: String,
    /// The name of the Secret.
    name: &'a Node,
    /// The keys; none if all are taken.
    keys: Vec<&'a Node>,
    /// Whether it may be absent.
    is_optional: bool,
}

/// Checks them. `made` are the Secrets that the pod's classes make.
pub(super) fn check(
    spec: &Node,
    containers: &[&Node],
    made: &OfPod<'_>,
    around: &Surroundings<'_>,
    file: &mut Findings<'_>,
) {
    let of_containers = containers
        .iter()
        .flat_map(|container| of_container(container));
    let volumes = spec.items_of("volumes").iter();
    let of_images = spec.items_of("imagePullSecrets").iter();
    let of_images = of_images
        .filter_map(|secret| Reference::of("imagePullSecrets", secret, "name", Vec::new()));
    let all = of_containers.chain(volumes.flat_map(of_volume));
    for reference in all.chain(of_images) {
        check_one(&reference, made, around, file);
    }
}

fn check_one(
    reference: &Reference<'_>,
    made: &OfPod<'_>,
    around: &Surroundings<'_>,
    file: &mut Findings<'_>,
) {
    let who = &reference.who;
    let Some(name) = reference.name.text().filter(|_| !reference.is_optional) else {
        return;
    };
    if let Some((_, made)) = made.iter().find(|(secret, _)| *secret == name) {
        let Some(keys) = &made.keys else { return };
        for key in &reference.keys {
            let text = key.text().unwrap_or_default();
            if !keys.contains(text) {
                let all: Vec<_> = keys.iter().map(String::as_str).collect();
                file.add(key.line, format!("{who} takes the key {text} of the Secret {name}, which its class does not make; it makes {}", all.join(", ")));
            }
        }
        return;
    }
    let mut classes = around.classes.values();
    if around.others.contains(name) || classes.any(|c| c.secrets.contains_key(name)) {
        return;
    }
    // One whose name cannot be that of a Secret is not meant; the class has that as a finding of its own.
    let mut possible = made.iter().filter(|(right, _)| is_object_name(right));
    if let Some((right, _)) = possible.find(|(right, _)| is_slip(name, right)) {
        file.add(reference.name.line, format!("{who} takes the Secret {name}, which no class in these files makes; is {right} meant?"));
    }
}

/// Returns the Secrets from which a container takes environment variables.
fn of_container(container: &Node) -> Vec<Reference<'_>> {
    let who = format!(
        "container {}",
        container.text_of("name").unwrap_or_default()
    );
    let one = container.items_of("env").iter();
    let one = one.filter_map(|env| env.get("valueFrom")?.get("secretKeyRef"));
    let all = container.items_of("envFrom").iter();
    let all = all.filter_map(|from| from.get("secretRef"));
    let all = one.chain(all).filter_map(|secret| {
        let keys = secret.get("key").into_iter().collect();
        Reference::of(&who, secret, "name", keys)
    });
    all.collect()
}

/// Returns the Secrets that a volume takes.
fn of_volume(volume: &Node) -> Vec<Reference<'_>> {
    let who = format!("volume {}", volume.text_of("name").unwrap_or_default());
    let plain = volume.get("secret").map(|secret| (secret, "secretName"));
    let projected = volume.get("projected");
    let sources = projected.map_or(&[][..], |projected| projected.items_of("sources"));
    let sources = sources.iter().filter_map(|source| source.get("secret"));
    let all = plain
        .into_iter()
        .chain(sources.map(|secret| (secret, "name")));
    let all = all.filter_map(|(secret, name)| {
        let items = secret.items_of("items").iter();
        let keys = items.filter_map(|item| item.get("key")).collect();
        Reference::of(&who, secret, name, keys)
    });
    all.collect()
}

impl<'a> Reference<'a> {
    /// Reads one; `name` is the field with the name of the Secret.
    fn of(who: &str, secret: &'a Node, name: &str, keys: Vec<&'a Node>) -> Option<Self> {
        Some(Self {
            who: who.to_owned(),
            name: secret.get(name)?,
            keys,
            is_optional: is_optional(secret),
        })
    }
}

/// Returns whether a Secret and its keys may be absent.
fn is_optional(secret: &Node) -> bool {
    matches!(secret.get("optional").map(|optional| &optional.value), Some(Value::Other(text)) if text == "true")
}
