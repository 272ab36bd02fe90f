//! Images out of the store: saved and pushed.

use std::fs;

use a3s_box_image::{ErrorKind, ExportError, RegistryError};

use crate::common::{Behaviour, Fixture, Image, Layer, Registry, tar};

fn image() -> Image {
    let lower = tar(&[("d/", b""), ("d/a", b"1"), ("gone", b"")]);
    Image::new(&[Layer::gzip(lower), Layer::gzip(tar(&[("d/b", b"2"), (".wh.gone", b"")]))])
}

#[tokio::test]
async fn a_saved_image_can_be_loaded_and_saved_again_with_the_same_bytes() {
    let (fixture, other, registry) = (Fixture::new(), Fixture::new(), Registry::good().await);
    let name = registry.put("team/app", "1", &image());
    let first = fixture.store.pull(&name, None, None).await.unwrap();
    let mut saved = Vec::new();
    fixture.store.save(&name, &mut saved).unwrap();
    let path = other.directory.path().join("saved.tar");
    fs::write(&path, &saved).unwrap();

    let loaded = other.store.pull(&format!("oci-archive:{}", path.display()), None, None).await.unwrap();
    assert_eq!(loaded.repo_tags, [name.as_str()]);
    assert_eq!((&loaded.config, &loaded.platform), (&first.config, &first.platform));
    assert_eq!(loaded.layers.len(), 2);
    let mut again = Vec::new();
    other.store.save(&name, &mut again).unwrap();
    assert!(saved == again);
    fixture.assert_tmp_is_empty().await;
}

#[tokio::test]
async fn a_pushed_image_can_be_pulled() {
    let (fixture, other, registry) = (Fixture::new(), Fixture::new(), Registry::good().await);
    let name = registry.put("team/app", "1", &image());
    let first = fixture.store.pull(&name, None, None).await.unwrap();
    let destination = format!("{}/new/app:2", registry.address);
    let digest = fixture.store.push(&name, &destination, None).await.unwrap();
    let pulled = other.store.pull(&destination, None, None).await.unwrap();
    assert_eq!(pulled.manifest_digest, digest.to_string());
    assert_eq!((pulled.config, pulled.layers.len()), (first.config, 2));

    let before = registry.seen().len();
    fixture.store.push(&name, &destination, None).await.unwrap();
    let requests = registry.seen().split_off(before);
    assert!(requests.iter().all(|seen| !seen.path.contains("uploads")), "blobs that are there: {requests:?}");
    fixture.assert_tmp_is_empty().await;
}

#[tokio::test]
async fn a_registry_that_takes_nothing_is_named() {
    let fixture = Fixture::new();
    let registry = Registry::start(|seen| match seen.path.contains("uploads") {
        true => Behaviour::Answer(403, Vec::new(), br#"{"errors":[{"code":"DENIED"}]}"#.to_vec()),
        false => Behaviour::Serve,
    })
    .await;
    let name = registry.put("team/app", "1", &image());
    fixture.store.pull(&name, None, None).await.unwrap();
    let destination = format!("{}/new/app:2", registry.address);
    let error = fixture.store.push(&name, &destination, None).await.unwrap_err();
    let ExportError::Registry(denied @ RegistryError::Denied { .. }) = &error else { panic!("{error:?}") };
    assert_eq!(denied.kind(), ErrorKind::Unauthorized);
    assert!(denied.to_string().contains("DENIED"), "{denied}");
    let error = fixture.store.push(&name, "oci:/x", None).await.unwrap_err();
    assert!(matches!(error, ExportError::Destination { .. }), "{error}");
    let error = fixture.store.push("registry.example/none:1", &destination, None).await.unwrap_err();
    assert!(matches!(error, ExportError::Image(_)), "{error}");
}
