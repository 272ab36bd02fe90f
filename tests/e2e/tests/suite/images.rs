//! The image service and what containers see of layers.

use std::collections::HashMap;
use std::time::Duration;

use a3s_box_cri::proto::{
    ContainerConfig, Image as CriImage, ImageFsInfoRequest, ImageStatusRequest, LinuxContainerConfig,
    LinuxContainerSecurityContext, ListImagesRequest,
};
use a3s_box_e2e::client::{Client, image};
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::image::{Encoding, Image, Layer};
use a3s_box_e2e::registry::write_hosts_toml;
use a3s_box_e2e::sample::busybox_layer;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use tokio::process::Command;

use crate::bad_registry::{FakeRegistry, Reply};
use crate::suite::{Suite, exit_code, launch, log_lines};

fn small(text: &str) -> Result<Image> {
    let layer = Layer::new().file("text", 0o644, text.as_bytes())?;
    Image::new(vec![(layer, Encoding::Gzip)], &json!({ "Cmd": ["/text"] }))
}

async fn status(client: &mut Client, reference: &str) -> Result<Option<CriImage>> {
    let request = ImageStatusRequest { image: Some(image(reference)), verbose: false };
    Ok(client.images.image_status(request).await?.into_inner().image)
}

async fn listed(client: &mut Client) -> Result<Vec<CriImage>> {
    Ok(client.images.list_images(ListImagesRequest { filter: None }).await?.into_inner().images)
}

pub(crate) async fn an_image_is_pulled_listed_and_removed(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let pushed = small("one")?;
    let reference = suite.registry().push("e2e/small", "1", &pushed)?;
    let before = listed(&mut client).await?.len();
    ensure!(status(&mut client, &reference).await?.is_none(), "an image that was not pulled has a status");
    let id = client.pull(&reference).await?;
    let found = status(&mut client, &reference).await?.context("a pulled image has a status")?;
    ensure!(found.repo_tags == [reference.as_str()], "tags {:?}", found.repo_tags);
    let digest = format!("{}/e2e/small@{}", suite.registry().host(), pushed.manifest.digest);
    ensure!(found.repo_digests == [digest.as_str()], "digests {:?}", found.repo_digests);
    ensure!(found.size > 0 && (id == found.id || id == digest), "id {id}, found {}", found.id);
    ensure!(listed(&mut client).await?.len() == before + 1);
    let short = found.id.trim_start_matches("sha256:")[..12].to_owned();
    ensure!(
        status(&mut client, &short).await?.is_some_and(|image| image.id == found.id),
        "no status by short id"
    );
    let space = client.images.image_fs_info(ImageFsInfoRequest {}).await?.into_inner();
    let used =
        space.image_filesystems.first().and_then(|space| space.used_bytes).context("images use space")?;
    ensure!(used.value > 0);
    client.remove_image(&reference).await?;
    client.remove_image(&reference).await.context("a second removal")?;
    ensure!(status(&mut client, &reference).await?.is_none() && listed(&mut client).await?.len() == before);
    Ok(())
}

pub(crate) async fn a_pull_by_digest_is_answered_with_the_same_image(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let pushed = small("two")?;
    let reference = suite.registry().push("e2e/digest", "latest", &pushed)?;
    let by_digest = format!("{}/e2e/digest@{}", suite.registry().host(), pushed.manifest.digest);
    let first = client.pull(&by_digest).await?;
    let second = client.pull(&reference).await?;
    ensure!(first == second, "{first} and {second}");
    client.remove_image(&first).await?;
    ensure!(status(&mut client, &reference).await?.is_none());
    Ok(())
}

