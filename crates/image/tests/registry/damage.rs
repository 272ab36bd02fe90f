//! What happens to files of the store, and what the store makes of it.

use std::path::{Path, PathBuf};

use crate::common::{Fixture, Image, Layer, Registry, noise, tar};
use a3s_box_image::ImageRecord;

pub(crate) fn two_layers() -> Image {
    Image::new(&[
        Layer::gzip(tar(&[("data", &noise(200_000))])),
        Layer::gzip(tar(&[("etc/", b""), ("etc/name", b"x")])),
    ])
}

/// Files of the store are read-only; a failing disk does not care.
pub(crate) fn overwrite(path: &Path, bytes: &[u8]) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

pub(crate) fn layer_file(fixture: &Fixture, record: &ImageRecord, index: usize) -> PathBuf {
    fixture.images().join("erofs").join(&record.layers[index].file)
}

/// Requests for blobs, from the `from`-th request on.
fn blobs(registry: &Registry, from: usize) -> usize {
    registry.seen()[from..].iter().filter(|seen| seen.path.contains("/blobs/")).count()
}

#[tokio::test]
async fn a_second_pull_of_an_unchanged_image_asks_for_its_manifest_only() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let reference = registry.put("x", "1", &two_layers());
    let first = fixture.store.pull(&reference, None, None).await.unwrap();
    let asked = registry.seen().len();
    let second = fixture.store.pull(&reference, None, None).await.unwrap();
    assert_eq!(ImageRecord { pulled_at: first.pulled_at, ..second }, first);
    assert_eq!((registry.seen().len() - asked, blobs(&registry, asked)), (1, 0));
}

#[tokio::test]
async fn a_layer_that_was_cut_or_emptied_is_fetched_again() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let reference = registry.put("x", "1", &two_layers());
    let record = fixture.store.pull(&reference, None, None).await.unwrap();
    let file = layer_file(&fixture, &record, 0);
    let good = std::fs::read(&file).unwrap();
    for damaged in [&good[..good.len() - 4096], &good[..1000], b"", &vec![0; good.len()]] {
        overwrite(&file, damaged);
        // Another tag with another manifest, so that the image counts as new but has the same layer.
        let mut other = two_layers();
        other.manifest.push(b' ');
        let again = registry.put("x", "2", &other);
        let asked = registry.seen().len();
        fixture.store.pull(&again, None, None).await.unwrap();
        assert_eq!(blobs(&registry, asked), 2, "the config and the damaged layer");
        assert!(std::fs::read(&file).unwrap() == good);
        fixture.store.pull(&reference, None, None).await.unwrap();
    }
}

#[tokio::test]
async fn a_config_with_other_bytes_in_the_store_is_written_again() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let image = two_layers();
    let reference = registry.put("x", "1", &image);
    let record = fixture.store.pull(&reference, None, None).await.unwrap();
    let file = fixture.images().join("blobs/sha256").join(&record.id[7..]);
    let good = std::fs::read(&file).unwrap();
    for damaged in [&good[1..], &vec![b'x'; good.len()]] {
        overwrite(&file, damaged);
        std::fs::remove_file(layer_file(&fixture, &record, 1)).unwrap();
        fixture.store.pull(&reference, None, None).await.unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), good);
    }
}
