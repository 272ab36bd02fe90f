//! Flags of `docker run` that mean nothing here, or something else: each is known, and answered with what to do instead.

use anyhow::bail;
use clap::Args;

/// They are not in the help.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Habits {
    /// Removed after its end: every box is
    #[arg(long, hide = true)]
    rm: bool,
    #[arg(long, hide = true)]
    init: bool,
    #[arg(long, hide = true, value_name = "POLICY")]
    restart: Option<String>,
    #[arg(long, hide = true, value_name = "NAME:IP")]
    add_host: Vec<String>,
    #[arg(long, hide = true, value_name = "PATH")]
    device: Vec<String>,
    #[arg(long, hide = true, value_name = "GPUS")]
    gpus: Option<String>,
    #[arg(long, hide = true, value_name = "OPTION")]
    security_opt: Vec<String>,
    #[arg(long, hide = true, value_name = "NAME=VALUE")]
    sysctl: Vec<String>,
}

impl Habits {
    /// Whether the container shall be gone after its end.
    pub(crate) fn removes(&self) -> bool {
        self.rm
    }

    /// Refuses what would otherwise be left out without a word.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let known = [
            (
                self.init,
                "--init: the command is process 1 of its container, and what it leaves behind ends with it; if it must reap \
                 children, put an init such as tini into the image",
            ),
            (
                self.restart.as_ref().is_some_and(|policy| policy != "no"),
                "--restart: what is started again belongs to a service manager or to Kubernetes",
            ),
            (!self.add_host.is_empty(), "--add-host: mount a file of your own with -v FILE:/etc/hosts:ro"),
            (
                !self.device.is_empty(),
                "--device: a box has a kernel of its own and sees no device of the host",
            ),
            (self.gpus.is_some(), "--gpus: a box has a kernel of its own and sees no device of the host"),
            (
                !self.security_opt.is_empty(),
                "--security-opt: --cap-add, --cap-drop and --privileged say what a command may do; the box itself is the boundary",
            ),
            (!self.sysctl.is_empty(), "--sysctl: set it in a box with --privileged, in /proc/sys"),
        ];
        match known.into_iter().find(|(given, _)| *given) {
            Some((_, instead)) => bail!("{instead}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::{Cli, Command};

    fn checked(line: &[&str]) -> Result<(), String> {
        let words = ["a3s-box", "run"].iter().chain(line).chain(&["image"]);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(args) => args.habits.check().map_err(|error| error.to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_habit_is_obeyed_or_answered_with_what_to_do_instead() {
        assert_eq!(checked(&["--rm", "--restart", "no", "--net", "none"]), Ok(()));
        for (line, instead) in [
            (&["--add-host", "a:1.2.3.4"][..], "/etc/hosts"),
            (&["--restart", "always"], "service manager"),
            (&["--gpus", "all"], "no device of the host"),
        ] {
            assert!(checked(line).unwrap_err().contains(instead), "{line:?}");
        }
    }
}
