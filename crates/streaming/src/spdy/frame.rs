//! Frames as bytes. No I/O: what parses foreign bytes can be tested and fuzzed alone.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;

use super::headers::{Headers, MAX_BYTES, MAX_COUNT, Packer, Unpacker};

/// Reasons in RST_STREAM (draft 3.1, section 2.6.3).
pub mod status {
    /// The frame is not right.
    pub const PROTOCOL_ERROR: u32 = 1;
    /// There is no such stream.
    pub const INVALID_STREAM: u32 = 2;
    /// The stream was not looked at.
    pub const REFUSED_STREAM: u32 = 3;
    /// Its owner has no use for it any more.
    pub const CANCEL: u32 = 5;
}

/// Reasons in GOAWAY (draft 3.1, section 2.6.6).
pub mod goodbye {
    /// Nothing is wrong.
    pub const OK: u32 = 0;
    /// The other side broke the protocol.
    pub const PROTOCOL_ERROR: u32 = 1;
}

/// The largest control frame. Kubernetes' have a few hundred bytes.
const MAX_CONTROL: usize = 64 * 1024;
/// The most bytes of a data frame that are handed on at once.
const MAX_PIECE: usize = 64 * 1024;

const VERSION: u16 = 3;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Bytes that are not SPDY/3.1, or more of it than anybody needs. The connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpdyError {
    /// Another version's frame.
    #[error("a control frame of version {0}; only SPDY/3.1 is spoken here")]
    Version(u16),
    /// A frame beyond the limit.
    #[error("a control frame of {0} bytes; at most {MAX_CONTROL} are taken")]
    TooLong(usize),
    /// A frame shorter than its type needs.
    #[error("a frame of type {0} is too short")]
    Truncated(u16),
    /// A block that is no zlib stream with the right dictionary.
    #[error("a header block cannot be decompressed")]
    Compression,
    /// A block that unpacks to too much.
    #[error("a header block holds more than {MAX_BYTES} bytes or {MAX_COUNT} headers")]
    HeadersTooLarge,
    /// A block whose lengths do not fit its bytes, or that is not UTF-8.
    #[error("a header block is malformed")]
    Headers,
    /// A stream's number that its opener may not use, or not any more.
    #[error("stream {0} cannot be opened: its number is of the wrong side or lower than an earlier one")]
    StreamId(u32),
    /// An opener that does not heed refusals.
    #[error("streams were opened again and again although {0} had been refused")]
    Flood(usize),
}

/// What a frame says. Types that matter to nobody here (SETTINGS, WINDOW_UPDATE of a peer, unknown ones) are not shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A new stream; with `fin` the sender will send no data on it.
    SynStream {
        /// Odd: a client's.
        id: u32,
        /// Nothing follows.
        fin: bool,
        /// Its headers.
        headers: Headers,
    },
    /// The answer to one.
    SynReply {
        /// The stream.
        id: u32,
        /// Nothing follows.
        fin: bool,
        /// Its headers.
        headers: Headers,
    },
    /// Further headers.
    Headers {
        /// The stream.
        id: u32,
        /// Nothing follows.
        fin: bool,
        /// The headers.
        headers: Headers,
    },
    /// The end of a stream in both directions.
    Reset {
        /// The stream.
        id: u32,
        /// See [`status`].
        status: u32,
    },
    /// To be answered with itself.
    Ping(u32),
    /// No new streams, please.
    GoAway {
        /// The last stream that was accepted.
        last: u32,
        /// See [`goodbye`].
        status: u32,
    },
    /// Further bytes may be sent.
    WindowUpdate {
        /// The stream; 0 is the connection.
        id: u32,
        /// How many.
        delta: u32,
    },
    /// Bytes of a stream: a frame or a piece of one.
    Data {
        /// The stream.
        id: u32,
        /// Nothing follows.
        fin: bool,
        /// The bytes.
        bytes: Bytes,
    },
}

/// A data frame of which not all has come.
#[derive(Debug)]
struct Partial {
    id: u32,
    fin: bool,
    left: usize,
}

/// Bytes to frames, one direction of one connection.
#[derive(Debug, Default)]
pub struct Decoder {
    headers: Unpacker,
    partial: Option<Partial>,
}

