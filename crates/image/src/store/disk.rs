//! The calls that make bytes and names last. Everything that the store promises after a crash hangs on their order, so
//! tests stand in here and cut the power between them.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::path::Path;

use tempfile::NamedTempFile;

/// The disk, as far as what is on it must be there after a crash.
pub(crate) trait Disk: Debug + Send + Sync + 'static {
    /// Returns once the bytes of a file last.
    fn sync_file(&self, file: &File) -> io::Result<()>;

    /// Gives a file a name, in place of what had it. It lasts once the directory is synced.
    fn rename(&self, file: NamedTempFile, to: &Path) -> io::Result<()>;

    /// Returns once the names in a directory last.
    fn sync_directory(&self, directory: &Path) -> io::Result<()>;
}

/// The disk of this machine.
#[derive(Debug)]
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn sync_file(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, file: NamedTempFile, to: &Path) -> io::Result<()> {
        file.persist(to).map(drop).map_err(|error| error.error)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        File::open(directory)?.sync_all()
    }
}
