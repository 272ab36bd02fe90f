//! Frames as bytes. No I/O: what parses foreign bytes can be tested and fuzzed alone.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use thiserror::Error;

use super::dictionary;

/// Header names, lower case, with their values, in order.
pub type Headers = Vec<(String, String)>;

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

/// The largest control frame. Kubernetes' have a few hundred bytes.
const MAX_CONTROL: usize = 64 * 1024;
/// The largest header block after decompression.
const MAX_HEADERS: usize = 64 * 1024;
/// The most headers of one block.
const MAX_HEADER_COUNT: u32 = 128;
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
    #[error("a header block holds more than {MAX_HEADERS} bytes or {MAX_HEADER_COUNT} headers")]
    HeadersTooLarge,
    /// A block whose lengths do not fit its bytes, or that is not UTF-8.
    #[error("a header block is malformed")]
    Headers,
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
#[derive(Debug)]
pub struct Decoder {
    inflate: Decompress,
    partial: Option<Partial>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { inflate: Decompress::new(true), partial: None }
    }
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
                Frame::SynStream { id, fin, headers: self.headers(&payload)? }
            }
            SYN_REPLY => {
                let id = word(&mut payload)? & 0x7fff_ffff;
                Frame::SynReply { id, fin, headers: self.headers(&payload)? }
            }
            HEADERS => {
                let id = word(&mut payload)? & 0x7fff_ffff;
                Frame::Headers { id, fin, headers: self.headers(&payload)? }
            }
            RST_STREAM => Frame::Reset { id: word(&mut payload)? & 0x7fff_ffff, status: word(&mut payload)? },
            PING => Frame::Ping(word(&mut payload)?),
            GOAWAY => Frame::GoAway { last: word(&mut payload)? & 0x7fff_ffff },
            WINDOW_UPDATE => {
                Frame::WindowUpdate { id: word(&mut payload)? & 0x7fff_ffff, delta: word(&mut payload)? }
            }
            // SETTINGS, and what newer clients may send.
            _ => return Ok(None),
        }))
    }

    fn headers(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        parse_headers(&self.inflate_block(block)?)
    }

    fn inflate_block(&mut self, mut block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut plain = Vec::with_capacity(1024);
        loop {
            if plain.len() >= MAX_HEADERS {
                return Err(SpdyError::HeadersTooLarge);
            }
            plain.reserve(1024);
            let (read, written) = (self.inflate.total_in(), self.inflate.total_out());
            match self.inflate.decompress_vec(block, &mut plain, FlushDecompress::Sync) {
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    let known = dictionary::bytes();
                    self.inflate.set_dictionary(&known).map_err(|_| SpdyError::Compression)?;
                }
                Err(_) => return Err(SpdyError::Compression),
            }
            block = &block[(self.inflate.total_in() - read) as usize..];
            let progress = self.inflate.total_in() > read || self.inflate.total_out() > written;
            if block.is_empty() && plain.len() < plain.capacity() || !progress {
                break;
            }
        }
        if block.is_empty() { Ok(plain) } else { Err(SpdyError::Compression) }
    }
}

fn parse_headers(mut block: &[u8]) -> Result<Headers, SpdyError> {
    let count = block.try_get_u32().map_err(|_| SpdyError::Headers)?;
    if count > MAX_HEADER_COUNT {
        return Err(SpdyError::HeadersTooLarge);
    }
    let mut text = || {
        let length = block.try_get_u32().map_err(|_| SpdyError::Headers)? as usize;
        let (text, rest) = block.split_at_checked(length).ok_or(SpdyError::Headers)?;
        block = rest;
        String::from_utf8(text.to_vec()).map_err(|_| SpdyError::Headers)
    };
    (0..count).map(|_| Ok((text()?.to_ascii_lowercase(), text()?))).collect()
}

/// Frames to bytes, one direction of one connection.
#[derive(Debug)]
pub struct Encoder {
    deflate: Compress,
    /// A stream's dictionary is set before its first byte.
    fresh: bool,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { deflate: Compress::new(Compression::fast(), true), fresh: true }
    }
}

impl Encoder {
    /// Appends a frame. Data of more than 16 MiB does not fit into one.
    pub fn put(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<(), SpdyError> {
        match frame {
            Frame::SynStream { id, fin, headers } => {
                let block = self.block(headers)?;
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
            Frame::GoAway { last } => put_words(out, GOAWAY, &[*last, 0]),
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
        let block = self.block(headers)?;
        put_control(out, kind, fin, 4 + block.len());
        out.put_u32(id);
        out.put_slice(&block);
        Ok(())
    }

    fn block(&mut self, headers: &Headers) -> Result<Vec<u8>, SpdyError> {
        let mut plain = Vec::new();
        plain.put_u32(headers.len() as u32);
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.put_u32(text.len() as u32);
            plain.put_slice(text.as_bytes());
        }
        if plain.len() > MAX_HEADERS {
            return Err(SpdyError::HeadersTooLarge);
        }
        if std::mem::take(&mut self.fresh) {
            self.deflate.set_dictionary(&dictionary::bytes()).map_err(|_| SpdyError::Compression)?;
        }
        let mut block = Vec::with_capacity(plain.len() + 64);
        let mut input = plain.as_slice();
        loop {
            let read = self.deflate.total_in();
            self.deflate
                .compress_vec(input, &mut block, FlushCompress::Sync)
                .map_err(|_| SpdyError::Compression)?;
            input = &input[(self.deflate.total_in() - read) as usize..];
            // Room that is left means that the flush is complete.
            if input.is_empty() && block.len() < block.capacity() {
                return Ok(block);
            }
            block.reserve(256);
        }
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
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

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

    /// Made with Python's zlib and the dictionary: the first SYN_STREAM of an exec, as clients in Go send it.
    #[test]
    fn a_block_of_another_implementation_is_read() {
        let block: Vec<u8> = GOLDEN_BLOCK
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        assert_eq!(Decoder::default().headers(&block).unwrap(), headers(&[("streamtype", "error")]));
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
        assert_eq!(parse_headers(&[0, 0, 0, 1, 0, 0, 0, 9, b'x']), Err(SpdyError::Headers));
        assert_eq!(parse_headers(&[0xff, 0, 0, 1]), Err(SpdyError::HeadersTooLarge));
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

    const GOLDEN_BLOCK: &str = "78f9e3c6a7c202a6234650ca0a2e294a4dcc851625aca9a08006000000ffff";
}
