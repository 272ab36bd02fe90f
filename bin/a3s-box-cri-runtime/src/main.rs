//! The CRI daemon: configuration, tracing, composition root.

fn main() {}
