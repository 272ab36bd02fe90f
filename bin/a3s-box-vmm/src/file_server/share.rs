//! The share as a guest may use it: the library's file system, behind what is this project's own to say.
//!
//! Names that are paths are refused, requests are counted, files that the guest knows take room, and `trusted.` attributes
//! lie under names of ours. The guest sees the library's answers otherwise.

use std::cell::Cell;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use a3s_box_vmm::share_requests::{Kind, Requests, is_name};
use virtiofsd::filesystem::{
    Context, DirEntry, DirectoryIterator, Entry, Extensions, FileSystem, FsOptions, GetxattrReply,
    ListxattrReply, OpenOptions, SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader,
    ZeroCopyWriter,
};
use virtiofsd::fuse;

use crate::share::attributes::{self, LONGEST_LIST, List};
use crate::share::room::Room;

/// A file system that serves a guest.
pub(super) struct Share<F> {
    files: F,
    requests: &'static Requests,
    room: Room,
}

impl<F> Share<F> {
    pub(super) fn new(files: F, requests: &'static Requests, room: Room) -> Self {
        Self { files, requests, room }
    }

    fn count(&self, kind: Kind) -> &F {
        // What the library asks while it makes up one listing is part of that request.
        if !Listing::<()>::is_open() {
            self.requests.count(kind);
        }
        &self.files
    }

