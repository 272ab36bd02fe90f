//! Connections against themselves and against peers that do as they like.

use std::future::Future;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;

use super::reader::MAX_STREAMS;
use super::*;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);

fn headers(kind: &str) -> Headers {
    vec![("streamtype".to_owned(), kind.to_owned())]
}

async fn echo(mut incoming: Incoming) {
    while let Some(mut stream) = incoming.recv().await {
        tokio::spawn(async move {
            tokio::io::copy(&mut stream.reader, &mut stream.writer).await.ok();
            stream.writer.shutdown().await.ok();
        });
    }
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    timeout(LONG, work).await.expect("it comes to an end")
}

/// Frames without a connection's manners.
struct Peer {
    io: DuplexStream,
    encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
}

impl Peer {
    fn of_server(buffer: usize) -> (Self, Connection, Incoming) {
        let (io, far) = tokio::io::duplex(buffer);
        let (server, incoming) = Connection::server(far);
        let peer =
            Self { io, encoder: Encoder::default(), decoder: Decoder::default(), buffer: BytesMut::new() };
        (peer, server, incoming)
    }

    async fn send(&mut self, frame: Frame) {
        let mut out = BytesMut::new();
        self.encoder.put(&frame, &mut out).unwrap();
        self.io.write_all(&out).await.unwrap();
    }

    async fn open(&mut self, id: u32, fin: bool) {
        self.send(Frame::SynStream { id, fin, headers: headers("data") }).await;
    }

    async fn data(&mut self, id: u32, fin: bool, bytes: &'static [u8]) {
        self.send(Frame::Data { id, fin, bytes: Bytes::from_static(bytes) }).await;
    }

    /// `None`: the other side closed.
    async fn receive(&mut self) -> Option<Frame> {
        in_time(async {
            loop {
                if let Some(frame) = self.decoder.next(&mut self.buffer).unwrap() {
                    return Some(frame);
                }
                if self.io.read_buf(&mut self.buffer).await.unwrap() == 0 {
                    return None;
                }
            }
        })
        .await
    }

    /// The next frame that is no window update.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            match self.receive().await {
                Some(Frame::WindowUpdate { .. }) => {}
                other => return other,
            }
        }
    }

    async fn expect(&mut self, frame: Frame) {
        assert_eq!(self.next().await, Some(frame));
    }

    /// Writes one frame again and again until nothing is taken; how many bytes were.
    async fn flood(&mut self, frame: Frame, limit: usize) -> usize {
        let mut one = BytesMut::new();
        self.encoder.put(&frame, &mut one).unwrap();
        let many = one.repeat((64 * 1024 / one.len()).max(1));
        let mut taken = 0;
        let pause = Duration::from_millis(300);
        while let Ok(count) = timeout(pause, self.io.write(&many[taken % many.len()..])).await {
            taken += count.unwrap();
            assert!(taken < limit, "nobody reads, and {taken} bytes were taken");
        }
        taken
    }
}

fn reply(id: u32) -> Frame {
    Frame::SynReply { id, fin: false, headers: Vec::new() }
}

fn data(id: u32, fin: bool, bytes: &'static [u8]) -> Frame {
    Frame::Data { id, fin, bytes: Bytes::from_static(bytes) }
}

#[tokio::test]
async fn streams_echo_side_by_side_with_half_close() {
    let (near, far) = tokio::io::duplex(16 * 1024);
    let (_server, incoming) = Connection::server(far);
    tokio::spawn(echo(incoming));
    let mut client = Connection::client(near);
    let streams: Vec<Stream> = (0..8).map(|_| client.open(headers("data"))).collect();
    let round = streams.into_iter().enumerate().map(|(index, mut stream)| async move {
        let sent = vec![index as u8; 1 << 20];
        let (reader, writer) = (&mut stream.reader, &mut stream.writer);
        let mut got = Vec::new();
        let (wrote, read) = tokio::join!(
            async {
                writer.write_all(&sent).await?;
                writer.shutdown().await
            },
            reader.read_to_end(&mut got)
        );
        wrote.unwrap();
        read.unwrap();
        assert!(got == sent);
    });
    in_time(futures::future::join_all(round)).await;
    client.finish().await;
}

