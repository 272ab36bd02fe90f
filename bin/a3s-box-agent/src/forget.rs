//! Forgets files of the share when the host has no room for more.
//!
//! The kernel keeps a file in mind for as long as it has memory, and the host's file server then has to hold it open. The
//! server cannot make the kernel let go; it asks the agent, which can.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use a3s_box_protocol::{FORGET_CONTENTS, FORGET_PORT};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::sleep;

use crate::vsock;

/// After a connection that failed.
const AGAIN: Duration = Duration::from_secs(30);

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
/// No line on the console for what follows. The kernel takes it only by itself.
const QUIET: &str = "4";
/// Names and inodes that nobody uses.
const NAMES: &str = "2";
/// Cached contents too: an inode that has some is kept otherwise.
const CONTENTS: &str = "3";

/// Forgets for ever, as often as the host asks.
pub async fn when_asked() -> Infallible {
    let _ = std::fs::write(DROP_CACHES, QUIET);
    loop {
        if let Ok(mut host) = vsock::dial(FORGET_PORT).await {
            let error = obey(&mut host, forget).await;
            say!("the host does not say any more what to forget: {error}");
        }
        sleep(AGAIN).await;
    }
}

async fn obey<S: AsyncRead + Unpin>(host: &mut S, mut forget: impl AsyncFnMut(&'static str)) -> io::Error {
    let mut asked = [0; 64];
    loop {
        match host.read(&mut asked).await {
            Ok(0) => return io::ErrorKind::UnexpectedEof.into(),
            Ok(count) if asked[..count].contains(&FORGET_CONTENTS) => forget(CONTENTS).await,
            Ok(_) => forget(NAMES).await,
            Err(error) => return error,
        }
    }
}

async fn forget(what: &'static str) {
    let done = tokio::task::spawn_blocking(move || std::fs::write(DROP_CACHES, what)).await;
    if let Ok(Err(error)) = done {
        say!("forget files: {error}");
    }
}

#[cfg(test)]
mod tests {
    use a3s_box_protocol::FORGET_NAMES;

    use super::*;

    #[tokio::test]
    async fn what_was_asked_while_busy_is_done_once_and_contents_go_with_names() {
        for (asked, wanted) in [
            (vec![FORGET_NAMES], vec![NAMES]),
            (vec![FORGET_NAMES, FORGET_CONTENTS, FORGET_NAMES], vec![CONTENTS]),
            (vec![FORGET_NAMES; 65], vec![NAMES, NAMES]),
            (vec![], vec![]),
        ] {
            let mut done = Vec::new();
            let error = obey(&mut asked.as_slice(), async |what| done.push(what)).await;
            assert_eq!((done, error.kind()), (wanted, io::ErrorKind::UnexpectedEof));
        }
    }
}
