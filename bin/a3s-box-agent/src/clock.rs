//! The guest's clock follows the host's.
//!
//! The VMM is asked for the time every few seconds, as long as the box lives. What is off by more than a second (a host that
//! slept or was set, a VM that was stopped, a clock that loses ticks) is set at once; less is made up for by a clock that
//! runs a little faster or slower, so that it neither jumps nor goes back.
//!
//! ```text
//! guest   before ──question──►
//! host                         time
//! guest   after  ◄──answer────
//! ```
//! The answer is taken to be of the middle between the two: it is wrong by half of what the exchange took at most.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use a3s_box_protocol::TIME_PORT;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::SetOnce;
use tokio::time::{sleep, timeout};

use crate::{sys, vsock};

/// Between two looks at a clock that counts by itself.
const STEADY: Duration = Duration::from_secs(10);
/// The same for one that counts ticks of a timer, which a busy host or a stopped VM loses; and after a look that was rough.
const TICKING: Duration = Duration::from_secs(1);
/// After an exchange that failed. A VMM may be too old to answer.
const AGAIN: Duration = Duration::from_secs(30);
/// The longest for one answer.
const LIMIT: Duration = Duration::from_secs(5);

/// What is off by more is set.
const STEP: Duration = Duration::from_secs(1);
/// How much faster or slower a clock may run to make up for less: parts per million.
const MOST_PPM: i64 = 50_000;
/// A look that may be wrong by more, in nanoseconds, is rough: the host is busy.
const ROUGH: i64 = 20_000_000;
/// Exchanges of one look; the shortest counts.
const EXCHANGES: usize = 4;
/// One that takes no longer is good enough.
const SHORT: Duration = Duration::from_millis(2);

/// By how much the host's clock is ahead, and how far that may be wrong: nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Measured {
    ahead: i64,
    error: i64,
}

/// What is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Correction {
    /// Set the clock by so many nanoseconds.
    Step(i64),
    /// Let it run so many parts per million faster.
    Slew(i64),
}

/// Follows for ever. `set` is told when the clock has been looked after for the first time, or cannot be.
pub async fn follow(set: &SetOnce<()>) -> Infallible {
    loop {
        let failed = match vsock::dial(TIME_PORT).await {
            Ok(mut host) => follow_over(&mut host, set).await,
            Err(error) => error,
        };
        if !set.initialized() {
            say!("the host does not tell the time: {failed}");
        }
        // Without the host it runs as fast as it does by itself.
        let _ = correct(Correction::Slew(0));
        let _ = set.set(());
        sleep(AGAIN).await;
    }
}

async fn follow_over<S: AsyncRead + AsyncWrite + Unpin>(host: &mut S, set: &SetOnce<()>) -> io::Error {
    loop {
        let measured = match measure(host).await {
            Ok(measured) => measured,
            Err(error) => return error,
        };
        let soon = counts_ticks() || measured.error > ROUGH;
        let pause = if soon { TICKING } else { STEADY };
        // Until the first look is told nothing runs that could mind.
        let first = !set.initialized();
        if let Err(error) = correct(decide(measured, pause, first)) {
            return error;
        }
        let _ = set.set(());
        sleep(pause).await;
    }
}

