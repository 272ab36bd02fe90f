//! Messages on stderr, as text or as JSON, and errors as one line.

use std::io::IsTerminal;

use a3s_box_host::config::{LogConfig, LogFormat};
use anyhow::{Context, anyhow};
use tracing_subscriber::EnvFilter;

/// Starts the log of this process.
pub(crate) fn start(config: &LogConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.level)
        .with_context(|| format!("log.level {:?} is neither a level nor a filter", config.level))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let started = match config.format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().try_init(),
    };
    started.map_err(|error| anyhow!("the log could not be started: {error}"))
}

/// An error and its causes, without those whose text is already there.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_printed_once() {
        let cause = anyhow!("no such file");
        assert_eq!(chain(&cause.context("reading x: no such file")), "reading x: no such file");
        assert_eq!(chain(&anyhow!("no such file").context("reading x")), "reading x: no such file");
    }
}
