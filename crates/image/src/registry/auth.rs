//! Challenges and tokens (distribution-spec, "Token Authentication").

use a3s_box_core::foreign;
use http_auth::ChallengeRef;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::endpoint::Endpoint;
use super::error::RegistryError;
use crate::auth::RegistryAuth;
use crate::hosts::Scheme;

const TOKEN_BODY: u64 = 1 << 20;

/// What requests carry in `Authorization`.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Token {
    Basic(HeaderValue),
    Bearer(HeaderValue),
}

impl Token {
    /// The token that needs no challenge, if there is one.
    pub(super) fn ready(auth: &RegistryAuth) -> Option<Self> {
        if auth.registry_token.is_empty() { None } else { bearer(&auth.registry_token) }
    }

    pub(super) fn header(&self) -> HeaderValue {
        match self {
            Self::Basic(value) | Self::Bearer(value) => value.clone(),
        }
    }

    /// For messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Basic(_) => "user name and password",
            Self::Bearer(_) => "a token",
        }
    }
}

fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn bearer(token: &str) -> Option<Token> {
    secret(&format!("Bearer {token}")).map(Token::Bearer)
}

fn basic(user: &str, password: &str) -> Option<HeaderValue> {
    secret(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
}

/// How a registry wants to be authenticated to.
pub(super) enum Challenge {
    Basic,
    Bearer { realm: Url, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// Reads `WWW-Authenticate`; bearer is preferred where both are offered.
    pub(super) fn read(headers: &HeaderMap) -> Result<Self, &'static str> {
        let mut found = None;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let Ok(text) = value.to_str() else { continue };
            let Ok(challenges) = http_auth::parse_challenges(text) else { continue };
            for challenge in challenges {
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    return Self::bearer(&challenge);
                }
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    found = Some(Self::Basic);
                }
            }
        }
        found.ok_or("its WWW-Authenticate names neither Bearer nor Basic")
    }

    fn bearer(challenge: &ChallengeRef<'_>) -> Result<Self, &'static str> {
        let parameter = |name: &str| {
            let value = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            value.map(|(_, value)| value.to_unescaped())
        };
        let realm = parameter("realm").ok_or("its challenge names no realm")?;
        let realm = Url::parse(&realm).map_err(|_| "the realm of its challenge is no URL")?;
        Ok(Self::Bearer { realm, service: parameter("service"), scope: parameter("scope") })
    }
}

/// Two names for the same, of which a service may leave out one, or leave it empty.
#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenDocument {
    #[serde(deserialize_with = "foreign::or_default")]
    token: String,
    #[serde(deserialize_with = "foreign::or_default")]
    access_token: String,
}

impl Endpoint {
    /// Turns a challenge into a token.
    pub(super) async fn answer(&self, challenge: Challenge, what: &str) -> Result<Token, RegistryError> {
        let denied = |presented| RegistryError::Denied {
            host: self.host.origin(),
            what: what.to_owned(),
            presented,
            detail: String::new(),
        };
        let login = self.credentials.as_ref().and_then(RegistryAuth::basic);
        match challenge {
            Challenge::Basic => {
                let (user, password) = login.ok_or_else(|| denied("no credentials"))?;
                let value =
                    basic(&user, &password).ok_or_else(|| denied("credentials that no header can hold"))?;
                Ok(Token::Basic(value))
            }
            Challenge::Bearer { realm, service, scope } => {
                let refresh = self
                    .credentials
                    .as_ref()
                    .map(|auth| auth.identity_token.clone())
                    .filter(|token| !token.is_empty());
                let insecure = self.host.scheme == Scheme::Https && realm.scheme() != "https";
                if insecure && (login.is_some() || refresh.is_some()) {
                    let problem = "its token service would get the credentials without encryption";
                    return Err(RegistryError::Challenge { host: self.host.origin(), problem });
                }
                let request = self.token_request(realm, service, scope, login, refresh);
                self.fetch_token(request, what).await
            }
        }
    }

    /// Turns the challenge of a host that a redirect led to into a token that anybody would get. `presented` is for
    /// the message of one that wants more.
    pub(super) async fn answer_anonymously(
        &self,
        challenge: Challenge,
        origin: &str,
        what: &str,
        presented: &'static str,
    ) -> Result<Token, RegistryError> {
        match challenge {
            Challenge::Basic => Err(RegistryError::Denied {
                host: origin.to_owned(),
                what: what.to_owned(),
                presented,
                detail: String::new(),
            }),
            Challenge::Bearer { realm, service, scope } => {
                let request = self.token_request(realm, service, scope, None, None);
                self.fetch_token(request, what).await
            }
        }
    }

    /// With a refresh token, OAuth2's POST; otherwise a GET, with or without a login.
    fn token_request(
        &self,
        mut realm: Url,
        service: Option<String>,
        scope: Option<String>,
        login: Option<(String, String)>,
        refresh: Option<String>,
    ) -> TokenRequest {
        let host = realm.origin().ascii_serialization();
        // The challenge to a push's first look, which only reads, asks for less than the push needs.
        let scope = scope.filter(|_| !self.scope.ends_with(",push")).unwrap_or_else(|| self.scope.clone());
        let mut fields = vec![("scope", scope)];
        fields.extend(service.map(|service| ("service", service)));
        if let Some(refresh) = refresh {
            fields.extend([
                ("grant_type", "refresh_token".to_owned()),
                ("client_id", "a3s-box".to_owned()),
                ("refresh_token", refresh),
            ]);
            let mut form = Url::parse("form:").unwrap_or(realm.clone());
            form.query_pairs_mut().extend_pairs(&fields);
            let request = self
                .client
                .post(realm)
                .header("content-type", "application/x-www-form-urlencoded")
                .body(form.query().unwrap_or_default().to_owned());
            return TokenRequest { request, host, presented: "an identity token" };
        }
        if let Some((user, _)) = &login {
            fields.push(("account", user.clone()));
        }
        realm.query_pairs_mut().extend_pairs(&fields);
        let mut request = self.client.get(realm);
        let mut presented = "no credentials";
        if let Some(value) = login.and_then(|(user, password)| basic(&user, &password)) {
            request = request.header(AUTHORIZATION, value);
            presented = "user name and password";
        }
        TokenRequest { request, host, presented }
    }

    async fn fetch_token(&self, request: TokenRequest, what: &str) -> Result<Token, RegistryError> {
        let TokenRequest { request, host, presented } = request;
        let what = format!("a token for {what}");
        let response = self.send(request, &host, &what).await?;
        let status = response.status();
        let denied =
            matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST);
        if denied {
            return Err(RegistryError::Denied { host, what, presented, detail: String::new() });
        }
        if !status.is_success() {
            return Err(RegistryError::Status { host, what, status: status.as_u16(), detail: String::new() });
        }
        let body = self.body(response, &host, &what, TOKEN_BODY, &|_| false).await?;
        let document: Option<TokenDocument> = serde_json::from_slice(&body).ok();
        document
            .and_then(|TokenDocument { token, access_token }| {
                [token, access_token].into_iter().find(|token| !token.is_empty())
            })
            .and_then(|token| bearer(&token))
            .ok_or(RegistryError::Challenge { host, problem: "its token service gave no token" })
    }
}

struct TokenRequest {
    request: reqwest::RequestBuilder,
    host: String,
    presented: &'static str,
}