/// The shortest of a few exchanges.
async fn measure<S: AsyncRead + AsyncWrite + Unpin>(host: &mut S) -> io::Result<Measured> {
    let mut best: Option<Measured> = None;
    for _ in 0..EXCHANGES {
        let measured = timeout(LIMIT, exchange(host)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        if best.is_none_or(|best| measured.error < best.error) {
            best = Some(measured);
        }
        if u128::from(measured.error.unsigned_abs()) * 2 <= SHORT.as_nanos() {
            break;
        }
    }
    best.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(host: &mut S) -> io::Result<Measured> {
    let before = now();
    host.write_all(&[0]).await?;
    let time = host.read_u64().await?;
    let after = now();
    let time = i64::try_from(time).map_err(|_| io::ErrorKind::InvalidData)?;
    let error = after.saturating_sub(before) / 2;
    Ok(Measured { ahead: time.saturating_sub(before.saturating_add(error)), error: error.saturating_abs() })
}

fn decide(Measured { ahead, error }: Measured, pause: Duration, first: bool) -> Correction {
    let nanoseconds = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
    // A clock that nobody has set is half a second off as a rule: whatever the host says is nearer.
    if first && ahead != 0 {
        return Correction::Step(ahead);
    }
    if ahead.saturating_abs() <= error {
        // It may as well be right.
        return Correction::Slew(0);
    }
    if ahead.saturating_abs() > nanoseconds(STEP) {
        return Correction::Step(ahead);
    }
    // Within a second this does not overflow.
    Correction::Slew((ahead * 1_000_000 / nanoseconds(pause)).clamp(-MOST_PPM, MOST_PPM))
}

fn correct(correction: Correction) -> io::Result<()> {
    match correction {
        Correction::Step(by) => {
            let time = now().saturating_add(by);
            let time =
                Timespec { tv_sec: time.div_euclid(1_000_000_000), tv_nsec: time.rem_euclid(1_000_000_000) };
            clock_settime(ClockId::Realtime, time)?;
            sys::run_clock_faster(0)
        }
        Correction::Slew(ppm) => sys::run_clock_faster(ppm),
    }
}

fn now() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

/// Whether the kernel had to make do with its timer's interrupts. It decides during the first seconds of a boot.
fn counts_ticks() -> bool {
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    std::fs::read_to_string(source)
        .is_ok_and(|name| matches!(name.trim(), "jiffies" | "refined-jiffies" | "pit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;
    const S: i64 = 1_000 * MS;

    fn decided(ahead: i64, error: i64) -> Correction {
        decide(Measured { ahead, error }, STEADY, false)
    }

    /// It was set once, at the start, and lost seconds per minute from then on.
    #[test]
    fn a_clock_that_is_far_off_is_set_and_one_that_is_near_never_jumps() {
        for ahead in [30 * S, S + 1, -S - 1, -3600 * S] {
            assert_eq!(decided(ahead, MS), Correction::Step(ahead));
        }
        for ahead in [S, 300 * MS, MS, -MS, -300 * MS, -S] {
            let Correction::Slew(ppm) = decided(ahead, 0) else { panic!("{ahead} is a jump") };
            assert!(ppm.signum() == ahead.signum() && ppm.abs() <= MOST_PPM, "{ahead}: {ppm}");
        }
        // By the next look it is made up for.
        assert_eq!(decided(100 * MS, MS), Correction::Slew(10_000));
    }

    #[test]
    fn what_may_be_the_exchanges_own_delay_is_left_alone() {
        assert_eq!(decided(20 * MS, 25 * MS), Correction::Slew(0));
    }

    /// On a busy host the first exchange took longer than the clock was off, and the clock was left as it was.
    #[test]
    fn before_anything_runs_the_clock_is_set_to_the_hosts() {
        for error in [MS, 600 * MS] {
            assert_eq!(
                decide(Measured { ahead: -400 * MS, error }, STEADY, true),
                Correction::Step(-400 * MS)
            );
        }
    }

    #[tokio::test]
    async fn the_time_is_that_of_the_middle_of_the_shortest_exchange() {
        let (mut guest, mut host) = tokio::io::duplex(64);
        tokio::spawn(async move {
            for delay in [80, 5, 80, 80] {
                host.read_u8().await.unwrap();
                sleep(Duration::from_millis(delay)).await;
                let time = u64::try_from(now() + 7 * S).unwrap();
                sleep(Duration::from_millis(delay)).await;
                host.write_u64(time).await.unwrap();
            }
        });
        let Measured { ahead, error } = measure(&mut guest).await.unwrap();
        assert!((ahead - 7 * S).abs() <= error && error < 75 * MS, "{ahead} {error}");
    }

    #[tokio::test]
    async fn a_host_that_goes_away_or_talks_nonsense_is_an_error() {
        let (mut guest, host) = tokio::io::duplex(64);
        drop(host);
        assert!(measure(&mut guest).await.is_err());
        let (mut guest, mut host) = tokio::io::duplex(64);
        host.write_u64(u64::MAX).await.unwrap();
        assert!(measure(&mut guest).await.is_err());
    }
}
