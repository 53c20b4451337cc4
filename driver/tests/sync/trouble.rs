//! Checks that a pod status says which Secrets are not in step, for as long as they are not.

use driver::sync::Options;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use crate::{
    Api, EVERY, class, options, put_status, run, start, sync, sync_of, until, volume,
    volumes::is_alone,
};

const STATUS: &str = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/web-shop-db";

fn entry(secret: &str, object: &str) -> Value {
    json!({"secretName": secret, "type": "Opaque", "data": [{"objectName": object, "key": "pw"}]})
}

/// Puts the pod status of a volume as the API server has it; without a version, it takes no update.
fn put_versioned_status(api: &Api, web: &driver::record::Record) {
    put_status(api, web);
    let mut status = api.get(STATUS).unwrap();
    status["metadata"]["resourceVersion"] = json!("1");
    api.put(STATUS, status);
}

/// Returns what an annotation of the pod status says.
fn said(api: &Api, name: &str) -> Option<String> {
    let status = api.get(STATUS).unwrap();
    let key = format!("secrets-store.csi.k8s.io/secrets-out-of-step-{name}");
    let value = status["metadata"]["annotations"][key].as_str();
    value.map(str::to_owned)
}

#[tokio::test]
async fn a_secret_that_is_not_in_step_stands_on_the_pod_status() {
    let (dir, api, cluster) = start!();
    let wrong = json!([
        entry("creds", "pw"),
        entry("other", "absent"),
        entry("third", "absent"),
        entry("", "pw"),
    ]);
    let class = class(&api, &cluster, wrong).await;
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let web = volume(dir.path(), "web");
    put_versioned_status(&api, &web);
    let said = |name: &str| said(&api, name);
    let first = sync(dir.path(), &cluster, EVERY);
    first.volume_mounted(&web, &class).await.unwrap();
    let stop = run(&first);
    until("the trouble is told", || said("since").is_some()).await;
    until("both are told", || {
        let why = said("reason").unwrap_or_default();
        let lines: Vec<&str> = why.split('\n').collect();
        lines.len() == 3
            && lines[0].starts_with("SecretProviderClass db: an entry of secretObjects has no")
            && lines[1].starts_with("SecretProviderClass db, Secret other: ")
            && lines[2].starts_with("SecretProviderClass db, Secret third: ")
            && lines[1..].iter().all(|line| line.contains("absent"))
    })
    .await;
    let since = said("since");
    assert!(!said("reason").unwrap().contains("hunter2"));
    api.requests();
    // The class is read again meanwhile.
    tokio::time::sleep(EVERY * 15).await;
    assert!(api.count("GET /apis") > 0, "the class was not read");
    assert_eq!(api.count("PUT /apis"), 0, "written at rest");
    stop.cancel();

    // A driver that starts again finds the trouble, and its beginning.
    let again = sync(dir.path(), &cluster, EVERY);
    let stop = run(&again);
    until("it has checked", || api.count("/secrets/creds") > 3).await;
    assert_eq!(said("since"), since);

    // The class makes less, and what it makes is in step.
    api.put_class(&json!([entry("creds", "pw"), entry("third", "pw")]), "2");
    until("the trouble is over", || said("since").is_none()).await;
    assert_eq!(said("reason"), None);
    stop.cancel();
}

/// What is wrong with a Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// Somebody else has made a Secret of its name.
    Unmanaged,
    /// The class takes an object that the volume does not have: one of two.
    Absent(u8),
    /// The class gives it a name that is none.
    Misnamed,
}

fn kind(random: &mut StdRng) -> Wrong {
    match random.random_range(0..6) {
        0..3 => Wrong::Nothing,
        3 => Wrong::Unmanaged,
        4 => Wrong::Absent(random.random_range(0..2)),
        _ => Wrong::Misnamed,
    }
}

