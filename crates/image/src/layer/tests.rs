use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::erofs::{NAME_MAX, Reader, WriterError};
use crate::testing::{NoLower, Seen, convert_in_memory, walk};

const LIMIT: u64 = 64 << 20;
const METADATA: u64 = 16 << 20;

/// A tar being built, with the entries that the `tar` crate would rather not write.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(mut self, path: &str, kind: tar::EntryType, link: Option<&str>, data: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind.is_dir() { 0o750 } else { 0o640 });
        header.set_uid(1000);
        header.set_gid(2_000_000_000);
        header.set_mtime(1_600_000_000);
        header.set_size(data.len() as u64);
        if let Some(link) = link {
            let field = &mut header.as_old_mut().linkname;
            field[..link.len()].copy_from_slice(link.as_bytes());
        }
        if path.len() < 100 {
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        } else {
            let mut long = tar::Header::new_gnu();
            long.set_entry_type(tar::EntryType::GNULongName);
            long.set_size(path.len() as u64);
            long.set_cksum();
            self.0.append(&long, path.as_bytes()).unwrap();
        }
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(path, tar::EntryType::Regular, None, data)
    }

    fn dir(self, path: &str) -> Self {
        self.entry(path, tar::EntryType::Directory, None, &[])
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, tar::EntryType::Symlink, Some(target), &[])
    }

    fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(path, tar::EntryType::Link, Some(target), &[])
    }

    fn pax<'a>(mut self, records: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        self.0.append_pax_extensions(records).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    fn image(self) -> Vec<u8> {
        convert_in_memory(&self.bytes(), &mut NoLower, LIMIT, METADATA).unwrap().0
    }

    fn tree(self) -> BTreeMap<String, Seen> {
        read(self.image())
    }

    /// Converts above other layers, lowest first.
    fn above(self, lower: &[&[u8]]) -> Result<(BTreeMap<String, Seen>, Converted), ConvertError> {
        let mut stack = LayerStack::new(lower.iter().map(|image| image.to_vec()).collect()).unwrap();
        let (image, converted) = convert_in_memory(&self.bytes(), &mut stack, LIMIT, METADATA)?;
        Ok((read(image), converted))
    }

    fn image_above(self, lower: &[u8]) -> Vec<u8> {
        let mut stack = LayerStack::new(vec![lower.to_vec()]).unwrap();
        convert_in_memory(&self.bytes(), &mut stack, LIMIT, METADATA).unwrap().0
    }

    fn error(self) -> ConvertError {
        convert_in_memory(&self.bytes(), &mut NoLower, LIMIT, METADATA).unwrap_err()
    }
}

fn read(image: Vec<u8>) -> BTreeMap<String, Seen> {
    walk(&Reader::open(image).unwrap()).unwrap()
}

fn is_whiteout(seen: &Seen) -> bool {
    seen.mode == 0o020_000 && seen.device == 0
}

fn is_opaque(seen: &Seen) -> bool {
    seen.xattrs.contains(&("trusted.overlay.opaque".to_owned(), b"y".to_vec()))
}

fn keys(tree: &BTreeMap<String, Seen>) -> Vec<&str> {
    tree.keys().map(String::as_str).collect()
}

#[test]
fn attributes_and_contents_arrive_as_they_were_written() {
    let big = vec![0xab; 3 * 4096 + 17];
    let tree = Tar::new()
        .dir("d/")
        .file("d/small", b"hello")
        .file("d/big", &big)
        .file("d/empty", b"")
        .symlink("d/link", "../target")
        .hard_link("d/again", "d/small")
        .entry("d/pipe", tar::EntryType::Fifo, None, &[])
        .tree();
    let small = &tree["d/small"];
    assert_eq!((small.uid, small.gid, small.mtime), (1000, 2_000_000_000, (1_600_000_000, 0)));
    assert_eq!((small.mode, small.links, &small.bytes[..]), (0o100_640, 2, &b"hello"[..]));
    assert_eq!(tree["d/again"].nid, small.nid);
    assert_eq!(tree["d/big"].bytes, big);
    assert_eq!(tree["d/empty"].bytes, b"");
    assert_eq!(tree["d/link"].bytes, b"../target");
    assert_eq!(tree["d/pipe"].mode, 0o010_640);
    assert_eq!((tree["d"].mode, tree["d"].links, tree[""].links), (0o040_750, 2, 3));
}

