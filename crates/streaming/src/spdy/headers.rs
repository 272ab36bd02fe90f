//! Header blocks: one zlib stream per direction, with a dictionary, for as long as the connection lives.

use bytes::{Buf, BufMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

use super::dictionary;
use super::frame::SpdyError;

/// Header names, lower case, with their values, in order.
pub type Headers = Vec<(String, String)>;

/// The largest block after decompression.
pub(super) const MAX_BYTES: usize = 64 * 1024;
/// The most headers of one block.
pub(super) const MAX_COUNT: u32 = 128;

/// Blocks to headers.
#[derive(Debug)]
pub(super) struct Unpacker {
    inflate: Decompress,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self { inflate: Decompress::new(true) }
    }
}

impl Unpacker {
    pub(super) fn unpack(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut plain = Vec::with_capacity(1024);
        loop {
            if plain.len() > MAX_BYTES {
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
            // Room that is left means that there is no more to come.
            if block.is_empty() && plain.len() < plain.capacity() || !progress {
                break;
            }
        }
        match block {
            [] if plain.len() > MAX_BYTES => Err(SpdyError::HeadersTooLarge),
            [] => Ok(plain),
            _ => Err(SpdyError::Compression),
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, SpdyError> {
    let count = block.try_get_u32().map_err(|_| SpdyError::Headers)?;
    if count > MAX_COUNT {
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

/// Headers to blocks.
#[derive(Debug)]
pub(super) struct Packer {
    deflate: Compress,
    /// The dictionary is set before the first byte.
    fresh: bool,
}

impl Default for Packer {
    fn default() -> Self {
        Self { deflate: Compress::new(Compression::fast(), true), fresh: true }
    }
}

impl Packer {
    pub(super) fn pack(&mut self, headers: &Headers) -> Result<Vec<u8>, SpdyError> {
        let mut plain = Vec::new();
        plain.put_u32(headers.len() as u32);
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.put_u32(text.len() as u32);
            plain.put_slice(text.as_bytes());
        }
        // Checked before the first byte is compressed: a block that is not sent would break all that follow.
        if plain.len() > MAX_BYTES || headers.len() > MAX_COUNT as usize {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    /// Both blocks were captured from Go's moby/spdystream as a client: two streams of one connection.
    #[test]
    fn blocks_of_a_client_in_go_are_read_one_after_the_other() {
        let mut unpacker = Unpacker::default();
        for (block, expected) in GO_BLOCKS {
            let expected: Headers =
                expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            let mut headers = unpacker.unpack(&hex(block)).unwrap();
            headers.sort();
            assert_eq!(headers, expected);
        }
    }

    /// Made with Python's zlib and the dictionary.
    #[test]
    fn a_block_of_another_implementation_is_read() {
        let block = hex("78f9e3c6a7c202a6234650ca0a2e294a4dcc851625aca9a08006000000ffff");
        let expected = vec![("streamtype".to_owned(), "error".to_owned())];
        assert_eq!(Unpacker::default().unpack(&block).unwrap(), expected);
    }

    #[test]
    fn lengths_that_lie_are_errors() {
        assert_eq!(parse(&[0, 0]), Err(SpdyError::Headers));
        assert_eq!(parse(&[0, 0, 0, 1, 0, 0, 0, 9, b'x']), Err(SpdyError::Headers));
        assert_eq!(parse(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]), Err(SpdyError::Headers));
        assert_eq!(parse(&[0, 0, 0, 1, 0, 0, 0, 1, 0xff, 0, 0, 0, 0]), Err(SpdyError::Headers), "not UTF-8");
        assert_eq!(parse(&[0xff, 0, 0, 1]), Err(SpdyError::HeadersTooLarge));
    }

    #[test]
    fn what_nobody_would_read_is_not_packed_and_breaks_nothing() {
        let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
        let headers = |length| vec![("name".to_owned(), "v".repeat(length))];
        assert_eq!(packer.pack(&headers(MAX_BYTES)), Err(SpdyError::HeadersTooLarge));
        for length in [MAX_BYTES - 100, 0, 1000] {
            assert_eq!(unpacker.unpack(&packer.pack(&headers(length)).unwrap()), Ok(headers(length)));
        }
    }

    #[test]
    fn a_block_after_the_end_of_its_zlib_stream_is_an_error() {
        let mut deflate = Compress::new(Compression::fast(), true);
        let mut block = Vec::with_capacity(1024);
        deflate.compress_vec(&[0; 4], &mut block, FlushCompress::Finish).unwrap();
        let mut unpacker = Unpacker::default();
        assert_eq!(unpacker.unpack(&block), Ok(Vec::new()));
        assert_eq!(unpacker.unpack(&block), Err(SpdyError::Compression));
    }

    const GO_BLOCKS: [(&str, &[(&str, &str)]); 2] = [
        ("78f9e3c6a7c26260606004a7b392a2d4c45c6851c29a0a0a6800000000ffff", &[("streamtype", "error")]),
        (
            "02a5470c297650819d5a540c29b38bc0d9c3c2c0c280818181b30812c799a0b4cf6800000000ffff",
            &[("port", "8080"), ("requestid", "0"), ("streamtype", "headers")],
        ),
    ];
}
