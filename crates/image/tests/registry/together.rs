//! Several pulls at the same time: what they share, and what they do not take from each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{Behaviour, Fixture, Image, Layer, Registry, config, noise, tar};
use a3s_box_image::{ErrorKind, ImageError, ImageRecord, ImageStore, PullFigures};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Longer than any of these pulls takes.
const PATIENCE: Duration = Duration::from_secs(20);

type Pulling = JoinHandle<Result<ImageRecord, ImageError>>;

fn start(fixture: &Fixture, reference: &str) -> Pulling {
    let (store, reference) = (fixture.store.clone(), reference.to_owned());
    tokio::spawn(async move { store.pull(&reference, None, None).await })
}

async fn ended(pulling: Pulling) -> Result<ImageRecord, ImageError> {
    timeout(PATIENCE, pulling).await.expect("the pulls wait for each other").unwrap()
}

fn layer(name: &str, size: usize) -> Layer {
    Layer::gzip(tar(&[(name, &noise(size))]))
}

/// Requests for blobs of a layer.
fn requests(registry: &Registry, layer: &Layer) -> usize {
    let digest = a3s_box_image::digest::Digest::sha256(&layer.blob).to_string();
    registry.seen().iter().filter(|seen| seen.path.contains(&digest)).count()
}

/// Waits until so many requests for blobs of layers came.
async fn layer_requests(registry: &Registry, image: &Image, count: usize) {
    let come = async {
        let id = image.id.to_string();
        let is_layer = |path: &str| path.contains("/blobs/") && !path.contains(&id);
        while registry.seen().iter().filter(|seen| is_layer(&seen.path)).count() < count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, come).await.expect("the layers are not asked for");
}

/// A store with room for so many layers at once.
fn narrow(downloads: usize) -> Fixture {
    let Fixture { directory, storage, store } = Fixture::new();
    drop(store);
    let mut config = config(directory.path());
    config.max_parallel_downloads = downloads;
    let store = ImageStore::open(config, storage.clone()).unwrap();
    Fixture { directory, storage, store }
}

#[tokio::test]
async fn pulls_of_one_image_fetch_everything_but_the_manifest_once() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let image = Image::new(&[layer("big", 3 << 20)]);
    let reference = registry.put("x", "1", &image);
    let pulls: Vec<_> = (0..4).map(|_| start(&fixture, &reference)).collect();
    for pull in pulls {
        ended(pull).await.unwrap();
    }
    let blobs = registry.seen().iter().filter(|seen| seen.path.contains("/blobs/")).count();
    assert_eq!(blobs, 2, "the config and the layer");
    fixture.assert_tmp_is_empty().await;
}

#[tokio::test]
async fn a_layer_that_lies_elsewhere_in_other_images_is_fetched_once() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let shared = || layer("shared", 2 << 20);
    let images = [
        Image::new(&[shared(), layer("a", 1)]),
        Image::new(&[layer("b", 1), shared()]),
        Image::new(&[shared(), shared(), layer("c", 1), shared()]),
    ];
    let pulls: Vec<_> =
        images.iter().map(|image| start(&fixture, &registry.put("x", image.id.hex(), image))).collect();
    for pull in pulls {
        ended(pull).await.unwrap();
    }
    assert_eq!(requests(&registry, &shared()), 1);
    assert_eq!(fixture.store.list().len(), 3);
}

/// Each upper layer needs its lower one, and each layer is the upper one of one image: whoever is first must not
/// wait for the other.
#[tokio::test]
async fn layers_that_lean_on_each_other_crosswise_do_not_wait_for_ever() {
    for round in 0..10 {
        let (registry, fixture) = (Registry::good().await, narrow(1));
        // No directory is listed, so that every layer asks the lower ones.
        let one = || Layer::gzip(tar(&[("d/one", &noise(100_000 + round))]));
        let two = || Layer::gzip(tar(&[("d/two", &noise(100_000 + round))]));
        let images = [
            Image::new(&[one(), two()]),
            Image::new(&[two(), one()]),
            Image::new(&[one(), one(), two(), two(), one()]),
        ];
        let pulls: Vec<_> =
            images.iter().map(|image| start(&fixture, &registry.put("x", image.id.hex(), image))).collect();
        for pull in pulls {
            ended(pull).await.unwrap();
        }
    }
}

