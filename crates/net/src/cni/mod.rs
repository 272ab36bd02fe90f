//! The runtime's side of the Container Network Interface, versions 0.1.0 to 1.1.0.
//!
//! [`conf`] finds the network configuration, [`request`] says what the plugins are told of the pod,
//! [`exec`] runs one plugin, [`chain`] runs all of them in order, [`result`] reads what they answer.
//! The rules are those of the CNI specification (containernetworking/cni, SPEC.md) and, where it leaves
//! something open, of what operators know from other runtimes.

pub mod chain;
pub mod conf;
pub mod exec;
pub mod request;
pub mod result;

pub use chain::{AddError, Chain, ValidAttachment};
pub use conf::{ConfError, NetworkList, PluginConf, Version};
pub use exec::{Command, PluginError};
pub use request::{Attachment, RequestError};
pub use result::{CniResult, ResultError};
