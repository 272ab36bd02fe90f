//! The thread between the queues and the sockets.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::thread::{self, JoinHandle};

use a3s_box_vsock::Vsock as Sockets;
use a3s_box_vsock::device::MAX_PAYLOAD;
use a3s_box_vsock::packet::{HEADER, Header};
use msb_krun_devices::virtio::descriptor_utils::{Reader, Writer};
use msb_krun_devices::virtio::{DescriptorChain, DeviceQueue, InterruptTransport, Queue};
use msb_krun_utils::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use msb_krun_utils::eventfd::{EFD_NONBLOCK, EventFd};
use vm_memory::GuestMemoryMmap;

use super::super::rings;

pub(super) const RECEIVE: usize = 0;
pub(super) const TRANSMIT: usize = 1;

/// Packets of one direction before the other has its turn.
const TURN: usize = 64;

/// The running thread and the way to stop it.
pub(super) struct Worker {
    stop: EventFd,
    thread: JoinHandle<(Box<Sockets>, Vec<DeviceQueue>)>,
}

impl Worker {
    /// The thread owns queues and sockets until it is stopped.
    pub(super) fn start(
        memory: GuestMemoryMmap,
        interrupt: InterruptTransport,
        queues: Vec<DeviceQueue>,
        sockets: Box<Sockets>,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let mut traffic = Traffic::new(memory, queues, sockets);
        let waiting = traffic.wait_for(&stop)?;
        let work = move || {
            if let Err(error) = traffic.run(&waiting, &stopped, || interrupt.signal_used_queue()) {
                // The hook ends the process: a guest without its vsock is of no use.
                panic!("vsock: {error}");
            }
            (traffic.sockets, traffic.queues)
        };
        Ok(Self { thread: thread::Builder::new().name("vsock".to_owned()).spawn(work)?, stop })
    }

    /// Waits for the thread, which is never longer busy than with one turn of each direction.
    pub(super) fn stop(self) -> io::Result<(Box<Sockets>, Vec<DeviceQueue>)> {
        self.stop.write(1)?;
        self.thread.join().map_err(|_| io::Error::other("the thread of vsock panicked"))
    }
}

pub(super) struct Traffic {
    memory: GuestMemoryMmap,
    sockets: Box<Sockets>,
    queues: Vec<DeviceQueue>,
    /// One packet's payload.
    buffer: Vec<u8>,
}

impl Traffic {
    pub(super) fn new(memory: GuestMemoryMmap, queues: Vec<DeviceQueue>, sockets: Box<Sockets>) -> Self {
        Self { memory, sockets, queues, buffer: vec![0; MAX_PAYLOAD] }
    }

    /// Moves everything that can be moved.
    #[cfg(test)]
    pub(super) fn look(&mut self) -> io::Result<()> {
        self.sockets.look()?;
        while self.turn(&|| {}) {
            self.sockets.look()?;
        }
        Ok(())
    }

    /// Whether the guest has every packet back.
    #[cfg(test)]
    pub(super) fn queues_are_whole(&self) -> bool {
        self.queues.iter().all(|queue| queue.queue.capture_state().is_ok())
    }

