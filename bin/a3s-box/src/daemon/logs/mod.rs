//! `logs`: a container's log, which the daemon writes as CRI says.
//!
//! ```text
//! mod     the command: which container, and whether it has ended
//!  follow  which files, in which order, and until when
//!   line    a line of the file, and how it is printed
//! ```

mod follow;
mod line;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::{SignedDuration, Timestamp};

use a3s_box_cri::client::{Client, State};

use super::args::LogsArgs;
use super::find;
use crate::failure;
use follow::Log;
use line::Printer;

/// How often the daemon is asked whether the container still runs.
const STATE_POLL: Duration = Duration::from_millis(300);

/// How far back `--since` goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Since {
    Ago(SignedDuration),
    At(Timestamp),
}

impl Since {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let ago = text.parse().ok().filter(|ago: &SignedDuration| !ago.is_negative()).map(Self::Ago);
        let at = || text.parse().ok().map(Self::At);
        ago.or_else(at).ok_or_else(|| {
            format!(
                "{text:?} is neither a duration such as 90s or 2h nor a time such as 2026-01-02T15:04:05Z"
            )
        })
    }

    fn moment(self, now: Timestamp) -> Timestamp {
        match self {
            Self::Ago(ago) => now.checked_sub(ago).unwrap_or(Timestamp::MIN),
            Self::At(moment) => moment,
        }
    }
}

/// Prints, and with `--follow` goes on until the container has ended and all of its log is printed.
pub(super) async fn logs(mut client: Client, args: LogsArgs) -> anyhow::Result<u8> {
    let container = find::container(&mut client, &args.container).await?;
    let Some(path) = client.container(&container.id).await?.log else {
        bail!(
            "the container {} has no log: its pod or itself was created without a log path",
            args.container
        );
    };
    let ended = Arc::new(AtomicBool::new(!args.follow));
    if args.follow {
        let (ended, id) = (ended.clone(), container.id);
        tokio::spawn(async move {
            // Also a container that was removed, or a daemon that is gone: nothing more can be known.
            while let Ok(details) = client.container(&id).await
                && details.state != State::Exited
            {
                tokio::time::sleep(STATE_POLL).await;
            }
            ended.store(true, Ordering::SeqCst);
        });
    }
    let since = args.since.map(|since| since.moment(Timestamp::now()));
    let log = Log { path: path.clone(), since, tail: args.tail, ended };
    let printed = tokio::task::spawn_blocking(move || {
        log.print(&mut Printer::new(io::stdout().lock(), io::stderr().lock(), since, args.timestamps))
    });
    match printed.await? {
        Ok(()) => Ok(0),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(failure::BROKEN_PIPE),
        Err(error) => Err(error).with_context(|| {
            format!(
                "could not read {}; logs are read where the daemon writes them: on its machine, as root",
                path.display()
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_duration_or_a_time() {
        let now: Timestamp = "2026-01-02T12:00:00Z".parse().unwrap();
        let moment = |text: &str| Since::parse(text).map(|since| since.moment(now).to_string()).ok();
        assert_eq!(moment("90m").as_deref(), Some("2026-01-02T10:30:00Z"));
        assert_eq!(moment("1h30m").as_deref(), Some("2026-01-02T10:30:00Z"));
        assert_eq!(moment("2026-01-02T11:00:00+02:00").as_deref(), Some("2026-01-02T09:00:00Z"));
        for bad in ["", "yesterday", "-5m", "12"] {
            assert_eq!(moment(bad), None, "{bad}");
        }
    }
}
