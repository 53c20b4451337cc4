//! Whatever holds up the start of a pod, its story says what: which container, and what was last said of it. The pods
//! are made from all that may hold up a container, each kind of container, and what may be known of its events.

use serde_json::{Value, json};

use crate::{
    waits::{aged, of_container, waits},
    world::{Said, World, ago},
};

/// What is known of events.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Events {
    Some,
    None,
    Forbidden,
}

/// A kind of container.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Init,
    Sidecar,
    Main,
}

/// What may hold up a container.
struct Block {
    title: &'static str,
    kinds: &'static [Kind],
    /// Its state.
    state: fn() -> Value,
    /// Fields of the container.
    fields: fn() -> Value,
    /// An event about it.
    event: (&'static str, &'static str),
    /// Whether kubelet has started the others before.
    others_run: bool,
}

const ALL: &[Kind] = &[Kind::Init, Kind::Sidecar, Kind::Main];
const LASTING: &[Kind] = &[Kind::Sidecar, Kind::Main];
const NAMES: [&str; 5] = ["first", "middle", "last", "app", "other"];

fn waiting(reason: &str) -> Value {
    json!({"waiting": {"reason": reason}})
}

fn running() -> Value {
    json!({"running": {"startedAt": ago(780)}})
}

fn ended(code: i32) -> Value {
    json!({"terminated": {"exitCode": code, "reason": if code == 0 { "Completed" } else { "Error" },
        "startedAt": ago(900), "finishedAt": ago(800)}})
}

const BLOCKS: &[Block] = &[
    Block {
        title: "its image",
        kinds: ALL,
        state: || waiting("ImagePullBackOff"),
        fields: || json!({}),
        event: ("Failed", "Failed to pull image \"shop\": EOF"),
        others_run: false,
    },
    Block {
        title: "a slow pull",
        kinds: ALL,
        state: || waiting("PodInitializing"),
        fields: || json!({}),
        event: ("Pulling", "Pulling image \"shop\""),
        others_run: false,
    },
    Block {
        title: "its configuration",
        kinds: ALL,
        state: || waiting("CreateContainerConfigError"),
        fields: || json!({}),
        event: ("Failed", "Error: configmap \"web-env\" not found"),
        others_run: false,
    },
    Block {
        title: "its runtime",
        kinds: ALL,
        state: || waiting("RunContainerError"),
        fields: || json!({}),
        event: ("Failed", "Error: no such device"),
        others_run: false,
    },
    Block {
        title: "its end, again and again",
        kinds: ALL,
        state: || waiting("CrashLoopBackOff"),
        fields: || json!({}),
        event: ("BackOff", ""),
        others_run: false,
    },
    Block {
        title: "something that this plugin does not know",
        kinds: ALL,
        state: || waiting("MoonPhaseError"),
        fields: || json!({}),
        event: ("MoonPhase", "the moon is waning"),
        others_run: false,
    },
    Block {
        title: "nothing that is known",
        kinds: ALL,
        state: || Value::Null,
        fields: || json!({}),
        event: ("Odd", "something is odd"),
        others_run: false,
    },
    Block {
        title: "its own work",
        kinds: &[Kind::Init],
        state: running,
        fields: || json!({}),
        event: ("Odd", "something is odd"),
        others_run: false,
    },
    Block {
        title: "its end",
        kinds: &[Kind::Init, Kind::Main],
        state: || ended(3),
        fields: || json!({}),
        event: ("Odd", ""),
        others_run: false,
    },
    Block {
        title: "its hook",
        kinds: LASTING,
        state: || waiting("PodInitializing"),
        fields: || json!({"lifecycle": {"postStart": {"exec": {"command": ["sleep", "60"]}}}}),
        event: ("Started", ""),
        others_run: false,
    },
    Block {
        title: "its startup probe",
        kinds: LASTING,
        state: running,
        fields: || json!({"startupProbe": {"exec": {"command": ["false"]}}}),
        event: ("Unhealthy", "Startup probe failed: no answer"),
        others_run: false,
    },
    Block {
        title: "its readiness probe",
        kinds: LASTING,
        state: running,
        fields: || json!({"readinessProbe": {"exec": {"command": ["false"]}}}),
        event: ("Unhealthy", "Readiness probe failed: no answer"),
        others_run: true,
    },
    Block {
        title: "kubelet's report",
        kinds: LASTING,
        state: running,
        fields: || json!({}),
        event: ("Odd", "something is odd"),
        others_run: true,
    },
];

fn status(name: &str, state: Value, is_through: bool) -> Value {
    json!({"name": name, "image": "shop", "imageID": "", "ready": is_through, "started": is_through,
        "restartCount": 0, "state": state})
}

