use super::*;
use crate::error::Error;
use proptest::prelude::*;
use tokio::{task::JoinSet, time::sleep};

/// An API server with one class, which everybody reads at any time.
#[derive(Default)]
struct Api {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    class: Option<ClassState>,
    /// What its cache has, while that lags behind.
    cached: Option<Option<ClassState>>,
    fails: bool,
    changes: i64,
    reads: Vec<(Instant, Source)>,
}

/// Something that happens.
#[derive(Debug, Clone)]
enum Step {
    Seconds(u64),
    Edit,
    Annotate,
    Delete,
    Lag(bool),
    Fail(bool),
    Calls(Vec<Call>),
}

#[derive(Debug, Clone, Copy)]
struct Call {
    after_milliseconds: u64,
    freshness: Freshness,
    /// Whether the caller knows the newest state.
    knows: bool,
    with_parameters: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let freshness = prop_oneof![
        1 => Just(Freshness::Present),
        2 => Just(Freshness::Afresh),
        4 => (0..200_u64).prop_map(|seconds| Freshness::Within(Duration::from_secs(seconds))),
    ];
    let call = (0..500_u64, freshness, any::<bool>(), any::<bool>()).prop_map(
        |(after_milliseconds, freshness, knows, with_parameters)| Call {
            after_milliseconds,
            freshness,
            knows,
            with_parameters,
        },
    );
    let step = prop_oneof![
        4 => (0..100_u64).prop_map(Step::Seconds),
        2 => Just(Step::Edit),
        1 => Just(Step::Annotate),
        1 => Just(Step::Delete),
        1 => any::<bool>().prop_map(Step::Lag),
        1 => any::<bool>().prop_map(Step::Fail),
        6 => prop::collection::vec(call, 1..8).prop_map(Step::Calls),
    ];
    prop::collection::vec(step, 1..40)
}

impl Api {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn happens(&self, step: &Step) {
        let mut state = self.state();
        state.changes += 1;
        let version = state.changes.to_string();
        match step {
            Step::Edit => {
                let before = state.class.take();
                state.class = Some(ClassState {
                    name: "db".into(),
                    uid: before.map_or(format!("uid-{version}"), |class| class.uid),
                    generation: Some(state.changes),
                    resource_version: version,
                    annotations: [].into(),
                });
            }
            Step::Annotate => {
                if let Some(class) = &mut state.class {
                    class.resource_version = version;
                }
            }
            Step::Delete => state.class = None,
            Step::Lag(lags) => state.cached = lags.then(|| state.class.clone()),
            Step::Fail(fails) => state.fails = *fails,
            Step::Seconds(_) | Step::Calls(_) => {}
        }
    }

    /// Reads the class. The answer names the number of the read.
    async fn read(&self, source: Source) -> Result<Class> {
        let number = {
            let mut state = self.state();
            state.reads.push((Instant::now(), source));
            state.reads.len() - 1
        };
        sleep(Duration::from_millis(100)).await;
        let state = self.state();
        let class = match (source, &state.cached) {
            (Source::Cache, Some(cached)) => cached,
            _ => &state.class,
        };
        match class {
            _ if state.fails => Err(Error::unavailable(number.to_string())),
            None => Err(Error::new(Code::NotFound, number.to_string())),
            Some(class) => Ok(Class {
                identity: class.clone(),
                provider: number.to_string(),
                parameters: [("objects".to_owned(), "x".to_owned())].into(),
                secret_objects: Arc::default(),
                too_much: None,
            }),
        }
    }

    /// Calls, and checks what is returned.
    async fn call(&self, classes: &Classes, call: Call) {
        sleep(Duration::from_millis(call.after_milliseconds)).await;
        let called = Instant::now();
        let known = self.state().class.clone().filter(|_| call.knows);
        let wanted = Wanted {
            freshness: call.freshness,
            known: known.as_ref(),
            with_parameters: call.with_parameters,
        };
        let read = |source| self.read(source);
        let class = classes.get("shop", "db", &wanted, read).await;
        let number = match &class {
            Ok(class) => class.provider.clone(),
            Err(error) => error.to_string(),
        };
        let (began, source) = self.state().reads[number.parse::<usize>().unwrap()];
        let is_new = began >= called;
        match call.freshness {
            Freshness::Present => assert!(is_new && source == Source::Store),
            Freshness::Afresh => assert!(is_new),
            Freshness::Within(age) => assert!(is_new || called.duration_since(began) < age),
        }
        match &class {
            Ok(class) => {
                assert!(!call.with_parameters || !class.parameters.is_empty());
                let is_older =
                    known.is_some_and(|known| class.identity.age(&known) != Age::Current);
                assert!(!is_older || source == Source::Store);
            }
            Err(error) if error.code() == Code::NotFound => assert_eq!(source, Source::Store),
            Err(_) => assert!(is_new, "an old failure says nothing"),
        }
    }
}

