//! User namespaces that exist for their mapping alone: what an id-mapped mount refers to (mount_setattr(2)).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use a3s_box_core::spec::{IdRange, UserNamespace};

/// What the holder says when it is in its namespace.
pub const HELD: u8 = b'.';

/// Makes a user namespace with this mapping. Only a process with one thread can enter a new one, so `program` (the
/// `a3s-box-vmm`) is one for a moment; it ends when its standard input does. Blocks.
pub(crate) fn namespace(program: &Path, users: &UserNamespace) -> io::Result<OwnedFd> {
    let holder = Command::new(program)
        .arg("hold-users")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut holder = Holder(holder);
    let mut said = [0];
    holder.0.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?.read_exact(&mut said)?;
    let file = |name: &str| format!("/proc/{}/{name}", holder.0.id());
    std::fs::write(file("uid_map"), line(&users.uids))?;
    std::fs::write(file("gid_map"), line(&users.gids))?;
    Ok(File::open(file("ns/user"))?.into())
}

fn line(range: &IdRange) -> String {
    format!("0 {} {}", range.start, range.count)
}

struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        // It is our child and unreaped: the pid is its own. One that cannot be killed has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
