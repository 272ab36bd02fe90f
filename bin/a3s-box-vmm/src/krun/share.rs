//! The share: libkrun's file server behind a layer of our own.
//!
//! Every request of the guest passes here first. The layer counts it, refuses names that no Linux client sends (the
//! server below hands them to the host's kernel as they are, and `..` or `/` would lead out of the share), hides the
//! program that the server would show in every directory as `init.krun`, and answers no request that acts on
//! the machine instead of on a file. Files that the guest knows take room, and `trusted.` attributes lie under names of ours:
//! the server knows nothing of either.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::time::Duration;

use a3s_box_vmm::share_requests::{Kind, Requests, is_name};
use msb_krun_devices::virtio::bindings::{stat64, statvfs64};
use msb_krun_devices::virtio::fs::filesystem::{
    Context, DirEntry, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    RemovemappingOne, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use msb_krun_devices::virtio::fs::passthrough::{Config, PassthroughFs};
use msb_krun_devices::virtio::fs::{AddDirEntry, AddDirEntryPlus, DynFileSystem};

use crate::share::CACHED;
use crate::share::attributes::{self, LONGEST_LIST, List};
use crate::share::room::Room;

/// The name that the server answers with a program of its own, in every directory.
const HIDDEN: &CStr = c"init.krun";
/// The same file of the host by a name that the server does not know.
const HIDDEN_BY_PATH: &CStr = c"./init.krun";
/// The server's number of that program. No file of the host ever gets it.
const HIDDEN_INODE: u64 = 2;

/// `FOPEN_NOFLUSH` of linux/fuse.h.
const FOPEN_NOFLUSH: u32 = 1 << 5;
/// `FUSE_ATTR_SUBMOUNT` of linux/fuse.h.
const ATTR_SUBMOUNT: u32 = 1;

/// A directory of the host as the guest sees it.
pub(crate) struct Share {
    server: PassthroughFs,
    requests: &'static Requests,
    room: Room,
}

impl Share {
    /// Serves `directory`, which is opened when the guest mounts the share.
    pub(crate) fn new(directory: &str, requests: &'static Requests, room: Room) -> io::Result<Self> {
        let config = Config {
            root_dir: directory.to_owned(),
            entry_timeout: CACHED,
            attr_timeout: CACHED,
            ..Config::default()
        };
        Ok(Self { server: PassthroughFs::new(config)?, requests, room })
    }

    /// A file that the guest is about to be told of, found by this name in a directory.
    fn told(&self, context: Context, directory: u64, name: &[u8], entry: Entry) -> io::Result<Entry> {
        let mounted = entry.attr_flags & ATTR_SUBMOUNT != 0;
        match self.room.learn(entry.inode, directory, name, mounted) {
            Ok(()) => Ok(entry),
            Err(full) => {
                FileSystem::forget(&self.server, context, entry.inode, 1);
                Err(full)
            }
        }
    }

    /// How the guest closes the file: without a request that would do nothing, if it is one of those.
    #[allow(unsafe_code)]
    fn closed(&self, inode: u64, flags: u32, options: OpenOptions) -> OpenOptions {
        if self.room.closing_matters(inode, flags) {
            return options;
        }
        // SAFETY: the type is a number to whoever made it, and the server passes it on as such; it lacks a name for this bit.
        unsafe { OpenOptions::from_bits_unchecked(options.bits() | FOPEN_NOFLUSH) }
    }
}

fn errno<T>(number: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(number))
}

/// A name as a Linux client sends it: one component that is no step.
fn name(name: &CStr) -> io::Result<()> {
    if is_name(name.to_bytes()) { Ok(()) } else { errno(libc::EINVAL) }
}

