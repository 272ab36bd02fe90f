//! What the side that reads and the streams' owners give to the side that writes, besides data.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::frame::Frame;

/// Answers that a peer may let wait. Then nothing of it is read until it takes some.
const MAX_ANSWERS: usize = 1024;

/// Frames in order, and credits, which are added up: a peer that does not read costs a number per stream.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    filled: Notify,
    drained: Notify,
}

#[derive(Debug, Default)]
struct State {
    frames: Vec<Frame>,
    /// By stream; 0 is the connection.
    credits: BTreeMap<u32, u32>,
}

impl Outbox {
    /// Of our own accord. There is at most one such frame for each answer that was given.
    pub(super) fn push(&self, frame: Frame) {
        self.lock().frames.push(frame);
        self.filled.notify_one();
    }

    /// Because of what the peer sent: waits while it takes no answers.
    pub(super) async fn answer(&self, frame: Frame) {
        while self.lock().frames.len() >= MAX_ANSWERS {
            self.drained.notified().await;
        }
        self.push(frame);
    }

    /// Lets the peer send more on a stream.
    pub(super) fn credit(&self, id: u32, bytes: u32) {
        let mut state = self.lock();
        let sum = state.credits.entry(id).or_default();
        *sum = sum.saturating_add(bytes).min(0x7fff_ffff);
        drop(state);
        self.filled.notify_one();
    }

    /// Waits until there is something to take.
    pub(super) async fn filled(&self) {
        while self.is_empty() {
            self.filled.notified().await;
        }
    }

    /// Everything.
    pub(super) fn take(&self) -> Vec<Frame> {
        let State { mut frames, credits } = mem::take(&mut *self.lock());
        self.drained.notify_one();
        frames.extend(credits.into_iter().map(|(id, delta)| Frame::WindowUpdate { id, delta }));
        frames
    }

    fn is_empty(&self) -> bool {
        let state = self.lock();
        state.frames.is_empty() && state.credits.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn credits_add_up_and_answers_wait_for_a_peer_that_takes_none() {
        let outbox = Outbox::default();
        for _ in 0..MAX_ANSWERS {
            outbox.answer(Frame::Ping(1)).await;
            outbox.credit(7, 100);
        }
        let mut next = std::pin::pin!(outbox.answer(Frame::Ping(3)));
        assert!(futures::poll!(&mut next).is_pending());
        let taken = outbox.take();
        assert_eq!(taken.len(), MAX_ANSWERS + 1);
        let credit = Frame::WindowUpdate { id: 7, delta: 100 * MAX_ANSWERS as u32 };
        assert_eq!(taken.last(), Some(&credit));
        next.await;
        assert_eq!(outbox.take(), [Frame::Ping(3)]);
    }
}