/// Makes a pod that something holds up. The containers behind that may have a mistake as well.
fn held_up(block: &Block, kind: Kind, events: Events, has_mistake: bool) -> (World, &'static str) {
    let mut world = World::in_order();
    waits(&mut world, "PodInitializing", "");
    let name = if kind == Kind::Main { "app" } else { "middle" };
    let mounts = world.pod["spec"]["containers"][0]["volumeMounts"].clone();
    let mut containers: Vec<_> = NAMES
        .iter()
        .map(|name| json!({"name": name, "image": "shop", "volumeMounts": mounts}))
        .collect();
    if kind == Kind::Sidecar {
        containers[1]["restartPolicy"] = json!("Always");
    }
    if has_mistake {
        containers[4]["env"] = json!([{"name": "PW", "valueFrom": {"secretKeyRef": {"name": "creds", "key": "user"}}}]);
    }
    let at = NAMES.iter().position(|other| *other == name).unwrap();
    let fields = (block.fields)();
    let container = containers[at].as_object_mut().unwrap();
    container.extend(fields.as_object().unwrap().clone());
    let mut statuses: Vec<_> = NAMES
        .iter()
        .enumerate()
        .map(|(index, name)| match index {
            _ if index < 3 && (index < at || block.others_run) => status(name, ended(0), true),
            _ if block.others_run => status(name, running(), true),
            _ => status(name, waiting("PodInitializing"), false),
        })
        .collect();
    statuses[at] = status(name, (block.state)(), false);
    // A sidecar has started before the others run.
    statuses[at]["started"] = json!(block.others_run);
    world.pod["spec"]["initContainers"] = json!(containers[..3]);
    world.pod["spec"]["containers"] = json!(containers[3..]);
    let all = |from: &[Value]| {
        let from = from.iter().filter(|status| !status["state"].is_null());
        json!(from.collect::<Vec<_>>())
    };
    world.pod["status"]["initContainerStatuses"] = all(&statuses[..3]);
    world.pod["status"]["containerStatuses"] = all(&statuses[3..]);
    // Some kubelets report no conditions, and none reports them while it runs a hook.
    if events != Events::Forbidden {
        let of = |is: bool| if is { "True" } else { "False" };
        let is_initialized = kind == Kind::Main || block.others_run;
        world.pod["status"]["conditions"] = json!([
            {"type": "PodReadyToStartContainers", "status": of(block.event.0 != "Started")},
            {"type": "Initialized", "status": of(is_initialized)},
            {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]);
    }
    let list = if kind == Kind::Main {
        "containers"
    } else {
        "initContainers"
    };
    match events {
        Events::None => {}
        Events::Forbidden => world.forbidden = vec!["/events"],
        Events::Some => {
            world.event(block.event.0, block.event.1);
            aged(&mut world, 60, 3);
            of_container(&mut world, &format!("spec.{list}{{{name}}}"));
        }
    }
    (world, name)
}

/// Returns the first line of what is waited for, or else of what is wrong: mistakes that come later stand before what is
/// waited for.
fn first(said: &Said) -> &str {
    let (_, rest) = said
        .stdout
        .split_once("\nIt waits for:\n")
        .unwrap_or(("", &said.stdout));
    let mut lines = rest.lines();
    lines
        .find_map(|line| line.strip_prefix("  - "))
        .unwrap_or_default()
}

fn assert_told(title: &str, said: &Said) {
    let waits = said.stdout.contains("\nIt waits for:\n");
    let text = format!("{title}: {}{}", said.stdout, said.stderr);
    assert!(said.code == 1 || said.code == 0 && waits, "{text}");
    let is_silent = said.stdout.contains("Nothing is") && !waits;
    assert!(!is_silent, "{text}");
}

#[tokio::test]
async fn whatever_holds_up_a_container_is_told() {
    let mut wrong = Vec::new();
    for block in BLOCKS {
        for kind in block.kinds {
            for events in [Events::Some, Events::None, Events::Forbidden] {
                let has_mistake = *kind != Kind::Main && !block.others_run;
                let (world, name) = held_up(block, *kind, events, has_mistake);
                let said = world.start().await.explain("web").await;
                let title = format!("{} of {kind:?}, events: {events:?}", block.title);
                let first = first(&said);
                let is_named = first.contains(&format!("container {name}"));
                let others = NAMES.iter().filter(|other| **other != name);
                let is_alone = others
                    .into_iter()
                    .all(|other| !first.contains(&format!("container {other}")));
                let is_quoted = events != Events::Some || said.stdout.contains(block.event.1);
                let has_waits = said.stdout.contains("\nIt waits for:\n");
                let is_told = said.code == 1 || said.code == 0 && has_waits;
                let later = "container other takes key user of Secret creds";
                let has_later = !has_mistake || said.stdout.contains(later);
                if !(is_named && is_alone && is_quoted && is_told && has_later) {
                    wrong.push(format!("# {title}\n{}{}", said.stdout, said.stderr));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} are wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// What holds up the pod as a whole.
type OfPod = (&'static str, fn(&mut World), &'static str);

const OF_POD: &[OfPod] = &[
    (
        "a gate of the scheduler",
        |world| {
            world.pod["spec"]["schedulingGates"] = json!([{"name": "shop.example.com/quota"}]);
            world.pod["spec"]
                .as_object_mut()
                .unwrap()
                .remove("nodeName");
            world.pod["status"] = json!({"phase": "Pending"});
        },
        "scheduling gates (shop.example.com/quota)",
    ),
    (
        "a kubelet that has not taken it up",
        |world| {
            world.not_started();
            world.pod["status"] = json!({"phase": "Pending"});
        },
        "kubelet of node node-1, which has not taken the pod up yet since ",
    ),
    (
        "a mount that has just begun",
        |world| {
            world.not_started();
            world.pod["status"]["startTime"] = ago(5);
        },
        "its volume secrets, which kubelet has not mounted yet",
    ),
    (
        "its other volumes",
        |world| {
            world.with_config_map();
            waits(world, "ContainerCreating", "");
        },
        "what comes before its containers: kubelet mounts its other volumes",
    ),
    (
        "another volume, for long",
        |world| {
            world.with_config_map();
            waits(world, "ContainerCreating", "");
            world.event("FailedAttachVolume", "Multi-Attach error");
            aged(world, 1_500, 2);
        },
        "it says: Multi-Attach error (25m ago)",
    ),
    (
        "its resource claims",
        |world| {
            waits(world, "ContainerCreating", "");
            world.event("FailedPrepareDynamicResources", "claim gpu: no plugin");
        },
        "its resource claims, which kubelet could not prepare yet; kubelet has the pod since ",
    ),
    (
        "the network of the node",
        |world| {
            world.not_started();
            world.event("NetworkNotReady", "network is not ready");
        },
        "the network of the node, without which kubelet does not begin with a pod",
    ),
    (
        "something that kubelet says of a time before its volumes",
        |world| {
            world.not_started();
            world.event("MoonPhase", "the moon is waning");
        },
        "it says: the moon is waning",
    ),
    (
        "its sandbox, for long",
        |world| {
            waits(world, "ContainerCreating", "");
            world.event("FailedCreatePodSandBox", "no runtime");
            aged(world, 1_500, 2);
        },
        "its sandbox, which kubelet could not make yet",
    ),
    (
        "its readiness gates",
        |world| {
            world.pod["spec"]["readinessGates"] =
                json!([{"conditionType": "example.com/lb"}, {"conditionType": "example.com/dns"}]);
            world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"},
                {"type": "example.com/lb", "status": "False", "message": "no target"},
                {"type": "example.com/dns", "status": "True"}]);
        },
        "its readiness gates: example.com/lb (False)",
    ),
    (
        "kubelet's report",
        |world| {
            world.pod["status"]["conditions"] =
                json!([{"type": "Ready", "status": "False", "message": "soon"}]);
        },
        "kubelet, which has not reported yet that the pod is ready",
    ),
    (
        "nothing, for a container has done its work",
        |world| {
            world.pod["spec"]["restartPolicy"] = json!("Never");
            world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
            let status = &mut world.pod["status"]["containerStatuses"][0];
            (status["ready"], status["state"]) = (json!(false), ended(0));
            // Without another one, the pod has ended as soon as kubelet reports it.
            let containers = world.pod["spec"]["containers"].as_array_mut().unwrap();
            containers.push(json!({"name": "other", "image": "shop"}));
            let statuses = &mut world.pod["status"]["containerStatuses"];
            statuses.as_array_mut().unwrap().push(
                json!({"name": "other", "image": "shop", "imageID": "", "ready": true,
                "restartCount": 0, "state": {"running": {"startedAt": ago(60)}}}),
            );
        },
        "nothing more: container main has done its work",
    ),
    (
        "its end",
        |world| {
            world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
            world.pod["metadata"]["deletionTimestamp"] = ago(-10);
        },
        "its end: somebody has deleted it",
    ),
];

#[tokio::test]
async fn whatever_holds_up_a_pod_is_told() {
    for (title, change, expected) in OF_POD {
        let mut world = World::in_order();
        change(&mut world);
        let said = world.start().await.explain("web").await;
        assert_told(title, &said);
        assert!(said.stdout.contains(expected), "{title}: {}", said.stdout);
    }
}

/// Machines have it apart from what is wrong.
#[tokio::test]
async fn what_a_pod_waits_for_is_in_json() {
    let (world, _) = held_up(&BLOCKS[7], Kind::Init, Events::None, true);
    let running = world.start().await;
    let said = running
        .run(&["explain", "pod", "web", "-n", "shop", "-o", "json"])
        .await;
    let story: Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(story["waits"][0]["check"], "start", "{story}");
    assert_eq!(story["trouble"][0]["check"], "env-key", "{story}");
    let what = story["waits"][0]["what"].as_str().unwrap();
    assert!(
        what.starts_with("init container middle, which runs since "),
        "{what}"
    );
}
