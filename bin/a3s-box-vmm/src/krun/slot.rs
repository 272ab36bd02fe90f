//! Devices of our own on a libkrun machine.
//!
//! libkrun attaches only devices of its own types. But the machine is built paused, and a transport may be exchanged
//! while no processor runs: `replace` puts a transport with our device where libkrun put one of the same type. The
//! slot keeps its place on the bus, its interrupt and its entry on the kernel's command line, and libkrun finds our
//! device there when it pauses or saves the machine.
//!
//! ```text
//! guest ── register access ── bus ── slot ── transport ── device
//!   │                                            │
//!   └── notify ── KVM ── one eventfd per queue ──┤
//!                 KVM ◀── interrupt's eventfd ───┘
//! ```
//!
//! What must be exchanged with the transport are the eventfds that KVM knows, because each transport makes its own.

use std::sync::{Arc, Mutex};

use anyhow::{Context, anyhow};
use kvm_ioctls::{IoEventAddress, VmFd};
use msb_krun_devices::legacy::{IrqChip, IrqChipDevice, IrqChipT};
use msb_krun_devices::virtio::{MmioTransport, NOTIFY_REG_OFFSET, VirtioDevice};
use msb_krun_devices::{BusDevice, DeviceType};
use msb_krun_utils::eventfd::EventFd;
use msb_krun_vmm::Vmm;

/// libkrun gives each device this much of the address space, in the order of interrupts.
const SLOT_SIZE: u64 = 0x1000;

/// A device as libkrun names it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    /// Virtio's number of the kind of device.
    pub(crate) kind: u32,
    /// libkrun's name of the device.
    pub(crate) id: &'static str,
}

/// Puts `device` into `slot` in place of libkrun's own. No processor of `machine` has run yet.
pub(crate) fn replace(machine: &Vmm, slot: Slot, device: Arc<Mutex<dyn VirtioDevice>>) -> anyhow::Result<()> {
    let place = machine
        .get_bus_device(DeviceType::Virtio(slot.kind), slot.id)
        .with_context(|| format!("libkrun has attached no device {}", slot.id))?;
    let mut place = place.lock().map_err(|_| anyhow!("the slot of {} is poisoned", slot.id))?;
    let old = (*place)
        .as_mut_any()
        .downcast_mut::<MmioTransport>()
        .with_context(|| format!("{} is not behind a transport", slot.id))?;
    let line = old.capture_state().ok().and_then(|state| state.irq_line);
    let line = line.with_context(|| format!("{} is in use or has no interrupt", slot.id))?;
    let mut new = MmioTransport::new(machine.guest_memory().clone(), in_kernel(), device)
        .map_err(|error| anyhow!("make a transport for {}: {error}", slot.id))?;
    new.set_irq_line(line);
    let vm = machine.kvm_vm().fd();
    disconnect(vm, old, line)
        .and_then(|()| connect(vm, &new, line))
        .with_context(|| format!("exchange {}", slot.id))?;
    *old = new;
    Ok(())
}

fn notify_address(line: u32) -> IoEventAddress {
    let slot = u64::from(line - msb_krun_arch::IRQ_BASE);
    IoEventAddress::Mmio(msb_krun_arch::MMIO_MEM_START + slot * SLOT_SIZE + u64::from(NOTIFY_REG_OFFSET))
}

/// KVM refuses to forget what it does not know: this fails if libkrun has laid out its slots in another way.
fn disconnect(vm: &VmFd, transport: &MmioTransport, line: u32) -> anyhow::Result<()> {
    for (queue, event) in (0_u32..).zip(transport.queue_evts()) {
        vm.unregister_ioevent(event, &notify_address(line), queue)
            .with_context(|| format!("disconnect queue {queue}"))?;
    }
    vm.unregister_irqfd(transport.interrupt_evt(), line).context("disconnect the interrupt")
}

fn connect(vm: &VmFd, transport: &MmioTransport, line: u32) -> anyhow::Result<()> {
    for (queue, event) in (0_u32..).zip(transport.queue_evts()) {
        vm.register_ioevent(event, &notify_address(line), queue)
            .with_context(|| format!("connect queue {queue}"))?;
    }
    vm.register_irqfd(transport.interrupt_evt(), line).context("connect the interrupt")
}

/// The interrupt controller as a transport sees it: KVM's own, which is told by the transport's eventfd.
fn in_kernel() -> IrqChip {
    Arc::new(Mutex::new(IrqChipDevice::new(Box::new(InKernel))))
}

struct InKernel;

impl BusDevice for InKernel {}

impl IrqChipT for InKernel {
    /// It is not on the bus.
    fn get_mmio_addr(&self) -> u64 {
        0
    }

    fn get_mmio_size(&self) -> u64 {
        0
    }

    fn num_pins(&self) -> usize {
        0
    }

    fn set_irq(&self, _line: Option<u32>, event: Option<&EventFd>) -> Result<(), msb_krun_devices::Error> {
        let missing = || msb_krun_devices::Error::IoError(std::io::ErrorKind::NotFound.into());
        event.ok_or_else(missing)?.write(1).map_err(msb_krun_devices::Error::FailedSignalingUsedQueue)
    }
}
