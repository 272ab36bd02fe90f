//! The wrapper around the library's own file system, on a real directory.

use std::ffi::CString;
use std::path::Path;

use a3s_box_vmm::share_requests::{Kind, Requests};
use virtiofsd::filesystem::{
    Context, DirectoryIterator, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, ROOT_ID,
    SetxattrFlags,
};
use virtiofsd::passthrough::{Config, InodeFileHandlesMode, PassthroughFs};

use super::share::Share;
use crate::share::room::Room;

type Files = Share<PassthroughFs>;

/// Descriptors for the guest's files.
const LIMIT: u64 = 100;

struct Served {
    outside: tempfile::TempDir,
    share: Files,
    requests: &'static Requests,
}

/// A share with `file` and `directory` in it, and what must not be reached beside it.
fn serve() -> Served {
    let outside = tempfile::tempdir().unwrap();
    let root = outside.path().join("share");
    std::fs::create_dir_all(root.join("directory")).unwrap();
    std::fs::write(root.join("file"), "inside").unwrap();
    std::fs::write(outside.path().join("secret"), "outside").unwrap();
    let config = Config {
        xattr: true,
        root_dir: root.to_string_lossy().into_owned(),
        inode_file_handles: InodeFileHandlesMode::Never,
        uid_map: Some(Vec::new()),
        gid_map: Some(Vec::new()),
        ..Config::default()
    };
    let requests: &'static Requests = Box::leak(Box::new(Requests::new()));
    let room = Room::new(LIMIT, None);
    let share = Share::new(PassthroughFs::new(config).unwrap(), requests, room);
    share.init(FsOptions::empty()).unwrap();
    Served { outside, share, requests }
}

fn context() -> Context {
    Context { uid: 0.into(), gid: 0.into(), pid: 1 }
}

fn name(name: &str) -> CString {
    CString::new(name).unwrap()
}

fn entries(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).unwrap().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

// The library takes a name for a path: a hostile kernel could read and change what lies beside its share.
#[test]
fn no_request_that_names_a_file_leaves_its_directory() {
    let Served { outside, share, requests } = serve();
    let secret = outside.path().join("secret");
    let file = share.lookup(context(), ROOT_ID, &name("file")).unwrap().inode;
    let absolute = secret.to_string_lossy().into_owned();
    let inside = name("inside");
    for path in ["..", ".", "", "../secret", "directory/../../secret", absolute.as_str(), "../new"] {
        let path = name(path);
        let none = Extensions::default;
        let refused = [
            share.lookup(context(), ROOT_ID, &path).map(drop),
            share.symlink(context(), &inside, ROOT_ID, &path, none()).map(drop),
            share.mknod(context(), ROOT_ID, &path, libc::S_IFREG | 0o644, 0, 0, none()).map(drop),
            share.mkdir(context(), ROOT_ID, &path, 0o755, 0, none()).map(drop),
            share.unlink(context(), ROOT_ID, &path),
            share.rmdir(context(), ROOT_ID, &path),
            share.rename(context(), ROOT_ID, &path, ROOT_ID, &inside, 0),
            share.rename(context(), ROOT_ID, &name("file"), ROOT_ID, &path, 0),
            share.link(context(), file, ROOT_ID, &path).map(drop),
            share.create(context(), ROOT_ID, &path, 0o644, false, libc::O_RDWR as u32, 0, none()).map(drop),
        ];
        for (request, result) in refused.into_iter().enumerate() {
            let error = result.expect_err(&format!("request {request} took {path:?}"));
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "request {request} with {path:?}");
        }
    }
    assert_eq!(entries(outside.path()), ["secret", "share"]);
    assert_eq!(entries(&outside.path().join("share")), ["directory", "file"]);
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), "outside");
    // What was refused was asked all the same.
    assert_eq!(requests.snapshot().of(Kind::Rename), 14);
}

#[test]
fn a_link_may_lead_anywhere_because_the_guest_follows_it() {
    let Served { outside: _outside, share, .. } = serve();
    let link = share.symlink(context(), &name("../../etc"), ROOT_ID, &name("link"), Extensions::default());
    assert_eq!(share.readlink(context(), link.unwrap().inode).unwrap(), b"../../etc");
}

/// Lists the share as the library's server does, and looks the entries up if `plus`.
fn list(share: &Files, plus: bool) {
    let handle = share.opendir(context(), ROOT_ID, 0).unwrap().0.unwrap();
    let mut entries = share.readdir(context(), ROOT_ID, handle, 4096, 0).unwrap();
    while let Some(entry) = entries.next() {
        if plus && entry.name.to_bytes() == b"file" {
            let inode = share.lookup(context(), ROOT_ID, entry.name).unwrap().inode;
            share.forget(context(), inode, 1);
        }
    }
    drop(entries);
    share.releasedir(context(), ROOT_ID, 0, handle).unwrap();
}