impl Decoder {
    /// Takes the next frame out of `buffer`; `None`: more bytes are needed.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, SpdyError> {
        loop {
            if let Some(partial) = self.partial.take() {
                return Ok(self.piece(partial, buffer));
            }
            let Some((head, _)) = buffer.split_first_chunk::<8>() else { return Ok(None) };
            let [b0, b1, b2, b3, flags, l0, l1, l2] = *head;
            let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
            if b0 & 0x80 == 0 {
                let id = u32::from_be_bytes([b0, b1, b2, b3]);
                buffer.advance(8);
                self.partial = Some(Partial { id, fin: flags & FIN != 0, left: length });
                continue;
            }
            let version = u16::from_be_bytes([b0 & 0x7f, b1]);
            if version != VERSION {
                return Err(SpdyError::Version(version));
            }
            if length > MAX_CONTROL {
                return Err(SpdyError::TooLong(length));
            }
            if buffer.len() < 8 + length {
                return Ok(None);
            }
            buffer.advance(8);
            let payload = buffer.split_to(length).freeze();
            if let Some(frame) = self.control(u16::from_be_bytes([b2, b3]), flags & FIN != 0, payload)? {
                return Ok(Some(frame));
            }
        }
    }

    /// Hands on what is there of a data frame.
    fn piece(&mut self, partial: Partial, buffer: &mut BytesMut) -> Option<Frame> {
        let Partial { id, fin, left } = partial;
        let take = left.min(buffer.len()).min(MAX_PIECE);
        if take == 0 && left > 0 {
            self.partial = Some(partial);
            return None;
        }
        let bytes = buffer.split_to(take).freeze();
        if take < left {
            self.partial = Some(Partial { id, fin, left: left - take });
        }
        Some(Frame::Data { id, fin: fin && take == left, bytes })
    }

    fn control(&mut self, kind: u16, fin: bool, mut payload: Bytes) -> Result<Option<Frame>, SpdyError> {
        let word = |payload: &mut Bytes| payload.try_get_u32().map_err(|_| SpdyError::Truncated(kind));
        Ok(Some(match kind {
            SYN_STREAM => {
                let id = word(&mut payload)? & 0x7fff_ffff;
                word(&mut payload)?;
                payload.try_get_u16().map_err(|_| SpdyError::Truncated(kind))?;
                Frame::SynStream { id, fin, headers: self.headers.unpack(&payload)? }
            }
            SYN_REPLY => {
                let id = word(&mut payload)? & 0x7fff_ffff;
                Frame::SynReply { id, fin, headers: self.headers.unpack(&payload)? }
            }
            HEADERS => {
                let id = word(&mut payload)? & 0x7fff_ffff;
                Frame::Headers { id, fin, headers: self.headers.unpack(&payload)? }
            }
            RST_STREAM => Frame::Reset { id: word(&mut payload)? & 0x7fff_ffff, status: word(&mut payload)? },
            PING => Frame::Ping(word(&mut payload)?),
            GOAWAY => Frame::GoAway { last: word(&mut payload)? & 0x7fff_ffff, status: word(&mut payload)? },
            WINDOW_UPDATE => {
                Frame::WindowUpdate { id: word(&mut payload)? & 0x7fff_ffff, delta: word(&mut payload)? }
            }
            // SETTINGS, and what newer clients may send.
            _ => return Ok(None),
        }))
    }
}

/// Frames to bytes, one direction of one connection.
#[derive(Debug, Default)]
pub struct Encoder {
    headers: Packer,
}

impl Encoder {
    /// Appends a frame. Data of more than 16 MiB does not fit into one.
    pub fn put(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<(), SpdyError> {
        match frame {
            Frame::SynStream { id, fin, headers } => {
                let block = self.headers.pack(headers)?;
                put_control(out, SYN_STREAM, *fin, 10 + block.len());
                out.put_u32(*id);
                out.put_u32(0);
                out.put_u16(0);
                out.put_slice(&block);
            }
            Frame::SynReply { id, fin, headers } => self.put_headers(SYN_REPLY, *id, *fin, headers, out)?,
            Frame::Headers { id, fin, headers } => self.put_headers(HEADERS, *id, *fin, headers, out)?,
            Frame::Reset { id, status } => put_words(out, RST_STREAM, &[*id, *status]),
            Frame::Ping(id) => put_words(out, PING, &[*id]),
            Frame::GoAway { last, status } => put_words(out, GOAWAY, &[*last, *status]),
            Frame::WindowUpdate { id, delta } => put_words(out, WINDOW_UPDATE, &[*id, *delta]),
            Frame::Data { id, fin, bytes } => {
                if bytes.len() >= 1 << 24 {
                    return Err(SpdyError::TooLong(bytes.len()));
                }
                out.put_u32(*id);
                out.put_u32(u32::from(u8::from(*fin)) << 24 | bytes.len() as u32);
                out.put_slice(bytes);
            }
        }
        Ok(())
    }

    fn put_headers(
        &mut self,
        kind: u16,
        id: u32,
        fin: bool,
        headers: &Headers,
        out: &mut BytesMut,
    ) -> Result<(), SpdyError> {
        let block = self.headers.pack(headers)?;
        put_control(out, kind, fin, 4 + block.len());
        out.put_u32(id);
        out.put_slice(&block);
        Ok(())
    }
}

fn put_control(out: &mut BytesMut, kind: u16, fin: bool, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u32(u32::from(u8::from(fin)) << 24 | length as u32);
}

fn put_words(out: &mut BytesMut, kind: u16, words: &[u32]) {
    put_control(out, kind, false, words.len() * 4);
    words.iter().for_each(|word| out.put_u32(*word));
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};
    use proptest::prelude::*;

