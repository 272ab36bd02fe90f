//! `cp`: a tar stream through the container's own `tar`, as kubectl does it.
//!
//! ```text
//! out of a container   its tar writes  ─> unpack   which believes nothing: the guest is hostile
//! into a container     pack            ─> its tar reads
//! ```

mod pack;
mod unpack;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_util::io::SyncIoBridge;

use a3s_box_cri::client::{Client, Container};
use a3s_box_streaming::backend::Wanted;
use a3s_box_streaming::client::{Call, OutcomeError, Transport};

use super::args::CpArgs;
use super::find;
use crate::tell::note;

/// The most that is shown of what the container's tar complained about.
const MAX_WORDS: u64 = 4096;
/// A tar whose stream broke gets this long to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Here(PathBuf),
    There { container: String, path: String },
}

impl Place {
    /// What begins with `/` or `.` is of this machine, whatever colons follow.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a path is needed".to_owned());
        }
        match text.split_once(':') {
            Some((container, path)) if !text.starts_with(['/', '.']) => {
                if container.is_empty() || path.is_empty() {
                    return Err(format!(
                        "{text:?} is not CONTAINER:PATH; a path of this machine may begin with ./"
                    ));
                }
                Ok(Self::There { container: container.to_owned(), path: path.to_owned() })
            }
            Some(_) | None => Ok(Self::Here(text.into())),
        }
    }
}

pub(super) async fn cp(mut client: Client, args: CpArgs) -> anyhow::Result<u8> {
    match (args.from, args.to) {
        (Place::There { container, path }, Place::Here(target)) => {
            let container = find::container(&mut client, &container).await?;
            out_of(&mut client, &container, &path, &target).await?;
        }
        (Place::Here(source), Place::There { container, path }) => {
            let container = find::container(&mut client, &container).await?;
            into(&mut client, &container, &source, &path).await?;
        }
        (Place::Here(_), Place::Here(_)) => {
            bail!("neither is CONTAINER:PATH; to copy on this machine there is cp(1)")
        }
        (Place::There { .. }, Place::There { .. }) => {
            bail!("both are in containers; copy to this machine first, then from it")
        }
    }
    Ok(0)
}

async fn out_of(client: &mut Client, container: &Container, path: &str, target: &Path) -> anyhow::Result<()> {
    let (parent, base) = split(path);
    let destination = unpack::Destination::new(target, &base)?;
    let member = if base == "." { base.clone() } else { format!("./{base}") };
    let wanted = Wanted { stdin: false, stdout: true, stderr: true };
    let call = start(client, container, &["tar", "-c", "-f", "-", "-C", &parent, &member], wanted).await?;
    let bridge = SyncIoBridge::new(call.stdout.context("the call has no output")?);
    let unpacked = tokio::task::spawn_blocking(move || destination.unpack(bridge)).await?;
    let ended = ended(call.stderr, call.outcome, container);
    let left_out = both(unpacked.map_err(Into::into), ended).await.with_context(|| {
        format!("could not copy {path} from container {} to {}", container.name, target.display())
    })?;
    tell_left_out(left_out);
    Ok(())
}

async fn into(client: &mut Client, container: &Container, source: &Path, path: &str) -> anyhow::Result<()> {
    // Its name, also of `.`; what a link leads to is meant.
    let whole = source.canonicalize().with_context(|| format!("could not find {}", source.display()))?;
    let own = source.file_name().or(whole.file_name()).map(|name| name.to_string_lossy().into_owned());
    let own = own.context("the root of this machine has no name; copy what is in it")?;
    let (parent, name) = if path.ends_with('/') || is_directory(client, container, path).await? {
        (path.to_owned(), own)
    } else {
        split(path)
    };
    let wanted = Wanted { stdin: true, stdout: false, stderr: true };
    let call = start(client, container, &["tar", "-x", "-f", "-", "-C", &parent], wanted).await?;
    let mut bridge = SyncIoBridge::new(call.stdin.context("the call has no input")?);
    let packed = tokio::task::spawn_blocking(move || {
        let packed = pack::pack(&whole, &name, &mut bridge);
        // tar reads on after the archive, and dropping the writer ends nothing over WebSocket.
        bridge.shutdown().ok();
        packed
    })
    .await?;
    let ended = ended(call.stderr, call.outcome, container);
    let left_out = both(packed.map_err(Into::into), ended).await.with_context(|| {
        format!("could not copy {} to {path} in container {}", source.display(), container.name)
    })?;
    tell_left_out(left_out);
    Ok(())
}

/// The directory and what in it is meant; `.` is the directory itself.
fn split(path: &str) -> (String, String) {
    let trimmed = path.trim_end_matches('/');
    let (parent, base) = match trimmed.rsplit_once('/') {
        _ if trimmed.is_empty() => return ("/".to_owned(), ".".to_owned()),
        Some(("", base)) => ("/", base),
        Some((parent, base)) => (parent, base),
        None => (".", trimmed),
    };
    match base {
        "." | ".." => (trimmed.to_owned(), ".".to_owned()),
        base => (parent.to_owned(), base.to_owned()),
    }
}

