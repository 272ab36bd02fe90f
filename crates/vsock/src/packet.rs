//! The header of a packet, as it lies in the guest's memory: little-endian, without gaps.

/// Octets of a header.
pub const HEADER: usize = 44;

/// The host's address.
pub const HOST_CID: u64 = 2;

/// The only type of connection that there is here: VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;

/// Flag of a SHUTDOWN: its sender will read no more.
pub const NO_MORE_READ: u32 = 1;
/// Flag of a SHUTDOWN: its sender will send no more.
pub const NO_MORE_SENT: u32 = 2;

/// What a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Dials a port.
    Request = 1,
    /// The port was listened on.
    Response = 2,
    /// There is no connection, or none any more.
    Reset = 3,
    /// The sender ends a direction, or both.
    Shutdown = 4,
    /// Bytes.
    Data = 5,
    /// Only tells how much room there is.
    CreditUpdate = 6,
    /// Asks how much room there is.
    CreditRequest = 7,
}

/// A packet's header. What a guest wrote is taken as it is: only [`Header::operation`] judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The sender's address.
    pub from_cid: u64,
    /// The receiver's address.
    pub to_cid: u64,
    /// The sender's port.
    pub from_port: u32,
    /// The receiver's port.
    pub to_port: u32,
    /// How many bytes follow.
    pub length: u32,
    /// The type of the connection: [`STREAM`].
    pub kind: u16,
    /// An [`Operation`], if it is one.
    pub op: u16,
    /// Of a SHUTDOWN.
    pub flags: u32,
    /// The sender's room in all.
    pub room: u32,
    /// How many bytes the sender has passed on since the connection began, modulo 2³².
    pub forwarded: u32,
}

impl Header {
    /// Takes a header apart.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let u16 = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32 = |at: usize| u32::from(u16(at)) | u32::from(u16(at + 2)) << 16;
        let u64 = |at: usize| u64::from(u32(at)) | u64::from(u32(at + 4)) << 32;
        Self {
            from_cid: u64(0),
            to_cid: u64(8),
            from_port: u32(16),
            to_port: u32(20),
            length: u32(24),
            kind: u16(28),
            op: u16(30),
            flags: u32(32),
            room: u32(36),
            forwarded: u32(40),
        }
    }

    /// Puts it together.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.from_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.to_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.from_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.to_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.room.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// What the packet says; `None`: nothing that the standard knows.
    pub fn operation(&self) -> Option<Operation> {
        Some(match self.op {
            1 => Operation::Request,
            2 => Operation::Response,
            3 => Operation::Reset,
            4 => Operation::Shutdown,
            5 => Operation::Data,
            6 => Operation::CreditUpdate,
            7 => Operation::CreditRequest,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_its_own_place_in_the_order_of_the_standard() {
        let bytes: [u8; HEADER] = std::array::from_fn(|at| at as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.from_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.to_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!((header.from_port, header.to_port), (0x1312_1110, 0x1716_1514));
        assert_eq!((header.length, header.kind, header.op), (0x1b1a_1918, 0x1d1c, 0x1f1e));
        assert_eq!((header.flags, header.room, header.forwarded), (0x2322_2120, 0x2726_2524, 0x2b2a_2928));
        assert_eq!(header.bytes(), bytes);
    }

    #[test]
    fn an_operation_is_the_number_that_it_is_sent_as() {
        let header = Header::parse(&[0; HEADER]);
        for op in 0..=u16::MAX {
            let operation = Header { op, ..header }.operation();
            assert_eq!(operation.map_or(op, |operation| operation as u16), op);
            assert_eq!(operation.is_some(), (1..=7).contains(&op), "{op}");
        }
    }
}
