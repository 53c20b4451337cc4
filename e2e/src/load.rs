//! Load with bounds: storms of publishes and rotations, large answers, and a provider that does not
//! answer some of its callers, on the release build of the driver in an embedded cluster.

use std::time::{Duration, Instant};

use kube::api::ListParams;
use serde_json::{Value, json};

use crate::bench::{Bench, REFRESH, Table, Volume, built, class, failed, percentile, rotating};
use crate::cluster::{Cluster as _, Component, Result, api};
use crate::embedded::Embedded;
use crate::install::pod_statuses;

/// The bounds of the time of a publish, in milliseconds. kubelet waits 120 s.
const LONGEST: f64 = 10_000.0;
const LONGEST_OF_LARGE: f64 = 60_000.0;
/// The bounds of the driver's memory in MiB. Large answers may have --provider-max-bytes beside it,
/// and what a message of that size takes while it is decoded.
const MEMORY: f64 = 24.0;
const MEMORY_OF_LARGE: f64 = 64.0 + MEMORY;

/// Puts load on the driver, with so many rotations of 200 volumes, and prints a table with the
/// bounds.
///
/// # Errors
/// When a call fails, a volume has not the newest content, or a value exceeds its bound.
pub async fn run(rotations: usize) -> Result<()> {
    let binaries = built().await?;
    let flags = ["--max-call-recv-msg-size=33554432"];
    let cluster = Embedded::start(rotating(&binaries, &flags)?).await?;
    let load = Load {
        bench: Bench::prepare(&cluster).await?,
        table: Table::default(),
    };
    load.run(rotations).await
}

struct Load<'a> {
    bench: Bench<'a>,
    table: Table,
}

