//! Ids, specs, pure state machines and seams of a3s-box: no tokio, no I/O.
