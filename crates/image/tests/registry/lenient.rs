//! What other readers take, and this one once did not.

use crate::common::{Behaviour, Fixture, Image, Layer, Registry, noise, tar};
use a3s_box_image::digest::Digest;

fn image() -> Image {
    Image::new(&[Layer::gzip(tar(&[("big", &noise(300_000))]))])
}

#[tokio::test]
async fn what_breaks_off_after_its_last_byte_is_whole() {
    // The rest of a blob of which all bytes had come was asked for, and the error that HTTP demands for this failed
    // the pull. Manifests and configs were fetched again and again.
    for (part, requests) in [("/blobs/", 2), ("/manifests/", 1)] {
        let registry = Registry::start(move |seen| match seen.path.contains(part) {
            true => Behaviour::UnendedAfter(usize::MAX),
            false => Behaviour::Serve,
        })
        .await;
        let image = image();
        let tag = registry.put("x", "1", &image);
        let digest = format!("{}@{}", tag.trim_end_matches(":1"), image.manifest_digest);
        let names = if part == "/blobs/" { vec![tag] } else { vec![digest] };
        for name in names {
            let record = Fixture::new().store.pull(&name, None, None).await.unwrap();
            assert_eq!(record.id, image.id.to_string());
            assert_eq!(registry.seen().iter().filter(|seen| seen.path.contains(part)).count(), requests);
        }
    }
}

#[tokio::test]
async fn bytes_that_are_all_there_and_wrong_are_refused_however_they_end() {
    let image = image();
    let layer = image.blobs.keys().find(|digest| **digest != image.id.to_string()).unwrap().clone();
    let size = image.blobs[&layer].len();
    let registry = Registry::start(move |seen| match seen.path.ends_with(&layer) {
        true => Behaviour::InsteadUnended(noise(size)),
        false => Behaviour::Serve,
    })
    .await;
    let reference = registry.put("x", "1", &image);
    let error = Fixture::new().store.pull(&reference, None, None).await.unwrap_err();
    assert_eq!(error.kind(), a3s_box_image::ErrorKind::Corrupt, "{error}");
}

#[tokio::test]
async fn a_host_that_sends_no_parts_sends_the_whole_again() {
    let image = image();
    let layer = image.blobs.keys().find(|digest| **digest != image.id.to_string()).unwrap().clone();
    let registry =
        Registry::start(move |seen| match (seen.path.ends_with(&layer), seen.headers.get("range")) {
            (true, None) if seen.nth == 0 => Behaviour::CutAfter(1000),
            // Some announce the length of the blob and never send it.
            (true, Some(_)) => Behaviour::Answer(416, vec![("content-length", "300000".into())], vec![]),
            _ => Behaviour::Serve,
        })
        .await;
    let reference = registry.put("x", "1", &image);
    Fixture::new().store.pull(&reference, None, None).await.unwrap();
}

#[tokio::test]
async fn a_token_beside_an_empty_one_is_found() {
    for answer in
        [r#"{"token":"","access_token":"T"}"#, r#"{"token":null,"access_token":"T"}"#, r#"{"token":"T"}"#]
    {
        let registry = Registry::start(move |seen| {
            if seen.path.starts_with("/token") {
                return Behaviour::Answer(200, vec![], answer.as_bytes().to_vec());
            }
            if seen.headers.get("authorization").is_some_and(|value| value == "Bearer T") {
                return Behaviour::Serve;
            }
            let host = seen.headers["host"].to_str().unwrap();
            let challenge = format!(r#"Bearer realm="http://{host}/token""#);
            Behaviour::Answer(401, vec![("www-authenticate", challenge)], vec![])
        })
        .await;
        let reference = registry.put("x", "1", &image());
        Fixture::new().store.pull(&reference, None, None).await.unwrap_or_else(|e| panic!("{answer}: {e}"));
    }
}

#[tokio::test]
async fn of_an_index_the_image_is_chosen_and_not_what_is_beside_it() {
    let (registry, image) = (Registry::good().await, image());
    registry.put("x", "single", &image);
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let entry = |digest: &Digest, size: usize, more: serde_json::Value| {
        let mut entry = serde_json::json!({"digest": digest.to_string(), "size": size});
        entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        entry
    };
    let other = Digest::sha256(b"other");
    let platform = serde_json::json!({"os": "linux", "architecture": architecture});
    let artifact = serde_json::json!({"artifactType": "application/spdx+json", "platform": platform});
    let attestation = serde_json::json!({
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    });
    let (told, untold) = (serde_json::json!({ "platform": platform }), serde_json::json!({}));
    let empty = serde_json::json!({"platform": {"os": "", "architecture": null}, "annotations": null});
    for (tag, beside, own) in [
        ("artifact", &artifact, &told),
        ("attested", &attestation, &untold),
        ("attested-and-empty", &attestation, &empty),
    ] {
        let own = entry(&image.manifest_digest, image.manifest.len(), own.clone());
        let index =
            serde_json::json!({"schemaVersion": 2, "manifests": [entry(&other, 5, beside.clone()), own]});
        registry.put_manifest(
            "x",
            tag,
            "application/vnd.oci.image.index.v1+json",
            index.to_string().as_bytes(),
        );
        let name = format!("{}/x:{tag}", registry.address);
        let record =
            Fixture::new().store.pull(&name, None, None).await.unwrap_or_else(|e| panic!("{tag}: {e}"));
        assert_eq!(record.id, image.id.to_string(), "{tag}");
    }
}