    /// What the thread waits for: its end, and guest and host if the queues are of use.
    fn wait_for(&self, stop: &EventFd) -> io::Result<Epoll> {
        let epoll = Epoll::new()?;
        let queues = &self.queues[..=TRANSMIT];
        let served = queues.iter().all(|queue| rings::hold(&self.memory, &queue.queue));
        let sides =
            queues.iter().map(|queue| queue.event.as_raw_fd()).chain([self.sockets.as_fd().as_raw_fd()]);
        for descriptor in std::iter::once(stop.as_raw_fd()).chain(sides.filter(|_| served)) {
            epoll.ctl(ControlOperation::Add, descriptor, &EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(epoll)
    }

    fn run(&mut self, waiting: &Epoll, stopped: &EventFd, used: impl Fn()) -> io::Result<()> {
        loop {
            let mut event = [EpollEvent::default()];
            match waiting.wait(1, -1, &mut event) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                waited => waited.map(drop)?,
            }
            if stopped.read().is_ok() {
                return Ok(());
            }
            for queue in &self.queues {
                // What was said is looked for below, whether it was said once or many times.
                let _ = queue.event.read();
            }
            self.sockets.look()?;
            // The end is looked for between turns: a guest that always has more cannot delay it.
            while self.turn(&used) {
                if stopped.read().is_ok() {
                    return Ok(());
                }
                self.sockets.look()?;
            }
        }
    }

    /// A turn of each direction. Answers whether there may be more.
    fn turn(&mut self, used: &impl Fn()) -> bool {
        let (taken, given) = (self.take_packets(), self.give_packets());
        if taken + given > 0 {
            used();
        }
        taken == TURN || given == TURN || (taken > 0 && self.sockets.device.has_packets())
    }

    fn take_packets(&mut self) -> usize {
        let Self { memory, sockets, queues, buffer } = self;
        let queue = &mut queues[TRANSMIT].queue;
        for taken in 0..TURN {
            if !sockets.device.takes_packets() {
                return taken;
            }
            let Some(chain) = queue.pop(memory) else { return taken };
            let head = chain.index;
            if let Some((header, length)) = read(memory, chain, buffer) {
                sockets.device.from_guest(&header, &buffer[..length]);
            }
            answer(queue, memory, head, 0);
        }
        TURN
    }

    fn give_packets(&mut self) -> usize {
        let Self { memory, sockets, queues, buffer } = self;
        let queue = &mut queues[RECEIVE].queue;
        for given in 0..TURN {
            if !sockets.device.has_packets() {
                return given;
            }
            let Some(chain) = queue.pop(memory) else { return given };
            let head = chain.index;
            let written = match writer(memory, chain) {
                Some(mut writer) => {
                    let room = (writer.available_bytes() - HEADER).min(MAX_PAYLOAD);
                    let Some(header) = sockets.device.to_guest(&mut buffer[..room]) else {
                        queue.undo_pop();
                        return given;
                    };
                    write(&mut writer, &header, &buffer[..header.length as usize])
                }
                None => 0,
            };
            answer(queue, memory, head, written);
        }
        TURN
    }
}

/// The rings were found to lie in memory; nothing else can fail, and nothing could be done.
fn answer(queue: &mut Queue, memory: &GuestMemoryMmap, head: u16, written: u32) {
    let _ = queue.add_used(memory, head, written);
}

/// A packet of the guest, with its payload at the beginning of `buffer`: what there is of it, and as much as may be.
fn read(memory: &GuestMemoryMmap, chain: DescriptorChain<'_>, buffer: &mut [u8]) -> Option<(Header, usize)> {
    let mut reader = Reader::new(memory, chain).ok()?;
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).ok()?;
    let header = Header::parse(&header);
    let payload = &mut buffer[..(header.length as usize).min(MAX_PAYLOAD)];
    let mut length = 0;
    while length < payload.len() {
        match reader.read(&mut payload[length..]) {
            Ok(0) | Err(_) => break,
            Ok(more) => length += more,
        }
    }
    Some((header, length))
}

/// Room for a packet with at least one byte of payload.
fn writer<'a>(memory: &'a GuestMemoryMmap, chain: DescriptorChain<'a>) -> Option<Writer<'a>> {
    Writer::new(memory, chain).ok().filter(|writer| writer.available_bytes() > HEADER)
}

fn write(writer: &mut Writer<'_>, header: &Header, payload: &[u8]) -> u32 {
    // There is room, and it lies in memory: both were looked at.
    let written = writer.write_all(&header.bytes()).and_then(|()| writer.write_all(payload));
    if written.is_ok() { (HEADER + payload.len()) as u32 } else { 0 }
}
