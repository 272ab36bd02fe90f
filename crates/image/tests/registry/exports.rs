//! Images out of the store: saved and pushed.

use std::fs;

use a3s_box_image::{ErrorKind, ExportError, RegistryAuth, RegistryError};

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
async fn a_layout_is_pushed_as_it_is() {
    let (fixture, registry) = (Fixture::new(), Registry::good().await);
    let image = image();
    let layout = fixture.directory.path().join("layout");
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    for (digest, bytes) in &image.blobs {
        fs::write(layout.join("blobs").join(digest.replacen(':', "/", 1)), bytes).unwrap();
    }
    let manifest = layout.join("blobs").join(image.manifest_digest.to_string().replacen(':', "/", 1));
    fs::write(&manifest, &image.manifest).unwrap();
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [
        { "digest": image.manifest_digest.to_string(), "size": image.manifest.len() },
    ]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    let source = format!("oci:{}", layout.display());
    let destination = format!("{}/new/app:2", registry.address);
    let digest = fixture.store.push(&source, &destination, None).await.unwrap();
    assert_eq!(digest, image.manifest_digest);
    let pulled = fixture.store.pull(&destination, None, None).await.unwrap();
    assert_eq!(pulled.id, image.id.to_string());

    let layer = image.blobs.keys().find(|digest| **digest != image.id.to_string()).unwrap();
    fs::write(layout.join("blobs").join(layer.replacen(':', "/", 1)), "cut").unwrap();
    let error = fixture.store.push(&source, &destination, None).await.unwrap_err();
    assert!(error.to_string().contains("does not match its digest"), "{error}");
}

#[tokio::test]
async fn a_token_service_is_asked_for_the_right_to_push() {
    let service = Registry::start(|seen| {
        let scope = seen.path.contains("scope=repository%3Anew%2Fapp%3Apull%2Cpush");
        // "alice:secret"
        let known = seen.headers.get("authorization").is_some_and(|v| *v == "Basic YWxpY2U6c2VjcmV0");
        match scope && known {
            true => Behaviour::Answer(200, vec![], br#"{"token":"WRITE"}"#.to_vec()),
            false => Behaviour::Answer(401, vec![], vec![]),
        }
    })
    .await;
    let realm = format!("http://{}", service.address);
    let registry = Registry::start(move |seen| {
        let open = !seen.path.contains("/new/") && seen.path != "/v2/";
        match open || seen.headers.get("authorization").is_some_and(|value| *value == "Bearer WRITE") {
            true => Behaviour::Serve,
            false => {
                let asks =
                    format!(r#"Bearer realm="{realm}/token",service="s",scope="repository:new/app:pull""#);
                Behaviour::Answer(401, vec![("www-authenticate", asks)], vec![])
            }
        }
    })
    .await;
    let fixture = Fixture::new();
    let name = registry.put("team/app", "1", &image());
    fixture.store.pull(&name, None, None).await.unwrap();
    let destination = format!("{}/new/app:2", registry.address);
    let auth = |password: &str| RegistryAuth {
        username: "alice".into(),
        password: password.into(),
        ..RegistryAuth::default()
    };
    let error = fixture.store.push(&name, &destination, Some(auth("guess"))).await.unwrap_err();
    assert!(
        matches!(error, ExportError::Registry(_)) && !format!("{error:?}").contains("guess"),
        "{error:?}"
    );
    fixture.store.push(&name, &destination, Some(auth("secret"))).await.unwrap();
    let sent = registry.seen();
    let puts = sent.iter().filter(|seen| seen.path.contains("uploads"));
    assert!(puts.clone().count() > 0);
    assert!(sent.iter().all(|seen| !format!("{:?}", seen.headers).contains("YWxpY2U6c2VjcmV0")));
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
