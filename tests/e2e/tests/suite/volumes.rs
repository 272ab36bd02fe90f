//! Folders of the host and images in containers.

use std::fs;

use a3s_box_cri::proto::{ContainerConfig, Mount};
use a3s_box_e2e::client::image;
use a3s_box_e2e::image::{Encoding, Image, Layer};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use tonic::Code;

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

pub(crate) async fn an_image_is_mounted_read_only(suite: &Suite) -> Result<()> {
    let lower = Layer::new()
        .directory("weights", 0o755)?
        .file("weights/old", 0o644, b"old\n")?
        .file("run", 0o755, b"#!/bin/sh\necho executed\n")?
        .symlink("outside", "/bin/busybox")?;
    let upper = Layer::new().whiteout("weights", "old")?.file("weights/new", 0o644, b"new\n")?;
    let data =
        Image::new(vec![(lower, Encoding::Gzip), (upper, Encoding::Gzip)], &json!({ "Cmd": ["/run"] }))?;
    let name = suite.registry().push("volume-data", "1", &data)?;
    let mut client = suite.client()?;
    let config = suite.pod("image-volumes")?;
    let pod = client.run_pod(&config).await?;
    let mount = |inside: &str, sub_path: &str| Mount {
        container_path: inside.to_owned(),
        image: Some(image(&name)),
        image_sub_path: sub_path.to_owned(),
        readonly: true,
        ..Default::default()
    };
    let with = |mounts: Vec<Mount>, script: &str| ContainerConfig { mounts, ..suite.script("main", script) };

    let missing = client.create(&pod, with(vec![mount("/all", "")], ":"), &config).await.unwrap_err();
    ensure!(missing.code() == Code::NotFound, "{missing}");
    ensure!(missing.message().contains("config.mounts[0].image"), "{missing}");
    let id = client.pull(&name).await?;

    for sub_path in ["no/such", "outside"] {
        let refused =
            client.create(&pod, with(vec![mount("/all", sub_path)], ":"), &config).await.unwrap_err();
        ensure!(refused.code() == Code::InvalidArgument, "{refused}");
        ensure!(refused.message().contains(&format!("the image has no {sub_path:?}")), "{refused}");
    }

    let script = "cd /all; ls . weights; ./run; cat /part/new /one; \
        for file in /all/x /part/x /one; do echo x > $file || echo refused; done; \
        mount -o remount,rw /all || echo refused";
    let mounts = vec![mount("/all", ""), mount("/part", "weights"), mount("/one", "weights/new")];
    let container = launch(&mut client, &pod, with(mounts, script), &config).await?;
    exit_code(&client, &container).await?;
    let shown = client.container_status(&container).await?.mounts;
    ensure!(shown.len() == 3 && shown.iter().all(|mount| mount.readonly), "{shown:?}");
    let shown = shown[1].image.as_ref().context("the mount's image")?;
    ensure!((&shown.image, &shown.image_ref) == (&name, &id), "{shown:?}");
    client.stop_pod(&pod).await?;
    let lines = log_lines(&config, "main")?;
    let output: Vec<&str> =
        lines.iter().filter(|line| line.0 == "stdout").map(|line| line.2.as_str()).collect();
    let expected = [
        ".:", "outside", "run", "weights", "", "weights:", "new", "executed", "new", "new", "refused",
        "refused", "refused", "refused",
    ];
    ensure!(output == expected, "{lines:?}");
    client.remove_pod(&pod).await?;
    client.remove_image(&name).await?;
    Ok(())
}
