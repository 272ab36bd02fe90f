//! Images made in memory, a registry that can misbehave, and records in memory.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use a3s_box_image::digest::Digest;
use a3s_box_image::{ImageStore, ImageStoreConfig, Retries, Timeouts};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::HeaderMap;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

/// Records in memory; commits, or one call, can be told to fail.
#[derive(Default)]
pub(crate) struct Memory {
    records: Mutex<BTreeMap<(&'static str, String), Vec<u8>>>,
    pub(crate) fail_commits: std::sync::atomic::AtomicBool,
    /// The call that fails, counted down; `None`: none.
    pub(crate) calls_left: Mutex<Option<usize>>,
}

impl Memory {
    pub(crate) fn forget_table(&self, table: &str) {
        self.records.lock().unwrap().retain(|(name, _), _| *name != table);
    }

    fn count(&self) -> Result<(), StorageError> {
        let mut left = self.calls_left.lock().unwrap();
        *left = left.and_then(|left| left.checked_sub(1));
        match *left {
            Some(0) => Err(disk_full()),
            _ => Ok(()),
        }
    }
}

fn disk_full() -> StorageError {
    let source = std::io::Error::from(std::io::ErrorKind::StorageFull).into();
    StorageError { operation: "commit".into(), source }
}

impl Storage for Memory {
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError> {
        self.count()?;
        Ok(self.records.lock().unwrap().get(&(table.0, key.to_owned())).cloned())
    }

    fn scan(&self, table: Table) -> Result<Vec<Record>, StorageError> {
        self.count()?;
        let records = self.records.lock().unwrap();
        let ours = records.iter().filter(|((name, _), _)| *name == table.0);
        Ok(ours.map(|((_, key), value)| (key.clone(), value.clone())).collect())
    }

    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError> {
        self.count()?;
        if self.fail_commits.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(disk_full());
        }
        let mut records = self.records.lock().unwrap();
        for change in changes {
            match change {
                Change::Put { table, key, value } => records.insert((table.0, key), value),
                Change::Delete { table, key } => records.remove(&(table.0, key)),
            };
        }
        Ok(())
    }
}

/// A store in a directory of its own, impatient.
pub(crate) struct Fixture {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) storage: Arc<Memory>,
    pub(crate) store: ImageStore,
}

pub(crate) fn config(directory: &Path) -> ImageStoreConfig {
    let mut config = ImageStoreConfig::new(directory);
    config.certs_dirs = vec![directory.join("certs.d")];
    config.cache_bytes = 0;
    config.timeouts = Timeouts {
        connect: Duration::from_millis(500),
        headers: Duration::from_millis(500),
        idle: Duration::from_millis(500),
        slowest: 16 << 10,
    };
    config.retries =
        Retries { attempts: 2, pause: Duration::from_millis(10), longest_pause: Duration::from_secs(1) };
    config
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let storage = Arc::new(Memory::default());
        let store = ImageStore::open(config(directory.path()), storage.clone()).unwrap();
        Self { directory, storage, store }
    }

    /// Writes `certs.d/<host>/hosts.toml`.
    pub(crate) fn hosts(&self, host: &str, text: &str) {
        let directory = self.directory.path().join("certs.d").join(host);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("hosts.toml"), text).unwrap();
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.directory.path().join("images")
    }

    /// Nothing temporary is left. A converting thread may need a moment to see that it is alone.
    pub(crate) async fn assert_tmp_is_empty(&self) {
        let tmp = self.images().join("tmp");
        let begun = Instant::now();
        loop {
            let left: Vec<_> = std::fs::read_dir(&tmp).unwrap().map(|entry| entry.unwrap().path()).collect();
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(2), "left behind: {left:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A tar of files by path.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        if path.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        header.set_cksum();
        builder.append(&header, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that do not compress.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A layer: what is served and what it uncompresses to.
pub(crate) struct Layer {
    pub(crate) blob: Vec<u8>,
    pub(crate) tar: Vec<u8>,
    pub(crate) media_type: &'static str,
}

impl Layer {
    pub(crate) fn gzip(tar: Vec<u8>) -> Self {
        Self { blob: gzip(&tar), tar, media_type: "application/vnd.oci.image.layer.v1.tar+gzip" }
    }
}

/// An image's documents by digest, manifest last.
pub(crate) struct Image {
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) manifest_digest: Digest,
    pub(crate) id: Digest,
}

impl Image {
    pub(crate) fn new(layers: &[Layer]) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::sha256(&layer.tar).to_string()).collect();
        Self::with_diff_ids(layers, &diff_ids)
    }

    pub(crate) fn with_diff_ids(layers: &[Layer], diff_ids: &[String]) -> Self {
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux",
            "config": {"Cmd": ["/bin/true"], "Env": ["A=B"], "User": "7:8"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let id = Digest::sha256(&config);
        let mut blobs = BTreeMap::new();
        let mut descriptors = Vec::new();
        for layer in layers {
            let digest = Digest::sha256(&layer.blob).to_string();
            descriptors.push(serde_json::json!({
                "mediaType": layer.media_type, "digest": digest, "size": layer.blob.len(),
            }));
            blobs.insert(digest, layer.blob.clone());
        }
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": id.to_string(), "size": config.len()},
            "layers": descriptors,
        });
        blobs.insert(id.to_string(), config);
        let manifest = serde_json::to_vec(&manifest).unwrap();
        Self { manifest_digest: Digest::sha256(&manifest), manifest, blobs, id }
    }
}

