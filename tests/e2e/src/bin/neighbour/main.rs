//! A container that shares a volume with another one: what processes of one kernel can do to each other through files.
//!
//! ```text
//! neighbour hold DIR    listens on DIR/socket, holds locks on DIR/flock and DIR/fcntl, counts in a shared map of DIR/map;
//!                       says "holding" and stays
//! neighbour try DIR     does what the other one answers to, and says what came of each, a line for each
//! neighbour watch DIR   says "watching", and then the name of the first file that is closed after writing
//! ```
//!
//! It is linked with the C library of the machine that builds it, which its image has to hold.

mod map;

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use map::Counter;

const GREETING: &[u8] = b"hello";
/// Longer than any file server may answer from memory: what moves by then moves by itself.
const PAUSE: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["hold", directory] => hold(Path::new(directory)),
        ["try", directory] => try_all(Path::new(directory)),
        ["watch", directory] => watch(Path::new(directory)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "see the head of its source for what it does")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("neighbour {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).read(true).write(true).open(path)
}

fn hold(directory: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(directory.join("socket"))?;
    let flock = open(&directory.join("flock"))?;
    flock.lock()?;
    let record = open(&directory.join("fcntl"))?;
    fcntl_lock(&record, FlockOperation::NonBlockingLockExclusive)?;
    let counter = Counter::map(&open(&directory.join("map"))?)?;
    std::thread::spawn(move || {
        loop {
            counter.add_one();
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    println!("holding");
    for client in listener.incoming() {
        client?.write_all(GREETING)?;
    }
    Ok(())
}

fn try_all(directory: &Path) -> io::Result<()> {
    let mut answer = Vec::new();
    let said = UnixStream::connect(directory.join("socket")).and_then(|mut it| it.read_to_end(&mut answer));
    match said {
        Ok(_) => println!("socket {}", String::from_utf8_lossy(&answer)),
        Err(error) => println!("socket {error}"),
    }
    match open(&directory.join("flock"))?.try_lock() {
        Err(TryLockError::WouldBlock) => println!("flock held"),
        Err(TryLockError::Error(error)) => return Err(error),
        Ok(()) => println!("flock granted to both"),
    }
    match fcntl_lock(open(&directory.join("fcntl"))?, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::AGAIN | Errno::ACCESS) => println!("fcntl held"),
        Err(error) => return Err(error.into()),
        Ok(()) => println!("fcntl granted to both"),
    }
    let file = open(&directory.join("map"))?;
    let counter = Counter::map(&file)?;
    let before = counter.get();
    std::thread::sleep(PAUSE);
    println!("map {}", if counter.get() > before { "counts" } else { "stands still" });
    Ok(())
}

fn watch(directory: &Path) -> io::Result<()> {
    let watcher = inotify::init(CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watcher, directory, WatchFlags::CLOSE_WRITE)?;
    println!("watching");
    let mut room = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watcher, &mut room);
    let event = events.next()?;
    debug_assert!(event.events().contains(ReadFlags::CLOSE_WRITE));
    println!("event {}", event.file_name().map_or("".into(), |name| name.to_string_lossy().into_owned()));
    Ok(())
}
