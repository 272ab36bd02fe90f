//! Whether the agent of a box answers, counted over all daemons that have asked.
//!
//! ```text
//! answering ──no answer──► silent for so long ──longer than the limit──► lost: its VM is ended
//!     ▲                          │
//!     └────────any answer────────┘
//! ```
//!
//! Only time in which a daemon waited for an answer counts: how long nobody asked says nothing of the agent. The count
//! lies in the box's run directory, so that a daemon that starts goes on where the one before it was.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use crate::agent_client::{Agent, AgentError};

/// In the run directory of a box: milliseconds, in digits.
const FILE: &str = "unanswered";

/// Whatever was counted before: an agent that is well answers within milliseconds.
const LAST_CHANCE: Duration = Duration::from_secs(2);

/// How often the count is written while an answer is waited for.
const TICK: Duration = Duration::from_secs(1);

/// Between two attempts to reach an agent.
const PAUSE: Duration = Duration::from_millis(250);

/// The agent has not answered for longer than it may.
#[derive(Debug)]
pub(crate) struct Unreachable;

/// What is known of a box's agent.
#[derive(Debug)]
pub(crate) struct Contact {
    path: PathBuf,
    limit: Duration,
    unanswered: Mutex<Duration>,
    /// Who asks; the others wait for the outcome.
    asking: tokio::sync::Mutex<()>,
}

impl Contact {
    /// Of the box with this run directory, which may be an earlier daemon's. After `limit` without an answer it is lost.
    pub(crate) async fn of(dir: &Path, limit: Duration) -> Self {
        let path = dir.join(FILE);
        let counted = spawn_blocking({
            let path = path.clone();
            move || std::fs::read_to_string(path).ok()?.trim().parse().ok().map(Duration::from_millis)
        });
        let unanswered = counted.await.ok().flatten().unwrap_or_default();
        Self { path, limit, unanswered: Mutex::new(unanswered), asking: tokio::sync::Mutex::default() }
    }

    /// Whether the last that is known is that it did not answer.
    pub(crate) fn is_doubtful(&self) -> bool {
        !self.unanswered().is_zero()
    }

    /// How long an agent that may be lost already is still waited for, at most so long.
    pub(crate) fn patience(&self, most: Duration) -> Duration {
        self.limit.saturating_sub(self.unanswered()).clamp(LAST_CHANCE.min(most), most)
    }

    /// Asks until there is an answer, of whatever kind.
    pub(crate) async fn regain(&self, agent: &Agent) -> Result<(), Unreachable> {
        let _turn = self.asking.lock().await;
        loop {
            let left = self.limit.saturating_sub(self.unanswered());
            if left.is_zero() {
                return Err(Unreachable);
            }
            match timeout(left, self.ask(agent.list_sessions())).await {
                Ok(Ok(_) | Err(AgentError::Refused { .. })) => return Ok(()),
                Ok(Err(AgentError::Lost { .. } | AgentError::Timeout { .. })) => {
                    sleep(PAUSE).await;
                    self.count(PAUSE).await;
                }
                // What was not counted yet is less than a tick.
                Err(_) => self.count(left).await,
            }
        }
    }

    /// Counts the time of a call that gets no answer.
    pub(crate) async fn ask<T>(
        &self,
        call: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, AgentError> {
        tokio::pin!(call);
        let mut counted = Instant::now();
        loop {
            tokio::select! {
                // An answer that has come is not overlooked.
                biased;
                answer = &mut call => {
                    match &answer {
                        Ok(_) | Err(AgentError::Refused { .. }) => self.answered().await,
                        Err(AgentError::Lost { .. } | AgentError::Timeout { .. }) => {
                            self.count(counted.elapsed()).await;
                        }
                    }
                    return answer;
                }
                () = sleep(TICK) => {
                    self.count(counted.elapsed()).await;
                    counted = Instant::now();
                }
            }
        }
    }

    fn unanswered(&self) -> Duration {
        *self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn count(&self, more: Duration) {
        let now = {
            let mut unanswered = self.unanswered.lock().unwrap_or_else(PoisonError::into_inner);
            // Something that counts as nothing would be taken for an answer.
            *unanswered += more.max(Duration::from_millis(1));
            *unanswered
        };
        let path = self.path.clone();
        // Without the file this daemon still counts, and the next one begins anew.
        let _ = spawn_blocking(move || std::fs::write(path, now.as_millis().to_string())).await;
    }

    async fn answered(&self) {
        let before = std::mem::take(&mut *self.unanswered.lock().unwrap_or_else(PoisonError::into_inner));
        if !before.is_zero() {
            let path = self.path.clone();
            let _ = spawn_blocking(move || std::fs::remove_file(path)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> Result<(), AgentError> {
        Err(AgentError::Lost { call: "ListSessions", message: String::new() })
    }

    const LIMIT: Duration = Duration::from_secs(30);

    /// Each daemon that started gave a dead agent another thirty seconds, so that one that was restarted often enough
    /// never ended it.
    #[tokio::test(start_paused = true)]
    async fn silence_is_counted_over_restarts_and_ends_with_an_answer() {
        let dir = tempfile::tempdir().unwrap();
        for life in 0..3 {
            let contact = Contact::of(dir.path(), LIMIT).await;
            assert_eq!(contact.is_doubtful(), life > 0);
            // The daemon ends in the middle of it.
            let silent = contact.ask::<()>(std::future::pending());
            assert!(timeout(Duration::from_millis(5_500), silent).await.is_err());
        }
        let contact = Contact::of(dir.path(), LIMIT).await;
        assert!(contact.unanswered() >= Duration::from_secs(15), "{:?}", contact.unanswered());
        assert!(contact.patience(Duration::from_secs(60)) <= Duration::from_secs(15));
        contact.ask(std::future::ready(lost())).await.unwrap_err();
        assert!(contact.is_doubtful());
        contact.ask(std::future::ready(Ok(()))).await.unwrap();
        assert!(!contact.is_doubtful() && !Contact::of(dir.path(), LIMIT).await.is_doubtful());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_fails_at_once_leaves_a_doubt() {
        let dir = tempfile::tempdir().unwrap();
        let contact = Contact::of(dir.path(), LIMIT).await;
        contact.ask(std::future::ready(lost())).await.unwrap_err();
        assert!(contact.is_doubtful());
    }
}
