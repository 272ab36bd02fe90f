//! Numbers of the on-disk format.

/// Block size; also the page size every kernel we boot has.
pub(crate) const BLOCK: u64 = 4096;
pub(crate) const BLOCK_BITS: u8 = 12;
pub(crate) const SUPER_OFFSET: u64 = 1024;
pub(crate) const MAGIC: u32 = 0xE0F5_E1E2;
/// The superblock is checksummed.
pub(crate) const COMPAT_SB_CHECKSUM: u32 = 0x1;
/// Inode times are modification times.
pub(crate) const COMPAT_MTIME: u32 = 0x2;
/// Inodes are addressed in slots of this size.
pub(crate) const SLOT: u64 = 32;
/// Size of an extended inode, the only kind we write: it has 32-bit owners and nanoseconds.
pub(crate) const INODE: u64 = 64;
pub(crate) const LAYOUT_PLAIN: u16 = 0;
pub(crate) const LAYOUT_INLINE: u16 = 2;
pub(crate) const DIRENT: usize = 12;
/// Longest name of a directory entry.
pub(crate) const NAME_MAX: usize = 255;
/// Longest symlink target the kernel follows (PATH_MAX without its NUL).
pub(crate) const SYMLINK_MAX: usize = 4095;

pub(crate) const S_IFMT: u16 = 0o170_000;
pub(crate) const S_IFIFO: u16 = 0o010_000;
pub(crate) const S_IFCHR: u16 = 0o020_000;
pub(crate) const S_IFDIR: u16 = 0o040_000;
pub(crate) const S_IFBLK: u16 = 0o060_000;
pub(crate) const S_IFREG: u16 = 0o100_000;
pub(crate) const S_IFLNK: u16 = 0o120_000;

/// The file type of a directory entry, by `S_IFMT` bits (Linux `FT_*`).
pub(crate) fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// The kernel's 32-bit encoding of a device (`new_encode_dev`): 12 bits of major, 20 of minor.
/// `None` when they do not fit.
pub(crate) fn device_number(major: u32, minor: u32) -> Option<u32> {
    (major <= 0xfff && minor <= 0xf_ffff).then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// Rounds up to a multiple of `unit`.
pub(crate) fn align(value: u64, unit: u64) -> u64 {
    value.div_ceil(unit) * unit
}

/// Little-endian integers out of a slice that holds them: callers pass blocks or checked lengths.
pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from(le16(bytes, at)) | u32::from(le16(bytes, at + 2)) << 16
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}
