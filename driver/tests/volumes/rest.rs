//! Checks what kubelet's looks at published volumes cost while nothing changes, and that a change is
//! noticed all the same.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use driver::cluster::interval::Intervals;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::{Answer, Class, Volume, World, alone, class};

const CLASSES: usize = 4;
const VOLUMES: usize = 200;
const ROUNDS: usize = 4;
const FLAGS: [&str; 3] = [
    "--enable-secret-rotation",
    "--rotation-poll-interval=10s",
    "--sync-interval=2s",
];
/// The planned time between two reads of a class with these flags.
const BETWEEN_READS: Duration = Duration::from_secs(10);
/// A time between two looks at a volume that counts as kubelet's own with these flags.
const BETWEEN_LOOKS: Duration = Duration::from_secs(8);

/// Looks at all volumes, one after the other.
async fn look_at(world: &World, volumes: &[Volume]) {
    let mut kubelet = world.client().await;
    for volume in volumes {
        kubelet.node_publish_volume(volume.request()).await.unwrap();
    }
}

#[test]
fn all_volumes_of_a_class_share_its_reads_and_a_touched_pod_has_its_own() {
    alone(async {
        let intervals = Intervals {
            refresh: BETWEEN_READS,
            least: Duration::ZERO,
            sync: Duration::from_secs(2),
        };
        assert_eq!(intervals.between_reads(None), BETWEEN_READS);
        let mut world = World::start(&FLAGS).await;
        let name = |number: usize| format!("class-{}", number % CLASSES);
        for number in 0..CLASSES {
            let name = name(number);
            world.api.class_is(&name, [Class::Is(class(&name, 1))]);
            world.provider.answers(&name, Answer::file("pw", "one"));
        }
        let volumes: Vec<Volume> = (0..VOLUMES).map(|n| world.volume(&name(n))).collect();
        look_at(&world, &volumes).await;

        world.api.class_reads();
        world.provider.asked();
        let started = Instant::now();
        for _ in 0..ROUNDS {
            tokio::time::sleep(BETWEEN_LOOKS).await;
            look_at(&world, &volumes).await;
        }
        let most = started.elapsed().as_secs() / BETWEEN_READS.as_secs() + 1;
        let reads = world.api.class_reads();
        for number in 0..CLASSES {
            let reads = reads.get(&name(number)).copied().unwrap_or_default();
            assert!(1 <= reads && reads as u64 <= most, "{reads} of {most}");
        }
        // Refreshes share them as well.
        assert!(world.provider.asked().len() >= VOLUMES);

        let [first, .., last] = volumes.as_slice() else {
            unreachable!()
        };
        for touched in [first, last] {
            let name = &touched.class;
            world.api.class_is(name, [Class::Is(class(name, 2))]);
            world.provider.answers(name, Answer::file("pw", "two"));
            look_at(&world, std::slice::from_ref(touched)).await;
            assert_eq!(touched.reads()["pw"], "two");
        }
        // What one has found, the others need not ask for.
        tokio::time::sleep(BETWEEN_READS / 2).await;
        look_at(&world, &volumes).await;
        for volume in &volumes {
            let is_edited = [&first.class, &last.class].contains(&&volume.class);
            let content = if is_edited { "two" } else { "one" };
            assert_eq!(volume.reads()["pw"], content);
        }
    });
}

/// Dashboards show calls that did something: a look is none, and a refresh is one.
#[test]
fn looks_are_not_counted() {
    alone(async {
        let address = {
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap()
        };
        let metrics = format!("--metrics-addr={address}");
        let mut world = World::start(&[&FLAGS[..], &[metrics.as_str()]].concat()).await;
        let volume = world.volume_of_its_own();
        world.publish_patiently(&volume).await.unwrap();
        let counted = async || {
            let mut page = String::new();
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            stream.read_to_string(&mut page).await.unwrap();
            let lines = page.lines().filter(|line| line.contains("publish"));
            let counters = lines.filter(|line| !line.starts_with('#') && line.contains("_total"));
            counters.map(str::to_owned).collect::<Vec<_>>()
        };
        let before = counted().await;
        assert_eq!(before.len(), 1, "{before:?}");
        assert!(before[0].starts_with("node_publish_total{"), "{before:?}");
        assert!(before[0].ends_with(" 1"), "{before:?}");
        for _ in 0..5 {
            world.publish_patiently(&volume).await.unwrap();
        }
        assert_eq!(counted().await, before);
        world.provider.asked();
        let started = Instant::now();
        while world.provider.asked().is_empty() {
            assert!(started.elapsed() < BETWEEN_READS * 6, "it is not refreshed");
            tokio::time::sleep(BETWEEN_READS / 10).await;
            world.publish_patiently(&volume).await.unwrap();
        }
        let refreshed = before[0].replace(" 1", " 2");
        assert_eq!(counted().await, [refreshed]);
    });
}

