//! An image with what layers may hold and packages seldom do, on top of a Debian package.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use a3s_box_e2e::image::{Encoding, Image, Layer};
use anyhow::{Context, Result, bail};
use serde_json::json;

use super::tool;
use crate::debian;

pub(super) fn image(cache: &Path) -> Result<Image> {
    let folder = tempfile::tempdir().context("creating a folder for the curious layers")?;
    let [odd, long] = ["odd", "long"].map(|name| folder.path().join(name));
    make_odd(&odd)?;
    make_long(&long)?;
    let changes = Layer::new()
        .opaque("data/opaque")?
        .file("data/opaque/new", 0o600, b"new")?
        .whiteout("data", "gone")?
        .whiteout("data", "gone-directory")?
        .file("data/becomes-file", 0o644, b"a directory before")?
        .directory("data/becomes-directory", 0o2750)?
        .file("data/becomes-directory/inside", 0o644, b"x")?
        // Through a symbolic link of the layer below.
        .file("data/link-to-real/through", 0o644, b"y")?
        // Into the layer below.
        .hard_link("data/linked-later", "data/to-link")?;
    let layers = vec![
        (debian::layer(&["bash"], cache)?.0, Encoding::Gzip),
        (Layer::from_archive(archive(&odd, "posix")?), Encoding::Plain),
        (Layer::from_archive(archive(&long, "gnu")?), Encoding::Plain),
        (changes, Encoding::Gzip),
    ];
    Image::new(layers, &json!({ "Cmd": ["/bin/bash"] }))
}

fn make_odd(root: &Path) -> Result<()> {
    let data = root.join("data");
    for directory in ["opaque/old", "gone-directory/x", "becomes-file/x", "real"] {
        fs::create_dir_all(data.join(directory))?;
    }
    for file in ["opaque/hidden", "gone", "becomes-directory", "to-link", "one", "setuid", "sub-second"] {
        fs::write(data.join(file), file)?;
    }
    symlink("real", data.join("link-to-real"))?;
    fs::hard_link(data.join("one"), data.join("two"))?;
    fs::hard_link(data.join("one"), data.join("real/three"))?;
    for size in [0, 1, 4095, 4096, 4097, 1_000_003] {
        let bytes: Vec<u8> = (0..size).map(|i: u32| (i % 251) as u8).collect();
        fs::write(data.join(format!("size-{size}")), bytes)?;
    }
    let sparse = fs::File::create(data.join("sparse"))?;
    sparse.write_all_at(b"start", 0)?;
    sparse.write_all_at(b"end", (64 << 20) + 777)?;
    tool(Command::new("mkfifo").arg(data.join("fifo")))?;
    tool(Command::new("mknod").arg(data.join("null")).args(["c", "1", "3"]))?;
    tool(Command::new("mknod").arg(data.join("block")).args(["b", "259", "70000"]))?;
    // An owner's change takes the set-user-ID bit and capabilities away, so that it comes first.
    tool(Command::new("chown").arg("70000:4000000000").arg(data.join("setuid")))?;
    fs::set_permissions(data.join("setuid"), fs::Permissions::from_mode(0o6755))?;
    fs::set_permissions(data.join("real"), fs::Permissions::from_mode(0o1777))?;
    // security.capability, version 2, with one capability.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(data.join("setuid"), "security.capability", &capability, flags)?;
    rustix::fs::setxattr(data.join("one"), "user.note", b"of a file", flags)?;
    rustix::fs::setxattr(data.join("real"), "user.note", b"of a directory", flags)?;
    tool(Command::new("touch").args(["-d", "2001-02-03 04:05:06.123456789 UTC"]).arg(data.join("sub-second")))
}

/// Names and targets that need GNU's extra headers.
fn make_long(root: &Path) -> Result<()> {
    let deep = root.join("long").join("d".repeat(120)).join("e".repeat(120));
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("n".repeat(255)), b"long name")?;
    symlink("t".repeat(3000), deep.join("long-target"))?;
    Ok(())
}

/// A tar of a directory's members, without the directory itself.
fn archive(root: &Path, format: &str) -> Result<Vec<u8>> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sparse", "--numeric-owner", "--sort=name", &format!("--format={format}")]);
    if format == "posix" {
        tar.args(["--xattrs", "--xattrs-include=*"]);
    }
    let top = fs::read_dir(root)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    let output = tar.arg("-C").arg(root).args(top).output().context("starting tar")?;
    if !output.status.success() {
        bail!("tar of {} failed: {}", root.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}
