//! Remembers the classes that the volumes of this node use.
//!
//! All volumes of a class on the node share one answer of the API server: a look at a published volume
//! takes what is remembered, and callers that need a newer state at the same time send one request.
//! There is no watch, so the cost does not grow with the cluster, and what is remembered is bounded.

mod store;

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tonic::Code;

use super::Class;
use crate::{
    error::Result,
    record::{Age, ClassState},
    turns::Turns,
};
use store::Store;

/// The time for which a read that failed, or took too long for a look, keeps other looks from waiting.
const TROUBLE: Duration = Duration::from_secs(10);

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
    ended: Instant,
    source: Source,
    class: Result<Arc<Class>>,
}

/// The classes that are remembered, and the turns of those who read them.
pub(crate) struct Classes {
    store: Mutex<Store>,
    reading: Turns<String>,
}

impl Default for Classes {
    fn default() -> Self {
        Self {
            store: Mutex::default(),
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
        let _waiting = Waiting::new(self, &key, wanted.with_parameters);
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
                    ended: Instant::now(),
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
        self.store().remember(&key, answered);
        class
    }

    /// Returns a class if what is remembered of it is as `wanted`. Sends no request.
    pub(crate) fn enough(
        &self,
        namespace: &str,
        name: &str,
        wanted: &Wanted<'_>,
    ) -> Option<Result<Arc<Class>>> {
        self.find(&format!("{namespace}/{name}"), wanted, Instant::now())
    }

    /// Returns what is remembered of a class, and how long ago it was read.
    pub(crate) fn find_any(&self, namespace: &str, name: &str) -> Option<(Arc<Class>, Duration)> {
        let now = Instant::now();
        let mut store = self.store();
        let remembered = store.get(&format!("{namespace}/{name}"), now)?;
        let lasting = remembered.lasting.as_ref()?;
        let class = lasting.class.as_ref().ok()?;
        Some((Arc::clone(class), now.duration_since(lasting.began)))
    }

    /// Returns how long ago a class was read, as far as it is remembered.
    pub(crate) fn age(&self, namespace: &str, name: &str) -> Option<Duration> {
        let store = self.store();
        let lasting = store
            .look(&format!("{namespace}/{name}"))?
            .lasting
            .as_ref()?;
        Some(lasting.began.elapsed())
    }

    /// Notes that a read of a class takes too long for a look, which does not wait for its end.
    pub(crate) fn note_late(&self, namespace: &str, name: &str) {
        let now = Instant::now();
        self.store().late(&format!("{namespace}/{name}"), now);
    }

    /// Returns whether a class could not be read a moment ago, so that another try is not worth waiting for.
    pub(crate) fn is_in_trouble(&self, namespace: &str, name: &str) -> bool {
        let store = self.store();
        let Some(remembered) = store.look(&format!("{namespace}/{name}")) else {
            return false;
        };
        let failed = remembered.failed.as_ref().map(|answer| answer.ended);
        let times = failed.into_iter().chain(remembered.late);
        times.max().is_some_and(|last| last.elapsed() < TROUBLE)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        // Each change of it is whole before anything can panic.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is remembered of a class, if it is enough for a call that began at this time.
    fn find(&self, key: &str, wanted: &Wanted, called: Instant) -> Option<Result<Arc<Class>>> {
        let mut store = self.store();
        let remembered = store.get(key, called)?;
        let mut answers = remembered.lasting.iter().chain(&remembered.failed);
        let answer = answers.find(|answer| answer.is_enough(wanted, called))?;
        Some(answer.class.clone())
    }

    fn newest(&self, key: &str) -> Option<Arc<Class>> {
        let store = self.store();
        let lasting = store.look(key)?.lasting.as_ref()?;
        lasting.class.as_ref().ok().cloned()
    }
}

/// A caller that waits for a class with its parameters. As long as there is one, they are kept, however
/// large they are: otherwise each caller would read them for itself, one after the other.
struct Waiting<'a> {
    classes: &'a Classes,
    key: Option<&'a str>,
}

impl<'a> Waiting<'a> {
    fn new(classes: &'a Classes, key: &'a str, with_parameters: bool) -> Self {
        let key = with_parameters.then_some(key);
        if let Some(key) = key {
            classes.store().waits(key);
        }
        Self { classes, key }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.classes.store().waits_no_longer(key);
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
}

#[cfg(test)]
mod tests;
