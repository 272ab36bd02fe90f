//! `a3s-box exec` and `attach` at a terminal, as people use them.

use a3s_box_cri::proto::ContainerConfig;
use a3s_box_e2e::terminal::Terminal;
use anyhow::{Result, ensure};
use tokio::process::Command;

use crate::suite::{Suite, launch};

fn at_a_terminal(suite: &Suite, arguments: &[&str], rows: u16, columns: u16) -> Result<Terminal> {
    let mut command = Command::new(suite.layout().cli());
    command.arg("--config").arg(suite.state().join("config.toml")).args(arguments);
    Terminal::start(&command, rows, columns)
}

pub(crate) async fn a_shell_at_a_terminal_feels_as_at_home(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("terminal")?;
    let pod = client.run_pod(&config).await?;
    let shell = ContainerConfig { stdin: true, tty: true, ..suite.script("shell", "exec sh") };
    let container = launch(&mut client, &pod, shell, &config).await?;

    let mut terminal = at_a_terminal(suite, &["exec", "-it", &container, "sh"], 33, 101)?;
    // A size arrives beside the keys: ask until it is there.
    terminal.keys("until stty size | grep '33 101'; do sleep 0.1; done\r")?;
    terminal.until("\n33 101").await?;
    terminal.resize(40, 120)?;
    terminal.keys("until stty size | grep '40 120'; do sleep 0.1; done\r")?;
    terminal.until("\n40 120").await?;
    // Ctrl-C ends the job in the foreground and neither the shell nor us.
    terminal.keys("echo begin; sleep 1000; echo never\r")?;
    terminal.until("\nbegin").await?;
    terminal.keys("\x03")?;
    terminal.keys("echo the-shell-$((40+2))\r")?;
    terminal.until("the-shell-42").await?;
    terminal.keys("exit 9\r")?;
    let status = terminal.end().await?;
    ensure!(status.code() == Some(9), "{status}");

    let mut terminal = at_a_terminal(suite, &["attach", "-it", &container], 25, 90)?;
    terminal.keys("until stty size | grep '25 90'; do sleep 0.1; done\r")?;
    terminal.until("\n25 90").await?;
    // Ctrl-P Ctrl-Q leaves.
    terminal.keys("\x10\x11")?;
    let status = terminal.end().await?;
    ensure!(status.success(), "{status}");
    let mut terminal = at_a_terminal(suite, &["attach", "-it", &container], 25, 90)?;
    terminal.keys("echo again-$((40+2)); exit 4\r")?;
    terminal.until("again-42").await?;
    let status = terminal.end().await?;
    ensure!(status.code() == Some(4), "the container's own code: {status}");
    client.remove_pod(&pod).await?;
    Ok(())
}
