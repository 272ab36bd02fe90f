//! Streams: one connection each, for a process's stdio or to a port of the pod. See `StreamOpen` in agent.proto.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use a3s_box_protocol::chunks;
use a3s_box_protocol::framing::{FramingError, read_message, write_message};
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{StreamAccept, StreamOpen};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::session::SessionError;
use crate::session::table::Table;
use crate::stdio::Stdio;
use crate::stdio::buffer::BeyondEnd;
use crate::stdio::input::Input;
use crate::stdio::output::Connection;
use std::sync::Arc;

/// A connection says what it wants within this time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a stream cannot be had.
#[derive(Debug, Error)]
pub enum StreamError {
    /// No such session or exec, or it is not there yet.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The exec belongs to another session.
    #[error("exec {exec:?} does not belong to session {session:?}")]
    OtherSession {
        /// As asked for.
        exec: String,
        /// As asked for.
        session: String,
    },
    /// The process has no such stream.
    #[error("the process has no {0:?} stream")]
    Absent(Kind),
    /// A number that is no kind.
    #[error("{0} is no kind of stream")]
    Kind(i32),
    /// Zero, or beyond 65535.
    #[error("{0} is not a port")]
    Port(u32),
    /// Nobody listens on either loopback address.
    #[error("port {port}: {source}")]
    Connect {
        /// As asked for.
        port: u16,
        /// Of the last address.
        #[source]
        source: io::Error,
    },
    /// An offset that was never sent.
    #[error(transparent)]
    Offset(#[from] BeyondEnd),
}

enum Stream {
    Input { input: Arc<Input>, keep_open: bool },
    Output(Connection),
    Tcp(TcpStream),
}

/// Serves one connection to its end.
pub async fn serve(
    table: &Table,
    mut from_host: impl AsyncRead + Unpin,
    mut to_host: impl AsyncWrite + Unpin,
) -> Result<(), FramingError> {
    let Ok(open) = tokio::time::timeout(PATIENCE, read_message::<StreamOpen>(&mut from_host)).await else {
        return Ok(());
    };
    match find(table, &open?).await {
        Ok(stream) => {
            let offset = match &stream {
                Stream::Input { .. } | Stream::Tcp(_) => 0,
                Stream::Output(connection) => connection.offset(),
            };
            write_message(&mut to_host, &StreamAccept { error: String::new(), offset }).await?;
            match stream {
                Stream::Input { input, keep_open } => input.copy_from(&mut from_host, keep_open).await?,
                Stream::Output(connection) => connection.run(&mut from_host, &mut to_host).await?,
                Stream::Tcp(tcp) => relay(tcp, &mut from_host, &mut to_host).await?,
            }
        }
        Err(error) => {
            write_message(&mut to_host, &StreamAccept { error: error.to_string(), offset: 0 }).await?
        }
    }
    Ok(())
}

/// Each direction ends by itself; one that breaks ends both.
async fn relay(
    mut tcp: TcpStream,
    from_host: &mut (impl AsyncRead + Unpin),
    to_host: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let (mut from_port, mut to_port) = tcp.split();
    chunks::carry(from_host, to_host, &mut from_port, &mut to_port).await
}

/// The agent lives in the pod's network namespace.
async fn connect(port: u32) -> Result<TcpStream, StreamError> {
    let port = u16::try_from(port).ok().filter(|port| *port > 0).ok_or(StreamError::Port(port))?;
    let dial = async {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Ok(stream) => Ok(stream),
            // What is said of IPv4 is what people expect to read.
            Err(source) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.map_err(|_| source),
        }
    };
    let limited = tokio::time::timeout(PATIENCE, dial).await;
    let connected = limited.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    connected.map_err(|source| StreamError::Connect { port, source })
}

async fn find(table: &Table, open: &StreamOpen) -> Result<Stream, StreamError> {
    let kind = Kind::try_from(open.kind).map_err(|_| StreamError::Kind(open.kind))?;
    if kind == Kind::Tcp {
        return connect(open.port).await.map(Stream::Tcp);
    }
    if open.exec_id.is_empty() {
        return pick(&table.session(&open.session_id)?.live()?.stdio, kind, open);
    }
    let exec = table.exec(&open.exec_id)?;
    if exec.session_id != open.session_id {
        return Err(StreamError::OtherSession {
            exec: open.exec_id.clone(),
            session: open.session_id.clone(),
        });
    }
    pick(&exec.stdio, kind, open)
}

fn pick(stdio: &Stdio, kind: Kind, open: &StreamOpen) -> Result<Stream, StreamError> {
    match kind {
        Kind::Stdin => {
            let input = stdio.input().cloned().ok_or(StreamError::Absent(kind))?;
            Ok(Stream::Input { input, keep_open: open.keep_open })
        }
        Kind::Stdout | Kind::Stderr | Kind::Tcp => {
            let output = stdio.output(kind).ok_or(StreamError::Absent(kind))?;
            Ok(Stream::Output(output.attach(open.offset)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};
    use tokio::net::TcpListener;

    use super::*;

    /// Dials a server's port as a host that sends `said` does; the answer is what came back.
    async fn ask(port: u16, said: &[u8]) -> Vec<u8> {
        let tcp = connect(port.into()).await.unwrap();
        let (near, far) = duplex(1000);
        let agent = tokio::spawn(async move {
            let (mut from_host, mut to_host) = split(far);
            relay(tcp, &mut from_host, &mut to_host).await
        });
        let (mut from_agent, mut to_agent) = split(near);
        let (mut said, mut got) = (said, Vec::new());
        chunks::carry(&mut from_agent, &mut to_agent, &mut said, &mut got).await.unwrap();
        agent.await.unwrap().unwrap();
        got
    }

    #[tokio::test]
    async fn a_server_that_answers_after_the_end_of_the_question_is_heard() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = tokio::spawn(async move {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut question = Vec::new();
                client.read_to_end(&mut question).await.unwrap();
                client.write_all(&question).await.unwrap();
            });
            let said: Vec<u8> = (0..100_000).map(|i: u32| (i % 241) as u8).collect();
            assert!(ask(port, &said).await == said, "{address}");
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_port_where_nobody_listens_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let refused = connect(port.into()).await.unwrap_err().to_string();
        assert!(refused.starts_with(&format!("port {port}: Connection refused")), "{refused}");
        assert!(matches!(connect(0).await, Err(StreamError::Port(0))));
        assert!(matches!(connect(65536).await, Err(StreamError::Port(65536))));
    }
}
