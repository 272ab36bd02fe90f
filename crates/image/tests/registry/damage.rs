//! What happens to files of the store, and what the store makes of it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::common::{Behaviour, Fixture, Image, Layer, Registry, config, noise, tar};
use a3s_box_image::{ErrorKind, ImageRecord, ImageStore, Problem, RegistryAuth, RepairError};

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

#[tokio::test]
async fn verification_finds_a_changed_byte_in_every_file_and_repair_brings_it_back() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let reference = registry.put("x", "1", &two_layers());
    let record = fixture.store.pull(&reference, None, None).await.unwrap();
    fixture.store.settle().await;
    let verified = fixture.store.verify().await.unwrap();
    assert_eq!((verified.good, verified.unmeasured.len(), verified.damaged.len()), (4, 0, 0));

    let documents = fixture.images().join("blobs/sha256");
    let files = [
        layer_file(&fixture, &record, 0),
        layer_file(&fixture, &record, 1),
        documents.join(&record.id[7..]),
        documents.join(&record.manifest_digest[7..]),
    ];
    for file in &files {
        let good = std::fs::read(file).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        overwrite(file, &bad);
        let verified = fixture.store.verify().await.unwrap();
        assert_eq!((verified.good, verified.damaged.len()), (3, 1));
        assert!(file.ends_with(&verified.damaged[0].file));
        assert!(matches!(verified.damaged[0].problem, Problem::Content { .. }));
        assert!(verified.damaged[0].images.contains(&record.id));

        assert!(fixture.store.repair(&verified, &HashMap::new()).await.unwrap().is_empty());
        assert!(std::fs::read(file).unwrap() == good);
        let verified = fixture.store.verify().await.unwrap();
        assert_eq!((verified.good, verified.unmeasured.len(), verified.damaged.len()), (4, 0, 0));
    }

    overwrite(&files[0], b"short");
    std::fs::remove_file(&files[1]).unwrap();
    let verified = fixture.store.verify().await.unwrap();
    let problem = |file: &Path| {
        let damage = verified.damaged.iter().find(|damage| file.ends_with(&damage.file));
        damage.unwrap().problem.to_string()
    };
    assert_eq!(problem(&files[0]), format!("it has 5 bytes instead of {}", record.layers[0].size));
    assert_eq!(problem(&files[1]), "it is missing");
    assert!(fixture.store.repair(&verified, &HashMap::new()).await.unwrap().is_empty());
    assert_eq!(fixture.store.verify().await.unwrap().good, 4);
}

#[tokio::test]
async fn repair_says_of_which_image_the_source_is_gone() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let record = fixture.store.pull(&registry.put("x", "1", &two_layers()), None, None).await.unwrap();
    fixture.store.settle().await;
    drop(registry);
    overwrite(&layer_file(&fixture, &record, 0), b"");
    let verified = fixture.store.verify().await.unwrap();
    let failed = fixture.store.repair(&verified, &HashMap::new()).await.unwrap();
    let [(image, RepairError::Pull(error))] = failed.as_slice() else { panic!("{failed:?}") };
    assert_eq!((&image.id, error.kind()), (&record.id, ErrorKind::Unavailable));
    assert!(!layer_file(&fixture, &record, 0).exists(), "bad bytes are never served");
}

#[tokio::test]
async fn repair_logs_in_where_the_pull_had_to() {
    // "user:secret"
    let registry = Registry::start(|seen| {
        match seen.headers.get("authorization").and_then(|value| value.to_str().ok()) {
            Some("Basic dXNlcjpzZWNyZXQ=") => Behaviour::Serve,
            _ => {
                let asks = ("www-authenticate", r#"Basic realm="x""#.to_owned());
                Behaviour::Answer(401, vec![asks], Vec::new())
            }
        }
    })
    .await;
    let fixture = Fixture::new();
    let auth = RegistryAuth { username: "user".into(), password: "secret".into(), ..RegistryAuth::default() };
    let name = registry.put("x", "1", &two_layers());
    let record = fixture.store.pull(&name, Some(auth.clone()), None).await.unwrap();
    fixture.store.settle().await;
    overwrite(&layer_file(&fixture, &record, 0), b"");
    let verified = fixture.store.verify().await.unwrap();
    let failed = fixture.store.repair(&verified, &HashMap::new()).await.unwrap();
    let [(_, RepairError::Pull(error))] = failed.as_slice() else { panic!("{failed:?}") };
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    // The image is still known, and what it lacks is damage.
    let verified = fixture.store.verify().await.unwrap();
    let names: Vec<_> =
        fixture.store.needing_repair(&verified).into_iter().flat_map(|r| r.repo_digests).collect();
    let credentials = names.into_iter().map(|name| (name, auth.clone())).collect();
    assert!(fixture.store.repair(&verified, &credentials).await.unwrap().is_empty());
    assert_eq!(fixture.store.verify().await.unwrap().good, 4);
}

#[tokio::test]
async fn a_file_that_nobody_measured_is_not_called_good() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let record = fixture.store.pull(&registry.put("x", "1", &two_layers()), None, None).await.unwrap();
    fixture.store.settle().await;
    fixture.storage.forget_table("image-files");
    let Fixture { directory, storage, store } = fixture;
    drop(store);
    let store = ImageStore::open(config(directory.path()), storage).unwrap();
    let verified = store.verify().await.unwrap();
    let named = |file: &String| record.layers.iter().any(|layer| file.ends_with(&layer.file));
    assert!(verified.unmeasured.len() == 2 && verified.unmeasured.iter().all(named), "{verified:?}");
    assert_eq!((verified.good, verified.damaged.len()), (2, 0));
    assert_eq!(store.verify().await.unwrap().good, 4, "the first verification measured them");
}

/// The store's records and the registry, failing at the n-th call, for every n.
#[tokio::test]
async fn a_fault_at_any_call_of_a_pull_leaves_nothing_and_the_pull_can_be_repeated() {
    let image = two_layers();
    for call in 1.. {
        let (registry, fixture) = (Registry::good().await, Fixture::new());
        let reference = registry.put("x", "1", &image);
        *fixture.storage.calls_left.lock().unwrap() = Some(call);
        let life = async {
            fixture.store.pull(&reference, None, None).await?;
            fixture.store.remove(&reference).await
        };
        let outcome = life.await;
        let spent = fixture.storage.calls_left.lock().unwrap().take().is_none_or(|left| left == 0);
        if !spent {
            outcome.unwrap();
            assert!(call > 2, "the records were hardly asked");
            break;
        }
        fixture.assert_tmp_is_empty().await;
        let record = fixture.store.pull(&reference, None, None).await.unwrap();
        assert_eq!(record.id, image.id.to_string(), "after a fault in call {call}");
        let verified = fixture.store.verify().await.unwrap();
        // Layers are measured after the pull has answered.
        let whole = verified.good + verified.unmeasured.len();
        assert_eq!((whole, verified.damaged.len()), (4, 0), "after a fault in call {call}");
        fixture.store.remove(&reference).await.unwrap();
        assert_eq!(fixture.store.list(), []);
        for kind in ["erofs", "blobs/sha256"] {
            let left = std::fs::read_dir(fixture.images().join(kind)).unwrap().count();
            assert_eq!(left, 0, "{kind} after a fault in call {call}");
        }
    }
}
