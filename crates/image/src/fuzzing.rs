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

/// Reads arbitrary bytes as a manifest or an index, and as a config. What is taken must hold together.
///
/// # Panics
/// When it does not.
#[cfg(feature = "documents")]
pub fn manifest(bytes: &[u8]) {
    use crate::manifest::{Document, Platform, parse, parse_config};
    let host = Platform::host();
    match parse(bytes) {
        Ok(Document::Index(index)) => {
            if let (Ok(named), Ok(chosen)) = (index.named(), index.choose(&host)) {
                assert!(named.iter().any(|(_, entry)| *entry == chosen), "{chosen:?} is not in the index");
            }
        }
        Ok(Document::Manifest(manifest)) => {
            for blob in manifest.layers.iter().chain([&manifest.config]) {
                assert_eq!(blob.digest.to_string().parse().as_ref(), Ok(&blob.digest));
            }
        }
        Err(_) => {}
    }
    for layers in 0..3 {
        if let Ok(config) = parse_config(bytes, layers, &host) {
            assert_eq!(config.diff_ids.len(), layers, "another number of layers");
            assert_eq!(config.platform.os, host.os, "another platform");
        }
    }
}

/// Reads arbitrary text as a `hosts.toml`. Whatever is taken says whom to ask, and nothing leads out of it by accident.
///
/// # Panics
/// When it does not.
#[cfg(feature = "documents")]
pub fn hosts_toml(text: &str) {
    let file = std::path::Path::new("/certs.d/x/hosts.toml");
    for domain in ["docker.io", "registry.example:5000", "localhost:5000"] {
        let Ok(hosts) = crate::hosts::parse(text, file, domain) else { continue };
        assert!(!hosts.is_empty(), "nobody to ask for {domain}");
        for host in hosts {
            assert!(!host.authority.is_empty() && !host.authority.contains(['/', '@']), "{host:?}");
            assert!(host.path.is_empty() || host.path.starts_with('/'), "{host:?}");
            assert!(!host.path.ends_with('/'), "{host:?}");
            assert!(host.tls.ca.iter().all(|path| path.is_absolute()), "{host:?}");
        }
    }
}

#[cfg(all(test, feature = "documents"))]
mod tests {
    /// The seeds of the fuzz targets reach what they are for.
    #[test]
    fn the_seeds_of_the_documents_are_taken() {
        let seeds = |target: &str| {
            let folder =
                std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
            let read =
                |entry: std::io::Result<std::fs::DirEntry>| std::fs::read(entry.unwrap().path()).unwrap();
            std::fs::read_dir(folder).unwrap().map(read).collect::<Vec<_>>()
        };
        let host = crate::manifest::Platform::host();
        for seed in seeds("manifest") {
            super::manifest(&seed);
            let taken = crate::manifest::parse(&seed).is_ok()
                || (0..3).any(|layers| crate::manifest::parse_config(&seed, layers, &host).is_ok());
            assert!(taken, "{}", String::from_utf8_lossy(&seed));
        }
        for seed in seeds("hosts_toml") {
            let text = String::from_utf8(seed).unwrap();
            super::hosts_toml(&text);
            crate::hosts::parse(&text, std::path::Path::new("/x/hosts.toml"), "docker.io").unwrap();
        }
    }
}
