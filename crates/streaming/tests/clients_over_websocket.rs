//! What clients of WebSocket see, with every version of the protocol.

#![allow(missing_docs)]

mod common;

use a3s_box_streaming::backend::Wanted;
use a3s_box_streaming::websocket::channels::{Event, Protocol};
use common::{LIMIT, Served, request};
use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

const NAMES: [&str; 7] = [
    "",
    "channel.k8s.io",
    "v3.channel.k8s.io",
    "v4.channel.k8s.io",
    "v5.channel.k8s.io",
    "base64.channel.k8s.io",
    "v4.base64.channel.k8s.io",
];

async fn connect(url: &str, name: &str) -> (Protocol, WebSocketStream<TcpStream>) {
    let mut headers = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        .to_owned();
    if !name.is_empty() {
        headers.push_str(&format!("Sec-WebSocket-Protocol: v9.channel.k8s.io, {name}\r\n"));
    }
    let (head, stream) = request(url, "GET", &headers).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{name}: {head}");
    let protocol = Protocol::named(name).expect("a protocol");
    (protocol, WebSocketStream::from_raw_socket(stream, Role::Client, None).await)
}

/// Everything until the server closes, by channel.
async fn all(protocol: Protocol, socket: &mut WebSocketStream<TcpStream>) -> Vec<String> {
    let mut channels = vec![Vec::new(); 5];
    let read = async {
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Close(frame) = &message {
                // Clients in Go take an end without a code for a failure.
                assert_eq!(frame.as_ref().map(|frame| frame.code.into()), Some(1000u16));
            }
            if let Ok(Event::Data(channel, bytes)) = protocol.decode(message) {
                channels[usize::from(channel)].extend_from_slice(&bytes);
            }
        }
    };
    tokio::time::timeout(LIMIT, read).await.expect("the server closes");
    channels.into_iter().map(|bytes| String::from_utf8(bytes).unwrap()).collect()
}

#[tokio::test]
async fn output_and_exit_code_arrive_in_every_version() {
    let served = Served::ordinary().await;
    let streams = Wanted { stdin: false, stdout: true, stderr: true };
    for name in NAMES {
        let (protocol, mut socket) = connect(&served.exec("both", false, streams), name).await;
        let channels = all(protocol, &mut socket).await;
        assert_eq!((channels[1].as_str(), channels[2].as_str()), ("out", "err"), "{name}");
        let expected = if protocol.version >= 4 { "\"NonZeroExitCode\"" } else { "exit code: 3" };
        assert!(channels[3].contains(expected), "{name}: {}", channels[3]);
    }
    served.quiet().await;
}

#[tokio::test]
async fn input_ends_with_a_close_of_its_channel_in_version_5() {
    let served = Served::ordinary().await;
    let streams = Wanted { stdin: true, stdout: true, stderr: false };
    let (protocol, mut socket) = connect(&served.exec("cat", false, streams), "v5.channel.k8s.io").await;
    for piece in ["one ", "two"] {
        socket.send(protocol.encode(0, piece.as_bytes())).await.unwrap();
    }
    socket.send(protocol.encode_close(0).unwrap()).await.unwrap();
    let channels = all(protocol, &mut socket).await;
    assert_eq!(channels[1], "one two");
    assert!(channels[3].contains("Success"));
}

#[tokio::test]
async fn a_window_size_reaches_the_terminal() {
    let served = Served::ordinary().await;
    let streams = Wanted { stdout: true, ..Wanted::default() };
    let (protocol, mut socket) = connect(&served.exec("size", true, streams), "v4.channel.k8s.io").await;
    socket.send(protocol.encode(4, b"{\"Width\":132,\"Height\":43}")).await.unwrap();
    assert_eq!(all(protocol, &mut socket).await[1], "132x43");
}

#[tokio::test]
async fn garbage_and_oversized_messages_end_the_connection_and_its_call() {
    let served = Served::ordinary().await;
    let streams = Wanted { stdin: true, stdout: true, stderr: false };
    for message in [Message::Binary(Vec::new().into()), Message::Binary(vec![0; 1 << 20].into())] {
        let (_, mut socket) = connect(&served.exec("cat", false, streams), "v5.channel.k8s.io").await;
        socket.send(message).await.ok();
        let ended = async { while let Some(Ok(_)) = socket.next().await {} };
        tokio::time::timeout(LIMIT, ended).await.expect("the server closes");
    }
    served.quiet().await;
}
