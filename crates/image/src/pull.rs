//! One pull, from reference to record.
//!
//! Layers run at once up to the configured bound, in the manifest's order, so that a layer only
//! ever waits for ones that were started before it. Everything that a pull holds is dropped with
//! its future: connections, temporary files (by their guards), pins; the blocking thread of a
//! layer sees its channel close and ends.

mod feed;
mod layer;
mod lower;
mod source;
mod traffic;

use std::sync::Arc;
use std::time::SystemTime;

use futures::StreamExt;
use futures::stream;
use tokio::sync::watch;

use crate::auth::RegistryAuth;
use crate::digest::Digest;
use crate::error::{PullCause, PullError, Stage};
use crate::manifest::{Config, Platform, parse_config};
use crate::progress::PullProgress;
use crate::record::{ImageRecord, LayerRecord};
use crate::reference::Reference;
use crate::store::{Files, Inner, Pins, blocking};

use self::layer::{LayerJob, LayerReady, Made};
use self::source::{Found, LayerSource, Source};
pub use self::traffic::PullFigures;
use self::traffic::Running;
pub(crate) use self::traffic::Traffic;

/// A failure and the step it belongs to.
type Failed = (Stage, PullCause);

/// Shorthand for `map_err` with a stage.
fn at<E: Into<PullCause>>(stage: Stage) -> impl FnOnce(E) -> Failed {
    move |error| (stage, error.into())
}

/// Pulls an image into the store.
pub(crate) async fn pull(
    store: Arc<Inner>,
    reference: Reference,
    auth: Option<RegistryAuth>,
    progress: Arc<dyn PullProgress>,
) -> Result<ImageRecord, PullError> {
    let name = reference.to_string();
    tracing::info!(image = %name, "pulling");
    let traffic = Arc::clone(&store.traffic);
    let running = Running::begin(&traffic, &name);
    match run(Arc::clone(&store), reference, auth, progress).await {
        Ok(Pulled { record, bytes, reused }) => {
            store.measure_later(&record);
            let (ms, layers) = (running.end(true), record.layers.len());
            tracing::info!(image = %name, id = %record.id, layers, reused, bytes, ms, "pulled");
            Ok(record)
        }
        Err((stage, cause)) => {
            let ms = running.end(false);
            let error = PullError { reference: name, stage, cause };
            tracing::warn!(ms, %error, "pull failed");
            if let Err(error) = blocking(move || store.sweep()).await.and_then(|done| done) {
                tracing::warn!(%error, "could not tidy up after the pull");
            }
            Err(error)
        }
    }
}

/// An image, and what of it had to come.
struct Pulled {
    record: ImageRecord,
    /// The layers' blobs that were fetched.
    bytes: u64,
    /// Layers that were here.
    reused: usize,
}

async fn run(
    store: Arc<Inner>,
    reference: Reference,
    auth: Option<RegistryAuth>,
    progress: Arc<dyn PullProgress>,
) -> Result<Pulled, Failed> {
    let source = Source::open(&store, &reference, auth).await.map_err(at(Stage::Source))?;
    let found = source.find(&reference, &store.config.limits).await.map_err(at(Stage::Manifest))?;
    // Who wants the same image waits, and finds it complete, or goes on where this one was given up.
    let flight = store.flight(format!("manifest {}", found.manifest_digest));
    let _alone = flight.lock().await;
    if let Some((present, _pins)) = unchanged(&store, &found.manifest_digest).await? {
        progress.resolved(present.layers.len(), 0);
        for layer in found.layers.iter().filter_map(LayerSource::digest) {
            progress.layer_started(layer, None);
            progress.layer_finished(layer, true);
        }
        let reused = present.layers.len();
        let record = renamed(&reference, present, found);
        let record = blocking(move || store.record(record)).await.and_then(|done| done);
        return Ok(Pulled { record: record.map_err(at(Stage::Record))?, bytes: 0, reused });
    }
    let limits = store.config.limits;
    let config_bytes = source.config(&found, limits.config_bytes).await.map_err(at(Stage::Config))?;
    let config =
        parse_config(&config_bytes, found.layers.len(), &Platform::host()).map_err(at(Stage::Config))?;
    let id = Digest::sha256(&config_bytes);

    let blobs = [&id, &found.manifest_digest].map(Files::blob_key).to_vec();
    let _blob_pins = store.pin(blobs);
    let documents =
        [(id.clone(), config_bytes.clone()), (found.manifest_digest.clone(), found.manifest.clone())];
    let jobs = jobs(&store, &config, &found.layers);
    let _layer_pins = store.pin(jobs.iter().flat_map(LayerJob::keys).collect());
    let bytes = found.layers.iter().filter_map(LayerSource::size).sum();
    progress.resolved(jobs.len(), bytes);
    // The disk takes its time to sync; the layers do not wait for it.
    let (layers, ()) = tokio::try_join!(layers(&store, &source, jobs, &progress), write(&store, documents))?;
    let (layers, fetched): (Vec<_>, Vec<_>) = layers.into_iter().unzip();
    let record = record(&reference, id, config_bytes.len() as u64, config, found, layers);
    let record =
        blocking(move || store.record(record)).await.and_then(|done| done).map_err(at(Stage::Record))?;
    let reused = fetched.iter().filter(|bytes| bytes.is_none()).count();
    Ok(Pulled { record, bytes: fetched.into_iter().flatten().sum(), reused })
}