#[tokio::test]
async fn either_side_may_end_its_direction_first() {
    let (mut peer, _server, mut incoming) = Peer::of_server(4096);
    for (id, we_end_first) in [(1, true), (3, false)] {
        peer.open(id, false).await;
        peer.expect(reply(id)).await;
        let mut stream = incoming.recv().await.unwrap();
        let mut got = Vec::new();
        if we_end_first {
            peer.data(id, true, b"question").await;
            stream.reader.read_to_end(&mut got).await.unwrap();
            stream.writer.write_all(b"answer").await.unwrap();
            stream.writer.shutdown().await.unwrap();
            peer.expect(data(id, false, b"answer")).await;
            peer.expect(data(id, true, b"")).await;
        } else {
            stream.writer.write_all(b"answer").await.unwrap();
            stream.writer.shutdown().await.unwrap();
            peer.expect(data(id, false, b"answer")).await;
            peer.expect(data(id, true, b"")).await;
            peer.data(id, true, b"question").await;
            stream.reader.read_to_end(&mut got).await.unwrap();
        }
        assert_eq!(got, b"question");
    }
}

#[tokio::test]
async fn ten_thousand_streams_end_the_connection_instead_of_filling_memory() {
    let (near, far) = tokio::io::duplex(1 << 20);
    let (server, mut incoming) = Connection::server(far);
    let holder = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Some(stream) = incoming.recv().await {
            held.push(stream);
        }
        held.len()
    });
    let mut client = Connection::client(near);
    let opened: Vec<Stream> = (0..10_000).map(|_| client.open(headers("data"))).collect();
    in_time(server.closed()).await;
    assert_eq!(holder.await.unwrap(), MAX_STREAMS);
    drop(opened);
}

#[tokio::test]
async fn streams_that_ended_in_any_way_make_room_for_others() {
    let (mut peer, _server, mut incoming) = Peer::of_server(64 * 1024);
    for round in 0..MAX_STREAMS as u32 * 2 {
        let id = round * 2 + 1;
        // The peer says that it sends nothing, which ends half of the stream.
        peer.open(id, round % 4 == 0).await;
        peer.expect(reply(id)).await;
        let mut stream = incoming.recv().await.unwrap();
        match round % 4 {
            0 => {
                stream.writer.shutdown().await.unwrap();
                peer.expect(data(id, true, b"")).await;
            }
            1 => {
                peer.send(Frame::Reset { id, status: status::CANCEL }).await;
                stream.reader.read_to_end(&mut Vec::new()).await.unwrap();
            }
            2 => {
                drop(stream);
                peer.expect(Frame::Reset { id, status: status::CANCEL }).await;
            }
            _ => {
                stream.writer.shutdown().await.unwrap();
                peer.expect(data(id, true, b"")).await;
                peer.data(id, true, b"").await;
            }
        }
    }
}

#[tokio::test]
async fn a_stream_that_was_reset_sends_no_more_and_the_others_go_on() {
    let (mut peer, _server, mut incoming) = Peer::of_server(64 * 1024);
    for id in [1, 3] {
        peer.open(id, false).await;
        peer.expect(reply(id)).await;
    }
    let (mut first, mut second) = (incoming.recv().await.unwrap(), incoming.recv().await.unwrap());
    peer.send(Frame::Reset { id: 1, status: status::CANCEL }).await;
    in_time(first.reader.read_to_end(&mut Vec::new())).await.unwrap();
    let refused = first.writer.write_all(&[0; 1000]).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::BrokenPipe);
    second.writer.write_all(b"alive").await.unwrap();
    peer.expect(data(3, false, b"alive")).await;
}

