//! Arbitrary messages as channels: what is understood survives being encoded.

#![no_main]

use a3s_box_streaming::websocket::channels::{Event, Protocol};
use libfuzzer_sys::fuzz_target;
use tokio_tungstenite::tungstenite::Message;

const NAMES: [&str; 5] =
    ["", "v4.channel.k8s.io", "v5.channel.k8s.io", "base64.channel.k8s.io", "v4.base64.channel.k8s.io"];

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    let Some(protocol) = Protocol::named(NAMES[usize::from(*choice) % NAMES.len()]) else { return };
    let mut messages = vec![Message::Binary(bytes.to_vec().into())];
    if let Ok(text) = std::str::from_utf8(bytes) {
        messages.push(Message::Text(text.into()));
    }
    for message in messages {
        if let Ok(Event::Data(channel @ 0..=9, data)) = protocol.decode(message) {
            let again = protocol.decode(protocol.encode(channel, &data));
            assert_eq!(again, Ok(Event::Data(channel, data)));
        }
    }
});