async fn start(
    client: &mut Client,
    container: &Container,
    command: &[&str],
    wanted: Wanted,
) -> anyhow::Result<Call> {
    let command: Vec<_> = command.iter().map(|word| (*word).to_owned()).collect();
    let target = client.exec(&container.id, &command, false, wanted).await?;
    Ok(Call::connect(&target, Transport::WebSocket, wanted, false).await?)
}

/// Without a program that could tell it counts as none.
async fn is_directory(client: &mut Client, container: &Container, path: &str) -> anyhow::Result<bool> {
    let wanted = Wanted { stdin: false, stdout: true, stderr: false };
    let call = start(client, container, &["test", "-d", path], wanted).await?;
    match call.outcome.wait().await {
        Ok(code) => Ok(code == 0),
        Err(OutcomeError::Failed { .. }) => Ok(false),
        Err(lost @ OutcomeError::Lost) => Err(lost.into()),
    }
}

/// What the container's tar says at its end.
async fn ended(
    stderr: Option<impl AsyncRead + Unpin>,
    outcome: a3s_box_streaming::client::Outcome,
    container: &Container,
) -> anyhow::Result<()> {
    let mut words = Vec::new();
    if let Some(mut stderr) = stderr {
        (&mut stderr).take(MAX_WORDS).read_to_end(&mut words).await.ok();
        tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await.ok();
    }
    match outcome.wait().await {
        Ok(0) => Ok(()),
        Ok(code) => Err(anyhow!(
            "tar in the container ended with {code}: {}",
            String::from_utf8_lossy(&words).trim().escape_debug()
        )),
        Err(OutcomeError::Failed { message }) => Err(anyhow!(message)).with_context(|| {
            format!(
                "tar could not be run in container {}; its image must have it for `a3s-box cp`, as for kubectl cp",
                container.name
            )
        }),
        Err(lost @ OutcomeError::Lost) => Err(lost.into()),
    }
}

/// Both must succeed. A stream that broke is often the other side's doing, which knows better why.
async fn both<T>(
    ours: anyhow::Result<T>,
    theirs: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<T> {
    match ours {
        Ok(done) => theirs.await.map(|()| done),
        Err(error) => match tokio::time::timeout(LAST_WORDS, theirs).await {
            Ok(Err(theirs)) => Err(theirs),
            Ok(Ok(())) | Err(_) => Err(error),
        },
    }
}

/// Names that were not copied, with a bound on how many are kept.
#[derive(Debug, Default, PartialEq, Eq)]
struct LeftOut {
    count: usize,
    first: Vec<String>,
}

impl LeftOut {
    const SHOWN: usize = 5;

    fn add(&mut self, name: &str) {
        self.count += 1;
        if self.first.len() < Self::SHOWN {
            self.first.push(name.escape_debug().to_string());
        }
    }
}

fn tell_left_out(left_out: LeftOut) {
    let LeftOut { count, first } = left_out;
    if count > 0 {
        let more = if count > first.len() { ", …" } else { "" };
        note!(
            "left out, because they are neither files nor directories: {count} ({}{more})",
            first.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_a_container_has_a_colon_and_begins_with_its_name() {
        let there = |container: &str, path: &str| {
            Ok(Place::There { container: container.to_owned(), path: path.to_owned() })
        };
        assert_eq!(Place::parse("web:/etc/x"), there("web", "/etc/x"));
        assert_eq!(Place::parse("default/web/main:a:b"), there("default/web/main", "a:b"));
        for here in ["/a:b", "./a:b", "../a:b", "a/b"] {
            assert_eq!(Place::parse(here), Ok(Place::Here(here.into())));
        }
        for bad in ["", ":x", "web:"] {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_are_split_into_a_directory_and_what_is_in_it() {
        let split = |path| {
            let (parent, base) = split(path);
            format!("{parent} {base}")
        };
        assert_eq!(split("/etc/hosts"), "/etc hosts");
        assert_eq!(split("/etc/"), "/ etc");
        assert_eq!(split("/etc"), "/ etc");
        assert_eq!(split("/"), "/ .");
        assert_eq!(split("file"), ". file");
        assert_eq!(split("/srv/."), "/srv/. .");
        assert_eq!(split("/srv/.."), "/srv/.. .");
        assert_eq!(split("."), ". .");
    }

    #[tokio::test]
    async fn the_other_sides_reason_counts_more_than_a_broken_stream() {
        let broken = || Err::<(), _>(anyhow!("the stream broke"));
        let told = both(broken(), async { Err(anyhow!("no such file")) }).await.unwrap_err();
        assert_eq!(told.to_string(), "no such file");
        let told = both(broken(), async { Ok(()) }).await.unwrap_err();
        assert_eq!(told.to_string(), "the stream broke");
    }
}