#[test]
fn whiteouts_become_what_overlayfs_knows() {
    let below = Tar::new().dir("d/").image();
    let (tree, converted) = Tar::new()
        .dir("d/")
        .file("d/.wh.gone", b"")
        .dir("o/")
        .file("o/.wh..wh..opq", b"")
        .file("o/kept", b"x")
        .file(".wh..wh.plnk", b"")
        .above(&[&below])
        .unwrap();
    // That it shows anything below its own d, the layer knows from below.
    assert!(converted.depends_on_lower);
    assert_eq!(keys(&tree), ["", "d", "d/gone", "o", "o/kept"]);
    assert!(is_whiteout(&tree["d/gone"]));
    assert!(is_opaque(&tree["o"]) && !is_opaque(&tree["d"]));
}

#[test]
fn a_whiteout_hides_lower_layers_and_not_its_own_one() {
    for tar in [
        Tar::new().file("a", b"mine").dir("b/").file("b/x", b"").file(".wh.a", b"").file(".wh.b", b""),
        Tar::new().file(".wh.a", b"").file(".wh.b", b"").file("a", b"mine").dir("b/").file("b/x", b""),
    ] {
        let tree = tar.tree();
        assert_eq!(tree["a"].bytes, b"mine");
        assert!(is_opaque(&tree["b"]));
        assert!(tree.contains_key("b/x"));
    }
}

#[test]
fn whiteouts_that_hide_nothing_are_left_out() {
    // Overlayfs lists them where nothing is merged: find, du and tar then failed on names that have no file.
    let below = Tar::new().dir("d/").file("d/x", b"").file("f", b"").symlink("l", "d").image();
    let (tree, _) = Tar::new()
        .dir("d/")
        .file("d/.wh.x", b"")
        .file("d/.wh.never-there", b"")
        .dir("d/new/")
        .file("d/new/.wh.x", b"")
        .dir("d/new/deeper/")
        .file("d/new/deeper/.wh.x", b"")
        .dir("o/")
        .file("o/.wh.beside", b"")
        .file("o/.wh..wh..opq", b"")
        .dir("o/inner/")
        .file("o/inner/.wh.x", b"")
        .dir("f/")
        .file("f/.wh.x", b"")
        .dir("l/")
        .file("l/.wh.x", b"")
        .file(".wh.root", b"")
        .above(&[&below])
        .unwrap();
    assert_eq!(
        keys(&tree),
        ["", "d", "d/never-there", "d/new", "d/new/deeper", "d/x", "f", "l", "o", "o/inner", "root"]
    );
    // The root is merged with the writable layer if with nothing else; nobody need be asked.
    let (tree, converted) = Tar::new().file(".wh.root", b"").file("x", b"").above(&[]).unwrap();
    assert_eq!((keys(&tree), converted.depends_on_lower), (vec!["", "root", "x"], false));
    let (tree, converted) = Tar::new()
        .file(".wh..wh..opq", b"")
        .file(".wh.root", b"")
        .dir("d/")
        .file("d/.wh.x", b"")
        .above(&[&below])
        .unwrap();
    assert_eq!((keys(&tree), converted.depends_on_lower), (vec!["", "d"], false));
}

