//! Builds, demonstrates and tests a3s-box: build, demo, test.

fn main() {}
