//! Remembers the classes that the volumes of this node use.
//!
//! All volumes of a class on the node share one answer of the API server: a look at a published volume
//! takes what is remembered, and callers that need a newer state at the same time send one request.
//! There is no watch, so the cost does not grow with the cluster, and what is remembered is bounded.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tonic::Code;

use super::{Class, class::text_of};
use crate::{
    error::Result,
    record::{Age, ClassState},
    turns::Turns,
};

/// The largest number of classes that are remembered. One more replaces the one that was needed last
/// the longest time ago, and so does more text than [`MOST_TEXT`].
const MOST: usize = 1024;

/// The time after which a class that nobody needed is forgotten. kubelet looks at each volume within 90
/// seconds.
const UNUSED: Duration = Duration::from_secs(600);

/// The bytes of the parameters of all remembered classes, and of one. A class of which the parameters
/// are not remembered is read for each refresh.
const MOST_PARAMETERS: usize = 1 << 20;
const MOST_PARAMETERS_OF_ONE: usize = 64 << 10;

/// The bytes of text in `secretObjects` of all remembered classes, each of which may have 128 KiB. Also
/// a class of a volume that was never mounted is remembered.
const MOST_TEXT: usize = 8 << 20;

/// The age up to which a caller accepts a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// Read from the API server's store, after the call began.
    Present,
    /// Read after the call began.
    Afresh,
    /// Read no longer than this time ago.
    Within(Duration),
}

/// The demands of a caller on a class.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// How old it may be.
    pub freshness: Freshness,
    /// The newest state that the caller knows. An answer of the API server's cache that is older is not
    /// enough: its store is asked as well.
    pub known: Option<&'a ClassState>,
    /// Whether the caller needs the parameters, which may not be remembered.
    pub with_parameters: bool,
}

/// The place in the API server that a class is read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Its cache, which may be a moment old, and costs the API server little.
    Cache,
    /// Its store.
    Store,
}

/// The answer to a read of a class.
#[derive(Debug, Clone)]
struct Answer {
    began: Instant,
    source: Source,
    class: Result<Arc<Class>>,
}

/// What is remembered of a class.
#[derive(Debug)]
struct Remembered {
    /// The last answer that says something about the class, also that there is none.
    lasting: Option<Answer>,
    /// The last failure to get one. It is shared only by those who waited for it.
    failed: Option<Answer>,
    needed: Instant,
    /// The bytes of text in `secretObjects`.
    text: usize,
}

/// The classes that are remembered, by namespace and name, and the turns of those who read them.
pub(crate) struct Classes {
    remembered: Mutex<HashMap<String, Remembered>>,
    reading: Turns<String>,
}

impl Default for Classes {
    fn default() -> Self {
        Self {
            remembered: Mutex::default(),
            reading: Turns::new(1),
        }
    }
}

impl Classes {
    /// Returns a class as `wanted`: as it is remembered, or else as `read` reads it. Of several callers
    /// one reads, and the others take its answer if the read began after their call.
    ///
    /// # Errors
    /// That of the read.
    pub(crate) async fn get<R>(
        &self,
        namespace: &str,
        name: &str,
        wanted: &Wanted<'_>,
        read: impl Fn(Source) -> R,
    ) -> Result<Arc<Class>>
    where
        R: Future<Output = Result<Class>>,
    {
        let called = Instant::now();
        let key = format!("{namespace}/{name}");
        if let Some(class) = self.find(&key, wanted, called) {
            return class;
        }
        let _turn = self.reading.take(key.clone()).await;
        // Another caller may have read it meanwhile.
        if let Some(class) = self.find(&key, wanted, called) {
            return class;
        }
        let newest = self.newest(&key);
        let began = Instant::now();
        let answer = |source| {
            let class = read(source);
            async move {
                let class = class.await.map(Arc::new);
                Answer {
                    began,
                    source,
                    class,
                }
            }
        };
        let mut answered = None;
        if wanted.freshness != Freshness::Present {
            let cached = answer(Source::Cache).await;
            let is_settled = cached.is_settled_for(wanted.known)
                && cached.is_settled_for(newest.as_ref().map(|class| &class.identity));
            answered = is_settled.then_some(cached);
        }
        let answered = match answered {
            Some(answered) => answered,
            None => answer(Source::Store).await,
        };
        let class = answered.class.clone();
        self.remember(key, answered);
        class
    }

    /// Returns what is remembered of a class, and how long ago it was read.
    pub(crate) fn find_any(&self, namespace: &str, name: &str) -> Option<(Arc<Class>, Duration)> {
        let now = Instant::now();
        let mut remembered = self.remembered();
        let remembered = remembered.get_mut(&format!("{namespace}/{name}"))?;
        remembered.needed = now;
        let lasting = remembered.lasting.as_ref()?;
        let class = lasting.class.as_ref().ok()?;
        Some((Arc::clone(class), now.duration_since(lasting.began)))
    }

