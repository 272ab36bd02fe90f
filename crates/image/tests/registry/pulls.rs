//! Pulls that succeed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::{Behaviour, Fixture, Image, Layer, Registry, config, gzip, noise, tar};
use a3s_box_image::digest::Digest;
use a3s_box_image::{ErrorKind, ImageStore, PullProgress, RegistryAuth};
use base64::Engine as _;

fn simple_image() -> Image {
    Image::new(&[Layer::gzip(tar(&[("bin/", b""), ("bin/true", b"#!")])), Layer::gzip(tar(&[("etc/", b"")]))])
}

#[derive(Default)]
struct Counter {
    started: AtomicUsize,
    reused: AtomicUsize,
    finished: AtomicUsize,
    bytes: Mutex<u64>,
}

impl PullProgress for Counter {
    fn layer_started(&self, _: &Digest, _: Option<u64>) {
        self.started.fetch_add(1, Ordering::SeqCst);
    }

    fn layer_bytes(&self, _: &Digest, downloaded: u64) {
        let mut bytes = self.bytes.lock().unwrap();
        *bytes = downloaded.max(*bytes);
    }

    fn layer_finished(&self, _: &Digest, reused: bool) {
        self.finished.fetch_add(1, Ordering::SeqCst);
        self.reused.fetch_add(usize::from(reused), Ordering::SeqCst);
    }
}

#[tokio::test]
async fn a_pulled_image_is_listed_found_resolved_and_removed() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let image = simple_image();
    let reference = registry.put("team/app", "1.0", &image);
    let progress = Arc::new(Counter::default());
    let record = fixture.store.pull(&reference, None, Some(progress.clone())).await.unwrap();

    assert_eq!(record.id, image.id.to_string());
    assert_eq!(record.repo_tags, std::slice::from_ref(&reference));
    let by_digest = format!("{}/team/app@{}", registry.address, image.manifest_digest);
    assert_eq!(record.repo_digests, std::slice::from_ref(&by_digest));
    assert_eq!(
        (record.config.user.as_str(), record.config.cmd.as_slice()),
        ("7:8", &["/bin/true".to_owned()][..])
    );
    assert_eq!((progress.started.load(Ordering::SeqCst), progress.finished.load(Ordering::SeqCst)), (2, 2));
    assert!(*progress.bytes.lock().unwrap() > 0);

    let short = &record.id[7..19];
    for name in [&reference, &by_digest, &record.id, &record.id[7..], short] {
        let found = fixture.store.find(name).unwrap();
        assert_eq!(found.as_ref(), Some(&record), "{name}");
    }
    assert_eq!(fixture.store.list(), std::slice::from_ref(&record));
    let resolved = fixture.store.resolve(short).unwrap();
    assert_eq!(resolved.digest_ref, by_digest);
    assert_eq!(resolved.layers.len(), 2);
    assert!(resolved.layers.iter().all(|layer| layer.erofs.is_file()));
    assert!(fixture.store.usage().await.unwrap().bytes >= record.size);

    assert_eq!(fixture.store.remove(&reference).await.unwrap(), Some(record));
    assert_eq!(fixture.store.remove(&reference).await.unwrap(), None);
    assert_eq!(fixture.store.resolve(&reference).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(resolved.layers.iter().all(|layer| !layer.erofs.exists()));
    fixture.assert_tmp_is_empty().await;
}

#[tokio::test]
async fn every_compression_gives_the_same_layer() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let tar = tar(&[("data", &noise(300_000))]);
    let (head, tail) = tar.split_at(100_001);
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &zstd(&tar)].concat();
    let mut files = Vec::new();
    for (i, blob) in [
        tar.clone(),
        gzip(&tar),
        [gzip(head), gzip(tail)].concat(),
        zstd(&tar),
        [zstd(head), zstd(tail)].concat(),
        skippable,
    ]
    .into_iter()
    .enumerate()
    {
        // The media type lies on purpose.
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        let image = Image::new(&[Layer { blob, tar: tar.clone(), media_type }]);
        let reference = registry.put("x", &format!("v{i}"), &image);
        fixture.store.pull(&reference, None, None).await.unwrap_or_else(|e| panic!("{i}: {e}"));
        let file = fixture.store.resolve(&reference).unwrap().layers.remove(0).erofs;
        files.push(std::fs::read(&file).unwrap());
        fixture.store.remove(&reference).await.unwrap();
    }
    assert!(files.windows(2).all(|pair| pair[0] == pair[1]));
}

