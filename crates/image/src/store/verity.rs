//! fs-verity: a file that the kernel checks whenever it reads it, and that nobody can write to any more. Linux,
//! Documentation/filesystems/fsverity.rst.
//!
//! The two requests have no safe wrapper in a crate that we use.
#![allow(unsafe_code)]

use std::fmt::Write;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};

const SHA256: u32 = 1;
/// Of the hash tree; those of a file system may be smaller, then it takes no larger ones.
const BLOCK: u32 = 4096;
/// Of the longest digest that there is (SHA-512).
const DIGEST_MAX: usize = 64;

/// `struct fsverity_enable_arg`.
#[repr(C)]
#[derive(Default)]
struct EnableArg {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt_ptr: u64,
    sig_size: u32,
    reserved1: u32,
    sig_ptr: u64,
    reserved2: [u64; 11],
}

/// `struct fsverity_digest` with room for a digest.
#[repr(C)]
struct DigestArg {
    algorithm: u16,
    size: u16,
    digest: [u8; DIGEST_MAX],
}

const ENABLE: Opcode = opcode::write::<EnableArg>(b'f', 133);
/// The number is that of the structure without a digest.
const MEASURE: Opcode = opcode::read_write::<[u16; 2]>(b'f', 134);

/// Seals a file for ever; one that is sealed stays so. `false`: its file system cannot. Takes as long as reading it.
pub(super) fn seal(file: &File) -> io::Result<bool> {
    let of_file_system = u32::try_from(file.metadata()?.blksize()).unwrap_or(BLOCK);
    let block_size = of_file_system.min(BLOCK);
    let arg = EnableArg { version: 1, hash_algorithm: SHA256, block_size, ..EnableArg::default() };
    // SAFETY: FS_IOC_ENABLE_VERITY reads one `fsverity_enable_arg`, which this is, and keeps no pointer to it; the salt and
    // the signature have no bytes.
    let sealed = unsafe { ioctl(file, Setter::<ENABLE, EnableArg>::new(arg)) };
    match sealed {
        Ok(()) | Err(Errno::EXIST) => Ok(true),
        // It has no verity, was made without the feature, or its blocks are of a size that does not go with it.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The digest that the kernel checks a file against, as `sha256:…`; `None` if it is not sealed. Reads no data.
pub(super) fn digest(file: &File) -> io::Result<Option<String>> {
    let mut arg = DigestArg { algorithm: 0, size: DIGEST_MAX as u16, digest: [0; DIGEST_MAX] };
    // SAFETY: FS_IOC_MEASURE_VERITY reads `size` and writes at most so many bytes behind the two fields: `arg` has them.
    let measured = unsafe { ioctl(file, Updater::<MEASURE, DigestArg>::new(&mut arg)) };
    match measured {
        Ok(()) => {}
        Err(Errno::NODATA | Errno::NOTTY | Errno::OPNOTSUPP) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let name = match u32::from(arg.algorithm) {
        SHA256 => "sha256".to_owned(),
        other => format!("algorithm-{other}"),
    };
    let mut text = format!("{name}:");
    for byte in arg.digest.iter().take(usize::from(arg.size)) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// /proc can have no sealed files on any machine.
    #[test]
    fn a_file_system_without_it_says_so() {
        let file = File::open("/proc/self/status").unwrap();
        assert!(!seal(&file).unwrap());
        assert_eq!(digest(&file).unwrap(), None);
    }
}
