//! The streams of a connection, as both of its sides see them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::chunks::Inbox;

/// As many bytes are let in at a time by one window update.
const CREDIT: u32 = 16 * 1024;

/// The streams that are open: at least one side may still send.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: Mutex<HashMap<u32, Open>>,
}

/// ```text
///            the peer's FIN                 our FIN
/// both ──────────────────────> we send ──────────────────> gone
///   └────── our FIN ──────> it sends ──── its FIN ────────> gone         RST of either side: gone at once
/// ```
#[derive(Debug)]
struct Open {
    /// Where to put what the peer sends, while it may.
    inbox: Option<Inbox>,
    /// Whether we may.
    sending: bool,
    /// Cancelled if the stream ends before we have ended our side.
    unwanted: CancellationToken,
    /// Bytes that came since the last window update.
    uncredited: u32,
}

impl Streams {
    pub(super) fn insert(&self, id: u32, inbox: Inbox, unwanted: CancellationToken) {
        self.lock().insert(id, Open { inbox: Some(inbox), sending: true, unwanted, uncredited: 0 });
    }

    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether data may be sent on it.
    pub(super) fn sends(&self, id: u32) -> bool {
        self.lock().get(&id).is_some_and(|open| open.sending)
    }

    /// Where its data goes.
    pub(super) fn inbox(&self, id: u32) -> Option<Inbox> {
        self.lock().get(&id)?.inbox.clone()
    }

    /// Counts bytes that came; the peer is due a window update for so many.
    pub(super) fn received(&self, id: u32, bytes: u32) -> Option<u32> {
        due(&mut self.lock().get_mut(&id)?.uncredited, bytes)
    }

    /// The peer will send no more on it.
    pub(super) fn end_receiving(&self, id: u32) {
        self.update(id, |open| open.inbox = None);
    }

    /// We shall send no more on it.
    pub(super) fn end_sending(&self, id: u32) {
        self.update(id, |open| open.sending = false);
    }

    /// Ends it at once; `false`: it had ended.
    pub(super) fn remove(&self, id: u32) -> bool {
        let removed = self.lock().remove(&id);
        removed.map(|open| open.unwanted.cancel()).is_some()
    }

    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn update(&self, id: u32, change: impl FnOnce(&mut Open)) {
        let mut streams = self.lock();
        if let Some(open) = streams.get_mut(&id) {
            change(open);
            if open.inbox.is_none() && !open.sending {
                streams.remove(&id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds to what is uncredited; takes it once it is enough for a window update.
pub(super) fn due(uncredited: &mut u32, bytes: u32) -> Option<u32> {
    *uncredited = uncredited.saturating_add(bytes);
    (*uncredited >= CREDIT).then(|| std::mem::take(uncredited))
}