    /// For requests that name a file.
    fn named(&self, kind: Kind, names: &[&CStr]) -> io::Result<&F> {
        let files = self.count(kind);
        match names.iter().all(|name| is_name(name.to_bytes())) {
            true => Ok(files),
            false => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

impl<F: FileSystem> Share<F> {
    /// A file that the guest is about to be told of, found by this name in a directory.
    fn told(&self, ctx: Context, directory: F::Inode, name: &CStr, entry: Entry) -> io::Result<Entry> {
        let mounted = entry.attr.flags & fuse::ATTR_SUBMOUNT != 0;
        match self.room.learn(entry.inode, directory.into(), name.to_bytes(), mounted) {
            Ok(()) => Ok(entry),
            Err(full) => {
                self.files.forget(ctx, entry.inode.into(), 1);
                Err(full)
            }
        }
    }

    /// How the guest closes the file: without a request that would do nothing, if it is one of those.
    fn closed(&self, inode: u64, flags: u32, options: OpenOptions) -> OpenOptions {
        match self.room.closing_matters(inode, flags) {
            true => options,
            false => options | OpenOptions::NOFLUSH,
        }
    }
}

/// A directory's entries while the library takes them.
///
/// READDIR and READDIRPLUS are one request to a file system; the library looks each entry up for the latter, on the same
/// thread and before it lets go of the entries. So which of the two it was is known, and counted, at the end.
pub(super) struct Listing<I> {
    entries: I,
    requests: &'static Requests,
}

thread_local! {
    /// Whether entries of the open listing were looked up.
    static OPEN: Cell<Option<bool>> = const { Cell::new(None) };
}

impl Listing<()> {
    fn is_open() -> bool {
        let open = OPEN.get().is_some();
        if open {
            OPEN.set(Some(true));
        }
        open
    }
}

impl<I> Listing<I> {
    fn new(entries: I, requests: &'static Requests) -> Self {
        OPEN.set(Some(false));
        Self { entries, requests }
    }
}

impl<I: DirectoryIterator> DirectoryIterator for Listing<I> {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        self.entries.next()
    }
}

impl<I> Drop for Listing<I> {
    fn drop(&mut self) {
        let looked_up = OPEN.take() == Some(true);
        self.requests.count(if looked_up { Kind::Readdirplus } else { Kind::Readdir });
    }
}

#[allow(clippy::too_many_arguments)]
impl<F: FileSystem<Inode: Copy>> FileSystem for Share<F> {
    type Inode = F::Inode;
    type Handle = F::Handle;
    type DirIter = Listing<F::DirIter>;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.count(Kind::Init).init(capable)
    }

    fn destroy(&self) {
        self.count(Kind::Destroy).destroy();
        self.room.clear();
    }

    fn lookup(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<Entry> {
        let entry = self.named(Kind::Lookup, &[name])?.lookup(ctx, parent, name)?;
        self.told(ctx, parent, name, entry)
    }

    fn forget(&self, ctx: Context, inode: Self::Inode, count: u64) {
        self.count(Kind::Forget).forget(ctx, inode, count);
        self.room.forget(inode.into(), count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Self::Inode, u64)>) {
        let forgotten: Vec<(u64, u64)> =
            requests.iter().map(|(inode, count)| ((*inode).into(), *count)).collect();
        self.count(Kind::BatchForget).batch_forget(ctx, requests);
        forgotten.into_iter().for_each(|(inode, count)| self.room.forget(inode, count));
    }

    fn getattr(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Option<Self::Handle>,
    ) -> io::Result<(fuse::Attr, Duration)> {
        self.count(Kind::Getattr).getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Self::Inode,
        attr: fuse::SetattrIn,
        handle: Option<Self::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(fuse::Attr, Duration)> {
        self.count(Kind::Setattr).setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: Context, inode: Self::Inode) -> io::Result<Vec<u8>> {
        self.count(Kind::Readlink).readlink(ctx, inode)
    }

    /// What the link says is the guest's business: links are resolved there.
    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: Self::Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let files = self.named(Kind::Symlink, &[name])?;
        self.room.check(1)?;
        let entry = files.symlink(ctx, linkname, parent, name, extensions)?;
        self.told(ctx, parent, name, entry)
    }

    fn mknod(
        &self,
        ctx: Context,
        inode: Self::Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let files = self.named(Kind::Mknod, &[name])?;
        self.room.check(1)?;
        self.told(ctx, inode, name, files.mknod(ctx, inode, name, mode, rdev, umask, extensions)?)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Self::Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let files = self.named(Kind::Mkdir, &[name])?;
        self.room.check(1)?;
        let entry = files.mkdir(ctx, parent, name, mode, umask, extensions)?;
        self.told(ctx, parent, name, entry)
    }

    fn unlink(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()> {
        self.named(Kind::Unlink, &[name])?.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()> {
        self.named(Kind::Rmdir, &[name])?.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: Context,
        olddir: Self::Inode,
        oldname: &CStr,
        newdir: Self::Inode,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.named(Kind::Rename, &[oldname, newname])?.rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(
        &self,
        ctx: Context,
        inode: Self::Inode,
        newparent: Self::Inode,
        newname: &CStr,
    ) -> io::Result<Entry> {
        let entry = self.named(Kind::Link, &[newname])?.link(ctx, inode, newparent, newname)?;
        self.told(ctx, newparent, newname, entry)
    }

    fn open(
        &self,
        ctx: Context,
        inode: Self::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        let files = self.count(Kind::Open);
        let open = || files.open(ctx, inode, kill_priv, flags);
        let (handle, options) = self.room.opened(open, |(handle, _)| handle.is_some())?;
        Ok((handle, self.closed(inode.into(), flags, options)))
    }

    fn create(
        &self,
        ctx: Context,
        parent: Self::Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)> {
        let files = self.named(Kind::Create, &[name])?;
        self.room.check(2)?;
        let create = || files.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions);
        let (entry, handle, options) = self.room.opened(create, |(_, handle, _)| handle.is_some())?;
        let inode = entry.inode;
        match self.told(ctx, parent, name, entry) {
            Ok(entry) => Ok((entry, handle, self.closed(inode, flags, options))),
            Err(full) => {
                if let Some(handle) = handle {
                    self.room.close();
                    let _ = files.release(ctx, inode.into(), flags, handle, false, false, None);
                }
                Err(full)
            }
        }
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.count(Kind::Read).read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let files = self.count(Kind::Write);
        files.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)
    }

    fn flush(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        lock_owner: u64,
    ) -> io::Result<()> {
        self.count(Kind::Flush).flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(
        &self,
        ctx: Context,
        inode: Self::Inode,
        datasync: bool,
        handle: Self::Handle,
    ) -> io::Result<()> {
        self.count(Kind::Fsync).fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.count(Kind::Fallocate).fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: Self::Inode,
        flags: u32,
        handle: Self::Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let files = self.count(Kind::Release);
        files.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)?;
        self.room.close();
        Ok(())
    }

    fn statfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<libc::statvfs64> {
        self.count(Kind::Statfs).statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: Self::Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        let files = self.count(Kind::Setxattr);
        files.setxattr(ctx, inode, &attributes::on_host(name, libc::EPERM)?, value, flags, extra_flags)
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: Self::Inode,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let files = self.count(Kind::Getxattr);
        files.getxattr(ctx, inode, &attributes::on_host(name, libc::ENODATA)?, size)
    }

    fn listxattr(&self, ctx: Context, inode: Self::Inode, size: u32) -> io::Result<ListxattrReply> {
        match self.count(Kind::Listxattr).listxattr(ctx, inode, LONGEST_LIST)? {
            ListxattrReply::Names(host) => Ok(match attributes::list(&host, size)? {
                List::Names(names) => ListxattrReply::Names(names),
                List::Length(length) => ListxattrReply::Count(length),
            }),
            length => Ok(length),
        }
    }

    fn removexattr(&self, ctx: Context, inode: Self::Inode, name: &CStr) -> io::Result<()> {
        let files = self.count(Kind::Removexattr);
        files.removexattr(ctx, inode, &attributes::on_host(name, libc::EPERM)?)
    }

    fn opendir(
        &self,
        ctx: Context,
        inode: Self::Inode,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        let files = self.count(Kind::Opendir);
        self.room.opened(|| files.opendir(ctx, inode, flags), |(handle, _)| handle.is_some())
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        match self.files.readdir(ctx, inode, handle, size, offset) {
            Ok(entries) => Ok(Listing::new(entries, self.requests)),
            Err(error) => {
                self.requests.count(Kind::Readdir);
                Err(error)
            }
        }
    }

    fn fsyncdir(
        &self,
        ctx: Context,
        inode: Self::Inode,
        datasync: bool,
        handle: Self::Handle,
    ) -> io::Result<()> {
        self.count(Kind::Fsyncdir).fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(
        &self,
        ctx: Context,
        inode: Self::Inode,
        flags: u32,
        handle: Self::Handle,
    ) -> io::Result<()> {
        self.count(Kind::Releasedir).releasedir(ctx, inode, flags, handle)?;
        self.room.close();
        Ok(())
    }

    fn access(&self, ctx: Context, inode: Self::Inode, mask: u32) -> io::Result<()> {
        self.count(Kind::Access).access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.count(Kind::Lseek).lseek(ctx, inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: Self::Inode,
        handle_in: Self::Handle,
        offset_in: u64,
        inode_out: Self::Inode,
        handle_out: Self::Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let files = self.count(Kind::CopyFileRange);
        files
            .copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<()> {
        self.count(Kind::Syncfs).syncfs(ctx, inode)
    }

    fn getlk(&self) -> io::Result<()> {
        self.count(Kind::Getlk).getlk()
    }

    fn setlk(&self) -> io::Result<()> {
        self.count(Kind::Setlk).setlk()
    }

    fn setlkw(&self) -> io::Result<()> {
        self.count(Kind::Setlkw).setlkw()
    }

    fn ioctl(&self) -> io::Result<()> {
        self.count(Kind::Ioctl).ioctl()
    }

    fn bmap(&self) -> io::Result<()> {
        self.count(Kind::Bmap).bmap()
    }

    fn poll(&self) -> io::Result<()> {
        self.count(Kind::Poll).poll()
    }

    fn notify_reply(&self) -> io::Result<()> {
        self.count(Kind::NotifyReply).notify_reply()
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)> {
        self.count(Kind::Tmpfile).tmpfile()
    }
}

impl<F: FileSystem<Inode: Copy> + SerializableFileSystem> SerializableFileSystem for Share<F> {
    fn prepare_serialization(&self, cancel: Arc<AtomicBool>) {
        self.files.prepare_serialization(cancel);
    }

    fn serialize(&self, state_pipe: File) -> io::Result<()> {
        self.files.serialize(state_pipe)
    }

    fn deserialize_and_apply(&self, state_pipe: File) -> io::Result<()> {
        self.files.deserialize_and_apply(state_pipe)
    }
}
