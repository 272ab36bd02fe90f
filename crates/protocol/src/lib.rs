//! The wire between host and guest agent: messages, ports and stream framing.
