//! The libkrun backend: this process becomes the VM.
//!
//! The crates are those of msb_krun, a fork of libkrun that can pause, save and restore a machine. They are used below
//! the fork's own builder, which knows no serial port, no offloads on taps and no kernel but its own.

mod balloon;
mod nic;
mod rings;
mod share;
mod slot;
mod vsock;

use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicI32;
use std::sync::{Arc, Mutex};

use a3s_box_protocol::{FORGET_PORT, GUEST_CID, SHARE_TAG};
use a3s_box_vmm::cmdline;
use a3s_box_vmm::launch::{LaunchSpec, jail};
use a3s_box_vmm::share_requests::Requests;
use anyhow::{Context, anyhow};
use log::LevelFilter;
use msb_krun_devices::virtio::block::{ImageType, SyncMode};
use msb_krun_devices::virtio::{CacheType, TsiFlags};
use msb_krun_polly::event_manager::EventManager;
use msb_krun_utils::eventfd::{EFD_NONBLOCK, EventFd};
use msb_krun_vmm::Vmm;
use msb_krun_vmm::builder::build_microvm_paused;
use msb_krun_vmm::resources::{SerialConsoleConfig, VmResources};
use msb_krun_vmm::vmm_config::block::BlockDeviceConfig;
use msb_krun_vmm::vmm_config::external_kernel::{ExternalKernel, KernelFormat};
use msb_krun_vmm::vmm_config::fs::CustomFsDeviceConfig;
use msb_krun_vmm::vmm_config::machine_config::VmConfig;
use msb_krun_vmm::vmm_config::vsock::VsockDeviceConfig;
use rustix::process::{Resource, getrlimit};

use crate::clock::Reading;
use crate::jail::Opened;
use crate::share::room::Room;
use crate::status::Status;
use crate::{clock, counts, dialled, logs, panics, privileges};
use slot::Slot;

const VSOCK: Slot = Slot { kind: vsock::TYPE_VSOCK, id: "vsock" };
const BALLOON: Slot = Slot { kind: balloon::TYPE_BALLOON, id: "virtio_balloon" };

/// Descriptors that are not for files of the share: the machine's own, and one for each connection to the guest.
const RESERVED: u64 = 512;

/// What the exit code is until the guest or a processor says another.
const NO_EXIT_CODE: i32 = i32::MAX;

/// Builds the VM and enters it. On success the process ends with the guest.
pub(crate) fn run(spec: &LaunchSpec, opened: Opened, status: &Status) -> anyhow::Result<ExitCode> {
    let counter = Reading::now();
    privileges::keep_capabilities(privileges::FILE_SERVER)?;
    privileges::filter_system_calls()?;
    logs::keep_short(opened.logs)?;
    // Warnings come with every frame that a tap refuses.
    logs::of_library("libkrun", LevelFilter::Error);
    panics::end_the_process();
    let mut resources = machine(spec, counter.speed_since())?;
    console(&mut resources, opened.console)?;
    share(&mut resources, counts::map(&opened.requests)?)?;
    if !spec.trial {
        scratch(&mut resources)?;
    }
    let vsock = vsock::Vsock::new(&spec.plan, Path::new(jail::VSOCK))?;
    placeholders(&mut resources)?;
    let nics = spec.plan.network.iter().flat_map(|network| &network.nics);
    for (nic, tap) in nics.zip(opened.taps.into_iter().flatten()) {
        let nic = nic::config(nic, tap)?;
        resources.add_network_interface(nic).map_err(|error| anyhow!("libkrun: add a NIC: {error}"))?;
    }
    let mut events =
        EventManager::new().map_err(|error| anyhow!("libkrun: make its event loop: {error:?}"))?;
    let machine = build(&mut resources, &mut events)?;
    replace(&machine, vsock)?;
    clock::serve_time()?;
    give_back_what_building_took();
    status.up()?;
    enter(&machine, events)
}

/// The kernel was read as a whole to be laid out: 1.5 MB of what that took would stay in the heap of every box.
#[allow(unsafe_code)]
fn give_back_what_building_took() {
    // SAFETY: the C library's own allocator gives back pages that it has no use for.
    unsafe { libc::malloc_trim(0) };
}

