//! The guest's PID 1: mounts, sessions, stdio over vsock, power-off.

fn main() {}
