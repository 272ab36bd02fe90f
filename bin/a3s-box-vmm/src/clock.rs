//! The host's clocks, for the guest: what the time is, and how fast the processor's counter counts.
//!
//! The guest asks for the time over one vsock connection, a byte per question; see `a3s_box_protocol::TIME_PORT`. It is
//! answered here and not by the daemon, because boxes outlive daemons.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use a3s_box_protocol::TIME_PORT;
use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{ClockId, clock_gettime};

use crate::dialled;

/// Enough for the few frames of the thread that answers.
const STACK: usize = 64 * 1024;

/// After an error that may pass, such as having no descriptor left.
const PAUSE: Duration = Duration::from_millis(100);

/// So long the counter is watched at least: 20 millionths are then the error. What comes before a guest's start takes as long.
const WATCHED: Duration = Duration::from_millis(5);

/// A reading that something came between is taken anew.
const READINGS: usize = 9;

/// What no processor's counter is.
const IMPOSSIBLE_KHZ: std::ops::RangeInclusive<u128> = 100_000..=100_000_000;

/// Answers the guest's questions until the process ends. Called before rights are given up.
pub(crate) fn serve_time() -> anyhow::Result<()> {
    let listener = dialled::listen(TIME_PORT)?;
    std::thread::Builder::new()
        .name("clock".to_owned())
        .stack_size(STACK)
        .spawn(move || answer(&listener))
        .context("start the clock's thread")?;
    Ok(())
}

/// One connection at a time: a guest that opens another has given the first one up.
fn answer(listener: &UnixListener) -> ! {
    let mut guest: Option<UnixStream> = None;
    loop {
        let mut waits = vec![PollFd::new(listener, PollFlags::IN)];
        waits.extend(guest.iter().map(|guest| PollFd::new(guest, PollFlags::IN)));
        let polled = poll(&mut waits, None);
        let asked = waits.get(1).is_some_and(|guest| !guest.revents().is_empty());
        let dialled = !waits[0].revents().is_empty();
        if polled.is_err() {
            std::thread::sleep(PAUSE);
            continue;
        }
        if asked && let Some(mut connection) = guest.take() {
            guest = reply(&mut connection).is_ok().then_some(connection);
        }
        if dialled {
            match listener.accept() {
                Ok((connection, _)) if connection.set_nonblocking(true).is_ok() => guest = Some(connection),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }
}

/// A guest that asks more than it reads loses the connection: nothing here waits for it.
fn reply(guest: &mut UnixStream) -> std::io::Result<()> {
    let mut question = [0];
    if guest.read(&mut question)? == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    guest.write_all(&now.to_be_bytes())
}

/// The processor's counter at a time of the clock that nobody sets or slews.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    ticks: u64,
    at: Duration,
}

impl Reading {
    /// Now. Of several readings the one is taken that took least.
    pub(crate) fn now() -> Self {
        let readings = (0..READINGS).map(|_| {
            let (before, ticks, after) = (raw_clock(), counter(), raw_clock());
            (after.saturating_sub(before), Self { ticks, at: before + after.saturating_sub(before) / 2 })
        });
        let best = readings.min_by_key(|(took, _)| *took);
        best.map_or(Self { ticks: 0, at: Duration::ZERO }, |(_, reading)| reading)
    }

    /// How fast the counter has counted since, in kHz; `None` if that cannot be.
    pub(crate) fn speed_since(self) -> Option<u32> {
        let missing = WATCHED.saturating_sub(raw_clock().saturating_sub(self.at));
        if !missing.is_zero() {
            std::thread::sleep(missing);
        }
        speed(self, Self::now())
    }
}

fn speed(first: Reading, second: Reading) -> Option<u32> {
    let ticks = u128::from(second.ticks.checked_sub(first.ticks)?);
    let nanoseconds = second.at.checked_sub(first.at)?.as_nanos();
    let khz = (ticks * 1_000_000).checked_div(nanoseconds)?;
    u32::try_from(khz).ok().filter(|_| IMPOSSIBLE_KHZ.contains(&khz))
}

fn raw_clock() -> Duration {
    let now = clock_gettime(ClockId::MonotonicRaw);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

#[allow(unsafe_code)]
fn counter() -> u64 {
    // SAFETY: the instruction reads a register that every x86-64 processor has, and changes nothing.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_speed_is_the_same_twice_and_nonsense_is_none() {
        let first = Reading::now();
        let speeds = [first.speed_since(), first.speed_since()].map(|speed| f64::from(speed.unwrap()));
        assert!((speeds[0] / speeds[1] - 1.0).abs() < 0.001, "{speeds:?}");
        let reading = |ticks, at| Reading { ticks, at: Duration::from_millis(at) };
        assert_eq!(speed(reading(0, 0), reading(50_000_000, 20)), Some(2_500_000));
        for (first, second) in [
            (reading(5, 0), reading(0, 20)),
            (reading(0, 20), reading(50_000_000, 20)),
            (reading(0, 0), reading(0, 20)),
            (reading(0, 0), reading(u64::MAX, 20)),
        ] {
            assert_eq!(speed(first, second), None, "{first:?} {second:?}");
        }
    }

    #[test]
    fn a_guest_is_told_the_time_and_the_last_one_to_dial_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("clock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || answer(&listener));
        let ask = |guest: &mut UnixStream| {
            guest.write_all(&[0]).unwrap();
            let mut answer = [0; 8];
            guest.read_exact(&mut answer).map(|()| Duration::from_nanos(u64::from_be_bytes(answer)))
        };
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let mut first = UnixStream::connect(&path).unwrap();
        for _ in 0..3 {
            let before = now();
            let said = ask(&mut first).unwrap();
            assert!(before <= said && said <= now(), "{said:?}");
        }
        let mut second = UnixStream::connect(&path).unwrap();
        assert!(ask(&mut second).is_ok());
        // Questions without end, and nobody who reads.
        second.set_nonblocking(true).unwrap();
        while second.write_all(&[0; 4096]).is_ok() {}
        drop(second);
        let mut third = UnixStream::connect(&path).unwrap();
        assert!(ask(&mut third).is_ok());
    }
}
