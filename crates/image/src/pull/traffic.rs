//! What all pulls of a store share: how many layers are made at once, and figures about them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

/// What pulls came to since the store was opened, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PullFigures {
    /// Under way now.
    pub running: u64,
    /// Ended well.
    pub succeeded: u64,
    /// Ended with an error.
    pub failed: u64,
    /// Given up by their callers.
    pub given_up: u64,
    /// Bytes of layers that came from registries and files.
    pub bytes: u64,
    /// Layers that were made.
    pub layers_made: u64,
    /// Layers that were there already.
    pub layers_reused: u64,
}

/// The shared state.
pub(crate) struct Traffic {
    slots: Arc<Semaphore>,
    running: AtomicU64,
    succeeded: AtomicU64,
    failed: AtomicU64,
    given_up: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) layers_made: AtomicU64,
    pub(super) layers_reused: AtomicU64,
}

impl Traffic {
    /// For so many layers at once, of all pulls together.
    pub(crate) fn new(slots: usize) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(slots.max(1))),
            running: AtomicU64::default(),
            succeeded: AtomicU64::default(),
            failed: AtomicU64::default(),
            given_up: AtomicU64::default(),
            bytes: AtomicU64::default(),
            layers_made: AtomicU64::default(),
            layers_reused: AtomicU64::default(),
        }
    }

    pub(crate) fn figures(&self) -> PullFigures {
        let read = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        PullFigures {
            running: read(&self.running),
            succeeded: read(&self.succeeded),
            failed: read(&self.failed),
            given_up: read(&self.given_up),
            bytes: read(&self.bytes),
            layers_made: read(&self.layers_made),
            layers_reused: read(&self.layers_reused),
        }
    }

    /// Waits until a layer may be made. `None` is never answered: nobody closes the semaphore.
    pub(super) async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.slots).acquire_owned().await.ok()
    }
}

/// The right to make a layer. It is held while the network and the disk work, and given back while the layer
/// waits for lower ones: so those who hold it always come to an end.
pub(super) struct Turn {
    pub(super) _slot: Option<OwnedSemaphorePermit>,
    /// Others that want the same layer wait for this one; not for one that is of use to its chain only.
    pub(super) _alone: Option<OwnedMutexGuard<()>>,
}

/// A pull, counted until it is dropped.
pub(super) struct Running<'a> {
    traffic: &'a Traffic,
    image: &'a str,
    begun: Instant,
    ended: bool,
}

impl<'a> Running<'a> {
    pub(super) fn begin(traffic: &'a Traffic, image: &'a str) -> Self {
        traffic.running.fetch_add(1, Ordering::Relaxed);
        Self { traffic, image, begun: Instant::now(), ended: false }
    }

    /// Counts the outcome; answers how many milliseconds it took.
    pub(super) fn end(mut self, well: bool) -> u128 {
        self.ended = true;
        let outcome = if well { &self.traffic.succeeded } else { &self.traffic.failed };
        outcome.fetch_add(1, Ordering::Relaxed);
        self.begun.elapsed().as_millis()
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.traffic.running.fetch_sub(1, Ordering::Relaxed);
        if !self.ended {
            self.traffic.given_up.fetch_add(1, Ordering::Relaxed);
            let ms = self.begun.elapsed().as_millis();
            tracing::info!(image = %self.image, ms, "the pull was given up by its caller");
        }
    }
}