#[test]
fn a_listing_is_one_request_and_known_by_its_lookups() {
    let Served { outside: _outside, share, requests } = serve();
    let before = requests.snapshot();
    list(&share, true);
    list(&share, false);
    list(&share, true);
    share.lookup(context(), ROOT_ID, &name("file")).unwrap();
    let counted = requests.snapshot().since(&before);
    let counts =
        [Kind::Opendir, Kind::Readdirplus, Kind::Readdir, Kind::Releasedir, Kind::Lookup, Kind::Forget];
    assert_eq!(counts.map(|kind| counted.of(kind)), [3, 2, 1, 3, 1, 0]);
    assert_eq!(counted.total(), 10);
}

fn errno<T>(answer: std::io::Result<T>) -> Option<i32> {
    answer.err().and_then(|error| error.raw_os_error())
}

#[test]
fn what_the_guest_knows_takes_room_until_it_forgets() {
    let Served { outside, share, .. } = serve();
    let root = outside.path().join("share");
    let files: Vec<_> = (0..=LIMIT).map(|number| name(&number.to_string())).collect();
    files.iter().for_each(|file| std::fs::write(root.join(file.to_str().unwrap()), "").unwrap());
    let known: Vec<_> = files[..LIMIT as usize]
        .iter()
        .map(|file| share.lookup(context(), ROOT_ID, file).unwrap().inode)
        .collect();
    let more = &files[LIMIT as usize];
    assert_eq!(errno(share.lookup(context(), ROOT_ID, more)), Some(libc::ENFILE));
    assert_eq!(errno(share.opendir(context(), ROOT_ID, 0)), Some(libc::ENFILE));
    let create = |new| {
        share.create(
            context(),
            ROOT_ID,
            &name(new),
            0o644,
            false,
            libc::O_RDWR as u32,
            0,
            Extensions::default(),
        )
    };
    assert_eq!(errno(create("new")), Some(libc::ENFILE));
    let made = share.mkdir(context(), ROOT_ID, &name("made"), 0o755, 0, Extensions::default());
    assert_eq!(errno(made), Some(libc::ENFILE));
    assert!(!root.join("new").exists() && !root.join("made").exists());
    share.batch_forget(context(), known[..2].iter().map(|inode| (*inode, 1)).collect());
    let (entry, handle, _) = create("new").unwrap();
    assert_eq!(errno(share.lookup(context(), ROOT_ID, more)), Some(libc::ENFILE));
    share.release(context(), entry.inode, 0, handle.unwrap(), false, false, None).unwrap();
    share.lookup(context(), ROOT_ID, more).unwrap();
    share.destroy();
    share.init(FsOptions::empty()).unwrap();
    share.lookup(context(), ROOT_ID, more).unwrap();
}

// Root in a box keeps there what an overlay knows; others must not be able to write it by its name on the host.
#[test]
fn trusted_attributes_are_kept_and_listed_and_have_no_other_name() {
    let Served { outside, share, .. } = serve();
    let file = share.lookup(context(), ROOT_ID, &name("file")).unwrap().inode;
    let set = |key: &str, value: &[u8]| {
        share.setxattr(context(), file, &name(key), value, 0, SetxattrFlags::empty())
    };
    set("trusted.overlay.opaque", b"y").unwrap();
    set("user.mine", b"x").unwrap();
    assert_eq!(errno(set("user.a3s-box.trusted.overlay.opaque", b"y")), Some(libc::EPERM));
    let kept = &mut [0; 8];
    let path = outside.path().join("share/file");
    let length = rustix::fs::getxattr(&path, "user.a3s-box.trusted.overlay.opaque", &mut kept[..]).unwrap();
    assert_eq!(kept[..length], *b"y");
    let GetxattrReply::Value(value) =
        share.getxattr(context(), file, &name("trusted.overlay.opaque"), 8).unwrap()
    else {
        panic!("a value was asked for")
    };
    assert_eq!(value, b"y");
    let hidden = share.getxattr(context(), file, &name("user.a3s-box.trusted.overlay.opaque"), 8);
    assert_eq!(errno(hidden.map(drop)), Some(libc::ENODATA));
    let ListxattrReply::Names(names) = share.listxattr(context(), file, 4096).unwrap() else {
        panic!("names were asked for")
    };
    let mut names: Vec<_> = names.split_inclusive(|byte| *byte == 0).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"trusted.overlay.opaque\0"[..], b"user.mine\0"]);
    share.removexattr(context(), file, &name("trusted.overlay.opaque")).unwrap();
    assert!(rustix::fs::getxattr(&path, "user.a3s-box.trusted.overlay.opaque", &mut kept[..]).is_err());
}
