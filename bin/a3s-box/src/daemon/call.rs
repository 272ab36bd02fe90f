//! `exec` and `attach`.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::bail;
use tokio::time::Instant;

use a3s_box_cri::client::{Client, State};
use a3s_box_streaming::backend::Wanted;

use super::args::{AttachArgs, ExecArgs};
use super::attend::{Attendance, End};
use super::find;
use crate::failure::exit_code;
use crate::tell::note;

/// A container whose streams have ended has usually ended, too.
const EXIT_LIMIT: Duration = Duration::from_secs(3);
const EXIT_POLL: Duration = Duration::from_millis(50);

/// Answers the command's exit code.
pub(super) async fn exec(mut client: Client, args: ExecArgs) -> anyhow::Result<u8> {
    check(args.interactive, args.tty)?;
    let container = find::container(&mut client, &args.container).await?;
    let wanted = Wanted { stdin: args.interactive, stdout: true, stderr: !args.tty };
    let target = client.exec(&container.id, &args.command, args.tty, wanted).await?;
    match (Attendance { wanted, tty: args.tty, keys: false }).at(&target).await? {
        End::Code(code) => Ok(exit_code(code)),
        End::Ours(code) => Ok(code),
        End::Detached => Ok(0),
    }
}

/// Answers the container's exit code, or 0 if it still runs.
pub(super) async fn attach(mut client: Client, args: AttachArgs) -> anyhow::Result<u8> {
    check(args.interactive, args.tty)?;
    let container = find::container(&mut client, &args.container).await?;
    let wanted = Wanted { stdin: args.interactive, stdout: true, stderr: !args.tty };
    let target = client.attach(&container.id, args.tty, wanted).await?;
    match (Attendance { wanted, tty: args.tty, keys: args.tty }).at(&target).await? {
        End::Ours(code) => Ok(code),
        End::Detached => {
            note!("detached; the container still runs");
            Ok(0)
        }
        End::Code(_) => code_of(&mut client, &container.id).await,
    }
}

async fn code_of(client: &mut Client, id: &str) -> anyhow::Result<u8> {
    let deadline = Instant::now() + EXIT_LIMIT;
    loop {
        let details = client.container(id).await?;
        if details.state == State::Exited {
            return Ok(exit_code(details.exit_code));
        }
        if Instant::now() >= deadline {
            note!("the container closed its output and still runs");
            return Ok(0);
        }
        tokio::time::sleep(EXIT_POLL).await;
    }
}

fn check(interactive: bool, tty: bool) -> anyhow::Result<()> {
    if tty && interactive && !std::io::stdin().is_terminal() {
        bail!("stdin is not a terminal, so -i and -t do not go together; leave out -t");
    }
    Ok(())
}
