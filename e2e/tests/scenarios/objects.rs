//! The objects that scenarios apply: classes of the fake provider, pods that mount them, and the
//! workloads that make such pods.

use std::fmt;

use serde_json::{Value, json};

/// Where a [`pod`] mounts its first volume.
pub const MOUNT: &str = "/mnt/secrets-store";

/// A SecretProviderClass.
#[derive(Clone)]
pub struct Class(Value);

/// A class of the fake provider whose parameter `objects` is this YAML list.
pub fn class(name: &str, objects: &str) -> Class {
    let objects = lines(objects).fold("array:\n".to_owned(), |text, line| {
        text + "  " + line + "\n"
    });
    Class::of(
        name,
        json!({"provider": "e2e-provider", "parameters": {"objects": objects}}),
    )
}

impl Class {
    pub fn of(name: &str, spec: Value) -> Self {
        let mut class = Self::without_spec(name);
        class.0["spec"] = spec;
        class
    }

    pub fn without_spec(name: &str) -> Self {
        Self(json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1",
            "kind": "SecretProviderClass",
            "metadata": {"name": name},
        }))
    }

    /// What the provider does wrong: a YAML list, too.
    pub fn faults(self, faults: &str) -> Self {
        if faults.is_empty() {
            return self;
        }
        let faults = lines(faults).fold(String::new(), |text, line| text + line + "\n");
        self.parameter("faults", &faults)
    }

    pub fn parameter(mut self, name: &str, value: &str) -> Self {
        self.0["spec"]["parameters"][name] = value.into();
        self
    }

    pub fn provider(mut self, provider: &str) -> Self {
        self.0["spec"]["provider"] = provider.into();
        self
    }

    pub fn secret_objects(mut self, entries: impl IntoIterator<Item = SecretObject>) -> Self {
        self.0["spec"]["secretObjects"] = entries.into_iter().map(|entry| entry.0).collect();
        self
    }

    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.0["metadata"]["annotations"][name] = value.into();
        self
    }

    pub fn namespace(mut self, namespace: &str) -> Self {
        self.0["metadata"]["namespace"] = namespace.into();
        self
    }

    /// The deprecated version of the API.
    pub fn v1alpha1(mut self) -> Self {
        self.0["apiVersion"] = "secrets-store.csi.x-k8s.io/v1alpha1".into();
        self
    }
}

/// An entry of a class's `secretObjects`.
#[derive(Clone)]
pub struct SecretObject(Value);

impl SecretObject {
    /// An entry of type `Opaque`; each of its keys is made from an object.
    pub fn new(secret: &str, keys: &[(&str, &str)]) -> Self {
        let data = keys
            .iter()
            .map(|(key, object)| json!({"objectName": object, "key": key}));
        let data: Value = data.collect();
        Self(json!({"secretName": secret, "type": "Opaque", "data": data}))
    }

    /// An entry with all objects, each under its name.
    pub fn all_objects(secret: &str) -> Self {
        Self::new(secret, &[]).with("data", json!([{"objectName": "*"}]))
    }

    pub fn name(self, secret: &str) -> Self {
        self.with("secretName", secret.into())
    }

    pub fn of_type(self, type_: &str) -> Self {
        self.with("type", type_.into())
    }

    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.0[field] = value;
        self
    }

    /// The entry with another object for its one key.
    pub fn object(mut self, object: &str) -> Self {
        self.0["data"][0]["objectName"] = object.into();
        self
    }

    /// The entry with another key for its one object.
    pub fn key(mut self, key: &str) -> Self {
        self.0["data"][0]["key"] = key.into();
        self
    }
}

/// A pod with one container, which waits.
#[derive(Clone)]
pub struct Pod(Value);

/// A pod that mounts these classes: the first at [`MOUNT`], further ones at the same with a number.
pub fn pod(name: &str, classes: &[&str]) -> Pod {
    let numbered = |stem: &str, number| match number {
        0 => stem.to_owned(),
        _ => format!("{stem}-{number}"),
    };
    let mounts = (0..classes.len()).map(|number| {
        json!({"name": numbered("secrets", number), "mountPath": numbered(MOUNT, number), "readOnly": true})
    });
    let volumes = classes.iter().enumerate().map(|(number, class)| {
        json!({"name": numbered("secrets", number), "csi": {
            "driver": "secrets-store.csi.k8s.io",
            "readOnly": true,
            "volumeAttributes": {"secretProviderClass": class},
        }})
    });
    Pod(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "main",
                "image": "probe:e2e",
                "args": ["sleep"],
                "volumeMounts": mounts.collect::<Value>(),
            }],
            "volumes": volumes.collect::<Value>(),
        },
    }))
}

impl Pod {
    /// Sets a field of the spec.
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.0["spec"][field] = value;
        self
    }

    /// Places the pod without the scheduler.
    pub fn on_node(self, node: &str) -> Self {
        self.with("nodeName", node.into())
    }

    /// Takes the variable `SECRET` from a key of a Secret, without which the container cannot start.
    pub fn env(mut self, secret: &str, key: &str) -> Self {
        let reference = json!({"secretKeyRef": {"name": secret, "key": key}});
        self.0["spec"]["containers"][0]["env"] =
            json!([{"name": "SECRET", "valueFrom": reference}]);
        self
    }

    /// Sets an attribute of the first volume.
    pub fn attribute(mut self, name: &str, value: &str) -> Self {
        self.csi()["volumeAttributes"][name] = value.into();
        self
    }

    /// Lets the first volume refer to a Secret in `nodePublishSecretRef`.
    pub fn secret_reference(mut self, secret: &str) -> Self {
        self.csi()["nodePublishSecretRef"] = json!({"name": secret});
        self
    }

    /// The container.
    pub fn container(&mut self) -> &mut Value {
        &mut self.0["spec"]["containers"][0]
    }

    /// The source of the first volume.
    pub fn csi(&mut self) -> &mut Value {
        &mut self.0["spec"]["volumes"][0]["csi"]
    }

    /// A template for such pods, with the label `app` and others.
    fn template(&self, labels: &Value) -> Value {
        json!({"metadata": {"labels": labels}, "spec": self.0["spec"]})
    }
}

/// A Deployment of such pods.
pub fn deployment(name: &str, replicas: usize, pod: &Pod) -> Value {
    workload("Deployment", name, replicas, pod, &json!({"app": name}))
}

/// A StatefulSet of one such pod.
pub fn stateful_set(name: &str, pod: &Pod) -> Value {
    let mut set = workload("StatefulSet", name, 1, pod, &json!({"app": name}));
    set["spec"]["serviceName"] = name.into();
    set
}

/// A ReplicaSet of one such pod, as a Deployment makes it.
pub fn replica_set(name: &str, pod: &Pod) -> Value {
    let labels = json!({"app": name, "pod-template-hash": "one"});
    workload("ReplicaSet", name, 1, pod, &labels)
}

fn workload(kind: &str, name: &str, replicas: usize, pod: &Pod, labels: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": pod.template(labels),
        },
    })
}

/// A Job of one such pod.
pub fn job(name: &str, pod: &Pod) -> Value {
    let pod = pod.clone().with("restartPolicy", "Never".into());
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"template": pod.template(&json!({"app": name}))},
    })
}

/// The lines of a text with something in them.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim().is_empty())
}

/// Objects are applied as text, of which JSON is a form.
macro_rules! displayed_as_json {
    ($($object:ty),*) => {$(
        impl fmt::Display for $object {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
displayed_as_json!(Class, Pod);