#[tokio::test]
async fn an_index_leads_to_this_platforms_image_and_keeps_its_own_digest() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let image = simple_image();
    registry.put("x", "single", &image);
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let index = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "manifests": [
            {"digest": Digest::sha256(b"other").to_string(), "size": 5, "platform": {"os": "windows", "architecture": architecture}},
            {"digest": image.manifest_digest.to_string(), "size": image.manifest.len(), "platform": {"os": "linux", "architecture": architecture}},
        ],
    }))
    .unwrap();
    registry.put_manifest("x", "multi", "application/vnd.oci.image.index.v1+json", &index);
    let record = fixture.store.pull(&format!("{}/x:multi", registry.address), None, None).await.unwrap();
    assert_eq!(record.id, image.id.to_string());
    assert_eq!(record.repo_digests, [format!("{}/x@{}", registry.address, Digest::sha256(&index))]);
    assert_eq!(record.manifest_digest, image.manifest_digest.to_string());
}

#[tokio::test]
async fn several_tags_of_one_image_share_everything_and_go_together() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let image = simple_image();
    let references: Vec<_> = ["1", "2", "3"].map(|tag| registry.put("x", tag, &image)).to_vec();
    let progress = Arc::new(Counter::default());
    for reference in &references {
        fixture.store.pull(reference, None, Some(progress.clone())).await.unwrap();
    }
    assert_eq!(progress.reused.load(Ordering::SeqCst), 4);
    let records = fixture.store.list();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].repo_tags, references);
    fixture.store.remove(&references[1]).await.unwrap();
    assert!(fixture.store.list().is_empty());
}

#[tokio::test]
async fn a_tag_that_moved_leaves_the_old_image_without_it() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let reference = registry.put("x", "latest", &simple_image());
    let old = fixture.store.pull(&reference, None, None).await.unwrap();
    let newer = Image::new(&[Layer::gzip(tar(&[("new", b"1")]))]);
    registry.put("x", "latest", &newer);
    let new = fixture.store.pull(&reference, None, None).await.unwrap();
    assert_eq!(fixture.store.find(&reference).unwrap(), Some(new));
    let old = fixture.store.find(&old.id).unwrap().unwrap();
    assert!(old.repo_tags.is_empty() && !old.repo_digests.is_empty());
}

#[tokio::test]
async fn records_and_files_survive_a_restart_and_orphans_do_not() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let reference = registry.put("x", "1", &simple_image());
    let record = fixture.store.pull(&reference, None, None).await.unwrap();
    fixture.store.settle().await;
    let Fixture { directory, storage, store } = fixture;
    let locked = ImageStore::open(config(directory.path()), storage.clone()).err().unwrap();
    assert!(locked.to_string().contains("another process"), "{locked}");
    drop(store);
    let images = directory.path().join("images");
    for orphan in ["tmp/half", "erofs/orphan.erofs", "blobs/sha256/orphan"] {
        std::fs::write(images.join(orphan), b"x").unwrap();
    }
    let store = ImageStore::open(config(directory.path()), storage.clone()).unwrap();
    assert_eq!(store.find(&reference).unwrap(), Some(record));
    for orphan in ["tmp/half", "erofs/orphan.erofs", "blobs/sha256/orphan"] {
        assert!(!images.join(orphan).exists(), "{orphan}");
    }
    // An image whose file is gone is no image.
    std::fs::remove_file(&store.resolve(&reference).unwrap().layers[0].erofs).unwrap();
    drop(store);
    let store = ImageStore::open(config(directory.path()), storage).unwrap();
    assert_eq!(store.find(&reference).unwrap(), None);
    store.pull(&reference, None, None).await.unwrap();
}

