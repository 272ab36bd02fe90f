//! Reports through real queues in real memory: honest ones, and those of a guest that wants to do harm.

use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use msb_krun_devices::BusDevice;
use msb_krun_devices::legacy::{IrqChipDevice, IrqChipT};
use msb_krun_devices::virtio::{DeviceQueue, InterruptTransport, Queue, VirtioDevice};
use msb_krun_utils::eventfd::{EFD_NONBLOCK, EventFd};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::ranges::{PAGE, Tally};
use super::worker::{Round, State};
use super::{Balloon, QUEUE_SIZE, memory};

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;

const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Behind the rings.
const PAGES: u64 = 0x10_000;
/// Two regions of this length with a gap between them.
const LENGTH: u64 = 64 * PAGE;
const SECOND: u64 = 2 * LENGTH;

/// The guest's side of the reporting queue.
struct Guest {
    state: State,
    queue: Queue,
    made_available: u16,
}

impl Guest {
    fn new() -> Self {
        let ranges = [(GuestAddress(0), LENGTH as usize), (GuestAddress(SECOND), LENGTH as usize)];
        Self::with_memory(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    fn with_memory(memory: GuestMemoryMmap) -> Self {
        let mut queue = Queue::new(QUEUE_SIZE);
        queue.size = QUEUE_SIZE;
        queue.ready = true;
        queue.desc_table = GuestAddress(TABLE);
        queue.avail_ring = GuestAddress(AVAILABLE);
        queue.used_ring = GuestAddress(USED);
        let state = State { regions: memory::regions(&memory), memory, tally: Arc::new(Tally::default()) };
        Self { state, queue, made_available: 0 }
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.state.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn byte(&self, at: u64) -> u8 {
        self.state.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, index: u16, (start, length): (u64, u32), flags: u16, next: u16) {
        let at = TABLE + 16 * u64::from(index);
        self.write(start, at);
        self.write(length, at + 8);
        self.write(flags, at + 12);
        self.write(next, at + 14);
    }

    /// A chain of the ranges, from the first descriptor on.
    fn chain(&self, ranges: &[(u64, u32)]) {
        for (index, range) in (0_u16..).zip(ranges) {
            let more = usize::from(index) + 1 < ranges.len();
            self.descriptor(index, *range, WRITABLE | if more { NEXT } else { 0 }, index + 1);
        }
    }

    fn offer(&mut self, head: u16) {
        self.write(head, AVAILABLE + 4 + 2 * u64::from(self.made_available % QUEUE_SIZE));
        self.made_available += 1;
        self.write(self.made_available, AVAILABLE + 2);
    }

    fn report(&mut self, ranges: &[(u64, u32)]) -> Round {
        self.chain(ranges);
        self.offer(0);
        self.state.round(&mut self.queue)
    }

    fn answers(&self) -> u16 {
        self.state.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn refused(&self) -> u64 {
        self.state.tally.refused()
    }
}

const DONE: Round = Round { answered: true, more: false };

#[test]
fn reported_pages_are_given_back_and_their_neighbours_keep_their_content() {
    let mut guest = Guest::new();
    for at in [PAGES - 1, PAGES, PAGES + PAGE, PAGES + 2 * PAGE, SECOND, SECOND + LENGTH - 1] {
        guest.write(7_u8, at);
    }
    assert_eq!(guest.report(&[(PAGES, 2 * PAGE as u32), (SECOND, PAGE as u32)]), DONE);
    let left = [PAGES - 1, PAGES, PAGES + PAGE, PAGES + 2 * PAGE, SECOND, SECOND + LENGTH - 1];
    assert_eq!(left.map(|at| guest.byte(at)), [7, 0, 0, 7, 0, 7]);
    assert_eq!((guest.answers(), guest.refused()), (1, 0));
    assert_eq!(guest.state.tally.given_back(), 3 * PAGE);
    assert!(guest.queue.capture_state().is_ok(), "a report is still owned by the device");
}

// What lies behind guest memory in the VMM's address space could be emptied by a report that was too long.
#[test]
fn hostile_ranges_change_nothing_and_are_answered() {
    let mut guest = Guest::new();
    guest.write(7_u8, SECOND + LENGTH - PAGE);
    guest.write(7_u8, PAGES);
    let page = PAGE as u32;
    let hostile = [
        (SECOND + LENGTH - PAGE, 2 * page),
        (SECOND + LENGTH, page),
        (LENGTH - PAGE, (2 * LENGTH) as u32),
        (u64::MAX - PAGE + 1, 2 * page),
        (PAGES, 0),
        (PAGES, u32::MAX),
        (PAGES, u32::MAX - (page - 1)),
        (PAGES + 1, page),
        (PAGES, page + 1),
    ];
    assert_eq!(guest.report(&hostile), DONE);
    assert_eq!((guest.answers(), guest.refused()), (1, hostile.len() as u64));
    assert_eq!(guest.state.tally.given_back(), 0);
    assert_eq!([SECOND + LENGTH - PAGE, PAGES].map(|at| guest.byte(at)), [7, 7]);
}

#[test]
fn a_refused_range_does_not_keep_the_others_of_its_report_from_being_given_back() {
    let mut guest = Guest::new();
    guest.write(7_u8, PAGES);
    guest.report(&[(SECOND + LENGTH, PAGE as u32), (PAGES, PAGE as u32)]);
    assert_eq!((guest.byte(PAGES), guest.refused()), (0, 1));
}

#[test]
fn ranges_that_the_device_may_not_write_to_are_refused() {
    let mut guest = Guest::new();
    guest.write(7_u8, PAGES);
    guest.descriptor(0, (PAGES, PAGE as u32), 0, 0);
    guest.offer(0);
    assert_eq!(guest.state.round(&mut guest.queue), DONE);
    assert_eq!((guest.byte(PAGES), guest.refused(), guest.answers()), (7, 1, 1));
}

#[test]
fn a_chain_that_leads_back_to_itself_ends_after_one_queue_of_ranges() {
    let mut guest = Guest::new();
    guest.descriptor(0, (PAGES, 1), WRITABLE | NEXT, 1);
    guest.descriptor(1, (PAGES, 1), WRITABLE | NEXT, 0);
    guest.offer(0);
    assert_eq!(guest.state.round(&mut guest.queue), DONE);
    assert_eq!((guest.refused(), guest.answers()), (u64::from(QUEUE_SIZE), 1));
}

#[test]
fn heads_and_links_outside_of_the_table_are_no_reports() {
    let mut guest = Guest::new();
    guest.descriptor(0, (PAGES, PAGE as u32), WRITABLE | NEXT, QUEUE_SIZE);
    guest.offer(0);
    assert!(!guest.state.round(&mut guest.queue).more);
    let mut guest = Guest::new();
    guest.offer(QUEUE_SIZE);
    assert_eq!(guest.state.round(&mut guest.queue), Round { answered: false, more: false });
    assert_eq!(guest.state.tally.given_back(), 0);
}

#[test]
fn a_guest_that_never_stops_reporting_gets_one_queue_answered_a_round() {
    let mut guest = Guest::new();
    guest.chain(&[(PAGES, PAGE as u32)]);
    for slot in 0..u64::from(QUEUE_SIZE) {
        guest.write(0_u16, AVAILABLE + 4 + 2 * slot);
    }
    // As far ahead as the index can be.
    guest.write(u16::MAX, AVAILABLE + 2);
    let round = guest.state.round(&mut guest.queue);
    assert_eq!((round, guest.answers()), (Round { answered: true, more: true }, QUEUE_SIZE));
}

#[test]
fn a_queue_whose_rings_are_not_all_in_memory_is_not_served() {
    let mut guest = Guest::new();
    assert!(memory::holds(&guest.state.memory, &guest.queue));
    // It ends in memory and begins in the gap before it.
    guest.queue.used_ring = GuestAddress(SECOND - 64);
    assert!(!memory::holds(&guest.state.memory, &guest.queue));
    guest.queue.used_ring = GuestAddress(USED);
    guest.queue.desc_table = GuestAddress(u64::MAX - 15);
    assert!(!memory::holds(&guest.state.memory, &guest.queue));
    guest.queue.desc_table = GuestAddress(TABLE);
    guest.queue.ready = false;
    assert!(!memory::holds(&guest.state.memory, &guest.queue));
}

/// Memory that is a file of this length, from its second page on.
fn file_memory(shared: bool) -> (File, GuestMemoryMmap) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LENGTH + PAGE).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), PAGE);
    let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let mapping: MmapRegion = MmapRegionBuilder::new(LENGTH as usize)
        .with_file_offset(offset)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    (file, GuestMemoryMmap::from_regions(vec![region]).unwrap())
}

