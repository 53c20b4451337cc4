//! Checks pods, and the templates of pods in Deployments and the like.

use std::collections::BTreeSet;

use driver::{
    record::{ASKED, NUMBER_VERSIONS, is_object_name},
    volume::{
        Origin,
        policy::{Every, INTERVAL, SEND_VERSIONS},
    },
};

use super::{
    Findings, Surroundings,
    annotations::{KEY_FORMAT, PREFIX},
    identity, meant,
    names::slip,
    references,
    yaml::{Key, Node, Value},
};

const DRIVER: &str = "secrets-store.csi.k8s.io";
const CLASS: &str = "secretProviderClass";
pub(super) const MODE: &str = "secrets-store.csi.k8s.io/default-mode";

/// Checks an object of any kind. Kinds without a pod have nothing to check.
pub(super) fn check(object: &Node, around: &Surroundings<'_>, file: &mut Findings<'_>) {
    let Some(spec) = pod_spec(object) else { return };
    check_annotations(object, file);
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
        let known = find(around, &namespace, class, csi, file);
        let known = known.map(|key| &around.classes[&key]);
        let secrets = known.map(|class| &class.secrets);
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
                let wrong = known.and_then(|class| no_such_file(mount, class.files.as_ref()?));
                let wrong = wrong.unwrap_or_default();
                file.add(sub.line, format!("{wrong}a mount with subPath keeps the content with which the container started, also when the volume {name} is refreshed; mount the whole volume and read the file in it"));
            }
        }
    }
    references::check(spec, &containers, &made, around, file);
    check_mounts(spec, &containers, file);
}

/// Says that a mount names a file that its class does not mount, if that is so.
fn no_such_file(mount: &Node, files: &BTreeSet<String>) -> Option<String> {
    let path = mount.text_of("subPath")?.trim_matches('/');
    let mut paths = files.iter();
    // It may be a directory.
    let is_there = paths.any(|file| {
        let rest = file.strip_prefix(path);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    });
    if path.is_empty() || is_there {
        return None;
    }
    let files: Vec<_> = files.iter().map(String::as_str).collect();
    Some(format!(
        "the class mounts no file {path}, but {}; and ",
        files.join(", ")
    ))
}