impl Load<'_> {
    async fn run(mut self, rotations: usize) -> Result<()> {
        let objects: Vec<Value> = (0..20)
            .map(|n| json!({"objectName": format!("object-{n}"), "contentSize": 4096}))
            .collect();
        self.storm("110 pods of 20 objects at once", &objects, 110, 110)
            .await?;
        let two = [
            json!({"objectName": "one", "contentSize": 16384}),
            json!({"objectName": "two", "contentSize": 16384}),
        ];
        self.storm("1,000 publishes at concurrency 100", &two, 1000, 100)
            .await?;
        self.rotations(rotations).await?;
        self.large_answers().await?;
        self.beside_hanging_calls().await?;
        self.table.print();
        self.table.verdict()
    }

    /// Publishes many volumes at once.
    async fn storm(
        &mut self,
        what: &str,
        objects: &[Value],
        count: usize,
        at_once: usize,
    ) -> Result<()> {
        let name = format!("storm-{count}");
        self.apply(&name, objects, &json!({})).await?;
        let volumes = self.bench.volumes(&name, &name, count).await?;
        self.publish(what, &volumes, at_once, LONGEST, MEMORY)
            .await?;
        self.bench.unpublish_all(&volumes).await
    }

    /// Changes the content of 200 volumes, again and again.
    async fn rotations(&mut self, rotations: usize) -> Result<()> {
        const VOLUMES: usize = 200;
        let objects = [json!({"objectName": "rotated"})];
        self.set("rotated", "0").await?;
        self.apply("rotated", &objects, &json!({})).await?;
        let volumes = self.bench.volumes("rotated", "rotated", VOLUMES).await?;
        self.bench.publish_all(&volumes, 50).await?;
        self.bench.forget_peak()?;
        let (started, mut latencies) = (Instant::now(), Vec::new());
        for rotation in 1..=rotations {
            let version = rotation.to_string();
            self.set("rotated", &version).await?;
            let asked = json!({REFRESH: version});
            self.apply("rotated", &objects, &asked).await?;
            latencies.extend(self.bench.publish_all(&volumes, 50).await?);
            self.check_versions("rotated", &version, VOLUMES).await?;
        }
        latencies.sort_by(f64::total_cmp);
        let what = format!("{rotations} rotations of {VOLUMES} volumes");
        self.table
            .note(&format!("{what}, s"), started.elapsed().as_secs_f64());
        let (p99, peak) = (percentile(&latencies, 99), self.bench.peak()?);
        self.table
            .at_most(&format!("{what}: p99, ms"), p99, LONGEST);
        self.table
            .at_most(&format!("{what}: peak VmRSS, MiB"), peak, MEMORY);
        self.bench.unpublish_all(&volumes).await
    }

    /// Publishes volumes whose answers have 16 MiB, 32 at once.
    async fn large_answers(&mut self) -> Result<()> {
        const SIZE: usize = 16 * 1024 * 1024 - 4096;
        let objects = [json!({"objectName": "large", "contentSize": SIZE})];
        self.apply("large", &objects, &json!({})).await?;
        let volumes = self.bench.volumes("large", "large", 32).await?;
        let what = "32 answers of 16 MiB at once";
        self.publish(what, &volumes, 32, LONGEST_OF_LARGE, MEMORY_OF_LARGE)
            .await?;
        self.bench.unpublish_all(&volumes).await
    }

    /// Publishes volumes while the same provider does not answer those of another namespace.
    async fn beside_hanging_calls(&mut self) -> Result<()> {
        let other = Bench::prepare(self.bench.cluster).await?;
        let parameters = json!({
            "objects": "array:\n- {objectName: one, contentSize: 16}\n",
            "faults": "- {hang: true}\n",
        });
        let hanging = class("hanging", &parameters, &json!({}));
        other.namespace.apply(&hanging.to_string()).await?;
        let stuck = other.volumes("hanging", "hanging", 50).await?;
        let stuck = other.publish_in_background(&stuck);
        tokio::time::sleep(Duration::from_secs(2)).await;

        let objects = [json!({"objectName": "one", "contentSize": 4096})];
        self.apply("beside", &objects, &json!({})).await?;
        let volumes = self.bench.volumes("beside", "beside", 200).await?;
        let what = "200 publishes beside 50 that hang";
        self.publish(what, &volumes, 50, LONGEST, MEMORY).await?;
        if stuck.is_empty() {
            return Err(failed(what, &"no call hung"));
        }
        drop(stuck);
        self.bench.unpublish_all(&volumes).await
    }

    /// Publishes volumes and adds the time, the rate and the memory to the table.
    async fn publish(
        &mut self,
        what: &str,
        volumes: &[Volume],
        at_once: usize,
        longest: f64,
        memory: f64,
    ) -> Result<()> {
        self.bench.forget_peak()?;
        let started = Instant::now();
        let latencies = self.bench.publish_all(volumes, at_once).await?;
        let took = started.elapsed().as_secs_f64();
        let table = &mut self.table;
        table.note(&format!("{what}, s"), took);
        table.note(&format!("{what}: p50, ms"), percentile(&latencies, 50));
        table.at_most(
            &format!("{what}: p99, ms"),
            percentile(&latencies, 99),
            longest,
        );
        table.at_most(
            &format!("{what}: peak VmRSS, MiB"),
            self.bench.peak()?,
            memory,
        );
        Ok(())
    }

    async fn apply(&self, name: &str, objects: &[Value], annotations: &Value) -> Result<()> {
        let objects: Vec<String> = objects
            .iter()
            .map(|object| format!("- {object}\n"))
            .collect();
        let parameters = json!({"objects": format!("array:\n{}", objects.concat())});
        let class = class(name, &parameters, annotations);
        self.bench
            .namespace
            .apply(&class.to_string())
            .await
            .map(drop)
    }

    /// Sets an object of the provider, whose content is its version.
    async fn set(&self, name: &str, version: &str) -> Result<()> {
        let cluster = self.bench.cluster;
        let node = cluster.nodes().remove(0);
        let provider = Component::Provider("fake-provider".to_owned());
        let path = format!("/objects?name={name}&content={version}&version={version}");
        cluster.get(&node, &provider, 8080, &path).await.map(drop)
    }

    /// Checks that the pod statuses of a class have the newest version.
    async fn check_versions(&self, class: &str, version: &str, count: usize) -> Result<()> {
        let statuses = pod_statuses(&self.bench.cluster.client(), self.bench.namespace.name());
        let listed = statuses.list(&ListParams::default()).await;
        let listed = listed.map_err(api("list pod statuses".to_owned()))?;
        let of_class = listed
            .iter()
            .filter(|status| status.data["status"]["secretProviderClassName"] == class);
        let newest = of_class.filter(|status| {
            let objects = status.data["status"]["objects"].as_array();
            objects.is_some_and(|objects| objects.iter().all(|object| object["version"] == version))
        });
        match newest.count() {
            newest if newest == count => Ok(()),
            newest => Err(failed(
                "rotation",
                &format!("{newest} of {count} volumes have version {version}"),
            )),
        }
    }
}
