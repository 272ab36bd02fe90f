//! The lower layers of a layer that is being made while they are.

use std::fs::File;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::layer::LayerReady;
use super::traffic::{Traffic, Turn};
use crate::erofs::ReaderError;
use crate::layer::{Found, LayerStack, Lower, LowerError};

/// Waits for the lower layers when it is first asked, and never if it is not.
pub(super) struct PendingLower {
    pub(super) runtime: Handle,
    /// Lowest first.
    pub(super) below: Vec<watch::Receiver<LayerReady>>,
    pub(super) stack: Option<LayerStack<File>>,
    pub(super) traffic: Arc<Traffic>,
    /// The layer's own turn; it is gone if the conversion is given up.
    pub(super) turn: Option<Turn>,
}

impl PendingLower {
    fn wait(&mut self) -> Result<LayerStack<File>, LowerError> {
        // The layer is of use to its chain only from now on, and the lower ones may need the slot.
        self.turn = None;
        let mut files = Vec::with_capacity(self.below.len());
        for layer in &mut self.below {
            let ready =
                self.runtime.block_on(layer.wait_for(LayerReady::is_some)).map_err(|_| LowerError::Gone)?;
            if let Some(path) = &*ready {
                files.push(File::open(path).map_err(ReaderError::Io)?);
            }
        }
        let slot = self.runtime.block_on(self.traffic.slot());
        self.turn = Some(Turn { _slot: slot, _alone: None });
        LayerStack::new(files)
    }
}

impl Lower for PendingLower {
    fn look_up(&mut self, path: &[&[u8]]) -> Result<Option<Found>, LowerError> {
        if self.stack.is_none() {
            self.stack = Some(self.wait()?);
        }
        match &mut self.stack {
            Some(stack) => stack.look_up(path),
            None => Err(LowerError::Gone),
        }
    }
}
