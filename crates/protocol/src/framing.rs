//! One protobuf message on a byte stream: a big-endian `u32` length, then the message.

use prost::Message;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// No framed message is longer than this; a peer that announces more is refused before anything
/// is allocated.
pub const MAX_FRAME: usize = 64 * 1024;

/// A framed message that could not be read or written.
#[derive(Debug, Error)]
pub enum FramingError {
    /// The connection failed or ended within a message.
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    /// The announced length is over [`MAX_FRAME`].
    #[error("a message of {announced} bytes was announced, {MAX_FRAME} are allowed")]
    TooLong {
        /// What the peer announced.
        announced: usize,
    },
    /// The bytes are no such message.
    #[error("the message is malformed: {0}")]
    Malformed(#[from] prost::DecodeError),
}

/// Reads one message.
pub async fn read_message<M: Message + Default>(
    from: &mut (impl AsyncRead + Unpin),
) -> Result<M, FramingError> {
    let announced = from.read_u32().await? as usize;
    if announced > MAX_FRAME {
        return Err(FramingError::TooLong { announced });
    }
    let mut bytes = vec![0; announced];
    from.read_exact(&mut bytes).await?;
    Ok(M::decode(bytes.as_slice())?)
}

/// Writes one message and flushes it.
pub async fn write_message<M: Message>(
    to: &mut (impl AsyncWrite + Unpin),
    message: &M,
) -> Result<(), FramingError> {
    let bytes = message.encode_to_vec();
    if bytes.len() > MAX_FRAME {
        return Err(FramingError::TooLong { announced: bytes.len() });
    }
    let mut frame = Vec::with_capacity(4 + bytes.len());
    frame.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    frame.extend_from_slice(&bytes);
    to.write_all(&frame).await?;
    to.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{StreamAccept, StreamOpen};

    #[tokio::test]
    async fn a_message_survives_the_wire() {
        let (mut a, mut b) = tokio::io::duplex(16);
        let sent = StreamAccept { error: "no such session".to_owned(), offset: 7 };
        let (written, read) =
            tokio::join!(write_message(&mut a, &sent), read_message::<StreamAccept>(&mut b));
        written.unwrap();
        assert_eq!(read.unwrap(), sent);
    }

    #[tokio::test]
    async fn a_lying_length_is_refused_before_it_is_allocated() {
        let mut bytes: &[u8] = &[0xff, 0xff, 0xff, 0xff, 0, 0];
        let error = read_message::<StreamOpen>(&mut bytes).await.unwrap_err();
        assert!(matches!(error, FramingError::TooLong { announced: 0xffff_ffff }));
    }

    #[tokio::test]
    async fn a_connection_that_ends_within_a_message_is_an_error() {
        let mut bytes: &[u8] = &[0, 0, 0, 9, 1];
        assert!(matches!(read_message::<StreamOpen>(&mut bytes).await, Err(FramingError::Io(_))));
    }
}