/// A class that is deleted, or made anew, is noticed by looks that ask nobody, within the time between
/// two reads.
#[test]
fn a_class_that_is_deleted_or_made_anew_is_noticed() {
    alone(async {
        let mut world = World::start(&[&FLAGS[..], &["--republish-errors=surface"]].concat()).await;
        let volume = world.volume_of_its_own();
        let name = volume.class.clone();
        world.publish_patiently(&volume).await.unwrap();
        let anew = {
            let mut class = class(&name, 1);
            class["metadata"]["uid"] = "another".into();
            class["metadata"]["resourceVersion"] = "100".into();
            class
        };
        world.provider.answers(&name, Answer::file("pw", "two"));
        for (state, fails) in [(Class::Refused(404), true), (Class::Is(anew), false)] {
            world.api.class_is(&name, [state]);
            let changed = Instant::now();
            loop {
                tokio::time::sleep(BETWEEN_READS * 3 / 5).await;
                if world.publish_patiently(&volume).await.is_err() == fails {
                    break;
                }
                let within = 2 * BETWEEN_READS + Duration::from_secs(30);
                assert!(changed.elapsed() < within, "not noticed");
            }
        }
        assert_eq!(volume.reads()["pw"], "two");
    });
}

/// What an API server does that is in trouble.
#[derive(Debug, Clone, Copy)]
enum Trouble {
    Silent,
    Refusing,
    /// Longer than a look waits.
    Slow(Duration),
}

#[test]
fn looks_do_not_wait_for_an_api_server_in_trouble() {
    alone(async {
        tokio::join!(
            do_not_wait(Trouble::Silent),
            do_not_wait(Trouble::Refusing),
            do_not_wait(Trouble::Slow(Duration::from_secs(3))),
        );
    });
}

/// Checks that kubelet's looks at volumes that are not due do not wait for an API server in trouble, and
/// that an edit is noticed once it can be read.
async fn do_not_wait(trouble: Trouble) {
    // More than half of the seven intervals between two reads.
    let between_looks = Duration::from_secs(4);
    let flags = [
        "--enable-secret-rotation",
        "--rotation-poll-interval=1h",
        "--sync-interval=1s",
    ];
    let mut world = World::start(&flags).await;
    let edited = class("db", 2);
    world.api.class_is("db", [Class::Is(class("db", 1))]);
    world.provider.answers("db", Answer::file("pw", "one"));
    let volumes: Vec<Volume> = (0..20).map(|_| world.volume("db")).collect();
    look_at(&world, &volumes).await;

    world.provider.answers("db", Answer::file("pw", "two"));
    let answer = match trouble {
        Trouble::Silent => Class::Held,
        Trouble::Refusing => Class::Refused(503),
        Trouble::Slow(time) => Class::Late(time, edited.clone()),
    };
    world.api.class_is("db", [answer]);
    // Until what is remembered of the class is too old.
    tokio::time::sleep(between_looks * 3).await;
    for _ in 0..2 {
        for volume in &volumes {
            let started = Instant::now();
            look_at(&world, std::slice::from_ref(volume)).await;
            let took = started.elapsed();
            // A read of the class takes up to 15 s.
            assert!(took < Duration::from_secs(8), "{took:?}");
        }
        tokio::time::sleep(between_looks).await;
    }
    if !matches!(trouble, Trouble::Slow(_)) {
        world.api.class_is("db", [Class::Is(edited)]);
    }
    let ended = Instant::now();
    while volumes.iter().any(|volume| volume.reads()["pw"] == "one") {
        assert!(
            ended.elapsed() < Duration::from_secs(120),
            "an edit is not noticed"
        );
        tokio::time::sleep(between_looks).await;
        look_at(&world, &volumes).await;
    }
}