#[tokio::test]
async fn when_the_first_caller_gives_up_the_second_goes_on() {
    let first = AtomicBool::new(true);
    let image = Image::new(&[layer("big", 400_000)]);
    let id = image.id.to_string();
    let registry = Registry::start(move |seen| {
        let layer = seen.path.contains("/blobs/") && !seen.path.contains(&id);
        if layer && first.swap(false, Ordering::SeqCst) { Behaviour::Hang } else { Behaviour::Serve }
    })
    .await;
    let reference = registry.put("x", "1", &image);
    let fixture = Fixture::new();
    let one = start(&fixture, &reference);
    layer_requests(&registry, &image, 1).await;
    let two = start(&fixture, &reference);
    one.abort();
    assert!(one.await.unwrap_err().is_cancelled());
    ended(two).await.unwrap();
    fixture.assert_tmp_is_empty().await;
    let figures = fixture.store.pull_figures();
    assert_eq!((figures.running, figures.succeeded, figures.failed, figures.given_up), (0, 1, 0, 1));
}

#[tokio::test]
async fn all_pulls_together_keep_to_the_bound() {
    let images: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|name| Image::new(&[layer(name, 5000), layer(&format!("{name}2"), 5001)]))
        .collect();
    let ids: Vec<_> = images.iter().map(|image| image.id.to_string()).collect();
    let is_layer =
        move |path: &str| path.contains("/blobs/") && !ids.iter().any(|id| path.contains(id.as_str()));
    let hang = is_layer.clone();
    let registry =
        Registry::start(move |seen| if hang(&seen.path) { Behaviour::Hang } else { Behaviour::Serve }).await;
    let fixture = narrow(2);
    let pulls: Vec<_> =
        images.iter().map(|image| start(&fixture, &registry.put("x", image.id.hex(), image))).collect();
    let asked = |registry: &Registry| registry.seen().iter().filter(|seen| is_layer(&seen.path)).count();
    let both = async {
        while asked(&registry) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, both).await.unwrap();
    // Enough for a third one that is not held back.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(asked(&registry), 2);
    for pull in pulls {
        assert_eq!(ended(pull).await.unwrap_err().kind(), ErrorKind::Timeout);
    }
}

#[tokio::test]
async fn figures_tell_what_pulls_came_to() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    assert_eq!(fixture.store.pull_figures(), PullFigures::default());
    let layers = [layer("a", 1000), layer("b", 2000)];
    let bytes = layers.iter().map(|layer| layer.blob.len() as u64).sum();
    let reference = registry.put("x", "1", &Image::new(&layers));
    start(&fixture, &reference).await.unwrap().unwrap();
    let other = registry.put("x", "2", &Image::new(&[layer("a", 1000)]));
    start(&fixture, &other).await.unwrap().unwrap();
    start(&fixture, &format!("{}/x:9", registry.address)).await.unwrap().unwrap_err();
    let expected = PullFigures {
        succeeded: 2,
        failed: 1,
        bytes,
        layers_made: 2,
        layers_reused: 1,
        ..PullFigures::default()
    };
    assert_eq!(fixture.store.pull_figures(), expected);
}

/// Progress is told while layers come, and each layer that starts also ends.
#[tokio::test]
async fn observers_hear_of_every_layer() {
    #[derive(Default)]
    struct Heard(std::sync::Mutex<Vec<String>>);
    impl a3s_box_image::PullProgress for Heard {
        fn resolved(&self, layers: usize, bytes: u64) {
            self.0.lock().unwrap().push(format!("{layers} layers of {bytes} bytes"));
        }
        fn layer_started(&self, layer: &a3s_box_image::digest::Digest, size: Option<u64>) {
            self.0.lock().unwrap().push(format!("start {} {size:?}", layer.hex()));
        }
        fn layer_finished(&self, layer: &a3s_box_image::digest::Digest, reused: bool) {
            self.0.lock().unwrap().push(format!("end {} {reused}", layer.hex()));
        }
    }
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let made = layer("a", 1000);
    let size = made.blob.len();
    let digest = a3s_box_image::digest::Digest::sha256(&made.blob);
    let reference = registry.put("x", "1", &Image::new(&[made]));
    let heard = Arc::new(Heard::default());
    for _ in 0..2 {
        fixture.store.pull(&reference, None, Some(heard.clone())).await.unwrap();
    }
    let digest = digest.hex();
    let expected = [
        format!("1 layers of {size} bytes"),
        format!("start {digest} Some({size})"),
        format!("end {digest} false"),
        "1 layers of 0 bytes".to_owned(),
        format!("start {digest} None"),
        format!("end {digest} true"),
    ];
    assert_eq!(*heard.0.lock().unwrap(), expected);
}
