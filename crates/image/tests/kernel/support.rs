//! Layouts, mounts and comparisons.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use a3s_box_image::digest::Digest;
use a3s_box_image::{ImageError, ImageStore, ImageStoreConfig};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Records that nobody reads again.
struct Forgetful;

impl Storage for Forgetful {
    fn get(&self, _: Table, _: &str) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(None)
    }

    fn scan(&self, _: Table) -> Result<Vec<Record>, StorageError> {
        Ok(Vec::new())
    }

    fn commit(&self, _: Vec<Change>) -> Result<(), StorageError> {
        Ok(())
    }
}

pub(crate) fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn skipped(why: &str) -> bool {
    a3s_box_testing::skip(why);
    false
}

pub(crate) fn has_tool(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(name).is_file());
    found || skipped(&format!("{name} is not installed"))
}

/// Whether this process can mount EROFS files.
pub(crate) fn can_mount() -> bool {
    if !rustix::process::geteuid().is_root() {
        return skipped("mounting needs root");
    }
    let _ = Command::new("modprobe").arg("erofs").output();
    let known = fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.contains("erofs"));
    let loops = Path::new("/dev/loop-control").exists();
    (known && loops) || skipped("this kernel has no EROFS or no loop devices")
}

/// A tar of some paths of a directory, with all that GNU tar can say about them.
pub(crate) fn tar_of(root: &Path, paths: &[&str]) -> Vec<u8> {
    let mut tar = Command::new("tar");
    tar.args([
        "--create",
        "--format=posix",
        "--sparse",
        "--xattrs",
        "--xattrs-include=*",
        "--numeric-owner",
        "-C",
    ]);
    run(tar.arg(root).args(paths)).stdout
}

/// Adds a hard link at the end of a tar.
pub(crate) fn append_hard_link(tar: &mut Vec<u8>, name: &str, target: &str) {
    let end = tar.chunks(512).rposition(|block| block.iter().any(|byte| *byte != 0)).unwrap() + 1;
    tar.truncate(end * 512);
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Link);
    header.set_path(name).unwrap();
    header.set_link_name(target).unwrap();
    header.set_mode(0o644);
    header.set_size(0);
    header.set_cksum();
    tar.extend_from_slice(header.as_bytes());
    tar.extend_from_slice(&[0; 1024]);
}

/// An OCI layout with one image, `test`.
pub(crate) struct Layout(pub(crate) PathBuf);

impl Layout {
    pub(crate) fn new(path: &Path, layers: &[Vec<u8>]) -> Self {
        let blobs = path.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let put = |bytes: &[u8]| {
            let digest = Digest::sha256(bytes);
            fs::write(blobs.join(digest.hex()), bytes).unwrap();
            (digest.to_string(), bytes.len())
        };
        let descriptor = |kind: &str, (digest, size): (String, usize)| serde_json::json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": size});
        let layers: Vec<_> = layers.iter().map(|layer| put(layer)).collect();
        let diff_ids: Vec<_> = layers.iter().map(|(digest, _)| digest.clone()).collect();
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = serde_json::json!({
            "os": "linux", "architecture": architecture, "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = put(config.to_string().as_bytes());
        let layers: Vec<_> = layers.into_iter().map(|layer| descriptor("layer.v1.tar", layer)).collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("config.v1+json", config), "layers": layers,
        });
        let mut entry = descriptor("manifest.v1+json", put(manifest.to_string().as_bytes()));
        entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "test"});
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]});
        fs::write(path.join("index.json"), index.to_string()).unwrap();
        fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self(path.to_owned())
    }
}

/// Pulls a layout's image; returns its EROFS files, lowest first.
pub(crate) async fn pull(scratch: &Path, layout: &Layout) -> Vec<PathBuf> {
    try_pull(scratch, layout).await.unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) async fn try_pull(scratch: &Path, layout: &Layout) -> Result<Vec<PathBuf>, ImageError> {
    let store = ImageStore::open(ImageStoreConfig::new(scratch.join("store")), Arc::new(Forgetful))?;
    let reference = format!("oci:{}:test", layout.0.display());
    store.pull(&reference, None, None).await?;
    Ok(store.resolve(&reference)?.layers.into_iter().map(|layer| layer.erofs).collect())
}

/// Mounts under a directory, gone with the thread that made them.
pub(crate) struct Mounts(PathBuf);

