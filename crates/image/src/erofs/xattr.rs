//! Extended attributes, stored inline behind their inode.

use std::collections::BTreeMap;

/// Name prefixes that the format knows, with their indexes. The ACL names have no rest.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (TRUSTED, b"trusted."),
    (6, b"security."),
];
const TRUSTED: u8 = 4;
/// The header before the entries.
const HEADER: usize = 12;
/// What the inode's 16-bit count of 4-byte units can say, less the header
/// and room for the marks of an opaque directory and of a root.
const ENTRIES_MAX: usize = 4 * (u16::MAX as usize - 1) - 64;

/// The attributes of one inode, by name index and rest of the name: sorted, so that the bytes
/// do not depend on the order of arrival.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Xattrs(BTreeMap<Name, Box<[u8]>>);

/// The index of a prefix and the rest of the name.
type Name = (u8, Box<[u8]>);

/// What became of an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Added {
    /// Kept.
    Yes,
    /// EROFS has no place for that name space.
    NoSuchNamespace,
    /// The name, the value or all together are longer than the format can say.
    TooLong,
}

impl Xattrs {
    /// Sets the attribute of a full name such as `user.mime_type`.
    pub(crate) fn set(&mut self, name: &[u8], value: &[u8]) -> Added {
        let Some((index, rest)) = split(name) else { return Added::NoSuchNamespace };
        if rest.len() > usize::from(u8::MAX) || value.len() > usize::from(u16::MAX) {
            return Added::TooLong;
        }
        let former = self.0.insert((index, rest.into()), value.into());
        if self.entries_size() > ENTRIES_MAX {
            match former {
                Some(former) => self.0.insert((index, rest.into()), former),
                None => self.0.remove(&(index, rest.into())),
            };
            return Added::TooLong;
        }
        Added::Yes
    }

    /// A copy with the attribute by which overlayfs knows an opaque directory.
    pub(crate) fn with_opaque_mark(&self) -> Self {
        let mut marked = self.clone();
        marked.0.insert(opaque_mark(), b"y"[..].into());
        marked
    }

    /// Whether overlayfs takes the directory for opaque.
    pub(crate) fn has_opaque_mark(&self) -> bool {
        self.0.get(&opaque_mark()).is_some_and(|value| &**value == b"y")
    }

    /// Marks a root directory whose owner and mode the layer states. A layer that says nothing of its root has one all
    /// the same, and whoever stacks layers must tell them apart. Overlayfs shows nobody attributes of this name space.
    pub(crate) fn mark_root(&mut self) {
        self.0.insert(root_mark(), b"y"[..].into());
    }

    /// Whether a root is marked so.
    pub(crate) fn has_root_mark(&self) -> bool {
        self.0.contains_key(&root_mark())
    }

    /// A copy without attributes that speak to overlayfs.
    pub(crate) fn without_overlay_marks(mut self) -> Self {
        self.0.retain(|(index, rest), _| *index != TRUSTED || !rest.starts_with(b"overlay."));
        self
    }

    /// Full names and values, sorted.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Vec<u8>, &[u8])> {
        self.0.iter().map(|((index, rest), value)| {
            let prefix = PREFIXES.iter().find(|(i, _)| i == index).map_or(&b""[..], |(_, prefix)| prefix);
            ([prefix, rest].concat(), &value[..])
        })
    }

    /// Bytes of memory, about.
    pub(crate) fn weight(&self) -> u64 {
        self.0.iter().map(|((_, rest), value)| 64 + rest.len() as u64 + value.len() as u64).sum()
    }

    fn entries_size(&self) -> usize {
        self.0.iter().map(|((_, rest), value)| entry_size(rest.len(), value.len())).sum()
    }

    /// The size of the inline body on disk: zero without attributes.
    pub(crate) fn disk_size(&self) -> u64 {
        if self.0.is_empty() { 0 } else { (HEADER + self.entries_size()) as u64 }
    }

    /// The inode's count field for this body.
    pub(crate) fn count_field(&self) -> u16 {
        if self.0.is_empty() { 0 } else { (self.entries_size() / 4) as u16 + 1 }
    }

    /// Appends the inline body.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        if self.0.is_empty() {
            return;
        }
        out.extend_from_slice(&[0; HEADER]);
        for ((index, rest), value) in &self.0 {
            let start = out.len();
            out.push(rest.len() as u8);
            out.push(*index);
            out.extend_from_slice(&(value.len() as u16).to_le_bytes());
            out.extend_from_slice(rest);
            out.extend_from_slice(value);
            out.resize(start + entry_size(rest.len(), value.len()), 0);
        }
    }

    /// Reads an inline body back; `None` when it is malformed.
    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let mut xattrs = Self::default();
        let mut rest = body;
        if !rest.is_empty() {
            // Shared attributes are never written.
            (rest.get(4) == Some(&0)).then_some(())?;
            rest = rest.get(HEADER..)?;
        }
        while !rest.is_empty() {
            let head = rest.get(..4)?;
            let (name_len, index) = (usize::from(head[0]), head[1]);
            let value_len = usize::from(u16::from_le_bytes([head[2], head[3]]));
            let name = rest.get(4..4 + name_len)?;
            let value = rest.get(4 + name_len..4 + name_len + value_len)?;
            xattrs.0.insert((index, name.into()), value.into());
            rest = rest.get(entry_size(name_len, value_len)..)?;
        }
        Some(xattrs)
    }
}

fn opaque_mark() -> Name {
    (TRUSTED, b"overlay.opaque"[..].into())
}

/// The agent looks for it by its full name, `trusted.overlay.a3s-root`.
fn root_mark() -> Name {
    (TRUSTED, b"overlay.a3s-root"[..].into())
}

fn entry_size(name: usize, value: usize) -> usize {
    (4 + name + value).next_multiple_of(4)
}

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // An ACL name must be whole; the others must not be.
        (rest.is_empty() != prefix.ends_with(b".")).then_some((*index, rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_encoding() {
        let mut xattrs = Xattrs::default();
        for (name, value) in [("user.a", "1"), ("security.capability", "xyz"), ("trusted.t", "")] {
            assert_eq!(xattrs.set(name.as_bytes(), value.as_bytes()), Added::Yes);
        }
        assert_eq!(xattrs.set(b"system.posix_acl_access", b"acl"), Added::Yes);
        let mut body = Vec::new();
        xattrs.encode(&mut body);
        assert_eq!(body.len() as u64, xattrs.disk_size());
        assert_eq!(usize::from(xattrs.count_field()), 1 + (body.len() - HEADER) / 4);
        assert_eq!(Xattrs::decode(&body), Some(xattrs));
    }

    #[test]
    fn names_without_a_place_are_told_apart_from_values_that_are_too_long() {
        let mut xattrs = Xattrs::default();
        assert_eq!(xattrs.set(b"btrfs.compression", b"x"), Added::NoSuchNamespace);
        assert_eq!(xattrs.set(b"user.", b"x"), Added::NoSuchNamespace);
        assert_eq!(xattrs.set(b"user.big", &[0; 65536]), Added::TooLong);
        for i in 0..3 {
            assert_eq!(xattrs.set(format!("user.{i}").as_bytes(), &[7; 65535]), Added::Yes);
        }
        assert_eq!(xattrs.set(b"user.one-too-many", &[7; 65535]), Added::TooLong);
        assert_eq!(xattrs.iter().count(), 3);
    }
}
