//! Arbitrary text as an image reference.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| a3s_box_image::fuzzing::reference(text));
