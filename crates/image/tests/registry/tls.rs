//! Certificates: authorities, clients, and none.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use a3s_box_image::ErrorKind;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::common::{Fixture, Image, Layer, Registry, tar};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/registry/certs").join(name)
}

/// A server that asks for a client certificate, or does not.
fn server(wants_client: bool) -> ServerConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = if wants_client {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(file("ca.pem")).unwrap()).unwrap();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let chain = vec![CertificateDer::from_pem_file(file("server.pem")).unwrap()];
    builder.with_single_cert(chain, PrivateKeyDer::from_pem_file(file("server.key")).unwrap()).unwrap()
}

fn put(registry: &Registry) {
    registry.put("x", "1", &Image::new(&[Layer::gzip(tar(&[("a", b"b")]))]));
}

/// A registry name that hosts.toml sends to a server.
const NAME: &str = "registry.example";

#[tokio::test]
async fn a_private_authority_is_trusted_where_it_is_configured() {
    let registry = Registry::start_tls(server(false)).await;
    put(&registry);
    let fixture = Fixture::new();
    let url = format!("https://{}", registry.address);
    fixture.hosts(NAME, &format!("server = {url:?}"));
    let error = fixture.store.pull("registry.example/x:1", None, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("certificate"), "{error}");
    fixture.hosts(NAME, &format!("server = {url:?}\nca = {:?}", file("ca.pem")));
    fixture.store.pull("registry.example/x:1", None, None).await.unwrap();
}

#[tokio::test]
async fn skip_verify_takes_any_certificate() {
    let registry = Registry::start_tls(server(false)).await;
    put(&registry);
    let fixture = Fixture::new();
    fixture.hosts(NAME, &format!("server = \"https://{}\"\nskip_verify = true", registry.address));
    fixture.store.pull("registry.example/x:1", None, None).await.unwrap();
}

#[tokio::test]
async fn a_registry_of_this_machine_that_speaks_tls_is_found_without_configuration() {
    let registry = Registry::start_tls(server(false)).await;
    put(&registry);
    let fixture = Fixture::new();
    fixture.store.pull(&format!("{}/x:1", registry.address), None, None).await.unwrap();
}

#[tokio::test]
async fn a_client_certificate_is_presented_where_it_is_configured() {
    let registry = Registry::start_tls(server(true)).await;
    put(&registry);
    let fixture = Fixture::new();
    let base = format!("server = \"https://{}\"\nca = {:?}\n", registry.address, file("ca.pem"));
    fixture.hosts(NAME, &base);
    let error = fixture.store.pull("registry.example/x:1", None, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    fixture.hosts(NAME, &format!("{base}client = [[{:?}, {:?}]]", file("client.pem"), file("client.key")));
    fixture.store.pull("registry.example/x:1", None, None).await.unwrap();
}

#[tokio::test]
async fn a_certificate_file_that_is_none_is_named() {
    let fixture = Fixture::new();
    fixture.hosts(NAME, "ca = \"hosts.toml\"");
    let error = fixture.store.pull("registry.example/x:1", None, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    let message = error.to_string();
    assert!(message.contains("finding the source") && message.contains("hosts.toml"), "{message}");
    assert!(message.contains("holds no certificate"), "{message}");
}
