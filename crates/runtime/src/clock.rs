//! Wall-clock time as records and CRI carry it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since the epoch. A clock before 1970 counts as the epoch.
pub(crate) fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}
