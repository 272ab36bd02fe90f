//! Finding and executing a program, with the errors that users of container runtimes know.

use std::convert::Infallible;
use std::ffi::{CStr, CString, NulError};
use std::io;

use nix::errno::Errno;
use nix::unistd::execve;
use rustix::fs::Access;
use thiserror::Error;

use super::environment;

/// Why a program cannot be executed.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// There is no such file.
    #[error("exec: {name:?}: {reason}")]
    NotFound {
        /// As asked for.
        name: String,
        /// `executable file not found in $PATH` or `no such file or directory`.
        reason: &'static str,
    },
    /// It may not be executed.
    #[error("exec: {name:?}: permission denied")]
    Denied {
        /// As asked for.
        name: String,
    },
    /// The kernel refused it for another reason.
    #[error("exec: {name:?}: {source}")]
    Failed {
        /// As asked for.
        name: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The command is empty.
    #[error("exec: no command was given")]
    Nothing,
    /// An argument contains a NUL octet.
    #[error("exec: an argument contains a NUL octet")]
    Nul(#[from] NulError),
}

/// Where a program may lie, in order: the name itself if it has a slash, else in every absolute directory of
/// `path`.
pub fn candidates(name: &str, path: &str) -> Vec<String> {
    if name.contains('/') {
        return vec![name.to_owned()];
    }
    path.split(':')
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| format!("{}/{name}", directory.trim_end_matches('/')))
        .collect()
}

/// Replaces this process. Comes back only with a reason.
pub fn execute(args: &[String], env: &[String]) -> ProgramError {
    match try_execute(args, env) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_execute(args: &[String], env: &[String]) -> Result<Infallible, ProgramError> {
    let name = args.first().filter(|n| !n.is_empty()).ok_or(ProgramError::Nothing)?;
    let argv = c_strings(args)?;
    let envp = c_strings(env)?;
    let mut denied = false;
    for candidate in candidates(name, environment::value(env, "PATH").unwrap_or("")) {
        let file = CString::new(candidate)?;
        match try_file(name, &file, &argv, &envp)? {
            Refusal::Absent => {}
            Refusal::Denied => denied = true,
        }
    }
    match (denied, name.contains('/')) {
        (true, _) => Err(ProgramError::Denied { name: name.clone() }),
        (false, true) => {
            Err(ProgramError::NotFound { name: name.clone(), reason: "no such file or directory" })
        }
        (false, false) => {
            Err(ProgramError::NotFound { name: name.clone(), reason: "executable file not found in $PATH" })
        }
    }
}

enum Refusal {
    Absent,
    Denied,
}

fn try_file(name: &str, file: &CStr, argv: &[CString], envp: &[CString]) -> Result<Refusal, ProgramError> {
    let Err(errno) = execve(file, argv, envp);
    match errno {
        // A script whose interpreter is missing gives ENOENT too, although the file is there.
        Errno::ENOENT if rustix::fs::access(file, Access::EXISTS).is_ok() => Err(ProgramError::Failed {
            name: name.to_owned(),
            source: io::Error::other("its interpreter does not exist"),
        }),
        Errno::ENOENT | Errno::ENOTDIR => Ok(Refusal::Absent),
        Errno::EACCES | Errno::EPERM => Ok(Refusal::Denied),
        Errno::ENOEXEC => {
            Err(ProgramError::Failed { name: name.to_owned(), source: io::Error::other("exec format error") })
        }
        other => Err(ProgramError::Failed { name: name.to_owned(), source: other.into() }),
    }
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, NulError> {
    texts.iter().map(|t| CString::new(t.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(args: &[&str], env: &[&str]) -> String {
        let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        execute(&owned(args), &owned(env)).to_string()
    }

    #[test]
    fn a_bare_name_is_looked_up_and_a_path_is_not() {
        assert_eq!(candidates("sh", "/usr/bin/:/bin::relative"), ["/usr/bin/sh", "/bin/sh"]);
        assert_eq!(candidates("./sh", "/bin"), ["./sh"]);
    }

    #[test]
    fn a_missing_program_is_named_as_users_know_it() {
        assert_eq!(
            error(&["no-such"], &["PATH=/bin"]),
            "exec: \"no-such\": executable file not found in $PATH"
        );
        let directory = tempfile::tempdir().unwrap();
        let absent = directory.path().join("absent").to_str().unwrap().to_owned();
        assert_eq!(error(&[&absent], &[]), format!("exec: {absent:?}: no such file or directory"));
        assert_eq!(error(&["/etc/passwd/x"], &[]), "exec: \"/etc/passwd/x\": no such file or directory");
    }

    #[test]
    fn files_that_cannot_run_say_why() {
        assert_eq!(error(&["/etc"], &[]), "exec: \"/etc\": permission denied");
        assert_eq!(error(&[], &[]), "exec: no command was given");
        assert!(error(&["/bin/sh", "a\0b"], &[]).contains("NUL"));
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("script");
        std::fs::write(&script, "#!/no/interpreter\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&script, mode).unwrap();
        assert!(error(&[script.to_str().unwrap()], &[]).ends_with("its interpreter does not exist"));
        std::fs::write(&script, "no program\n").unwrap();
        assert!(error(&[script.to_str().unwrap()], &[]).ends_with("exec format error"));
    }
}
