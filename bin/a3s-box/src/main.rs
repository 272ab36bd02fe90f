//! The command line: run, doctor and friends.

fn main() {}
