//! One host of a repository: requests with redirects, authentication and retries.
//!
//! Only the host itself, home, gets the credentials of the pull and the headers of hosts.toml, and only its challenges
//! are answered with them. A redirect leads to strangers: whoever can make a registry redirect can name any host. A
//! stranger's challenge to a manifest is answered with a token that anybody gets, which goes to that stranger only
//! (a registry's name may be a mere redirect to another registry). A blob's stranger is mostly a store behind signed
//! addresses; it gets the request without anything, or such a token that was fetched for its manifests.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use reqwest::header::{
    ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Response, StatusCode, Url};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::auth::{Challenge, Token};
use super::error::{RegistryError, innermost, printable};
use crate::auth::RegistryAuth;
use crate::config::{Retries, Timeouts};
use crate::digest::Digest;
use crate::hosts::Host;

const MAX_REDIRECTS: usize = 10;
/// How much of an error's body is read.
const ERROR_BODY: u64 = 16 << 10;

/// A host with its client and what it asked to be authenticated with.
pub(super) struct Endpoint {
    pub(super) host: Host,
    pub(super) client: reqwest::Client,
    /// Access to this repository, for challenges that do not say to what.
    pub(super) scope: String,
    pub(super) credentials: Option<RegistryAuth>,
    /// What the last challenge led to; requests carry it from then on.
    pub(super) token: Mutex<Option<Token>>,
    /// Anonymous tokens of hosts that redirects led to, by their origin.
    elsewhere: Mutex<HashMap<String, Token>>,
    pub(super) headers: HeaderMap,
    pub(super) timeouts: Timeouts,
    retries: Retries,
}

/// A request.
pub(super) struct Want<'a> {
    /// The object, for messages.
    pub(super) what: &'a str,
    /// Below the API's root, without a leading slash.
    pub(super) path: &'a str,
    pub(super) accept: &'static str,
    /// From which byte on.
    pub(super) offset: u64,
    /// Whether a host that a redirect leads to may be asked for an anonymous token.
    pub(super) anonymous_elsewhere: bool,
}

/// The response at the end of a chain of redirects.
struct Landed {
    response: Response,
    /// Who gave it.
    origin: String,
    /// Whether that is the host itself.
    home: bool,
    /// What its last request carried.
    token: Option<Token>,
}

/// A small document as it came.
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    pub(super) headers: HeaderMap,
    /// The origin that served it, for messages.
    pub(super) host: String,
}

/// What to do about a response.
pub(super) enum Verdict {
    Take(Response),
    /// After such a pause.
    Again(Duration),
    Fail(RegistryError),
}

impl Endpoint {
    pub(super) fn new(
        host: Host,
        client: reqwest::Client,
        repository: &str,
        credentials: Option<RegistryAuth>,
        timeouts: Timeouts,
        retries: Retries,
    ) -> Self {
        let mut headers = HeaderMap::new();
        for (name, value) in &host.headers {
            match (HeaderName::try_from(name.as_str()), HeaderValue::try_from(value.as_str())) {
                (Ok(name), Ok(value)) => {
                    headers.append(name, value);
                }
                (Ok(_) | Err(_), _) => {
                    tracing::warn!(host = %host.authority, %name, "a header of hosts.toml cannot be sent");
                }
            }
        }
        // A registry token needs no challenge.
        let token = credentials.as_ref().and_then(Token::ready);
        let scope = format!("repository:{repository}:pull");
        let (token, elsewhere) = (Mutex::new(token), Mutex::default());
        Self { host, client, scope, credentials, token, elsewhere, headers, timeouts, retries }
    }

    pub(super) fn can(&self, capability: &str) -> bool {
        if capability == "resolve" { self.host.resolve } else { self.host.pull }
    }

    /// Sends a GET until it succeeds or fails for good. Returns the response and the origin that
    /// gave it, for messages.
    pub(super) async fn get(&self, want: &Want<'_>) -> Result<(Response, String), RegistryError> {
        // One challenge of home and one of a host that it redirects to.
        let (mut challenged, mut challenged_elsewhere) = (false, false);
        let mut attempt = 0;
        loop {
            let landed = self.follow(want).await?;
            if landed.response.status() == StatusCode::UNAUTHORIZED {
                if landed.home && !challenged {
                    challenged = true;
                    self.authenticate(&landed.response, want.what, landed.token.as_ref()).await?;
                    continue;
                }
                if !landed.home && !challenged_elsewhere && self.may_answer(want, &landed.origin).await {
                    challenged_elsewhere = true;
                    self.authenticate_elsewhere(&landed, want.what).await?;
                    continue;
                }
            }
            let presented = self.presented(&landed);
            let Landed { response, origin, .. } = landed;
            match self.judge(response, want.what, &origin, attempt, presented).await {
                Verdict::Take(response) => return Ok((response, origin)),
                Verdict::Fail(error) => return Err(error),
                Verdict::Again(pause) => tokio::time::sleep(pause).await,
            }
            attempt += 1;
        }
    }

