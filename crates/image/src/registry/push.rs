//! Uploads (OCI distribution-spec, "Push"): blobs in one piece each, then the manifest.
//!
//! Only the registry itself is written to, never a mirror. Credentials go to it alone: a registry may send uploads
//! elsewhere.

use std::io;

use bytes::Bytes;
use futures::stream;
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Body, Method, Response, StatusCode, Url};
use tokio::io::AsyncReadExt;

use super::endpoint::{Endpoint, Verdict};
use super::error::RegistryError;
use super::{Refused, Repository};
use crate::local::FileRange;
use crate::manifest::Descriptor;

const CHUNK: u64 = 256 << 10;

/// One request of an upload.
struct Upload<'a> {
    what: &'a str,
    method: Method,
    url: Url,
    kind: &'static str,
    content: Content<'a>,
}

/// What it carries.
#[derive(Clone, Copy)]
enum Content<'a> {
    Nothing,
    Bytes(&'a [u8]),
    File(&'a FileRange),
}

impl Content<'_> {
    fn length(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(range) => range.length,
        }
    }

    fn body(&self) -> io::Result<Body> {
        match self {
            Self::Nothing => Ok(Body::from("")),
            Self::Bytes(bytes) => Ok(Body::from(bytes.to_vec())),
            Self::File(range) => {
                let file = tokio::fs::File::from_std(range.open()?.into_inner());
                let parts = stream::try_unfold((file, range.length), |(mut file, left)| async move {
                    if left == 0 {
                        return Ok(None);
                    }
                    let mut part = vec![0; left.min(CHUNK) as usize];
                    let count = file.read(&mut part).await?;
                    if count == 0 {
                        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
                    }
                    part.truncate(count);
                    Ok(Some((Bytes::from(part), (file, left - count as u64))))
                });
                Ok(Body::wrap_stream(parts))
            }
        }
    }
}

impl Repository {
    /// The registry itself, as it is to be spoken to, with access to write.
    pub(crate) async fn into_destination(self) -> Result<Destination, RegistryError> {
        let what = format!("a push to {}", self.path);
        let mut refused = Refused::default();
        for mut endpoint in self.endpoints.into_iter().filter(|endpoint| endpoint.host.namespace.is_none()) {
            if refused.settles(&endpoint) {
                continue;
            }
            endpoint.scope = format!("repository:{}:pull,push", self.path);
            let origin = endpoint.host.origin();
            let ping = endpoint.client.get(format!("{origin}{}/", endpoint.host.path));
            match endpoint.send(ping, &origin, &what).await {
                // A TLS server answers 400 to plain HTTP.
                Ok(response) if response.status() == StatusCode::BAD_REQUEST => {
                    let (host, what) = (origin, what.clone());
                    refused.by(RegistryError::Status { host, what, status: 400, detail: String::new() });
                }
                Ok(_) => return Ok(Destination { endpoint, path: self.path }),
                Err(error) => refused.by(error),
            }
        }
        Err(refused.error(&what, "push"))
    }
}

/// A repository that is pushed to.
pub(crate) struct Destination {
    endpoint: Endpoint,
    path: String,
}

impl Destination {
    /// Uploads a blob, unless the repository has it.
    pub(crate) async fn blob(&self, blob: &Descriptor, content: &FileRange) -> Result<(), RegistryError> {
        let what = format!("the upload of blob {}", blob.digest);
        let request = |method, url, content| Upload {
            what: &what,
            method,
            url,
            kind: "application/octet-stream",
            content,
        };
        let url = self.url(&format!("blobs/{}", blob.digest), &what)?;
        match self.request(&request(Method::HEAD, url, Content::Nothing)).await {
            Ok(_) => return Ok(()),
            Err(RegistryError::Status { status: 404, .. }) => {}
            Err(error) => return Err(error),
        }
        let url = self.url("blobs/uploads/", &what)?;
        let begun = self.request(&request(Method::POST, url.clone(), Content::Nothing)).await?;
        let location = begun.headers().get(LOCATION).and_then(|to| url.join(to.to_str().ok()?).ok());
        let mut target = location.ok_or_else(|| self.redirect(&what, "without saying where to"))?;
        if url.scheme() == "https" && target.scheme() != "https" {
            return Err(self.redirect(&what, "from https to an insecure address"));
        }
        target.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        self.request(&request(Method::PUT, target, Content::File(content))).await.map(drop)
    }

    /// Uploads the manifest, whose blobs are there, under a tag.
    pub(crate) async fn manifest(
        &self,
        tag: &str,
        kind: &'static str,
        bytes: &[u8],
    ) -> Result<(), RegistryError> {
        let what = format!("the upload of the manifest of tag {tag}");
        let url = self.url(&format!("manifests/{tag}"), &what)?;
        let content = Content::Bytes(bytes);
        self.request(&Upload { what: &what, method: Method::PUT, url, kind, content }).await.map(drop)
    }

    fn url(&self, tail: &str, what: &str) -> Result<Url, RegistryError> {
        let host = &self.endpoint.host;
        Url::parse(&format!("{}{}/{}/{tail}", host.origin(), host.path, self.path))
            .map_err(|_| self.redirect(what, "to no URL: the host in hosts.toml is malformed"))
    }

    fn redirect(&self, what: &str, problem: &'static str) -> RegistryError {
        RegistryError::Redirect { host: self.endpoint.host.origin(), what: what.to_owned(), problem }
    }

    /// Sends until it succeeds or fails for good.
    async fn request(&self, upload: &Upload<'_>) -> Result<Response, RegistryError> {
        let endpoint = &self.endpoint;
        let what = upload.what;
        let host = upload.url.origin().ascii_serialization();
        let home = host == endpoint.host.origin()
            || Url::parse(&endpoint.host.origin()).is_ok_and(|home| home.origin() == upload.url.origin());
        let (mut challenged, mut attempt) = (false, 0);
        loop {
            let token = endpoint.token.lock().await.clone().filter(|_| home);
            let body = upload.content.body().map_err(|error| RegistryError::Connect {
                host: host.clone(),
                what: what.to_owned(),
                detail: format!("the file could not be read: {error}"),
            })?;
            let mut request = endpoint.client.request(upload.method.clone(), upload.url.clone());
            if home {
                request = request.headers(endpoint.headers.clone());
            }
            if upload.method != Method::HEAD {
                request = request
                    .header(CONTENT_TYPE, upload.kind)
                    .header(CONTENT_LENGTH, upload.content.length())
                    .body(body);
            }
            if let Some(token) = &token {
                request = request.header(AUTHORIZATION, token.header());
            }
            let response = endpoint.send_body(request, &host, what, upload.content.length()).await?;
            if response.status() == StatusCode::UNAUTHORIZED && home && !challenged {
                challenged = true;
                endpoint.authenticate(&response, what, token.as_ref()).await?;
                continue;
            }
            let presented = token.as_ref().map_or("no credentials", super::auth::Token::kind);
            match endpoint.judge(response, what, &host, attempt, presented).await {
                Verdict::Take(response) => return Ok(response),
                Verdict::Fail(error) => return Err(error),
                Verdict::Again(pause) => tokio::time::sleep(pause).await,
            }
            attempt += 1;
        }
    }
}
