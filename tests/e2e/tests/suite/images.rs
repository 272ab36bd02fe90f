//! The image service and what containers see of layers.

use a3s_box_cri::proto::{
    ContainerConfig, Image as CriImage, ImageFsInfoRequest, ImageStatusRequest, ListImagesRequest,
};
use a3s_box_e2e::client::{Client, image};
use a3s_box_e2e::image::{Encoding, Image, Layer};
use a3s_box_e2e::sample::busybox_layer;
use anyhow::{Context, Result, ensure};
use serde_json::json;

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