#[test]
fn of_memory_that_is_a_file_the_file_lets_go_of_the_pages() {
    use std::os::unix::fs::{FileExt, MetadataExt};

    let (file, memory) = file_memory(true);
    file.write_all_at(&[7; 3 * PAGE as usize], PAGES).unwrap();
    file.sync_all().unwrap();
    let before = file.metadata().unwrap();
    let mut guest = Guest::with_memory(memory);
    // The file's page at PAGES is the guest's one before.
    assert_eq!(guest.byte(PAGES), 7);
    guest.report(&[(PAGES, PAGE as u32)]);
    assert_eq!([PAGES - 1, PAGES, PAGES + PAGE].map(|at| guest.byte(at)), [7, 0, 7]);
    let after = file.metadata().unwrap();
    assert_eq!(after.len(), before.len());
    assert!(after.blocks() < before.blocks() + 8 * 4, "{} blocks, then {}", before.blocks(), after.blocks());
    let mut hole = [1];
    file.read_exact_at(&mut hole, PAGES + PAGE).unwrap();
    assert_eq!(hole, [0]);
}

// A copy-on-write machine shares its file with others: giving memory back must not reach them.
#[test]
fn of_a_private_copy_of_a_file_only_the_copy_goes() {
    use std::os::unix::fs::FileExt;

    let (file, memory) = file_memory(false);
    file.write_all_at(&[5; PAGE as usize], PAGES + PAGE).unwrap();
    let mut guest = Guest::with_memory(memory);
    guest.write(7_u8, PAGES);
    guest.report(&[(PAGES, PAGE as u32)]);
    assert_eq!((guest.byte(PAGES), guest.refused()), (5, 0));
    let mut kept = [0; 1];
    file.read_exact_at(&mut kept, PAGES + PAGE).unwrap();
    assert_eq!(kept, [5]);
}

