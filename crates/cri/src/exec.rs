//! Commands in containers.

use a3s_box_core::spec::ProcessSpec;

use crate::convert::InvalidRequest;
use crate::error::CriError;
use crate::proto::{ExecSyncRequest, ExecSyncResponse};
use crate::service::{CriService, seconds};

/// Clients take messages of at most 16 MiB; what a command prints must fit into one, with room for the
/// message's own fields. What goes beyond is dropped, stderr first, and the command runs on.
const MAX_OUTPUT: usize = 16 * 1024 * 1024 - 64 * 1024;

impl CriService {
    pub(crate) async fn exec_sync(&self, request: ExecSyncRequest) -> Result<ExecSyncResponse, CriError> {
        let id = self.session_id(request.container_id)?;
        check_command(&request.cmd)?;
        // Zero means no limit: the command then lives as long as the container.
        let limit = Some(seconds(request.timeout, "timeout")?).filter(|limit| !limit.is_zero());
        let process = ProcessSpec { args: request.cmd, ..Default::default() };
        let output = self.boxes.exec_sync(&id, process, limit, MAX_OUTPUT).await?;
        let (stdout, stderr) = fit(output.stdout, output.stderr);
        if output.truncated {
            tracing::warn!(container = id.short(), limit = MAX_OUTPUT, "output of ExecSync was cut");
        }
        Ok(ExecSyncResponse { stdout, stderr, exit_code: output.exit_code })
    }
}

/// A command has a program at least.
pub(crate) fn check_command(command: &[String]) -> Result<(), InvalidRequest> {
    if command.first().is_none_or(String::is_empty) {
        return Err(InvalidRequest::missing("cmd"));
    }
    Ok(())
}

/// Both outputs together within the bound.
fn fit(mut stdout: Vec<u8>, mut stderr: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    stdout.truncate(MAX_OUTPUT);
    stderr.truncate(MAX_OUTPUT - stdout.len());
    (stdout, stderr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_without_a_program_is_missing() {
        for command in [&[][..], &["".to_owned()]] {
            assert_eq!(check_command(command).unwrap_err().field, "cmd");
        }
        assert!(check_command(&["sh".to_owned()]).is_ok());
    }

    #[test]
    fn both_outputs_together_fit_into_one_message() {
        let (stdout, stderr) = fit(vec![b'o'; MAX_OUTPUT + 5], vec![b'e'; 5]);
        assert_eq!((stdout.len(), stderr.len()), (MAX_OUTPUT, 0));
        let (stdout, stderr) = fit(vec![b'o'; MAX_OUTPUT - 3], vec![b'e'; 5]);
        assert_eq!((stdout.len(), stderr.len()), (MAX_OUTPUT - 3, 3));
        assert_eq!(fit(b"a".to_vec(), b"b".to_vec()), (b"a".to_vec(), b"b".to_vec()));
    }
}
