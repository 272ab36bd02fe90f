//! One pull, from reference to record.
//!
//! Layers run at once up to the configured bound, in the manifest's order, so that a layer only
//! ever waits for ones that were started before it. Everything that a pull holds is dropped with
//! its future: connections, temporary files (by their guards), pins; the blocking thread of a
//! layer sees its channel close and ends.

mod layer;
mod lower;
mod source;

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

use self::layer::{LayerJob, LayerReady};
use self::source::{Found, LayerSource, Source};

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
    let begun = std::time::Instant::now();
    match run(Arc::clone(&store), reference, auth, progress).await {
        Ok(record) => {
            store.measure_later(&record);
            let took = begun.elapsed().as_millis();
            tracing::info!(image = %name, id = %record.id, layers = record.layers.len(), ms = took, "pulled");
            Ok(record)
        }
        Err((stage, cause)) => {
            let error = PullError { reference: name, stage, cause };
            tracing::warn!(%error, "pull failed");
            if let Err(error) = blocking(move || store.sweep()).await.and_then(|done| done) {
                tracing::warn!(%error, "could not tidy up after the pull");
            }
            Err(error)
        }
    }
}

async fn run(
    store: Arc<Inner>,
    reference: Reference,
    auth: Option<RegistryAuth>,
    progress: Arc<dyn PullProgress>,
) -> Result<ImageRecord, Failed> {
    let source = Source::open(&store, &reference, auth).await.map_err(at(Stage::Source))?;
    let found = source.find(&reference, &store.config.limits).await.map_err(at(Stage::Manifest))?;
    if let Some((present, _pins)) = unchanged(&store, &found.manifest_digest).await? {
        progress.resolved(present.layers.len(), 0);
        for layer in found.layers.iter().filter_map(LayerSource::digest) {
            progress.layer_started(layer, None);
            progress.layer_finished(layer, true);
        }
        let record = renamed(&reference, present, found);
        return blocking(move || store.record(record)).await.and_then(|done| done).map_err(at(Stage::Record));
    }
    let limits = store.config.limits;
    let config_bytes = source.config(&found, limits.config_bytes).await.map_err(at(Stage::Config))?;
    let config =
        parse_config(&config_bytes, found.layers.len(), &Platform::host()).map_err(at(Stage::Config))?;
    let id = Digest::sha256(&config_bytes);

    let blobs = [&id, &found.manifest_digest].map(Files::blob_key).to_vec();
    let _blob_pins = store.pin(blobs);
    let files = store.files.clone();
    let documents =
        [(id.clone(), config_bytes.clone()), (found.manifest_digest.clone(), found.manifest.clone())];
    let write = move || documents.iter().try_for_each(|(digest, bytes)| files.write_blob(digest, bytes));
    blocking(write).await.and_then(|done| done).map_err(at(Stage::Config))?;

    let jobs = jobs(&store, &config, &found.layers);
    let _layer_pins = store.pin(jobs.iter().flat_map(LayerJob::keys).collect());
    let bytes = found.layers.iter().filter_map(LayerSource::size).sum();
    progress.resolved(jobs.len(), bytes);
    let layers = layers(&store, &source, jobs, &progress).await?;
    let record = record(&reference, id, config_bytes.len() as u64, config, found, layers);
    blocking(move || store.record(record)).await.and_then(|done| done).map_err(at(Stage::Record))
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

/// Runs all jobs. The first real failure ends the others; that a lower layer is gone is reported
/// only if nothing else is.
async fn layers(
    store: &Arc<Inner>,
    source: &Source,
    jobs: Vec<LayerJob>,
    progress: &Arc<dyn PullProgress>,
) -> Result<Vec<LayerRecord>, Failed> {
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
    let mut records: Vec<Option<LayerRecord>> = vec![None; count];
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
