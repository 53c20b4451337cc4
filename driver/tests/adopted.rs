//! Tests that volumes are kept which another driver has published beside this one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "api/server.rs"]
mod server;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "sync/volumes.rs"]
mod volumes;

use std::{sync::Arc, time::Duration};

use driver::{
    adopted::Adoption,
    cluster::interval::Intervals,
    memory::{self, Memory},
    metrics::Metrics,
    mount::Tmpfs,
    record::Record,
    sync::{Options, SecretSync},
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const EVERY: Duration = Duration::from_millis(100);
/// The time limit for things that happen at once, on a machine that may be busy.
const SOON: Duration = Duration::from_secs(60);

/// Whatever another driver publishes and unpublishes is known as long as it is there, under any name.
#[tokio::test]
async fn what_another_driver_publishes_is_adopted_once_it_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, cluster) = server::start(dir.path()).await;
    let (records, metrics) = (volumes::records(dir.path()), Metrics::new());
    let intervals = Intervals {
        refresh: EVERY,
        least: Duration::ZERO,
        sync: EVERY,
    };
    let options = Options {
        errors_fail_publish: false,
        intervals,
        refreshes: true,
    };
    let tmpfs = Arc::new(Tmpfs::bounded_by(1));
    let sync = SecretSync::new(cluster, records.clone(), tmpfs, metrics.clone(), options);
    let sync = Arc::new(sync);
    let stop = CancellationToken::new();
    let adoption = Adoption {
        records: records.clone(),
        sync: Arc::clone(&sync),
        memory: Memory::new(memory::limit(dir.path()), 1 << 20),
        metrics: metrics.clone(),
    };
    tokio::spawn(adoption.run(EVERY, stop.clone()));
    let stays = ["csi-1", "a/b", &"x".repeat(300)];
    for (number, volume_id) in stays.iter().enumerate() {
        // One that goes at once is not adopted.
        let passing = Record {
            volume_id: format!("passing-{number}"),
            ..volumes::record(dir.path(), "passing", "0")
        };
        let record = Record {
            volume_id: (*volume_id).to_owned(),
            ..volumes::record(dir.path(), "stays", "0")
        };
        records.put(&passing).unwrap();
        records.put(&record).unwrap();
        records.remove(&passing.volume_id).unwrap();
        let adopted = async {
            while !sync.knows(volume_id) {
                sleep(EVERY / 4).await;
            }
        };
        timeout(SOON, adopted).await.unwrap();
        assert!(!sync.knows(&passing.volume_id));
        let counted = format!("state=\"fresh\"}} {}\n", number + 1);
        let text = metrics.render();
        assert!(text.contains(&counted), "{text}");
    }
    stop.cancel();
}
