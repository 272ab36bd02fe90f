//! Running nftables' program.

use std::fs::File;
use std::io::{self, Read, Seek, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use thiserror::Error;

const POLL: Duration = Duration::from_millis(2);
const MAX_SAID: usize = 2048;
/// Where administrators' programs are, whatever the PATH says.
const USUAL: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Why nftables did not do what it was told.
#[derive(Debug, Error)]
pub enum NftError {
    /// The program is not there.
    #[error("the program {} is not installed: install the package nftables", program.display())]
    Missing {
        /// What was looked for.
        program: PathBuf,
    },
    /// It cannot be started.
    #[error("cannot start {}", program.display())]
    Start {
        /// Which.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It refused.
    #[error("nft failed ({status}); it said: {said}")]
    Refused {
        /// How it ended.
        status: ExitStatus,
        /// The beginning of its standard error.
        said: String,
    },
    /// It took too long and was killed.
    #[error("nft took longer than {limit:?} and was killed; it said: {said}")]
    Slow {
        /// How long it had.
        limit: Duration,
        /// The beginning of its standard error.
        said: String,
    },
}

/// The program, found once, with the time it has for each run.
#[derive(Debug, Clone)]
pub(crate) struct Nft {
    program: PathBuf,
    limit: Duration,
}

impl Nft {
    /// Finds `nft`: a path, or a name that is looked for.
    pub(crate) fn find(nft: &Path, limit: Duration) -> Result<Self, NftError> {
        use std::os::unix::fs::PermissionsExt;
        let runnable = |path: &PathBuf| {
            path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::env::split_paths(&path).chain(USUAL.iter().map(PathBuf::from));
        // Joining an absolute path yields that path.
        let program = dirs.map(|dir| dir.join(nft)).find(runnable);
        let program = program.ok_or_else(|| NftError::Missing { program: nft.to_owned() })?;
        Ok(Self { program, limit })
    }

    /// Hands it `script`, in the network namespace of the calling thread.
    ///
    /// Input and output are files, so that nothing here waits for `nft` but the loop with the limit. `held` becomes its
    /// standard output: a lock stays locked until `nft` has ended, should this process be killed meanwhile.
    pub(crate) fn run(&self, script: &str, held: Option<File>) -> Result<(), NftError> {
        let start = |source| NftError::Start { program: self.program.clone(), source };
        let mut stdin = memory().map_err(start)?;
        stdin.write_all(script.as_bytes()).and_then(|()| stdin.rewind()).map_err(start)?;
        let mut stderr = memory().map_err(start)?;
        let mut command = Command::new(&self.program);
        command
            .args(["-f", "-"])
            .env("LC_ALL", "C")
            .stdin(Stdio::from(stdin))
            .stdout(held.map_or_else(Stdio::null, Stdio::from))
            .stderr(Stdio::from(stderr.try_clone().map_err(start)?));
        let mut child = command.spawn().map_err(start)?;
        let status = wait(&mut child, self.limit).map_err(start)?;
        let mut said = Vec::new();
        // What it said is for people; that it failed is known without it.
        let _ = stderr.rewind().and_then(|()| stderr.read_to_end(&mut said));
        said.truncate(MAX_SAID);
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(NftError::Refused { status, said }),
            None => Err(NftError::Slow { limit: self.limit, said }),
        }
    }
}

fn memory() -> io::Result<File> {
    let fd = rustix::fs::memfd_create("nft", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(File::from(fd))
}

/// `None`: it took too long and was killed.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_nowhere_is_named_with_its_package() {
        let error = Nft::find(Path::new("/nonexistent/nft"), Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("package nftables"), "{error}");
    }
}
