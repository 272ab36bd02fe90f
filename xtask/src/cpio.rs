//! A writer for the kernel's initramfs format: cpio "newc" (linux/Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Archives are deterministic: numbers count up, times are zero, owners are root.

/// Builds one archive in memory.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    next_inode: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
const SYMLINK: u32 = 0o120_000;

impl Archive {
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), next_inode: 1 }
    }

    /// A directory. Parents must come before what lies in them: the kernel creates in order.
    pub(crate) fn directory(&mut self, path: &str, permissions: u32) {
        self.entry(path, DIRECTORY | permissions, (0, 0), &[]);
    }

    pub(crate) fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) {
        self.entry(path, REGULAR | permissions, (0, 0), contents);
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    pub(crate) fn character_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) {
        self.entry(path, CHARACTER | permissions, (major, minor), &[]);
    }

    /// Ends the archive and pads it to a multiple of `alignment` bytes.
    pub(crate) fn finish(mut self, alignment: usize) -> Vec<u8> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(alignment);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        let name = path.trim_start_matches('/');
        let links: u32 = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let size =
            u32::try_from(contents.len()).unwrap_or_else(|_| panic!("{path}: cpio files are below 4 GiB"));
        let name_size = u32::try_from(name.len() + 1).unwrap_or_else(|_| panic!("{path}: name too long"));
        let fields = [
            self.next_inode,
            mode,
            0, // owner
            0, // group
            links,
            0, // modification time
            size,
            0, // device that holds the file: major, minor
            0,
            device.0,
            device.1,
            name_size,
            0, // checksum, unused in this variant
        ];
        self.next_inode += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(contents);
        self.pad(4);
    }

    fn pad(&mut self, alignment: usize) {
        let length = self.bytes.len().next_multiple_of(alignment);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    fn field(header: &[u8], index: usize) -> u32 {
        let text = std::str::from_utf8(&header[6 + index * 8..14 + index * 8]).expect("hexadecimal");
        u32::from_str_radix(text, 16).expect("hexadecimal")
    }

    #[test]
    fn a_file_lies_behind_its_header_on_four_byte_boundaries() {
        let mut archive = Archive::new();
        archive.file("/init", 0o755, b"hello");
        let bytes = archive.finish(4096);
        assert_eq!(bytes.len(), 4096);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(field(&bytes, 1), 0o100_755);
        assert_eq!((field(&bytes, 6), field(&bytes, 11)), (5, 5));
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(&bytes[124 + 110..124 + 121], b"TRAILER!!!\0");
    }

    #[test]
    fn a_device_carries_its_numbers() {
        let mut archive = Archive::new();
        archive.directory("dev", 0o755);
        archive.character_device("dev/console", 0o600, 5, 1);
        let bytes = archive.finish(4);
        let second = 110 + 4 + 2; // "dev\0" ends at 114, padded to 116
        assert_eq!(field(&bytes[second..], 1), 0o020_600);
        assert_eq!((field(&bytes[second..], 9), field(&bytes[second..], 10)), (5, 1));
    }
}
