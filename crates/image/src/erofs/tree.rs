//! The tree of one image in memory: names and attributes, never file data.

use std::collections::BTreeMap;

use super::format;
use super::xattr::Xattrs;

/// A node of a [`Tree`]; its number grows with its time of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

/// What every inode has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Attributes {
    /// Permission bits with setuid, setgid and sticky: `0o7777`.
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds of the Unix epoch; may be negative.
    pub(crate) mtime: i64,
    pub(crate) mtime_nanos: u32,
    pub(crate) xattrs: Xattrs,
}

/// Where the bytes of a file lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Data {
    pub(crate) size: u64,
    /// First block of the whole blocks; 0 when there are none.
    pub(crate) start: u32,
    /// Offset in the spool and length of what lies behind the inode.
    pub(crate) tail: Option<(u64, u16)>,
}

/// What sort of inode it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Payload {
    Directory {
        children: BTreeMap<Box<[u8]>, NodeId>,
        /// Hides the lower layers' directory of the same name (`trusted.overlay.opaque`).
        opaque: bool,
    },
    File(Data),
    Symlink(Box<[u8]>),
    /// A device with its encoded number; character device 0 is an overlay's whiteout.
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
}

impl Payload {
    pub(crate) fn directory() -> Self {
        Self::Directory { children: BTreeMap::new(), opaque: false }
    }

    pub(crate) fn is_whiteout(&self) -> bool {
        matches!(self, Self::CharDevice(0))
    }

    /// The `S_IFMT` bits.
    pub(crate) fn type_bits(&self) -> u16 {
        match self {
            Self::Directory { .. } => format::S_IFDIR,
            Self::File(_) => format::S_IFREG,
            Self::Symlink(_) => format::S_IFLNK,
            Self::CharDevice(_) => format::S_IFCHR,
            Self::BlockDevice(_) => format::S_IFBLK,
            Self::Fifo => format::S_IFIFO,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) attributes: Attributes,
    pub(crate) payload: Payload,
}

/// The tree. Nodes are never freed: one that lost its last name stays as garbage until the
/// end, which the weight accounts for.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    weight: u64,
}

impl Tree {
    /// What a node costs beside its names and attributes, about.
    const NODE_WEIGHT: u64 = 192;
    pub(crate) const ROOT: NodeId = NodeId(0);

    /// A tree whose root belongs to root, with mode 0755.
    pub(crate) fn new() -> Self {
        let attributes = Attributes { permissions: 0o755, ..Attributes::default() };
        Self { nodes: vec![Node { attributes, payload: Payload::directory() }], weight: Self::NODE_WEIGHT }
    }

    /// Bytes of memory it takes, about.
    pub(crate) fn weight(&self) -> u64 {
        self.weight
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Nodes in the order of their arrival, names or not.
    pub(crate) fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    pub(crate) fn index(id: NodeId) -> usize {
        id.0 as usize
    }

    /// Adds a node without a name.
    pub(crate) fn add(&mut self, attributes: Attributes, payload: Payload) -> NodeId {
        let target = if let Payload::Symlink(target) = &payload { target.len() as u64 } else { 0 };
        self.weight += Self::NODE_WEIGHT + attributes.xattrs.weight() + target;
        // The weight limit keeps the count far below 2^32.
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(Node { attributes, payload });
        id
    }

    /// The child of that name, if `directory` is one and has it.
    pub(crate) fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(directory).payload {
            Payload::Directory { children, .. } => children.get(name).copied(),
            Payload::File(_)
            | Payload::Symlink(_)
            | Payload::CharDevice(_)
            | Payload::BlockDevice(_)
            | Payload::Fifo => None,
        }
    }

    /// Gives a node a name in a directory, in place of any other node of that name.
    pub(crate) fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId) {
        if let Payload::Directory { children, .. } = &mut self.node_mut(directory).payload
            && children.insert(name.into(), node).is_none()
        {
            self.weight += 48 + name.len() as u64;
        }
    }

    /// Takes the whiteouts out of a directory.
    pub(crate) fn drop_whiteouts(&mut self, directory: NodeId) {
        let children = |tree: &mut Self| match &mut tree.node_mut(directory).payload {
            Payload::Directory { children, .. } => std::mem::take(children),
            Payload::File(_)
            | Payload::Symlink(_)
            | Payload::CharDevice(_)
            | Payload::BlockDevice(_)
            | Payload::Fifo => BTreeMap::new(),
        };
        let mut kept = children(self);
        kept.retain(|_, child| !self.node(*child).payload.is_whiteout());
        if let Payload::Directory { children, .. } = &mut self.node_mut(directory).payload {
            *children = kept;
        }
    }

    /// Makes a directory hide the lower layers' one.
    pub(crate) fn set_opaque(&mut self, directory: NodeId) {
        if let Payload::Directory { opaque, .. } = &mut self.node_mut(directory).payload {
            *opaque = true;
        }
    }
}
