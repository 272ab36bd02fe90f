//! The files of a log. kubelet rotates it: the file gets another name (`0.log.20260102-150405`), the daemon begins a new
//! one under the old name, and what was rotated is compressed later (`….gz`).

use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use flate2::read::MultiGzDecoder;
use jiff::Timestamp;

use super::line::Printer;

/// How often a log is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Lines of the log are far shorter.
const MAX_LINE: u64 = 1 << 20;
/// Read at once from the end.
const BLOCK: u64 = 64 * 1024;

/// A container's log.
pub(super) struct Log {
    pub(super) path: PathBuf,
    /// Rotated files are read if they have something that is not older.
    pub(super) since: Option<Timestamp>,
    /// Lines of the current file.
    pub(super) tail: Option<usize>,
    /// Once nothing more comes, or if what is there now is enough.
    pub(super) ended: Arc<AtomicBool>,
}

impl Log {
    /// Prints until the end.
    pub(super) fn print(&self, printer: &mut Printer<impl Write, impl Write>) -> io::Result<()> {
        let Some(file) = self.open()? else { return Ok(()) };
        let mut current = Current::new(file)?;
        match (self.tail, self.since) {
            (Some(lines), _) => current.skip_to_last(lines)?,
            (None, Some(since)) => {
                for rotated in self.rotated(&current.metadata)? {
                    if rotated.changed >= SystemTime::from(since) {
                        rotated.print(printer)?;
                    }
                }
            }
            (None, None) => {}
        }
        loop {
            // Asked before reading: what was written before the end is read.
            let ended = self.ended.load(Ordering::SeqCst);
            current.print(printer)?;
            printer.flush()?;
            if let Some(next) = self.successor(&current)? {
                // The daemon has changed over: the old file is complete.
                current.print(printer)?;
                // Several rotations since the last look leave files in between.
                let rotated = self.rotated(&next.metadata)?;
                let before = rotated.iter().position(|rotated| rotated.inode == current.metadata.ino());
                for between in before.map_or(&[][..], |before| &rotated[before + 1..]) {
                    between.print(printer)?;
                }
                current = next;
                continue;
            }
            if ended {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits for a log that has not begun yet. None if it never began.
    fn open(&self) -> io::Result<Option<File>> {
        loop {
            let ended = self.ended.load(Ordering::SeqCst);
            match File::open(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && !ended => std::thread::sleep(POLL),
                Err(error) => return Err(error),
                Ok(file) => return Ok(Some(file)),
            }
        }
    }

    /// The file that is there now, if it is another one. While there is none a rotation is under way.
    fn successor(&self, current: &Current) -> io::Result<Option<Current>> {
        match File::open(&self.path) {
            Ok(file) => {
                let next = Current::new(file)?;
                Ok((next.metadata.ino() != current.metadata.ino()).then_some(next))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What was rotated away, the oldest first.
    fn rotated(&self, current: &Metadata) -> io::Result<Vec<Rotated>> {
        let (Some(folder), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Ok(Vec::new());
        };
        let prefix = format!("{}.", name.to_string_lossy());
        let mut found = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // kubelet's compression in progress.
            if !name.starts_with(&prefix) || name.ends_with(".tmp") {
                continue;
            }
            // Also gone meanwhile: kubelet keeps a few only.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_file() && metadata.ino() != current.ino() {
                let (changed, inode) = (metadata.modified()?, metadata.ino());
                found.push(Rotated { path: entry.path(), changed, inode });
            }
        }
        found.sort_by(|a, b| (a.changed, &a.path).cmp(&(b.changed, &b.path)));
        Ok(found)
    }
}

struct Rotated {
    path: PathBuf,
    changed: SystemTime,
    inode: u64,
}

impl Rotated {
    fn print(&self, printer: &mut Printer<impl Write, impl Write>) -> io::Result<()> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        let bytes: Box<dyn Read> = if self.path.extension() == Some("gz".as_ref()) {
            Box::new(MultiGzDecoder::new(file))
        } else {
            Box::new(file)
        };
        let mut lines = BufReader::new(bytes);
        let mut line = Vec::new();
        while lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? > 0 {
            printer.print(&line)?;
            line.clear();
        }
        Ok(())
    }
}

/// The file that is being written.
struct Current {
    lines: BufReader<File>,
    metadata: Metadata,
    /// The beginning of a line whose rest is not written yet.
    begun: Vec<u8>,
}

impl Current {
    fn new(file: File) -> io::Result<Self> {
        Ok(Self { metadata: file.metadata()?, lines: BufReader::new(file), begun: Vec::new() })
    }

    /// Prints the lines up to the end as it is now.
    fn print(&mut self, printer: &mut Printer<impl Write, impl Write>) -> io::Result<()> {
        loop {
            if self.lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut self.begun)? == 0 {
                return Ok(());
            }
            if self.begun.ends_with(b"\n") || self.begun.len() as u64 >= MAX_LINE {
                printer.print(&self.begun)?;
                self.begun.clear();
            }
        }
    }

    /// Goes to where the last lines begin.
    fn skip_to_last(&mut self, lines: usize) -> io::Result<()> {
        let begin = begin_of_last(self.lines.get_mut(), lines)?;
        self.lines.seek(SeekFrom::Start(begin)).map(drop)
    }
}

/// Where the last lines of a file begin; a line without its newline is none yet.
fn begin_of_last(file: &mut (impl Read + Seek), lines: usize) -> io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut newlines = 0;
    let mut block = vec![0; BLOCK as usize];
    while end > 0 {
        let begin = end.saturating_sub(BLOCK);
        let block = &mut block[..(end - begin) as usize];
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(block)?;
        for (at, _) in block.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            // The newline before the first wanted line is the one after the last unwanted.
            if newlines == lines {
                return Ok(begin + at as u64 + 1);
            }
            newlines += 1;
        }
        end = begin;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::path::Path;
    use std::sync::mpsc;

    use super::*;

    fn line(second: u32, text: &str) -> String {
        format!("2026-01-02T10:00:{second:02}.000000000Z stdout F {text}\n")
    }

    fn log(folder: &Path, since: Option<&str>, tail: Option<usize>) -> Log {
        let since = since.map(|since| since.parse().unwrap());
        Log { path: folder.join("0.log"), since, tail, ended: Arc::new(AtomicBool::new(true)) }
    }

    fn printed(log: &Log) -> String {
        let mut out = Vec::new();
        log.print(&mut Printer::new(&mut out, io::sink(), log.since, false)).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_last_lines_begin_after_a_newline_also_across_blocks() {
        let mut text = Vec::new();
        for index in 0..20_000 {
            text.extend_from_slice(format!("line {index}\n").as_bytes());
        }
        let begin = |lines| begin_of_last(&mut Cursor::new(&text), lines).unwrap() as usize;
        assert_eq!(&text[begin(2)..], b"line 19998\nline 19999\n");
        assert_eq!(begin(0), text.len());
        assert!(text[begin(15_000)..].starts_with(b"line 5000\n"));
        assert_eq!(begin(20_000), 0);
        assert_eq!(begin(usize::MAX), 0);
    }

    #[test]
    fn rotated_files_are_read_in_order_when_they_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8], age: u64| {
            let path = folder.path().join(name);
            fs::write(&path, bytes).unwrap();
            let changed = SystemTime::now() - Duration::from_secs(age);
            File::options().write(true).open(&path).unwrap().set_modified(changed).unwrap();
        };
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(line(1, "packed").as_bytes()).unwrap();
        write("0.log.20260102-100001.gz", &gzip.finish().unwrap(), 20);
        write("0.log.20260102-100002", line(2, "rotated").as_bytes(), 10);
        write("0.log.20260102-100002.tmp", b"half", 9);
        write("0.log", line(3, "current").as_bytes(), 0);
        assert_eq!(printed(&log(folder.path(), None, None)), "current\n");
        let since = Some("2026-01-02T10:00:01Z");
        assert_eq!(printed(&log(folder.path(), since, None)), "packed\nrotated\ncurrent\n");
        assert_eq!(printed(&log(folder.path(), Some("2026-01-02T10:00:02Z"), None)), "rotated\ncurrent\n");
        assert_eq!(printed(&log(folder.path(), since, Some(1))), "current\n");
    }

