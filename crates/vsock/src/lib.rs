//! The vsock device of a box: what the guest knows as vsock connections are unix sockets on the host.
//!
//! ```text
//!  programs of the host        this crate                               the guest
//!  connect vsock/guest_1025 ─► [`sockets`] ─► [`device`] ─► packets ─►  listens on port 1025
//!  listen  vsock/guest_1024 ◄─     │             │      ◄─ packets ◄─   dials the host's port 1024
//!                             epoll, sockets   connections
//! ```
//!
//! Whoever owns the virtqueues (a vhost-user process beside QEMU, a device inside a VMM) hands the guest's packets to
//! [`device::Device::from_guest`], asks [`device::Device::to_guest`] for packets while the guest has room for them, and
//! calls both again after [`sockets::Vsock::look`]. The device itself does no I/O but through the two traits in
//! [`stream`], so that tests put every failure of a socket in its way.
//!
//! # The protocol
//!
//! VIRTIO 1.2, section 5.10. Each packet begins with the 44 bytes of [`packet::Header`]. A connection is named by its two
//! ports, since the addresses are always the guest's and the host's. Whoever dials sends REQUEST and is answered with
//! RESPONSE or RST. Bytes travel in RW packets. Each side says with every packet how much room its buffer has in all
//! (`buf_alloc`) and how many bytes it has passed on so far (`fwd_cnt`), and nobody sends more than the other side has room
//! for. SHUTDOWN ends one direction or both; RST ends the connection.
//!
//! # What always holds
//!
//! - What the host sent before it closed reaches the guest before the guest hears of the end, and what the guest sent
//!   before it closed reaches the host's socket before that ends, however slowly either side reads.
//! - A direction that one side ends ends at the other, and the other direction goes on.
//! - A guest can make the device keep [`device::MAX_CONNECTIONS`] connections, [`connection::BUFFER`] bytes for each, and
//!   [`device::MAX_RESETS`] refusals; nothing else grows with what it does. Bytes for the guest are never kept: they stay in
//!   the host's socket until the guest has room for them.
//! - Nothing here waits, and nothing a guest sends can make it panic.

pub mod connection;
mod credit;
pub mod device;
pub mod packet;
pub mod sockets;
pub mod stream;

pub use device::Device;
pub use packet::Header;
pub use sockets::Vsock;
