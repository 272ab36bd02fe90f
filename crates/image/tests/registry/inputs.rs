//! Images as strangers make them, and stores as careless operators use them.

use std::collections::BTreeSet;
use std::sync::Arc;

use a3s_box_image::digest::Digest;
use a3s_box_image::{ErrorKind, ImageStore, RegistryAuth};

use crate::common::{Behaviour, Fixture, Image, Layer, Memory, Registry, config, tar};

fn one_file(name: &str) -> Layer {
    Layer::gzip(tar(&[(name, b"x")]))
}

#[tokio::test]
async fn a_tag_that_moves_while_it_is_pulled_gives_one_image_or_the_other() {
    let (old, newer) = (Image::new(&[one_file("old")]), Image::new(&[one_file("new")]));
    let moved = newer.manifest.clone();
    let registry = Registry::start(move |seen| match seen.path.ends_with("/manifests/1") && seen.nth > 0 {
        true => Behaviour::Instead(moved.clone()),
        false => Behaviour::Serve,
    })
    .await;
    let (fixture, reference) = (Fixture::new(), registry.put("x", "1", &old));
    registry.put_blobs("x", &newer);
    // The tag is asked for once; all else goes by digest.
    let first = fixture.store.pull(&reference, None, None).await.unwrap();
    assert_eq!((first.id, first.manifest_digest), (old.id.to_string(), old.manifest_digest.to_string()));
    let asked = |registry: &Registry| {
        registry.seen().iter().filter(|seen| seen.path.ends_with("/manifests/1")).count()
    };
    assert_eq!(asked(&registry), 1);
    let second = fixture.store.pull(&reference, None, None).await.unwrap();
    assert_eq!((second.id, asked(&registry)), (newer.id.to_string(), 2));
}

#[tokio::test]
async fn a_second_daemon_on_one_store_is_turned_away() {
    let fixture = Fixture::new();
    let open = || ImageStore::open(config(fixture.directory.path()), Arc::new(Memory::default()));
    let told = open().err().unwrap().to_string();
    let lock = fixture.images().join("lock");
    let expected = format!("another process uses {}: give each daemon a --root of its own", lock.display());
    assert!(told.contains(&expected), "{told}");
}

#[tokio::test]
async fn an_image_may_have_127_layers_some_of_them_twice() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let layers: Vec<Layer> = (0..127).map(|number| one_file(&format!("f{}", number % 100))).collect();
    let reference = registry.put("x", "1", &Image::new(&layers));
    let record = fixture.store.pull(&reference, None, None).await.unwrap();
    let files: BTreeSet<&String> = record.layers.iter().map(|layer| &layer.file).collect();
    assert_eq!((record.layers.len(), files.len()), (127, 100));
    let blobs = registry.seen().iter().filter(|seen| seen.path.contains("/blobs/")).count();
    assert_eq!(blobs, 101, "each layer once, and the config");
    assert_eq!(fixture.store.resolve(&reference).unwrap().layers.len(), 127);
}

#[tokio::test]
async fn a_config_that_is_no_json_is_corrupt() {
    let (registry, fixture) = (Registry::good().await, Fixture::new());
    let mut image = Image::new(&[one_file("f")]);
    let config = b"{\"os\": \"linux\", oops".to_vec();
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["config"]["digest"] = Digest::sha256(&config).to_string().into();
    manifest["config"]["size"] = config.len().into();
    image.blobs.insert(Digest::sha256(&config).to_string(), config);
    image.manifest = manifest.to_string().into_bytes();
    let error = fixture.store.pull(&registry.put("x", "1", &image), None, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("the image config is not valid JSON of its kind"), "{error}");
    assert!(fixture.store.list().is_empty());
}

#[tokio::test]
async fn a_zstd_bomb_stops_at_the_limit() {
    let registry = Registry::good().await;
    let tar = tar(&[("zeros", &vec![0; 64 << 20])]);
    let blob = zstd::encode_all(&tar[..], 3).unwrap();
    assert!(blob.len() < 20_000);
    let media_type = "application/vnd.oci.image.layer.v1.tar+zstd";
    let reference = registry.put("x", "bomb", &Image::new(&[Layer { blob, tar, media_type }]));
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(directory.path());
    config.limits.layer_bytes = 1 << 20;
    let storage = Arc::new(Memory::default());
    let store = ImageStore::open(config, storage.clone()).unwrap();
    let error = store.pull(&reference, None, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("1048576 bytes"), "{error}");
    Fixture { directory, storage, store }.assert_tmp_is_empty().await;
}

#[tokio::test]
async fn an_identity_token_is_exchanged_and_sent_nowhere_else() {
    let service = Registry::start(|seen| {
        let form =
            seen.headers.get("content-type").is_some_and(|v| *v == "application/x-www-form-urlencoded");
        match form && !seen.headers.contains_key("authorization") && seen.path == "/token" {
            true => Behaviour::Answer(200, vec![], br#"{"access_token":"SHORT"}"#.to_vec()),
            false => Behaviour::Answer(401, vec![], vec![]),
        }
    })
    .await;
    let realm = format!("http://{}", service.address);
    let registry = Registry::start(move |seen| {
        match seen.headers.get("authorization").is_some_and(|value| *value == "Bearer SHORT") {
            true => Behaviour::Serve,
            false => {
                let asks = format!(r#"Bearer realm="{realm}/token",service="s""#);
                Behaviour::Answer(401, vec![("www-authenticate", asks)], vec![])
            }
        }
    })
    .await;
    let (fixture, reference) = (Fixture::new(), registry.put("x", "1", &Image::new(&[one_file("f")])));
    let auth = RegistryAuth { identity_token: "LONG-LIVED".into(), ..RegistryAuth::default() };
    fixture.store.pull(&reference, Some(auth), None).await.unwrap();
    let seen = registry.seen();
    assert!(seen.iter().all(|seen| !format!("{seen:?}").contains("LONG-LIVED")));
    assert!(
        service.seen().iter().all(|seen| !seen.path.contains("LONG-LIVED")),
        "not in a URL, which is logged"
    );
}
