//! Sends and takes bytes in the containers of `cargo xtask bench`. Linked statically: it is all there is in
//! their image.
//!
//! ```text
//! pump pause               waits to be killed
//! pump bytes COUNT         so many bytes on stdout
//! pump lines COUNT WIDTH   so many bytes in lines of WIDTH bytes, then the line "end"
//! pump serve vsock PORT    answers orders from the host
//! pump serve tcp PORT      answers orders on 127.0.0.1
//! pump serve net PORT      answers orders on every IPv4 address
//! pump ask ADDRESS:PORT LETTER COUNT TURNS
//!                          gives an order so many times; prints the microseconds from the first to the last answer
//! pump files WORK BELOW COUNT
//!                          makes, walks, reads or removes so many files; prints the microseconds
//! ```
//!
//! An order is a letter and a count of eight big-endian bytes. After `s` that many bytes are sent, after `p` as well but
//! from a pipe that another process writes; after `r` that many are read and then answered with one byte. Counts, not ends of streams: not every VMM passes those on.

mod files;

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vsock::{VMADDR_CID_ANY, VsockListener};

/// What the guest agent writes at once.
const VSOCK_PIECE: usize = 16 * 1024;

/// A pipe holds as much.
const PIECE: usize = 64 * 1024;

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pump {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> io::Result<()> {
    match words {
        ["pause"] => loop {
            thread::sleep(Duration::from_secs(3600));
        },
        ["bytes", count] => send(&mut stdout()?, number(count)?, PIECE),
        ["lines", count, width] => lines(number(count)?, number(width)? as usize),
        ["serve", "vsock", port] => serve_vsock(number(port)? as u32),
        ["serve", "tcp", port] => serve_tcp(Ipv4Addr::LOCALHOST, number(port)? as u16),
        ["serve", "net", port] => serve_tcp(Ipv4Addr::UNSPECIFIED, number(port)? as u16),
        ["files", work, below, count] => files::run(work, below, number(count)?),
        ["ask", address, letter, count, turns] => ask(address, letter, number(count)?, number(turns)?),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "see the head of its source for what it does")),
    }
}

fn number(word: &str) -> io::Result<u64> {
    word.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{word:?} is no number")))
}

/// Without a buffer of its own.
fn stdout() -> io::Result<File> {
    Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?))
}

fn send(to: &mut impl Write, mut count: u64, piece: usize) -> io::Result<()> {
    let bytes = vec![b'x'; piece];
    while count > 0 {
        let now = count.min(piece as u64);
        to.write_all(&bytes[..now as usize])?;
        count -= now;
    }
    Ok(())
}

/// What any program does that sends another one's output: read its pipe, write what came.
fn send_piped(to: &mut impl Write, count: u64, piece: usize) -> io::Result<()> {
    let mut writer =
        Command::new("/proc/self/exe").args(["bytes", &count.to_string()]).stdout(Stdio::piped()).spawn()?;
    let mut pipe = writer.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut buffer = vec![0; PIECE];
    loop {
        match pipe.read(&mut buffer)? {
            0 => break,
            some => buffer[..some].chunks(piece).try_for_each(|bytes| to.write_all(bytes))?,
        }
    }
    writer.wait()?;
    Ok(())
}

fn lines(count: u64, width: usize) -> io::Result<()> {
    let mut line = vec![b'x'; width.max(1)];
    line[width.max(1) - 1] = b'\n';
    // Whole lines per write, as a program that buffers has them.
    let many = line.repeat((PIECE / line.len()).max(1));
    let mut stdout = stdout()?;
    for _ in 0..count / many.len() as u64 {
        stdout.write_all(&many)?;
    }
    stdout.write_all(b"end\n")
}

fn serve_tcp(address: Ipv4Addr, port: u16) -> io::Result<()> {
    let listener = TcpListener::bind((address, port))?;
    println!("serving");
    loop {
        let (connection, _) = listener.accept()?;
        connection.set_nodelay(true)?;
        thread::spawn(move || obey(connection, PIECE));
    }
}

fn serve_vsock(port: u32) -> io::Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
    println!("serving");
    loop {
        let (connection, _) = listener.accept()?;
        thread::spawn(move || obey(connection, VSOCK_PIECE));
    }
}

/// The other side of [`obey`].
fn ask(address: &str, letter: &str, count: u64, turns: u64) -> io::Result<()> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_nodelay(true)?;
    let order = [letter.as_bytes(), &count.to_be_bytes()].concat();
    let mut buffer = vec![0; 256 * 1024];
    let started = Instant::now();
    for _ in 0..turns {
        connection.write_all(&order)?;
        let mut answer = count;
        if letter == "r" {
            send(&mut connection, count, PIECE)?;
            answer = 1;
        }
        while answer > 0 {
            let room = answer.min(buffer.len() as u64) as usize;
            match connection.read(&mut buffer[..room])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                some => answer -= some as u64,
            }
        }
    }
    println!("{}", started.elapsed().as_micros());
    Ok(())
}

/// Until the other side closes, or breaks off.
fn obey(mut connection: impl Read + Write, piece: usize) -> io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let mut order = [0; 9];
        connection.read_exact(&mut order)?;
        let mut count = u64::from_be_bytes(order[1..].try_into().expect("eight of nine bytes"));
        match order[0] {
            b's' => {
                send(&mut connection, count, piece)?;
                continue;
            }
            b'p' => {
                send_piped(&mut connection, count, piece)?;
                continue;
            }
            _ => {}
        }
        while count > 0 {
            let room = count.min(buffer.len() as u64) as usize;
            match connection.read(&mut buffer[..room])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                some => count -= some as u64,
            }
        }
        connection.write_all(b".")?;
    }
}
