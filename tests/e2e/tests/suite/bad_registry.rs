//! Registries that refuse, fail, hang or lie, played by a few lines of HTTP.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use a3s_box_e2e::client::Client;
use a3s_box_e2e::image::{Blob, Encoding, Image, Layer, MANIFEST_TYPE, digest};
use a3s_box_e2e::registry::write_hosts_toml;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::suite::Suite;

/// What a path is answered with.
#[derive(Clone)]
pub(crate) enum Reply {
    Status(u16),
    Bytes {
        content_type: &'static str,
        body: Vec<u8>,
    },
    /// Promises the whole length and closes after half.
    Half(Vec<u8>),
    /// The whole, in pieces with a pause after each.
    Slow(Vec<u8>),
    /// Takes the request and says nothing.
    Silence,
}

const SLOW_PIECES: usize = 8;
const SLOW_PAUSE: Duration = Duration::from_millis(25);

/// A registry that answers as told; ends with this value.
pub(crate) struct FakeRegistry {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl FakeRegistry {
    async fn start(suite: &Suite, replies: HashMap<String, Reply>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        write_hosts_toml(&suite.settings().certs_dir(), &address.to_string())?;
        let replies = Arc::new(replies);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let replies = Arc::clone(&replies);
                // A client that goes away is its own business.
                tokio::spawn(async move { answer(stream, &replies).await.ok() });
            }
        });
        Ok(Self { address, task })
    }

    /// Serves an image whose blobs may have been tampered with.
    pub(crate) async fn serving(
        suite: &Suite,
        repository: &str,
        image: &Image,
        tampered: HashMap<String, Reply>,
    ) -> Result<Self> {
        let mut replies = HashMap::from([("/v2/".to_owned(), Reply::Status(200))]);
        let manifest = Reply::Bytes { content_type: MANIFEST_TYPE, body: image.manifest.bytes.clone() };
        for name in ["1", image.manifest.digest.as_str()] {
            replies.insert(format!("/v2/{repository}/manifests/{name}"), manifest.clone());
        }
        for Blob { digest, bytes } in &image.blobs {
            let honest = Reply::Bytes { content_type: "application/octet-stream", body: bytes.clone() };
            let reply = tampered.get(digest).cloned().unwrap_or(honest);
            replies.insert(format!("/v2/{repository}/blobs/{digest}"), reply);
        }
        Self::start(suite, replies).await
    }

    /// `127.0.0.1:PORT`, as it stands in image references.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn reference(&self, repository: &str) -> String {
        format!("{}/{repository}:1", self.address)
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(stream: TcpStream, replies: &HashMap<String, Reply>) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    stream.read_line(&mut request).await?;
    let mut header = String::new();
    while stream.read_line(&mut header).await? > 0 && header != "\r\n" {
        header.clear();
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let stream = stream.get_mut();
    match replies.get(path).unwrap_or(&Reply::Status(404)) {
        Reply::Status(status) => {
            let text = format!("HTTP/1.1 {status} Told\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
            stream.write_all(text.as_bytes()).await?;
        }
        Reply::Bytes { content_type, body } => {
            stream.write_all(head(content_type, body.len(), &digest(body)).as_bytes()).await?;
            if method != "HEAD" {
                stream.write_all(body).await?;
            }
        }
        Reply::Half(body) => {
            stream.write_all(head("application/octet-stream", body.len(), &digest(body)).as_bytes()).await?;
            stream.write_all(&body[..body.len() / 2]).await?;
        }
        Reply::Slow(body) => {
            stream.write_all(head("application/octet-stream", body.len(), &digest(body)).as_bytes()).await?;
            for piece in body.chunks(body.len().div_ceil(SLOW_PIECES).max(1)) {
                stream.write_all(piece).await?;
                tokio::time::sleep(SLOW_PAUSE).await;
            }
        }
        Reply::Silence => tokio::time::sleep(Duration::from_secs(3600)).await,
    }
    stream.shutdown().await?;
    Ok(())
}

fn head(content_type: &str, length: usize, digest: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Docker-Content-Digest: {digest}\r\n\r\n"
    )
}

/// The failure of a pull that must fail and leave no image.
async fn failure(suite: &Suite, reference: &str) -> Result<Status> {
    failure_of(suite.client()?, reference).await
}

async fn failure_of(mut client: Client, reference: &str) -> Result<Status> {
    let error = client.pull(reference).await.err().with_context(|| format!("{reference} was pulled"))?;
    ensure!(error.message().contains(reference), "the message does not name {reference}: {error}");
    Ok(error)
}

pub(crate) async fn statuses_of_a_registry_keep_their_meaning(suite: &Suite) -> Result<()> {
    let cases = [
        ("denied", 401, &[Code::Unauthenticated, Code::PermissionDenied][..]),
        ("gone", 404, &[Code::NotFound]),
        ("busy", 429, &[Code::Unavailable, Code::ResourceExhausted]),
        ("broken", 500, &[Code::Unavailable]),
    ];
    let mut replies = HashMap::from([("/v2/".to_owned(), Reply::Status(200))]);
    for (name, status, _) in cases {
        replies.insert(format!("/v2/{name}/manifests/1"), Reply::Status(status));
    }
    let registry = FakeRegistry::start(suite, replies).await?;
    for (name, status, codes) in cases {
        let error = failure(suite, &registry.reference(name)).await?;
        ensure!(codes.contains(&error.code()), "HTTP status {status}: {error}");
    }
    Ok(())
}

