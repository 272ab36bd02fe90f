//! The bytes of one output stream that the host has not yet acknowledged.

use std::collections::VecDeque;
use std::io;

use a3s_box_protocol::MAX_UNACKNOWLEDGED;
use thiserror::Error;

/// A pipe holds as much, so one read empties it.
const CHUNK: usize = 64 * 1024;
/// A chunk with less room than this is not worth a system call.
const WORTH_READING: usize = 4 * 1024;

/// An offset that was never sent.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("offset {offset} is beyond the end of the stream at {end}")]
pub struct BeyondEnd {
    /// What the host said.
    pub offset: u64,
    /// What there is.
    pub end: u64,
}

/// A window onto a stream: `base..end` is kept, everything before is acknowledged.
///
/// Bytes are read from the pipe into chunks and sent from there, so the agent copies none of them.
#[derive(Debug, Default)]
pub struct OutputBuffer {
    chunks: VecDeque<Vec<u8>>,
    base: u64,
    end: u64,
    /// Acknowledged bytes of the first chunk.
    skip: usize,
}

impl OutputBuffer {
    /// Offset of the first byte that is kept.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Offset after the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Whether more may be read.
    pub fn has_room(&self) -> bool {
        self.kept() < MAX_UNACKNOWLEDGED
    }

    fn kept(&self) -> usize {
        // At most MAX_UNACKNOWLEDGED plus one chunk, so it fits.
        (self.end - self.base) as usize
    }

    /// Lets `read` append to a chunk's spare capacity; it must not take more than that. Returns how many
    /// bytes came.
    pub fn fill(&mut self, read: impl FnOnce(&mut Vec<u8>) -> io::Result<usize>) -> io::Result<usize> {
        let has_space = self.chunks.back().is_some_and(|c| c.capacity() - c.len() >= WORTH_READING);
        if !has_space {
            self.chunks.push_back(Vec::with_capacity(CHUNK));
        }
        let chunk = self.chunks.back_mut().expect("a chunk was pushed if there was none");
        let before = chunk.len();
        let result = read(chunk);
        let count = chunk.len() - before;
        self.end += count as u64;
        if self.chunks.back().is_some_and(Vec::is_empty) {
            self.chunks.pop_back();
        }
        result.map(|_| count)
    }

    /// Some of the kept bytes from `offset` on; empty only at the end. `offset` must not be before the base.
    pub fn from(&self, offset: u64) -> &[u8] {
        let Some(mut at) = offset.checked_sub(self.base).map(|o| o as usize + self.skip) else { return &[] };
        for chunk in &self.chunks {
            if at < chunk.len() {
                return &chunk[at..];
            }
            at -= chunk.len();
        }
        &[]
    }

    /// Forgets everything before `offset`. Older acknowledgements than the last are no news.
    pub fn acknowledge(&mut self, offset: u64) -> Result<(), BeyondEnd> {
        if offset > self.end {
            return Err(BeyondEnd { offset, end: self.end });
        }
        let Some(count) = offset.checked_sub(self.base) else { return Ok(()) };
        self.base = offset;
        self.skip += count as usize;
        while let Some(first) = self.chunks.front()
            && self.skip >= first.len()
        {
            self.skip -= first.len();
            self.chunks.pop_front();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn append(buffer: &mut OutputBuffer, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = buffer
                .fill(|chunk| {
                    let take = rest.len().min(chunk.capacity() - chunk.len());
                    chunk.extend_from_slice(&rest[..take]);
                    Ok(take)
                })
                .unwrap();
            rest = &rest[count..];
        }
    }

    fn all(buffer: &OutputBuffer, mut offset: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !buffer.from(offset).is_empty() {
            bytes.extend_from_slice(buffer.from(offset));
            offset = buffer.base().max(offset) + buffer.from(offset).len() as u64;
        }
        bytes
    }

    #[test]
    fn a_full_buffer_has_room_again_after_an_acknowledgement() {
        let mut buffer = OutputBuffer::default();
        append(&mut buffer, &vec![1; MAX_UNACKNOWLEDGED]);
        assert!(!buffer.has_room());
        buffer.acknowledge(1).unwrap();
        assert!(buffer.has_room());
    }

    #[test]
    fn a_read_that_fails_leaves_nothing_behind() {
        let mut buffer = OutputBuffer::default();
        assert!(buffer.fill(|_| Err(io::ErrorKind::WouldBlock.into())).is_err());
        assert_eq!((buffer.end(), buffer.chunks.len()), (0, 0));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Append(Vec<u8>),
        Acknowledge(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200).prop_map(Step::Append),
            (1_usize..90_000).prop_map(|n| Step::Append((0..n).map(|i| i as u8).collect())),
            (0_u64..300_000).prop_map(Step::Acknowledge),
        ]
    }

    proptest! {
        #[test]
        fn the_buffer_is_the_unacknowledged_tail_of_the_stream(steps in prop::collection::vec(step(), 0..30)) {
            let (mut buffer, mut stream, mut base) = (OutputBuffer::default(), Vec::new(), 0);
            for step in steps {
                match step {
                    Step::Append(bytes) => {
                        append(&mut buffer, &bytes);
                        stream.extend_from_slice(&bytes);
                    }
                    Step::Acknowledge(offset) if offset > stream.len() as u64 => {
                        prop_assert!(buffer.acknowledge(offset).is_err());
                    }
                    Step::Acknowledge(offset) => {
                        buffer.acknowledge(offset).unwrap();
                        base = base.max(offset);
                    }
                }
                prop_assert_eq!((buffer.base(), buffer.end()), (base, stream.len() as u64));
                prop_assert_eq!(&all(&buffer, base)[..], &stream[base as usize..]);
                let middle = base + (buffer.end() - base) / 2;
                prop_assert_eq!(&all(&buffer, middle)[..], &stream[middle as usize..]);
                let needed: usize = buffer.chunks.iter().map(Vec::len).sum();
                prop_assert!(needed <= stream.len() - base as usize + CHUNK);
            }
        }
    }
}