/// Makes the cluster one in which exactly these Secrets are wrong.
fn make(api: &Api, wrongs: &[Wrong], version: usize) {
    let mut entries = Vec::new();
    for (number, wrong) in wrongs.iter().enumerate() {
        // Their order is not that of the alphabet.
        let name = format!("s-{}", 9 - number);
        let path = format!("/api/v1/namespaces/shop/secrets/{name}");
        let is_theirs = api
            .get(&path)
            .is_some_and(|secret| secret["data"]["theirs"].is_string());
        if *wrong == Wrong::Unmanaged {
            let metadata = json!({"name": name, "uid": "theirs", "resourceVersion": "1"});
            let data = json!({"theirs": "eA=="});
            api.put(
                &path,
                json!({"metadata": metadata, "type": "Opaque", "data": data}),
            );
        } else if is_theirs {
            api.remove(&path);
        }
        entries.push(match wrong {
            Wrong::Nothing | Wrong::Unmanaged => entry(&name, "pw"),
            Wrong::Absent(which) => entry(&name, &format!("absent-{which}")),
            Wrong::Misnamed => entry(&format!("s_{}", 9 - number), "pw"),
        });
    }
    api.put_class(&json!(entries), &version.to_string());
}

/// Returns whether a reason names exactly the Secrets that are wrong, each with its cause.
fn names(reason: Option<&str>, wrongs: &[Wrong]) -> bool {
    let wrong: Vec<_> = wrongs.iter().enumerate().collect();
    let wrong: Vec<_> = wrong
        .iter()
        .filter(|(_, wrong)| **wrong != Wrong::Nothing)
        .collect();
    let Some(reason) = reason else {
        return wrong.is_empty();
    };
    let lines: Vec<&str> = reason.split('\n').collect();
    let rest = wrong.len().saturating_sub(5);
    let (named, more) = lines.split_at(lines.len().min(5));
    let is_named = |(line, (number, wrong)): (&&str, &&(usize, &Wrong))| {
        let of = |cause: &str| {
            let start = format!("SecretProviderClass db, Secret s-{}: ", 9 - number);
            line.starts_with(&start) && line.contains(cause)
        };
        match wrong {
            Wrong::Nothing => false,
            Wrong::Unmanaged => of("the driver did not make"),
            Wrong::Absent(which) => of(&format!("absent-{which}")),
            Wrong::Misnamed => line.contains(&format!("\"s_{}\" cannot be", 9 - number)),
        }
    };
    named.len() == wrong.len().min(5)
        && named.iter().zip(&wrong).all(is_named)
        && match rest {
            0 => more.is_empty(),
            _ => more == [format!("and {rest} more")],
        }
}

/// Whichever Secrets of a class are wrong, and whichever of them get well or wrong in another way in
/// whichever order: the pod status soon names those that are wrong now, and no other.
#[tokio::test]
async fn the_reason_follows_what_is_wrong_now() {
    if !is_alone() {
        return;
    }
    for seed in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let (api, cluster) = Api::start(dir.path()).await;
        let mut random = StdRng::seed_from_u64(seed);
        let mut wrongs: Vec<_> = (0..random.random_range(2..9))
            .map(|_| kind(&mut random))
            .collect();
        make(&api, &wrongs, 1);
        let class = cluster.class("shop", "db").await.unwrap();
        api.pod("web", Some(("ReplicaSet", "rs")), "Running");
        let web = volume(dir.path(), "web");
        put_versioned_status(&api, &web);
        // No object of an edited class is on its way.
        let options = Options {
            refreshes: false,
            ..options(EVERY)
        };
        let sync = sync_of(dir.path(), &cluster, options);
        sync.volume_mounted(&web, &class).await.unwrap();
        let stop = run(&sync);
        let mut history = vec![wrongs.clone()];
        for step in 2..6 {
            let case = format!("seed {seed}: {history:?}");
            until(&case, || names(said(&api, "reason").as_deref(), &wrongs)).await;
            let is_wrong = |wrongs: &[Wrong]| wrongs.iter().any(|wrong| *wrong != Wrong::Nothing);
            assert_eq!(said(&api, "since").is_some(), is_wrong(&wrongs), "{case}");
            assert!(!said(&api, "reason").unwrap_or_default().contains("hunter2"));
            let since = said(&api, "since");
            let before = wrongs.clone();
            for _ in 0..random.random_range(1..3) {
                let which = random.random_range(0..wrongs.len());
                wrongs[which] = kind(&mut random);
            }
            make(&api, &wrongs, step);
            history.push(wrongs.clone());
            let lasts = before
                .iter()
                .zip(&wrongs)
                .any(|(before, now)| *before != Wrong::Nothing && before == now);
            if lasts {
                let case = format!("seed {seed}: {history:?}");
                until(&case, || names(said(&api, "reason").as_deref(), &wrongs)).await;
                assert_eq!(said(&api, "since"), since, "{case}");
            }
        }
        stop.cancel();
        crate::take_down(dir.path(), &web);
    }
}