/// What the registry does with a request.
pub(crate) enum Behaviour {
    /// As it should.
    Serve,
    /// Answers so.
    Answer(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Never answers.
    Hang,
    /// Announces the right length, sends so much, and cuts the connection.
    CutAfter(usize),
    /// The same, but ends the body in good order.
    EndAfter(usize),
    /// Sends so much and then nothing more.
    StallAfter(usize),
    /// Announces no length, sends so much, and cuts the connection before the end of the body.
    UnendedAfter(usize),
    /// Serves these bytes instead.
    Instead(Vec<u8>),
    /// The same, and cuts the connection before the end of the body.
    InsteadUnended(Vec<u8>),
}

pub(crate) type Rule = Box<dyn Fn(&Seen) -> Behaviour + Send + Sync>;

/// A request that came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Path and query.
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    /// How many requests for this path came before.
    pub(crate) nth: usize,
}

pub(crate) struct Registry {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    /// By path.
    content: Mutex<HashMap<String, (String, Vec<u8>)>>,
    seen: Mutex<Vec<Seen>>,
    rule: Rule,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Registry {
    /// Listens on loopback and serves images under a rule.
    pub(crate) async fn start(rule: impl Fn(&Seen) -> Behaviour + Send + Sync + 'static) -> Self {
        Self::listen(rule, None).await
    }

    /// The same over TLS.
    pub(crate) async fn start_tls(tls: tokio_rustls::rustls::ServerConfig) -> Self {
        Self::listen(|_| Behaviour::Serve, Some(tokio_rustls::TlsAcceptor::from(Arc::new(tls)))).await
    }

    async fn listen(
        rule: impl Fn(&Seen) -> Behaviour + Send + Sync + 'static,
        tls: Option<tokio_rustls::TlsAcceptor>,
    ) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared =
            Arc::new(Shared { content: Mutex::default(), seen: Mutex::default(), rule: Box::new(rule) });
        let serving = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (shared, tls) = (Arc::clone(&serving), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, shared).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, shared).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, shared, task }
    }

    pub(crate) async fn good() -> Self {
        Self::start(|_| Behaviour::Serve).await
    }

    /// Puts an image under `repository:tag` and returns its reference.
    pub(crate) fn put(&self, repository: &str, tag: &str, image: &Image) -> String {
        self.put_blobs(repository, image);
        let kind = "application/vnd.oci.image.manifest.v1+json";
        self.put_manifest(repository, tag, kind, &image.manifest);
        format!("{}/{repository}:{tag}", self.address)
    }

    pub(crate) fn put_blobs(&self, repository: &str, image: &Image) {
        let mut content = self.shared.content.lock().unwrap();
        for (digest, bytes) in &image.blobs {
            let path = format!("/v2/{repository}/blobs/{digest}");
            content.insert(path, ("application/octet-stream".into(), bytes.clone()));
        }
    }

    pub(crate) fn put_manifest(&self, repository: &str, tag: &str, kind: &str, bytes: &[u8]) {
        let mut content = self.shared.content.lock().unwrap();
        for version in [tag.to_owned(), Digest::sha256(bytes).to_string()] {
            content.insert(format!("/v2/{repository}/manifests/{version}"), (kind.into(), bytes.to_vec()));
        }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }
}

async fn serve<S>(stream: S, shared: Arc<Shared>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |request| answer(Arc::clone(&shared), request));
    // A client that goes away is part of many tests.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

type Body = BoxBody<Bytes, std::io::Error>;

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed()
}

/// Some bytes and then an end of one of three kinds.
fn partial(bytes: Vec<u8>, end: Option<std::io::Error>, hang: bool) -> Body {
    let first = futures::stream::iter([Ok(Frame::data(Bytes::from(bytes)))]);
    let rest = futures::stream::once(async move {
        if hang {
            std::future::pending::<()>().await;
        }
        // Let the first bytes reach the client.
        tokio::time::sleep(Duration::from_millis(50)).await;
        end.map(Err)
    });
    let rest = futures::StreamExt::filter_map(rest, std::future::ready);
    BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(Box::pin(futures::StreamExt::chain(first, rest))))))
}

type Frames = std::pin::Pin<Box<dyn futures::Stream<Item = Result<Frame<Bytes>, std::io::Error>> + Send>>;