pub(crate) async fn layers_of_every_encoding_hide_what_they_delete(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let lower = Layer::new()
        .directory("data", 0o755)?
        .file("data/kept", 0o644, b"kept\n")?
        .file("data/deleted", 0o644, b"deleted\n")?
        .directory("full", 0o755)?
        .file("full/old", 0o644, b"old\n")?
        .symlink("link", "data/kept")?;
    let name = "n".repeat(200);
    let upper = Layer::new()
        .whiteout("data", "deleted")?
        .opaque("full")?
        .file("full/new", 0o644, b"new\n")?
        .hard_link("full/again", "full/new")?
        .file(&format!("data/{name}"), 0o600, b"long\n")?;
    let layers = vec![(busybox_layer()?, Encoding::Zstd), (lower, Encoding::Plain), (upper, Encoding::Gzip)];
    let reference = suite.registry().push("e2e/layers", "1", &Image::new(layers, &json!({}))?)?;
    client.pull(&reference).await?;

    let config = suite.pod("layers")?;
    let pod = client.run_pod(&config).await?;
    let script = format!(
        "cat /link; ls /data; ls /full; cat /data/{name}; stat -c %h /full/new; rm /data/kept && ls /data/kept; echo over > /full/new; cat /full/new"
    );
    let container = ContainerConfig { image: Some(image(&reference)), ..suite.script("main", &script) };
    let container = launch(&mut client, &pod, container, &config).await?;
    ensure!(exit_code(&client, &container).await? == 0);
    client.remove_pod(&pod).await?;
    let output: Vec<String> = log_lines(&config, "main")?
        .into_iter()
        .filter(|line| line.0 == "stdout")
        .map(|line| line.2)
        .collect();
    ensure!(output == ["kept", "kept", &name, "again", "new", "long", "2", "over"], "{output:?}");
    client.remove_image(&reference).await?;
    Ok(())
}

/// Each of these could not run, or not as it does elsewhere: overlayfs takes no layer twice, the root directory belonged to
/// root, and volumes of an image were not made.
pub(crate) async fn an_image_has_equal_layers_a_root_of_its_own_and_volumes(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let data = || {
        let layer = Layer::new().directory_of(1000, "data", 0o2770)?;
        Ok::<_, anyhow::Error>((layer.file("data/file", 0o644, b"image\n")?, Encoding::Gzip))
    };
    let between = Layer::new().file("between", 0o644, b"")?;
    let root = Layer::new().directory_of(1000, ".", 0o750)?;
    let layers = vec![
        (busybox_layer()?, Encoding::Zstd),
        data()?,
        (between, Encoding::Plain),
        data()?,
        (root, Encoding::Gzip),
        data()?,
    ];
    let volumes = json!({ "Volumes": { "/data": {}, "/made": {} } });
    let reference = suite.registry().push("e2e/volumes", "1", &Image::new(layers, &volumes)?)?;
    client.pull(&reference).await?;

    let config = suite.pod("image-volumes")?;
    let pod = client.run_pod(&config).await?;
    let script = "stat -c '%u %a' /; stat -c '%u %a' /data; cat /data/file; echo mine > /data/file; cat /data/file; \
        ls /made; echo x > /made/x; cat /made/x; touch /sealed 2>/dev/null || echo sealed";
    let expected = ["1000 750", "1000 2770", "image", "mine", "x", "sealed"];
    for name in ["first", "second"] {
        let security = LinuxContainerSecurityContext {
            readonly_rootfs: true,
            ..LinuxContainerSecurityContext::default()
        };
        let linux =
            LinuxContainerConfig { security_context: Some(security), ..LinuxContainerConfig::default() };
        let container = ContainerConfig {
            image: Some(image(&reference)),
            linux: Some(linux),
            ..suite.script(name, script)
        };
        let container = launch(&mut client, &pod, container, &config).await?;
        ensure!(exit_code(&client, &container).await? == 0);
        let lines: Vec<String> = log_lines(&config, name)?.into_iter().map(|line| line.2).collect();
        ensure!(lines == expected, "{name}: {lines:?}");
    }
    client.remove_pod(&pod).await?;
    client.remove_image(&reference).await?;
    Ok(())
}

