//! The handle through which everything is asked of boxes and sessions.

use std::sync::Arc;
use std::time::Duration;

use a3s_box_core::image::ResolvedImage;
use a3s_box_core::spec::{BoxSpec, ProcessSpec, SessionSpec};
use a3s_box_core::storage::Storage;
use a3s_box_core::{BoxId, SessionId};
use a3s_box_vmm::Vmm;

use crate::api::{BoxStatus, ExecOutput, NetworkReadiness, SessionStatus};
use crate::attached::Attached;
use crate::config::RuntimeConfig;
use crate::error::RuntimeError;

/// All boxes of this node. Clones share them.
#[derive(Clone)]
pub struct BoxManager {}

#[allow(unused_variables)]
impl BoxManager {
    /// Loads the records and reconciles them with what is found.
    pub async fn start(
        config: RuntimeConfig,
        storage: Arc<dyn Storage>,
        vmm: Arc<dyn Vmm>,
    ) -> Result<BoxManager, RuntimeError> {
        unreachable!()
    }
    /// Makes a box and answers once it is ready. A box of the same identity in the making is joined.
    pub async fn run_box(&self, spec: BoxSpec) -> Result<BoxId, RuntimeError> {
        unreachable!()
    }
    /// Ends a box and all of its sessions. One that is stopped or unknown is success.
    pub async fn stop_box(&self, id: &BoxId) -> Result<(), RuntimeError> {
        unreachable!()
    }
    /// Removes a box, ending it first if need be. An unknown one is success.
    pub async fn remove_box(&self, id: &BoxId) -> Result<(), RuntimeError> {
        unreachable!()
    }
    /// The box whose id starts with the text.
    pub fn find_box(&self, id_or_prefix: &str) -> Result<BoxId, RuntimeError> {
        unreachable!()
    }
    /// A box as it is now.
    pub fn box_status(&self, id: &BoxId) -> Result<BoxStatus, RuntimeError> {
        unreachable!()
    }
    /// All boxes, oldest first.
    pub fn list_boxes(&self) -> Vec<BoxStatus> {
        unreachable!()
    }
    /// Prepares a session in a ready box.
    pub async fn create_session(
        &self,
        box_id: &BoxId,
        spec: SessionSpec,
        image: ResolvedImage,
    ) -> Result<SessionId, RuntimeError> {
        unreachable!()
    }
    /// Executes a session's process.
    pub async fn start_session(&self, id: &SessionId) -> Result<(), RuntimeError> {
        unreachable!()
    }
    /// Sends the stop signal, waits for `grace`, then kills. One that has ended or is unknown is success.
    pub async fn stop_session(&self, id: &SessionId, grace: Duration) -> Result<(), RuntimeError> {
        unreachable!()
    }
    /// Removes a session, killing it first if need be. An unknown one is success.
    pub async fn remove_session(&self, id: &SessionId) -> Result<(), RuntimeError> {
        unreachable!()
    }
    /// The session whose id starts with the text.
    pub fn find_session(&self, id_or_prefix: &str) -> Result<SessionId, RuntimeError> {
        unreachable!()
    }
    /// A session as it is now.
    pub fn session_status(&self, id: &SessionId) -> Result<SessionStatus, RuntimeError> {
        unreachable!()
    }
    /// All sessions, oldest first.
    pub fn list_sessions(&self) -> Vec<SessionStatus> {
        unreachable!()
    }
    /// Runs a further process in a session to its end. What `process` leaves empty is the session's own.
    pub async fn exec_sync(
        &self,
        id: &SessionId,
        process: ProcessSpec,
        limit: Option<Duration>,
        max_output: usize,
    ) -> Result<ExecOutput, RuntimeError> {
        unreachable!()
    }
    /// Opens a session's log file anew, after it was renamed.
    pub async fn reopen_log(&self, id: &SessionId) -> Result<(), RuntimeError> {
        unreachable!()
    }
    /// The raw streams of a session that has not been started yet.
    pub async fn attach(&self, id: &SessionId) -> Result<Attached, RuntimeError> {
        unreachable!()
    }
    /// Sets the window size of a session's terminal.
    pub async fn resize(&self, id: &SessionId, rows: u16, cols: u16) -> Result<(), RuntimeError> {
        unreachable!()
    }
    /// Sends a signal to a session's first process.
    pub async fn signal_session(&self, id: &SessionId, signal: i32) -> Result<(), RuntimeError> {
        unreachable!()
    }
    /// Answers once the session has ended.
    pub async fn wait_session(&self, id: &SessionId) -> Result<SessionStatus, RuntimeError> {
        unreachable!()
    }
    /// Whether pods can be connected now.
    pub fn network_status(&self) -> NetworkReadiness {
        unreachable!()
    }
    /// Joins all tasks. Boxes keep running.
    pub async fn shutdown(&self) {
        unreachable!()
    }
}
