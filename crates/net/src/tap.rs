//! Persistent taps: the one thing here that only ioctls can do.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use nix::libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFNAMSIZ, c_char, c_int, c_short, ifreq};

mod ioctl {
    nix::ioctl_readwrite_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
        nix::libc::ifreq
    );
    nix::ioctl_write_int!(set_persist, b'T', 203);
    nix::ioctl_write_int!(set_owner, b'T', 204);
}

/// What kind of taps a VMM opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    /// The user that may open them without `CAP_NET_ADMIN`.
    pub(crate) owner: Option<u32>,
    /// With a queue for each time that they are opened. Fixed when a tap is made: who does not ask for it cannot open such a
    /// one.
    pub(crate) multi_queue: bool,
}

/// Makes the tap `name` in the network namespace of the calling thread; it stays after this returns.
///
/// With virtio-net headers, so that checksums and segmentation can be left to the guest's peer; the VMM states its own flags
/// and offloads when it attaches.
pub(crate) fn create_persistent(name: &str, kind: Kind) -> io::Result<()> {
    let file = open(name, if kind.multi_queue { IFF_MULTI_QUEUE } else { 0 })?;
    if let Some(uid) = kind.owner {
        // SAFETY: an ioctl on an open descriptor with a plain integer argument.
        unsafe { ioctl::set_owner(file.as_raw_fd(), uid.into()) }?;
    }
    // SAFETY: as above.
    unsafe { ioctl::set_persist(file.as_raw_fd(), 1) }?;
    Ok(())
}

/// Opens the tap `name` in the network namespace of the calling thread, making it if need be. Every frame
/// read or written then starts with a virtio-net header of 10 bytes.
pub fn attach(name: &str) -> io::Result<File> {
    open(name, 0)
}

fn open(name: &str, flags: c_int) -> io::Result<File> {
    let mut request = interface_request(name, flags)?;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: the request is a fully initialised ifreq that outlives the call and that nobody else
    // refers to; the kernel reads it and writes the name back into it.
    unsafe { ioctl::set_interface(file.as_raw_fd(), &raw mut request) }?;
    Ok(file)
}

fn interface_request(name: &str, flags: c_int) -> io::Result<ifreq> {
    if name.is_empty() || name.len() >= IFNAMSIZ {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
    }
    // SAFETY: ifreq is plain old data for which all zeroes is a value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as c_char;
    }
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags) as c_short;
    Ok(request)
}
