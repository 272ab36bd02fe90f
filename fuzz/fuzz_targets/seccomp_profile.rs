//! Arbitrary bytes as a seccomp profile of the node.
#![no_main]

libfuzzer_sys::fuzz_target!(|content: &[u8]| a3s_box_policy::seccomp::fuzz_profile(content));
