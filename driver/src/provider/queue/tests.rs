use super::*;
use proptest::prelude::*;
use std::{future::Future, pin::Pin, task::Poll};

mod crowd;

type Entering = Pin<Box<dyn Future<Output = Place>>>;

fn class_of(namespace: &str, name: &str) -> ClassName {
    ClassName::new(namespace, name)
}

fn entering(queue: &Arc<Queue>, class: &ClassName, urgency: Urgency) -> Entering {
    let (queue, class) = (Arc::clone(queue), class.clone());
    Box::pin(async move { queue.enter(&class, urgency).await })
}

/// Returns the place if it was given. The first call enters the queue.
fn now(entering: &mut Entering) -> Option<Place> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    // A test is one poll of a task. Without `unconstrained`, its channels would use up the budget
    // that tokio gives to a poll, and wait for the next one.
    let entering = std::pin::pin!(tokio::task::unconstrained(entering.as_mut()));
    match entering.poll(&mut context) {
        Poll::Ready(place) => Some(place),
        Poll::Pending => None,
    }
}

fn enter_now(queue: &Arc<Queue>, class: &ClassName, urgency: Urgency) -> Option<Place> {
    now(&mut entering(queue, class, urgency))
}

/// Takes as many places as `class` gets.
fn all_for(queue: &Arc<Queue>, class: &ClassName, urgency: Urgency) -> Vec<Place> {
    std::iter::from_fn(|| enter_now(queue, class, urgency)).collect()
}

fn make_known(queue: &Arc<Queue>, class: &ClassName, standing: Standing) {
    let known = (standing, Instant::now());
    queue.lock().standings.insert(class.clone(), known);
}

fn make_trusted(queue: &Arc<Queue>, class: &ClassName) {
    let place = enter_now(queue, class, Urgency::FirstMount).unwrap();
    place.ended(Ending::Answered);
}

#[tokio::test(start_paused = true)]
async fn first_mounts_go_ahead_and_refreshes_are_not_starved() {
    let queue = Queue::new(1);
    let class = class_of("shop", "db");
    let mut place = queue.enter(&class, Urgency::Refresh).await;
    let mut line: Vec<(&str, Entering)> = Vec::new();
    let mut wait = |name, urgency| {
        let mut entering = entering(&queue, &class, urgency);
        assert!(now(&mut entering).is_none(), "there was room");
        line.push((name, entering));
    };
    for _ in 0..2 {
        wait("refresh", Urgency::Refresh);
    }
    for _ in 0..FIRST_MOUNTS_IN_A_ROW + 2 {
        wait("first", Urgency::FirstMount);
    }
    let mut order = Vec::new();
    while !line.is_empty() {
        drop(place);
        let (at, next) = line
            .iter_mut()
            .enumerate()
            .find_map(|(at, (_, entering))| Some((at, now(entering)?)))
            .expect("somebody's turn");
        order.push(line.remove(at).0);
        place = next;
    }
    let mut expected = vec!["first"; FIRST_MOUNTS_IN_A_ROW];
    expected.extend(["refresh", "first", "first", "refresh"]);
    assert_eq!(order, expected);
}

#[tokio::test(start_paused = true)]
async fn who_stops_waiting_has_no_place() {
    let queue = Queue::new(1);
    let class = class_of("shop", "db");
    let place = queue.enter(&class, Urgency::FirstMount).await;
    let mut gone = entering(&queue, &class, Urgency::FirstMount);
    let mut waits = entering(&queue, &class, Urgency::Refresh);
    assert!(now(&mut gone).is_none() && now(&mut waits).is_none());
    drop(gone);
    drop(place);
    let place = now(&mut waits).expect("its turn");
    // A caller that stops waiting after it was given the place.
    let mut last = entering(&queue, &class, Urgency::Refresh);
    let mut unseen = entering(&queue, &class, Urgency::FirstMount);
    assert!(now(&mut last).is_none() && now(&mut unseen).is_none());
    drop(place);
    drop(unseen);
    assert!(now(&mut last).is_some());
    assert_eq!(queue.ahead_of(&class).in_flight, 0);
}