    /// Returns how long ago a class was read, as far as it is remembered.
    pub(crate) fn age(&self, namespace: &str, name: &str) -> Option<Duration> {
        let remembered = self.remembered();
        let lasting = remembered
            .get(&format!("{namespace}/{name}"))?
            .lasting
            .as_ref()?;
        Some(lasting.began.elapsed())
    }

    fn remembered(&self) -> MutexGuard<'_, HashMap<String, Remembered>> {
        // Each change is one assignment.
        self.remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is remembered of a class, if it is enough for a call that began at this time.
    fn find(&self, key: &str, wanted: &Wanted, called: Instant) -> Option<Result<Arc<Class>>> {
        let mut remembered = self.remembered();
        let remembered = remembered.get_mut(key)?;
        remembered.needed = called;
        let mut answers = remembered.lasting.iter().chain(&remembered.failed);
        let answer = answers.find(|answer| answer.is_enough(wanted, called))?;
        Some(answer.class.clone())
    }

    fn newest(&self, key: &str) -> Option<Arc<Class>> {
        let remembered = self.remembered();
        let lasting = remembered.get(key)?.lasting.as_ref()?;
        lasting.class.as_ref().ok().cloned()
    }

    fn remember(&self, key: String, answer: Answer) {
        let mut all = self.remembered();
        let now = Instant::now();
        all.retain(|_, remembered| now.duration_since(remembered.needed) < UNUSED);
        let others: usize = all
            .iter()
            .filter(|(other, _)| **other != key)
            .map(|(_, remembered)| remembered.parameters())
            .sum();
        let remembered = all.entry(key.clone()).or_insert(Remembered {
            lasting: None,
            failed: None,
            needed: now,
            text: 0,
        });
        if answer.is_lasting() {
            let class = answer.class.as_ref();
            remembered.text = class.map_or(0, |class| text_of(&class.secret_objects));
            remembered.lasting =
                Some(answer.without_more_than(MOST_PARAMETERS.saturating_sub(others)));
            remembered.failed = None;
        } else {
            remembered.failed = Some(answer);
        }
        let text = |all: &HashMap<_, Remembered>| all.values().map(|of| of.text).sum::<usize>();
        while all.len() > MOST || text(&all) > MOST_TEXT {
            let others = all.iter().filter(|(other, _)| **other != key);
            let oldest = others.min_by_key(|(_, remembered)| remembered.needed);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else {
                return;
            };
            all.remove(&oldest);
        }
    }
}

impl Answer {
    /// Returns whether this answer is enough for a call that began at this time.
    fn is_enough(&self, wanted: &Wanted<'_>, called: Instant) -> bool {
        let is_new = self.began >= called;
        let is_recent = match wanted.freshness {
            Freshness::Present => is_new && self.source == Source::Store,
            Freshness::Afresh => is_new,
            Freshness::Within(age) => {
                is_new || self.is_lasting() && called.duration_since(self.began) < age
            }
        };
        let lacks = |class: &Arc<Class>| wanted.with_parameters && class.parameters.is_empty();
        is_recent && self.is_settled_for(wanted.known) && !self.class.as_ref().is_ok_and(lacks)
    }

    /// Returns whether the answer says what the class is, or that there is none or a wrong one, and not
    /// only that it could not be read.
    fn is_lasting(&self) -> bool {
        match &self.class {
            Ok(_) => true,
            Err(error) => matches!(error.code(), Code::NotFound | Code::FailedPrecondition),
        }
    }

    /// Returns whether the store need not be asked, by somebody who knows this state of the class: the
    /// cache may not have that yet.
    fn is_settled_for(&self, known: Option<&ClassState>) -> bool {
        self.source == Source::Store
            || match &self.class {
                Ok(class) => known.is_none_or(|known| class.identity.age(known) == Age::Current),
                Err(error) => error.code() != Code::NotFound,
            }
    }

    /// Removes the parameters from the answer if they are larger than this.
    fn without_more_than(mut self, bytes: usize) -> Self {
        if let Ok(class) = &self.class
            && parameters(class) > bytes.min(MOST_PARAMETERS_OF_ONE)
        {
            self.class = Ok(Arc::new(class.without_parameters()));
        }
        self
    }
}

impl Remembered {
    fn parameters(&self) -> usize {
        let lasting = self.lasting.as_ref();
        let class = lasting.and_then(|answer| answer.class.as_ref().ok());
        class.map_or(0, |class| parameters(class))
    }
}

/// Returns the bytes of the parameters of a class.
fn parameters(class: &Class) -> usize {
    let parameters = class.parameters.iter();
    parameters.map(|(key, value)| key.len() + value.len()).sum()
}

#[cfg(test)]
mod tests;
