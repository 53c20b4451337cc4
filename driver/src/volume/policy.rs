//! When a published volume is refreshed: the decision, and the waiting after failures.
//!
//! kubelet is the clock: it publishes a mounted volume again every minute or so, and at once when
//! its pod changes. [`Policy::due`] says what such a call is for, from what is recorded, what the
//! class says and the time; a directory's time is never asked.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use tonic::Code;

use crate::{
    config::duration,
    error::Error,
    record::{Age, Class, Record},
};

/// As an annotation of a class, or an attribute of a volume: the shortest time between two
/// refreshes, or `never`.
pub const INTERVAL: &str = "secrets-store.csi.k8s.io/rotation-poll-interval";

/// As an annotation of a class: any new value asks for a refresh of every volume of the class.
pub const ASKED: &str = "secrets-store.csi.k8s.io/refresh";

/// As an annotation of a class, `true`: a refresh tells the provider which versions are mounted, so
/// that it need not fetch what is the same. Not all providers use that well.
pub const SEND_VERSIONS: &str = "secrets-store.csi.k8s.io/send-object-versions";

/// How much later than the interval a refresh may be, so that volumes that were mounted together
/// spread out.
const JITTER: f64 = 0.1;

/// A provider that says it has too much to do is left alone for at least this many first waits.
const EXHAUSTED_FACTOR: u32 = 4;

/// The longest that a provider's own wish to be left alone is heeded.
const LONGEST_WISH: Duration = Duration::from_secs(60 * 60);

/// Which refreshes there are.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Whether there are any: `--enable-secret-rotation`.
    pub enabled: bool,
    /// Shortest time between two refreshes of a volume: `--rotation-poll-interval`.
    pub interval: Duration,
    /// The shortest interval that a class or a volume may ask for.
    pub least_interval: Duration,
    /// Whether kubelet hears of failures: `--republish-errors=surface`.
    pub surface_errors: bool,
    /// The wait after a first failure.
    pub first_wait: Duration,
    /// The longest wait between two failures.
    pub longest_wait: Duration,
}

/// How often a volume is refreshed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// When this time has passed since the last success.
    Interval(Duration),
    /// Only when the class changes, or somebody asks.
    Never,
}

impl Every {
    /// Reads what a volume attribute or an annotation says.
    ///
    /// # Errors
    /// The end of a sentence, for the person who wrote it.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "never" => Ok(Self::Never),
            text => duration(text)
                .map(Self::Interval)
                .map_err(|why| format!("{why}, or never")),
        }
    }
}

/// Why a volume is refreshed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// The interval has passed.
    Interval,
    /// The class is another than the one that was mounted.
    ClassChanged,
    /// The class's [`ASKED`] annotation has a new value.
    Asked,
}

impl Policy {
    /// Whether a volume is due, and why. `of_volume` is what the volume's attribute asks for; it
    /// goes before what the class asks for.
    ///
    /// # Errors
    /// When the class's annotation cannot be read as an interval.
    pub fn due(
        &self,
        record: &Record,
        class: &Class,
        of_volume: Option<Every>,
        now: Timestamp,
    ) -> Result<Option<Due>, Error> {
        if is_another(&record.class, class) {
            return Ok(Some(Due::ClassChanged));
        }
        if let Some(asked) = class.annotations.get(ASKED)
            && record.class.annotations.get(ASKED) != Some(asked)
        {
            return Ok(Some(Due::Asked));
        }
        let interval = match of_volume.map_or_else(|| of_class(class), |every| Ok(Some(every)))? {
            None => self.interval,
            Some(Every::Interval(interval)) => interval.max(self.least_interval),
            Some(Every::Never) => return Ok(None),
        };
        let seed = format!(
            "{}{}",
            record.volume_id,
            record.last_success.as_nanosecond()
        );
        let late = interval.mul_f64(JITTER * spread(&seed));
        let passed = now.duration_since(record.last_success);
        // A success in the future: the node's clock was set back, and nothing can be counted on.
        let is_due = passed.is_negative() || passed.unsigned_abs() >= interval + late;
        Ok(is_due.then_some(Due::Interval))
    }
}

/// What the class asks for.
fn of_class(class: &Class) -> Result<Option<Every>, Error> {
    let Some(text) = class.annotations.get(INTERVAL) else {
        return Ok(None);
    };
    Every::parse(text).map(Some).map_err(|why| {
        Error::precondition(format!(
            "annotation {INTERVAL} of secretproviderclass {} is {text:.40?}: {why}",
            class.name
        ))
    })
}

/// Returns whether a class wants its provider to be told which versions are mounted.
///
/// # Errors
/// When the annotation is neither `true` nor `false`.
pub fn sends_versions(class: &Class) -> Result<bool, Error> {
    match class.annotations.get(SEND_VERSIONS).map(String::as_str) {
        Some("true") => Ok(true),
        None | Some("false") => Ok(false),
        Some(text) => Err(Error::precondition(format!(
            "annotation {SEND_VERSIONS} of secretproviderclass {} is {text:.40?}: true or false",
            class.name
        ))),
    }
}

