//! The pods whose classes ask for what else the documents promise, and changes of these classes.

use std::time::Instant;

use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::cluster::{Cluster as _, Result, api};
use crate::install::classes;

use super::super::features::{self, NUMBERED};
use super::super::ground::Ground;
use super::tenants::unless_absent;
use super::{Actor, sleep};

/// The bit of a number that says that its class is deleted and made anew.
const ANEW: u64 = 1 << 6;
/// The milliseconds for which such a class is absent, at most.
const ABSENT: u64 = 3_000;
const AGAIN: u64 = 250;

impl<G: Ground> Actor<'_, G> {
    /// Makes the classes and pods; returns when all of them are as they should be.
    pub(in super::super) async fn begin_features(&self) -> Result<()> {
        let features = &self.world.features;
        let of_somebody_else = features::of_somebody_else();
        self.namespace.apply(&of_somebody_else.to_string()).await?;
        for class in 0..features::CLASSES {
            let object = features::class(class, features.number(class), features.waits());
            self.namespace.apply(&object.to_string()).await?;
        }
        let mut pods = Vec::new();
        for object in features::pods(&self.nodes) {
            let made = self.namespace.apply(&object.to_string()).await?;
            let uid = made.into_iter().find_map(|made| made.metadata.uid);
            let node = object["spec"]["nodeName"].as_str().unwrap_or_default();
            pods.push((uid.unwrap_or_default(), node.to_owned()));
        }
        features.begin(pods);
        let (begun, client) = (Instant::now(), self.ground.cluster().client());
        loop {
            let lacking = features::lacking(&self.world, &client).await?;
            if lacking.is_empty() {
                features.settles();
                return Ok(());
            }
            if begun.elapsed() > self.world.bounds.converge {
                let invariant = "the first pods get what their classes ask for";
                self.world.log.find(invariant, lacking.join("; "));
                return Ok(());
            }
            sleep(AGAIN).await;
        }
    }

    /// Lets a class say what a number decides, if it may change now.
    pub(super) async fn change_feature(&self, class: usize, number: u64) -> Result<()> {
        if !self.world.features.may_change(class) {
            return Ok(());
        }
        let changed = self.write_feature(class, number).await;
        if let Err(error) = &changed {
            // What it says now is not known.
            let text = format!("change {}: {error}", features::name_of(class));
            self.world.log.break_off(text);
        }
        changed
    }

    async fn write_feature(&self, class: usize, number: u64) -> Result<()> {
        let features = &self.world.features;
        // Whoever else lists its Secret may take it while a class is absent.
        let number = match features.is_contested(class) {
            true => number & !ANEW,
            false => number,
        };
        // Its Secrets and its versions go on from what there was, whatever happens meanwhile.
        features.becomes(class, number);
        let name = features::name_of(class);
        let object = features::class(class, number, features.waits());
        let of_kind = classes(&self.ground.cluster().client(), self.namespace.name());
        if number & ANEW != 0 {
            let deleted = of_kind.delete(name, &DeleteParams::default()).await;
            unless_absent(deleted, "delete a class")?;
            sleep(number % ABSENT).await;
            return self.namespace.apply(&object.to_string()).await.map(drop);
        }
        let patch = Patch::Merge(json!({"spec": object["spec"]}));
        let patched = of_kind.patch(name, &PatchParams::default(), &patch).await;
        patched
            .map(drop)
            .map_err(api(format!("change class {name}")))
    }

    /// Changes the content of a file that is mounted with `subPath`, now that its pod can be told.
    pub(in super::super) async fn touch_features(&self) -> Result<()> {
        let number = self.world.features.number(NUMBERED);
        self.change_feature(NUMBERED, (number & !ANEW) ^ 1).await
    }
}