    #[test]
    fn following_goes_across_rotations_and_ends_with_the_container() {
        /// Passes on each line that is printed.
        struct Lines(mpsc::Sender<String>);
        impl Write for Lines {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.send(String::from_utf8_lossy(bytes).into_owned()).ok();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let mut file = File::create(&path).unwrap();
        let mut log = log(folder.path(), None, None);
        let ended = Arc::new(AtomicBool::new(false));
        log.ended = ended.clone();
        let (sender, lines) = mpsc::channel();
        let follower = std::thread::spawn(move || {
            log.print(&mut Printer::new(Lines(sender), io::sink(), None, false)).unwrap()
        });
        let seen = |text: &str| {
            let mut all = String::new();
            while !all.ends_with(&format!("{text}\n")) {
                all += &lines.recv_timeout(Duration::from_secs(20)).expect(text);
            }
            all
        };
        file.write_all(line(1, "one").as_bytes()).unwrap();
        seen("one");
        // Twice before anybody looks.
        for name in ["0.log.1", "0.log.2"] {
            file.write_all(line(2, name).as_bytes()).unwrap();
            fs::rename(&path, folder.path().join(name)).unwrap();
            file = File::create(&path).unwrap();
        }
        let (begin, rest) = ("2026-01-02T10:00:03.000000000Z stdout F in two", " pieces\n");
        file.write_all(begin.as_bytes()).unwrap();
        file.write_all(rest.as_bytes()).unwrap();
        assert_eq!(seen("in two pieces"), "0.log.1\n0.log.2\nin two pieces\n");
        file.write_all(line(4, "last").as_bytes()).unwrap();
        ended.store(true, Ordering::SeqCst);
        follower.join().unwrap();
        seen("last");
    }
}
