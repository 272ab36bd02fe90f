//! The streaming server: `kubectl exec`, `attach` and `port-forward` reach a container through it.
//!
//! CRI's Exec, Attach and PortForward answer with a URL of this server. Its path carries a token that stands for the
//! request; a client connects, upgrades to SPDY/3.1 or WebSocket, and its streams are handed to a [`Backend`],
//! which knows containers. This crate knows neither CRI's messages nor boxes.

mod activity;
pub mod backend;
mod chunks;
pub mod client;
mod portforward;
mod remotecommand;
pub mod server;
pub mod spdy;
mod tls;
mod tokens;
pub mod websocket;

pub use backend::{Backend, ClientStreams};
pub use chunks::{ChunkReader, ChunkWriter};
pub use server::{BindError, Server, ServerConfig, Urls};
pub use tls::{Pinned, TlsError, TlsFiles};
pub use tokens::TokenError;
