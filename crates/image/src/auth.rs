//! What a caller may present to a registry.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Credentials of one pull, with the fields of CRI's `AuthConfig`. Empty fields are absent.
/// Its `Debug` shows none of them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RegistryAuth {
    /// User name for basic authentication or a token request.
    pub username: String,
    /// Password for basic authentication or a token request.
    pub password: String,
    /// `username:password` in base64, as docker's `config.json` has it; read when `username` is empty.
    pub auth: String,
    /// The registry these credentials are for (a host or a URL). They are sent to no other one;
    /// empty means any.
    pub server_address: String,
    /// An OAuth2 refresh token, exchanged for an access token at the registry's token service.
    pub identity_token: String,
    /// A bearer token sent to the registry as it is.
    pub registry_token: String,
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegistryAuth(..)")
    }
}

impl RegistryAuth {
    /// User name and password, from their fields or from `auth`. `None` when there is neither
    /// or `auth` is no `user:password` in base64.
    pub(crate) fn basic(&self) -> Option<(String, String)> {
        if !self.username.is_empty() {
            return Some((self.username.clone(), self.password.clone()));
        }
        let decoded = STANDARD.decode(self.auth.trim()).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (user, password) = text.split_once(':')?;
        // Some tools pad the decoded text with NULs.
        Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
    }

    /// Whether these credentials may be sent to the registry `host` (`HOST[:PORT]`).
    pub(crate) fn is_for(&self, host: &str) -> bool {
        let address = self.server_address.trim();
        if address.is_empty() {
            return true;
        }
        let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
        let named = rest.split('/').next().unwrap_or(rest);
        // Docker Hub's historical address in config files is index.docker.io.
        let canonical = |h: &str| match h {
            "index.docker.io" | "docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
            other => other.to_ascii_lowercase(),
        };
        canonical(named) == canonical(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_holds_no_secret() {
        let auth =
            RegistryAuth { username: "alice".into(), password: "hunter2".into(), ..RegistryAuth::default() };
        let shown = format!("{auth:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("alice"));
    }

    #[test]
    fn base64_auth_is_split_at_the_first_colon() {
        let auth = RegistryAuth { auth: STANDARD.encode("bob:a:b"), ..RegistryAuth::default() };
        assert_eq!(auth.basic(), Some(("bob".into(), "a:b".into())));
        let broken = RegistryAuth { auth: "%%%".into(), ..RegistryAuth::default() };
        assert_eq!(broken.basic(), None);
    }

    #[test]
    fn credentials_for_one_registry_are_not_for_another() {
        let auth =
            RegistryAuth { server_address: "https://index.docker.io/v1/".into(), ..RegistryAuth::default() };
        assert!(auth.is_for("registry-1.docker.io"));
        assert!(!auth.is_for("quay.io"));
        let any = RegistryAuth::default();
        assert!(any.is_for("quay.io"));
    }
}
