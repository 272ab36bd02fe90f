//! Persistent taps, opened while this process still may.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use anyhow::{Context, bail};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// The length of `struct virtio_net_hdr_v1`.
const VIRTIO_1_HEADER: libc::c_int = 12;

/// TUN_F_CSUM, TUN_F_TSO4 and TUN_F_TSO6.
const OFFLOADS: libc::c_ulong = 1 | 2 | 4;

/// Opens the multi-queue tap `name` of the current network namespace, once for each queue.
pub(crate) fn open_queues(name: &str, queues: u8) -> anyhow::Result<Vec<File>> {
    (0..queues).map(|_| open(name, libc::IFF_MULTI_QUEUE)).collect()
}

/// Opens the tap `name` of the current network namespace, which has one queue.
pub(crate) fn open_single(name: &str) -> anyhow::Result<File> {
    open(name, 0)
}

/// Opens a tap with virtio headers on its packets.
fn open(name: &str, flags: libc::c_int) -> anyhow::Result<File> {
    let path = "/dev/net/tun";
    let tun = OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("open {path}"))?;
    attach(&tun, name, flags).with_context(|| format!("attach to the tap {name:?}"))?;
    Ok(tun)
}

/// Makes a tap what libkrun's NIC expects: headers of virtio 1, packets that the guest's NIC takes as offloads, and no
/// waiting.
#[allow(unsafe_code)]
pub(crate) fn prepare(tap: &File) -> anyhow::Result<()> {
    let header: libc::c_int = VIRTIO_1_HEADER;
    // SAFETY: this request reads one int, which `header` is.
    let sized = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const header) };
    check(sized).context("size the header")?;
    // SAFETY: this request takes a number.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD as _, OFFLOADS) })
        .context("set the offloads")?;
    let flags = fcntl_getfl(tap).context("read the flags")?;
    fcntl_setfl(tap, flags | OFlags::NONBLOCK).context("stop waiting")
}

fn check(result: libc::c_int) -> std::io::Result<()> {
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[allow(unsafe_code)]
fn attach(tun: &File, name: &str, flags: libc::c_int) -> anyhow::Result<()> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0', '%']) {
        bail!("that is no name of a tap");
    }
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags) as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq, which `request` is.
    if unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF as _, &raw mut request) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}
