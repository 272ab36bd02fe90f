//! Pulls that fail: each names kind, stage, object and remedy, ends in time, and leaves nothing.

use std::time::{Duration, Instant};

use crate::common::{Behaviour, Fixture, Image, Layer, Registry, gzip, noise, tar};
use a3s_box_image::digest::Digest;
use a3s_box_image::{ErrorKind, ImageError};

fn image() -> Image {
    Image::new(&[Layer::gzip(tar(&[("big", &noise(400_000))]))])
}

/// The digest of the only layer.
fn layer_of(image: &Image) -> String {
    image.blobs.keys().find(|digest| **digest != image.id.to_string()).unwrap().clone()
}

/// Pulls, and checks what every failure must be like.
async fn failure(fixture: &Fixture, reference: &str, kind: ErrorKind, parts: &[&str]) -> ImageError {
    let begun = Instant::now();
    let error = fixture.store.pull(reference, None, None).await.expect_err("the pull succeeded");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(8), "it took {took:?}: {error}");
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
    assert!(message.contains("; ") && message.lines().count() == 1, "no remedy, or several lines: {message}");
    fixture.assert_tmp_is_empty().await;
    assert!(fixture.store.list().is_empty());
    error
}

/// One misbehaviour for all manifests or all blobs.
async fn misbehave(
    part: &'static str,
    behaviour: impl Fn() -> Behaviour + Send + Sync + 'static,
) -> (Registry, Fixture, String) {
    let registry =
        Registry::start(move |seen| if seen.path.contains(part) { behaviour() } else { Behaviour::Serve })
            .await;
    let reference = registry.put("team/app", "1.0", &image());
    (registry, Fixture::new(), reference)
}

#[tokio::test]
async fn a_missing_tag_is_not_found() {
    let (registry, fixture, _) = misbehave("-", || Behaviour::Serve).await;
    let reference = format!("{}/team/app:9", registry.address);
    failure(
        &fixture,
        &reference,
        ErrorKind::NotFound,
        &[&reference, "fetching the manifest", "404", "MANIFEST_UNKNOWN"],
    )
    .await;
}

