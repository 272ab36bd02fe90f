//! What the kernel makes of our images: they are mounted and compared file by file with where
//! they came from. Needs root, EROFS and loop devices; says so where they are missing.

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use support::{Layout, Unpacked, assert_same, can_mount, has_tool, in_private_mounts, pull, run, tar_of};

/// Directories of any Debian machine with many small files, links and odd names.
const REAL: [&str; 4] = ["etc", "usr/share/perl5", "usr/share/zoneinfo", "usr/lib/git-core"];

/// A tree with one of everything that a file system can hold.
fn curiosities(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::create_dir_all(at("dir/sub")).unwrap();
    fs::write(at("dir/empty"), b"").unwrap();
    for size in [1, 2047, 2048, 2049, 4095, 4096, 4097, 6000, 8192, 1_000_003] {
        let bytes: Vec<u8> = (0..size).map(|i: u32| (i % 251) as u8).collect();
        fs::write(at(&format!("dir/size-{size}")), bytes).unwrap();
    }
    fs::write(at(&"n".repeat(255)), b"long name").unwrap();
    for i in 0..700 {
        fs::write(at(&format!("dir/sub/a-file-with-quite-a-long-name-{i}")), i.to_string()).unwrap();
    }
    fs::hard_link(at("dir/size-6000"), at("dir/sub/hard")).unwrap();
    symlink("/etc/passwd", at("absolute")).unwrap();
    symlink("x".repeat(4000), at("long-link")).unwrap();
    fs::write(at("setuid"), b"#!").unwrap();
    run(Command::new("chown").arg("1234:4000000000").arg(at("setuid")));
    fs::set_permissions(at("setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(at("dir"), fs::Permissions::from_mode(0o1777)).unwrap();
    run(Command::new("mkfifo").arg(at("fifo")));
    run(Command::new("mknod").arg(at("null")).args(["c", "1", "3"]));
    run(Command::new("mknod").arg(at("block")).args(["b", "259", "70000"]));
    let huge = fs::File::create(at("huge")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&huge, b"start", 0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&huge, b"end", (4 << 30) + 777).unwrap();
    // security.capability, version 2, with one capability.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(at("setuid"), "security.capability", &capability, flags).unwrap();
    rustix::fs::setxattr(at("dir"), "trusted.note", b"dir", flags).unwrap();
    run(Command::new("touch").args(["-h", "-d", "1969-12-31 23:59:58.25 UTC"]).arg(at("absolute")));
}

#[tokio::test]
async fn the_kernel_reads_every_curiosity_as_it_was() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    fs::create_dir(&source).unwrap();
    curiosities(&source);
    let layout = Layout::new(&scratch.path().join("layout"), &[tar_of(&source, &["."])]);
    let files = pull(scratch.path(), &layout).await;
    in_private_mounts(scratch.path(), move |mounts| {
        let mounted = mounts.erofs(&files[0]);
        assert_same(&source, &mounted, Unpacked::Exactly);
    });
}

#[tokio::test]
async fn the_kernel_reads_real_trees_as_they_were() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let trees: Vec<_> = REAL.into_iter().filter(|tree| Path::new("/").join(tree).is_dir()).collect();
    let layout = Layout::new(&scratch.path().join("layout"), &[tar_of(Path::new("/"), &trees)]);
    let files = pull(scratch.path(), &layout).await;
    in_private_mounts(scratch.path(), move |mounts| {
        let mounted = mounts.erofs(&files[0]);
        for tree in trees {
            assert_same(&Path::new("/").join(tree), &mounted.join(tree), Unpacked::PartOfATree);
        }
    });
}

