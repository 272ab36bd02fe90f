//! Running other programs: logged, with the reason shown when they fail.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How many lines of a failed program's log are repeated.
const TAIL_LINES: usize = 30;

/// A command by name, with its arguments.
pub(crate) fn command<I, S>(program: &str, arguments: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Whether a program can be found on PATH.
pub(crate) fn exists(program: &str) -> bool {
    let Some(path) = std::env::var_os("PATH") else { return false };
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Runs to the end with our own standard streams; an exit code other than zero is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = line(command);
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("starting `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Runs to the end and returns standard output; standard error is part of the failure's message.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = line(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{shown}` printed something that is not UTF-8"))
}

/// Runs with both outputs in a log file, whose tail becomes part of the failure's message.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<()> {
    watched(command, log, |_| {})
}

/// Like [`logged`], and shows every line of standard output to `watch` as it comes.
pub(crate) fn watched(command: &mut Command, log: &Path, mut watch: impl FnMut(&str)) -> Result<()> {
    let shown = line(command);
    if let Some(parent) = log.parent() {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("opening the log {}", log.display()))?;
    let errors = file.try_clone().with_context(|| format!("opening the log {}", log.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .with_context(|| format!("starting `{shown}`"))?;
    if let Some(output) = child.stdout.take() {
        let mut file = file;
        for text in BufReader::new(output).lines() {
            let text = text.with_context(|| format!("reading the output of `{shown}`"))?;
            watch(&text);
            std::io::Write::write_all(&mut file, format!("{text}\n").as_bytes())
                .with_context(|| format!("writing the log {}", log.display()))?;
        }
    }
    let status = child.wait().with_context(|| format!("waiting for `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}; the end of {}:\n{}", log.display(), tail(log, TAIL_LINES));
    }
    Ok(())
}

/// Runs with its standard error (where cargo's tools report) passed on line by line, and shows each line to `watch`
/// without its colours.
pub(crate) fn through(command: &mut Command, mut watch: impl FnMut(&str)) -> Result<()> {
    let shown = line(command);
    let mut child = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{shown}`"))?;
    if let Some(output) = child.stderr.take() {
        for text in BufReader::new(output).split(b'\n') {
            let text = text.with_context(|| format!("reading the output of `{shown}`"))?;
            let text = String::from_utf8_lossy(&text);
            eprintln!("{text}");
            watch(&plain(&text));
        }
    }
    let status = child.wait().with_context(|| format!("waiting for `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Runs with its standard output shown line by line to `watch`; standard error stays ours.
pub(crate) fn lines(command: &mut Command, mut watch: impl FnMut(&str)) -> Result<()> {
    let shown = line(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{shown}`"))?;
    if let Some(output) = child.stdout.take() {
        for text in BufReader::new(output).split(b'\n') {
            let text = text.with_context(|| format!("reading the output of `{shown}`"))?;
            watch(&String::from_utf8_lossy(&text));
        }
    }
    let status = child.wait().with_context(|| format!("waiting for `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Text without terminal escape sequences of the form `ESC [ … letter`.
fn plain(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character == '\u{1b}' {
            // Skips the parameters up to and including the final letter.
            characters.by_ref().find(char::is_ascii_alphabetic);
        } else {
            result.push(character);
        }
    }
    result
}

/// The last lines of a text file; empty when it cannot be read.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn colours_are_taken_out_of_a_line() {
        assert_eq!(plain("\u{1b}[32;1m12\u{1b}[0m tests run"), "12 tests run");
    }
}