/// The store of classes that were never answered hangs, and other classes are not affected.
#[tokio::test(start_paused = true)]
async fn classes_that_hang_from_the_start_hold_few_places() {
    let queue = Queue::new(16);
    let hung = all_for(&queue, &class_of("shop", "hung"), Urgency::FirstMount);
    assert_eq!(hung.len(), 2, "one class");
    let same_namespace = enter_now(&queue, &class_of("shop", "db"), Urgency::FirstMount);
    assert!(same_namespace.is_some(), "another class of the namespace");

    let mut held = Vec::new();
    for class in 0..100 {
        held.extend(all_for(
            &queue,
            &class_of("hostile", &format!("c{class}")),
            Urgency::FirstMount,
        ));
    }
    assert_eq!(held.len(), 4, "a namespace of a hundred classes");
    assert!(enter_now(&queue, &class_of("web", "db"), Urgency::FirstMount).is_some());
}

/// A store hangs after its class was answered, so that the class is trusted.
#[tokio::test(start_paused = true)]
async fn a_class_that_was_well_leaves_places_when_it_hangs() {
    let queue = Queue::new(16);
    let db = class_of("shop", "db");
    make_trusted(&queue, &db);
    let mut hung = all_for(&queue, &db, Urgency::FirstMount);
    assert_eq!(hung.len(), 12);
    let other_class = enter_now(&queue, &class_of("shop", "files"), Urgency::FirstMount);
    assert!(other_class.is_none(), "the namespace holds its share");
    let other = enter_now(&queue, &class_of("web", "db"), Urgency::FirstMount);
    assert!(other.is_some());

    // The other class of the namespace waits until the first one is known to hang.
    let files = class_of("shop", "files");
    let mut waits = entering(&queue, &files, Urgency::FirstMount);
    assert!(now(&mut waits).is_none());
    drop(hung.pop());
    drop(hung.pop());
    tokio::time::advance(HANGS).await;
    drop(hung.pop());
    assert!(now(&mut waits).is_some());
    // A class that hung is not trusted any more.
    drop(hung);
    assert_eq!(all_for(&queue, &db, Urgency::FirstMount).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn refreshes_leave_places_to_first_mounts() {
    for most in 1..40 {
        let queue = Queue::new(most);
        let mut refreshes = Vec::new();
        for namespace in 0..most * 2 {
            let class = class_of(&format!("n{namespace}"), "db");
            refreshes.extend(all_for(&queue, &class, Urgency::Refresh));
        }
        let (held, expected) = (refreshes.len(), (most / 2).max(1));
        assert_eq!(held, expected, "of {most}");
        let first = enter_now(&queue, &class_of("web", "db"), Urgency::FirstMount);
        assert!(first.is_some() || most == 1, "of {most}");
    }
}

/// More namespaces hang than there are places. A healthy class waits no longer than it takes to
/// notice.
#[tokio::test(start_paused = true)]
async fn calls_that_hang_give_way() {
    let queue = Queue::new(16);
    let mut hung = Vec::new();
    for namespace in 0..40 {
        let class = class_of(&format!("n{namespace}"), "hung");
        hung.extend(all_for(&queue, &class, Urgency::FirstMount));
    }
    // The other places are for classes that were answered.
    assert_eq!(hung.len(), 12);
    let well = class_of("web", "db");
    let mut waits = entering(&queue, &well, Urgency::FirstMount);
    assert!(now(&mut waits).is_none());
    queue.press(&well, Urgency::FirstMount);
    let asked = |hung: &[Place]| {
        hung.iter()
            .filter(|place| place.give_way.is_cancelled())
            .count()
    };
    assert_eq!(asked(&hung), 0, "nothing hangs yet");
    tokio::time::advance(HANGS).await;
    queue.press(&well, Urgency::FirstMount);
    assert_eq!(asked(&hung), 1);
    let at = hung.iter().position(|place| place.give_way.is_cancelled());
    let gives_way = hung.remove(at.unwrap());
    let its_class = {
        let calls = queue.lock();
        let call = calls.in_flight.iter().find(|call| call.id == gives_way.id);
        call.unwrap().class.clone()
    };
    gives_way.ended(Ending::Silent);
    assert!(now(&mut waits).is_some());
    // A class that hung makes no call give way.
    let held = all_for(&queue, &class_of("web", "db"), Urgency::FirstMount);
    queue.press(&its_class, Urgency::FirstMount);
    assert_eq!(asked(&hung), 0);
    drop(held);
}

#[derive(Debug, Clone)]
enum Step {
    Arrive {
        class: usize,
        refresh: bool,
    },
    /// Ends the call with this number, modulo the number of calls.
    End {
        which: usize,
        ending: Option<Ending>,
    },
    /// Gives up the waiting call with this number, modulo their number.
    GiveUp {
        which: usize,
    },
    Pass {
        seconds: u64,
    },
    Press {
        class: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ending = prop_oneof![
        Just(Some(Ending::Answered)),
        Just(Some(Ending::Refused)),
        Just(Some(Ending::Silent)),
        Just(Some(Ending::Lost)),
        Just(None),
    ];
    let step = prop_oneof![
        5 => (0..12_usize, any::<bool>()).prop_map(|(class, refresh)| Step::Arrive { class, refresh }),
        3 => (any::<usize>(), ending).prop_map(|(which, ending)| Step::End { which, ending }),
        1 => any::<usize>().prop_map(|which| Step::GiveUp { which }),
        1 => (0..15_u64).prop_map(|seconds| Step::Pass { seconds }),
        1 => (0..12_usize).prop_map(|class| Step::Press { class }),
    ];
    proptest::collection::vec(step, 1..120)
}

/// Returns one of twelve classes in four namespaces.
fn class(at: usize) -> ClassName {
    class_of(&format!("n{}", at % 4), &format!("c{}", at / 4))
}

proptest! {
    /// For any order of calls that come, end, hang and are given up: there are never more calls
    /// than places, no namespace holds more than its share, an answered class of a namespace that
    /// has nothing in flight always gets a place while one is free, and every call has its turn.
    #[test]
    fn places_are_shared(most in 1_usize..20, steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let queue = Queue::new(most);
            let mut waiting: Vec<Entering> = Vec::new();
            let mut places: Vec<Place> = Vec::new();
            for step in steps {
                match step {
                    Step::Arrive { class: at, refresh } => {
                        let urgency = if refresh { Urgency::Refresh } else { Urgency::FirstMount };
                        waiting.push(entering(&queue, &class(at), urgency));
                    }
                    Step::End { which, ending } if !places.is_empty() => {
                        let place = places.swap_remove(which % places.len());
                        match ending {
                            Some(ending) => place.ended(ending),
                            None => drop(place),
                        }
                    }
                    Step::GiveUp { which } if !waiting.is_empty() => {
                        drop(waiting.swap_remove(which % waiting.len()));
                    }
                    Step::Pass { seconds } => tokio::time::advance(Duration::from_secs(seconds)).await,
                    Step::Press { class: at } => queue.press(&class(at), Urgency::FirstMount),
                    Step::End { .. } | Step::GiveUp { .. } => {}
                }
                waiting.retain_mut(|entering| match now(entering) {
                    Some(place) => { places.push(place); false }
                    None => true,
                });
                check(&queue, most, places.len());
            }
            // No refresh and no class that waits is passed forever.
            let mut rounds = 0;
            while !waiting.is_empty() {
                places.pop().expect("somebody waits while nothing is in flight").ended(Ending::Answered);
                waiting.retain_mut(|entering| match now(entering) {
                    Some(place) => { places.push(place); false }
                    None => true,
                });
                rounds += 1;
                prop_assert!(rounds < 1000);
            }
            drop(places);
            prop_assert_eq!(queue.ahead_of(&class(0)).in_flight, 0);
            prop_assert!(queue.lock().first_mounts.is_empty() && queue.lock().refreshes.is_empty());
            Ok(())
        })?;
    }
}

fn check(queue: &Arc<Queue>, most: usize, held: usize) {
    let shares = Shares::of(most);
    {
        let calls = queue.lock();
        assert_eq!(calls.in_flight.len(), held);
        assert!(held <= most);
        let refreshes = calls
            .in_flight
            .iter()
            .filter(|call| call.urgency == Urgency::Refresh);
        assert!(refreshes.count() <= shares.for_refreshes);
        for at in 0..4 {
            let name = format!("n{at}");
            let held = calls
                .in_flight
                .iter()
                .filter(|call| *call.class.namespace == *name);
            assert!(held.count() <= shares.of_one());
        }
    }
    if held < most {
        let class = class_of("newcomer", "db");
        make_known(queue, &class, Standing::Answered);
        let newcomer = enter_now(queue, &class, Urgency::FirstMount);
        assert!(newcomer.is_some(), "{held} of {most} are held");
        // Forgets the newcomer.
        drop(newcomer);
        queue.lock().standings.remove(&class);
    }
}

/// A hundred calls of one namespace wait. A call of another one comes last and is among the next.
#[tokio::test(start_paused = true)]
async fn namespaces_take_turns_and_so_do_classes() {
    let queue = Queue::new(1);
    let place = queue
        .enter(&class_of("crowd", "a"), Urgency::FirstMount)
        .await;
    let mut line = Vec::new();
    let mut wait = |namespace: &'static str, class: &'static str| {
        let mut entering = entering(&queue, &class_of(namespace, class), Urgency::FirstMount);
        assert!(now(&mut entering).is_none());
        line.push((format!("{namespace}/{class}"), entering));
    };
    for _ in 0..100 {
        wait("crowd", "a");
    }
    wait("crowd", "b");
    wait("web", "db");
    place.ended(Ending::Answered);
    let mut order = Vec::new();
    while order.len() < 4 {
        let (at, place) = line
            .iter_mut()
            .enumerate()
            .find_map(|(at, (_, entering))| Some((at, now(entering)?)))
            .expect("somebody's turn");
        order.push(line.remove(at).0);
        place.ended(Ending::Answered);
    }
    assert!(order.contains(&"web/db".to_owned()), "{order:?}");
    assert!(order.contains(&"crowd/b".to_owned()), "{order:?}");
}

/// The first mounts of new classes, of a namespace that has calls in flight, leave a place that gets free to a refresh.
#[tokio::test(start_paused = true)]
async fn refreshes_have_a_part_of_the_last_places() {
    let queue = Queue::new(16);
    let class = |number: usize| class_of("crowd", &format!("c{number}"));
    let slow = class_of("slow", "db");
    (0..20).for_each(|number| make_known(&queue, &class(number), Standing::Answered));
    make_known(&queue, &slow, Standing::Answered);
    let mut held = all_for(&queue, &slow, Urgency::FirstMount);
    held.extend((0..2).filter_map(|of| enter_now(&queue, &class(of), Urgency::FirstMount)));
    assert_eq!(held.len(), 14);
    let mut waiting: Vec<Entering> = (2..20)
        .map(|number| entering(&queue, &class(number), Urgency::FirstMount))
        .collect();
    assert!(waiting.iter_mut().all(|one| now(one).is_none()));
    let mut refreshes: Vec<Entering> = (0..3)
        .map(|number| entering(&queue, &class(number), Urgency::Refresh))
        .collect();
    assert!(refreshes.iter_mut().all(|one| now(one).is_none()));
    let mut of_refreshes = Vec::new();
    for refresh in &mut refreshes[..2] {
        drop(held.pop());
        of_refreshes.push(now(refresh).expect("a refresh goes first"));
        assert!(waiting.iter_mut().all(|one| now(one).is_none()));
    }
    // They have their part now.
    drop(held.pop());
    assert!(now(&mut refreshes[2]).is_none());
    assert!(waiting.iter_mut().any(|one| now(one).is_some()));
}

proptest! {
    /// First mounts hold all that they may, more of them wait, and new ones come. A refresh of a namespace that has no
    /// call in flight waits for the end of a few calls at most, however many places there are.
    #[test]
    fn first_mounts_do_not_keep_a_refresh_waiting(
        most in 1_usize..40,
        crowd in (1_usize..5).prop_flat_map(|many| prop::collection::vec((0..many, 0_usize..6), 1..200)),
        ends in prop::collection::vec(any::<prop::sample::Index>(), 12),
    ) {
        let queue = Queue::new(most);
        let mut held = Vec::new();
        let mut waiting: Vec<Entering> = Vec::new();
        let come = |(namespace, class): (usize, usize)| {
            let class = class_of(&format!("crowd-{namespace}"), &format!("c{class}"));
            make_known(&queue, &class, Standing::Answered);
            entering(&queue, &class, Urgency::FirstMount)
        };
        waiting.extend(crowd.iter().map(|one| come(*one)));
        let settle = |waiting: &mut Vec<Entering>, held: &mut Vec<Place>| {
            waiting.retain_mut(|one| match now(one) {
                Some(place) => {
                    held.push(place);
                    false
                }
                None => true,
            });
        };
        settle(&mut waiting, &mut held);
        let good = class_of("good", "db");
        make_known(&queue, &good, Standing::Answered);
        let mut refresh = entering(&queue, &good, Urgency::Refresh);
        let mut ended = 0;
        while now(&mut refresh).is_none() {
            prop_assert!(ended <= FIRST_MOUNTS_IN_A_ROW + 1, "{ended} calls have ended, {most} places");
            prop_assert!(!held.is_empty());
            drop(held.swap_remove(ends[ended].index(held.len())));
            waiting.extend(crowd.iter().take(2).map(|one| come(*one)));
            settle(&mut waiting, &mut held);
            ended += 1;
        }
        if crowd.iter().all(|(namespace, _)| *namespace == crowd[0].0) {
            let at_most = usize::from(most == 1) * (FIRST_MOUNTS_IN_A_ROW + 1);
            prop_assert!(ended <= at_most, "{ended} calls have ended, {most} places");
        }
    }
}
