//! Tests what the Secrets of a class cost, if there are many of large objects.

use super::*;
use driver::mount::Tmpfs;

/// The number of Secrets: one less than a class may make.
const SECRETS: usize = 99;
/// The length of the object that all of them are made of.
const OBJECT: usize = 3 * 1024 * 1024;

/// Returns Secrets that are each made from one field of one large object.
fn fields_of_one_object(key: &str) -> Value {
    let secret = |number: usize| {
        json!({"secretName": format!("creds-{number}"), "type": "Opaque", "data": [
            {"objectName": "all", "key": key, "jsonKey": format!("field-{number}")},
        ]})
    };
    (0..SECRETS).map(secret).collect()
}

fn path(number: usize) -> String {
    format!("/api/v1/namespaces/shop/secrets/creds-{number}")
}

/// Returns the number of bytes that this process has read from files and sockets.
fn bytes_read() -> usize {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

/// The object is read once for all Secrets, by a publish and after a change of the class; and checks
/// do not read it while nothing changes.
#[tokio::test]
async fn objects_are_read_for_a_class_and_not_for_each_secret() {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, fields_of_one_object("k")).await;
    let every = Duration::from_secs(4);
    let sync = sync(dir.path(), &cluster, every);
    let at = target(dir.path(), "web");
    fs::create_dir_all(&at).unwrap();
    Tmpfs::bounded_by(2 * OBJECT as u64).mount(&at).unwrap();
    let fields = (0..SECRETS).map(|number| (format!("field-{number}"), json!(number.to_string())));
    let mut object: serde_json::Map<_, _> = fields.collect();
    object.insert("filler".to_owned(), json!("x".repeat(OBJECT)));
    write(&at, &[("all", &Value::from(object).to_string())]);
    let web = record(dir.path(), "web", "1");
    records(dir.path()).put(&web).unwrap();
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    put_status(&api, &web);

    let before = bytes_read();
    sync.volume_mounted(&web, &class).await.unwrap();
    let of_publish = bytes_read() - before;
    assert!(api.get(&path(SECRETS - 1)).is_some());
    assert!(of_publish < 3 * OBJECT, "{of_publish} bytes for a publish");

    let stop = run(&sync);
    api.requests();
    let before = bytes_read();
    until("each has been looked at twice", || {
        api.count("/secrets/creds-") > 2 * SECRETS
    })
    .await;
    let of_looks = bytes_read() - before;
    assert!(of_looks < 2 * OBJECT, "{of_looks} bytes for looks");

    let before = bytes_read();
    api.put_class(&fields_of_one_object("other"), "2");
    until("each has the other key", || {
        let is_new = |secret: Value| secret["data"].get("other").is_some();
        (0..SECRETS).all(|number| api.get(&path(number)).is_some_and(is_new))
    })
    .await;
    let of_change = bytes_read() - before;
    assert!(
        of_change < 6 * OBJECT,
        "{of_change} bytes for a changed class"
    );
    stop.cancel();
    drop(mount::detach(&at).unwrap());
}
