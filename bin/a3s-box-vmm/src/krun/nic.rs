//! A NIC on a tap that was opened before the jail.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use anyhow::Context;
use msb_krun_devices::virtio::net::backend::{NetBackend, ReadError, WriteError};
use msb_krun_devices::virtio::net::device::VirtioNetBackend;
use msb_krun_vmm::vmm_config::net::NetworkInterfaceConfig;

use a3s_box_vmm::PlanNic;

use crate::tap;

/// Checksum and segmentation offload in both directions: VIRTIO_NET_F_CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6,
/// HOST_TSO4 and HOST_TSO6.
const OFFLOADS: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;

/// The NIC `nic`, connected to `tap`.
pub(crate) fn config(nic: &PlanNic, tap: File) -> anyhow::Result<NetworkInterfaceConfig> {
    tap::prepare(&tap).with_context(|| format!("prepare the tap {:?}", nic.tap))?;
    Ok(NetworkInterfaceConfig {
        iface_id: nic.tap.clone(),
        backend: VirtioNetBackend::Custom(Box::new(Tap(tap))),
        mac: nic.mac,
        features: OFFLOADS,
        rate_limiters: Default::default(),
    })
}

/// One frame for each read and write, behind a virtio header; neither ever blocks.
struct Tap(File);

impl NetBackend for Tap {
    fn read_frame(&mut self, buffer: &mut [u8]) -> Result<usize, ReadError> {
        match self.0.read(buffer) {
            Ok(0) => Err(ReadError::NothingRead),
            Ok(length) => Ok(length),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(ReadError::NothingRead),
            Err(error) => Err(error.try_into().map_or(ReadError::NothingRead, ReadError::Internal)),
        }
    }

    /// A frame that the tap refuses (its interface is down, the guest's header makes no sense) is lost, as on a wire.
    /// libkrun would never give the descriptors of a failed frame back to the guest.
    fn write_frame(&mut self, _header: usize, frame: &mut [u8]) -> Result<(), WriteError> {
        match self.0.write(frame) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(WriteError::NothingWritten),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// A tap takes a whole frame or nothing.
    fn has_unfinished_write(&self) -> bool {
        false
    }

    fn try_finish_write(&mut self, _header: usize, _frame: &[u8]) -> Result<(), WriteError> {
        Ok(())
    }

    fn supports_quiesce(&self) -> bool {
        true
    }

    fn raw_socket_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// Frames are datagrams, as at a tap.
    fn tap() -> (Tap, UnixDatagram) {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        (Tap(File::from(OwnedFd::from(tap))), wire)
    }

    #[test]
    fn frames_pass_whole_and_an_empty_wire_does_not_block() {
        let (mut tap, wire) = tap();
        let mut buffer = [0; 64];
        assert!(matches!(tap.read_frame(&mut buffer), Err(ReadError::NothingRead)));
        wire.send(b"to the guest").unwrap();
        assert_eq!(tap.read_frame(&mut buffer).unwrap(), 12);
        tap.write_frame(0, &mut b"to the host".to_owned()).unwrap();
        assert_eq!(wire.recv(&mut buffer).unwrap(), 11);
    }

    // libkrun keeps the descriptors of a frame that failed: after 1024 of them a NIC stood still for ever.
    #[test]
    fn a_frame_that_the_tap_refuses_is_lost_and_not_kept() {
        let (mut tap, wire) = tap();
        drop(wire);
        assert!(tap.write_frame(0, &mut b"lost".to_owned()).is_ok());
    }

    #[test]
    fn a_full_tap_makes_the_guest_wait() {
        let (mut tap, _wire) = tap();
        let full = (0..10_000).find_map(|_| tap.write_frame(0, &mut [0; 1000]).err());
        assert!(matches!(full, Some(WriteError::NothingWritten)));
    }
}
