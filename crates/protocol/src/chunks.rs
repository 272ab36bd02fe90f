//! How the two directions of a TCP stream share one connection with the guest.
//!
//! Each piece is a big-endian u32 length and as many bytes; length 0 ends its direction, while the other goes on. The
//! end is told in band because not every backend passes on the half-close of a connection.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::MAX_GUEST_WRITE;

/// Octets of a length.
pub const HEADER: usize = 4;

/// The most bytes of one piece: with its length it fits into one write of the guest.
pub const MAX_CHUNK: usize = MAX_GUEST_WRITE - HEADER;

/// Reads a length; `None` is the end of the direction.
pub fn length(header: [u8; HEADER]) -> io::Result<Option<usize>> {
    match u32::from_be_bytes(header) as usize {
        0 => Ok(None),
        length @ 1..=MAX_CHUNK => Ok(Some(length)),
        length => {
            let message = format!("a piece of {length} bytes; at most {MAX_CHUNK} are allowed");
            Err(io::Error::new(io::ErrorKind::InvalidData, message))
        }
    }
}

/// Passes on pieces from `from` as bytes until their end.
pub async fn unpack(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut buffer = vec![0; MAX_CHUNK];
    loop {
        let mut header = [0; HEADER];
        from.read_exact(&mut header).await?;
        let Some(length) = length(header)? else { return to.shutdown().await };
        from.read_exact(&mut buffer[..length]).await?;
        to.write_all(&buffer[..length]).await?;
    }
}

/// Passes on bytes from `from` as pieces, and their end.
pub async fn pack(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; MAX_GUEST_WRITE];
    loop {
        let count = from.read(&mut buffer[HEADER..]).await?;
        buffer[..HEADER].copy_from_slice(&(count as u32).to_be_bytes());
        to.write_all(&buffer[..HEADER + count]).await?;
        if count == 0 {
            return to.flush().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_packed_is_unpacked_with_its_end() {
        let (mut near, mut far) = tokio::io::duplex(1000);
        let sent: Vec<u8> = (0..100_000).map(|i: u32| i as u8).collect();
        let (mut source, mut got) = (sent.as_slice(), Vec::new());
        let (packed, unpacked) = tokio::join!(pack(&mut source, &mut near), unpack(&mut far, &mut got));
        packed.unwrap();
        unpacked.unwrap();
        assert!(got == sent);
    }

    #[tokio::test]
    async fn a_length_that_lies_and_a_missing_end_are_errors() {
        let mut nowhere = Vec::new();
        let mut lie: &[u8] = &[0xff, 0xff, 0xff, 0xff, 1];
        let error = unpack(&mut lie, &mut nowhere).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let mut cut: &[u8] = &[0, 0, 0, 2, 1];
        let error = unpack(&mut cut, &mut nowhere).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
