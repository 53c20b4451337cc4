//! Decides when a published volume is refreshed.
//!
//! kubelet is the clock: it publishes a mounted volume again every minute or so, and at once when
//! its pod changes. [`Policy::due`] decides what such a call is for, from the record, the class and
//! the time. The modification time of a directory does not matter.

use std::time::Duration;

use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::{
    cluster::interval::Intervals,
    config::{Config, RepublishErrors},
    error::Error,
    quoted::quoted,
    record::{ClassState, NUMBER_VERSIONS, Record},
};

pub use crate::cluster::interval::{Every, INTERVAL};

pub use crate::record::ASKED;

/// The annotation of a class with which, if it is `true`, a refresh tells the provider which versions
/// are mounted, so that it need not fetch them again. Not all providers support that.
pub const SEND_VERSIONS: &str = "secrets-store.csi.k8s.io/send-object-versions";

/// The share of the interval by which a refresh may be late, so that volumes that were mounted
/// together spread out.
const JITTER: f64 = 0.1;

/// The flags that decide about refreshes.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Whether volumes are refreshed: `--enable-secret-rotation`.
    pub enabled: bool,
    /// The flags that decide about intervals.
    pub intervals: Intervals,
    /// Whether kubelet gets the errors of refreshes: `--republish-errors`.
    pub errors: RepublishErrors,
    /// The wait after the first failure: `--rotation-backoff`.
    pub first_wait: Duration,
    /// The longest wait after a failure: `--rotation-backoff-max`.
    pub longest_wait: Duration,
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        Self {
            enabled: config.enable_secret_rotation,
            intervals: Intervals::from(config),
            errors: config.republish_errors,
            first_wait: config.rotation_backoff,
            longest_wait: config.rotation_backoff_max,
        }
    }
}

/// The time of day, as the system clock said it when the driver started, and the time that has passed
/// since. It does not jump.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    at_start: Timestamp,
    started: Instant,
}

impl Clock {
    /// Creates a clock that starts now.
    pub(super) fn start() -> Self {
        Self {
            at_start: Timestamp::now(),
            started: Instant::now(),
        }
    }

    pub(super) fn now(&self) -> Timestamp {
        self.at_start
            .saturating_add(self.started.elapsed())
            .unwrap_or(self.at_start)
    }
}

/// The reason why a volume is refreshed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// The interval has passed.
    Interval,
    /// The class has changed since the last refresh.
    ClassChanged,
    /// The class's [`ASKED`] annotation has a new value.
    Asked,
}

impl Policy {
    /// Returns whether a volume is due, and why. `of_volume` is the interval of the volume's attribute,
    /// which takes precedence over the interval of the class.
    ///
    /// # Errors
    /// When the class's annotation cannot be read as an interval.
    pub fn due(
        &self,
        record: &Record,
        class: &ClassState,
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
        let Some(ends) = self.interval_ends(record, class, of_volume)? else {
            return Ok(None);
        };
        // A success in the future means that the node's clock was set back: the time that has passed
        // is unknown.
        let is_due = now < record.last_success || now >= ends;
        Ok(is_due.then_some(Due::Interval))
    }

    /// Returns when the interval ends that began with the last success, if there is one. `of_volume` is
    /// as for [`due`](Self::due).
    ///
    /// # Errors
    /// When the class's annotation cannot be read as an interval.
    pub fn interval_ends(
        &self,
        record: &Record,
        class: &ClassState,
        of_volume: Option<Every>,
    ) -> Result<Option<Timestamp>, Error> {
        let every = match of_volume {
            Some(every) => Some(every),
            None => Every::of_class(class)?,
        };
        let Some(interval) = self.intervals.between_refreshes(every) else {
            return Ok(None);
        };
        let seed = format!(
            "{}{}",
            record.volume_id,
            record.last_success.as_nanosecond()
        );
        let late = interval.mul_f64(JITTER * spread(&seed));
        let ends = record.last_success.saturating_add(interval + late);
        Ok(Some(ends.unwrap_or(Timestamp::MAX)))
    }
}

/// Returns whether a class wants its provider to be told which versions are mounted.
///
/// # Errors
/// When the annotation is neither `true` nor `false`.
pub fn sends_versions(class: &ClassState) -> Result<bool, Error> {
    is_true(class, SEND_VERSIONS)
}

/// Checks that the other annotations which are `true` or `false` are one of the two.
///
/// # Errors
/// Names the annotation that is not.
pub(super) fn check_switches(class: &ClassState) -> Result<(), Error> {
    is_true(class, NUMBER_VERSIONS).map(drop)
}

fn is_true(class: &ClassState, annotation: &str) -> Result<bool, Error> {
    match class.annotations.get(annotation).map(String::as_str) {
        Some("true") => Ok(true),
        None | Some("false") => Ok(false),
        Some(text) => Err(Error::precondition(format!(
            "annotation {annotation} of SecretProviderClass {} is {}; it must be true or false",
            class.name,
            quoted(text, 40)
        ))),
    }
}

/// Returns whether the content of a class differs from the one that was mounted. The API server
/// counts changes of the content in the generation; without a generation any change counts.
pub(super) fn is_another(mounted: &ClassState, class: &ClassState) -> bool {
    mounted.uid != class.uid
        || match (mounted.generation, class.generation) {
            (Some(before), Some(now)) => before != now,
            _ => mounted.resource_version != class.resource_version,
        }
}

/// Returns a number from 0 to 1 that looks random and is always the same for the same seed.
pub(super) fn spread(seed: &str) -> f64 {
    let byte = Sha256::digest(seed).first().copied().unwrap_or_default();
    f64::from(byte) / 255.0
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use rstest::rstest;

    pub(in crate::volume) const MINUTE: Duration = Duration::from_secs(60);

    pub(in crate::volume) fn policy() -> Policy {
        Policy {
            enabled: true,
            intervals: Intervals {
                refresh: 10 * MINUTE,
                least: MINUTE,
                sync: MINUTE,
            },
            errors: RepublishErrors::Mask,
            first_wait: Duration::from_secs(10),
            longest_wait: 5 * MINUTE,
        }
    }

    pub(in crate::volume) fn class(
        generation: Option<i64>,
        version: &str,
        annotations: &[(&str, &str)],
    ) -> ClassState {
        ClassState {
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

    fn record(class: ClassState, last_success: Timestamp) -> Record {
        Record {
            class,
            last_success,
            ..Record::example("csi-1", "/t")
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
        ClassState { uid: "v".into(), ..class(Some(1), "5", &[]) },
        Some(Due::ClassChanged)
    )]
    fn changes_of_the_class(#[case] changed: ClassState, #[case] expected: Option<Due>) {
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
        let half_late = now + policy().intervals.refresh.mul_f64(1.0 + JITTER / 2.0);
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
}
