//! `a3s-box-vmm kvm-speed`: how long does KVM take for a million instructions?
//!
//! A /dev/kvm can exist, answer, and still not run a guest on the processor: where the host is itself a guest
//! without nested virtualization, some kernels interpret instruction after instruction. Such a guest would boot for
//! minutes, or end at the first instruction that the interpreter lacks. This counts down a register in a
//! machine of one page and prints the microseconds; whoever calls it sets a limit.

use std::time::Instant;

use anyhow::{Context, bail};
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use a3s_box_vmm::probe::KVM_SPEED_INSTRUCTIONS;

const CODE_AT: u64 = 0x1000;
const PAGE: usize = 4096;

/// `dec ecx; jnz -3; hlt` in 32-bit code.
const CODE: [u8; 4] = [0x49, 0x75, 0xfd, 0xf4];

/// Answers with the microseconds.
pub(crate) fn measure() -> anyhow::Result<u128> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    let vm = kvm.create_vm().context("create a machine")?;
    // Declared after the machine, so freed before it; nothing runs then.
    let page = Page::new()?;
    page.map(&vm)?;
    let mut vcpu = vm.create_vcpu(0).context("create a processor")?;
    prepare(&vcpu)?;
    let started = Instant::now();
    match vcpu.run().context("run the guest")? {
        VcpuExit::Hlt => Ok(started.elapsed().as_micros()),
        other => bail!("the guest stopped with {other:?}"),
    }
}

/// 32-bit code on flat segments, without paging.
fn prepare(vcpu: &VcpuFd) -> anyhow::Result<()> {
    let mut system = vcpu.get_sregs().context("read the system registers")?;
    let flat = |type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    system.cs = flat(0xb);
    let data = flat(0x3);
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    // Protection enable.
    system.cr0 |= 1;
    vcpu.set_sregs(&system).context("set the system registers")?;
    let mut registers = vcpu.get_regs().context("read the registers")?;
    registers.rip = CODE_AT;
    // Two instructions per round. Bit 1 of the flags is always set.
    registers.rcx = KVM_SPEED_INSTRUCTIONS / 2;
    registers.rflags = 2;
    vcpu.set_regs(&registers).context("set the registers")
}

/// One page of memory with the code.
struct Page(*mut u8);

#[allow(unsafe_code)]
impl Page {
    fn new() -> anyhow::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let page = unsafe {
            mmap_anonymous(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        let page = page.context("map a page")?.cast::<u8>();
        // SAFETY: the page is writable, longer than the code, and nobody else knows it.
        unsafe { std::ptr::copy_nonoverlapping(CODE.as_ptr(), page, CODE.len()) };
        Ok(Self(page))
    }

    fn map(&self, vm: &VmFd) -> anyhow::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: CODE_AT,
            memory_size: PAGE as u64,
            userspace_addr: self.0 as u64,
            flags: 0,
        };
        // SAFETY: the page stays mapped while the guest runs, and is not used from here meanwhile.
        unsafe { vm.set_user_memory_region(region) }.context("give the machine its memory")
    }
}

#[allow(unsafe_code)]
impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made; the guest does not run any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), PAGE) };
    }
}
