//! The wire between host and guest agent: messages, ports and stream framing.
//!
//! `proto/agent.proto` is the contract; this crate adds what protobuf does not say: port
//! numbers and how single messages are framed on a raw vsock connection.

pub mod chunks;
pub mod framing;
pub mod versions;

/// Messages and the `Agent` service, generated from `proto/agent.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod proto {
    tonic::include_proto!("a3s.agent.v1");
}

/// The protocol number of this build. See "Evolution" in `agent.proto`, and [`versions`].
pub const PROTOCOL: u32 = 4;

/// The guest's vsock context id on every backend.
pub const GUEST_CID: u32 = 3;

/// The host listens here for the guest's one `Ready` message.
pub const READY_PORT: u32 = 1024;

/// The agent serves gRPC here.
pub const RPC_PORT: u32 = 1025;

/// The agent accepts stdio streams here.
pub const STREAM_PORT: u32 = 1026;

/// The host listens here, for as long as the box lives, and tells its time: each byte that the guest sends is answered with
/// a big-endian u64, the nanoseconds since the epoch.
pub const TIME_PORT: u32 = 1027;

/// The host listens here, for as long as the box lives, and sends a byte whenever the guest's kernel shall forget files of the
/// share: [`FORGET_NAMES`] or [`FORGET_CONTENTS`].
pub const FORGET_PORT: u32 = 1028;

/// Names and inodes that nobody uses.
pub const FORGET_NAMES: u8 = 1;

/// What is cached of files' contents too, which otherwise keeps their inodes.
pub const FORGET_CONTENTS: u8 = 2;

/// Agent images listen here (`vsock://3:4088`).
pub const AGENT_IMAGE_PORT: u32 = 4088;

/// Tag of the box's one virtio-fs share.
pub const SHARE_TAG: &str = "a3s";

/// Directory of the share that holds the EROFS files of the box's images.
pub const SHARE_IMAGES: &str = "images";

/// Directory of the share that holds the box's volumes.
pub const SHARE_VOLUMES: &str = "pod";

/// The most that a guest writes to a vsock connection at once, and with it the longest piece of [`chunks`], which both
/// sides hold each other to. The number is as old as the protocol: the device that builds of then ran beside QEMU lost the
/// rest of longer writes. Today's carries writes of any length.
pub const MAX_GUEST_WRITE: usize = 16 * 1024;

/// The most output bytes that the agent keeps before the host has acknowledged them.
pub const MAX_UNACKNOWLEDGED: usize = 1024 * 1024;