#[tokio::test]
async fn a_broken_connection_is_taken_up_where_it_broke() {
    let registry = Registry::start(|seen| match (seen.path.contains("/blobs/"), seen.nth) {
        (true, 0) => Behaviour::CutAfter(100),
        _ => Behaviour::Serve,
    })
    .await;
    let fixture = Fixture::new();
    let image = Image::new(&[Layer::gzip(tar(&[("big", &noise(1 << 20))]))]);
    let reference = registry.put("x", "1", &image);
    fixture.store.pull(&reference, None, None).await.unwrap();
    // The config, a blob as well, is small: it is fetched again as a whole.
    let ranges: Vec<_> =
        registry.seen().iter().filter_map(|seen| seen.headers.get("range").cloned()).collect();
    assert_eq!(ranges, ["bytes=100-"]);
}

fn challenge(realm: &str) -> Vec<(&'static str, String)> {
    vec![(
        "www-authenticate",
        format!(r#"Bearer realm="{realm}/token",service="s",scope="repository:x:pull""#),
    )]
}

#[tokio::test]
async fn tokens_are_fetched_with_credentials_and_sent_to_the_registry_only() {
    let service = Registry::start(|seen| {
        let basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("alice:secret"));
        let known = seen.headers.get("authorization").is_some_and(|value| *value == *basic);
        assert!(seen.path.contains("scope=repository%3Ax%3Apull") && seen.path.contains("service=s"));
        match known {
            true => Behaviour::Answer(200, vec![], br#"{"access_token":"T0KEN"}"#.to_vec()),
            false => Behaviour::Answer(401, vec![], vec![]),
        }
    })
    .await;
    // Blobs lie with another host, as they do in practice.
    let blobs = Registry::good().await;
    let (realm, elsewhere) = (format!("http://{}", service.address), format!("http://{}", blobs.address));
    let registry = Registry::start(move |seen| {
        let authorized = seen.headers.get("authorization").is_some_and(|value| value == "Bearer T0KEN");
        if !authorized {
            return Behaviour::Answer(401, challenge(&realm), vec![]);
        }
        if seen.path.contains("/blobs/") {
            let location = format!("{elsewhere}{}?signature=SIGNED", seen.path);
            return Behaviour::Answer(307, vec![("location", location)], vec![]);
        }
        Behaviour::Serve
    })
    .await;
    let fixture = Fixture::new();
    let image = simple_image();
    let reference = registry.put("x", "1", &image);
    blobs.put_blobs("x", &image);

    let wrong =
        RegistryAuth { username: "alice".into(), password: "guess".into(), ..RegistryAuth::default() };
    let error = fixture.store.pull(&reference, Some(wrong), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert!(!error.to_string().contains("guess"));
    let elsewhere = RegistryAuth {
        username: "alice".into(),
        password: "secret".into(),
        server_address: "quay.io".into(),
        ..RegistryAuth::default()
    };
    assert_eq!(
        fixture.store.pull(&reference, Some(elsewhere), None).await.unwrap_err().kind(),
        ErrorKind::Unauthorized
    );

    let right =
        RegistryAuth { username: "alice".into(), password: "secret".into(), ..RegistryAuth::default() };
    fixture.store.pull(&reference, Some(right), None).await.unwrap();
    assert!(!blobs.seen().is_empty());
    assert!(blobs.seen().iter().all(|seen| !seen.headers.contains_key("authorization")));
}

#[tokio::test]
async fn a_registry_token_is_sent_without_being_asked() {
    let registry = Registry::start(|seen| match seen.headers.get("authorization") {
        Some(value) if value == "Bearer ready" => Behaviour::Serve,
        _ => Behaviour::Answer(403, vec![], vec![]),
    })
    .await;
    let fixture = Fixture::new();
    let reference = registry.put("x", "1", &simple_image());
    let auth = RegistryAuth { registry_token: "ready".into(), ..RegistryAuth::default() };
    fixture.store.pull(&reference, Some(auth), None).await.unwrap();
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_the_next_one_when_one_fails() {
    let (broken, good) =
        (Registry::start(|_| Behaviour::Answer(404, vec![], vec![])).await, Registry::good().await);
    let fixture = Fixture::new();
    fixture.hosts(
        "registry.example",
        &format!(
            "[host.\"http://127.0.0.1:1\"]\n[host.\"http://{}\"]\n[host.\"http://{}/prefix\"]\n[host.\"http://{}/prefix\".header]\nx-mirror = \"yes\"\n",
            broken.address, good.address, good.address
        ),
    );
    let image = simple_image();
    good.put("x", "1", &image);
    // The mirror keeps everything below its prefix: content is put there by hand.
    let kind = "application/vnd.oci.image.manifest.v1+json";
    good.put_manifest("x", "1", kind, &image.manifest);
    let error = fixture.store.pull("registry.example/x:1", None, None).await.unwrap_err();
    // Nobody serves below the prefix, and the registry itself does not exist.
    assert!(error.to_string().contains("none of 4 hosts"), "{error}");
    assert!(
        good.seen().iter().all(|seen| seen.path.starts_with("/prefix/v2/x/manifests/1?ns=registry.example"))
    );
    assert!(good.seen().iter().all(|seen| seen.headers["x-mirror"] == "yes"));

    fixture.hosts(
        "registry.example",
        &format!(
            "server = \"http://127.0.0.1:1\"\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n",
            broken.address, good.address
        ),
    );
    let record = fixture.store.pull("registry.example/x:1", None, None).await.unwrap();
    assert_eq!(record.repo_tags, ["registry.example/x:1"]);
}

#[tokio::test]
async fn a_pause_that_the_registry_asks_for_is_made() {
    let registry = Registry::start(|seen| match (seen.path.contains("/manifests/"), seen.nth) {
        (true, 0) => Behaviour::Answer(429, vec![("retry-after", "1".into())], vec![]),
        (true, 1) => Behaviour::Answer(503, vec![], vec![]),
        _ => Behaviour::Serve,
    })
    .await;
    let fixture = Fixture::new();
    let reference = registry.put("x", "1", &simple_image());
    let begun = std::time::Instant::now();
    fixture.store.pull(&reference, None, None).await.unwrap();
    assert!(begun.elapsed() >= std::time::Duration::from_secs(1));
}

#[tokio::test]
async fn an_image_without_layers_is_an_image() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let reference = registry.put("x", "empty", &Image::new(&[]));
    let record = fixture.store.pull(&reference, None, None).await.unwrap();
    assert!(record.size > 0 && record.layers.is_empty());
    let no_entries = Image::new(&[Layer::gzip(vec![0; 1024]), Layer::gzip(tar(&[("x", b"")]))]);
    let reference = registry.put("x", "empty-layer", &no_entries);
    let record = fixture.store.pull(&reference, None, None).await.unwrap();
    assert_eq!(record.layers.iter().map(|layer| layer.empty).collect::<Vec<_>>(), [true, false]);
    assert_eq!(fixture.store.resolve(&reference).unwrap().layers.len(), 1);
}

#[tokio::test]
async fn a_layer_that_leans_on_lower_ones_is_not_shared_with_other_chains() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    // The upper layer names d/new without d: its d is the lower layer's.
    let upper = || Layer::gzip(tar(&[("d/new", b"x")]));
    let base = Image::new(&[Layer::gzip(tar(&[("d/", b""), ("d/one", b"")])), upper()]);
    let other = Image::new(&[Layer::gzip(tar(&[("d/", b""), ("d/two", b"")])), upper()]);
    let first = fixture.store.pull(&registry.put("x", "1", &base), None, None).await.unwrap();
    let second = fixture.store.pull(&registry.put("x", "2", &other), None, None).await.unwrap();
    assert_eq!(first.layers[1].diff_id, second.layers[1].diff_id);
    assert!(first.layers[1].file.starts_with("chain-"));
    assert_ne!(first.layers[1].file, second.layers[1].file);
}
