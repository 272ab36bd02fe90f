//! Arbitrary bytes as a layer's tar.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| a3s_box_image::fuzzing::tar_to_erofs(bytes));
