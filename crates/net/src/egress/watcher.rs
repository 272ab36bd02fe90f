//! Pinning: a name's addresses are open from the moment on at which the pod can know them.
//!
//! The rules lead the answers of name servers into a tap that the daemon holds. It adds what they open to the rules, and
//! only then writes the frame back, from where it goes on to the guest. While no daemon is there answers wait, or
//! rather are dropped and asked for again: nothing is opened that nobody has looked at.
//!
//! Queries are not remembered. Whether an answer was asked for would be told by the guest, against which all this is; what
//! counts is that it came by the network and from a name server of the pod.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use a3s_box_core::BoxId;
use a3s_box_core::egress::EgressPolicy;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};

use super::answers::opened;
use super::rules::{MAX_PINS, pin};
use crate::nft::Nft;
use crate::tap;

/// What a tap puts before each frame.
const VNET_HEADER: usize = 10;
/// The largest frame with its header.
const MAX_FRAME: usize = VNET_HEADER + 14 + 65_535;
/// How many answers share one change of the rules.
const BATCH: usize = 64;
/// A pin that ends so much earlier than wanted is left as it is: names are asked for both families at once, and again
/// from caches that count the same time down.
const SLACK: Duration = Duration::from_secs(5);

/// The thread that pins the names of one pod. It and what it holds keep the pod's namespace alive.
#[derive(Debug)]
pub(super) struct Watcher {
    /// Closed, it tells the thread to end.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts the thread. To be called in the pod's namespace, where it then lives.
    pub(super) fn start(id: &BoxId, dns: &str, policy: EgressPolicy, nft: Nft) -> io::Result<Self> {
        let tap = tap::attach(dns)?;
        fcntl_setfl(&tap, fcntl_getfl(&tap)? | OFlags::NONBLOCK)?;
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC)?;
        let id = id.clone();
        let pins = Pins { policy, nft, known: HashMap::new(), full: false };
        let thread = std::thread::Builder::new().name("egress".to_owned()).spawn(move || {
            if let Err(error) = watch(&id, tap, &stopped, pins) {
                tracing::error!(%id, %error, "names are no longer opened for this pod: its answers cannot be read");
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }

    /// Ends the thread and waits for that. Afterwards nothing of it holds the namespace.
    pub(super) fn stop(mut self) {
        self.stop.take();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that pins names had panicked");
        }
    }
}

fn watch(id: &BoxId, mut tap: File, stopped: &OwnedFd, mut pins: Pins) -> io::Result<()> {
    let mut buffer = vec![0; MAX_FRAME];
    loop {
        let mut both =
            [PollFd::new(stopped.as_fd(), PollFlags::POLLIN), PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        match poll(&mut both, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        if both[0].any() == Some(true) {
            return Ok(());
        }
        let frames = read_all(&mut tap, &mut buffer)?;
        pins.open(id, &frames);
        for frame in &frames {
            // One that is lost is asked for again.
            let _ = tap.write(frame);
        }
    }
}

/// What has arrived, with its headers, as far as it shares a change.
fn read_all(tap: &mut File, buffer: &mut [u8]) -> io::Result<Vec<Vec<u8>>> {
    let mut frames = Vec::new();
    while frames.len() < BATCH {
        match tap.read(buffer) {
            Ok(length) => frames.push(buffer[..length].to_vec()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(frames)
}

struct Pins {
    policy: EgressPolicy,
    nft: Nft,
    /// What this thread has opened, and until when. An earlier daemon may have opened more.
    known: HashMap<IpAddr, Instant>,
    /// It has been said that there are too many.
    full: bool,
}

impl Pins {
    /// Opens what the answers say, before the guest can have read them.
    fn open(&mut self, id: &BoxId, frames: &[Vec<u8>]) {
        let now = Instant::now();
        let wanted = frames
            .iter()
            .flat_map(|frame| opened(frame.get(VNET_HEADER..).unwrap_or_default(), &self.policy))
            .collect::<Vec<_>>();
        let new = self.missing(id, wanted, now);
        if new.is_empty() {
            return;
        }
        let elements: Vec<_> = new.iter().map(|(ip, time)| (*ip, time.as_secs())).collect();
        match self.nft.run(&pin(&elements), None) {
            Ok(()) => self.known.extend(new.into_iter().map(|(ip, time)| (ip, now + time))),
            Err(error) => tracing::warn!(%id, %error, "addresses of allowed names were not opened for a pod"),
        }
    }

    /// Those that are not open for long enough, each once, as far as there is room.
    fn missing(
        &mut self,
        id: &BoxId,
        wanted: Vec<(IpAddr, Duration)>,
        now: Instant,
    ) -> HashMap<IpAddr, Duration> {
        let mut new: HashMap<IpAddr, Duration> = HashMap::new();
        for (ip, time) in wanted {
            if self.known.get(&ip).is_none_or(|until| *until + SLACK < now + time) {
                let longest = new.entry(ip).or_default();
                *longest = time.max(*longest);
            }
        }
        if self.known.len() + new.len() > MAX_PINS {
            self.known.retain(|_, until| *until > now);
        }
        let mut room = MAX_PINS.saturating_sub(self.known.len());
        let mut full = false;
        new.retain(|ip, _| {
            if self.known.contains_key(ip) {
                return true;
            }
            let fits = room > 0;
            room = room.saturating_sub(1);
            full |= !fits;
            fits
        });
        if full && !self.full {
            tracing::warn!(%id, most = MAX_PINS, "a pod has looked up so many addresses that further ones stay closed to it");
        }
        self.full = full;
        new
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::path::Path;

    use super::*;

    #[test]
    fn pins_are_renewed_when_their_time_is_nearly_over_and_are_not_without_number() {
        let nft = Nft::find(Path::new("sh"), Duration::from_secs(1)).unwrap();
        let mut pins = Pins { policy: EgressPolicy::default(), nft, known: HashMap::new(), full: false };
        let (id, start, minute) = (BoxId::from_random([1; 32]), Instant::now(), Duration::from_secs(60));
        let ip = |n: u32| IpAddr::V4(Ipv4Addr::from_bits(n));
        let mut open = |wanted: Vec<IpAddr>, at: Instant| {
            let new = pins.missing(&id, wanted.into_iter().map(|ip| (ip, minute)).collect(), at);
            pins.known.extend(new.keys().map(|ip| (*ip, at + minute)));
            new.len()
        };
        assert_eq!(open(vec![ip(1), ip(1), ip(2)], start), 2);
        assert_eq!(open(vec![ip(1)], start + Duration::from_secs(3)), 0, "it is open for long enough");
        assert_eq!(open(vec![ip(1)], start + Duration::from_secs(30)), 1);
        assert_eq!(open((0..5000).map(ip).collect(), start + Duration::from_secs(31)), MAX_PINS - 1);
        assert_eq!(open(vec![ip(9000)], start + Duration::from_secs(32)), 0);
        assert_eq!(open(vec![ip(9000)], start + Duration::from_secs(600)), 1, "their time is over");
    }
}
