//! End-to-end suite against a running daemon.
