//! Folders of the host in containers.

use std::fs;

use a3s_box_cri::proto::{ContainerConfig, Mount};
use anyhow::{Context, Result, ensure};

use crate::suite::{Suite, exit_code, launch, log_lines};

pub(crate) async fn a_folder_of_the_host_is_shared_as_asked(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("volumes")?;
    let folder = suite.state().join("volume");
    fs::create_dir_all(folder.join("secret")).context("making the volume")?;
    fs::write(folder.join("greeting"), "from the host\n")?;
    let pod = client.run_pod(&config).await?;
    let mount = |host: &std::path::Path, inside: &str, readonly| Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.to_owned(),
        readonly,
        ..Default::default()
    };
    let script = "cat /data/greeting; echo from the guest > /data/answer; cat /one; \
        echo x > /fixed/greeting || echo refused; ls /data/../data/..";
    let container = ContainerConfig {
        mounts: vec![
            mount(&folder, "/data", false),
            mount(&folder, "/fixed", true),
            mount(&folder.join("greeting"), "/one", true),
        ],
        ..suite.script("main", script)
    };
    let container = launch(&mut client, &pod, container, &config).await?;
    exit_code(&client, &container).await?;
    client.stop_pod(&pod).await?;
    let output: Vec<String> = log_lines(&config, "main")?.into_iter().map(|line| line.2).collect();
    ensure!(output.iter().filter(|line| *line == "from the host").count() == 2, "{output:?}");
    ensure!(output.iter().any(|line| line == "refused"), "a read-only volume was written: {output:?}");
    ensure!(fs::read_to_string(folder.join("answer"))? == "from the guest\n");
    ensure!(fs::read_to_string(folder.join("greeting"))? == "from the host\n");
    client.remove_pod(&pod).await?;
    Ok(())
}
