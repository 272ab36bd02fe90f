//! port-forward by all three ways.

#![allow(missing_docs)]

mod common;

use a3s_box_streaming::spdy::{Connection, Stream};
use common::{LIMIT, Served, request, spdy, text};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

fn pair(client: &mut Connection, id: usize, port: u16) -> (Stream, Stream) {
    let headers = |kind: &str| {
        let pairs =
            [("streamtype", kind.to_owned()), ("port", port.to_string()), ("requestid", id.to_string())];
        pairs.map(|(name, value)| (name.to_owned(), value)).to_vec()
    };
    (client.open(headers("error")), client.open(headers("data")))
}

async fn websocket(url: &str, protocol: &str) -> WebSocketStream<TcpStream> {
    let headers = format!(
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: {protocol}\r\n"
    );
    let (head, stream) = request(url, "GET", &headers).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "the key of RFC 6455, section 1.3: {head}");
    WebSocketStream::from_raw_socket(stream, Role::Client, None).await
}

#[tokio::test]
async fn a_hundred_connections_echo_at_the_same_time_with_half_close() {
    let served = Served::ordinary().await;
    let (_, mut client) = spdy(&served.port_forward(&[7]), &["portforward.k8s.io"]).await;
    let pairs: Vec<_> = (0..100).map(|id| pair(&mut client, id, 7)).collect();
    let echoes = pairs.into_iter().enumerate().map(|(index, (mut error, mut data))| async move {
        let sent = vec![index as u8; 40_000];
        let mut got = Vec::new();
        error.writer.shutdown().await.unwrap();
        let (wrote, read) = tokio::join!(
            async {
                data.writer.write_all(&sent).await?;
                data.writer.shutdown().await
            },
            data.reader.read_to_end(&mut got)
        );
        wrote.unwrap();
        read.unwrap();
        assert!(got == sent);
        assert_eq!(text(&mut error).await, "");
    });
    tokio::time::timeout(LIMIT, futures::future::join_all(echoes)).await.expect("all echo");
}

#[tokio::test]
async fn a_port_that_refuses_is_reported_and_the_others_go_on() {
    let served = Served::ordinary().await;
    let (_, mut client) = spdy(&served.port_forward(&[]), &["portforward.k8s.io"]).await;
    let (mut error, _data) = pair(&mut client, 0, 9);
    assert_eq!(text(&mut error).await, "port 9: connection refused");
    let (_error, mut data) = pair(&mut client, 1, 7);
    data.writer.write_all(b"still there").await.unwrap();
    data.writer.shutdown().await.unwrap();
    assert_eq!(text(&mut data).await, "still there");
}

#[tokio::test]
async fn half_a_pair_is_given_up_and_nonsense_is_passed_over() {
    let served = Served::start(std::time::Duration::from_millis(200), LIMIT).await;
    let (_, mut client) = spdy(&served.port_forward(&[7]), &["portforward.k8s.io"]).await;
    let mut nonsense = client.open(vec![("port".to_owned(), "70000".to_owned())]);
    assert_eq!(text(&mut nonsense).await, "");
    let half = vec![("streamtype", "data"), ("port", "7"), ("requestid", "1")];
    let mut half = client.open(half.into_iter().map(|(a, b)| (a.to_owned(), b.to_owned())).collect());
    assert_eq!(text(&mut half).await, "");
}

#[tokio::test]
async fn spdy_runs_inside_of_a_websocket() {
    let served = Served::ordinary().await;
    let socket = websocket(&served.port_forward(&[]), "SPDY/3.1+portforward.k8s.io").await;
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut sink, mut source) = socket.split();
    let (mut from, mut to) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            sink.send(Message::Binary(buffer[..count].to_vec().into())).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(Message::Binary(bytes))) = source.next().await {
            to.write_all(&bytes).await.ok();
        }
    });
    let mut client = Connection::client(near);
    let (_error, mut data) = pair(&mut client, 0, 7);
    data.writer.write_all(&[5; 100_000]).await.unwrap();
    data.writer.shutdown().await.unwrap();
    assert_eq!(text(&mut data).await.len(), 100_000);
}

#[tokio::test]
async fn channels_begin_with_their_port() {
    let served = Served::ordinary().await;
    let mut socket = websocket(&served.port_forward(&[7, 9]), "v4.channel.k8s.io").await;
    socket.send(Message::Binary(b"\0ping".to_vec().into())).await.unwrap();
    let mut channels = vec![Vec::new(); 4];
    let read = async {
        while channels[0].len() < 6 || channels[3].len() < 3 {
            let Message::Binary(bytes) = socket.next().await.unwrap().unwrap() else { continue };
            channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
        }
    };
    tokio::time::timeout(LIMIT, read).await.expect("both answer");
    assert_eq!(channels[0], b"\x07\0ping");
    assert!(String::from_utf8_lossy(&channels[3]).contains("refused"), "{channels:?}");
}
