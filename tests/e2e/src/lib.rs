//! What the end-to-end suite and the demo share: an installed layout, a registry with images made here, a daemon of
//! its own in a state folder, a CRI client, and a look at the machine before and after.

pub mod client;
pub mod daemon;
pub mod http;
pub mod image;
pub mod initramfs;
pub mod layout;
pub mod machine;
pub mod network;
pub mod processes;
pub mod registry;
pub mod sample;
pub mod streams;
pub mod terminal;
pub mod wait;
