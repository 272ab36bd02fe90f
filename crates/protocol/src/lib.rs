//! The wire between host and guest agent: messages, ports and stream framing.
//!
//! `proto/agent.proto` is the contract; this crate adds what protobuf does not say: port
//! numbers and how single messages are framed on a raw vsock connection.

pub mod chunks;
pub mod framing;

/// Messages and the `Agent` service, generated from `proto/agent.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod proto {
    tonic::include_proto!("a3s.agent.v1");
}

/// The protocol number of this build. See "Evolution" in `agent.proto`.
pub const PROTOCOL: u32 = 4;

/// Agents of this number and up show all sessions one file system of a pod's volume, and know parts of one.
pub const SHARED_SOURCES_SINCE: u32 = 4;

/// The guest's vsock context id on every backend.
pub const GUEST_CID: u32 = 3;

/// The host listens here for the guest's one `Ready` message.
pub const READY_PORT: u32 = 1024;

/// The agent serves gRPC here.
pub const RPC_PORT: u32 = 1025;

/// The agent accepts stdio streams here.
pub const STREAM_PORT: u32 = 1026;

/// Agent images listen here (`vsock://3:4088`).
pub const AGENT_IMAGE_PORT: u32 = 4088;

/// Tag of the box's one virtio-fs share.
pub const SHARE_TAG: &str = "a3s";

/// Directory of the share that holds the EROFS files of the box's images.
pub const SHARE_IMAGES: &str = "images";

/// Directory of the share that holds the box's volumes.
pub const SHARE_VOLUMES: &str = "pod";

/// The most that a guest writes to a vsock connection at once. vhost-device-vsock 0.3 loses the rest of
/// a larger write that the guest's kernel splits into several descriptors.
pub const MAX_GUEST_WRITE: usize = 16 * 1024;

/// The most output bytes that the agent keeps before the host has acknowledged them.
pub const MAX_UNACKNOWLEDGED: usize = 1024 * 1024;
