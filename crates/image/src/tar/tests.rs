use std::io::Read;

use super::*;

/// A ustar header with the checksum put in.
fn header(name: &[u8], kind: u8, size: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    block[100..107].copy_from_slice(b"0000644");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[156] = kind;
    block[257..263].copy_from_slice(b"ustar\0");
    with_checksum(block)
}

fn with_checksum(mut block: [u8; BLOCK]) -> [u8; BLOCK] {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len() + 1;
    while format!("{length}").len() + rest.len() != length {
        length += 1;
    }
    format!("{length}{rest}").into_bytes()
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let text: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v)).collect();
    [header(b"pax", b'x', text.len() as u64).to_vec(), padded(&text)].concat()
}

fn only_entry(tar: Vec<u8>) -> (Entry, Vec<u8>) {
    let mut reader = TarReader::new(&tar[..]);
    let entry = reader.next_entry().unwrap().unwrap();
    let mut data = Vec::new();
    reader.read_to_end(&mut data).unwrap();
    assert_eq!(reader.next_entry().unwrap(), None);
    (entry, data)
}

#[test]
fn pax_records_override_the_header() {
    let tar = [
        pax(&[
            ("path", "long/name"),
            ("size", "3"),
            ("uid", "4000000000"),
            ("mtime", "-1.5"),
            ("SCHILY.xattr.user.a", "b=c"),
        ]),
        header(b"short", b'0', 0).to_vec(),
        padded(b"abc"),
    ]
    .concat();
    let (entry, data) = only_entry(tar);
    assert_eq!((entry.path.as_slice(), data.as_slice()), (&b"long/name"[..], &b"abc"[..]));
    assert_eq!((entry.uid, entry.mtime, entry.mtime_nanos), (4_000_000_000, -2, 500_000_000));
    assert_eq!(entry.xattrs, vec![(b"user.a".to_vec(), b"b=c".to_vec())]);
}

#[test]
fn gnu_long_names_apply_to_the_next_entry_only() {
    let long = vec![b'n'; 300];
    let tar = [
        header(b"././@LongLink", b'L', 301).to_vec(),
        padded(&[&long[..], b"\0"].concat()),
        header(b"first", b'0', 0).to_vec(),
        header(b"second", b'0', 0).to_vec(),
    ]
    .concat();
    let mut reader = TarReader::new(&tar[..]);
    assert_eq!(reader.next_entry().unwrap().unwrap().path, long);
    assert_eq!(reader.next_entry().unwrap().unwrap().path, b"second");
}

#[test]
fn sparse_files_are_understood_in_their_dialects() {
    let expected = Some(vec![(512, 3), (4096, 2)]);
    let zero_one = [
        pax(&[("GNU.sparse.size", "5000"), ("GNU.sparse.name", "real"), ("GNU.sparse.map", "512,3,4096,2")]),
        header(b"GNUSparseFile.0/real", b'0', 5).to_vec(),
        padded(b"abcde"),
    ]
    .concat();
    let zero_zero = [
        pax(&[
            ("GNU.sparse.size", "5000"),
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.offset", "512"),
            ("GNU.sparse.numbytes", "3"),
            ("GNU.sparse.offset", "4096"),
            ("GNU.sparse.numbytes", "2"),
        ]),
        header(b"real", b'0', 5).to_vec(),
        padded(b"abcde"),
    ]
    .concat();
    let map = padded(b"2\n512\n3\n4096\n2\n");
    let one_zero = [
        pax(&[
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", "real"),
            ("GNU.sparse.realsize", "5000"),
        ]),
        header(b"GNUSparseFile.0/real", b'0', 517).to_vec(),
        map,
        padded(b"abcde"),
    ]
    .concat();
    let mut old = header(b"real", b'S', 5);
    old[257..265].copy_from_slice(b"ustar  \0");
    for (at, number) in [(386, 512), (398, 3), (410, 4096), (422, 2), (483, 5000)] {
        old[at..at + 11].copy_from_slice(format!("{number:011o}").as_bytes());
    }
    let old = [with_checksum(old).to_vec(), padded(b"abcde")].concat();
    for tar in [zero_one, zero_zero, one_zero, old] {
        let (entry, data) = only_entry(tar);
        assert_eq!(entry.path, b"real");
        assert_eq!((entry.size, &entry.runs), (5000, &expected));
        assert_eq!(data, b"abcde");
    }
}

#[test]
fn overlapping_sparse_runs_are_refused() {
    let tar = [
        pax(&[("GNU.sparse.size", "10"), ("GNU.sparse.map", "4,3,5,2")]),
        header(b"x", b'0', 5).to_vec(),
        padded(b"abcde"),
    ]
    .concat();
    let error = TarReader::new(&tar[..]).next_entry().unwrap_err();
    assert!(matches!(error, TarError::Sparse { .. }), "{error}");
}

#[test]
fn damage_is_told_by_its_kind_and_place() {
    let whole = [header(b"x", b'0', 1000).to_vec(), vec![1; 1024]].concat();
    let mut cut = TarReader::new(&whole[..900]);
    cut.next_entry().unwrap();
    assert!(matches!(cut.next_entry(), Err(TarError::Truncated { .. })));
    let mut flipped = whole.clone();
    flipped[0] ^= 1;
    assert!(matches!(TarReader::new(&flipped[..]).next_entry(), Err(TarError::Checksum { offset: 0 })));
    let huge = header(b"x", b'x', 5 << 20).to_vec();
    assert!(matches!(TarReader::new(&huge[..]).next_entry(), Err(TarError::LongExtension { .. })));
    let unknown = header(b"x", b'Z', 0).to_vec();
    assert!(matches!(
        TarReader::new(&unknown[..]).next_entry(),
        Err(TarError::UnknownType { kind: 'Z', .. })
    ));
    let half = &whole[..100];
    assert!(matches!(TarReader::new(half).next_entry(), Err(TarError::Truncated { .. })));
}

#[test]
fn base_256_numbers_are_read_with_their_sign() {
    assert_eq!(header::number(b"\x80\0\0\0\0\0\0\0\0\0\x01\0"), Some(256));
    assert_eq!(header::number(&[0xff; 12]), Some(-1));
    assert_eq!(header::number(b" 0000755\0"), Some(0o755));
    assert_eq!(header::number(b"9"), None);
}

/// umoci up to 0.4 writes no padding after the last entry, and Go's readers take it.
#[test]
fn the_padding_of_the_last_entry_may_be_missing() {
    let tar = [header(b"x", b'0', 3).to_vec(), b"abc".to_vec()].concat();
    let (entry, data) = only_entry(tar);
    assert_eq!((entry.path.as_slice(), data.as_slice()), (&b"x"[..], &b"abc"[..]));
}
