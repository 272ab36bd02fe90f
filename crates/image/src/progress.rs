//! What a pull tells its observer.

use crate::digest::Digest;

/// Observer of one pull. Calls come from several tasks at once and must not block. Every layer
/// that started also finishes, unless the pull fails.
pub trait PullProgress: Send + Sync + 'static {
    /// The manifest is known: `layers` of them, with `bytes` to download in all as far as known.
    fn resolved(&self, layers: usize, bytes: u64) {
        let _ = (layers, bytes);
    }

    /// A layer starts to download. `size` is its compressed size where the manifest says it.
    fn layer_started(&self, layer: &Digest, size: Option<u64>) {
        let _ = (layer, size);
    }

    /// More bytes of a layer arrived: `downloaded` in all so far.
    fn layer_bytes(&self, layer: &Digest, downloaded: u64) {
        let _ = (layer, downloaded);
    }

    /// A layer is in the store; `reused` when it was there before.
    fn layer_finished(&self, layer: &Digest, reused: bool) {
        let _ = (layer, reused);
    }
}

/// The observer of a pull that nobody watches.
pub(crate) struct Unwatched;

impl PullProgress for Unwatched {}
