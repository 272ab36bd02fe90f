//! The handle both services share, and what every call has in common.

use std::future::Future;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use a3s_box_core::{BoxId, SessionId};
use a3s_box_image::ImageStore;
use a3s_box_runtime::BoxManager;
use a3s_box_streaming::Urls;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};

use crate::convert::{InvalidRequest, non_empty};
use crate::error::CriError;
use crate::settings::CriSettings;

/// RuntimeService and ImageService. Clones share everything.
#[derive(Clone)]
pub struct CriService {
    pub(crate) boxes: BoxManager,
    pub(crate) images: ImageStore,
    pub(crate) streams: Urls,
    pub(crate) settings: Arc<CriSettings>,
    /// Ends streams that have no end of their own.
    pub(crate) stopping: CancellationToken,
}

impl CriService {
    /// The services over a runtime, an image store and a streaming server.
    pub fn new(boxes: BoxManager, images: ImageStore, streams: Urls, settings: CriSettings) -> Self {
        Self { boxes, images, streams, settings: Arc::new(settings), stopping: CancellationToken::new() }
    }

    /// The box a client means. An empty text is no prefix of anything.
    pub(crate) fn box_id(&self, text: String) -> Result<BoxId, CriError> {
        let text = non_empty(text, "pod_sandbox_id")?;
        Ok(self.boxes.find_box(&text)?)
    }

    /// The session a client means.
    pub(crate) fn session_id(&self, text: String) -> Result<SessionId, CriError> {
        let text = non_empty(text, "container_id")?;
        Ok(self.boxes.find_session(&text)?)
    }
}

/// Runs one call: its outcome becomes the answer, a failure is logged once, here.
pub(crate) async fn answer<T>(
    rpc: &'static str,
    work: impl Future<Output = Result<T, CriError>>,
) -> Result<Response<T>, Status> {
    let started = Instant::now();
    let outcome = work.await;
    let took = started.elapsed();
    match outcome {
        Ok(message) => {
            tracing::debug!(rpc, ?took, "answered");
            Ok(Response::new(message))
        }
        Err(error) => {
            tracing::warn!(rpc, ?took, code = ?error.code(), "{error}");
            Err(error.into())
        }
    }
}

/// The answer to a call that this version does not have.
pub(crate) fn unimplemented<T>(rpc: &'static str) -> Result<Response<T>, Status> {
    Err(CriError::Unimplemented { rpc }.into())
}

/// A JSON document for an `info` map. What cannot be shown says so.
pub(crate) fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| format!("{:?}", error.to_string()))
}

/// Nanoseconds since the epoch.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// A span of seconds from CRI, where negative ones mean nothing.
pub(crate) fn seconds(value: i64, field: &str) -> Result<std::time::Duration, InvalidRequest> {
    u64::try_from(value)
        .map(std::time::Duration::from_secs)
        .map_err(|_| InvalidRequest::new(field, format!("{value} is negative; give seconds")))
}
