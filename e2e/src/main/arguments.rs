//! What the commands accept: numbers, lengths of time, and the kind of API server.

use std::str::FromStr;
use std::time::Duration;

use clap::builder::{RangedU64ValueParser, TypedValueParser};
use e2e::cluster::{Error, Result};

/// The longest time that a command takes, in seconds: eleven days.
const LONGEST: f64 = 1e6;
/// The largest number of things.
const MOST: u64 = 1_000_000;
/// The shortest interval in seconds. The driver is told it in milliseconds.
const SHORTEST_INTERVAL: f64 = 0.1;

/// Returns the parser of a number of things of which there has to be one at least.
pub(crate) fn count() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::<usize>::new().range(1..=MOST)
}

/// Parses a length of time in seconds.
///
/// # Errors
/// When it is no number, negative, or endless.
pub(crate) fn seconds(text: &str) -> std::result::Result<Duration, String> {
    between(text, 0.0).map(Duration::from_secs_f64)
}

/// Parses the time between two things that happen again and again, in seconds.
///
/// # Errors
/// When it is no number, or too short.
pub(crate) fn interval(text: &str) -> std::result::Result<Duration, String> {
    between(text, SHORTEST_INTERVAL).map(Duration::from_secs_f64)
}

/// Parses a number of minutes.
///
/// # Errors
/// When it is no number, zero, negative, or endless.
pub(crate) fn minutes(text: &str) -> std::result::Result<f64, String> {
    match between(text, 0.0) {
        Ok(number) if number > 0.0 => Ok(number),
        _ => Err(format!("has to be a number above 0, up to {LONGEST}")),
    }
}

fn between(text: &str, least: f64) -> std::result::Result<f64, String> {
    // A comparison with NaN is false.
    match f64::from_str(text) {
        Ok(number) if (least..=LONGEST).contains(&number) => Ok(number),
        _ => Err(format!("has to be a number from {least} to {LONGEST}")),
    }
}

/// Returns whether `$E2E_CLUSTER` asks for a real API server; `default` is the answer where it is not set.
///
/// # Errors
/// When drivers do not run in front of what it names.
pub(crate) fn is_real(default: bool) -> Result<bool> {
    is_named_real(std::env::var("E2E_CLUSTER").as_deref().ok(), default)
}

fn is_named_real(name: Option<&str>, default: bool) -> Result<bool> {
    match name {
        None => Ok(default),
        Some("embedded") => Ok(false),
        Some("local") => Ok(true),
        Some(other) => Err(Error::Impossible(format!(
            "E2E_CLUSTER={other}: drivers are measured in front of the API servers embedded and local only"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, Command};
    use rstest::rstest;

    /// Returns what a parser makes of a text, or the end of the message for the person who typed it.
    fn parsed<P: TypedValueParser<Value: std::fmt::Debug + Clone + Send + Sync>>(
        parser: P,
        text: &str,
    ) -> String {
        let command = Command::new("x").arg(Arg::new("it").long("it").value_parser(parser));
        match command.try_get_matches_from(["x".to_owned(), format!("--it={text}")]) {
            Ok(matches) => format!("{:?}", matches.get_one::<P::Value>("it")),
            Err(error) => error.to_string().lines().next().unwrap().to_owned(),
        }
    }

    #[rstest]
    #[case("0", "Some(0ns)")]
    #[case("1.5", "Some(1.5s)")]
    #[case(
        "nan",
        "error: invalid value 'nan' for '--it <it>': has to be a number from 0 to 1000000"
    )]
    #[case(
        "-1",
        "error: invalid value '-1' for '--it <it>': has to be a number from 0 to 1000000"
    )]
    #[case(
        "inf",
        "error: invalid value 'inf' for '--it <it>': has to be a number from 0 to 1000000"
    )]
    #[case(
        "soon",
        "error: invalid value 'soon' for '--it <it>': has to be a number from 0 to 1000000"
    )]
    fn a_time_is_a_number_of_seconds(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(parsed(seconds, text), expected);
    }

    #[rstest]
    #[case("1.5", "Some(1.5s)")]
    #[case(
        "0",
        "error: invalid value '0' for '--it <it>': has to be a number from 0.1 to 1000000"
    )]
    #[case(
        "NaN",
        "error: invalid value 'NaN' for '--it <it>': has to be a number from 0.1 to 1000000"
    )]
    fn an_interval_has_a_length(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(parsed(interval, text), expected);
    }

    #[rstest]
    #[case("0.1", "Some(0.1)")]
    #[case(
        "0",
        "error: invalid value '0' for '--it <it>': has to be a number above 0, up to 1000000"
    )]
    #[case(
        "-1",
        "error: invalid value '-1' for '--it <it>': has to be a number above 0, up to 1000000"
    )]
    #[case(
        "NaN",
        "error: invalid value 'NaN' for '--it <it>': has to be a number above 0, up to 1000000"
    )]
    fn minutes_are_more_than_none(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(parsed(minutes, text), expected);
    }

    #[test]
    fn there_is_one_at_least() {
        assert_eq!(parsed(count(), "1"), "Some(1)");
        let refused = parsed(count(), "0");
        assert!(refused.starts_with("error: invalid value '0'"), "{refused}");
    }

    #[rstest]
    #[case(None, true, Some(true))]
    #[case(None, false, Some(false))]
    #[case(Some("embedded"), true, Some(false))]
    #[case(Some("local"), false, Some(true))]
    #[case(Some("lokal"), false, None)]
    #[case(Some("kind"), true, None)]
    fn the_api_server_is_the_one_that_was_asked_for(
        #[case] name: Option<&str>,
        #[case] default: bool,
        #[case] expected: Option<bool>,
    ) {
        match is_named_real(name, default) {
            Ok(real) => assert_eq!(Some(real), expected),
            Err(error) => {
                assert_eq!(expected, None);
                assert!(error.to_string().contains(name.unwrap()), "{error}");
            }
        }
    }
}
