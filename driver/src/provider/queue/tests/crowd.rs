//! Simulates namespaces that share a store that hangs. Their calls are repeated as kubelet does.

use super::*;
use rstest::rstest;
use tokio::{
    task::JoinSet,
    time::{sleep, sleep_until, timeout_at},
};

const MOST: usize = 16;
/// The time that kubelet waits for a publish.
const KUBELET_WAITS: Duration = Duration::from_secs(110);
const SECOND: Duration = Duration::from_secs(1);

/// Waits for a place as a call to a provider does, and presses once a second.
async fn turn(queue: &Arc<Queue>, class: &ClassName, deadline: Instant) -> Option<Place> {
    let mut entering = std::pin::pin!(queue.enter(class, Urgency::FirstMount));
    loop {
        tokio::select! {
            biased;
            place = &mut entering => return Some(place),
            () = sleep_until(deadline) => return None,
            () = sleep(SECOND) => queue.press(class, Urgency::FirstMount),
        }
    }
}

/// The times at which the calls of each class began.
type Probes = Arc<Mutex<HashMap<ClassName, Vec<Instant>>>>;

/// Calls a store that never answers, in a loop.
async fn hang(queue: Arc<Queue>, class: ClassName, probes: Probes) {
    loop {
        let deadline = Instant::now() + KUBELET_WAITS;
        let Some(place) = turn(&queue, &class, deadline).await else {
            continue;
        };
        assert!(queue.ahead_of(&class).in_flight <= MOST);
        let now = Instant::now();
        probes
            .lock()
            .unwrap()
            .entry(class.clone())
            .or_default()
            .push(now);
        let _ = timeout_at(deadline, place.has_to_give_way()).await;
        place.ended(Ending::Silent);
    }
}

/// A crowd of classes that hang.
struct Crowd {
    queue: Arc<Queue>,
    probes: Probes,
    _tasks: JoinSet<()>,
}

impl Crowd {
    /// Starts the calls of the classes, which were `answered` before or are new.
    async fn new(namespaces: usize, classes: usize, answered: bool) -> Self {
        let queue = Queue::new(MOST);
        let probes = Probes::default();
        let mut tasks = JoinSet::new();
        let mut names = Vec::new();
        for class in 0..classes {
            for namespace in 0..namespaces {
                names.push(class_of(&format!("n{namespace}"), &format!("c{class}")));
            }
        }
        if answered {
            for class in &names {
                make_trusted(&queue, class);
            }
        }
        sleep(SECOND).await;
        make_trusted(&queue, &class_of("ok", "good"));
        for class in names {
            tasks.spawn(hang(Arc::clone(&queue), class, Arc::clone(&probes)));
        }
        sleep(Duration::from_millis(1)).await;
        Self {
            queue,
            probes,
            _tasks: tasks,
        }
    }

    /// Calls for the time `during` as a class that is answered at once, and returns its longest wait.
    async fn longest_wait(&self, class: &ClassName, during: Duration) -> Duration {
        let until = Instant::now() + during;
        let mut longest = Duration::ZERO;
        while Instant::now() < until {
            let asked = Instant::now();
            let place = turn(&self.queue, class, asked + KUBELET_WAITS).await;
            longest = longest.max(asked.elapsed());
            sleep(Duration::from_millis(50)).await;
            if let Some(place) = place {
                place.ended(Ending::Answered);
            }
            sleep(Duration::from_millis(730)).await;
        }
        longest
    }
}

/// A class whose last call was answered gets its place soon, however many namespaces hang, and
/// whether their classes were answered before or not.
#[rstest]
#[tokio::test(start_paused = true)]
async fn a_crowd_that_hangs_keeps_no_answered_class_waiting(
    #[values((5, 1), (20, 3), (80, 1), (60, 3))] (namespaces, classes): (usize, usize),
    #[values(false, true)] answered: bool,
) {
    let crowd = Crowd::new(namespaces, classes, answered).await;
    let good = class_of("ok", "good");
    let longest = crowd.longest_wait(&good, Duration::from_secs(120)).await;
    // Classes that were answered fill all places until they are known to hang.
    let bound = if answered { 15 * SECOND } else { SECOND };
    assert!(longest <= bound, "{longest:?}");
}

/// A class that was never seen gets its first place soon, in a namespace that has other classes or
/// none.
#[rstest]
#[tokio::test(start_paused = true)]
async fn a_crowd_that_hangs_keeps_no_new_class_waiting(
    #[values((5, 3), (20, 3), (60, 1))] (namespaces, classes): (usize, usize),
    #[values("new", "n0")] namespace: &str,
) {
    let crowd = Crowd::new(namespaces, classes, false).await;
    // Until each class of the crowd was tried once, all are as new as this one.
    let all = namespaces * classes;
    while crowd.probes.lock().unwrap().len() < all {
        sleep(SECOND).await;
    }
    sleep(HANGS).await;
    for class in 0..5 {
        let new = class_of(namespace, &format!("never-seen-{class}"));
        let longest = crowd.longest_wait(&new, SECOND).await;
        assert!(longest <= 30 * SECOND, "{longest:?}");
    }
}

/// Classes that hang are tried again while healthy classes keep the provider busy, so that they
/// recover when their store is back.
#[rstest]
#[tokio::test(start_paused = true)]
async fn each_class_of_a_crowd_that_hangs_is_tried_again(
    #[values((5, 1), (20, 1), (40, 1))] crowd: (usize, usize),
    #[values(0, 20)] busy: usize,
) {
    let (namespaces, classes) = crowd;
    let crowd = Crowd::new(namespaces, classes, false).await;
    let mut healthy = JoinSet::new();
    for namespace in 0..busy {
        let class = class_of(&format!("busy{namespace}"), "db");
        make_known(&crowd.queue, &class, Standing::Answered);
        let queue = Arc::clone(&crowd.queue);
        healthy.spawn(async move {
            loop {
                let place = turn(&queue, &class, Instant::now() + KUBELET_WAITS).await;
                sleep(SECOND).await;
                place.expect("a place within 110 s").ended(Ending::Answered);
            }
        });
    }
    let start = Instant::now();
    let all = u32::try_from(namespaces * classes).unwrap();
    // A call that does not have to give way lasts until kubelet gives up. Alone, the classes have
    // half of the places for 30 s each, and always an eighth.
    let places = if busy == 0 { 8 } else { 2 };
    let round = Duration::from_secs(115) + Duration::from_secs(35) * all / places;
    sleep(round + round / 2).await;
    let probes = crowd.probes.lock().unwrap();
    assert_eq!(probes.len(), namespaces * classes);
    for (class, at) in probes.iter() {
        let mut last = start;
        for at in at.iter().copied().chain([Instant::now()]) {
            let gap = at.saturating_duration_since(last);
            assert!(gap <= round, "{class:?}: {gap:?} of {round:?}");
            last = last.max(at);
        }
    }
}
