//! WebSocket, the newer of the two ways in which a client reaches the server.

pub mod channels;