/// Processors, memory and kernel.
fn machine(spec: &LaunchSpec, counter_khz: Option<u32>) -> anyhow::Result<VmResources> {
    let plan = &spec.plan;
    let mut resources = VmResources::default();
    let size = VmConfig {
        vcpu_count: Some(plan.vcpus),
        mem_size_mib: Some(plan.memory_mib as usize),
        max_vcpu_count: None,
        max_mem_size_mib: None,
        ht_enabled: Some(false),
        cpu_template: None,
    };
    resources.set_vm_config(&size).map_err(|error| anyhow!("libkrun: size the machine: {error}"))?;
    let initramfs_size =
        std::fs::metadata(jail::INITRAMFS).with_context(|| format!("look at {}", jail::INITRAMFS))?.len();
    resources.set_external_kernel(ExternalKernel {
        path: PathBuf::from(jail::KERNEL),
        format: KernelFormat::Elf,
        initramfs_path: Some(PathBuf::from(jail::INITRAMFS)),
        initramfs_size,
        cmdline: Some(cmdline::compose(plan, &spec.hypervisor, counter_khz)),
    });
    resources.enable_rng = true;
    resources.disable_implicit_console = true;
    Ok(resources)
}

/// The serial port. Nothing is ever typed; without an input libkrun refuses to be.
fn console(resources: &mut VmResources, output: std::fs::File) -> anyhow::Result<()> {
    let (input, silent) = std::io::pipe().context("make the console's input")?;
    // Open for as long as the process lives: at its end the port would be told of an end of input for ever.
    std::mem::forget(silent);
    // The machine owns both descriptors from here.
    let console = SerialConsoleConfig { input_fd: input.into_raw_fd(), output_fd: output.into_raw_fd() };
    resources.serial_consoles.push(console);
    Ok(())
}

fn share(resources: &mut VmResources, requests: &'static Requests) -> anyhow::Result<()> {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let room = Room::new(descriptors.saturating_sub(RESERVED), Some(dialled::listen(FORGET_PORT)?));
    let backend = share::Share::new(jail::SHARE, requests, room).context("libkrun: add the share")?;
    let backend = Arc::new(backend);
    resources.custom_fs.push(CustomFsDeviceConfig { fs_id: SHARE_TAG.to_owned(), backend, shm_size: None });
    Ok(())
}

/// Nothing on the scratch disk outlives the box: flushing it to the host's disk would only cost time.
fn scratch(resources: &mut VmResources) -> anyhow::Result<()> {
    let disk = BlockDeviceConfig {
        block_id: "scratch".to_owned(),
        cache_type: CacheType::Unsafe,
        disk_image_path: jail::SCRATCH.to_owned(),
        disk_image_format: ImageType::Raw,
        is_disk_read_only: false,
        direct_io: false,
        sync_mode: SyncMode::None,
        backend: None,
    };
    resources.add_block_device(disk).map_err(|error| anyhow!("libkrun: add the scratch disk: {error}"))
}

/// Devices of libkrun whose places ours take.
fn placeholders(resources: &mut VmResources) -> anyhow::Result<()> {
    resources.enable_balloon = true;
    let vsock = VsockDeviceConfig {
        vsock_id: VSOCK.id.to_owned(),
        guest_cid: GUEST_CID,
        host_port_map: None,
        unix_ipc_port_map: None,
        custom_port_map: None,
        custom_dgram_port_map: None,
        // No hijacking of the guest's sockets: a pod has its own network.
        tsi_flags: TsiFlags::empty(),
    };
    resources.set_vsock_device(vsock).map_err(|error| anyhow!("libkrun: add vsock: {error}"))
}

/// Puts our devices in their places.
fn replace(machine: &Mutex<Vmm>, vsock: vsock::Vsock) -> anyhow::Result<()> {
    let machine = machine.lock().map_err(|_| anyhow!("the machine is poisoned"))?;
    slot::replace(&machine, VSOCK, Arc::new(Mutex::new(vsock)))?;
    slot::replace(&machine, BALLOON, Arc::new(Mutex::new(balloon::Balloon::default())))
}

/// The machine, with every processor waiting.
fn build(resources: &mut VmResources, events: &mut EventManager) -> anyhow::Result<Arc<Mutex<Vmm>>> {
    let end = EventFd::new(EFD_NONBLOCK).context("make the event of the machine's end")?;
    // Messages come from an interrupt controller that this machine does not have.
    let (messages, _) = crossbeam_channel::unbounded();
    let exit_code = Arc::new(AtomicI32::new(NO_EXIT_CODE));
    let (machine, _placement) = build_microvm_paused(resources, events, None, messages, end, exit_code)
        .map_err(|error| anyhow!("libkrun: build the machine: {error}"))?;
    Ok(machine)
}

/// Returns only if the VM could not be started.
fn enter(machine: &Mutex<Vmm>, mut events: EventManager) -> anyhow::Result<ExitCode> {
    let started = machine.lock().map_err(|_| anyhow!("the machine is poisoned"))?.resume_vcpus();
    started.map_err(|error| anyhow!("libkrun: start the machine: {error}"))?;
    loop {
        events.run().map_err(|error| anyhow!("libkrun: its event loop: {error:?}"))?;
    }
}
