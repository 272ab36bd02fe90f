//! Arbitrary text as a registry's `hosts.toml`.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| a3s_box_image::fuzzing::hosts_toml(text));
