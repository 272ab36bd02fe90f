//! The tar of a layer from its EROFS image: sorted, in the PAX format where the plain one has no place, whiteouts
//! as image-spec has them ("Image Layer Filesystem Changeset").

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};

use tar::{Builder, EntryType, Header};

use crate::digest::{Algorithm, Digest, Hasher};
use crate::erofs::{
    Inode, Reader, ReaderError, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, Xattrs,
};

/// The largest numbers that the plain header's octal fields hold.
const MAX_ID: u64 = 0o7_777_777;
const MAX_SIZE: u64 = 0o77_777_777_777;

/// Writes the tar of a layer, an empty one without an image, and returns its digest and length.
pub(super) fn write(image: Option<File>, output: &mut File) -> io::Result<(Digest, u64)> {
    let output = Counted { inner: BufWriter::new(output), hasher: Hasher::new(Algorithm::Sha256), size: 0 };
    let mut tar = Builder::new(output);
    if let Some(image) = image {
        let reader = Reader::open(image).map_err(damaged)?;
        Layer { reader, links: HashMap::new(), directories: HashSet::new() }.write(&mut tar)?;
    }
    let mut output = tar.into_inner()?;
    output.flush()?;
    Ok((output.hasher.finish(), output.size))
}

fn damaged(error: ReaderError) -> io::Error {
    match error {
        ReaderError::Io(error) => error,
        error @ ReaderError::Damaged(_) => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

struct Counted<W> {
    inner: W,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

struct Layer {
    reader: Reader<File>,
    /// The first path of each inode that has several.
    links: HashMap<u64, Vec<u8>>,
    /// Those seen: a damaged image could lead in circles.
    directories: HashSet<u64>,
}

impl Layer {
    fn write<W: Write>(mut self, tar: &mut Builder<W>) -> io::Result<()> {
        let mut todo = vec![(Vec::new(), self.reader.root().map_err(damaged)?)];
        while let Some((path, inode)) = todo.pop() {
            if inode.type_bits() != S_IFDIR {
                self.entry(tar, path, &inode)?;
                continue;
            }
            if !self.directories.insert(inode.nid) {
                return Err(damaged(ReaderError::Damaged("a directory in two places")));
            }
            self.directory(tar, &path, &inode)?;
            for (name, nid, _) in self.reader.list(&inode).map_err(damaged)?.into_iter().rev() {
                todo.push((joined(&path, &name), self.reader.inode(nid).map_err(damaged)?));
            }
        }
        Ok(())
    }

    fn directory<W: Write>(&self, tar: &mut Builder<W>, path: &[u8], inode: &Inode) -> io::Result<()> {
        let xattrs = self.reader.xattrs(inode).map_err(damaged)?;
        let opaque = xattrs.has_opaque_mark();
        // A layer that says nothing of its root shall not begin to.
        let stated = !path.is_empty() || xattrs.has_root_mark();
        let mut entry = Entry::of(EntryType::Directory, inode, &xattrs.without_overlay_marks());
        let name = if path.is_empty() { b"./".to_vec() } else { [path, b"/"].concat() };
        if stated {
            entry.append(tar, &name, None, 0, io::empty())?;
        }
        if opaque {
            Entry::mark().append(tar, &joined(path, b".wh..wh..opq"), None, 0, io::empty())?;
        }
        Ok(())
    }

    fn entry<W: Write>(&mut self, tar: &mut Builder<W>, path: Vec<u8>, inode: &Inode) -> io::Result<()> {
        let device = inode.device();
        if inode.type_bits() == S_IFCHR && device == 0 {
            let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
            let name = [&path[..at], b".wh.", &path[at..]].concat();
            return Entry::mark().append(tar, &name, None, 0, io::empty());
        }
        let xattrs = self.reader.xattrs(inode).map_err(damaged)?.without_overlay_marks();
        if inode.links > 1 {
            if let Some(first) = self.links.get(&inode.nid) {
                let mut entry = Entry::of(EntryType::Link, inode, &Xattrs::default());
                return entry.append(tar, &path, Some(first), 0, io::empty());
            }
            self.links.insert(inode.nid, path.clone());
        }
        let entry = |kind| Entry::of(kind, inode, &xattrs);
        match inode.type_bits() {
            S_IFREG => {
                let content = Content { reader: &self.reader, inode, at: 0 };
                entry(EntryType::Regular).append(tar, &path, None, inode.size, content)
            }
            S_IFLNK => {
                let target = self.reader.target(inode).map_err(damaged)?;
                entry(EntryType::Symlink).append(tar, &path, Some(&target), 0, io::empty())
            }
            S_IFIFO => entry(EntryType::Fifo).append(tar, &path, None, 0, io::empty()),
            kind @ (S_IFCHR | S_IFBLK) => {
                let mut entry = entry(if kind == S_IFCHR { EntryType::Char } else { EntryType::Block });
                // The kernel's encoding of 12 bits of major and 20 of minor.
                entry.header.set_device_major(device >> 8 & 0xfff)?;
                entry.header.set_device_minor(device & 0xff | device >> 12 & 0xf_ff00)?;
                entry.append(tar, &path, None, 0, io::empty())
            }
            _ => Err(damaged(ReaderError::Damaged("an inode of unknown type"))),
        }
    }
}

fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

fn header(kind: EntryType) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// A header with the PAX records that go before it.
struct Entry {
    header: Header,
    records: Vec<u8>,
}

impl Entry {
    /// A file that only says something by its name.
    fn mark() -> Self {
        Self { header: header(EntryType::Regular), records: Vec::new() }
    }

    fn of(kind: EntryType, inode: &Inode, xattrs: &Xattrs) -> Self {
        let mut entry = Self::mark();
        entry.header.set_entry_type(kind);
        entry.header.set_mode(u32::from(inode.mode & 0o7777));
        let (uid, gid) = (u64::from(inode.uid), u64::from(inode.gid));
        entry.header.set_uid(uid.min(MAX_ID));
        entry.header.set_gid(gid.min(MAX_ID));
        for (key, id) in [("uid", uid), ("gid", gid)] {
            if id > MAX_ID {
                entry.record(key.as_bytes(), id.to_string().as_bytes());
            }
        }
        let seconds = u64::try_from(inode.mtime).ok().filter(|seconds| *seconds <= MAX_SIZE);
        entry.header.set_mtime(seconds.unwrap_or(0));
        if seconds.is_none() || inode.mtime_nanos != 0 {
            entry.record(b"mtime", time(inode.mtime, inode.mtime_nanos).as_bytes());
        }
        for (name, value) in xattrs.iter() {
            entry.record(&[b"SCHILY.xattr.", &name[..]].concat(), value);
        }
        entry
    }

    /// Adds `LENGTH KEY=VALUE\n`, where the length counts its own digits.
    fn record(&mut self, key: &[u8], value: &[u8]) {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        self.records.extend_from_slice(format!("{length} ").as_bytes());
        self.records.extend_from_slice(key);
        self.records.push(b'=');
        self.records.extend_from_slice(value);
        self.records.push(b'\n');
    }

    fn append<W: Write>(
        &mut self,
        tar: &mut Builder<W>,
        path: &[u8],
        target: Option<&[u8]>,
        size: u64,
        content: impl Read,
    ) -> io::Result<()> {
        if !fits(&mut self.header.as_old_mut().name, path) {
            self.record(b"path", path);
        }
        if let Some(target) = target
            && !fits(&mut self.header.as_old_mut().linkname, target)
        {
            self.record(b"linkpath", target);
        }
        if size > MAX_SIZE {
            self.record(b"size", size.to_string().as_bytes());
        }
        // The builder takes the length of the content from here; a larger one goes out in base 256.
        self.header.set_size(size);
        if !self.records.is_empty() {
            let mut header = header(EntryType::XHeader);
            fits(&mut header.as_old_mut().name, b"PaxHeader");
            header.set_size(self.records.len() as u64);
            header.set_cksum();
            tar.append(&header, &self.records[..])?;
        }
        self.header.set_cksum();
        tar.append(&self.header, content)
    }
}

/// Puts as much of a name into its field as there is room for; says whether that is all of it, and such that every
/// reader takes it for the same.
fn fits(field: &mut [u8; 100], name: &[u8]) -> bool {
    let length = name.len().min(field.len());
    field[..length].copy_from_slice(&name[..length]);
    length == name.len() && name.is_ascii()
}

/// Seconds with a fraction; the nanoseconds count forward also before 1970.
fn time(seconds: i64, nanos: u32) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    let (sign, total) = (if total < 0 { "-" } else { "" }, total.unsigned_abs());
    let text = format!("{sign}{}.{:09}", total / 1_000_000_000, total % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A file's contents in order.
struct Content<'a> {
    reader: &'a Reader<File>,
    inode: &'a Inode,
    at: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (self.inode.size - self.at).min(buffer.len() as u64) as usize;
        self.reader.read_exact(self.inode, &mut buffer[..length], self.at).map_err(damaged)?;
        self.at += length as u64;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;
    use crate::layer::LayerStack;
    use crate::testing::{NoLower, convert_in_memory, walk};

    fn record(text: &str) -> Vec<u8> {
        let length = text.len() + if text.len() > 95 { 5 } else { 4 };
        format!("{length} {text}\n").into_bytes()
    }

    /// A layer with one of everything.
    fn layer() -> Vec<u8> {
        let mut tar = Builder::new(Vec::new());
        let mut add = |kind, path: &str, link: &str, pax: &[u8], body: &[u8]| {
            if !pax.is_empty() {
                let mut extension = header(EntryType::XHeader);
                extension.set_size(pax.len() as u64);
                extension.set_cksum();
                tar.append(&extension, pax).unwrap();
            }
            let mut header = header(kind);
            header.set_mode(0o4751);
            header.set_uid(70_000);
            header.set_mtime(1_600_000_000);
            header.set_size(body.len() as u64);
            fits(&mut header.as_old_mut().name, path.as_bytes());
            fits(&mut header.as_old_mut().linkname, link.as_bytes());
            if matches!(kind, EntryType::Char | EntryType::Block) {
                header.set_device_major(259).unwrap();
                header.set_device_minor(70_000).unwrap();
            }
            header.set_cksum();
            tar.append(&header, body).unwrap();
        };
        let pax = [
            record("mtime=1600000000.123456789"),
            record("SCHILY.xattr.user.a=b\n=c"),
            record("uid=4000000000"),
        ];
        let long = record(&format!("path=d/{}", "n".repeat(200)));
        let linked = record(&format!("linkpath=d/{}", "n".repeat(200)));
        add(EntryType::Directory, "./", "", b"", b"");
        add(EntryType::Directory, "d/", "", &record("SCHILY.xattr.user.d=1"), b"");
        add(EntryType::Regular, "d/file", "", &pax.concat(), &[7; 10_000]);
        add(EntryType::Regular, "d/old", "", &record("mtime=-1.25"), b"x");
        add(EntryType::Regular, "x", "", &long, b"long");
        add(EntryType::Link, "hard", "d/file", b"", b"");
        add(EntryType::Link, "hard2", "", &linked, b"");
        add(EntryType::Symlink, "soft", "d/\u{e4}", b"", b"");
        add(EntryType::Fifo, "fifo", "", b"", b"");
        add(EntryType::Char, "char", "", b"", b"");
        add(EntryType::Block, "block", "", b"", b"");
        add(EntryType::Regular, "d/.wh.gone", "", b"", b"");
        add(EntryType::Regular, ".wh.top", "", b"", b"");
        add(EntryType::Directory, "o/", "", b"", b"");
        add(EntryType::Regular, "o/.wh..wh..opq", "", b"", b"");
        add(EntryType::Regular, "o/new", "", b"", b"");
        tar.into_inner().unwrap()
    }

    /// Above a layer that has the directory in which this one hides something.
    fn image(tar: &[u8]) -> Vec<u8> {
        let mut below = Builder::new(Vec::new());
        below.append_data(&mut header(EntryType::Directory), "d/", io::empty()).unwrap();
        let below =
            convert_in_memory(&below.into_inner().unwrap(), &mut NoLower, 1 << 24, 1 << 24).unwrap().0;
        let mut below = LayerStack::new(vec![below]).unwrap();
        convert_in_memory(tar, &mut below, 1 << 24, 1 << 24).unwrap().0
    }

    fn exported(image: &[u8]) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        let mut output = tempfile::tempfile().unwrap();
        let (digest, size) = write(Some(file), &mut output).unwrap();
        let mut bytes = Vec::new();
        output.rewind().unwrap();
        output.read_to_end(&mut bytes).unwrap();
        assert_eq!((digest, size), (Digest::sha256(&bytes), bytes.len() as u64));
        bytes
    }

    #[test]
    fn an_exported_layer_has_the_same_tree() {
        let first = image(&layer());
        let tar = exported(&first);
        let second = image(&tar);
        let tree = |image: &[u8]| {
            let mut tree = walk(&Reader::open(image.to_vec()).unwrap()).unwrap();
            // Inode numbers follow the order of the tar; what is linked is told by the links and the contents.
            tree.values_mut().for_each(|seen| seen.nid = 0);
            tree
        };
        let seen = tree(&first);
        assert_eq!(seen.len(), 15, "{:?}", seen.keys());
        assert_eq!(seen["hard"].links, 2);
        assert_eq!(seen["d/old"].mtime, (-2, 750_000_000));
        assert_eq!(tree(&second), seen);
        assert_eq!(exported(&second), tar, "the same tree gives the same bytes");
    }
}