/// Requests that the server answers as they are, once the names among the arguments are found to be names.
macro_rules! served {
    ($($asked:ident: $method:ident($($argument:ident: $type:ty),*) $([$($named:ident),+])? -> $answer:ty;)*) => {
        $(
            fn $method(&self, context: Context, $($argument: $type),*) -> io::Result<$answer> {
                self.requests.count(Kind::$asked);
                $($(name($named)?;)+)?
                FileSystem::$method(&self.server, context, $($argument),*)
            }
        )*
    };
}

/// Requests that nobody serves.
macro_rules! not_served {
    ($($asked:ident: $method:ident;)*) => {
        $(
            fn $method(&self) -> io::Result<()> {
                self.requests.count(Kind::$asked);
                errno(libc::ENOSYS)
            }
        )*
    };
}

impl DynFileSystem for Share {
    /// Asked before each request but those without an answer.
    fn request_error(&self, inode: u64) -> Option<i32> {
        (inode == HIDDEN_INODE).then_some(libc::EBADF)
    }

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.requests.count(Kind::Init);
        FileSystem::init(&self.server, capable)
    }

    fn destroy(&self) {
        self.requests.count(Kind::Destroy);
        FileSystem::destroy(&self.server);
        self.room.clear();
    }

    fn lookup(&self, context: Context, parent: u64, wanted: &CStr) -> io::Result<Entry> {
        self.requests.count(Kind::Lookup);
        name(wanted)?;
        let wanted = if wanted == HIDDEN { HIDDEN_BY_PATH } else { wanted };
        let entry = FileSystem::lookup(&self.server, context, parent, wanted)?;
        self.told(context, parent, wanted.to_bytes(), entry)
    }

    fn forget(&self, context: Context, inode: u64, count: u64) {
        self.requests.count(Kind::Forget);
        FileSystem::forget(&self.server, context, inode, count);
        self.room.forget(inode, count);
    }

    fn batch_forget(&self, context: Context, inodes: Vec<(u64, u64)>) {
        self.requests.count(Kind::BatchForget);
        inodes.iter().for_each(|(inode, count)| self.room.forget(*inode, *count));
        FileSystem::batch_forget(&self.server, context, inodes);
    }

    fn symlink(
        &self,
        context: Context,
        target: &CStr,
        parent: u64,
        new: &CStr,
        more: Extensions,
    ) -> io::Result<Entry> {
        self.requests.count(Kind::Symlink);
        name(new)?;
        self.room.check(1)?;
        let entry = FileSystem::symlink(&self.server, context, target, parent, new, more)?;
        self.told(context, parent, new.to_bytes(), entry)
    }

    fn mknod(
        &self,
        context: Context,
        parent: u64,
        new: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
        more: Extensions,
    ) -> io::Result<Entry> {
        self.requests.count(Kind::Mknod);
        name(new)?;
        self.room.check(1)?;
        let entry = FileSystem::mknod(&self.server, context, parent, new, mode, device, umask, more)?;
        self.told(context, parent, new.to_bytes(), entry)
    }

    fn mkdir(
        &self,
        context: Context,
        parent: u64,
        new: &CStr,
        mode: u32,
        umask: u32,
        more: Extensions,
    ) -> io::Result<Entry> {
        self.requests.count(Kind::Mkdir);
        name(new)?;
        self.room.check(1)?;
        let entry = FileSystem::mkdir(&self.server, context, parent, new, mode, umask, more)?;
        self.told(context, parent, new.to_bytes(), entry)
    }

    fn link(&self, context: Context, inode: u64, parent: u64, new: &CStr) -> io::Result<Entry> {
        self.requests.count(Kind::Link);
        name(new)?;
        let entry = FileSystem::link(&self.server, context, inode, parent, new)?;
        self.told(context, parent, new.to_bytes(), entry)
    }

    fn open(
        &self,
        context: Context,
        inode: u64,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.requests.count(Kind::Open);
        let open = || FileSystem::open(&self.server, context, inode, kill_privileges, flags);
        let (handle, options) = self.room.opened(open, |(handle, _)| handle.is_some())?;
        Ok((handle, self.closed(inode, flags, options)))
    }

    fn opendir(&self, context: Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.requests.count(Kind::Opendir);
        let open = || FileSystem::opendir(&self.server, context, inode, flags);
        self.room.opened(open, |(handle, _)| handle.is_some())
    }

    fn create(
        &self,
        context: Context,
        parent: u64,
        new: &CStr,
        mode: u32,
        kill_privileges: bool,
        flags: u32,
        umask: u32,
        more: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        self.requests.count(Kind::Create);
        name(new)?;
        self.room.check(2)?;
        let create = || {
            FileSystem::create(&self.server, context, parent, new, mode, kill_privileges, flags, umask, more)
        };
        let (entry, handle, options) = self.room.opened(create, |(_, handle, _)| handle.is_some())?;
        let inode = entry.inode;
        match self.told(context, parent, new.to_bytes(), entry) {
            Ok(entry) => Ok((entry, handle, self.closed(inode, flags, options))),
            Err(full) => {
                if let Some(handle) = handle {
                    self.room.close();
                    let _ =
                        FileSystem::release(&self.server, context, inode, flags, handle, false, false, None);
                }
                Err(full)
            }
        }
    }

    fn release(
        &self,
        context: Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        unlock: bool,
        owner: Option<u64>,
    ) -> io::Result<()> {
        self.requests.count(Kind::Release);
        FileSystem::release(&self.server, context, inode, flags, handle, flush, unlock, owner)?;
        self.room.close();
        Ok(())
    }

    fn releasedir(&self, context: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.requests.count(Kind::Releasedir);
        FileSystem::releasedir(&self.server, context, inode, flags, handle)?;
        self.room.close();
        Ok(())
    }

    fn setxattr(&self, context: Context, inode: u64, key: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.requests.count(Kind::Setxattr);
        let key = attributes::on_host(key, libc::EPERM)?;
        FileSystem::setxattr(&self.server, context, inode, &key, value, flags)
    }

    fn getxattr(&self, context: Context, inode: u64, key: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.requests.count(Kind::Getxattr);
        let key = attributes::on_host(key, libc::ENODATA)?;
        FileSystem::getxattr(&self.server, context, inode, &key, size)
    }

    fn listxattr(&self, context: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.requests.count(Kind::Listxattr);
        match FileSystem::listxattr(&self.server, context, inode, LONGEST_LIST)? {
            ListxattrReply::Names(host) => Ok(match attributes::list(&host, size)? {
                List::Names(names) => ListxattrReply::Names(names),
                List::Length(length) => ListxattrReply::Count(length),
            }),
            length => Ok(length),
        }
    }

    fn removexattr(&self, context: Context, inode: u64, key: &CStr) -> io::Result<()> {
        self.requests.count(Kind::Removexattr);
        let key = attributes::on_host(key, libc::EPERM)?;
        FileSystem::removexattr(&self.server, context, inode, &key)
    }

    fn read(
        &self,
        context: Context,
        inode: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.requests.count(Kind::Read);
        FileSystem::read(&self.server, context, inode, handle, To(to), size, offset, owner, flags)
    }

    fn write(
        &self,
        context: Context,
        inode: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        delayed: bool,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<usize> {
        self.requests.count(Kind::Write);
        let from = From(from);
        FileSystem::write(
            &self.server,
            context,
            inode,
            handle,
            from,
            size,
            offset,
            owner,
            delayed,
            kill_privileges,
            flags,
        )
    }

    fn readdir_for_each(
        &self,
        context: Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut AddDirEntry<'_>,
    ) -> io::Result<()> {
        self.requests.count(Kind::Readdir);
        let add = |entry: DirEntry<'_>| add(entry);
        FileSystem::readdir(&self.server, context, inode, handle, size, offset, add)
    }

    fn readdirplus_for_each(
        &self,
        context: Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut AddDirEntryPlus<'_>,
    ) -> io::Result<()> {
        self.requests.count(Kind::Readdirplus);
        let add = |entry: DirEntry<'_>, found: Entry| {
            let known = found.inode;
            let added = self.told(context, inode, entry.name, found).and_then(|found| add(entry, found));
            // The server has looked it up and leaves it at that.
            if matches!(added, Ok(0)) {
                FileSystem::forget(&self.server, context, known, 1);
                self.room.forget(known, 1);
            }
            added
        };
        FileSystem::readdirplus(&self.server, context, inode, handle, size, offset, add)
    }

    fn statfs(&self, context: Context, inode: u64) -> io::Result<statvfs64> {
        self.requests.count(Kind::Statfs);
        FileSystem::statfs(&self.server, context, inode)
    }

    /// The server knows only requests that set the machine's exit code, export descriptors or empty the share. As an
    /// answer, overlayfs takes no other errno for "has none" when it asks for a file's attributes.
    fn ioctl(
        &self,
        _: Context,
        _inode: u64,
        _handle: u64,
        _flags: u32,
        _request: u32,
        _argument: u64,
        _in_size: u32,
        _out_size: u32,
        _exit_code: &Arc<AtomicI32>,
    ) -> io::Result<Vec<u8>> {
        self.requests.count(Kind::Ioctl);
        errno(libc::ENOTTY)
    }

    /// There is no window of memory to map files into. The server would not check where in it a mapping lies.
    fn setupmapping(
        &self,
        _: Context,
        _inode: u64,
        _handle: u64,
        _file_offset: u64,
        _length: u64,
        _flags: u64,
        _window_offset: u64,
        _window: u64,
        _window_size: u64,
    ) -> io::Result<()> {
        self.requests.count(Kind::SetupMapping);
        errno(libc::ENOSYS)
    }

    fn removemapping(
        &self,
        _: Context,
        _: Vec<RemovemappingOne>,
        _window: u64,
        _size: u64,
    ) -> io::Result<()> {
        self.requests.count(Kind::RemoveMapping);
        errno(libc::ENOSYS)
    }

    served! {
        Getattr: getattr(inode: u64, handle: Option<u64>) -> (stat64, Duration);
        Setattr: setattr(inode: u64, to: stat64, handle: Option<u64>, valid: SetattrValid) -> (stat64, Duration);
        Readlink: readlink(inode: u64) -> Vec<u8>;
        Unlink: unlink(parent: u64, old: &CStr) [old] -> ();
        Rmdir: rmdir(parent: u64, old: &CStr) [old] -> ();
        Rename: rename(from: u64, old: &CStr, to: u64, new: &CStr, flags: u32) [old, new] -> ();
        Flush: flush(inode: u64, handle: u64, owner: u64) -> ();
        Fsync: fsync(inode: u64, only_data: bool, handle: u64) -> ();
        Fallocate: fallocate(inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> ();
        Fsyncdir: fsyncdir(inode: u64, only_data: bool, handle: u64) -> ();
        Access: access(inode: u64, mask: u32) -> ();
        Lseek: lseek(inode: u64, handle: u64, offset: u64, whence: u32) -> u64;
        CopyFileRange: copyfilerange(
            from: u64,
            from_handle: u64,
            from_offset: u64,
            to: u64,
            to_handle: u64,
            to_offset: u64,
            length: u64,
            flags: u64
        ) -> usize;
    }

    not_served! {
        Getlk: getlk;
        Setlk: setlk;
        Setlkw: setlkw;
        Bmap: bmap;
        Poll: poll;
        NotifyReply: notify_reply;
    }
}