#[tokio::test]
async fn the_fsck_of_erofs_utils_finds_nothing() {
    if !has_tool("fsck.erofs") {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let layout = Layout::new(&scratch.path().join("layout"), &[tar_of(Path::new("/"), &REAL[..1])]);
    let files = pull(scratch.path(), &layout).await;
    let extracted = scratch.path().join("extracted");
    run(Command::new("fsck.erofs").arg(format!("--extract={}", extracted.display())).arg(&files[0]));
    assert_same(Path::new("/etc"), &extracted.join("etc"), Unpacked::PartOfATree);
}

/// Three layers that use what the image-spec allows: whiteouts, opaque directories, replaced
/// kinds, hard links into lower layers, files below what is a symlink there.
fn layers(scratch: &Path) -> Vec<Vec<u8>> {
    let layer = |name: &str| {
        let directory = scratch.join(name);
        fs::create_dir(&directory).unwrap();
        directory
    };
    let base = layer("base");
    run(Command::new("cp")
        .args(["-a", "--parents"])
        .args(["etc", "usr/share/perl5"])
        .arg(&base)
        .current_dir("/"));
    fs::create_dir_all(base.join("usr/lib")).unwrap();
    symlink("usr/lib", base.join("lib")).unwrap();
    fs::create_dir_all(base.join("data/old")).unwrap();
    for file in ["data/old/one", "data/old/two", "data/keep", "data/swap", "data/linked", "gone"] {
        fs::write(base.join(file), file).unwrap();
    }
    fs::create_dir_all(base.join("becomes-file/x")).unwrap();
    fs::set_permissions(base.join("data"), fs::Permissions::from_mode(0o2770)).unwrap();

    let middle = layer("middle");
    fs::create_dir_all(middle.join("data/old")).unwrap();
    fs::set_permissions(middle.join("data"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(middle.join("data/old/.wh..wh..opq"), b"").unwrap();
    fs::write(middle.join("data/old/three"), b"3").unwrap();
    fs::write(middle.join(".wh.gone"), b"").unwrap();
    // These hide nothing: they were listed in the merged tree and could not be found there.
    fs::create_dir_all(middle.join("only-here/deeper")).unwrap();
    for idle in ["only-here/.wh.x", "only-here/deeper/.wh.x", "data/old/.wh.one"] {
        fs::write(middle.join(idle), b"").unwrap();
    }
    fs::create_dir(middle.join("data/swap")).unwrap();
    fs::write(middle.join("data/swap/inside"), b"x").unwrap();
    fs::write(middle.join("becomes-file"), b"now a file").unwrap();

    // Its tar does not list the directories it writes to.
    let top = layer("top");
    fs::create_dir_all(top.join("lib")).unwrap();
    fs::write(top.join("lib/through-a-link"), b"y").unwrap();
    fs::create_dir_all(top.join("data")).unwrap();
    fs::write(top.join("data/new"), b"z").unwrap();
    fs::write(top.join("data/.wh.keep"), b"").unwrap();
    fs::write(top.join("data/linked"), b"linked").unwrap();
    fs::hard_link(top.join("data/linked"), top.join("data/link")).unwrap();

    let mut top = tar_of(&top, &["lib/through-a-link", "data/new", "data/.wh.keep"]);
    support::append_hard_link(&mut top, "data/link", "data/linked");
    vec![tar_of(&base, &["."]), tar_of(&middle, &["."]), top]
}

#[tokio::test]
async fn the_merged_layers_equal_what_umoci_unpacks() {
    if !can_mount() || !has_tool("umoci") {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let layout = Layout::new(&scratch.path().join("layout"), &layers(scratch.path()));
    let bundle = scratch.path().join("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:test", layout.0.display()))
        .arg(&bundle));
    let files = pull(scratch.path(), &layout).await;
    in_private_mounts(scratch.path(), move |mounts| {
        let merged = mounts.overlay(&files);
        assert!(merged.join("usr/lib/through-a-link").exists());
        assert_same(&bundle.join("rootfs"), &merged, Unpacked::Merged);
    });
}

#[test]
fn a_full_disk_says_so_and_leaves_nothing() {
    if !rustix::process::geteuid().is_root() {
        a3s_box_testing::skip("mounting needs root");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    fs::create_dir(&source).unwrap();
    let noise: Vec<u8> = (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(source.join("big"), noise).unwrap();
    let layout = Layout::new(&scratch.path().join("layout"), &[tar_of(&source, &["."])]);
    in_private_mounts(scratch.path(), move |mounts| {
        let small = mounts.tmpfs("1m");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(support::try_pull(&small, &layout)).unwrap_err();
        assert_eq!(error.kind(), a3s_box_image::ErrorKind::NoSpace, "{error}");
        let message = error.to_string();
        assert!(message.contains("layer 1 of 1") && message.contains("free disk space"), "{message}");
        assert_eq!(fs::read_dir(small.join("store/images/tmp")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(small.join("store/images/erofs")).unwrap().count(), 0);
    });
}
