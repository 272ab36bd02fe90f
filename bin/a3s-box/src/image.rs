//! `image build`, `image save`, `image load` and `image push`.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use a3s_box_host::Config;
use a3s_box_image::reference::{Reference, Version};
use a3s_box_image::{BuildRequest, Limits};

use crate::cli::{BuildArgs, ImageCommand, LoadArgs, Pull, PushArgs, SaveArgs};
use crate::credentials::Login;
use crate::progress::{self, Show};
use crate::standalone::{Standalone, absolute, is_local};
use crate::tell;
use crate::tell::note;

pub(crate) async fn run(config: Config, command: ImageCommand) -> anyhow::Result<u8> {
    match command {
        ImageCommand::Build(args) => build(config, args).await,
        ImageCommand::Save(args) => save(config, args).await,
        ImageCommand::Load(args) => load(config, args).await,
        ImageCommand::Push(args) => push(config, args).await,
    }
}

/// A file gets its name once it is complete.
async fn save(config: Config, args: SaveArgs) -> anyhow::Result<u8> {
    let to_stdout = args.output == Path::new("-");
    if to_stdout && io::stdout().is_terminal() {
        bail!("an archive is not for a terminal: name a file with -o, or send stdout elsewhere");
    }
    let store = Standalone::open(&config, &[]).await?.images;
    let name = args.image.clone();
    let work = move || -> anyhow::Result<_> {
        if to_stdout {
            return Ok(store.save(&name, io::stdout().lock())?);
        }
        let path = std::path::absolute(&args.output).context("-o")?;
        let parent = path.parent().context("-o names the root directory")?;
        let mut file = tempfile::Builder::new()
            .permissions(<fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o644))
            .tempfile_in(parent)
            .with_context(|| format!("could not make a file in {}", parent.display()))?;
        let digest = store.save(&name, io::BufWriter::new(file.as_file_mut()))?;
        file.persist(&path).with_context(|| format!("could not write {}", path.display()))?;
        Ok(digest)
    };
    let digest = tokio::task::spawn_blocking(work).await.context("saving the image")??;
    note!(
        "saved {} as {digest}: its layers are packed anew, so digests differ from the registry's",
        args.image
    );
    Ok(0)
}

async fn load(config: Config, args: LoadArgs) -> anyhow::Result<u8> {
    let open = move || -> anyhow::Result<_> {
        let spooled = if args.input == Path::new("-") { Some(spool()?) } else { None };
        let path = spooled.as_ref().map_or(args.input.as_path(), |file| file.path());
        let path = std::path::absolute(path).context("-i")?;
        let limits = Limits::default();
        let unpacked = a3s_box_image::decompress_archive(&path, limits.layer_bytes)?;
        let archive = unpacked.as_ref().map_or(path.as_path(), |file| file.path());
        let images = a3s_box_image::archived_images(archive, &limits)?;
        Ok((images, [spooled, unpacked]))
    };
    // The files vanish when dropped.
    let (images, _files) = tokio::task::spawn_blocking(open).await.context("reading the archive")??;
    let store = Standalone::open(&config, &[]).await?;
    for image in &images {
        let source = &image.source;
        let record = store.images.pull(source, None, progress::observer(Show::Quiet, source)).await?;
        let names = match image.tags.is_empty() {
            true => vec![record.display_name()],
            false => image.tags.iter().map(String::as_str).collect(),
        };
        names.iter().for_each(|name| tell::out(format_args!("{name} {}\n", record.id)));
    }
    store.images.settle().await;
    if images.is_empty() {
        bail!("the archive holds no image");
    }
    Ok(0)
}

async fn push(config: Config, args: PushArgs) -> anyhow::Result<u8> {
    let login = Login::new(&args.login)?;
    let destination = args.destination.as_ref().unwrap_or(&args.image);
    let auth = login.for_image(destination).await?;
    let store = Standalone::open(&config, &args.registry.plain_http).await?;
    let digest = store.images.push(&absolute(&args.image), destination, auth).await?;
    if is_local(&args.image) {
        note!("pushed {} to {destination} as it is", args.image);
    } else {
        note!(
            "pushed {} to {destination}: its layers are packed anew, so digests differ from before",
            args.image
        );
    }
    tell::out(format_args!("{digest}\n"));
    Ok(0)
}

