//! What programs do with many small files.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// As long as a source file is.
const LENGTH: usize = 4096;
const IN_DIRECTORY: u64 = 100;

/// Does one thing with so many files below a directory; prints the microseconds that it took.
///
/// ```text
/// make    creates them, a hundred in a directory
/// walk    lists every directory and looks at every entry, as `git status` does
/// read    opens, reads and closes each
/// remove  removes them and their directories
/// ```
pub(crate) fn run(work: &str, below: &str, count: u64) -> io::Result<()> {
    let below = Path::new(below);
    let started = Instant::now();
    match work {
        "make" => make(below, count)?,
        "walk" => expect(walk(below)?, count)?,
        "read" => read(below, count)?,
        "remove" => fs::remove_dir_all(below)?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{work:?} is nothing to do"))),
    }
    println!("{}", started.elapsed().as_micros());
    Ok(())
}

fn path(below: &Path, index: u64) -> PathBuf {
    below.join(format!("d{}", index / IN_DIRECTORY)).join(format!("f{}", index % IN_DIRECTORY))
}

fn make(below: &Path, count: u64) -> io::Result<()> {
    for index in 0..count {
        let path = path(below, index);
        if index % IN_DIRECTORY == 0 {
            fs::create_dir_all(path.parent().unwrap_or(below))?;
        }
        File::create_new(path)?.write_all(&[b'x'; LENGTH])?;
    }
    Ok(())
}

/// How many files there are.
fn walk(below: &Path) -> io::Result<u64> {
    let mut files = 0;
    for entry in fs::read_dir(below)? {
        let path = entry?.path();
        if fs::symlink_metadata(&path)?.is_dir() {
            files += walk(&path)?;
        } else {
            files += 1;
        }
    }
    Ok(files)
}

fn read(below: &Path, count: u64) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(LENGTH + 1);
    for index in 0..count {
        buffer.clear();
        File::open(path(below, index))?.read_to_end(&mut buffer)?;
        expect(buffer.len() as u64, LENGTH as u64)?;
    }
    Ok(())
}

fn expect(found: u64, expected: u64) -> io::Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(io::Error::other(format!("{found} instead of {expected}")))
}
