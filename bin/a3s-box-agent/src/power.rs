//! The end of the box.
//!
//! The guest has no ACPI, so the kernel knows no power-off: it would halt and leave the VMM waiting. A restart is
//! what both backends understand: QEMU (`-no-reboot`) and libkrun end when the machine resets.

use std::time::Duration;

use rustix::mount::UnmountFlags;
use rustix::system::RebootCommand;

use crate::paths;
use crate::session::table::Table;

/// The answer to `Shutdown` gets this long to reach the host.
const ANSWER: Duration = Duration::from_millis(20);
/// A host file server that is gone must not keep the box alive.
const SYNC: Duration = Duration::from_secs(3);

/// Kills everything, writes everything back, and ends the machine.
pub async fn off_soon(table: Table) {
    tokio::time::sleep(ANSWER).await;
    table.kill_all();
    let flush = tokio::task::spawn_blocking(|| {
        rustix::fs::sync();
        // The scratch disk ends with the box: whether it was unmounted matters to nobody but its journal.
        let _ = rustix::mount::unmount(paths::SCRATCH, UnmountFlags::DETACH);
    });
    if tokio::time::timeout(SYNC, flush).await.is_err() {
        eprintln!("a3s-box-agent: the file systems could not be synced in {} s", SYNC.as_secs());
    }
    off();
}

/// Ends the machine now.
pub fn off() -> ! {
    loop {
        let result = rustix::system::reboot(RebootCommand::Restart);
        eprintln!("a3s-box-agent: cannot end the machine: {result:?}");
        std::thread::sleep(Duration::from_secs(1));
    }
}
