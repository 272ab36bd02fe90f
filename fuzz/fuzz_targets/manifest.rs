//! Arbitrary bytes as a manifest, an index and a config.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| a3s_box_image::fuzzing::manifest(bytes));