/// Writes manifest and config into the store.
async fn write(store: &Arc<Inner>, documents: [(Digest, Vec<u8>); 2]) -> Result<(), Failed> {
    let files = store.files.clone();
    let write = move || documents.iter().try_for_each(|(digest, bytes)| files.write_blob(digest, bytes));
    blocking(write).await.and_then(|done| done).map_err(at(Stage::Config))
}

/// The image that this manifest gave at a former pull, when nothing of it is missing.
async fn unchanged(store: &Arc<Inner>, manifest: &Digest) -> Result<Option<(ImageRecord, Pins)>, Failed> {
    let (store, manifest) = (Arc::clone(store), manifest.clone());
    blocking(move || store.whole(&manifest)).await.map_err(at(Stage::Manifest))
}

/// An image that is here already, under the names of this pull. The store adds the former ones.
fn renamed(reference: &Reference, present: ImageRecord, found: Found) -> ImageRecord {
    ImageRecord {
        repo_tags: found.tags,
        repo_digests: found.digests,
        other_names: other_names(reference),
        pulled_at: now(),
        ..present
    }
}

fn other_names(reference: &Reference) -> Vec<String> {
    match reference {
        Reference::Registry(_) => Vec::new(),
        Reference::Local(local) => vec![local.to_string()],
    }
}

/// In seconds of the Unix epoch.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The work on each layer, lowest first.
fn jobs(store: &Arc<Inner>, config: &Config, sources: &[LayerSource]) -> Vec<LayerJob> {
    let mut chain: Option<Digest> = None;
    let mut below: Vec<watch::Receiver<LayerReady>> = Vec::new();
    let mut jobs = Vec::with_capacity(sources.len());
    for (index, (source, diff_id)) in sources.iter().zip(&config.diff_ids).enumerate() {
        // OCI image-spec, "Layer ChainID".
        let chain_id = match &chain {
            None => diff_id.clone(),
            Some(lower) => Digest::sha256(format!("{lower} {diff_id}").as_bytes()),
        };
        let (ready, receiver) = watch::channel(LayerReady::default());
        jobs.push(LayerJob {
            store: Arc::clone(store),
            index,
            count: sources.len(),
            diff_id: diff_id.clone(),
            chain_id: chain_id.clone(),
            source: source.clone(),
            ready,
            below: below.clone(),
        });
        below.push(receiver);
        chain = Some(chain_id);
    }
    jobs
}

/// Runs all jobs; answers each layer with the bytes that had to come for it. The first real failure ends the others; that a lower layer is gone is reported
/// only if nothing else is.
async fn layers(
    store: &Arc<Inner>,
    source: &Source,
    jobs: Vec<LayerJob>,
    progress: &Arc<dyn PullProgress>,
) -> Result<Vec<Made>, Failed> {
    let count = jobs.len();
    let parallel = store.config.max_parallel_layers.max(1);
    let mut running = stream::iter(jobs)
        .map(|job| async move {
            let index = job.index;
            let stage = job.stage();
            let done = job.run(source, Arc::clone(progress)).await;
            (index, done.map_err(|cause| (stage, cause)))
        })
        .buffer_unordered(parallel);
    let mut records: Vec<Option<Made>> = vec![None; count];
    let mut echo = None;
    while let Some((index, done)) = running.next().await {
        match done {
            Ok(record) => records[index] = Some(record),
            Err((stage, cause)) if cause.is_echo() => echo = Some((stage, cause)),
            Err(failed) => return Err(failed),
        }
    }
    match echo {
        Some(failed) => Err(failed),
        None => Ok(records.into_iter().flatten().collect()),
    }
}

fn record(
    reference: &Reference,
    id: Digest,
    config_size: u64,
    config: Config,
    found: Found,
    layers: Vec<LayerRecord>,
) -> ImageRecord {
    ImageRecord {
        id: id.to_string(),
        repo_tags: found.tags,
        repo_digests: found.digests,
        other_names: other_names(reference),
        manifest_digest: found.manifest_digest.to_string(),
        size: config_size + layers.iter().map(|layer| layer.size).sum::<u64>(),
        config: config.run,
        layers,
        platform: config.platform.to_string(),
        created: config.created,
        annotations: found.annotations,
        pinned: false,
        pulled_at: now(),
    }
}
