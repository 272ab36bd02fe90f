//! Opens a persistent tap for an emulator that may not open devices.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use anyhow::{Context, bail};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// Opens the tap `name` of the current network namespace, with virtio headers on its packets.
#[allow(unsafe_code)]
pub(crate) fn open(name: &str) -> anyhow::Result<File> {
    let path = "/dev/net/tun";
    let tun = OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("open {path}"))?;
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0', '%']) {
        bail!("{name:?} is not the name of a tap");
    }
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq, which `request` is.
    if unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF as _, &raw mut request) } != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("attach to the tap {name}"));
    }
    Ok(tun)
}
