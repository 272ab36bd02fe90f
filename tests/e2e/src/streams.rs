//! A client of the daemon's streaming server: SPDY through the server's own crate, WebSocket through a library.

use std::collections::BTreeMap;
use std::time::Duration;

use a3s_box_streaming::spdy::{Connection, Headers, Stream};
use a3s_box_streaming::websocket::channels::{Event, Protocol};
use anyhow::{Context, Result, ensure};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

/// The longest that anything is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// Upgrades a connection to the URL.
async fn upgrade(url: &str, method: &str, headers: &str) -> Result<TcpStream> {
    let rest = url.strip_prefix("http://").context("the URL is not http")?;
    let (host, path) = rest.split_once('/').context("the URL has no path")?;
    let mut stream = TcpStream::connect(host).await?;
    let head = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(tokio::time::timeout(LIMIT, stream.read_u8()).await??);
    }
    let answer = String::from_utf8_lossy(&answer);
    ensure!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    Ok(stream)
}

/// A SPDY connection; `protocol` is `v4.channel.k8s.io` or `portforward.k8s.io`.
pub async fn spdy(url: &str, protocol: &str) -> Result<Connection> {
    let headers = format!("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n");
    Ok(Connection::client(upgrade(url, "POST", &headers).await?))
}

/// The header of a stream of exec or attach.
pub fn kind(kind: &str) -> Headers {
    vec![("streamtype".to_owned(), kind.to_owned())]
}

/// The error stream and the data stream of one forwarded connection.
pub fn forward(connection: &mut Connection, id: usize, port: u16) -> (Stream, Stream) {
    let mut open = |kind: &str| {
        let mut headers = self::kind(kind);
        headers.push(("port".to_owned(), port.to_string()));
        headers.push(("requestid".to_owned(), id.to_string()));
        connection.open(headers)
    };
    (open("error"), open("data"))
}

/// All that comes on a stream.
pub async fn all(stream: &mut Stream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    tokio::time::timeout(LIMIT, stream.reader.read_to_end(&mut bytes))
        .await
        .context("a stream does not end")??;
    Ok(bytes)
}

/// Reads until the text has come.
pub async fn until(stream: &mut Stream, text: &str) -> Result<String> {
    let mut got = String::new();
    let read = async {
        let mut buffer = [0; 4096];
        while !got.contains(text) {
            let count = stream.reader.read(&mut buffer).await?;
            ensure!(count > 0, "the stream ended");
            got.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        Ok(())
    };
    let outcome = tokio::time::timeout(LIMIT, read).await;
    outcome
        .map_err(anyhow::Error::from)
        .flatten()
        .with_context(|| format!("waiting for {text:?}, had {got:?}"))?;
    Ok(got)
}

/// Runs an exec over WebSocket (version 5) with that input; what came, by channel.
pub async fn websocket(url: &str, input: Option<&[u8]>) -> Result<BTreeMap<u8, Vec<u8>>> {
    let name = "v5.channel.k8s.io";
    let headers = format!(
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {name}\r\n"
    );
    let stream = upgrade(url, "GET", &headers).await?;
    let (mut sink, mut source) = WebSocketStream::from_raw_socket(stream, Role::Client, None).await.split();
    let protocol = Protocol::named(name).context("a protocol of the server")?;
    let send = async {
        for piece in input.unwrap_or_default().chunks(32 * 1024) {
            sink.send(protocol.encode(0, piece)).await?;
        }
        if let (Some(_), Some(close)) = (input, protocol.encode_close(0)) {
            sink.send(close).await?;
        }
        anyhow::Ok(())
    };
    let receive = async {
        let mut channels: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
        while let Some(Ok(message)) = source.next().await {
            if let Event::Data(channel, bytes) = protocol.decode(message)? {
                channels.entry(channel).or_default().extend_from_slice(&bytes);
            }
        }
        anyhow::Ok(channels)
    };
    let both = async { tokio::try_join!(send, receive) };
    Ok(tokio::time::timeout(LIMIT, both).await.context("the connection does not end")??.1)
}
