//! The box's vsock sockets on the host: the listener for Ready and the dialling of guest ports.
//!
//! The directory is writable by the VMM, which is not trusted: a socket is opened without following links and
//! connected to by descriptor, so that a VMM cannot redirect the daemon to somebody else's socket. Going through
//! /proc/self/fd also keeps names below the 108 bytes of a socket address, wherever the box's directory is.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat, unlinkat};
use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::launch::{VSOCK_DIR, VSOCK_MULTIPLEX, socket_name};
use crate::seam::BackendKind;

/// A guest that does not answer a connection by then has lost it.
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// Between attempts while the VMM's queue of connections is full.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// The directory of a box's sockets.
#[derive(Debug)]
pub(crate) struct Ports {
    dir: OwnedFd,
    backend: BackendKind,
}

impl Ports {
    /// Opens `vsock/` of a box's directory.
    pub(crate) fn open(box_dir: &Path, backend: BackendKind) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self { dir: openat(CWD, box_dir.join(VSOCK_DIR), flags, Mode::empty())?, backend })
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()))
    }

    /// Listens for connections that the guest makes to `port` of the host. What an earlier daemon left is replaced.
    pub(crate) fn listen(&self, port: u32) -> io::Result<UnixListener> {
        let name = socket_name(port);
        match unlinkat(&self.dir, &name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let listener = UnixListener::bind(self.path(&name))?;
        // Connecting takes write permission and the VMM's helper is not root. The directories above keep others out.
        std::fs::set_permissions(self.path(&name), std::fs::Permissions::from_mode(0o666))?;
        Ok(listener)
    }

    /// Connects to `port` of the guest.
    pub(crate) async fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let dialled = async {
            match self.backend {
                BackendKind::Libkrun => self.connect(&socket_name(port)).await,
                BackendKind::Qemu => choose_port(self.connect(VSOCK_MULTIPLEX).await?, port).await,
            }
        };
        match tokio::time::timeout(DIAL_LIMIT, dialled).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let socket =
            openat(&self.dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} is not a socket")));
        }
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        loop {
            match UnixStream::connect(&path).await {
                // The VMM's queue of connections that it has not accepted may be as short as five; beyond that the
                // kernel does not wait for us.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(FULL_PAUSE).await;
                }
                other => return other,
            }
        }
    }
}

/// The helper's protocol: `CONNECT <port>\n`, answered by `OK <port>\n`, or by closing.
async fn choose_port(mut stream: UnixStream, port: u32) -> io::Result<UnixStream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(16);
    // One byte at a time: what follows the line is the guest's and must stay in the socket.
    loop {
        let byte = match stream.read_u8().await {
            Ok(byte) => byte,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "nothing in the guest listens there",
                ));
            }
            Err(error) => return Err(error),
        };
        match byte {
            b'\n' if answer.starts_with(b"OK ") => return Ok(stream),
            b'\n' => break,
            _ if answer.len() == 32 => break,
            byte => answer.push(byte),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the vsock helper's answer is not its protocol"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(dir: &Path, backend: BackendKind) -> Ports {
        std::fs::create_dir_all(dir.join(VSOCK_DIR)).unwrap();
        Ports::open(dir, backend).unwrap()
    }

    /// A box's directory whose path is far too long for a socket address.
    fn deep(dir: &Path) -> PathBuf {
        let deep = dir.join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        deep
    }

    #[tokio::test]
    async fn a_long_path_neither_stops_listening_nor_dialling() {
        let dir = tempfile::tempdir().unwrap();
        let ports = ports(&deep(dir.path()), BackendKind::Libkrun);
        let listener = ports.listen(1025).unwrap();
        let (dialled, accepted) = tokio::join!(ports.dial(1025), listener.accept());
        dialled.unwrap().write_all(b"x").await.unwrap();
        assert_eq!(accepted.unwrap().0.read_u8().await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn a_socket_that_an_earlier_daemon_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let ports = ports(dir.path(), BackendKind::Libkrun);
        drop(ports.listen(1024).unwrap());
        ports.listen(1024).unwrap();
    }

    /// A compromised VMM replaces its socket by a link to another service of the host.
    #[tokio::test]
    async fn a_link_in_place_of_a_socket_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let ports = ports(dir.path(), BackendKind::Libkrun);
        let _other = UnixListener::bind(dir.path().join("other.sock")).unwrap();
        std::os::unix::fs::symlink("../other.sock", dir.path().join("vsock/guest_1025")).unwrap();
        assert!(ports.dial(1025).await.is_err());
    }

    /// Twenty connections at once failed on libkrun, whose queue has room for five.
    #[tokio::test(start_paused = true)]
    async fn a_full_queue_of_connections_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let ports = ports(dir.path(), BackendKind::Libkrun);
        let listener = ports.listen(1025).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let mut full = Vec::new();
        while full.len() < 2 {
            full.push(ports.dial(1025).await.unwrap());
        }
        assert_eq!(ports.dial(1025).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let accept_later = async {
            tokio::time::sleep(DIAL_LIMIT / 2).await;
            listener.accept().await.unwrap()
        };
        let (dialled, _accepted) = tokio::join!(ports.dial(1025), accept_later);
        dialled.unwrap();
    }

    #[tokio::test]
    async fn the_helper_is_asked_for_the_port_and_guest_bytes_stay_in_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let ports = ports(dir.path(), BackendKind::Qemu);
        let listener = UnixListener::bind(dir.path().join("vsock/guest")).unwrap();
        let helper = async {
            let mut stream = listener.accept().await.unwrap().0;
            let mut request = [0; 13];
            stream.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"CONNECT 1025\n");
            stream.write_all(b"OK 4711\nhello").await.unwrap();
        };
        let (dialled, ()) = tokio::join!(ports.dial(1025), helper);
        let mut said = String::new();
        dialled.unwrap().read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "hello");
    }

    #[tokio::test]
    async fn a_port_that_nobody_serves_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let ports = ports(dir.path(), BackendKind::Qemu);
        let listener = UnixListener::bind(dir.path().join("vsock/guest")).unwrap();
        let helper = async {
            let mut stream = listener.accept().await.unwrap().0;
            stream.read_exact(&mut [0; 13]).await.unwrap();
        };
        let (dialled, ()) = tokio::join!(ports.dial(1025), helper);
        assert_eq!(dialled.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test(start_paused = true)]
    async fn a_helper_that_never_answers_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let ports = ports(dir.path(), BackendKind::Qemu);
        let _listener = UnixListener::bind(dir.path().join("vsock/guest")).unwrap();
        assert_eq!(ports.dial(1025).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