pub(super) fn paused(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.unwrap().block_on(test);
}

proptest! {
    /// Whatever happens, nobody gets an answer that is older than wanted.
    #[test]
    fn answers_are_as_new_as_wanted(steps in steps()) {
        paused(async {
            let (api, classes) = (Arc::new(Api::default()), Arc::new(Classes::default()));
            for step in steps {
                match &step {
                    Step::Seconds(seconds) => sleep(Duration::from_secs(*seconds)).await,
                    Step::Calls(calls) => {
                        let before = api.state().reads.len();
                        let mut running = JoinSet::new();
                        for &call in calls {
                            let (api, classes) = (Arc::clone(&api), Arc::clone(&classes));
                            running.spawn(async move { api.call(&classes, call).await });
                        }
                        running.join_all().await;
                        let reads = api.state().reads.len() - before;
                        assert!(reads <= 2 * calls.len());
                    }
                    other => api.happens(other),
                }
            }
        });
    }
}

/// Calls at the same time send one request, or a second one for those who came during the first.
#[test]
fn callers_at_the_same_time_share_a_request() {
    paused(async {
        for freshness in [Freshness::Present, Freshness::Afresh] {
            for fails in [false, true] {
                let (api, classes) = (Arc::new(Api::default()), Arc::new(Classes::default()));
                api.happens(&Step::Edit);
                api.happens(&Step::Fail(fails));
                let mut running = JoinSet::new();
                for number in 0..50 {
                    let (api, classes) = (Arc::clone(&api), Arc::clone(&classes));
                    let call = Call {
                        after_milliseconds: number,
                        freshness,
                        knows: false,
                        with_parameters: true,
                    };
                    running.spawn(async move { api.call(&classes, call).await });
                }
                running.join_all().await;
                assert_eq!(api.state().reads.len(), 2, "{freshness:?} {fails}");
            }
        }
    });
}

/// A caller that goes away while it reads leaves the next one its turn.
#[test]
fn a_read_that_is_given_up_holds_up_nobody() {
    paused(async {
        let (api, classes) = (Api::default(), Classes::default());
        api.happens(&Step::Edit);
        let call = Call {
            after_milliseconds: 0,
            freshness: Freshness::Afresh,
            knows: false,
            with_parameters: false,
        };
        let given_up = tokio::time::timeout(Duration::from_millis(50), api.call(&classes, call));
        let (given_up, ()) = tokio::join!(given_up, api.call(&classes, call));
        assert!(given_up.is_err());
        assert_eq!(api.state().reads.len(), 2);
    });
}

/// Calls for a class of any size share a request, though its parameters are too large to be remembered.
#[test]
fn callers_share_parameters_of_any_size() {
    paused(async {
        for bytes in [10, 70 << 10, 900 << 10] {
            let (classes, reads) = (Arc::new(Classes::default()), Arc::new(Mutex::new(0)));
            let mut running = JoinSet::new();
            for number in 0..60 {
                let (classes, reads) = (Arc::clone(&classes), Arc::clone(&reads));
                running.spawn(async move {
                    sleep(Duration::from_millis(number)).await;
                    let read = async |_| {
                        *reads.lock().unwrap() += 1;
                        sleep(Duration::from_millis(100)).await;
                        Ok(Class {
                            parameters: [(String::new(), "x".repeat(bytes))].into(),
                            ..Class::with_secrets(Vec::new())
                        })
                    };
                    let wanted = Wanted {
                        freshness: Freshness::Present,
                        known: None,
                        with_parameters: true,
                    };
                    let class = classes.get("shop", "db", &wanted, read).await.unwrap();
                    assert_eq!(class.parameters[""].len(), bytes);
                });
            }
            running.join_all().await;
            assert_eq!(*reads.lock().unwrap(), 2);
            let kept = !classes.newest("shop/db").unwrap().parameters.is_empty();
            assert_eq!(kept, bytes <= store::MOST_PARAMETERS_OF_ONE);
        }
    });
}

/// A class is in trouble for a while after a read that failed or took too long, and until one succeeds.
#[test]
fn trouble_is_known_for_a_while() {
    paused(async {
        let (api, classes) = (Api::default(), Classes::default());
        api.happens(&Step::Edit);
        let call = Call {
            after_milliseconds: 0,
            freshness: Freshness::Afresh,
            knows: false,
            with_parameters: false,
        };
        assert!(!classes.is_in_trouble("shop", "db"));
        classes.note_late("shop", "db");
        assert!(classes.is_in_trouble("shop", "db"));
        sleep(TROUBLE).await;
        assert!(!classes.is_in_trouble("shop", "db"));
        for (fails, is_in_trouble) in [(false, false), (true, true), (true, true), (false, false)] {
            api.happens(&Step::Fail(fails));
            api.call(&classes, call).await;
            assert_eq!(classes.is_in_trouble("shop", "db"), is_in_trouble);
        }
    });
}