/// Waiting for its limits takes more than a minute in which nothing else happens, so it goes on beside other scenarios.
pub(crate) async fn a_registry_hangs(suite: &Suite) -> Result<()> {
    let replies = HashMap::from([
        ("/v2/".to_owned(), Reply::Silence),
        ("/v2/silent/manifests/1".to_owned(), Reply::Silence),
    ]);
    let registry = FakeRegistry::start(suite, replies).await?;
    let client = suite.client()?;
    let pull = async move {
        let asked = Instant::now();
        let error = failure_of(client, &registry.reference("silent")).await?;
        ensure!(matches!(error.code(), Code::DeadlineExceeded | Code::Unavailable), "{error}");
        ensure!(asked.elapsed() < Duration::from_secs(180), "it took {:?}", asked.elapsed());
        Ok(())
    };
    suite.hanging().replace(tokio::spawn(pull));
    Ok(())
}

pub(crate) async fn a_registry_that_hangs_costs_a_bounded_time(suite: &Suite) -> Result<()> {
    let started = suite.hanging().is_some();
    if !started {
        a_registry_hangs(suite).await?;
    }
    let pull = suite.hanging().take().context("the pull was started")?;
    pull.await.context("the pull from a registry that hangs")?
}

/// An image of one layer with a file of some size, and that layer's digest and bytes.
fn victim() -> Result<(Image, Blob)> {
    let noise: Vec<u8> = (0..200_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let layer = Layer::new().file("noise", 0o644, &noise)?;
    let image = Image::new(vec![(layer, Encoding::Gzip)], &json!({}))?;
    let blob = image.blobs.first().context("an image with a layer")?.clone();
    Ok((image, blob))
}

pub(crate) async fn a_layer_that_is_cut_off_fails_the_pull(suite: &Suite) -> Result<()> {
    let (image, layer) = victim()?;
    let tampered = HashMap::from([(layer.digest.clone(), Reply::Half(layer.bytes))]);
    let registry = FakeRegistry::serving(suite, "cut", &image, tampered).await?;
    let error = failure(suite, &registry.reference("cut")).await?;
    ensure!(matches!(error.code(), Code::Unavailable | Code::DataLoss), "{error}");
    ensure!(error.message().contains(&layer.digest), "the message does not name the layer: {error}");
    Ok(())
}

pub(crate) async fn a_layer_with_other_bytes_than_promised_fails_the_pull(suite: &Suite) -> Result<()> {
    let (image, layer) = victim()?;
    let mut bytes = layer.bytes;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let lie = Reply::Bytes { content_type: "application/octet-stream", body: bytes };
    let registry =
        FakeRegistry::serving(suite, "lie", &image, HashMap::from([(layer.digest.clone(), lie)])).await?;
    let error = failure(suite, &registry.reference("lie")).await?;
    ensure!(error.code() == Code::DataLoss, "{error}");
    ensure!(error.message().contains(&layer.digest), "the message does not name the layer: {error}");
    Ok(())
}

pub(crate) async fn a_layer_with_names_that_cannot_be_fails_the_pull(suite: &Suite) -> Result<()> {
    let climbing = Layer::new().file_named_raw(b"a/../../escaped", b"out")?;
    let chain = Layer::new().symlink("up", "../../..")?.hard_link("stolen", "up/etc/shadow")?;
    let long = Layer::new().file(&"n".repeat(5000), 0o644, b"x")?;
    for (name, layer) in [("climb", climbing), ("chain", chain), ("long", long)] {
        let image = Image::new(vec![(layer, Encoding::Plain)], &json!({}))?;
        let registry = FakeRegistry::serving(suite, name, &image, HashMap::new()).await?;
        let error = failure(suite, &registry.reference(name)).await?;
        ensure!(matches!(error.code(), Code::DataLoss | Code::FailedPrecondition), "{name}: {error}");
    }
    Ok(())
}

pub(crate) async fn a_config_that_lies_about_its_layers_fails_the_pull(suite: &Suite) -> Result<()> {
    let (image, _) = victim()?;
    let other = Image::new(vec![(Layer::new().file("other", 0o644, b"x")?, Encoding::Gzip)], &json!({}))?;
    // The manifest names the layer of one image and the configuration of another.
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest.bytes)?;
    let foreign: serde_json::Value = serde_json::from_slice(&other.manifest.bytes)?;
    manifest["config"] = foreign["config"].clone();
    let blobs = image.blobs.iter().chain(&other.blobs).cloned().collect();
    let mixed = Image { blobs, manifest: Blob::new(serde_json::to_vec(&manifest)?) };
    let registry = FakeRegistry::serving(suite, "mixed", &mixed, HashMap::new()).await?;
    let error = failure(suite, &registry.reference("mixed")).await?;
    ensure!(error.code() == Code::DataLoss, "{error}");
    Ok(())
}
