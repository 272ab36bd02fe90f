//! Arbitrary bytes as SPDY: to the decoder as they are, as the headers of a block, and as what the peer of a
//! connection does.

#![no_main]

use std::time::Duration;

use a3s_box_streaming::spdy::{Connection, Decoder, Encoder, Frame};
use bytes::{BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, FlushCompress};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

thread_local! {
    // Its clock jumps when everybody waits, so that a connection that hangs is found at once.
    static RUNTIME: Runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    match choice & 3 {
        // The rest of the first byte says where the connection's reads break the bytes apart.
        0 | 1 => codec(bytes, usize::from(choice >> 2)),
        2 => codec(&block(bytes), 8),
        _ => RUNTIME.with(|runtime| runtime.block_on(connection(&script(bytes)))),
    }
});

/// Frames or an error, and frames survive being encoded.
fn codec(bytes: &[u8], cut: usize) {
    let at = cut.min(bytes.len());
    let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
    let (mut encoder, mut out) = (Encoder::default(), BytesMut::new());
    let mut frames = Vec::new();
    for part in [&bytes[..at], &bytes[at..]] {
        buffer.extend_from_slice(part);
        while let Ok(Some(frame)) = decoder.next(&mut buffer) {
            if encoder.put(&frame, &mut out).is_ok() {
                frames.push(frame);
            }
        }
    }
    let mut decoder = Decoder::default();
    for frame in frames {
        assert_eq!(decoder.next(&mut out), Ok(Some(frame)));
    }
}

/// A SYN_REPLY with these bytes where the headers are: a fuzzer does not guess what is compressed.
fn block(plain: &[u8]) -> BytesMut {
    let mut block = Vec::with_capacity(plain.len() + 1024);
    Compress::new(Compression::fast(), true).compress_vec(plain, &mut block, FlushCompress::Sync).unwrap();
    let mut frame = BytesMut::new();
    frame.put_slice(&[0x80, 3, 0, 2]);
    frame.put_u32(4 + block.len() as u32);
    frame.put_u32(1);
    frame.put_slice(&block);
    frame
}

/// Three bytes are a frame: what, on which stream, how much. Sometimes the bytes that follow are sent as they are.
fn script(mut bytes: &[u8]) -> BytesMut {
    let (mut encoder, mut out) = (Encoder::default(), BytesMut::new());
    while let [what, id, size, rest @ ..] = bytes {
        bytes = rest;
        let (id, fin, size) = (u32::from(*id), what & 0x10 != 0, usize::from(*size));
        let headers = || vec![("streamtype".to_owned(), "x".repeat(size))];
        let frame = match what & 0xf {
            0..=2 => Frame::SynStream { id, fin, headers: headers() },
            3..=6 => Frame::Data { id, fin, bytes: Bytes::from(vec![0; size * size]) },
            7 => Frame::Reset { id, status: size as u32 },
            8 => Frame::Ping(id),
            9 => Frame::SynReply { id, fin, headers: headers() },
            10 => Frame::Headers { id, fin, headers: headers() },
            11 => Frame::WindowUpdate { id, delta: size as u32 },
            12 => Frame::GoAway { last: id, status: size as u32 },
            _ => {
                let (raw, rest) = bytes.split_at(size.min(bytes.len()));
                out.put_slice(raw);
                bytes = rest;
                continue;
            }
        };
        encoder.put(&frame, &mut out).unwrap();
    }
    out
}

/// Whatever the peer does, what it is sent can be decoded, and nothing runs on after it has gone.
async fn connection(sent: &[u8]) {
    let (near, far) = tokio::io::duplex(16 * 1024);
    let (server, mut incoming) = Connection::server(far);
    let echo = tokio::spawn(async move {
        let mut streams = tokio::task::JoinSet::new();
        while let Some(mut stream) = incoming.recv().await {
            streams.spawn(async move {
                tokio::io::copy(&mut stream.reader, &mut stream.writer).await.ok();
                stream.writer.shutdown().await.ok();
            });
        }
        streams.join_all().await;
    });
    let (mut from, mut to) = tokio::io::split(near);
    let receive = tokio::spawn(async move {
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
        while from.read_buf(&mut buffer).await.unwrap() > 0 {
            while decoder.next(&mut buffer).expect("what we send is SPDY").is_some() {}
        }
    });
    let all = async {
        to.write_all(sent).await.ok();
        to.shutdown().await.ok();
        server.closed().await;
        echo.await.unwrap();
        receive.await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("everything ends with its connection");
}
