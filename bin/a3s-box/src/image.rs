//! `image build`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, bail};

use a3s_box_host::Config;
use a3s_box_image::BuildRequest;
use a3s_box_image::reference::{Reference, Version};

use crate::cli::BuildArgs;
use crate::progress::{self, Show};
use crate::standalone::Standalone;
use crate::tell;

/// Builds into the given directory, or into the store of `run`.
pub(crate) async fn build(config: Config, args: BuildArgs) -> anyhow::Result<u8> {
    let names = args.tags.iter().map(|tag| normal(tag)).collect::<anyhow::Result<Vec<_>>>()?;
    if args.output.is_none() && names.is_empty() {
        bail!("the image needs a name to be kept by: give -t NAME, or --output oci:DIR");
    }
    let output = args.output.as_deref().map(directory).transpose()?;
    let request = BuildRequest {
        file: args.file.unwrap_or_else(|| args.context.join("Dockerfile")),
        context: args.context,
        names: names.clone(),
        epoch: epoch()?,
    };
    // Beside its place, so that a build that fails leaves nothing there.
    let parent = match &output {
        Some(path) => path.parent().context("--output names the root directory")?.to_owned(),
        None => std::env::temp_dir(),
    };
    let scratch = tempfile::tempdir_in(&parent)
        .with_context(|| format!("could not make a directory in {}", parent.display()))?;
    let layout = scratch.path().join("image");
    fs::create_dir(&layout).context("could not make the directory of the image")?;
    let building = layout.clone();
    let digest = tokio::task::spawn_blocking(move || a3s_box_image::build(&request, &building))
        .await
        .context("building the image")??;
    if let Some(path) = output {
        fs::rename(&layout, &path).with_context(|| format!("could not write {}", path.display()))?;
        tell::out(format_args!("{digest}\n"));
        return Ok(0);
    }
    let store = Standalone::open(&config, &[]).await?;
    for name in &names {
        let source = format!("oci:{}:{name}", layout.display());
        let record = store.images.pull(&source, None, progress::observer(Show::Quiet, &source)).await?;
        tell::out(format_args!("{name} {}\n", record.id));
    }
    store.images.settle().await;
    Ok(0)
}

fn normal(tag: &str) -> anyhow::Result<String> {
    match tag.parse::<Reference>().with_context(|| format!("-t {tag}"))? {
        Reference::Registry(name) if matches!(name.version(), Version::Tag(_)) => Ok(name.to_string()),
        _ => bail!("-t {tag} is not NAME or NAME:TAG"),
    }
}

fn directory(output: &str) -> anyhow::Result<PathBuf> {
    let Some(path) = output.strip_prefix("oci:").filter(|path| !path.is_empty() && !path.contains(':'))
    else {
        bail!("--output {output} is not oci:DIR");
    };
    let path = std::path::absolute(path).with_context(|| format!("--output {output}"))?;
    if path.exists() {
        bail!("{} exists: remove it first, or name another directory", path.display());
    }
    Ok(path)
}

fn epoch() -> anyhow::Result<u64> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => {
            text.parse().with_context(|| format!("SOURCE_DATE_EPOCH {text:?} is not seconds since 1970"))
        }
        Err(_) => Ok(0),
    }
}