    /// For messages.
    fn presented(&self, landed: &Landed) -> &'static str {
        match &landed.token {
            None if !landed.home && self.credentials.is_some() => {
                "no credentials (those of a registry do not follow its redirects)"
            }
            None => "no credentials",
            Some(_) if !landed.home => "an anonymous token",
            Some(token) => token.kind(),
        }
    }

    /// Whether a stranger's challenge is answered: for what it is asked, or because it had a token before.
    async fn may_answer(&self, want: &Want<'_>, origin: &str) -> bool {
        want.anonymous_elsewhere || self.elsewhere.lock().await.contains_key(origin)
    }

    /// Fetches a document of at most `limit` bytes, again where the connection breaks, unless it has the digest that
    /// is expected of it, or else announced, by then.
    pub(super) async fn document(
        &self,
        want: &Want<'_>,
        limit: u64,
        expected: Option<&Digest>,
    ) -> Result<Answer, RegistryError> {
        let mut attempt = 0;
        loop {
            let (response, host) = self.get(want).await?;
            let headers = response.headers().clone();
            let announced = announced(&headers);
            let expected = expected.or(announced.as_ref());
            let whole = |bytes: &[u8]| expected.is_some_and(|digest| digest.matches(bytes));
            match self.body(response, &host, want.what, limit, &whole).await {
                Ok(bytes) => return Ok(Answer { bytes, headers, host }),
                Err(RegistryError::Broken { .. }) if attempt < self.retries.attempts => {
                    tokio::time::sleep(self.pause(attempt)).await;
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The pause before a further attempt, doubled each time.
    fn pause(&self, attempt: u32) -> Duration {
        self.retries.pause.saturating_mul(1 << attempt.min(16)).min(self.retries.longest_pause)
    }

    /// Answers a challenge, unless another request just did.
    pub(super) async fn authenticate(
        &self,
        response: &Response,
        what: &str,
        used: Option<&Token>,
    ) -> Result<(), RegistryError> {
        let mut token = self.token.lock().await;
        if token.as_ref() != used {
            return Ok(());
        }
        let origin = self.host.origin();
        let challenge = Challenge::read(response.headers())
            .map_err(|problem| RegistryError::Challenge { host: origin, problem })?;
        *token = Some(self.answer(challenge, what).await?);
        Ok(())
    }

    /// Answers the challenge of a host that a redirect led to, with nothing that belongs to the caller.
    async fn authenticate_elsewhere(&self, landed: &Landed, what: &str) -> Result<(), RegistryError> {
        let mut tokens = self.elsewhere.lock().await;
        if tokens.get(&landed.origin) != landed.token.as_ref() {
            return Ok(());
        }
        let challenge = Challenge::read(landed.response.headers())
            .map_err(|problem| RegistryError::Challenge { host: landed.origin.clone(), problem })?;
        let token = self.answer_anonymously(challenge, &landed.origin, what, self.presented(landed)).await?;
        tokens.insert(landed.origin.clone(), token);
        Ok(())
    }

    /// Sends the request and follows redirects. Credentials and configured headers go to this
    /// host only, an anonymous token only to the host that it was fetched for.
    async fn follow(&self, want: &Want<'_>) -> Result<Landed, RegistryError> {
        let origin = self.host.origin();
        let redirect = |problem| RegistryError::Redirect {
            host: self.host.origin(),
            what: want.what.to_owned(),
            problem,
        };
        let mut url = Url::parse(&format!("{origin}{}/{}", self.host.path, want.path))
            .map_err(|_| redirect("to no URL: the host in hosts.toml is malformed"))?;
        if let Some(namespace) = &self.host.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let start = url.origin();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.client.get(url.clone()).header(ACCEPT, want.accept);
            if want.offset > 0 {
                request = request.header(RANGE, format!("bytes={}-", want.offset));
            }
            let home = url.origin() == start;
            let origin = url.origin().ascii_serialization();
            let token = match home {
                true => self.token.lock().await.clone(),
                false => self.elsewhere.lock().await.get(&origin).cloned(),
            };
            if home {
                request = request.headers(self.headers.clone());
            }
            if let Some(token) = &token {
                request = request.header(AUTHORIZATION, token.header());
            }
            let response = self.send(request, &origin, want.what).await?;
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok(Landed { response, origin, home, token });
            }
            let next = response
                .headers()
                .get(LOCATION)
                .and_then(|location| url.join(location.to_str().ok()?).ok())
                .ok_or_else(|| redirect("without saying where to"))?;
            if url.scheme() == "https" && next.scheme() != "https" {
                return Err(redirect("from https to an insecure address"));
            }
            url = next;
        }
        Err(redirect("more often than is followed"))
    }

    /// Sends one request and waits for the headers of its response.
    pub(super) async fn send(
        &self,
        request: reqwest::RequestBuilder,
        host: &str,
        what: &str,
    ) -> Result<Response, RegistryError> {
        self.send_body(request, host, what, 0).await
    }

    /// The same for a request with a body, which gets the time that its length takes at the slowest rate.
    pub(super) async fn send_body(
        &self,
        request: reqwest::RequestBuilder,
        host: &str,
        what: &str,
        length: u64,
    ) -> Result<Response, RegistryError> {
        let timed_out = |step, limit| RegistryError::Timeout {
            host: host.to_owned(),
            what: what.to_owned(),
            step,
            limit,
        };
        let connect = self.host.connect_timeout.unwrap_or(self.timeouts.connect);
        let sending = Duration::from_secs(length / self.timeouts.slowest.max(1));
        let limit = connect + self.timeouts.headers + sending;
        match timeout(limit, request.send()).await {
            Err(_) => Err(timed_out("answer the request", limit)),
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if error.is_timeout() => Err(timed_out("accept a connection", connect)),
            Ok(Err(error)) => Err(RegistryError::Connect {
                host: host.to_owned(),
                what: what.to_owned(),
                detail: innermost(&error.without_url()),
            }),
        }
    }

    pub(super) async fn judge(
        &self,
        response: Response,
        what: &str,
        host: &str,
        attempt: u32,
        presented: &'static str,
    ) -> Verdict {
        let status = response.status();
        if status.is_success() {
            return Verdict::Take(response);
        }
        let temporary = matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504);
        let pause = retry_after(&response, SystemTime::now()).unwrap_or_else(|| self.pause(attempt));
        // A registry that asks for a longer pause than we make is left to the caller's next try.
        if temporary && attempt < self.retries.attempts && pause <= self.retries.longest_pause {
            tracing::debug!(%status, ?pause, "{host} asks to try {what} again");
            return Verdict::Again(pause);
        }
        // The body of this one may be announced with the length of the blob and never come.
        let mut detail = match status {
            StatusCode::RANGE_NOT_SATISFIABLE => String::new(),
            _ => error_detail(
                self.body(response, host, what, ERROR_BODY, &|_| false).await.unwrap_or_default(),
            ),
        };
        if status == StatusCode::TOO_MANY_REQUESTS {
            detail =
                format!("too many requests, next try in {} s {detail}", pause.as_secs()).trim().to_owned();
        }
        let (host, what) = (host.to_owned(), what.to_owned());
        Verdict::Fail(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                RegistryError::Denied { host, what, presented, detail }
            }
            _ => RegistryError::Status { host, what, status: status.as_u16(), detail },
        })
    }

    /// Reads a body of at most `limit` bytes. One that is `whole` when the connection breaks is taken.
    pub(super) async fn body(
        &self,
        mut response: Response,
        host: &str,
        what: &str,
        limit: u64,
        whole: &(dyn Fn(&[u8]) -> bool + Sync),
    ) -> Result<Vec<u8>, RegistryError> {
        let (owned, named) = (|| host.to_owned(), || what.to_owned());
        let too_large = || RegistryError::TooLarge { host: owned(), what: named(), limit };
        if response.content_length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let allowed = self.timeouts.idle + Duration::from_secs(limit / self.timeouts.slowest.max(1));
        let mut bytes = Vec::new();
        let read = async {
            loop {
                match timeout(self.timeouts.idle, response.chunk()).await {
                    Err(_) => {
                        let limit = self.timeouts.idle;
                        return Err(RegistryError::Timeout {
                            host: owned(),
                            what: named(),
                            step: "go on sending",
                            limit,
                        });
                    }
                    Ok(Err(_)) if whole(&bytes) => return Ok(bytes),
                    Ok(Err(error)) => {
                        let (got, detail) = (bytes.len() as u64, innermost(&error.without_url()));
                        return Err(RegistryError::Broken { host: owned(), what: named(), got, detail });
                    }
                    Ok(Ok(None)) => return Ok(bytes),
                    Ok(Ok(Some(chunk))) => bytes.extend_from_slice(&chunk),
                }
                if bytes.len() as u64 > limit {
                    return Err(too_large());
                }
            }
        };
        match timeout(allowed, read).await {
            Ok(result) => result,
            Err(_) => Err(RegistryError::Timeout {
                host: owned(),
                what: named(),
                step: "finish sending",
                limit: allowed,
            }),
        }
    }
}

/// The digest that a registry gives a manifest.
pub(super) fn announced(headers: &HeaderMap) -> Option<Digest> {
    headers.get("docker-content-digest").and_then(|value| value.to_str().ok()?.parse().ok())
}

/// The pause that a response asks for: seconds, or a date.
fn retry_after(response: &Response, now: SystemTime) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// The codes and messages of a registry's error document.
fn error_detail(body: Vec<u8>) -> String {
    let Ok(document) = serde_json::from_slice::<serde_json::Value>(&body) else { return String::new() };
    let errors = document["errors"].as_array().map_or(&[][..], Vec::as_slice);
    let told = errors.iter().take(3).map(|error| {
        let text = |key: &str| error[key].as_str().unwrap_or_default();
        printable(&format!("{}: {}", text("code"), text("message")))
    });
    told.collect::<Vec<_>>().join(", ")
}