#[tokio::test]
async fn endless_challenges_end_as_unauthorized() {
    // The token service is the registry itself: it gives tokens that it does not take.
    let registry = Registry::start(|seen| {
        if seen.path.starts_with("/token") {
            return Behaviour::Answer(200, vec![], br#"{"token":"worthless"}"#.to_vec());
        }
        let host = seen.headers["host"].to_str().unwrap();
        let challenge = format!(r#"Bearer realm="http://{host}/token",service="x""#);
        Behaviour::Answer(401, vec![("www-authenticate", challenge)], vec![])
    })
    .await;
    let reference = registry.put("x", "1", &image());
    let error =
        failure(&Fixture::new(), &reference, ErrorKind::Unauthorized, &["a token", "credentials"]).await;
    assert!(!error.to_string().contains("worthless"));
    assert!(registry.seen().len() <= 4, "{} requests", registry.seen().len());
}

#[tokio::test]
async fn a_401_without_a_challenge_is_unauthorized() {
    let (_registry, fixture, reference) =
        misbehave("/manifests/", || Behaviour::Answer(401, vec![], vec![])).await;
    failure(&fixture, &reference, ErrorKind::Unauthorized, &["WWW-Authenticate"]).await;
}

#[tokio::test]
async fn basic_challenges_without_credentials_are_unauthorized() {
    let basic = || vec![("www-authenticate", "Basic realm=\"x\"".to_owned())];
    let (_registry, fixture, reference) =
        misbehave("/manifests/", move || Behaviour::Answer(401, basic(), vec![])).await;
    failure(&fixture, &reference, ErrorKind::Unauthorized, &["no credentials", "imagePullSecrets"]).await;
}

#[tokio::test]
async fn too_many_requests_end_after_bounded_tries() {
    let (registry, fixture, reference) =
        misbehave("/manifests/", || Behaviour::Answer(429, vec![("retry-after", "0".into())], vec![])).await;
    failure(&fixture, &reference, ErrorKind::Unavailable, &["429", "too many requests"]).await;
    assert_eq!(registry.seen().len(), 3);
}

#[tokio::test]
async fn a_pause_longer_than_ours_is_not_made() {
    let (registry, fixture, reference) =
        misbehave("/manifests/", || Behaviour::Answer(429, vec![("retry-after", "3600".into())], vec![]))
            .await;
    failure(&fixture, &reference, ErrorKind::Unavailable, &["429", "3600 s"]).await;
    assert_eq!(registry.seen().len(), 1);
}

#[tokio::test]
async fn a_registry_that_fails_is_unavailable() {
    let (registry, fixture, reference) =
        misbehave("/blobs/", || Behaviour::Answer(500, vec![], vec![])).await;
    failure(&fixture, &reference, ErrorKind::Unavailable, &["500", "fetching the config"]).await;
    assert_eq!(registry.seen().iter().filter(|seen| seen.path.contains("/blobs/")).count(), 3);
}

#[tokio::test]
async fn a_registry_that_is_not_there_is_unavailable() {
    let fixture = Fixture::new();
    failure(&fixture, "127.0.0.1:1/x:1", ErrorKind::Unavailable, &["http://127.0.0.1:1", "refused"]).await;
    failure(&fixture, "no-such-host.invalid/x:1", ErrorKind::Unavailable, &["https://no-such-host.invalid"])
        .await;
}

#[tokio::test]
async fn a_registry_that_hangs_is_a_timeout() {
    for (part, stage) in [("/manifests/", "fetching the manifest"), ("/blobs/", "fetching the config")] {
        let (_registry, fixture, reference) = misbehave(part, || Behaviour::Hang).await;
        failure(
            &fixture,
            &reference,
            ErrorKind::Timeout,
            &[stage, "http://127.0.0.1:", "answer the request"],
        )
        .await;
    }
}

/// A registry with one image whose layer misbehaves.
async fn layer_misbehaves(
    behaviour: impl Fn() -> Behaviour + Send + Sync + 'static,
) -> (Registry, Fixture, String, String) {
    let image = image();
    let layer = layer_of(&image);
    let path = format!("/v2/x/blobs/{layer}");
    let registry =
        Registry::start(move |seen| if seen.path == path { behaviour() } else { Behaviour::Serve }).await;
    let reference = registry.put("x", "1", &image);
    (registry, Fixture::new(), reference, layer)
}

#[tokio::test]
async fn a_layer_that_stalls_is_a_timeout() {
    let (_registry, fixture, reference, layer) = layer_misbehaves(|| Behaviour::StallAfter(1000)).await;
    failure(&fixture, &reference, ErrorKind::Timeout, &["layer 1 of 1", &layer, "go on sending"]).await;
}

#[tokio::test]
async fn a_layer_that_is_always_cut_is_unavailable() {
    for behaviour in [|| Behaviour::CutAfter(1000), || Behaviour::EndAfter(1000)] {
        let (registry, fixture, reference, layer) = layer_misbehaves(behaviour).await;
        failure(&fixture, &reference, ErrorKind::Unavailable, &["layer 1 of 1", &layer, "after 1000 bytes"])
            .await;
        assert_eq!(registry.seen().iter().filter(|seen| seen.path.contains(&layer)).count(), 3);
    }
}

#[tokio::test]
async fn a_lying_length_is_corrupt() {
    for size in [100, 500_000] {
        let (_registry, fixture, reference, layer) =
            layer_misbehaves(move || Behaviour::Instead(noise(size))).await;
        failure(&fixture, &reference, ErrorKind::Corrupt, &["layer 1 of 1", &layer, "instead of"]).await;
    }
}

#[tokio::test]
async fn bytes_with_another_digest_are_corrupt() {
    let size = image().blobs[&layer_of(&image())].len();
    let valid_but_other = gzip(&tar(&[("other", &noise(size - 2000))]));
    let mut padded = valid_but_other.clone();
    padded.resize(size, 0);
    for bytes in [noise(size), padded] {
        let (_registry, fixture, reference, layer) =
            layer_misbehaves(move || Behaviour::Instead(bytes.clone())).await;
        let expected = format!("instead of {layer}");
        failure(&fixture, &reference, ErrorKind::Corrupt, &["layer 1 of 1", "has the digest", &expected])
            .await;
    }
}

#[tokio::test]
async fn a_wrong_diff_id_is_corrupt() {
    let registry = Registry::good().await;
    let wrong = Digest::sha256(b"something else").to_string();
    let image = Image::with_diff_ids(&[Layer::gzip(tar(&[("x", b"")]))], std::slice::from_ref(&wrong));
    let reference = registry.put("x", "1", &image);
    failure(&Fixture::new(), &reference, ErrorKind::Corrupt, &["diff id", &wrong, "layer 1 of 1"]).await;
}

#[tokio::test]
async fn a_manifest_with_another_digest_is_corrupt() {
    let image = image();
    let (_registry, fixture, reference) =
        misbehave("/manifests/", || Behaviour::Instead(b"{}".to_vec())).await;
    let by_digest = format!("{}@{}", reference.trim_end_matches(":1.0"), image.manifest_digest);
    failure(&fixture, &by_digest, ErrorKind::Corrupt, &["fetching the manifest", "instead of sha256:"]).await;
}

#[tokio::test]
async fn documents_that_are_too_large_are_refused_unread() {
    let (_registry, fixture, reference) =
        misbehave("/manifests/", || Behaviour::Instead(vec![b' '; 5 << 20])).await;
    failure(&fixture, &reference, ErrorKind::Unsupported, &["more than 4194304 bytes"]).await;
}

#[tokio::test]
async fn documents_of_other_kinds_are_refused_by_name() {
    let registry = Registry::good().await;
    let fixture = Fixture::new();
    let table: [(&[u8], ErrorKind, &str); 4] = [
        (br#"{"schemaVersion":1,"fsLayers":[],"history":[]}"#, ErrorKind::Unsupported, "schema 1"),
        (b"<html>", ErrorKind::Corrupt, "not valid JSON"),
        (br#"{"schemaVersion":2}"#, ErrorKind::Corrupt, "neither a manifest nor an index"),
        (br#"{"schemaVersion":2,"manifests":[]}"#, ErrorKind::Unsupported, "no image for linux/"),
    ];
    for (i, (bytes, kind, part)) in table.into_iter().enumerate() {
        registry.put_manifest("x", &i.to_string(), "application/json", bytes);
        failure(&fixture, &format!("{}/x:{i}", registry.address), kind, &[part]).await;
    }
}

#[tokio::test]
async fn an_index_that_lies_or_goes_round_in_circles_is_refused() {
    let (registry, fixture, image) = (Registry::good().await, Fixture::new(), image());
    let real = registry.put("x", "real", &image);
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let index = |digest: &Digest, size: usize| {
        let platform = serde_json::json!({"os": "linux", "architecture": architecture});
        let entry = serde_json::json!({"digest": digest.to_string(), "size": size, "platform": platform});
        serde_json::json!({"schemaVersion": 2, "manifests": [entry]}).to_string().into_bytes()
    };
    let put = |tag: &str, bytes: &[u8]| {
        registry.put_manifest("x", tag, "application/json", bytes);
        format!("{}:{tag}", real.trim_end_matches(":real"))
    };
    let lying = put("lying", &index(&image.manifest_digest, image.manifest.len() + 1));
    failure(&fixture, &lying, ErrorKind::Corrupt, &["fetching the manifest", "its index states"]).await;
    // A digest cannot name itself, but indexes can be nested without end.
    let mut nested = image.manifest.clone();
    for _ in 0..6 {
        nested = index(&Digest::sha256(&nested), nested.len());
        put("nested", &nested);
    }
    let nested = put("nested", &nested);
    failure(&fixture, &nested, ErrorKind::Unsupported, &["more than 3 further ones"]).await;
}

#[tokio::test]
async fn layers_that_are_no_tars_say_where_they_break() {
    let registry = Registry::good().await;
    let climbing = {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..9].copy_from_slice(b"../escape");
        header.set_size(0);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, &[][..]).unwrap();
        builder.into_inner().unwrap()
    };
    let whole = tar(&[("f", &noise(100_000))]);
    let table = [
        (Layer::gzip(climbing), "climbs out"),
        (Layer::gzip(b"not a tar at all".repeat(64)), "checksum"),
        (Layer::gzip(whole[..50_000].to_vec()), "ends in the middle of a file"),
        (Layer { blob: gzip(&whole)[..60_000].to_vec(), ..Layer::gzip(whole.clone()) }, "could not read"),
    ];
    for (i, (layer, part)) in table.into_iter().enumerate() {
        let reference = registry.put("x", &i.to_string(), &Image::new(&[layer]));
        failure(&Fixture::new(), &reference, ErrorKind::Corrupt, &["layer 1 of 1", part]).await;
    }
}

#[tokio::test]
async fn a_layer_of_another_compression_is_refused_by_its_name() {
    // It was called a tar with a wrong checksum.
    let registry = Registry::good().await;
    let table = [(&b"\xfd7zXZ\0\0\x04 and so on"[..], "xz"), (b"BZh91AY&SY and so on", "bzip2")];
    for (blob, name) in table {
        let layer = Layer { blob: blob.to_vec(), ..Layer::gzip(tar(&[("x", b"")])) };
        let reference = registry.put("x", name, &Image::new(&[layer]));
        let part = format!("compressed with {name}");
        failure(&Fixture::new(), &reference, ErrorKind::Unsupported, &["layer 1 of 1", &part]).await;
    }
}

#[tokio::test]
async fn a_decompression_bomb_stops_at_the_limit() {
    let registry = Registry::good().await;
    let bomb = Image::new(&[Layer::gzip(tar(&[("zeros", &vec![0; 8 << 20])]))]);
    let reference = registry.put("x", "bomb", &bomb);
    let directory = tempfile::tempdir().unwrap();
    let mut config = crate::common::config(directory.path());
    config.limits.layer_bytes = 1 << 20;
    let storage = std::sync::Arc::new(crate::common::Memory::default());
    let store = a3s_box_image::ImageStore::open(config, storage.clone()).unwrap();
    let error = store.pull(&reference, None, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("1048576 bytes"), "{error}");
    Fixture { directory, storage, store }.assert_tmp_is_empty().await;
}

#[tokio::test]
async fn a_pull_that_is_given_up_leaves_nothing_and_can_be_repeated() {
    let first = std::sync::atomic::AtomicBool::new(true);
    let image = image();
    let path = format!("/v2/x/blobs/{}", layer_of(&image));
    let registry = Registry::start(move |seen| {
        let stall = seen.path == path && first.swap(false, std::sync::atomic::Ordering::SeqCst);
        if stall { Behaviour::StallAfter(50_000) } else { Behaviour::Serve }
    })
    .await;
    let reference = registry.put("x", "1", &image);
    let fixture = Fixture::new();
    let pull = fixture.store.pull(&reference, None, None);
    assert!(tokio::time::timeout(Duration::from_millis(200), pull).await.is_err());
    fixture.assert_tmp_is_empty().await;
    fixture.store.pull(&reference, None, None).await.unwrap();
}

#[tokio::test]
async fn a_record_that_cannot_be_written_fails_the_pull() {
    let registry = Registry::good().await;
    let reference = registry.put("x", "1", &image());
    let fixture = Fixture::new();
    fixture.storage.fail_commits.store(true, std::sync::atomic::Ordering::SeqCst);
    failure(&fixture, &reference, ErrorKind::Internal, &["recording the image", "state store"]).await;
}

#[tokio::test]
async fn a_redirect_in_circles_or_to_plain_http_is_not_followed() {
    let (_registry, fixture, reference) = misbehave("/manifests/", || {
        Behaviour::Answer(302, vec![("location", "/v2/x/manifests/again".into())], vec![])
    })
    .await;
    failure(&fixture, &reference, ErrorKind::Unavailable, &["more often than is followed"]).await;
}