/// The server wants one object that copies from files and takes bytes. It gives bytes only of the program that is
/// hidden here.
struct To<'a>(&'a mut dyn ZeroCopyWriter);

impl ZeroCopyWriter for To<'_> {
    fn write_from(&mut self, file: &File, count: usize, offset: u64) -> io::Result<usize> {
        self.0.write_from(file, count, offset)
    }
}

impl io::Write for To<'_> {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        errno(libc::EIO)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The same for what the guest writes. The server asks for no bytes, only for copies into files.
struct From<'a>(&'a mut dyn ZeroCopyReader);

impl ZeroCopyReader for From<'_> {
    fn read_to(&mut self, file: &File, count: usize, offset: u64) -> io::Result<usize> {
        self.0.read_to(file, count, offset)
    }
}

impl io::Read for From<'_> {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        errno(libc::EIO)
    }
}

#[cfg(test)]
mod tests {
    use a3s_box_vmm::share_requests::Kind;

    use super::*;

    const ROOT: u64 = 1;

    fn share(directory: &std::path::Path) -> Share {
        let requests = Box::leak(Box::new(Requests::new()));
        let room = Room::new(1000, None);
        let share = Share::new(directory.to_str().unwrap(), requests, room).unwrap();
        share.init(FsOptions::empty()).unwrap();
        share
    }

