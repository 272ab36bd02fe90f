//! Layers: streamed, and taken up again where a connection broke.

use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::{Response, StatusCode};
use tokio::time::timeout;

use super::endpoint::{Endpoint, Want};
use super::error::{RegistryError, innermost};
use super::{Refused, Repository};
use crate::digest::Digest;

/// So much progress makes earlier breaks forgotten.
const FORGIVEN_AFTER: u64 = 4 << 20;
/// How long a response may take to end once all of its bytes are there.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Where a blob's bytes go, in order.
pub(crate) trait BlobSink {
    /// Takes bytes; `false` when no more are wanted.
    async fn take(&mut self, bytes: Bytes) -> bool;
}

/// A transfer under way.
struct Transfer<'a> {
    digest: &'a Digest,
    size: u64,
    what: String,
    got: u64,
    /// A host has refused to send a part only: the whole is asked for, and what is known is skipped.
    no_ranges: bool,
    /// Time spent waiting for the network, not for the sink.
    waited: Duration,
}

/// Why a response gave no more bytes.
enum End {
    Complete,
    /// The sink wants no more.
    Refused,
    Broken(String),
}

impl Repository {
    /// Sends a blob's bytes to a sink. Its digest is for the sink to check, which sees all bytes.
    /// When the sink refuses more, that is success.
    pub(crate) async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        sink: &mut impl BlobSink,
    ) -> Result<(), RegistryError> {
        let what = format!("blob {digest}");
        let mut transfer = Transfer { digest, size, what, got: 0, no_ranges: false, waited: Duration::ZERO };
        let (mut breaks, mut last_break) = (0, 0);
        loop {
            let (response, host) = match self.open(&transfer).await {
                Err(error) if transfer.got > 0 && !transfer.no_ranges && error.refuses_range() => {
                    transfer.no_ranges = true;
                    continue;
                }
                opened => opened?,
            };
            match self.copy(response, &host, &mut transfer, sink).await? {
                End::Complete | End::Refused => return Ok(()),
                End::Broken(detail) => {
                    if transfer.got >= last_break + FORGIVEN_AFTER {
                        breaks = 0;
                    }
                    if breaks >= self.retries.attempts {
                        let (what, got) = (transfer.what, transfer.got);
                        return Err(RegistryError::Broken { host, what, got, detail });
                    }
                    let pause = self.retries.pause.saturating_mul(1 << breaks.min(16));
                    tracing::debug!(%host, got = transfer.got, %detail, "{} broke off, going on", transfer.what);
                    tokio::time::sleep(pause.min(self.retries.longest_pause)).await;
                    breaks += 1;
                    last_break = transfer.got;
                }
            }
        }
    }

    /// Asks the hosts for the rest of a blob.
    async fn open(&self, transfer: &Transfer<'_>) -> Result<(Response, String), RegistryError> {
        let url = format!("{}/blobs/{}", self.path, transfer.digest);
        let (what, offset) = (&transfer.what, if transfer.no_ranges { 0 } else { transfer.got });
        let want = Want { what, path: &url, accept: "*/*", offset, anonymous_elsewhere: false };
        let mut refused = Refused::default();
        for endpoint in self.able("pull") {
            if refused.settles(endpoint) {
                continue;
            }
            match open_at(endpoint, &want, transfer.size).await {
                Ok(opened) => return Ok(opened),
                Err(error) => refused.by(error),
            }
        }
        Err(refused.error(&transfer.what, "pull"))
    }

    async fn copy(
        &self,
        mut response: Response,
        host: &str,
        transfer: &mut Transfer<'_>,
        sink: &mut impl BlobSink,
    ) -> Result<End, RegistryError> {
        // Without support for ranges the blob starts over.
        let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { transfer.got };
        let allowed = self.timeouts.idle + Duration::from_secs(transfer.size / self.timeouts.slowest.max(1));
        loop {
            let begun = Instant::now();
            let whole = transfer.got == transfer.size;
            let patience = if whole { self.timeouts.idle.min(LAST_WORD) } else { self.timeouts.idle };
            let chunk = timeout(patience, response.chunk()).await;
            transfer.waited += begun.elapsed();
            let too_slow = |step, limit| {
                Err(RegistryError::Timeout {
                    host: host.to_owned(),
                    what: transfer.what.clone(),
                    step,
                    limit,
                })
            };
            let mut bytes = match chunk {
                // However the response ends: whether these are the right bytes, the digest says. To ask for the
                // rest of a blob that has none would be answered with an error.
                Err(_) | Ok(Err(_) | Ok(None)) if whole => return Ok(End::Complete),
                Err(_) => return too_slow("go on sending", self.timeouts.idle),
                Ok(Err(error)) => return Ok(End::Broken(innermost(&error.without_url()))),
                Ok(Ok(None)) => {
                    return Ok(End::Broken(format!("{} bytes are missing", transfer.size - transfer.got)));
                }
                Ok(Ok(Some(bytes))) => bytes,
            };
            if transfer.waited > allowed {
                return too_slow("finish sending", allowed);
            }
            let skipped = skip.min(bytes.len() as u64);
            skip -= skipped;
            let _ = bytes.split_to(skipped as usize);
            if bytes.is_empty() {
                continue;
            }
            transfer.got += bytes.len() as u64;
            if transfer.got > transfer.size {
                let (expected, got) = (transfer.size, transfer.got);
                let what = transfer.what.clone();
                return Err(RegistryError::Length { host: host.to_owned(), what, expected, got });
            }
            if !sink.take(bytes).await {
                return Ok(End::Refused);
            }
        }
    }
}

/// Asks one host for the rest of a blob of known size.
async fn open_at(
    endpoint: &Endpoint,
    want: &Want<'_>,
    size: u64,
) -> Result<(Response, String), RegistryError> {
    let (response, host) = endpoint.get(want).await?;
    let expected = match response.status() {
        StatusCode::PARTIAL_CONTENT => size - want.offset,
        _ => size,
    };
    match response.content_length() {
        Some(got) if got != expected => {
            Err(RegistryError::Length { host, what: want.what.to_owned(), expected, got })
        }
        Some(_) | None => Ok((response, host)),
    }
}
