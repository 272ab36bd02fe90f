//! SPDY/3.1, the side that accepts: many byte streams over one connection.
//!
//! ```text
//! control frame   1 | version 3 (15) | type (16) | flags (8) | length (24) | payload
//! data frame      0 | stream id (31)             | flags (8) | length (24) | bytes
//! ```
//!
//! Header blocks of all frames of one direction are one zlib stream with a dictionary that both sides know; each block
//! ends in a sync flush. The library of kubelet's clients neither sends WINDOW_UPDATE nor looks at it, so nothing here
//! waits for one: what bounds memory is that the socket is not read while a stream's buffer is full, and that
//! writers wait while the socket takes nothing. Clients that do honour windows get their updates.
//!
//! Reference: the draft "SPDY Protocol - Draft 3.1", sections 2.2 (framing), 2.6 (control frames), 2.6.10 (header
//! block).

mod connection;
mod dictionary;
mod frame;

pub use connection::{Connection, Incoming, Stream};
pub use frame::{Decoder, Encoder, Frame, Headers, SpdyError, status};
