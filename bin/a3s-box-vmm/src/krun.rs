//! The libkrun backend: this process becomes the VM.

use std::ffi::{CString, c_char};
use std::io;
use std::os::fd::IntoRawFd;
use std::process::ExitCode;

use a3s_box_protocol::SHARE_TAG;
use a3s_box_vmm::launch::{LaunchSpec, jail, socket_name};
use a3s_box_vmm::{BoxPlan, GUEST_DIALS, PlanNic, cmdline};
use anyhow::{Context, bail};

use crate::jail::Opened;
use crate::status::Status;
use crate::{clock, logs, panics, privileges};

const ELF: u32 = 1;
const RAW: u32 = 0;
/// Warnings come with every connection that is closed.
const LOG_ERRORS: u32 = 1;
const LOG_TO_STDERR: i32 = 2;
const LOG_STYLE_NEVER: u32 = 2;
const LOG_NO_ENVIRONMENT: u32 = 1;
/// Nothing on the scratch disk outlives the box: flushing it to the host's disk would only cost time.
const NO_SYNC: u32 = 0;
/// No hijacking of the guest's sockets: a pod has its own network.
const NO_TSI: u32 = 0;

/// Checksum and segmentation offload in both directions: VIRTIO_NET_F_CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6,
/// HOST_TSO4 and HOST_TSO6.
const OFFLOADS: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;

/// Configures the VM and enters it. On success the process ends with the guest.
pub(crate) fn run(spec: &LaunchSpec, opened: Opened, status: &Status) -> anyhow::Result<ExitCode> {
    let plan = &spec.plan;
    privileges::keep_capabilities(privileges::FILE_SERVER)?;
    privileges::filter_system_calls()?;
    logs::keep_short(opened.logs)?;
    let context = Machine::new()?;
    context.machine(plan, &cmdline::compose(plan, &spec.hypervisor, None))?;
    context.console(opened.console.into_raw_fd())?;
    context.share()?;
    if !spec.trial {
        context.scratch()?;
    }
    context.sockets(plan)?;
    for nic in plan.network.iter().flat_map(|network| &network.nics) {
        context.nic(nic)?;
    }
    panics::end_the_process();
    clock::serve_time()?;
    status.up()?;
    context.enter()
}

/// A libkrun configuration.
struct Machine(u32);

fn check(step: &str, result: i32) -> anyhow::Result<i32> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result)).with_context(|| format!("libkrun: {step}"));
    }
    Ok(result)
}

#[allow(unsafe_code)]
impl Machine {
    fn new() -> anyhow::Result<Self> {
        // SAFETY: standard error stays open.
        let logging =
            unsafe { krun::krun_init_log(LOG_TO_STDERR, LOG_ERRORS, LOG_STYLE_NEVER, LOG_NO_ENVIRONMENT) };
        check("start logging", logging)?;
        Ok(Self(check("create a context", krun::krun_create_ctx())? as u32))
    }

    fn machine(&self, plan: &BoxPlan, cmdline: &str) -> anyhow::Result<()> {
        check("size the machine", krun::krun_set_vm_config(self.0, plan.vcpus, plan.memory_mib))?;
        let (kernel, initramfs, cmdline) = (c(jail::KERNEL)?, c(jail::INITRAMFS)?, c(cmdline)?);
        // SAFETY: the strings are NUL-terminated and outlive the call, which copies them.
        let set = unsafe {
            krun::krun_set_kernel(self.0, kernel.as_ptr(), ELF, initramfs.as_ptr(), cmdline.as_ptr())
        };
        check("set the kernel", set).map(drop)
    }

    /// libkrun closes the descriptor.
    fn console(&self, output: i32) -> anyhow::Result<()> {
        check("drop the implicit console", krun::krun_disable_implicit_console(self.0))?;
        // SAFETY: the descriptor was given away by its owner.
        let added = unsafe { krun::krun_add_serial_console_default(self.0, -1, output) };
        check("add the console", added).map(drop)
    }

    fn share(&self) -> anyhow::Result<()> {
        let (tag, path) = (c(SHARE_TAG)?, c(jail::SHARE)?);
        // SAFETY: the strings are NUL-terminated and outlive the call, which copies them.
        check("add the share", unsafe { krun::krun_add_virtiofs(self.0, tag.as_ptr(), path.as_ptr()) })
            .map(drop)
    }

    fn scratch(&self) -> anyhow::Result<()> {
        let (name, path) = (c("scratch")?, c(jail::SCRATCH)?);
        let (read_only, direct) = (false, false);
        // SAFETY: the strings are NUL-terminated and outlive the call, which copies them.
        let added = unsafe {
            krun::krun_add_disk3(self.0, name.as_ptr(), path.as_ptr(), RAW, read_only, direct, NO_SYNC)
        };
        check("add the scratch disk", added).map(drop)
    }

    fn sockets(&self, plan: &BoxPlan) -> anyhow::Result<()> {
        check("drop the implicit vsock", krun::krun_disable_implicit_vsock(self.0))?;
        check("add vsock", krun::krun_add_vsock(self.0, NO_TSI))?;
        for port in GUEST_DIALS {
            self.socket(port, false)?;
        }
        for port in plan.host_dials() {
            self.socket(port, true)?;
        }
        Ok(())
    }

    fn socket(&self, port: u32, listen: bool) -> anyhow::Result<()> {
        let path = c(&format!("{}/{}", jail::VSOCK, socket_name(port)))?;
        // SAFETY: the string is NUL-terminated and outlives the call, which copies it.
        let added = unsafe { krun::krun_add_vsock_port2(self.0, port, path.as_ptr(), listen) };
        check(&format!("add vsock port {port}"), added).map(drop)
    }

    fn nic(&self, nic: &PlanNic) -> anyhow::Result<()> {
        if nic.tap.len() >= libc::IFNAMSIZ {
            bail!("{:?} is not the name of a tap", nic.tap);
        }
        let tap = c(&nic.tap)?;
        // SAFETY: the name is NUL-terminated, the address has its six octets, and the call copies both.
        let added = unsafe {
            krun::krun_add_net_tap(self.0, tap.as_ptr() as *const c_char, nic.mac.as_ptr(), OFFLOADS, 0)
        };
        check(&format!("add the NIC on {}", nic.tap), added).map(drop)
    }

    /// Returns only if the VM could not be started.
    fn enter(&self) -> anyhow::Result<ExitCode> {
        check("start the machine (see the lines above)", krun::krun_start_enter(self.0))?;
        bail!("libkrun returned without an error and without a guest")
    }
}

fn c(text: &str) -> anyhow::Result<CString> {
    CString::new(text).with_context(|| format!("{text:?} holds a NUL"))
}
