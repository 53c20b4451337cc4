//! Reads the interval between refreshes that a class or a volume sets, and decides how old what is
//! remembered of a class may be.

use std::time::Duration;

use crate::{
    config::{Config, duration},
    error::Error,
    quoted::quoted,
    record::ClassState,
};

/// The annotation of a class, or the attribute of a volume, with the shortest time between two
/// refreshes, or `never`.
pub const INTERVAL: &str = "secrets-store.csi.k8s.io/rotation-poll-interval";

/// The longest time between two reads of a class, however long its interval is.
const LONGEST: Duration = Duration::from_secs(5 * 60);

/// The number of sync intervals between two reads of a class, if that is shorter. With the default of
/// `--sync-interval` it is not.
const SYNC_INTERVALS: u32 = 7;

/// The interval that a class or a volume sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Every {
    /// A refresh is due when this time has passed since the last success.
    Interval(Duration),
    /// A refresh is due only when the class changes, or asks for one.
    Never,
}

impl Every {
    /// Parses the value of the attribute or the annotation.
    ///
    /// # Errors
    /// The end of a sentence that says what to write.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "never" => Ok(Self::Never),
            text => duration(text)
                .map(Self::Interval)
                .map_err(|why| format!("{why}, or never")),
        }
    }

    /// Returns the interval that the class sets.
    ///
    /// # Errors
    /// When the annotation cannot be read as an interval.
    pub fn of_class(class: &ClassState) -> Result<Option<Self>, Error> {
        let Some(text) = class.annotations.get(INTERVAL) else {
            return Ok(None);
        };
        Self::parse(text).map(Some).map_err(|why| {
            Error::precondition(format!(
                "annotation {INTERVAL} of SecretProviderClass {} is {}: {why}",
                class.name,
                quoted(text, 40)
            ))
        })
    }
}

/// Reads bytes as the interval of a class or a volume.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Err(why) = Every::parse(text)
    {
        crate::fuzz::assert_readable(&why);
    }
}

/// The flags that decide about intervals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intervals {
    /// The interval where neither class nor volume set one: `--rotation-poll-interval`.
    pub refresh: Duration,
    /// The shortest interval that a class or a volume may set: `--min-rotation-poll-interval`.
    pub least: Duration,
    /// The time between two checks of a Secret: `--sync-interval`.
    pub sync: Duration,
}

impl From<&Config> for Intervals {
    fn from(config: &Config) -> Self {
        Self {
            refresh: config.rotation_poll_interval,
            least: config.min_rotation_poll_interval,
            sync: config.sync_interval,
        }
    }
}

impl Intervals {
    /// Returns the shortest time between two refreshes, or nothing for [`Every::Never`].
    pub fn between_refreshes(&self, every: Option<Every>) -> Option<Duration> {
        match every {
            None => Some(self.refresh),
            Some(Every::Interval(interval)) => Some(interval.max(self.least)),
            Some(Every::Never) => None,
        }
    }

    /// Returns the time after which a class is read again, although nobody asks for it. A change of the
    /// class is noticed as soon as a change of the content in the store would be, or sooner.
    pub fn between_reads(&self, every: Option<Every>) -> Duration {
        let refresh = self.between_refreshes(every).unwrap_or(LONGEST);
        refresh.min(LONGEST).min(SYNC_INTERVALS * self.sync)
    }

    /// Returns the same for a class, of which this state is known. An annotation that cannot be read
    /// counts as none.
    pub fn between_reads_of(&self, class: Option<&ClassState>) -> Duration {
        let every = class.and_then(|class| Every::of_class(class).ok().flatten());
        self.between_reads(every)
    }

    /// Returns the time after which the checks of Secrets read a class again: no sooner than they come anyway, unless
    /// they come so rarely that a change of the class would not be noticed for longer than documented.
    pub fn between_checks_of(&self, class: Option<&ClassState>) -> Duration {
        self.between_reads_of(class).max(self.first_check())
    }

    /// Returns the time within which the checks read a class of which only a record tells.
    pub fn first_check(&self) -> Duration {
        self.sync.min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const MINUTE: Duration = Duration::from_secs(60);

    #[rstest]
    #[case::default("2m", "45s", None, "2m")]
    #[case::long("1h", "45s", None, "5m")]
    #[case::of_the_class("2m", "45s", Some("1h"), "5m")]
    #[case::shorter_than_allowed("2m", "45s", Some("1s"), "30s")]
    #[case::never("2m", "45s", Some("never"), "5m")]
    #[case::frequent_checks("1h", "1s", None, "7s")]
    #[case::rare_checks("1h", "1h", None, "5m")]
    fn reads_of_a_class(
        #[case] refresh: &str,
        #[case] sync: &str,
        #[case] every: Option<&str>,
        #[case] expected: &str,
    ) {
        let intervals = Intervals {
            refresh: duration(refresh).unwrap(),
            least: MINUTE / 2,
            sync: duration(sync).unwrap(),
        };
        let every = every.map(|text| Every::parse(text).unwrap());
        let expected = duration(expected).unwrap();
        assert_eq!(intervals.between_reads(every), expected);
    }
}