/// Checks that no annotation of a class stands on a pod, where the driver does not read it.
fn check_annotations(object: &Node, file: &mut Findings<'_>) {
    let spec = object.get("spec");
    let job = spec.and_then(|spec| spec.get("jobTemplate"));
    let specs = [spec, job.and_then(|job| job.get("spec"))];
    let templates = specs
        .into_iter()
        .flatten()
        .filter_map(|spec| spec.get("template"));
    let annotations = templates
        .chain(job)
        .chain([object])
        .filter_map(|it| it.get("metadata")?.get("annotations"));
    for (key, _) in annotations.flat_map(Node::fields) {
        let place = match key.text.as_str() {
            INTERVAL => "to the class, or to volumeAttributes of the volume",
            MODE => "to volumeAttributes of the volume",
            ASKED | SEND_VERSIONS | NUMBER_VERSIONS | KEY_FORMAT => "to the class, as annotation",
            _ => continue,
        };
        file.add(
            key.line,
            format!(
                "the driver does not read the annotation {} of a pod; it belongs {place}",
                key.text
            ),
        );
    }
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
    let is_true = matches!(read_only.map(|r| &r.value), Some(Value::Other(text)) if text == "true");
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
    for (key, value) in attributes.fields() {
        check_key(key, file);
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
        if key.text == MODE
            && let Err(why) = check_mode(text)
        {
            let attribute = format!("the attribute {MODE} is {text:?}");
            file.add(value.line, format!("{attribute}{why}"));
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
    // What a placeholder stands for is not known here.
    let name = class.filter(|name| !is_object_name(name) && !name.contains(['$', '{']));
    if let Some(name) = name {
        let line = attributes.get(CLASS).map_or(attributes.line, |c| c.line);
        let how = match name.contains(',') {
            true => "one volume has one class, so write a volume for each",
            false => "use lower-case letters, digits, \"-\" and \".\"",
        };
        file.add(
            line,
            format!("{name:?} cannot be the name of a class; {how}"),
        );
        return None;
    }
    class
}

/// Checks the key of an attribute: whether the driver reads it, if it looks like one of the driver's.
fn check_key(key: &Key, file: &mut Findings<'_>) {
    let text = key.text.as_str();
    if [CLASS, INTERVAL, MODE].contains(&text) {
        return;
    }
    if Origin::of(text) != Origin::User {
        let how = "only kubelet gives attributes that begin with csi.storage.k8s.io/; remove it";
        file.add(key.line, format!("volumeAttributes has {text}: {how}"));
        return;
    }
    if [ASKED, SEND_VERSIONS, NUMBER_VERSIONS, KEY_FORMAT].contains(&text) {
        let how =
            "is an annotation of the class; the driver does not read it from volumeAttributes";
        file.add(key.line, format!("{text} {how}"));
        return;
    }
    let rest = text.strip_prefix(PREFIX);
    let name = meant(text, &[CLASS, INTERVAL, MODE]).or_else(|| {
        let interval = ["rotationPollInterval", "rotationInterval", "pollInterval"];
        let rest = rest.unwrap_or(text);
        match slip(rest, &interval).is_some() {
            true => Some(INTERVAL),
            false => slip(rest, &["defaultMode"]).map(|_| MODE),
        }
    });
    match name {
        Some(name) => file.add(
            key.line,
            format!("volumeAttributes has {text}; write {name}"),
        ),
        None if rest.is_some() => file.add(
            key.line,
            format!(
                "the driver does not know the attribute {text}; there are {INTERVAL} and {MODE}"
            ),
        ),
        None => {}
    }
}

/// Checks a mode: that it is one, and one that somebody can have meant.
fn check_mode(text: &str) -> Result<(), String> {
    /// The bits with which one can read and write.
    const ACCESS: u32 = 0o6;
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = u32::from_str_radix(digits, 8).ok();
    let mode = mode.filter(|_| !digits.starts_with('+'));
    let Some(mode) = mode.filter(|mode| (1..=0o777).contains(mode)) else {
        return Err("; it is an octal number up to 0777, such as \"0440\"".to_owned());
    };
    let odd = |mode: u32| {
        let owner = mode >> 6;
        let others = (mode >> 3 | mode) & ACCESS;
        match owner & 0o4 == 0 {
            true => Some("the owner cannot read"),
            false => (others & !owner != 0).then_some("others may do more than the owner"),
        }
    };
    let Some(oddity) = odd(mode) else {
        return Ok(());
    };
    let letters: String = (0..9)
        .map(|n| match mode & (0o400 >> n) {
            0 => '-',
            _ => ['r', 'w', 'x'][n % 3],
        })
        .collect();
    let decimal = text.parse().ok().filter(|_| !text.starts_with('0'));
    let how = match decimal.filter(|mode| *mode <= 0o777 && odd(*mode).is_none()) {
        Some(meant) => {
            format!("0{meant:o} is {text} in decimal: write \"0{meant:o}\"")
        }
        None => "write octal digits, such as \"0440\"".to_owned(),
    };
    Err(format!(
        ", which is octal: it means {letters}, where {oddity}; {how}"
    ))
}

/// Finds the class of a volume in the files. Without any class in them nothing is known.
fn find(
    around: &Surroundings<'_>,
    namespace: &str,
    class: &str,
    csi: &Node,
    file: &mut Findings<'_>,
) -> Option<(String, String)> {
    let classes = &around.classes;
    let attributes = csi.get("volumeAttributes");
    let line = attributes
        .and_then(|a| a.get(CLASS))
        .map_or(csi.line, |c| c.line);
    // An object without a namespace goes to the one that is given, if one is.
    let given = around.namespace.unwrap_or_default();
    let elsewhere = match namespace {
        "" => given,
        own if own == given => "",
        own => own,
    };
    for namespace in [namespace, elsewhere] {
        let exact = (namespace.to_owned(), class.to_owned());
        if classes.contains_key(&exact) {
            return Some(exact);
        }
    }
    let same = |other: &str| other == namespace || other.is_empty() || namespace.is_empty();
    let named = |key: &&(String, String)| key.1 == class;
    if let Some(key) = classes.keys().find(|key| named(key) && same(&key.0)) {
        check_namespaces(key, namespace, around, line, file);
        return Some(key.clone());
    }
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

/// Checks that a pod and its class meet, if only one of them has a namespace.
fn check_namespaces(
    (of_class, class): &(String, String),
    of_pod: &str,
    around: &Surroundings<'_>,
    line: usize,
    file: &mut Findings<'_>,
) {
    let given = if of_pod.is_empty() { of_class } else { of_pod };
    if around.namespace == Some(given) || around.is_rendered {
        return;
    }
    let goes = match around.namespace {
        Some(namespace) => format!("goes to {namespace}"),
        None => "goes where kubectl's context points".to_owned(),
    };
    let message = match of_class.is_empty() {
        true => format!(
            "the class {class} has no namespace and {goes}; the pod is in {of_pod}: write namespace: {of_pod} into the class, or give lint -n {of_pod} if it is applied there"
        ),
        false => format!(
            "the pod has no namespace and {goes}; the class {class} is in {of_class}: write namespace: {of_class} into the pod, or give lint -n {of_class} if it is applied there"
        ),
    };
    file.add(line, message);
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

/// Returns whether an object is a pod or has a template of one.
pub(super) fn is_pod(object: &Node) -> bool {
    pod_spec(object).is_some()
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