#[test]
fn a_layer_that_states_its_root_is_told_from_one_that_does_not() {
    let mark = |tree: &BTreeMap<String, Seen>| {
        tree[""].xattrs.iter().any(|(name, _)| name == "trusted.overlay.a3s-root")
    };
    let stated = Tar::new().dir("./").file("x", b"").tree();
    assert!(mark(&stated) && (stated[""].mode, stated[""].uid) == (0o040_750, 1000));
    assert!(!mark(&Tar::new().file("x", b"").tree()));
    // A tar cannot make the mark itself.
    let claimed = Tar::new().pax([("SCHILY.xattr.trusted.overlay.a3s-root", &b"y"[..])]).dir("d/").tree();
    assert_eq!(claimed["d"].xattrs, []);
}

#[test]
fn a_name_that_goes_back_inside_is_read_as_others_read_it() {
    let tree =
        Tar::new().dir("d/").file("d/../e", b"e").hard_link("d/x/../../f", "d/../e").dir("d/..").tree();
    assert_eq!(keys(&tree), ["", "d", "e", "f"]);
    assert_eq!((tree["e"].bytes.as_slice(), tree["e"].nid), (&b"e"[..], tree["f"].nid));
}

#[test]
fn climbing_names_are_refused_and_absolute_ones_are_ours() {
    for path in ["../x", "a/../../x", "/../x", "a/../.."] {
        assert!(matches!(Tar::new().file(path, b"").error(), ConvertError::Climbs { .. }), "{path}");
    }
    let error = Tar::new().hard_link("x", "../../etc/shadow").error();
    assert!(matches!(error, ConvertError::Climbs { .. }));
    let tree = Tar::new().file("/etc//./passwd", b"x").tree();
    assert_eq!(keys(&tree), ["", "etc", "etc/passwd"]);
}

#[test]
fn symlinks_are_followed_inside_our_own_root_only() {
    let tree = Tar::new()
        .symlink("abs", "/etc")
        .symlink("up", "../../../var/log")
        .dir("etc/")
        .file("abs/x", b"1")
        .file("up/y", b"2")
        .tree();
    assert_eq!(tree["etc/x"].bytes, b"1");
    assert_eq!(tree["var/log/y"].bytes, b"2");
    let looping = Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", b"").error();
    assert!(matches!(looping, ConvertError::SymlinkLoop { .. }));
}

#[test]
fn a_name_of_5000_bytes_is_refused_with_its_length() {
    let error = Tar::new().file(&"n".repeat(5000), b"").error();
    assert!(matches!(error, ConvertError::NameTooLong { length: 5000, .. }), "{error}");
    assert!(error.to_string().len() < 300, "the message holds the whole name");
    let path = "d/".repeat(2500) + "x";
    assert!(matches!(Tar::new().file(&path, b"").error(), ConvertError::PathTooLong { length: 5001, .. }));
    let longest = "n".repeat(NAME_MAX);
    assert!(Tar::new().file(&longest, b"x").tree().contains_key(&longest));
}

#[test]
fn of_entries_with_one_name_the_last_wins() {
    let tree = Tar::new()
        .file("f", b"old")
        .hard_link("keeps-old", "f")
        .file("f", b"new")
        .dir("d/")
        .file("d/child", b"")
        .dir("d/")
        .dir("gone/")
        .file("gone/child", b"")
        .file("gone", b"now a file")
        .tree();
    assert_eq!((&tree["f"].bytes[..], &tree["keeps-old"].bytes[..]), (&b"new"[..], &b"old"[..]));
    assert_eq!(tree["keeps-old"].links, 1);
    assert!(tree.contains_key("d/child") && !tree.contains_key("gone/child"));
}

#[test]
fn an_implied_parent_takes_its_attributes_from_below() {
    let base = Tar::new().dir("srv/").pax([("SCHILY.xattr.user.k", &b"v"[..])]).dir("srv/deep/").image();
    let (tree, converted) = Tar::new().file("srv/deep/x", b"").above(&[&base]).unwrap();
    assert!(converted.depends_on_lower);
    assert_eq!((tree["srv/deep"].mode, tree["srv/deep"].uid), (0o040_750, 1000));
    assert_eq!(tree["srv/deep"].xattrs, [("user.k".to_owned(), b"v".to_vec())]);
    let (tree, converted) = Tar::new().file("x", b"").above(&[&base]).unwrap();
    assert!(!converted.depends_on_lower);
    assert_eq!(keys(&tree), ["", "x"]);
    let tree = Tar::new().file("new/x", b"").tree();
    assert_eq!((tree["new"].mode, tree["new"].uid), (0o040_755, 0));
}

