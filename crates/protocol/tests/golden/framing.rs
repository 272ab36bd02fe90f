//! What is on a connection beside protobuf: lengths before messages, and the frames of a port's connection.

use std::io;

use a3s_box_protocol::chunks::carry;
use a3s_box_protocol::framing::{read_message, write_message};
use a3s_box_protocol::proto::{BootStage, Ready, StreamAccept, StreamOpen, stream_open};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::task::JoinHandle;

use super::goldens;

fn ready() -> Ready {
    Ready {
        protocol: 3,
        agent_version: "0.1.0".to_owned(),
        kernel_release: "6.12.0-a3s-box".to_owned(),
        stages: vec![BootStage { name: "kernel".to_owned(), at_us: 1_250_000 }],
    }
}

fn open() -> StreamOpen {
    StreamOpen {
        session_id: "c1c1".to_owned(),
        exec_id: "e1".to_owned(),
        kind: stream_open::Kind::Stderr.into(),
        offset: 65_536,
        keep_open: true,
        port: 8080,
    }
}

/// A length in another order of octets would leave both sides waiting for a message that never comes.
#[tokio::test]
async fn golden_lengths_before_messages_are_read_and_written_alike() {
    let mut written = Vec::new();
    write_message(&mut written, &ready()).await.unwrap();
    goldens("framing").check_hex("ready.hex", &written);
    for golden in goldens("framing").ages("ready.hex") {
        let read: Ready = read_message(&mut golden.unhex().as_slice()).await.unwrap();
        assert_eq!(read, ready(), "{}", golden.path.display());
    }
    let mut written = Vec::new();
    write_message(&mut written, &open()).await.unwrap();
    // What a host says and what an agent answers, one after the other on one connection.
    write_message(&mut written, &StreamAccept { error: String::new(), offset: 65_600 }).await.unwrap();
    write_message(&mut written, &StreamAccept { error: "no such session".to_owned(), offset: 0 })
        .await
        .unwrap();
    goldens("framing").check_hex("stream.hex", &written);
    for golden in goldens("framing").ages("stream.hex") {
        let bytes = golden.unhex();
        let mut left = bytes.as_slice();
        assert_eq!(read_message::<StreamOpen>(&mut left).await.unwrap(), open(), "{}", golden.path.display());
        assert_eq!(read_message::<StreamAccept>(&mut left).await.unwrap().offset, 65_600);
        assert_eq!(read_message::<StreamAccept>(&mut left).await.unwrap().error, "no such session");
        assert!(left.is_empty());
    }
}

/// A side of a port's connection: its local end, the other end of the connection, and its task.
fn side() -> (DuplexStream, DuplexStream, JoinHandle<io::Result<()>>) {
    let ((near, far), (local, inner)) = (duplex(1 << 20), duplex(1 << 20));
    let task = tokio::spawn(async move {
        let ((mut from, mut to), (mut read, mut write)) = (split(near), split(inner));
        carry(&mut from, &mut to, &mut read, &mut write).await
    });
    (local, far, task)
}

/// Pieces, both ends, and what was passed on: each in its turn, so that the bytes are the same every time.
#[tokio::test]
async fn golden_frames_of_a_ports_connection_are_read_and_written_alike() {
    const SAID: &str = "port-said.hex";
    const HEARD: &str = "port-heard.hex";
    let heard_today: Vec<u8> =
        [&5_u32.to_be_bytes()[..], b"world", &(5_u32 | 1 << 31).to_be_bytes(), &0_u32.to_be_bytes()].concat();
    goldens("framing").check_hex(HEARD, &heard_today);
    for golden in goldens("framing").ages(HEARD) {
        let (mut local, mut far, task) = side();
        let mut said = Vec::new();
        local.write_all(b"hello").await.unwrap();
        said.extend(read_exactly(&mut far, 9).await);
        local.shutdown().await.unwrap();
        said.extend(read_exactly(&mut far, 4).await);
        far.write_all(&golden.unhex()).await.unwrap();
        let mut got = Vec::new();
        local.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"world", "{}", golden.path.display());
        said.extend(read_exactly(&mut far, 4).await);
        task.await.unwrap().unwrap();
        goldens("framing").check_hex(SAID, &said);
        for golden in goldens("framing").ages(SAID) {
            assert_eq!(golden.unhex(), said, "an agent of that build reads this: {}", golden.path.display());
        }
    }
    goldens("framing").are_all_known(&["ready.hex", "stream.hex", SAID, HEARD]);
}

async fn read_exactly(from: &mut DuplexStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).await.unwrap();
    bytes
}
