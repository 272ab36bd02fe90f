//! Persistent taps, opened while this process still may.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use anyhow::{Context, bail};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;

/// Opens the multi-queue tap `name` of the current network namespace, once for each queue.
pub(crate) fn open_queues(name: &str, queues: u8) -> anyhow::Result<Vec<File>> {
    (0..queues).map(|_| open(name, libc::IFF_MULTI_QUEUE)).collect()
}

/// Opens the tap `name` of the current network namespace, with virtio headers on its packets.
fn open(name: &str, flags: libc::c_int) -> anyhow::Result<File> {
    let path = "/dev/net/tun";
    let tun = OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("open {path}"))?;
    attach(&tun, name, flags).with_context(|| format!("attach to the tap {name:?}"))?;
    Ok(tun)
}

/// Lets this user open the tap `name` again after it has given up its capabilities. Whether a tap that
/// belongs to nobody may be opened by anybody differs between kernels.
#[allow(unsafe_code)]
pub(crate) fn own(name: &str) -> anyhow::Result<()> {
    let tap = open(name, 0)?;
    let uid = libc::c_ulong::from(rustix::process::geteuid().as_raw());
    // SAFETY: this request takes a number.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOWNER as _, uid) } != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("own the tap {name}"));
    }
    Ok(())
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