/// The longest that a daemon lives before it is killed: about what a whole pull takes.
const PULL_MILLIS: u64 = 400;

/// An image of several layers, and a registry that takes its time with each.
async fn slow_image(suite: &Suite) -> Result<(Image, FakeRegistry)> {
    let layer = |seed: u32| {
        let noise: Vec<u8> =
            (0..300_000_u32).map(|n| ((n ^ seed).wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        Ok((Layer::new().file(&format!("noise{seed}"), 0o644, &noise)?, Encoding::Gzip))
    };
    let image = Image::new((1..=6).map(layer).collect::<Result<_>>()?, &json!({}))?;
    let slow = image.blobs.iter().map(|blob| (blob.digest.clone(), Reply::Slow(blob.bytes.clone())));
    let registry = FakeRegistry::serving(suite, "slow", &image, slow.collect::<HashMap<_, _>>()).await?;
    Ok((image, registry))
}

/// `a3s-box images verify` on a stopped daemon's store: what it prints, and whether all is good.
async fn verify(suite: &Suite, settings: &Settings) -> Result<(bool, String)> {
    let mut command = Command::new(suite.layout().cli());
    command.arg("--config").arg(settings.state.join("config.toml"));
    command.args(["images", "verify", "--daemon"]).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(60), command.output())
        .await
        .context("the verification did not end in time")?
        .context("starting a3s-box")?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// The moments are the same in every run: what failed once fails again, as far as clocks allow.
pub(crate) async fn a_pull_survives_kills_of_the_daemon_at_random_moments(suite: &Suite) -> Result<()> {
    // In the virtual node a start of the daemon takes long.
    let kills = if suite.backend() == "libkrun" { 5 } else { 50 };
    let (_, registry) = slow_image(suite).await?;
    let reference = registry.reference("slow");
    let mut settings = Settings {
        state: suite.state().join("killed"),
        backend: suite.backend().to_owned(),
        subnet: "10.213.81.0/24".to_owned(),
        extra: Vec::new(),
    };
    write_hosts_toml(&settings.certs_dir(), &registry.host())?;
    let mut state = 0x9e37_79b9_u64;
    let (mut cut, mut whole) = (0, 0);
    for kill in 0..kills {
        // Without a cache every pull begins at nothing; with one it goes on where the former ended.
        let cache = if kill % 2 == 0 { "0" } else { "1GiB" };
        settings.extra = vec![("images.cache_bytes".to_owned(), cache.to_owned())];
        let (daemon, mut client) = Daemon::start(suite.layout(), &settings).await?;
        client.remove_image(&reference).await?;
        let pulling = {
            let reference = reference.clone();
            tokio::spawn(async move { client.pull(&reference).await })
        };
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        tokio::time::sleep(Duration::from_millis((state >> 33) % PULL_MILLIS)).await;
        // Dropping it is `kill -9`.
        drop(daemon);
        match pulling.await? {
            Ok(_) => whole += 1,
            Err(_) => cut += 1,
        }
        let (good, text) =
            if kill % 10 == 9 { verify(suite, &settings).await? } else { (true, String::new()) };
        ensure!(good, "after {} kills: {text}", kill + 1);
    }
    ensure!(
        cut >= kills / 4,
        "of {kills} pulls only {cut} were cut short; {whole} were faster than the kill"
    );

    let (daemon, mut client) = Daemon::start(suite.layout(), &settings).await?;
    let id = client.pull(&reference).await.context("the pull after the last kill")?;
    ensure!(status(&mut client, &reference).await?.is_some_and(|image| image.id == id));
    let (refused, text) = verify(suite, &settings).await.map(|(good, text)| (!good, text))?;
    ensure!(refused && text.contains("stop it first"), "beside a running daemon: {text}");
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "the daemon ended with {ended}");
    let (good, text) = verify(suite, &settings).await?;
    ensure!(good && text.contains("8 files good, 0 damaged, 0 not measured yet"), "{text}");
    Ok(())
}
