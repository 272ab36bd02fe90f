//! The end of the box.
//!
//! The guest has no ACPI, so the kernel knows no power-off: it would halt and leave the VMM waiting. A restart is
//! what both backends understand: QEMU (`-no-reboot`) and libkrun end when the machine resets.

use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::system::RebootCommand;

use crate::paths;
use crate::session::table::Table;

/// The answer to `Shutdown` gets this long to reach the host.
const ANSWER: Duration = Duration::from_millis(20);
/// A host file server that is gone must not keep the box alive.
const SYNC: Duration = Duration::from_secs(3);

/// Kills everything, writes volumes back, and ends the machine.
pub async fn off_soon(table: Table) {
    tokio::time::sleep(ANSWER).await;
    table.kill_all();
    // Only the share: the scratch disk ends with the box.
    let sync = || {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(paths::SHARE, flags, Mode::empty()).and_then(rustix::fs::syncfs)
    };
    match tokio::time::timeout(SYNC, tokio::task::spawn_blocking(sync)).await {
        Ok(Ok(Ok(()))) => {}
        other => say!("the volumes could not be synced: {other:?}"),
    }
    off();
}

/// Ends the machine now.
pub fn off() -> ! {
    loop {
        let result = rustix::system::reboot(RebootCommand::Restart);
        say!("cannot end the machine: {result:?}");
        std::thread::sleep(Duration::from_secs(1));
    }
}