/// Archives are read out of order, which stdin cannot be.
fn spool() -> anyhow::Result<tempfile::NamedTempFile> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        bail!("-i - reads the archive from a pipe or file, and stdin is a terminal");
    }
    let mut file = tempfile::NamedTempFile::new().context("could not make a temporary file")?;
    io::copy(&mut stdin.lock(), &mut file).context("could not keep what stdin has in a temporary file")?;
    Ok(file)
}

/// Builds into the given directory, or into the store of `run`.
async fn build(config: Config, args: BuildArgs) -> anyhow::Result<u8> {
    let names = args.tags.iter().map(|tag| normal(tag)).collect::<anyhow::Result<Vec<_>>>()?;
    if args.output.is_none() && names.is_empty() {
        bail!("the image needs a name to be kept by: give -t NAME, or --output oci:DIR");
    }
    let output = args.output.as_deref().map(directory).transpose()?;
    let file = args.file.unwrap_or_else(|| args.context.join("Dockerfile"));
    let base = match a3s_box_image::registry_base(&file)? {
        Some(name) => Some(base(&config, &name, &args.registry.plain_http, &Login::new(&args.login)?).await?),
        None => None,
    };
    let request = BuildRequest {
        file,
        context: args.context,
        base: base.as_ref().map(|archive| archive.path().to_owned()),
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

/// The base of a build as an archive: from the store of `run`, into which it is pulled if it is not there.
async fn base(
    config: &Config,
    name: &str,
    plain_http: &[String],
    login: &Login,
) -> anyhow::Result<tempfile::NamedTempFile> {
    let store = Standalone::open(config, plain_http).await?;
    let image =
        store.image(name, Pull::Missing, Show::Quiet, login).await.with_context(|| format!("FROM {name}"))?;
    let images = store.images.clone();
    let save = move || -> anyhow::Result<_> {
        let mut file = tempfile::NamedTempFile::new().context("could not make a temporary file")?;
        images.save(&image.id, io::BufWriter::new(file.as_file_mut()))?;
        Ok(file)
    };
    let file = tokio::task::spawn_blocking(save).await.context("saving the base")??;
    // The store is opened again for what is built.
    store.images.settle().await;
    Ok(file)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{LoginArgs, RegistryArgs};

    #[tokio::test]
    async fn an_image_of_the_store_is_a_base_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let config = || Config::default().with_directories(dir.path().join("root"), dir.path().join("run"));
        let context = dir.path().join("context");
        fs::create_dir(&context).unwrap();
        fs::write(context.join("f"), "x").unwrap();
        for (name, dockerfile) in
            [("base:1", "FROM scratch\nENV A=1\nCOPY f /d/\n"), ("app:1", "FROM base:1\nCOPY f /d/second\n")]
        {
            fs::write(context.join("Dockerfile"), dockerfile).unwrap();
            let args = BuildArgs {
                file: None,
                tags: vec![name.to_owned()],
                output: None,
                context: context.clone(),
                registry: RegistryArgs { plain_http: Vec::new() },
                login: LoginArgs::default(),
            };
            assert_eq!(build(config(), args).await.unwrap(), 0);
        }
        let store = Standalone::open(&config(), &[]).await.unwrap();
        let app = store.images.find("app:1").unwrap().unwrap();
        assert_eq!((app.layers.len(), app.config.env), (2, vec!["A=1".to_owned()]));
    }
    #[tokio::test]
    async fn a_compressed_archive_is_loaded() {
        // It failed with words about a checksum.
        let dir = tempfile::tempdir().unwrap();
        let config = || Config::default().with_directories(dir.path().join("root"), dir.path().join("run"));
        let image = serde_json::json!({"rootfs": {"type": "layers", "diff_ids": []}});
        let manifest = serde_json::json!([{"Config": "c.json", "RepoTags": ["a:1", "b:2"], "Layers": []}]);
        let packed = fs::File::create(dir.path().join("image.tar.gz")).unwrap();
        let packed = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
        let mut builder = tar::Builder::new(packed);
        for (name, document) in [("c.json", image), ("manifest.json", manifest)] {
            let bytes = document.to_string().into_bytes();
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, name, &bytes[..]).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap();
        let args = LoadArgs { input: dir.path().join("image.tar.gz") };
        assert_eq!(load(config(), args).await.unwrap(), 0);
        let store = Standalone::open(&config(), &[]).await.unwrap();
        let record = store.images.find("a:1").unwrap().unwrap();
        assert_eq!(record.repo_tags, ["docker.io/library/a:1", "docker.io/library/b:2"]);
    }
}
