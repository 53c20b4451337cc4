//! When a volume is refreshed next, by what the driver of its node says of it, and whether that is late.

use std::time::Duration;

use driver::{
    cluster::interval::Every,
    status::{Status, Volume},
};
use jiff::Timestamp;

/// The seconds by which kubelet's next look may be later than a due refresh. It looks every 60 to 90 seconds.
const LOOKS_WITHIN: i64 = 120;
/// The part of the interval that the driver adds to it at most, so that not all volumes are refreshed at once.
const ADDED: i64 = 10;

/// When a volume is refreshed next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Next {
    /// From this time on, with kubelet's next look.
    At(Timestamp),
    /// Not at all, because it says so.
    Never,
    /// Not at all, because rotation is off.
    Off,
    /// It is not known.
    Unknown,
}

impl Next {
    pub(crate) fn due(&self) -> Option<Timestamp> {
        match self {
            Self::At(time) => Some(*time),
            _ => None,
        }
    }
}

/// Returns when a volume of a node is refreshed next. `interval` is what the volume or its class says. The driver adds
/// up to a tenth of the interval.
pub(crate) fn next(status: &Status, volume: &Volume, interval: Option<&str>) -> Next {
    if !status.refreshes {
        return Next::Off;
    }
    let seconds = match interval.map(Every::parse) {
        Some(Ok(Every::Never)) => return Next::Never,
        Some(Ok(Every::Interval(interval))) => interval
            .as_secs()
            .max(status.shortest_refresh_interval_seconds),
        Some(Err(_)) => return Next::Unknown,
        None => status.refresh_interval_seconds,
    };
    let next = volume
        .last_success
        .checked_add(Duration::from_secs(seconds));
    next.map_or(Next::Unknown, Next::At)
}

/// Returns whether a refresh is due for longer than kubelet's rhythm explains. A driver that was started only then
/// cannot have been asked before.
pub(crate) fn is_late(
    status: &Status,
    volume: &Volume,
    due: Timestamp,
    driver_started: Option<Timestamp>,
) -> bool {
    let asked_from = due.max(driver_started.unwrap_or(due));
    let late = status.time.duration_since(asked_from);
    let most = LOOKS_WITHIN + due.duration_since(volume.last_success).as_secs() / ADDED;
    late.as_secs() > most
}
