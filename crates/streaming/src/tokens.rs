//! Requests that wait for their client, each under a token that only its URL contains.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use thiserror::Error;
use tokio::time::Instant;

/// How long a client has to come.
const LIFETIME: Duration = Duration::from_secs(60);
/// Requests that wait at the same time.
const MAX_WAITING: usize = 1000;

/// Nothing more is taken for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TokenError {
    /// Clients ask and do not come.
    #[error(
        "{MAX_WAITING} streaming requests wait for their clients; use their URLs or try again in a minute"
    )]
    TooMany,
    /// The system gives no random bytes.
    #[error("no random bytes for a token")]
    NoRandom,
}

#[derive(Debug)]
pub(crate) struct Tokens<R> {
    waiting: Mutex<HashMap<String, (Instant, R)>>,
}

impl<R> Tokens<R> {
    pub(crate) fn new() -> Self {
        Self { waiting: Mutex::default() }
    }

    /// Keeps a request; the answer is its token, 192 random bits.
    pub(crate) fn insert(&self, request: R) -> Result<String, TokenError> {
        let mut bytes = [0; 24];
        getrandom::fill(&mut bytes).map_err(|_| TokenError::NoRandom)?;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MAX_WAITING {
            waiting.retain(|_, (since, _)| since.elapsed() < LIFETIME);
        }
        if waiting.len() >= MAX_WAITING {
            return Err(TokenError::TooMany);
        }
        waiting.insert(token.clone(), (Instant::now(), request));
        Ok(token)
    }

    /// Gives the request out, once.
    pub(crate) fn take(&self, token: &str) -> Option<R> {
        let (since, request) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(token)?;
        (since.elapsed() < LIFETIME).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_token_works_once_and_not_for_ever() {
        let tokens = Tokens::new();
        let first = tokens.insert(1).unwrap();
        let second = tokens.insert(2).unwrap();
        assert_ne!(first, second);
        assert_eq!((tokens.take(&first), tokens.take(&first), tokens.take("x")), (Some(1), None, None));
        tokio::time::advance(LIFETIME).await;
        assert_eq!(tokens.take(&second), None);
    }

    #[tokio::test(start_paused = true)]
    async fn clients_that_do_not_come_make_room_after_a_minute() {
        let tokens = Tokens::new();
        for _ in 0..MAX_WAITING {
            tokens.insert(()).unwrap();
        }
        assert_eq!(tokens.insert(()), Err(TokenError::TooMany));
        tokio::time::advance(LIFETIME).await;
        tokens.insert(()).unwrap();
    }
}
