//! One box, one operation at a time, also when its caller has stopped waiting.
//!
//! Namespace threads and file operations cannot be cancelled: when the future that started one is dropped, it
//! still runs to its end. Each carries a clone of the operation's turn, so the next operation on that box starts when
//! the last of them has ended, and never races with it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use a3s_box_core::BoxId;
use tokio::sync::{Mutex as Gate, OwnedMutexGuard};

/// Who is working on which box.
#[derive(Debug, Clone, Default)]
pub(crate) struct Turns {
    gates: Arc<Mutex<HashMap<BoxId, Arc<Gate<()>>>>>,
}

/// The right to work on one box; it ends with its last clone.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    _guard: Arc<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits for the box's turn.
    pub(crate) async fn take(&self, id: &BoxId) -> Turn {
        let gate = self.gate(id);
        Turn { _guard: Arc::new(gate.lock_owned().await) }
    }

    fn gate(&self, id: &BoxId) -> Arc<Gate<()>> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        // Holders and waiters have clones of their gate: one without is nobody's.
        gates.retain(|other, gate| other == id || Arc::strong_count(gate) > 1);
        Arc::clone(gates.entry(id.clone()).or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_turn_ends_with_its_last_clone_and_other_boxes_do_not_wait() {
        let turns = Turns::default();
        let (a, b) = (BoxId::from_random([1; 32]), BoxId::from_random([2; 32]));
        let first = turns.take(&a).await;
        let straggler = first.clone();
        drop(first);
        drop(turns.take(&b).await);
        tokio::time::timeout(Duration::from_secs(1), turns.take(&a)).await.unwrap_err();
        drop(straggler);
        drop(turns.take(&a).await);
        assert_eq!(turns.gates.lock().unwrap().len(), 1, "boxes nobody works on are forgotten");
    }
}
