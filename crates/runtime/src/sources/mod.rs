//! The volumes of a box by what they are on the host: each source is attached once, however many containers and targets
//! show it.
//!
//! Two attachments are two file systems in the guest: two sets of inodes, locks and pages. Containers that share a volume
//! would find each other's sockets dead and get the same lock twice. So a source is recognised by what was opened, its
//! device and inode, and attached under a name of its own for all of a pod's containers; the agent binds it where each of
//! them wants it.

mod identity;
mod mountinfo;
mod table;

#[cfg(test)]
pub(crate) use identity::Tree;
pub(crate) use identity::{Asked, SourceKey, Wanted, find, part_of};
pub(crate) use table::{Access, Due, Source, Sources};

use serde::{Deserialize, Serialize};

/// A mount of a session as the agent is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Placed {
    /// Which of the session's mounts.
    pub(crate) index: usize,
    /// The source's name below the share's `pod/`.
    pub(crate) name: String,
    /// What of the source is shown; empty means all.
    pub(crate) sub_path: String,
    /// The guest refuses writes.
    pub(crate) readonly: bool,
}
