//! Messages and what they mean. No I/O: what parses foreign bytes can be tested and fuzzed alone.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use thiserror::Error;
use tokio_tungstenite::tungstenite::Message;

/// The message that closes a channel begins with it.
const CLOSE: u8 = 255;

/// How channels are carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Binary messages, the channel's number as a byte.
    Binary,
    /// Text messages, the channel's number as a digit.
    Base64,
}

/// A protocol of channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// 1 to 5.
    pub version: u8,
    /// How bytes are carried.
    pub encoding: Encoding,
}

/// A message that is not of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChannelError {
    /// No channel number.
    #[error("a message without a channel number")]
    Empty,
    /// Not base64, or no digit before it.
    #[error("a text message that is no channel digit with base64")]
    Base64,
}

/// What a client said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a channel.
    Data(u8, Bytes),
    /// A channel has ended.
    Close(u8),
    /// Nothing that matters here: a ping, a pong.
    Other,
    /// The client says good-bye.
    Bye,
}

impl Protocol {
    /// The newest, in which a channel can be closed.
    pub(crate) const V5: Self = Self { version: 5, encoding: Encoding::Binary };

    /// The protocol of a name; an empty one is the oldest.
    pub fn named(name: &str) -> Option<Self> {
        let (version, encoding) = match name {
            "" | "channel.k8s.io" => (1, Encoding::Binary),
            "v2.channel.k8s.io" => (2, Encoding::Binary),
            "v3.channel.k8s.io" => (3, Encoding::Binary),
            "v4.channel.k8s.io" => (4, Encoding::Binary),
            "v5.channel.k8s.io" => (5, Encoding::Binary),
            "base64.channel.k8s.io" => (1, Encoding::Base64),
            "v4.base64.channel.k8s.io" => (4, Encoding::Base64),
            _ => return None,
        };
        Some(Self { version, encoding })
    }

    /// What a message means.
    pub fn decode(self, message: Message) -> Result<Event, ChannelError> {
        match message {
            Message::Binary(mut bytes) => {
                if bytes.is_empty() {
                    return Err(ChannelError::Empty);
                }
                let channel = bytes.split_to(1)[0];
                match (channel, bytes.as_ref()) {
                    (CLOSE, [closed]) if self.version >= 5 => Ok(Event::Close(*closed)),
                    _ => Ok(Event::Data(channel, bytes)),
                }
            }
            Message::Text(text) => {
                let (digit, rest) = text.as_bytes().split_first().ok_or(ChannelError::Empty)?;
                let channel = digit.checked_sub(b'0').filter(|n| *n <= 9).ok_or(ChannelError::Base64)?;
                match self.encoding {
                    Encoding::Binary => Ok(Event::Data(channel, Bytes::copy_from_slice(rest))),
                    Encoding::Base64 => {
                        let bytes = STANDARD.decode(rest).map_err(|_| ChannelError::Base64)?;
                        Ok(Event::Data(channel, bytes.into()))
                    }
                }
            }
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => Ok(Event::Other),
            Message::Close(_) => Ok(Event::Bye),
        }
    }

    /// Bytes of a channel as a message.
    pub fn encode(self, channel: u8, bytes: &[u8]) -> Message {
        match self.encoding {
            Encoding::Binary => {
                let mut message = Vec::with_capacity(bytes.len() + 1);
                message.push(channel);
                message.extend_from_slice(bytes);
                Message::Binary(message.into())
            }
            Encoding::Base64 => {
                let mut message = String::with_capacity(bytes.len() / 3 * 4 + 8);
                message.push(char::from(b'0' + channel % 10));
                STANDARD.encode_string(bytes, &mut message);
                Message::Text(message.into())
            }
        }
    }

    /// The message that ends a channel, where there is one.
    pub fn encode_close(self, channel: u8) -> Option<Message> {
        (self.version >= 5).then(|| Message::Binary(vec![CLOSE, channel].into()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn protocol(name: &str) -> Protocol {
        Protocol::named(name).unwrap()
    }

    #[test]
    fn closing_a_channel_is_a_message_since_version_5_only() {
        let message = || Message::Binary(vec![255, 0].into());
        assert_eq!(protocol("v5.channel.k8s.io").decode(message()), Ok(Event::Close(0)));
        let data = Event::Data(255, Bytes::from_static(&[0]));
        assert_eq!(protocol("v4.channel.k8s.io").decode(message()), Ok(data));
        assert_eq!(protocol("v4.channel.k8s.io").encode_close(1), None);
    }

    #[test]
    fn messages_that_are_of_no_channel_are_errors() {
        assert_eq!(protocol("").decode(Message::Binary(Bytes::new())), Err(ChannelError::Empty));
        let base64 = protocol("base64.channel.k8s.io");
        assert_eq!(base64.decode(Message::Text("".into())), Err(ChannelError::Empty));
        assert_eq!(base64.decode(Message::Text("x".into())), Err(ChannelError::Base64));
        assert_eq!(base64.decode(Message::Text("0***".into())), Err(ChannelError::Base64));
        assert_eq!(Protocol::named("v6.channel.k8s.io"), None);
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(
            channel in 0u8..9,
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            name in prop::sample::select(vec!["", "v4.channel.k8s.io", "v5.channel.k8s.io", "base64.channel.k8s.io"]),
        ) {
            let protocol = protocol(name);
            let event = protocol.decode(protocol.encode(channel, &bytes)).unwrap();
            prop_assert_eq!(event, Event::Data(channel, bytes.into()));
        }
    }
}
