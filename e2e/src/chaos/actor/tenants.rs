//! What tenants and administrators do: pods, classes, rotations, and changes by hand.

use std::io;
use std::sync::atomic::Ordering;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::cluster::{Cluster as _, Error, Result, api};
use crate::install::{classes, pod_statuses};

use super::super::editions::Edit;
use super::super::features;
use super::super::ground::Ground;
use super::super::lock;
use super::super::schedule::What;
use super::super::store::{CLASSES, SELDOM, WITH_CREDENTIAL};
use super::super::tenants;
use super::{Actor, sleep};

/// The interval between refreshes of a class that is refreshed seldom otherwise.
const SHORT: &str = "3s";
/// The number of attempts at a write that others overtake.
const WRITES: usize = 5;

impl<G: Ground> Actor<'_, G> {
    pub(super) async fn act_as_tenant(&self, what: What) -> Result<()> {
        match what {
            What::Create { pod, node } => self.create(pod, self.node(node)).await,
            What::Delete { pod } => self.delete(pod, &DeleteParams::default()).await,
            What::ForceDelete { pod } => self.delete(pod, &force()).await,
            What::Expire { pod } => self.expire(pod).await,
            What::Move { pod, node } => {
                self.delete(pod, &force()).await?;
                self.create(pod, self.node(node)).await
            }
            What::Rotate { class } => self.rotate(class).await,
            What::RollBack { class } => {
                let generation = self.world.store.roll_back(class);
                self.changed(class, generation).await
            }
            What::EditClass { class, edit } => {
                let _turn = self.edits.lock().await;
                self.world.edit_begins(class);
                let edited = self.edit(class, edit).await;
                self.world.edit_ends(class);
                edited
            }
            What::RemakeClass { class, lasts, anew } => {
                self.world.edit_begins(class);
                let made = self.remake(class, lasts, anew).await;
                self.world.edit_ends(class);
                made
            }
            What::ChangeFeature { feature, number } => self.change_feature(feature, number).await,
            What::DeleteStatus { pod } => self.delete_statuses(pod).await,
            What::AlterStatus { pod } => self.alter_statuses(pod).await,
            What::DeleteSecret { class } => {
                let name = CLASSES.get(class).copied().unwrap_or_default();
                for name in [name, &tenants::other_secret(class)] {
                    let deleted = self.secrets().delete(name, &DeleteParams::default()).await;
                    unless_absent(deleted, "delete a Secret")?;
                }
                Ok(())
            }
            What::AlterSecret {
                class,
                remove,
                order,
            } => self.alter_secret(class, remove, order).await,
            What::AdornSecret { class } => self.adorn_secret(class).await,
            _ => Ok(()),
        }
    }

    pub(super) async fn create(&self, pod: usize, node: &str) -> Result<()> {
        let there = self.namespace.pod(&tenants::pod_name(pod)).await?;
        if there.is_some() {
            return Ok(());
        }
        let object = tenants::pod(pod, node, &self.world.set).to_string();
        self.namespace.apply(&object).await.map(drop)
    }

    pub(super) async fn delete(&self, pod: usize, params: &DeleteParams) -> Result<()> {
        let pods = self.namespace.api::<Pod>();
        let deleted = pods.delete(&tenants::pod_name(pod), params).await;
        unless_absent(deleted, "delete a pod")
    }

    /// Lets a pod run no longer than it has, as a Job does that takes too long.
    async fn expire(&self, pod: usize) -> Result<()> {
        let deadline = Patch::Merge(json!({"spec": {"activeDeadlineSeconds": 1}}));
        let pods = self.namespace.api::<Pod>();
        let name = tenants::pod_name(pod);
        // Its volumes go when its containers have ended, perhaps before its object says so.
        let bury = |pod: &Pod| lock(&self.world.buried).extend(pod.metadata.uid.clone());
        let found = pods.get_opt(&name).await;
        if let Some(found) = found.map_err(api(format!("get pod {name}")))? {
            bury(&found);
        }
        let patched = pods.patch(&name, &PatchParams::default(), &deadline).await;
        // Another pod may have got the name since.
        unless_absent(
            patched.map(|patched| bury(&patched)),
            "limit the time of a pod",
        )
    }

    /// Gives the store new values.
    pub(super) async fn rotate(&self, class: usize) -> Result<()> {
        self.changed(class, self.world.store.rotate(class)).await
    }

    /// Tells that the store has other values, of which only the class that is refreshed seldom has to tell.
    async fn changed(&self, class: usize, generation: io::Result<u64>) -> Result<()> {
        let generation = generation.map_err(|error| {
            let text = format!("write the store: {error}");
            self.world.log.break_off(text.clone());
            Error::Impossible(text)
        })?;
        let name = CLASSES.get(class).copied().unwrap_or_default();
        let number = self.world.store.number(class, generation);
        self.world.log.tell(format!(
            "{name} has generation {generation}, with contents number {number}"
        ));
        if class == WITH_CREDENTIAL {
            let _turn = self.edits.lock().await;
            let number = self.world.store.latest_number(class);
            self.world.credential.store(number, Ordering::SeqCst);
            let credentials = tenants::credentials(number).to_string();
            self.namespace.apply(&credentials).await?;
        }
        if class != SELDOM {
            return Ok(());
        }
        // The next change that asks ends it.
        match generation.is_multiple_of(2) {
            true => self.ask(class).await,
            false => {
                self.annotate(class, json!({tenants::INTERVAL: SHORT}))
                    .await
            }
        }
    }

    /// Asks for a refresh of all volumes of a class.
    pub(super) async fn ask(&self, class: usize) -> Result<()> {
        let mut asked = json!({tenants::ASK: self.next().to_string()});
        if class == SELDOM {
            asked[tenants::INTERVAL] = self.world.seldom.into();
        }
        self.annotate(class, asked).await
    }

    async fn annotate(&self, class: usize, annotations: Value) -> Result<()> {
        let name = CLASSES.get(class).copied().unwrap_or_default();
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        let api = classes(&self.ground.cluster().client(), &self.world.namespace);
        let patched = api.patch(name, &PatchParams::default(), &patch).await;
        // Without it, it is being made anew.
        unless_absent(patched, "annotate a class")
    }

    async fn edit(&self, class: usize, edit: Edit) -> Result<()> {
        let Some(spec) = self.world.editions.plan(class, edit) else {
            return Ok(());
        };
        let object = tenants::class(class, spec, self.world.seldom);
        let name = CLASSES.get(class).copied().unwrap_or_default();
        let patch = Patch::Merge(json!({"spec": object["spec"]}));
        let api = classes(&self.ground.cluster().client(), &self.world.namespace);
        match api.patch(name, &PatchParams::default(), &patch).await {
            Ok(_) => {
                self.world.editions.becomes(class, spec);
                Ok(())
            }
            // It is being made anew.
            Err(error) => unless_absent::<()>(Err(error), "edit a class"),
        }
    }

    /// Deletes a class, and makes it after a while with what it said or, if `anew`, another text. Its
    /// generation is the first one again.
    async fn remake(&self, class: usize, lasts: u64, anew: bool) -> Result<()> {
        let name = CLASSES.get(class).copied().unwrap_or_default();
        let api = classes(&self.ground.cluster().client(), &self.world.namespace);
        let deleted = api.delete(name, &DeleteParams::default()).await;
        unless_absent(deleted, "delete a class")?;
        sleep(lasts).await;
        let _turn = self.edits.lock().await;
        let spec = match anew {
            true => self.world.editions.plan(class, Edit::Text),
            false => self.world.editions.now(class),
        };
        let Some(spec) = spec else {
            return Ok(());
        };
        let object = tenants::class(class, spec, self.world.seldom).to_string();
        self.namespace.apply(&object).await?;
        self.world.editions.becomes(class, spec);
        Ok(())
    }

    /// Returns the names of the statuses of a pod.
    async fn statuses_of(&self, pod: usize) -> Vec<String> {
        let prefix = format!("{}-{}-", tenants::pod_name(pod), self.world.namespace);
        tenants::classes_of(pod)
            .into_iter()
            .filter_map(|class| Some(format!("{prefix}{}", CLASSES.get(class)?)))
            .collect()
    }

    async fn delete_statuses(&self, pod: usize) -> Result<()> {
        let api = pod_statuses(&self.ground.cluster().client(), &self.world.namespace);
        for name in self.statuses_of(pod).await {
            let deleted = api.delete(&name, &DeleteParams::default()).await;
            unless_absent(deleted, "delete a pod status")?;
        }
        Ok(())
    }

    async fn alter_statuses(&self, pod: usize) -> Result<()> {
        let api = pod_statuses(&self.ground.cluster().client(), &self.world.namespace);
        for name in self.statuses_of(pod).await {
            let patch = Patch::Merge(json!({"status": {"mounted": false, "objects": []}}));
            let patched = api.patch(&name, &PatchParams::default(), &patch).await;
            unless_absent(patched, "alter a pod status")?;
        }
        Ok(())
    }

    fn secrets(&self) -> Api<Secret> {
        self.namespace.api()
    }

    async fn alter_secret(&self, class: usize, remove: bool, order: bool) -> Result<()> {
        let name = CLASSES.get(class).copied().unwrap_or_default();
        // "by hand" in base64.
        let mut altered = match remove {
            true => json!({"data": {"key-a": Value::Null}}),
            false => json!({"data": {"key-a": "YnkgaGFuZA==", "stray": "YnkgaGFuZA=="}}),
        };
        if order {
            // Of a cluster in which more was written.
            altered["metadata"] = json!({"annotations": {tenants::ORDER: "4000000000000"}});
        }
        let patch = Patch::Merge(altered);
        let secrets = self.secrets();
        self.world.writes_by_hand();
        let written = secrets.patch(name, &PatchParams::default(), &patch).await;
        let data = written
            .as_ref()
            .ok()
            .map(|secret| json!(secret.data.clone().unwrap_or_default()));
        self.world.wrote_by_hand(data.as_ref());
        unless_absent(written, "alter a Secret")
    }

    /// Adds a label and an owner to a Secret. Leaves it alone if others write it all the time.
    async fn adorn_secret(&self, class: usize) -> Result<()> {
        let owner = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": tenants::OWNER},
        });
        self.namespace.apply(&owner.to_string()).await?;
        let (secrets, name) = (
            self.secrets(),
            CLASSES.get(class).copied().unwrap_or_default(),
        );
        let get = async |name| {
            secrets
                .get_opt(name)
                .await
                .map_err(api(format!("get Secret {name}")))
        };
        let uid = get(tenants::OWNER)
            .await?
            .and_then(|owner| owner.metadata.uid);
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Secret".to_owned(),
            name: tenants::OWNER.to_owned(),
            uid: uid.unwrap_or_default(),
            ..OwnerReference::default()
        };
        for _ in 0..WRITES {
            let Some(mut secret) = get(name).await? else {
                return Ok(());
            };
            let (label, value) = tenants::LABEL;
            let labels = secret.metadata.labels.get_or_insert_default();
            labels.insert(label.to_owned(), value.to_owned());
            let owners = secret.metadata.owner_references.get_or_insert_default();
            if !owners.contains(&owner) {
                owners.push(owner.clone());
            }
            match secrets.replace(name, &PostParams::default(), &secret).await {
                Ok(written) => {
                    self.world.adorned(&written);
                    return Ok(());
                }
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return unless_absent::<()>(Err(error), "adorn a Secret"),
            }
        }
        Ok(())
    }

    /// Lets the hostile tenant run pods for a while.
    pub(super) async fn hostile(&self, node: &str, lasts: u64, how: usize) -> Result<()> {
        let number = self.next();
        let objects = tenants::hostile(how, number, node, &self.world.namespace);
        for object in &objects {
            // The API server may refuse what is too large.
            if let Err(error) = self.hostile.apply(&object.to_string()).await {
                let text: String = error.to_string().chars().take(200).collect();
                self.world.log.tell(format!("hostile {how}: {text}"));
            }
        }
        match how {
            tenants::WEBHOOK => {
                let namespace = self.hostile.name();
                self.ground.hang_writes(namespace, lasts).await;
            }
            _ => sleep(lasts).await,
        }
        let pods = self.hostile.api::<Pod>();
        let (mut ready, client) = (0, self.ground.cluster().client());
        for object in &objects {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            if object["kind"] == "Pod" {
                let found = pods.get_opt(name).await.ok().flatten();
                ready += u64::from(found.as_ref().is_some_and(embedded::is_ready));
                let deleted = pods.delete(name, &DeleteParams::default()).await;
                unless_absent(deleted, "delete a hostile pod")?;
            } else {
                let api = classes(&client, self.hostile.name());
                let deleted = api.delete(name, &DeleteParams::default()).await;
                unless_absent(deleted, "delete a hostile class")?;
            }
        }
        if how == 7 && ready > 0 {
            let text = "a pod runs with a class of another namespace".to_owned();
            self.world
                .log
                .find("no tenant reaches another's class", text);
        }
        Ok(())
    }

    /// Deletes all pods and classes.
    pub(in super::super) async fn delete_all(&self) -> Result<()> {
        self.world.forget_adorned();
        self.world.features.end();
        let (secrets, sets) = (self.secrets(), self.namespace.api::<ConfigMap>());
        for name in [tenants::OWNER, tenants::CREDENTIALS.0, features::TAKEN] {
            let deleted = secrets.delete(name, &DeleteParams::default()).await;
            unless_absent(deleted, "delete a Secret")?;
        }
        let deleted = sets.delete(tenants::SET, &DeleteParams::default()).await;
        unless_absent(deleted, "delete what controls pods")?;
        for namespace in [&self.namespace, &self.hostile] {
            let pods = namespace.api::<Pod>();
            let list = pods.list(&ListParams::default()).await;
            for pod in list.map_err(api("list pods".to_owned()))? {
                let name = pod.metadata.name.unwrap_or_default();
                let deleted = pods.delete(&name, &DeleteParams::default()).await;
                unless_absent(deleted, "delete a pod")?;
            }
            let api = classes(&self.ground.cluster().client(), namespace.name());
            let list = api.list(&ListParams::default()).await;
            for class in list.map_err(crate::cluster::api("list classes".to_owned()))? {
                let name = class.metadata.name.unwrap_or_default();
                let deleted = api.delete(&name, &DeleteParams::default()).await;
                unless_absent(deleted, "delete a class")?;
            }
        }
        Ok(())
    }
}

fn force() -> DeleteParams {
    DeleteParams::default().grace_period(0)
}

/// Takes it as done when the object does not exist.
pub(super) fn unless_absent<T>(outcome: kube::Result<T>, what: &str) -> Result<()> {
    match outcome {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        outcome => outcome.map(drop).map_err(api(what.to_owned())),
    }
}