/// Whether a class has another content than the one that was mounted. The API server counts
/// changes of the content in the generation; where it keeps none, any change counts.
pub(super) fn is_another(mounted: &Class, class: &Class) -> bool {
    mounted.uid != class.uid
        || match (mounted.generation, class.generation) {
            (Some(before), Some(now)) => before != now,
            _ => mounted.resource_version != class.resource_version,
        }
}

/// A number from 0 to 1 that looks random and is always the same for the same seed.
fn spread(seed: &str) -> f64 {
    let byte = Sha256::digest(seed).first().copied().unwrap_or_default();
    f64::from(byte) / 255.0
}

/// Volumes whose last refresh failed, and how long each is left alone.
#[derive(Default)]
pub struct Failing {
    failures: Mutex<HashMap<String, Failure>>,
    told: Told,
}

/// Since when the refreshes of which volumes fail, as far as this driver has told their pods and
/// has not told them of the end.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<HashMap<String, (Timestamp, Word)>>>);

/// What a pod was told last of the refreshes of its volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// That they fail.
    Failed,
    /// That they do not fail any more. The event waits to be posted.
    Complete,
}

impl Told {
    fn volumes(&self) -> MutexGuard<'_, HashMap<String, (Timestamp, Word)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns since when the refreshes of a volume fail, if this driver has told its pod so.
    pub fn since(&self, volume_id: &str) -> Option<Timestamp> {
        let volumes = self.volumes();
        let (since, word) = volumes.get(volume_id)?;
        (*word == Word::Failed).then_some(*since)
    }

    /// Remembers what a pod is being told of failures that began at `since`.
    pub fn says(&self, volume_id: &str, since: Timestamp, word: Word) {
        self.volumes().insert(volume_id.to_owned(), (since, word));
    }

    /// Posting what [`Told::says`] remembered has ended. What was not posted has not been told.
    pub fn ended(&self, volume_id: &str, since: Timestamp, word: Word, posted: bool) {
        let mut volumes = self.volumes();
        // Where something else has been told since, or the volume is gone, that stands.
        if volumes.get(volume_id) != Some(&(since, word)) {
            return;
        }
        match (word, posted) {
            (Word::Failed, true) => {}
            (Word::Failed, false) | (Word::Complete, true) => drop(volumes.remove(volume_id)),
            (Word::Complete, false) => {
                volumes.insert(volume_id.to_owned(), (since, Word::Failed));
            }
        }
    }
}

struct Failure {
    /// How many refreshes in a row have failed.
    count: u32,
    /// Until when the volume is left alone.
    until: Instant,
    /// The class as it was: another one is a reason to try at once.
    class: Option<Class>,
    /// The newest state of the class that was read while refreshes failed.
    newest: Option<Class>,
    error: Error,
}

impl Failing {
    /// Returns what pods have been told.
    pub fn told(&self) -> &Told {
        &self.told
    }

    /// The error of the last refresh, while its volume is to be left alone with this class.
    /// `class` is none when it cannot be read.
    pub fn waits(&self, volume_id: &str, class: Option<&Class>) -> Option<Error> {
        let volumes = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let failure = volumes.get(volume_id)?;
        let same = match (&failure.class, class) {
            (Some(before), Some(now)) => {
                now.age(before) >= Age::OlderMetadata
                    || !is_another(before, now)
                        && before.annotations.get(ASKED) == now.annotations.get(ASKED)
            }
            (before, now) => before.is_none() == now.is_none(),
        };
        (same && Instant::now() < failure.until).then(|| failure.error.clone())
    }

    /// Remembers that a refresh has failed. Returns how long the volume is left alone.
    pub fn failed(
        &self,
        volume_id: &str,
        class: Option<Class>,
        error: &Error,
        policy: &Policy,
    ) -> Duration {
        let mut volumes = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let before = volumes.get(volume_id);
        let count = before.map_or(0, |failure| failure.count) + 1;
        let newest = newer(
            before.and_then(|failure| failure.newest.clone()),
            class.clone(),
        );
        let jitter = 0.8 + 0.4 * spread(&format!("{volume_id}{count}"));
        let wait = wait(count, error, policy).mul_f64(jitter);
        volumes.insert(
            volume_id.to_owned(),
            Failure {
                count,
                until: Instant::now() + wait,
                class,
                newest,
                error: error.clone(),
            },
        );
        wait
    }

