//! WebSocket: channels of `*.channel.k8s.io`, and SPDY tunnelled through it.
//!
//! Every message begins with a channel number. With the plain protocols that is a byte of a binary message, with the
//! `base64` ones a digit of a text message whose rest is base64. From v5 on, the message `255, channel` closes a
//! channel, which is how a client ends its input.
//!
//! Reference: Kubernetes `apimachinery/pkg/util/remotecommand` and `streaming/pkg/httpstream/wsstream`, RFC 6455.

pub mod channels;
mod connection;

pub(crate) use connection::{Connection, accept_key, tunnel};