#[tokio::test]
async fn a_client_that_vanishes_ends_reading_and_writing() {
    let (mut peer, server, mut incoming) = Peer::of_server(4096);
    peer.open(1, false).await;
    let mut stream = incoming.recv().await.unwrap();
    assert_eq!(stream.header("streamtype"), Some("data"));
    drop(peer);
    let mut rest = Vec::new();
    in_time(stream.reader.read_to_end(&mut rest)).await.unwrap();
    in_time(server.closed()).await;
    in_time(async { while stream.writer.write_all(&[0; 4096]).await.is_ok() {} }).await;
    assert!(incoming.recv().await.is_none());
    in_time(server.tasks_ended()).await;
}

#[tokio::test]
async fn who_breaks_the_protocol_is_told_so_and_ends() {
    let broken: [(&str, &[u8]); 4] = [
        ("another version", &[0x80, 2, 0, 1, 0, 0, 0, 0]),
        ("a length that lies", &[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]),
        ("a ping without a number", &[0x80, 3, 0, 6, 0, 0, 0, 0]),
        (
            "headers that are no zlib stream",
            &[0x80, 3, 0, 1, 0, 0, 0, 12, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 1, 2],
        ),
    ];
    for (what, bytes) in broken {
        let (mut peer, server, mut incoming) = Peer::of_server(4096);
        peer.open(5, false).await;
        peer.expect(reply(5)).await;
        let mut stream = incoming.recv().await.unwrap();
        peer.io.write_all(bytes).await.unwrap();
        let farewell = Frame::GoAway { last: 5, status: goodbye::PROTOCOL_ERROR };
        assert_eq!(peer.next().await, Some(farewell), "{what}");
        assert_eq!(peer.next().await, None, "{what}");
        in_time(stream.reader.read_to_end(&mut Vec::new())).await.unwrap();
        in_time(server.closed()).await;
        in_time(async { while stream.writer.write_all(&[0; 4096]).await.is_ok() {} }).await;
    }
}

#[tokio::test]
async fn a_number_that_goes_back_or_is_even_ends_the_connection() {
    for second in [7, 5, 8, 0] {
        let (mut peer, _server, _incoming) = Peer::of_server(4096);
        peer.open(7, false).await;
        peer.expect(reply(7)).await;
        peer.open(second, false).await;
        peer.expect(Frame::GoAway { last: 7, status: goodbye::PROTOCOL_ERROR }).await;
    }
}

#[tokio::test]
async fn the_end_comes_after_all_that_was_written() {
    let (mut peer, server, mut incoming) = Peer::of_server(4096);
    peer.open(1, false).await;
    peer.expect(reply(1)).await;
    let mut stream = incoming.recv().await.unwrap();
    let sent = 700_000;
    let work = tokio::spawn(async move {
        stream.writer.write_all(&vec![1; sent]).await.unwrap();
        server.finish().await;
        drop(stream);
    });
    let mut got = 0;
    let farewell = loop {
        match peer.next().await {
            Some(Frame::Data { bytes, .. }) => got += bytes.len(),
            other => break other,
        }
    };
    assert_eq!((got, farewell), (sent, Some(Frame::GoAway { last: 1, status: goodbye::OK })));
    drop(peer);
    in_time(work).await.unwrap();
}

