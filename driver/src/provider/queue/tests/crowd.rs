//! Many namespaces share a store that hangs; their calls are tried again as kubelet does.

use super::*;
use rstest::rstest;
use tokio::{
    task::JoinSet,
    time::{sleep, sleep_until, timeout_at},
};

const MOST: usize = 16;
/// How long kubelet waits for a publish.
const KUBELET_WAITS: Duration = Duration::from_secs(110);
const SECOND: Duration = Duration::from_secs(1);

/// Waits for a place as a call to a provider does, pressing once a second.
async fn turn(queue: &Arc<Queue>, owner: &Owner, deadline: Instant) -> Option<Place> {
    let mut entering = std::pin::pin!(queue.enter(owner, Urgency::FirstMount));
    loop {
        tokio::select! {
            biased;
            place = &mut entering => return Some(place),
            () = sleep_until(deadline) => return None,
            () = sleep(SECOND) => queue.press(owner, Urgency::FirstMount),
        }
    }
}

/// When the calls of a class began.
type Probes = Arc<Mutex<HashMap<Owner, Vec<Instant>>>>;

/// Calls a store that never answers, again and again.
async fn hang(queue: Arc<Queue>, owner: Owner, probes: Probes) {
    loop {
        let deadline = Instant::now() + KUBELET_WAITS;
        let Some(place) = turn(&queue, &owner, deadline).await else {
            continue;
        };
        assert!(queue.ahead_of(&owner).in_flight <= MOST);
        let now = Instant::now();
        probes
            .lock()
            .unwrap()
            .entry(owner.clone())
            .or_default()
            .push(now);
        let _ = timeout_at(deadline, place.has_to_give_way()).await;
        place.ended(Ending::Silent);
    }
}

/// A crowd of classes that hang. Were they answered before, or never seen?
struct Crowd {
    queue: Arc<Queue>,
    probes: Probes,
    _tasks: JoinSet<()>,
}

impl Crowd {
    async fn new(namespaces: usize, classes: usize, answered: bool) -> Self {
        let queue = Queue::new(MOST);
        let probes = Probes::default();
        let mut tasks = JoinSet::new();
        let mut owners = Vec::new();
        for class in 0..classes {
            for namespace in 0..namespaces {
                owners.push(owner(&format!("n{namespace}"), &format!("c{class}")));
            }
        }
        if answered {
            for owner in &owners {
                make_trusted(&queue, owner);
            }
        }
        sleep(SECOND).await;
        make_trusted(&queue, &owner("ok", "good"));
        for owner in owners {
            tasks.spawn(hang(Arc::clone(&queue), owner, Arc::clone(&probes)));
        }
        sleep(Duration::from_millis(1)).await;
        Self {
            queue,
            probes,
            _tasks: tasks,
        }
    }

    /// The longest wait of a class that is answered at once, for so long.
    async fn longest_wait(&self, owner: &Owner, during: Duration) -> Duration {
        let until = Instant::now() + during;
        let mut longest = Duration::ZERO;
        while Instant::now() < until {
            let asked = Instant::now();
            let place = turn(&self.queue, owner, asked + KUBELET_WAITS).await;
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

/// However many namespaces hang, and whether their classes were answered before: a class whose
/// last call was answered has its place soon.
#[rstest]
#[tokio::test(start_paused = true)]
async fn a_crowd_that_hangs_keeps_no_answered_class_waiting(
    #[values((5, 1), (20, 3), (80, 1), (60, 3))] (namespaces, classes): (usize, usize),
    #[values(false, true)] answered: bool,
) {
    let crowd = Crowd::new(namespaces, classes, answered).await;
    let good = owner("ok", "good");
    let longest = crowd.longest_wait(&good, Duration::from_secs(120)).await;
    // Those that were answered fill all places until it is plain that they hang.
    let bound = if answered { 15 * SECOND } else { SECOND };
    assert!(longest <= bound, "{longest:?}");
}

/// A class that was never seen has its first place soon, in a namespace that has others or none.
#[rstest]
#[tokio::test(start_paused = true)]
async fn a_crowd_that_hangs_keeps_no_new_class_waiting(
    #[values((5, 3), (20, 3), (60, 1))] (namespaces, classes): (usize, usize),
    #[values("new", "n0")] namespace: &str,
) {
    let crowd = Crowd::new(namespaces, classes, false).await;
    // Until each class of the crowd was tried once, they are as new as the one that comes.
    let all = namespaces * classes;
    while crowd.probes.lock().unwrap().len() < all {
        sleep(SECOND).await;
    }
    sleep(HANGS).await;
    for class in 0..5 {
        let new = owner(namespace, &format!("never-seen-{class}"));
        let longest = crowd.longest_wait(&new, SECOND).await;
        assert!(longest <= 30 * SECOND, "{longest:?}");
    }
}

/// While healthy classes keep the provider busy, those that hang are tried again, so that it is
/// noticed when their store is back.
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
        let class = owner(&format!("busy{namespace}"), "db");
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
    // One that nobody presses lasts until kubelet gives up. Alone they have half of the places
    // for 30 s each, and an eighth of them in any case.
    let places = if busy == 0 { 8 } else { 2 };
    let round = Duration::from_secs(115) + Duration::from_secs(35) * all / places;
    sleep(round + round / 2).await;
    let probes = crowd.probes.lock().unwrap();
    assert_eq!(probes.len(), namespaces * classes);
    for (owner, at) in probes.iter() {
        let mut last = start;
        for at in at.iter().copied().chain([Instant::now()]) {
            let gap = at.saturating_duration_since(last);
            assert!(gap <= round, "{owner:?}: {gap:?} of {round:?}");
            last = last.max(at);
        }
    }
}