    /// Returns the newest state of a volume's class that this driver knows: the one that is
    /// mounted, or one with which refreshes have failed since.
    pub fn newest_class(&self, volume_id: &str, mounted: &Class) -> Class {
        let volumes = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = volumes
            .get(volume_id)
            .and_then(|failure| failure.newest.clone());
        newer(Some(mounted.clone()), failed).unwrap_or_else(|| mounted.clone())
    }

    /// The volume is gone.
    pub fn gone(&self, volume_id: &str) {
        self.succeeded(volume_id);
        self.told.volumes().remove(volume_id);
    }

    /// A refresh has succeeded.
    pub fn succeeded(&self, volume_id: &str) {
        let mut volumes = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        volumes.remove(volume_id);
    }
}

/// The newer of two states of a class, the second unless it is known to be older.
fn newer(known: Option<Class>, read: Option<Class>) -> Option<Class> {
    match (known, read) {
        (Some(known), Some(read)) if read.age(&known) >= Age::OlderMetadata => Some(known),
        (known, read) => read.or(known),
    }
}

/// How long to leave a volume alone after so many failures in a row.
fn wait(failures: u32, error: &Error, policy: &Policy) -> Duration {
    let doublings = (failures - 1).min(20);
    let first = match error.code() {
        Code::ResourceExhausted => policy.first_wait * EXHAUSTED_FACTOR,
        _ => policy.first_wait,
    };
    let own = first
        .saturating_mul(1 << doublings)
        .min(policy.longest_wait);
    let wish = error.retry_after().unwrap_or_default().min(LONGEST_WISH);
    own.max(wish)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Content, Pod};
    use rstest::rstest;

    const MINUTE: Duration = Duration::from_secs(60);

    fn policy() -> Policy {
        Policy {
            enabled: true,
            interval: 10 * MINUTE,
            least_interval: MINUTE,
            surface_errors: false,
            first_wait: Duration::from_secs(10),
            longest_wait: 5 * MINUTE,
        }
    }

    fn class(generation: Option<i64>, version: &str, annotations: &[(&str, &str)]) -> Class {
        Class {
            name: "db".into(),
            uid: "u".into(),
            generation,
            resource_version: version.into(),
            annotations: annotations
                .iter()
                .map(|(k, v)| ((*k).into(), (*v).into()))
                .collect(),
        }
    }

    fn record(class: Class, last_success: Timestamp) -> Record {
        Record {
            volume_id: "csi-1".into(),
            target_path: "/t".into(),
            pod: Pod {
                name: "p".into(),
                namespace: "n".into(),
                uid: "u".into(),
            },
            class,
            provider: "vault".into(),
            pod_status: "s".into(),
            objects: Vec::new(),
            content: Content::Driver,
            orders: Default::default(),
            files: None,
            last_success,
            last_change: last_success,
            failing_since: None,
        }
    }

    #[rstest]
    #[case::fresh(9, &[], None, None)]
    #[case::late_by_more_than_the_jitter(12, &[], None, Some(Due::Interval))]
    #[case::clock_set_back(-1, &[], None, Some(Due::Interval))]
    #[case::the_class_asks_for_more(4, &[(INTERVAL, "3m")], None, Some(Due::Interval))]
    #[case::the_class_asks_for_less(12, &[(INTERVAL, "1h")], None, None)]
    #[case::the_volume_goes_before_the_class(12, &[(INTERVAL, "1h")], Some("3m"), Some(Due::Interval))]
    #[case::never(100_000, &[], Some("never"), None)]
    #[case::the_floor_holds(0, &[(INTERVAL, "1ms")], None, None)]
    fn intervals(
        #[case] minutes_passed: i64,
        #[case] annotations: &[(&str, &str)],
        #[case] of_volume: Option<&str>,
        #[case] expected: Option<Due>,
    ) {
        let now = Timestamp::now();
        let mounted = now - jiff::SignedDuration::from_mins(minutes_passed);
        let class = class(Some(1), "5", annotations);
        let every = of_volume.map(|text| Every::parse(text).unwrap());
        let due = policy().due(&record(class.clone(), mounted), &class, every, now);
        assert_eq!(due.unwrap(), expected);
    }

    #[rstest]
    #[case::the_content(class(Some(2), "6", &[]), Some(Due::ClassChanged))]
    #[case::only_a_label(class(Some(1), "6", &[]), None)]
    #[case::without_generations(class(None, "6", &[]), Some(Due::ClassChanged))]
    #[case::asked(class(Some(1), "6", &[(ASKED, "now")]), Some(Due::Asked))]
    #[case::another_of_the_same_name(
        Class { uid: "v".into(), ..class(Some(1), "5", &[]) },
        Some(Due::ClassChanged)
    )]
    fn changes_of_the_class(#[case] changed: Class, #[case] expected: Option<Due>) {
        let now = Timestamp::now();
        let record = record(class(Some(1), "5", &[]), now);
        assert_eq!(
            policy()
                .due(&record, &changed, Some(Every::Never), now)
                .unwrap(),
            expected
        );
        let again = super::Record {
            class: changed.clone(),
            ..record
        };
        assert_eq!(
            policy()
                .due(&again, &changed, Some(Every::Never), now)
                .unwrap(),
            None,
            "once is enough"
        );
    }

    #[test]
    fn an_unreadable_annotation_is_an_error_that_names_it() {
        let now = Timestamp::now();
        let class = class(Some(1), "5", &[(INTERVAL, "often")]);
        let error = policy()
            .due(&record(class.clone(), now), &class, None, now)
            .unwrap_err();
        assert!(error.to_string().contains(INTERVAL) && error.to_string().contains("often"));
    }

    #[test]
    fn volumes_mounted_together_spread_out() {
        let now = Timestamp::now();
        let class = class(Some(1), "5", &[]);
        let half_late = now + policy().interval.mul_f64(1.0 + JITTER / 2.0);
        let due = (0..50).filter(|i| {
            let record = Record {
                volume_id: format!("csi-{i}"),
                ..record(class.clone(), now)
            };
            policy()
                .due(&record, &class, None, half_late)
                .unwrap()
                .is_some()
        });
        assert!((10..40).contains(&due.count()));
    }

    #[rstest]
    #[case::first(1, Error::unavailable("x"), 10)]
    #[case::fourth(4, Error::unavailable("x"), 80)]
    #[case::bounded(40, Error::unavailable("x"), 300)]
    #[case::exhausted(1, Error::new(Code::ResourceExhausted, "x"), 40)]
    #[case::asked(1, Error::unavailable("x").with_retry_after(15 * MINUTE), 900)]
    #[case::asked_for_ever(1, Error::unavailable("x").with_retry_after(9000 * MINUTE), 3600)]
    fn waits_grow(#[case] failures: u32, #[case] error: Error, #[case] seconds: u64) {
        assert_eq!(
            wait(failures, &error, &policy()),
            Duration::from_secs(seconds)
        );
    }

    /// kubelet looks every second for an hour, and the provider is away all the time.
    #[tokio::test(start_paused = true)]
    async fn an_hour_of_failures_is_a_handful_of_calls_and_ends_within_one_wait() {
        let (failing, policy) = (Failing::default(), policy());
        let class = class(Some(1), "5", &[]);
        let mut calls = 0;
        for _ in 0..3600 {
            if failing.waits("csi-1", Some(&class)).is_none() {
                calls += 1;
                failing.failed(
                    "csi-1",
                    Some(class.clone()),
                    &Error::unavailable("away"),
                    &policy,
                );
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!((12..=24).contains(&calls), "{calls}");
        tokio::time::advance(policy.longest_wait.mul_f64(1.2)).await;
        assert!(failing.waits("csi-1", Some(&class)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_class_ends_the_waiting() {
        let failing = Failing::default();
        let before = class(Some(1), "5", &[]);
        failing.failed(
            "csi-1",
            Some(before.clone()),
            &Error::unavailable("away"),
            &policy(),
        );
        assert!(failing.waits("csi-1", Some(&before)).is_some());
        assert!(
            failing
                .waits("csi-1", Some(&class(Some(2), "6", &[])))
                .is_none()
        );
        assert!(
            failing
                .waits("csi-1", Some(&class(Some(1), "6", &[(ASKED, "1")])))
                .is_none()
        );
        assert!(failing.waits("csi-1", None).is_none());
        assert!(failing.waits("csi-2", Some(&before)).is_none());
    }

    #[test]
    fn what_could_not_be_posted_has_not_been_told() {
        let (failing, now) = (Failing::default(), Timestamp::now());
        let told = failing.told();
        for (word, posted, expected) in [
            (Word::Failed, true, Some(now)),
            (Word::Failed, false, None),
            (Word::Complete, true, None),
            (Word::Complete, false, Some(now)),
        ] {
            told.says("csi-1", now, word);
            let at_once = (word == Word::Failed).then_some(now);
            assert_eq!(told.since("csi-1"), at_once, "{word:?}");
            told.ended("csi-1", now, word, posted);
            assert_eq!(told.since("csi-1"), expected, "{word:?}, {posted}");
        }
        // Failures of before end, while the pod is told of new ones.
        let later = now + Duration::from_secs(1);
        for posted in [true, false] {
            told.says("csi-1", now, Word::Complete);
            told.says("csi-1", later, Word::Failed);
            told.ended("csi-1", now, Word::Complete, posted);
            assert_eq!(told.since("csi-1"), Some(later));
        }
        // A volume that is gone is not remembered, whatever is still posted.
        told.says("csi-1", now, Word::Complete);
        failing.gone("csi-1");
        told.ended("csi-1", now, Word::Complete, false);
        assert!(told.volumes().is_empty());
    }
}
