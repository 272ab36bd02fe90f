//! SPDY/3.1, both sides: many byte streams over one connection, which may be any byte stream (a socket, a tunnel in
//! WebSocket).
//!
//! ```text
//! control frame   1 | version 3 (15) | type (16) | flags (8) | length (24) | payload
//! data frame      0 | stream id (31)             | flags (8) | length (24) | bytes
//! ```
//!
//! Header blocks of all frames of one direction are one zlib stream with a dictionary that both sides know; each block
//! ends in a sync flush. A side ends its direction of a stream with the flag FIN; RST_STREAM ends both. Who breaks the
//! protocol gets GOAWAY.
//!
//! # What bounds memory
//!
//! The library of kubelet's clients neither sends WINDOW_UPDATE nor heeds it, so nothing here waits for one. Instead:
//!
//! - The socket is not read while the stream whose data comes next is full, or while all of a connection's streams
//!   together hold as much as a connection may. A stream whose reader is gone throws its data away.
//! - Writers wait while the socket takes nothing; their queue is one for the connection and in order, so the streams
//!   take turns.
//! - What answers the peer (SYN_REPLY, PING, RST_STREAM) is counted: one that does not read its answers is not read.
//! - Peers that do heed windows get their updates as data is taken in; of those that wait, the sum is kept.
//! - Streams, headers, and the sizes of control frames and of decompressed header blocks have limits.
//!
//! Reference: the draft "SPDY Protocol - Draft 3.1", sections 2.2 (framing), 2.3 (streams), 2.6 (control frames), 2.6.10
//! (header block).

mod connection;
mod dictionary;
mod frame;
mod headers;
mod outbox;
mod reader;
mod streams;
#[cfg(test)]
mod tests;
mod writer;

pub use connection::{Connection, Incoming, Stream};
pub use frame::{Decoder, Encoder, Frame, SpdyError, goodbye, status};
pub use headers::Headers;
