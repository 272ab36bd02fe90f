//! TLS: the server's certificate, and clients that know it.
//!
//! The daemon's own clients run on its node and read its configuration: they accept the configured certificate and no other, whoever
//! signed it and whatever names it has. Other clients verify it in their own ways.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use thiserror::Error;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A certificate and its key, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate first, then those that lead to its authority.
    pub certificate: PathBuf,
    /// The key of the first one.
    pub key: PathBuf,
}

/// The files cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// Missing, unreadable, or no PEM.
    #[error("could not read the {what} in {} (streaming.tls_{setting}): {source}", path.display())]
    Pem {
        /// Certificate or key.
        what: &'static str,
        /// The setting that names it.
        setting: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: pem::Error,
    },
    /// They are of no use together.
    #[error(
        "the certificate in {} cannot be served with the key in {}; do they belong together? {source}",
        files.certificate.display(), files.key.display()
    )]
    Unusable {
        /// Which.
        files: TlsFiles,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed =
        |source| TlsError::Pem { what: "certificate", setting: "certificate", path: path.to_owned(), source };
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<_, _>>).map_err(failed)?;
    if found.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(found) }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// When the files were last written.
type Written = [Option<SystemTime>; 2];

/// The server's side. Files that change are read again, so that a renewed certificate needs no restart.
#[derive(Debug)]
pub(crate) struct Identity {
    files: TlsFiles,
    current: Mutex<(Written, Arc<ServerConfig>)>,
}

impl Identity {
    pub(crate) fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let current = Mutex::new((written(&files), configuration(&files)?));
        Ok(Self { files, current })
    }

    /// For the next connection.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let now = written(&self.files);
        if now != current.0 {
            match configuration(&self.files) {
                Ok(renewed) => {
                    tracing::info!(certificate = %self.files.certificate.display(), "the streaming server has a new certificate");
                    current.1 = renewed;
                }
                Err(error) => {
                    tracing::error!(%error, "the streaming server keeps the certificate that it has");
                }
            }
            current.0 = now;
        }
        TlsAcceptor::from(current.1.clone())
    }
}

fn written(files: &TlsFiles) -> Written {
    [&files.certificate, &files.key].map(|path| fs::metadata(path).and_then(|file| file.modified()).ok())
}

fn configuration(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::Pem {
        what: "key",
        setting: "key",
        path: files.key.clone(),
        source,
    })?;
    let configured = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key));
    let mut configured = configured.map_err(|source| TlsError::Unusable { files: files.clone(), source })?;
    configured.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(configured))
}

/// The one certificate that a client accepts.
#[derive(Debug, Clone)]
pub struct Pinned(CertificateDer<'static>);

impl Pinned {
    /// The first certificate in a PEM file.
    pub fn read(path: &Path) -> Result<Self, TlsError> {
        Ok(Self(certificates(path)?.swap_remove(0)))
    }

    pub(crate) fn connector(&self) -> io::Result<TlsConnector> {
        let provider = provider();
        let verifier = Arc::new(Verifier { pinned: self.0.clone(), provider: provider.clone() });
        let configured = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Ok(TlsConnector::from(Arc::new(configured)))
    }
}

/// Accepts one certificate; that the server has its key is verified as always.
#[derive(Debug)]
struct Verifier {
    pinned: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.pinned {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::InvalidCertificate(rustls::CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
