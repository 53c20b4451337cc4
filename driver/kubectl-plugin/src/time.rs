//! Times for people.

use jiff::{SignedDuration, Timestamp};

/// Returns a time to the second, and how long ago it was or how far away it is.
pub(crate) fn shown(time: Timestamp, now: Timestamp) -> String {
    let passed = now.duration_since(time);
    match passed.is_negative() {
        false => format!("{time:.0} ({} ago)", span(passed)),
        true => format!("{time:.0} (in {})", span(passed.abs())),
    }
}

/// Returns a duration in its two largest units.
pub(crate) fn span(duration: SignedDuration) -> String {
    let seconds = duration.as_secs().max(0);
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) if minutes >= 10 => format!("{minutes}m"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units() {
        for (seconds, expected) in [
            (-1, "0s"),
            (0, "0s"),
            (59, "59s"),
            (60, "1m0s"),
            (599, "9m59s"),
            (600, "10m"),
            (3_599, "59m"),
            (3_600, "1h0m"),
            (86_399, "23h59m"),
            (86_400, "1d0h"),
            (1_000_000, "11d13h"),
        ] {
            assert_eq!(span(SignedDuration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn a_time_is_before_or_after_now() {
        let now: Timestamp = "2026-11-26T22:00:00.7Z".parse().unwrap();
        let at = |seconds| now + SignedDuration::from_secs(seconds);
        assert_eq!(shown(at(-90), now), "2026-11-26T21:58:30Z (1m30s ago)");
        assert_eq!(shown(at(30), now), "2026-11-26T22:00:30Z (in 30s)");
    }
}
