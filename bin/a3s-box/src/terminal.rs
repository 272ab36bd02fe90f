//! The user's terminal.

use std::io;
use std::os::fd::OwnedFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal in raw mode: keys reach the guest's terminal one by one, which echoes and interprets them. Dropping
/// this, also while panicking, gives the user's settings back.
pub(crate) struct RawMode {
    terminal: OwnedFd,
    former: Termios,
}

impl RawMode {
    /// Switches stdin's terminal.
    pub(crate) fn enter() -> io::Result<Self> {
        let terminal = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)?;
        let former = tcgetattr(&terminal)?;
        let mut raw = former.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, former })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no settings.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.former);
    }
}

/// Rows and columns of the terminal that the user sees, if there is one.
pub(crate) fn window_size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(std::io::stdout()).or_else(|_| tcgetwinsize(std::io::stdin())).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
