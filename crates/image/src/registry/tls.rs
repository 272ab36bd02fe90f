//! One HTTP client per registry host, with that host's certificates.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::config::Timeouts;
use crate::hosts::{Host, HostsError, TlsFiles, is_loopback};

/// Builds the client of a host. Blocks on the disk.
pub(super) fn client(host: &Host, timeouts: &Timeouts) -> Result<reqwest::Client, HostsError> {
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls_config(&host.tls)?)
        .user_agent(concat!("a3s-box/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(host.connect_timeout.unwrap_or(timeouts.connect))
        // Redirects are followed by hand: they must not take credentials elsewhere.
        .redirect(reqwest::redirect::Policy::none())
        // Layers come over connections of their own; h2 would share one window.
        .http1_only()
        .pool_max_idle_per_host(4);
    if is_loopback(&host.authority) {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| HostsError::Certificate {
        path: host.tls.client.first().map(|(path, _)| path.clone()).unwrap_or_default(),
        problem: format!("no HTTP client can be made for {}: {error}", host.origin()),
    })
}

fn tls_config(files: &TlsFiles) -> Result<ClientConfig, HostsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let wrong = |path: &Path, error: rustls::Error| HostsError::Certificate {
        path: path.to_owned(),
        problem: error.to_string(),
    };
    // The provider is a constant that has the default versions.
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(Path::new("TLS"), error))?;
    let builder = if files.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        let mut roots = system_roots().clone();
        for path in &files.ca {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|error| wrong(path, error))?;
            }
        }
        builder.with_root_certificates(roots)
    };
    // rustls offers one certificate; further ones would be for other authorities of the same host.
    let mut config = match files.client.first() {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                certificates(certificate)?,
                private_key(key.as_deref().unwrap_or(certificate))?,
            )
            .map_err(|error| wrong(certificate, error))?,
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// This machine's certificate authorities, read once.
fn system_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "a certificate authority of this machine cannot be read");
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(found.certs);
        roots
    })
}

fn read(path: &Path) -> Result<Vec<u8>, HostsError> {
    std::fs::read(path).map_err(|source| HostsError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, HostsError> {
    let wrong = |problem: String| HostsError::Certificate { path: path.to_owned(), problem };
    let certificates = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| wrong(format!("not PEM: {error}")))?;
    if certificates.is_empty() {
        return Err(wrong("holds no certificate".into()));
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, HostsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| HostsError::Certificate {
        path: path.to_owned(),
        problem: format!("holds no private key: {error}"),
    })
}

/// For `skip_verify`: the certificate is not looked at, the handshake's signatures still are.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