#[test]
fn a_file_under_a_symlink_of_a_lower_layer_goes_where_it_leads() {
    let base = Tar::new().dir("usr/").dir("usr/lib/").symlink("lib", "usr/lib").image();
    let (tree, _) = Tar::new().file("lib/libx.so", b"x").above(&[&base]).unwrap();
    assert_eq!(keys(&tree), ["", "usr", "usr/lib", "usr/lib/libx.so"]);
}

#[test]
fn a_hard_link_to_a_lower_layer_brings_a_copy_under_both_names() {
    let base = Tar::new().dir("bin/").file("bin/tool", &[7; 9000]).image();
    let (tree, converted) =
        Tar::new().dir("bin/").hard_link("bin/alias", "bin/tool").above(&[&base]).unwrap();
    assert!(converted.depends_on_lower);
    assert_eq!(tree["bin/alias"].bytes, [7; 9000]);
    assert_eq!((tree["bin/alias"].nid, tree["bin/alias"].links), (tree["bin/tool"].nid, 2));
    assert_eq!(tree["bin/tool"].uid, 1000);
}

#[test]
fn what_middle_layers_hide_cannot_be_linked_to() {
    let base = Tar::new().dir("d/").file("d/f", b"x").file("g", b"y").image();
    let hides_file = Tar::new().dir("d/").file("d/.wh.f", b"").image_above(&base);
    let hides_all = Tar::new().dir("d/").file("d/.wh..wh..opq", b"").image();
    let replaces = Tar::new().file("d", b"a file").image();
    for middle in [hides_file, hides_all, replaces] {
        let error = Tar::new().hard_link("new", "d/f").above(&[&base, &middle]);
        let refused =
            matches!(error, Err(ConvertError::HardLink { .. } | ConvertError::NotADirectory { .. }));
        assert!(refused, "{error:?}");
        assert!(Tar::new().hard_link("new", "g").above(&[&base, &middle]).is_ok());
    }
    let own = Tar::new().file(".wh.g", b"").hard_link("new", "g").above(&[&base]);
    assert!(matches!(own, Err(ConvertError::HardLink { .. })));
}

#[test]
fn hard_links_to_nothing_and_to_directories_are_refused() {
    for tar in [Tar::new().hard_link("a", "missing"), Tar::new().dir("d/").hard_link("a", "d")] {
        assert!(matches!(tar.error(), ConvertError::HardLink { .. }));
    }
}

#[test]
fn overlay_attributes_of_the_tar_are_dropped_and_others_kept() {
    let tree = Tar::new()
        .pax([
            ("SCHILY.xattr.trusted.overlay.redirect", &b"/etc"[..]),
            ("SCHILY.xattr.security.capability", &b"\x01\x00cap"[..]),
            ("mtime", &b"1700000000.123456789"[..]),
        ])
        .file("f", b"x")
        .tree();
    assert_eq!(tree["f"].xattrs, [("security.capability".to_owned(), b"\x01\x00cap".to_vec())]);
    assert_eq!(tree["f"].mtime, (1_700_000_000, 123_456_789));
}

#[test]
fn a_sparse_file_of_many_gigabytes_is_refused_by_the_limit_before_it_is_written() {
    let tar = Tar::new()
        .pax([("GNU.sparse.size", &b"1099511627776"[..]), ("GNU.sparse.map", &b"0,3"[..])])
        .file("huge", b"abc");
    let error = tar.error();
    let too_large =
        matches!(&error, ConvertError::Write { source: WriterError::TooLarge { limit: LIMIT }, .. });
    assert!(too_large, "{error}");
}

