//! The thread that answers the guest's reports.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::{io, thread};

use msb_krun_devices::virtio::{DescriptorChain, DeviceQueue, InterruptTransport, Queue};
use msb_krun_utils::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use msb_krun_utils::eventfd::{EFD_NONBLOCK, EventFd};
use vm_memory::GuestMemoryMmap;

use super::memory;
use super::ranges::{Region, Report, Tally, judge};
use super::{QUEUE_SIZE, REPORTING};

/// The running thread and the way to stop it.
pub(super) struct Worker {
    stop: EventFd,
    thread: JoinHandle<Vec<DeviceQueue>>,
}

impl Worker {
    /// The thread owns the queues until it is stopped.
    pub(super) fn start(
        memory: GuestMemoryMmap,
        interrupt: InterruptTransport,
        queues: Vec<DeviceQueue>,
        tally: Arc<Tally>,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let mut state = State { regions: memory::regions(&memory), memory, tally };
        let waiting = wait_for(&state, &queues[REPORTING], &stop)?;
        let work = move || {
            let mut queues = queues;
            state.work(&mut queues[REPORTING], &waiting, &stopped, || interrupt.signal_used_queue());
            queues
        };
        Ok(Self { thread: thread::Builder::new().name("balloon".to_owned()).spawn(work)?, stop })
    }

    /// Waits for the thread, which is never longer busy than with one round, and takes the queues back.
    pub(super) fn stop(self) -> io::Result<Vec<DeviceQueue>> {
        self.stop.write(1)?;
        self.thread.join().map_err(|_| io::Error::other("the balloon's thread panicked"))
    }
}

/// What the thread waits for: its end, and the guest if its queue is of use.
fn wait_for(state: &State, reporting: &DeviceQueue, stop: &EventFd) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let served = memory::holds(&state.memory, &reporting.queue);
    let guest = served.then(|| reporting.event.as_raw_fd());
    for descriptor in [Some(stop.as_raw_fd()), guest].into_iter().flatten() {
        epoll.ctl(ControlOperation::Add, descriptor, &EpollEvent::new(EventSet::IN, 0))?;
    }
    Ok(epoll)
}

/// What answering takes.
pub(super) struct State {
    pub(super) memory: GuestMemoryMmap,
    pub(super) regions: Vec<Region>,
    pub(super) tally: Arc<Tally>,
}

impl State {
    fn work(&mut self, reporting: &mut DeviceQueue, waiting: &Epoll, stopped: &EventFd, answered: impl Fn()) {
        loop {
            let mut event = [EpollEvent::default()];
            match waiting.wait(1, -1, &mut event) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return eprintln!("a3s-box-vmm: balloon: wait for the guest: {error}"),
            }
            // The end is looked for first: a guest that always has more to report cannot delay it.
            if stopped.read().is_ok() {
                return;
            }
            if reporting.event.read().is_err() {
                continue;
            }
            let round = self.round(&mut reporting.queue);
            if round.answered {
                answered();
            }
            if round.more && reporting.event.write(1).is_err() {
                return;
            }
        }
    }

    /// Answers at most one queue's worth of reports, each of at most that many ranges.
    pub(super) fn round(&mut self, queue: &mut Queue) -> Round {
        let mut answered = false;
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = queue.pop(&self.memory) else { return Round { answered, more: false } };
            let head = chain.index;
            self.report(chain);
            // The rings were found to lie in memory; nothing else can fail, and nothing could be done.
            let _ = queue.add_used(&self.memory, head, 0);
            answered = true;
        }
        Round { answered, more: true }
    }

    /// libkrun ends a chain that loops after as many descriptors as the queue has.
    fn report(&self, chain: DescriptorChain<'_>) {
        for descriptor in chain.into_iter().take(usize::from(QUEUE_SIZE)) {
            let report = Report {
                start: descriptor.addr.0,
                length: descriptor.len,
                writable: descriptor.is_write_only(),
            };
            let result =
                judge(&self.regions, report).map_err(|refusal| refusal.to_string()).and_then(|discard| {
                    memory::give_back(&self.memory, discard).map_err(|error| error.to_string())
                });
            match result {
                Ok(()) => self.tally.gave_back(u64::from(report.length)),
                Err(reason) => {
                    if self.tally.refuse() {
                        let Report { start, length, .. } = report;
                        eprintln!(
                            "a3s-box-vmm: balloon: the guest reported {length} free bytes at {start:#x}, which are left \
                             alone: {reason}. Further ranges like it are only counted."
                        );
                    }
                }
            }
        }
    }
}

/// What a round came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Round {
    /// The guest has answers to look at.
    pub(super) answered: bool,
    /// The round ended at its limit.
    pub(super) more: bool,
}
