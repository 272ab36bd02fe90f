//! What the fuzz targets in `fuzz/` call. No part of the public surface.

use crate::erofs::Reader;
use crate::testing::{NoLower, convert_in_memory, walk};

/// Images of fuzzed tars may not grow beyond this.
const IMAGE_LIMIT: u64 = 16 << 20;
const METADATA_LIMIT: u64 = 4 << 20;

/// Converts arbitrary bytes as a tar. Whatever becomes an image must be small enough, readable
/// by our own reader to its last byte, and the same when made again.
///
/// # Panics
/// When it is not: that is what fuzzing looks for.
pub fn tar_to_erofs(bytes: &[u8]) {
    check(bytes);
    check(&with_checksums(bytes));
}

/// The same bytes with right checksums in what looks like headers: a fuzzer does not guess them.
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for block in bytes.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    bytes
}

fn check(bytes: &[u8]) {
    let Ok((image, converted)) = convert_in_memory(bytes, &mut NoLower, IMAGE_LIMIT, METADATA_LIMIT) else {
        return;
    };
    assert!(image.len() as u64 <= IMAGE_LIMIT, "the image is larger than its limit");
    assert_eq!(image.len() as u64, converted.bytes, "the image has another size than was told");
    let again = convert_in_memory(bytes, &mut NoLower, IMAGE_LIMIT, METADATA_LIMIT);
    assert!(again.is_ok_and(|(again, _)| again == image), "the same tar gives another image");
    let reader = Reader::open(image).unwrap_or_else(|error| panic!("the image does not open: {error}"));
    let seen = walk(&reader).unwrap_or_else(|error| panic!("the image cannot be walked: {error}"));
    let inodes: std::collections::BTreeSet<_> = seen.values().map(|seen| seen.nid).collect();
    assert_eq!(inodes.len() as u64, converted.inodes, "inodes are missing or unnamed");
}

/// Parses arbitrary text as a reference: its normal form must mean the same.
///
/// # Panics
/// When it does not.
pub fn reference(text: &str) {
    if let Ok(parsed) = text.parse::<crate::reference::Reference>() {
        let normal = parsed.to_string();
        assert_eq!(normal.parse(), Ok(parsed), "{text:?} became {normal:?}");
    }
}