    use super::*;
    use crate::spdy::dictionary;

    fn all(decoder: &mut Decoder, bytes: &[u8]) -> Result<Vec<Frame>, SpdyError> {
        let mut buffer = BytesMut::from(bytes);
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next(&mut buffer)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    fn encoded(frames: &[Frame]) -> BytesMut {
        let (mut encoder, mut out) = (Encoder::default(), BytesMut::new());
        frames.iter().for_each(|frame| encoder.put(frame, &mut out).unwrap());
        out
    }

    fn any_headers() -> impl Strategy<Value = Headers> {
        prop::collection::vec(("[a-z-]{1,20}", ".{0,40}"), 0..12)
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        let id = 1u32..0x7fff_ffff;
        prop_oneof![
            (id.clone(), any::<bool>(), any_headers()).prop_map(|(id, fin, headers)| Frame::SynStream {
                id,
                fin,
                headers
            }),
            (id.clone(), any::<bool>(), any_headers()).prop_map(|(id, fin, headers)| Frame::SynReply {
                id,
                fin,
                headers
            }),
            (id.clone(), any::<u32>()).prop_map(|(id, status)| Frame::Reset { id, status }),
            (id.clone(), any::<u32>()).prop_map(|(last, status)| Frame::GoAway { last, status }),
            (id.clone(), any::<u32>()).prop_map(|(id, delta)| Frame::WindowUpdate { id, delta }),
            (id.clone(), any::<bool>(), any_headers()).prop_map(|(id, fin, headers)| Frame::Headers {
                id,
                fin,
                headers
            }),
            any::<u32>().prop_map(Frame::Ping),
            (id, any::<bool>(), prop::collection::vec(any::<u8>(), 0..300))
                .prop_map(|(id, fin, bytes)| Frame::Data { id, fin, bytes: bytes.into() }),
        ]
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(frames in prop::collection::vec(any_frame(), 0..20)) {
            prop_assert_eq!(all(&mut Decoder::default(), &encoded(&frames)).unwrap(), frames);
        }

        #[test]
        fn arbitrary_bytes_end_in_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            all(&mut Decoder::default(), &bytes).ok();
        }
    }

    #[test]
    fn a_data_frame_is_handed_on_before_all_of_it_is_there() {
        let whole = encoded(&[Frame::Data { id: 3, fin: true, bytes: Bytes::from_static(b"abcdef") }]);
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::from(&whole[..11]);
        let first = Frame::Data { id: 3, fin: false, bytes: Bytes::from_static(b"abc") };
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(first));
        assert_eq!(decoder.next(&mut buffer).unwrap(), None);
        buffer.extend_from_slice(&whole[11..]);
        let rest = Frame::Data { id: 3, fin: true, bytes: Bytes::from_static(b"def") };
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(rest));
    }

    #[test]
    fn lengths_that_lie_are_errors() {
        let decode = |bytes: &[u8]| all(&mut Decoder::default(), bytes);
        assert_eq!(decode(&[0x80, 2, 0, 1, 0, 0, 0, 0]), Err(SpdyError::Version(2)));
        assert_eq!(decode(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]), Err(SpdyError::TooLong(0xff_ffff)));
        assert_eq!(decode(&[0x80, 3, 0, 6, 0, 0, 0, 2, 1, 1]), Err(SpdyError::Truncated(6)));
        assert_eq!(decode(&[0x80, 3, 0, 77, 0, 0, 0, 1, 9]), Ok(vec![]), "unknown types are passed over");
    }

    #[test]
    fn a_block_that_unpacks_to_far_more_is_refused() {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate.set_dictionary(&dictionary::bytes()).unwrap();
        let mut bomb = Vec::with_capacity(60 * 1024);
        deflate.compress_vec(&vec![b'a'; 8 << 20], &mut bomb, FlushCompress::Sync).unwrap();
        let mut out = BytesMut::new();
        put_control(&mut out, SYN_REPLY, false, 4 + bomb.len());
        out.put_u32(1);
        out.put_slice(&bomb);
        assert_eq!(all(&mut Decoder::default(), &out), Err(SpdyError::HeadersTooLarge));
    }
}
