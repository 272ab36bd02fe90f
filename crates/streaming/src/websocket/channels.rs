//! The channels inside WebSocket messages, without any I/O: each binary message begins with its channel's number.

use thiserror::Error;

/// The highest channel of remotecommand: stdin, stdout, stderr, error, resize.
pub const LAST_REMOTECOMMAND_CHANNEL: u8 = 4;

/// In v5, stands before the number of a channel whose sender has ended it.
const CLOSE: u8 = 255;

/// What one message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message<'a> {
    /// Bytes of a channel; there can be none.
    Data {
        /// The channel's number.
        channel: u8,
        /// What was sent.
        bytes: &'a [u8],
    },
    /// The sender has ended this channel; only in v5.
    Close {
        /// The channel's number.
        channel: u8,
    },
}

/// Why a message is not one of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChannelError {
    /// Not even a channel's number.
    #[error("a WebSocket message is empty; it must begin with the number of its channel")]
    Empty,
    /// A channel that the connection does not have.
    #[error("a WebSocket message names channel {channel}; the last one is {last}")]
    UnknownChannel {
        /// The number in the message.
        channel: u8,
        /// The highest number that the connection has.
        last: u8,
    },
    /// A close signal is exactly two bytes.
    #[error("a close signal on WebSocket has {length} bytes; it must have 2")]
    CloseLength {
        /// The message's length.
        length: usize,
    },
}

/// Reads one binary message of a connection with channels 0 to `last`; `close_signal` is true from v5 on.
pub fn decode(message: &[u8], last: u8, close_signal: bool) -> Result<Message<'_>, ChannelError> {
    let (&first, rest) = message.split_first().ok_or(ChannelError::Empty)?;
    if close_signal && first == CLOSE {
        let &[channel] = rest else {
            return Err(ChannelError::CloseLength { length: message.len() });
        };
        return known(channel, last).map(|channel| Message::Close { channel });
    }
    known(first, last).map(|channel| Message::Data { channel, bytes: rest })
}

/// Writes one binary message.
pub fn encode(message: Message<'_>) -> Vec<u8> {
    match message {
        Message::Data { channel, bytes } => [&[channel], bytes].concat(),
        Message::Close { channel } => vec![CLOSE, channel],
    }
}

fn known(channel: u8, last: u8) -> Result<u8, ChannelError> {
    if channel <= last { Ok(channel) } else { Err(ChannelError::UnknownChannel { channel, last }) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_v5_knows_the_close_signal() {
        assert_eq!(decode(&[255, 0], 4, true), Ok(Message::Close { channel: 0 }));
        let unknown = ChannelError::UnknownChannel { channel: 255, last: 4 };
        assert_eq!(decode(&[255, 0], 4, false), Err(unknown));
    }

    #[test]
    fn malformed_messages_are_refused() {
        assert_eq!(decode(&[], 4, true), Err(ChannelError::Empty));
        assert_eq!(decode(&[255], 4, true), Err(ChannelError::CloseLength { length: 1 }));
        assert_eq!(decode(&[255, 0, 0], 4, true), Err(ChannelError::CloseLength { length: 3 }));
        let unknown = ChannelError::UnknownChannel { channel: 5, last: 4 };
        assert_eq!(decode(&[5, 1], 4, true), Err(unknown));
        assert_eq!(decode(&[255, 5], 4, true), Err(unknown));
    }

    proptest! {
        #[test]
        fn what_is_decoded_encodes_to_the_same_bytes(message: Vec<u8>, last in 0..=200_u8, v5: bool) {
            if let Ok(decoded) = decode(&message, last, v5) {
                prop_assert_eq!(encode(decoded), message);
            }
        }

        #[test]
        fn data_arrives_as_it_was_sent(channel in 0..=LAST_REMOTECOMMAND_CHANNEL, bytes: Vec<u8>, v5: bool) {
            let sent = Message::Data { channel, bytes: &bytes };
            let message = encode(sent);
            prop_assert_eq!(decode(&message, LAST_REMOTECOMMAND_CHANNEL, v5), Ok(sent));
        }
    }
}