/// Runs work in a mount namespace of its own.
pub(crate) fn in_private_mounts(scratch: &Path, work: impl FnOnce(&Mounts) + Send + 'static) {
    let mounts = Mounts(scratch.join("mounts"));
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        work(&mounts);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Mounts {
    fn at(&self, name: &str) -> PathBuf {
        let target = self.0.join(name);
        fs::create_dir_all(&target).unwrap();
        target
    }

    pub(crate) fn tmpfs(&self, size: &str) -> PathBuf {
        let target = self.at("tmpfs");
        let options = format!("size={size}");
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "-o", &options]).arg(&target));
        target
    }

    pub(crate) fn erofs(&self, file: &Path) -> PathBuf {
        let target = self.at(file.file_name().unwrap().to_str().unwrap());
        run(Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(file).arg(&target));
        target
    }

    /// The layers, lowest first, as a container would see them.
    pub(crate) fn overlay(&self, files: &[PathBuf]) -> PathBuf {
        let lower: Vec<_> = files.iter().rev().map(|file| self.erofs(file).display().to_string()).collect();
        let target = self.at("merged");
        let options = format!("lowerdir={}", lower.join(":"));
        run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&target));
        target
    }
}

/// What a comparison may leave out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unpacked {
    /// Nothing.
    Exactly,
    /// Links may lead out of the tree, so their count is not compared.
    PartOfATree,
    /// The root directory and directories' times come from whoever merged.
    Merged,
}

#[derive(Debug, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    time: Option<(i64, i64)>,
    device: u64,
    links: Option<u64>,
    size: Option<u64>,
    target: Option<PathBuf>,
    xattrs: BTreeMap<String, Vec<u8>>,
}

fn facts(path: &Path, unpacked: Unpacked) -> Facts {
    let metadata = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let kind = metadata.file_type();
    let device = kind.is_char_device() || kind.is_block_device();
    let timed = unpacked != Unpacked::Merged || !kind.is_dir();
    Facts {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        time: timed.then(|| (metadata.mtime(), metadata.mtime_nsec())),
        device: if device { metadata.rdev() } else { 0 },
        links: (unpacked == Unpacked::Exactly && !kind.is_dir()).then(|| metadata.nlink()),
        size: (!kind.is_dir()).then_some(metadata.len()),
        target: kind.is_symlink().then(|| fs::read_link(path).unwrap()),
        xattrs: xattrs(path),
    }
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = String::from_utf8_lossy(&names[..length]).into_owned();
    let value = |name: &str| {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(length);
        value
    };
    // umoci leaves its own notes, and we one at the root: that the layer states whose it is.
    let note = |name: &str| name.starts_with("user.rootlesscontainers") || name == "trusted.overlay.a3s-root";
    let kept = names.split('\0').filter(|name| !name.is_empty() && !note(name));
    kept.map(|name| (name.to_owned(), value(name))).collect()
}

fn names(directory: &Path) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

/// Compares two trees; panics at the first difference.
pub(crate) fn assert_same(expected: &Path, got: &Path, unpacked: Unpacked) {
    let mut count = 0;
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let (left, right) = (expected.join(&path), got.join(&path));
        let is_root = path.as_os_str().is_empty();
        if !(is_root && unpacked == Unpacked::Merged) {
            assert_eq!(facts(&left, unpacked), facts(&right, unpacked), "{}", path.display());
        }
        let metadata = fs::symlink_metadata(&left).unwrap();
        if metadata.is_dir() {
            let names = names(&left);
            assert_eq!(names, self::names(&right), "{}", left.display());
            todo.extend(names.into_iter().map(|name| path.join(name)));
        } else if metadata.is_file() {
            assert_same_bytes(&left, &right, metadata.len());
        }
        count += 1;
    }
    eprintln!("{count} inodes under {} are the same", expected.display());
}

fn assert_same_bytes(left: &Path, right: &Path, size: u64) {
    let (mut a, mut b) = (fs::File::open(left).unwrap(), fs::File::open(right).unwrap());
    let (mut left_buffer, mut right_buffer) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    // Of what is mostly hole, the ends are enough.
    let ends = if size > 1 << 30 { vec![0, size - (1 << 20)] } else { vec![0] };
    for start in ends {
        use std::io::{Seek, SeekFrom};
        a.seek(SeekFrom::Start(start)).unwrap();
        b.seek(SeekFrom::Start(start)).unwrap();
        loop {
            let n = a.read(&mut left_buffer).unwrap();
            b.read_exact(&mut right_buffer[..n]).unwrap();
            assert!(left_buffer[..n] == right_buffer[..n], "{} differs", left.display());
            if n == 0 || size > 1 << 30 {
                break;
            }
        }
    }
}