#[test]
fn the_device_offers_reporting_alone_and_an_empty_balloon() {
    let mut balloon = Balloon::default();
    assert_eq!(balloon.avail_features(), 1 << 32 | 1 << 5);
    balloon.set_acked_features(u64::MAX);
    assert_eq!(balloon.acked_features(), 1 << 32 | 1 << 5);
    for (offset, expected) in [(0, [0; 8]), (12, [0, 0, 0, 0, 9, 9, 9, 9]), (16, [9; 8]), (u64::MAX, [9; 8])]
    {
        let mut data = [9; 8];
        balloon.read_config(offset, &mut data);
        assert_eq!(data, expected, "at {offset}");
    }
    balloon.write_config(u64::MAX, &[1; 4]);
    assert!(!balloon.is_activated() && balloon.quiesce().is_err() && balloon.reset());
}

/// An interrupt controller that only signals.
struct Interrupts;

impl BusDevice for Interrupts {}

impl IrqChipT for Interrupts {
    fn get_mmio_addr(&self) -> u64 {
        0
    }

    fn get_mmio_size(&self) -> u64 {
        0
    }

    fn num_pins(&self) -> usize {
        0
    }

    fn set_irq(&self, _: Option<u32>, event: Option<&EventFd>) -> Result<(), msb_krun_devices::Error> {
        event
            .map_or(Ok(()), |event| event.write(1))
            .map_err(msb_krun_devices::Error::FailedSignalingUsedQueue)
    }
}

/// The queues as the transport hands them over: the first two are not set up.
fn handed_over(guest: &mut Guest) -> Vec<DeviceQueue> {
    let reporting = std::mem::replace(&mut guest.queue, Queue::new(QUEUE_SIZE));
    let event = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    [Queue::new(QUEUE_SIZE), Queue::new(QUEUE_SIZE), reporting]
        .map(|queue| DeviceQueue::new(queue, event()))
        .into()
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_thread_answers_gives_the_queues_back_and_goes_on_where_it_was() {
    let mut guest = Guest::new();
    let chip = Arc::new(Mutex::new(IrqChipDevice::new(Box::new(Interrupts))));
    let interrupt = InterruptTransport::new(chip, "balloon".to_owned()).unwrap();
    let queues = handed_over(&mut guest);
    let events: Vec<_> = queues.iter().map(|queue| Arc::clone(&queue.event)).collect();
    let mut balloon = Balloon::default();
    balloon.activate(guest.state.memory.clone(), interrupt.clone(), queues).unwrap();

    guest.chain(&[(PAGES, PAGE as u32)]);
    guest.offer(0);
    events[2].write(1).unwrap();
    wait_for("no answer", || guest.answers() == 1);
    wait_for("no interrupt", || interrupt.status().load(Ordering::SeqCst) == 1);

    let queues = balloon.quiesce().unwrap();
    assert!(!balloon.is_activated());
    assert!(queues.iter().zip(&events).all(|(queue, event)| Arc::ptr_eq(&queue.event, event)));
    // Reported while nobody listens, and answered after the pause.
    guest.offer(0);
    events[2].write(1).unwrap();
    balloon.activate(guest.state.memory.clone(), interrupt, queues).unwrap();
    wait_for("no answer after a pause", || guest.answers() == 2);
    assert!(balloon.reset() && !balloon.is_activated());
}

// A guest that sets its queue up outside of memory must not end the machine or take a processor.
#[test]
fn a_device_with_an_unusable_queue_is_idle_until_it_is_stopped() {
    let mut guest = Guest::new();
    guest.queue.avail_ring = GuestAddress(1 << 40);
    let chip = Arc::new(Mutex::new(IrqChipDevice::new(Box::new(Interrupts))));
    let interrupt = InterruptTransport::new(chip, "balloon".to_owned()).unwrap();
    let queues = handed_over(&mut guest);
    let event = Arc::clone(&queues[2].event);
    let mut balloon = Balloon::default();
    balloon.activate(guest.state.memory.clone(), interrupt, queues).unwrap();
    event.write(1).unwrap();
    assert_eq!(balloon.quiesce().unwrap().len(), 3);
    assert_eq!(event.read().unwrap(), 1, "the notification was taken");
    assert_eq!(guest.answers(), 0);
}