    fn root() -> Context {
        Context { uid: 0, gid: 0, pid: 1 }
    }

    fn refusal<T>(answer: io::Result<T>) -> Option<i32> {
        answer.err().and_then(|error| error.raw_os_error())
    }

    // libkrun shows a program of its own under this name, in every directory.
    #[test]
    fn init_krun_is_what_the_host_has_by_that_name_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let share = share(dir.path());
        assert_eq!(refusal(share.lookup(root(), ROOT, HIDDEN)), Some(libc::ENOENT));
        assert_eq!(share.request_error(HIDDEN_INODE), Some(libc::EBADF));
        std::fs::write(dir.path().join("init.krun"), b"mine").unwrap();
        let found = share.lookup(root(), ROOT, HIDDEN).unwrap();
        assert_eq!((found.entry_timeout, found.attr_timeout), (CACHED, CACHED));
        assert_eq!(found.attr.st_size, 4);
        assert_ne!(found.inode, HIDDEN_INODE);
        assert_eq!(share.request_error(found.inode), None);
    }

    // The server opens such names as they are: a guest's kernel could have left the share.
    #[test]
    fn a_name_that_leads_out_of_its_directory_is_refused_by_every_request() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("file"), b"").unwrap();
        std::fs::write(dir.path().join("outside"), b"").unwrap();
        let share = share(&inside);
        let file = share.lookup(root(), ROOT, c"file").unwrap().inode;
        for out in [c"..", c"../outside", c"/", c"./file", c""] {
            let more = Extensions::default;
            let refused = [
                refusal(share.lookup(root(), ROOT, out)),
                refusal(share.symlink(root(), c"target", ROOT, out, more())),
                refusal(share.mknod(root(), ROOT, out, libc::S_IFREG, 0, 0, more())),
                refusal(share.mkdir(root(), ROOT, out, 0o755, 0, more())),
                refusal(share.unlink(root(), ROOT, out)),
                refusal(share.rmdir(root(), ROOT, out)),
                refusal(share.rename(root(), ROOT, c"file", ROOT, out, 0)),
                refusal(share.rename(root(), ROOT, out, ROOT, c"new", 0)),
                refusal(share.link(root(), file, ROOT, out)),
                refusal(share.create(root(), ROOT, out, 0o644, false, 0, 0, more())),
            ];
            assert_eq!(refused, [Some(libc::EINVAL); 10], "{out:?}");
        }
        assert_eq!(std::fs::read_dir(&inside).unwrap().count(), 1);
        assert!(dir.path().join("outside").exists());
        // What a link says is only text.
        share.symlink(root(), c"../outside", ROOT, c"link", Extensions::default()).unwrap();
    }

    // The server would let a guest choose the exit code of its machine.
    #[test]
    fn requests_about_the_machine_are_not_served() {
        const EXIT_CODE: u32 = 0x7602;
        let dir = tempfile::tempdir().unwrap();
        let share = share(dir.path());
        let exit_code = Arc::new(AtomicI32::new(7));
        let answer = share.ioctl(root(), ROOT, 0, 0, EXIT_CODE, 1, 0, 0, &exit_code);
        assert_eq!(refusal(answer), Some(libc::ENOTTY));
        assert_eq!(exit_code.load(std::sync::atomic::Ordering::SeqCst), 7);
        assert_eq!(
            refusal(share.setupmapping(root(), ROOT, 0, 0, 4096, 0, u64::MAX, 0, 4096)),
            Some(libc::ENOSYS)
        );
        assert_eq!(refusal(share.removemapping(root(), Vec::new(), 0, 0)), Some(libc::ENOSYS));
    }

    #[test]
    fn every_request_is_counted_by_its_kind_also_when_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let share = share(dir.path());
        let _ = share.lookup(root(), ROOT, c"..");
        let _ = share.lookup(root(), ROOT, c"absent");
        share.getattr(root(), ROOT, None).unwrap();
        let _ = share.poll();
        let counted = share.requests.snapshot();
        let kinds = [Kind::Init, Kind::Lookup, Kind::Getattr, Kind::Poll].map(|kind| counted.of(kind));
        assert_eq!((kinds, counted.total()), ([1, 2, 1, 1], 5));
    }

    // The server looks the entry up that does not fit any more, and leaves it so.
    #[test]
    fn a_listing_takes_room_for_what_the_guest_was_told_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        (0..10).for_each(|number| std::fs::write(dir.path().join(number.to_string()), b"").unwrap());
        let requests = Box::leak(Box::new(Requests::new()));
        let room = Room::new(6, None);
        let share = Share::new(dir.path().to_str().unwrap(), requests, room).unwrap();
        share.init(FsOptions::empty()).unwrap();
        let handle = share.opendir(root(), ROOT, 0).unwrap().0.unwrap();
        for _ in 0..20 {
            let mut told = Vec::new();
            let mut add = |_: DirEntry<'_>, found: Entry| {
                if told.len() == 3 {
                    return Ok(0);
                }
                told.push((found.inode, 1));
                Ok(1)
            };
            share.readdirplus_for_each(root(), ROOT, handle, 4096, 0, &mut add).unwrap();
            share.batch_forget(root(), told);
        }
        share.releasedir(root(), ROOT, 0, handle).unwrap();
        for number in 0..6 {
            let name = std::ffi::CString::new(number.to_string()).unwrap();
            share.lookup(root(), ROOT, &name).unwrap();
        }
        assert_eq!(refusal(share.lookup(root(), ROOT, c"6")), Some(libc::ENFILE));
        assert_eq!(refusal(share.open(root(), ROOT, false, 0)), Some(libc::ENFILE));
    }

    #[test]
    fn trusted_attributes_are_kept_under_a_name_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), b"").unwrap();
        let share = share(dir.path());
        let file = share.lookup(root(), ROOT, c"file").unwrap().inode;
        share.setxattr(root(), file, c"trusted.overlay.opaque", b"y", 0).unwrap();
        let ours = c"user.a3s-box.trusted.overlay.opaque";
        assert_eq!(refusal(share.setxattr(root(), file, ours, b"y", 0)), Some(libc::EPERM));
        assert_eq!(refusal(share.getxattr(root(), file, ours, 8)), Some(libc::ENODATA));
        let value = share.getxattr(root(), file, c"trusted.overlay.opaque", 8).unwrap();
        assert!(matches!(value, GetxattrReply::Value(value) if value == b"y"));
        let names = share.listxattr(root(), file, 100).unwrap();
        assert!(matches!(names, ListxattrReply::Names(names) if names == b"trusted.overlay.opaque\0"));
        assert!(rustix::fs::getxattr(dir.path().join("file"), ours, &mut [0_u8; 8][..]).is_ok());
        share.removexattr(root(), file, c"trusted.overlay.opaque").unwrap();
        assert!(rustix::fs::getxattr(dir.path().join("file"), ours, &mut [0_u8; 8][..]).is_err());
    }
}
