//! Arbitrary bytes as SPDY: frames or an error, and frames survive being encoded.

#![no_main]

use a3s_box_streaming::spdy::{Decoder, Encoder};
use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    // The first byte says where the connection's reads break the bytes apart.
    let Some((cut, bytes)) = input.split_first() else { return };
    let at = usize::from(*cut).min(bytes.len());
    let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
    let (mut encoder, mut out) = (Encoder::default(), BytesMut::new());
    let mut frames = Vec::new();
    for part in [&bytes[..at], &bytes[at..]] {
        buffer.extend_from_slice(part);
        while let Ok(Some(frame)) = decoder.next(&mut buffer) {
            if encoder.put(&frame, &mut out).is_ok() {
                frames.push(frame);
            }
        }
    }
    let mut decoder = Decoder::default();
    for frame in frames {
        assert_eq!(decoder.next(&mut out), Ok(Some(frame)));
    }
});