#[tokio::test]
async fn pings_are_answered_but_not_our_own_numbers() {
    let (mut peer, _server, _incoming) = Peer::of_server(4096);
    for id in [1, 2, 4, 3] {
        peer.send(Frame::Ping(id)).await;
    }
    peer.expect(Frame::Ping(1)).await;
    peer.expect(Frame::Ping(3)).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_its_answers_is_not_read() {
    let (mut peer, _server, _incoming) = Peer::of_server(4096);
    peer.flood(Frame::Ping(1), 1 << 20).await;
}

#[tokio::test(start_paused = true)]
async fn data_that_nobody_reads_is_left_in_the_socket_even_if_it_comes_in_single_bytes() {
    // What one stream keeps, and what is in the socket.
    let limit = 4 << 20;
    for bytes in [Bytes::from(vec![0; 32 * 1024]), Bytes::from_static(b"x")] {
        let (mut peer, _server, mut incoming) = Peer::of_server(4096);
        peer.open(1, false).await;
        let mut stream = incoming.recv().await.unwrap();
        let taken = peer.flood(Frame::Data { id: 1, fin: false, bytes }, limit).await;
        assert!(taken > 64 * 1024);
        // It goes on when it is read.
        in_time(stream.reader.read_exact(&mut [0; 4096])).await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_whose_reader_is_gone_holds_up_nobody() {
    let (mut peer, _server, mut incoming) = Peer::of_server(64 * 1024);
    for id in [1, 3] {
        peer.open(id, false).await;
        peer.expect(reply(id)).await;
    }
    let (first, mut second) = (incoming.recv().await.unwrap(), incoming.recv().await.unwrap());
    drop(first.reader);
    in_time(async {
        for _ in 0..64 {
            peer.data(1, false, &[0; 32 * 1024]).await;
        }
        peer.data(3, false, b"news").await;
    })
    .await;
    let mut got = [0; 4];
    in_time(second.reader.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"news");
}

#[tokio::test]
async fn a_peer_that_heeds_windows_gets_updates_for_small_pieces_too() {
    let (mut peer, _server, mut incoming) = Peer::of_server(64 * 1024);
    peer.open(1, false).await;
    let mut stream = incoming.recv().await.unwrap();
    let reading = tokio::spawn(async move { stream.reader.read_to_end(&mut Vec::new()).await });
    for _ in 0..100 {
        peer.data(1, false, &[0; 1000]).await;
    }
    let (mut of_stream, mut of_connection) = (0, 0);
    while of_stream < 84_000 || of_connection < 84_000 {
        match peer.receive().await {
            Some(Frame::WindowUpdate { id: 0, delta }) => of_connection += delta,
            Some(Frame::WindowUpdate { id: 1, delta }) => of_stream += delta,
            other => assert_eq!(other, Some(reply(1))),
        }
    }
    assert!(of_stream <= 100_000 && of_connection <= 100_000);
    peer.data(1, true, b"").await;
    assert_eq!(in_time(reading).await.unwrap().unwrap(), 100_000);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_makes_writers_wait_and_readers_do_not() {
    let (mut peer, _server, mut incoming) = Peer::of_server(4096);
    for id in [1, 3] {
        peer.open(id, false).await;
    }
    let (mut output, mut input) = (incoming.recv().await.unwrap(), incoming.recv().await.unwrap());
    let mut taken = 0;
    let limit = Duration::from_millis(200);
    while let Ok(count) = timeout(limit, output.writer.write(&[0; 32 * 1024])).await {
        taken += count.unwrap();
        assert!(taken < 4 << 20, "nobody reads, and {taken} bytes were taken");
    }
    peer.data(3, false, b"typed").await;
    let mut got = [0; 5];
    in_time(input.reader.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"typed");
}

/// As much as a server in Go takes of one before it reads no other: 50 frames as its clients write them.
#[tokio::test(start_paused = true)]
async fn a_stream_that_nobody_reads_lets_others_through_for_fifty_frames() {
    let (mut peer, _server, mut incoming) = Peer::of_server(4096);
    for id in [1, 3] {
        peer.open(id, false).await;
    }
    let (unread, mut other) = (incoming.recv().await.unwrap(), incoming.recv().await.unwrap());
    in_time(async {
        for _ in 0..50 {
            peer.data(1, false, &[0; 32 * 1024]).await;
        }
        peer.data(3, false, b"other").await;
        let mut got = [0; 5];
        other.reader.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"other");
    })
    .await;
    drop(unread);
}

#[tokio::test(start_paused = true)]
async fn an_unread_farewell_does_not_hold_a_connection_for_ever() {
    let (mut peer, server, mut incoming) = Peer::of_server(4096);
    peer.open(1, false).await;
    let mut stream = incoming.recv().await.unwrap();
    while timeout(Duration::from_millis(100), stream.writer.write(&[0; 32 * 1024])).await.is_ok() {}
    peer.io.write_all(&[0xff; 8]).await.unwrap();
    in_time(server.closed()).await;
    in_time(async { while stream.writer.write_all(&[0; 4096]).await.is_ok() {} }).await;
}