struct SyncStream(Mutex<Frames>);

impl futures::Stream for SyncStream {
    type Item = Result<Frame<Bytes>, std::io::Error>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.lock().unwrap().as_mut().poll_next(context)
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    let seen = {
        let mut all = shared.seen.lock().unwrap();
        let nth = all.iter().filter(|seen| seen.path == path).count();
        let seen = Seen { path: path.clone(), headers: request.headers().clone(), nth };
        all.push(seen.clone());
        seen
    };
    let content = shared.content.lock().unwrap().get(request.uri().path()).cloned();
    let error = |status: u16, code: &str| {
        let body = format!(r#"{{"errors":[{{"code":"{code}","message":"so says the registry"}}]}}"#);
        Response::builder().status(status).body(full(body.into_bytes())).unwrap()
    };
    let behaviour = (shared.rule)(&seen);
    let upload = matches!(*request.method(), Method::POST | Method::PUT);
    if upload && matches!(behaviour, Behaviour::Serve) {
        return Ok(take(&shared, request).await);
    }
    let Some((kind, bytes)) = content else {
        return Ok(match behaviour {
            Behaviour::Answer(status, headers, body) => respond(status, headers, body),
            _ => error(404, "MANIFEST_UNKNOWN"),
        });
    };
    let length = bytes.len();
    let whole = || Response::builder().header("content-type", &kind).header("content-length", length);
    Ok(match behaviour {
        Behaviour::Serve => ranged(&seen, &kind, bytes),
        Behaviour::Answer(status, headers, body) => respond(status, headers, body),
        Behaviour::Hang => std::future::pending().await,
        Behaviour::CutAfter(n) => {
            let cut = std::io::Error::other("cut");
            whole().body(partial(bytes[..n].to_vec(), Some(cut), false)).unwrap()
        }
        Behaviour::EndAfter(n) => Response::new(partial(bytes[..n].to_vec(), None, false)),
        Behaviour::StallAfter(n) => whole().body(partial(bytes[..n].to_vec(), None, true)).unwrap(),
        Behaviour::UnendedAfter(_) if seen.headers.contains_key("range") => ranged(&seen, &kind, bytes),
        Behaviour::UnendedAfter(n) => unended(bytes[..n.min(length)].to_vec()),
        Behaviour::Instead(bytes) => Response::new(full(bytes)),
        Behaviour::InsteadUnended(bytes) => unended(bytes),
    })
}

fn unended(bytes: Vec<u8>) -> Response<Body> {
    Response::new(partial(bytes, Some(std::io::Error::other("cut")), false))
}

/// Takes an upload: a blob in one piece, or a manifest whose blobs are there.
async fn take(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().replace("%3A", ":");
    let kind = request.headers()["content-type"].to_str().unwrap().to_owned();
    if *request.method() == Method::POST {
        return respond(202, vec![("location", format!("{path}1?state=x"))], Vec::new());
    }
    let bytes = request.into_body().collect().await.unwrap().to_bytes().to_vec();
    let digest = Digest::sha256(&bytes).to_string();
    let mut content = shared.content.lock().unwrap();
    if let Some((repository, _)) = path.split_once("/blobs/uploads/") {
        if query != format!("state=x&digest={digest}") {
            return respond(400, Vec::new(), Vec::new());
        }
        content.insert(format!("{repository}/blobs/{digest}"), (kind, bytes));
        return respond(201, Vec::new(), Vec::new());
    }
    let (repository, _) = path.split_once("/manifests/").unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]);
    let blobs = layers.map(|blob| format!("{repository}/blobs/{}", blob["digest"].as_str().unwrap()));
    if !blobs.into_iter().all(|blob| content.contains_key(&blob)) {
        return respond(400, Vec::new(), Vec::new());
    }
    content.insert(format!("{repository}/manifests/{digest}"), (kind.clone(), bytes.clone()));
    content.insert(path, (kind, bytes));
    respond(201, Vec::new(), Vec::new())
}

fn respond(status: u16, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(name, value);
    }
    response.body(full(body)).unwrap()
}

fn ranged(seen: &Seen, kind: &str, bytes: Vec<u8>) -> Response<Body> {
    let response = Response::builder().header("content-type", kind);
    let from = seen.headers.get("range").and_then(|value| {
        value.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok()
    });
    match from {
        Some(from) if from >= bytes.len() => response
            .status(StatusCode::RANGE_NOT_SATISFIABLE)
            .header("content-range", format!("bytes */{}", bytes.len()))
            .body(full(Vec::new()))
            .unwrap(),
        Some(from) => response
            .status(StatusCode::PARTIAL_CONTENT)
            .header("content-range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()))
            .body(full(bytes[from..].to_vec()))
            .unwrap(),
        None => response.body(full(bytes)).unwrap(),
    }
}
