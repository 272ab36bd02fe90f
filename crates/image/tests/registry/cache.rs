//! Layers that no image needs any more, and images that are in use.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::common::{Fixture, Image, Layer, Registry, config, noise, tar};
use a3s_box_image::ImageStore;

fn one_layer(name: &str) -> Image {
    Image::new(&[Layer::gzip(tar(&[(name, &noise(100_000))]))])
}

/// The fixture's store again, with so much room for unneeded layers.
fn reopened(fixture: Fixture, cache_bytes: u64) -> Fixture {
    let Fixture { directory, storage, store } = fixture;
    drop(store);
    let mut config = config(directory.path());
    config.cache_bytes = cache_bytes;
    let store = ImageStore::open(config, storage.clone()).unwrap();
    Fixture { directory, storage, store }
}

fn used_at(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    std::fs::File::open(path).unwrap().set_modified(time).unwrap();
}

async fn pulled(fixture: &Fixture, reference: &str) -> PathBuf {
    fixture.store.pull(reference, None, None).await.unwrap();
    fixture.store.settle().await;
    fixture.store.resolve(reference).unwrap().layers.remove(0).erofs
}

#[tokio::test]
async fn a_removed_image_comes_back_without_its_layers_being_fetched() {
    let (registry, fixture) = (Registry::good().await, reopened(Fixture::new(), 1 << 20));
    let image = one_layer("a");
    let reference = registry.put("x", "1", &image);
    let file = pulled(&fixture, &reference).await;
    fixture.store.remove(&reference).await.unwrap();
    let fixture = reopened(fixture, 1 << 20);
    assert!(file.is_file(), "a restart keeps it too");
    let asked = registry.seen().len();
    pulled(&fixture, &reference).await;
    let layer = image.blobs.keys().find(|digest| **digest != image.id.to_string()).unwrap();
    assert!(registry.seen()[asked..].iter().all(|seen| !seen.path.contains(layer)));
    assert_eq!(fixture.store.verify().await.unwrap().good, 3);
}

#[tokio::test]
async fn the_layers_used_last_stay_within_the_budget_and_needed_ones_always() {
    let (registry, fixture) = (Registry::good().await, reopened(Fixture::new(), 1 << 20));
    let mut files = Vec::new();
    for name in ["a", "b", "c", "needed"] {
        let reference = registry.put(name, "1", &one_layer(name));
        files.push(pulled(&fixture, &reference).await);
        if name != "needed" {
            fixture.store.remove(&reference).await.unwrap();
        }
    }
    for (file, second) in files.iter().zip([30, 10, 20, 1]) {
        used_at(file, second);
    }
    let there = || files.iter().map(|file| file.is_file()).collect::<Vec<_>>();
    // Each takes something above 100,000 bytes.
    let mut fixture = fixture;
    for (budget, expected) in [
        (1 << 20, [true, true, true, true]),
        (250_000, [true, false, true, true]),
        (150_000, [true, false, false, true]),
        (0, [false, false, false, true]),
    ] {
        fixture = reopened(fixture, budget);
        assert_eq!(there(), expected, "{budget}");
    }
}

#[tokio::test]
async fn an_image_that_is_held_keeps_its_files_when_it_is_removed() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let reference = registry.put("x", "1", &one_layer("a"));
    let file = pulled(&fixture, &reference).await;
    let held = fixture.store.hold(&reference).unwrap();
    fixture.store.remove(&reference).await.unwrap();
    assert!(held.image.layers[0].erofs.is_file());
    assert!(fixture.store.hold(&reference).is_err());
    drop(held);
    pulled(&fixture, &registry.put("x", "2", &one_layer("b"))).await;
    assert!(!file.exists(), "it is collected with the next work");
}

#[tokio::test]
async fn pinned_images_are_those_that_the_configuration_names_now() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let reference = registry.put("x", "1", &one_layer("a"));
    let Fixture { directory, storage, store } = fixture;
    drop(store);
    let mut settings = config(directory.path());
    settings.pinned = vec![reference.clone()];
    let store = ImageStore::open(settings.clone(), storage.clone()).unwrap();
    assert!(store.pull(&reference, None, None).await.unwrap().pinned);
    store.settle().await;
    drop(store);
    for (names, pinned) in [(vec![], false), (vec![reference.clone()], true)] {
        settings.pinned = names;
        let store = ImageStore::open(settings.clone(), storage.clone()).unwrap();
        assert_eq!(store.find(&reference).unwrap().unwrap().pinned, pinned);
    }
    settings.pinned = vec!["no reference".to_owned()];
    assert!(ImageStore::open(settings, storage).is_err());
}