#[test]
fn names_without_end_are_stopped_by_the_metadata_limit() {
    let mut tar = Tar::new();
    for i in 0..2000 {
        tar = tar.file(&format!("{i}"), b"");
    }
    let error = convert_in_memory(&tar.bytes(), &mut NoLower, LIMIT, 100_000).unwrap_err();
    assert!(matches!(error, ConvertError::TooMuchMetadata { limit: 100_000 }));
}

#[test]
fn a_directory_of_many_blocks_is_searchable_for_every_name() {
    let mut tar = Tar::new().dir("d/");
    // Names around "." sort before and after the dot entries.
    for i in 0..1500 {
        tar = tar.file(&format!("d/{}{i}", ["!", ".", "-", "z", ".."][i % 5]), i.to_string().as_bytes());
    }
    let tree = tar.tree();
    assert_eq!(tree.len(), 1502);
    assert_eq!(tree["d/z3"].bytes, b"3");
}

#[test]
fn layers_that_lean_on_lower_ones_are_told_from_those_that_do_not() {
    let first = Tar::new().dir("a/").file("a/b", b"").image();
    let again = Tar::new().dir("a/").file("a/b", b"").image();
    assert_eq!(first, again, "the same tar must give the same bytes");
}

/// A name, drawn from few so that they meet.
fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-c]", "[a-c]", "[!.~][a-c]", "[a-c]{60}"]
}

#[derive(Debug, Clone)]
enum Step {
    File(String, usize),
    Dir(String),
    Symlink(String, String),
    Link(String, String),
    Whiteout(String, String),
}

fn step() -> impl Strategy<Value = Step> {
    let path = || prop::collection::vec(name(), 1..4).prop_map(|names| names.join("/"));
    prop_oneof![
        (path(), 0usize..10_000).prop_map(|(path, size)| Step::File(path, size)),
        path().prop_map(Step::Dir),
        (path(), path()).prop_map(|(path, target)| Step::Symlink(path, target)),
        (path(), path()).prop_map(|(path, target)| Step::Link(path, target)),
        (path(), name()).prop_map(|(path, name)| Step::Whiteout(path, name)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Entries that are refused are left out, so that the rest of the tree is made.
    #[test]
    fn every_tree_that_is_taken_reads_back_whole(steps in prop::collection::vec(step(), 1..40)) {
        let mut taken: Vec<Step> = Vec::new();
        for step in steps {
            let mut tried = taken.clone();
            tried.push(step);
            if convert_in_memory(&tar_of(&tried), &mut NoLower, LIMIT, METADATA).is_ok() {
                taken = tried;
            }
        }
        let (image, converted) = convert_in_memory(&tar_of(&taken), &mut NoLower, LIMIT, METADATA).unwrap();
        prop_assert_eq!(image.len() as u64, converted.bytes);
        let tree = read(image);
        let mut links: BTreeMap<u64, u32> = BTreeMap::new();
        for seen in tree.values().filter(|seen| seen.mode & 0o170_000 != 0o040_000) {
            *links.entry(seen.nid).or_default() += 1;
        }
        for seen in tree.values().filter(|seen| seen.mode & 0o170_000 == 0o100_000) {
            prop_assert_eq!(seen.links, links[&seen.nid]);
            // The byte says the size, so mixed-up contents show.
            prop_assert!(seen.bytes.iter().all(|byte| usize::from(*byte) == seen.bytes.len() % 251));
        }
    }
}

fn tar_of(steps: &[Step]) -> Vec<u8> {
    let mut tar = Tar::new();
    for step in steps {
        tar = match step {
            Step::File(path, size) => tar.file(path, &vec![(size % 251) as u8; *size]),
            Step::Dir(path) => tar.dir(&format!("{path}/")),
            Step::Symlink(path, target) => tar.symlink(path, &target[..target.len().min(99)]),
            Step::Link(path, target) => tar.hard_link(path, &target[..target.len().min(99)]),
            Step::Whiteout(path, name) => tar.file(&format!("{path}/.wh.{name}"), b""),
        };
    }
    tar.bytes()
}
