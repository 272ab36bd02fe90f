//! Directory contents: blocks of entries, each followed by its names, sorted throughout.

use super::format::{BLOCK, DIRENT};

/// One entry to be written.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) nid: u64,
    pub(crate) file_type: u8,
}

/// How large the contents of a directory with these names are. Names come sorted by bytes, `.`
/// and `..` among them.
pub(crate) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut whole, mut used) = (0, 0);
    for name in names {
        let need = (DIRENT + name.len()) as u64;
        if used + need > BLOCK {
            whole += BLOCK;
            used = 0;
        }
        used += need;
    }
    whole + used
}

/// The contents; all blocks but the last are padded.
pub(crate) fn encode(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let count = rest
            .iter()
            .take_while(|entry| {
                used += DIRENT + entry.name.len();
                used as u64 <= BLOCK
            })
            .count();
        let (block, others) = rest.split_at(count);
        encode_block(block, &mut out);
        rest = others;
        if !rest.is_empty() {
            out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
        }
    }
    out
}

fn encode_block(entries: &[Entry<'_>], out: &mut Vec<u8>) {
    let mut name_offset = entries.len() * DIRENT;
    for entry in entries {
        out.extend_from_slice(&entry.nid.to_le_bytes());
        out.extend_from_slice(&(name_offset as u16).to_le_bytes());
        out.push(entry.file_type);
        out.push(0);
        name_offset += entry.name.len();
    }
    for entry in entries {
        out.extend_from_slice(entry.name);
    }
}

/// The entries of one block (or of what there is of the last one): name, nid, file type.
/// `None` when it is malformed.
pub(crate) fn decode(block: &[u8]) -> Option<Vec<(&[u8], u64, u8)>> {
    let offset =
        |at: usize| Some(usize::from(u16::from_le_bytes(block.get(at + 8..at + 10)?.try_into().ok()?)));
    let first = offset(0)?;
    if first == 0 || !first.is_multiple_of(DIRENT) {
        return None;
    }
    let count = first / DIRENT;
    let mut entries = Vec::with_capacity(count);
    for i in 0..count {
        let at = i * DIRENT;
        let nid = u64::from_le_bytes(block.get(at..at + 8)?.try_into().ok()?);
        let file_type = *block.get(at + 10)?;
        let start = offset(at)?;
        let end = if i + 1 < count { offset(at + DIRENT)? } else { block.len() };
        let mut name = block.get(start..end)?;
        if i + 1 == count {
            // The last name of a padded block ends at its first NUL.
            let len = name.iter().position(|b| *b == 0).unwrap_or(name.len());
            name = &name[..len];
        }
        if name.is_empty() {
            return None;
        }
        entries.push((name, nid, file_type));
    }
    Some(entries)
}
