//! How failures look and which exit code they get: docker's numbers, which scripts know.

use std::error::Error;

use crate::tell;

/// We failed; the command did not run.
pub(crate) const OUR_FAILURE: u8 = 125;
/// The program exists and cannot be executed.
pub(crate) const PROGRAM_NOT_EXECUTABLE: u8 = 126;
/// There is no such program.
pub(crate) const PROGRAM_NOT_FOUND: u8 = 127;
/// `--timeout` passed, as timeout(1) says it.
pub(crate) const TIMED_OUT: u8 = 124;
/// Our output has no reader any more: 128 + SIGPIPE.
pub(crate) const BROKEN_PIPE: u8 = 141;

/// A command line that cannot be read is a failure of ours, so that scripts can tell it from the command's own 2;
/// help that was asked for is none.
pub(crate) fn usage_code(asked: &clap::Error) -> u8 {
    if asked.use_stderr() { OUR_FAILURE } else { 0 }
}

/// Prints an error and its causes to stderr, each cause once: many messages of libraries repeat their source.
pub(crate) fn print(error: &anyhow::Error) {
    tell::err(render(error.as_ref()));
}

fn render(error: &(dyn Error + 'static)) -> String {
    let mut shown = error.to_string();
    let mut text = format!("a3s-box: {shown}\n");
    let mut next = error.source();
    while let Some(cause) = next {
        let message = cause.to_string();
        if !shown.contains(&message) {
            text.push_str(&format!("  because: {message}\n"));
            shown = message;
        }
        next = cause.source();
    }
    text
}

/// The exit code of a command as a process's own: 0 to 255 as it is.
pub(crate) fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(OUR_FAILURE)
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn each_cause_is_printed_once() {
        let error = anyhow!("no space left").context("write x: no space left").context("pull failed");
        assert_eq!(render(error.as_ref()), "a3s-box: pull failed\n  because: write x: no space left\n");
    }

    #[test]
    fn codes_that_no_process_has_are_our_failure() {
        assert_eq!((exit_code(0), exit_code(137), exit_code(-1), exit_code(256)), (0, 137, 125, 125));
    }
}
