//! The flags that the daemon and the command line share.

use std::path::{Path, PathBuf};

use clap::Args;

use super::parse::{apply_environment, apply_file, apply_flags};
use super::{Config, ConfigError, DEFAULT_FILE, FILE_VARIABLE};

/// Flags that choose and override the configuration.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Configuration")]
pub struct ConfigFlags {
    /// The configuration file [default: /etc/a3s-box/config.toml; environment: A3S_BOX_CONFIG]
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// Keep images and records here [default: /var/lib/a3s-box]
    #[arg(long, value_name = "DIR", global = true)]
    pub root: Option<PathBuf>,
    /// Keep sockets and the directories of running boxes here [default: /run/a3s-box]
    #[arg(long, value_name = "DIR", global = true)]
    pub run_dir: Option<PathBuf>,
    /// The CRI socket [default: /var/run/a3s-box/a3s-box.sock; environment: CRI_SOCKET_PATH]
    #[arg(long, value_name = "PATH", global = true)]
    pub socket: Option<PathBuf>,
    /// Who runs the virtual machines: auto, libkrun or qemu
    #[arg(long, value_name = "NAME", global = true)]
    pub backend: Option<String>,
    /// Which messages to print: error, warn, info, debug, trace, or a filter
    #[arg(long, value_name = "LEVEL", global = true)]
    pub log_level: Option<String>,
    /// Any setting of the configuration file, e.g. --set vmm.boot_limit=90s
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value, global = true)]
    pub set: Vec<(String, String)>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        Some(_) | None => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

impl ConfigFlags {
    /// Reads file and environment and puts these flags on top.
    pub fn load(&self) -> Result<Config, ConfigError> {
        self.load_with(&|name| std::env::var(name).ok())
    }

    /// As [`ConfigFlags::load`], with the environment given.
    pub fn load_with(&self, variable: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        let named =
            self.config.clone().or_else(|| variable(FILE_VARIABLE).filter(|v| !v.is_empty()).map(Into::into));
        read_into(&mut config, named.as_deref())?;
        apply_environment(&mut config, variable)?;
        apply_flags(&mut config, &self.overrides())?;
        Ok(config)
    }

    fn overrides(&self) -> Vec<(String, String, String)> {
        let paths = [
            ("root", "--root", &self.root),
            ("run_dir", "--run-dir", &self.run_dir),
            ("socket", "--socket", &self.socket),
        ];
        let texts =
            [("vmm.backend", "--backend", &self.backend), ("log.level", "--log-level", &self.log_level)];
        let mut overrides = Vec::new();
        for (key, flag, value) in paths {
            if let Some(path) = value {
                overrides.push((key.to_owned(), absolute(path), flag.to_owned()));
            }
        }
        for (key, flag, value) in texts {
            if let Some(text) = value {
                overrides.push((key.to_owned(), text.clone(), flag.to_owned()));
            }
        }
        for (key, value) in &self.set {
            overrides.push((key.clone(), value.clone(), format!("--set {key}")));
        }
        overrides
    }
}

/// A relative path on the command line is meant from where the user stands.
fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()).to_string_lossy().into_owned()
}

/// A file that somebody named must exist; the default one need not.
fn read_into(config: &mut Config, named: Option<&Path>) -> Result<(), ConfigError> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    match std::fs::read_to_string(path) {
        Ok(text) => apply_file(config, path, &text),
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(ConfigError::Read { path: path.to_path_buf(), source }),
    }
}
