//! Redirects: what a host that a registry names gets, and what it never gets.

use crate::common::{Behaviour, Fixture, Image, Layer, Registry, Seen, tar};
use a3s_box_image::{ErrorKind, RegistryAuth};
use base64::Engine as _;

fn image() -> Image {
    Image::new(&[Layer::gzip(tar(&[("f", b"x")]))])
}

fn alice() -> RegistryAuth {
    RegistryAuth { username: "alice".into(), password: "secret".into(), ..RegistryAuth::default() }
}

fn basic() -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("alice:secret"))
}

fn carries(seen: &Seen, value: &str) -> bool {
    seen.headers.get("authorization").is_some_and(|header| header == value)
}

/// A bearer challenge whose token service is the challenging host itself.
fn bearer(seen: &Seen) -> Behaviour {
    let host = seen.headers["host"].to_str().unwrap();
    let challenge =
        format!(r#"Bearer realm="http://{host}/token",service="second",scope="repository:x:pull""#);
    Behaviour::Answer(401, vec![("www-authenticate", challenge)], vec![])
}

fn demands_basic() -> Behaviour {
    Behaviour::Answer(401, vec![("www-authenticate", "Basic realm=\"first\"".into())], vec![])
}

/// A registry that wants alice's password and redirects what `part` names to `target`.
async fn redirecting(part: &'static str, target: String) -> Registry {
    Registry::start(move |seen| match (carries(seen, &basic()), seen.path.contains(part)) {
        (false, _) => demands_basic(),
        (true, true) => Behaviour::Answer(307, vec![("location", format!("{target}{}", seen.path))], vec![]),
        (true, false) => Behaviour::Serve,
    })
    .await
}

/// A registry that gives a token to everybody and serves those who carry the newest one. Each token is good for
/// so many requests.
async fn public(good_for: usize) -> Registry {
    let (given, used) = (std::sync::atomic::AtomicUsize::new(0), std::sync::Mutex::new(0));
    Registry::start(move |seen| {
        let order = std::sync::atomic::Ordering::SeqCst;
        let mut used = used.lock().unwrap();
        if seen.path.starts_with("/token") {
            *used = 0;
            let token = format!(r#"{{"token":"ANYBODY-{}"}}"#, given.fetch_add(1, order) + 1);
            return Behaviour::Answer(200, vec![], token.into_bytes());
        }
        let known = carries(seen, &format!("Bearer ANYBODY-{}", given.load(order)));
        if !known || *used == good_for {
            return bearer(seen);
        }
        *used += 1;
        Behaviour::Serve
    })
    .await
}

#[tokio::test]
async fn a_401_of_a_redirects_host_is_not_answered_with_the_registrys_password() {
    // The challenge of the host that a redirect led to was taken for the registry's: user and password went to the
    // token service that this host named, and the token from there replaced what the registry had asked for.
    for part in ["/blobs/", "/manifests/"] {
        let second = Registry::start(|seen| match seen.path.starts_with("/token") {
            true => Behaviour::Answer(200, vec![], br#"{"token":"second"}"#.to_vec()),
            false => bearer(seen),
        })
        .await;
        let first = redirecting(part, format!("http://{}", second.address)).await;
        let reference = first.put("x", "1", &image());
        let error = Fixture::new().store.pull(&reference, Some(alice()), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(error.to_string().contains(&second.address.to_string()), "{error}");
        let told = second.seen();
        assert!(!told.is_empty() && told.iter().all(|seen| !carries(seen, &basic())), "{told:?}");
        assert!(told.iter().all(|seen| !seen.path.contains("alice")), "{told:?}");
        if part == "/blobs/" {
            assert!(told.iter().all(|seen| !seen.headers.contains_key("authorization")), "{told:?}");
            assert!(told.iter().all(|seen| !seen.path.starts_with("/token")), "{told:?}");
            assert!(error.to_string().contains("do not follow"), "{error}");
        }
        // What the second host gave goes to nobody else.
        let mut again = first.seen().into_iter().filter(|seen| seen.headers.contains_key("authorization"));
        assert!(again.all(|seen| carries(&seen, &basic())));
    }
}

#[tokio::test]
async fn a_redirects_host_that_wants_a_password_gets_none() {
    for part in ["/blobs/", "/manifests/"] {
        let second = Registry::start(|_| demands_basic()).await;
        let first = redirecting(part, format!("http://{}", second.address)).await;
        let reference = first.put("x", "1", &image());
        let error = Fixture::new().store.pull(&reference, Some(alice()), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(second.seen().iter().all(|seen| !seen.headers.contains_key("authorization")));
    }
}

#[tokio::test]
async fn a_name_that_redirects_to_a_public_registry_can_be_pulled() {
    // The registry behind the name wants a token that anybody gets; its challenge could not be answered, because the
    // token was sent to the name only. It may expire between manifest and blobs.
    for good_for in [100, 1] {
        let real = public(good_for).await;
        let target = format!("http://{}", real.address);
        let name = Registry::start(move |seen| {
            Behaviour::Answer(302, vec![("location", format!("{target}{}", seen.path))], vec![])
        })
        .await;
        let image = image();
        real.put("x", "1", &image);
        let reference = format!("{}/x:1", name.address);
        for credentials in [None, Some(alice())] {
            let fixture = Fixture::new();
            let record = fixture.store.pull(&reference, credentials, None).await.unwrap();
            assert_eq!((record.id, record.repo_tags), (image.id.to_string(), vec![reference.clone()]));
        }
        assert!(real.seen().iter().all(|seen| !carries(seen, &basic()) && !seen.path.contains("alice")));
        assert!(name.seen().iter().all(|seen| !seen.headers.contains_key("authorization")));
    }
}

#[tokio::test]
async fn a_registry_and_the_host_it_redirects_to_are_each_answered_on_their_own() {
    let real = public(100).await;
    let first = redirecting("/v2/", format!("http://{}", real.address)).await;
    let image = image();
    real.put("x", "1", &image);
    let reference = format!("{}/x:1", first.address);
    Fixture::new().store.pull(&reference, Some(alice()), None).await.unwrap();
    assert!(real.seen().iter().all(|seen| !carries(seen, &basic())));
}
