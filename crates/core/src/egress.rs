//! Where a pod may open connections to: the annotation `a3s.box/egress`.
//!
//! ```text
//!   none                                nothing
//!   cluster                             the networks of the setting network.cluster_cidrs
//!   10.0.0.0/8, pypi.org, *.debian.org  networks, addresses, names and "cluster", with commas or spaces between
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The pod annotation with an egress policy.
pub const ANNOTATION: &str = "a3s.box/egress";

/// More than this is a mistake, or a matter for a firewall.
const MAX_ENTRIES: usize = 256;

/// Where a pod may open connections to. Without anything in it: nowhere, not even to a name server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressPolicy {
    /// Networks and addresses.
    pub networks: Vec<Cidr>,
    /// Names, reachable at the addresses that the pod's name servers give for them.
    pub names: Vec<NamePattern>,
}

impl EgressPolicy {
    /// Reads an annotation; `cluster` is what that word stands for.
    pub fn parse(text: &str, cluster: &[Cidr]) -> Result<Self, EgressError> {
        let words: Vec<&str> =
            text.split([',', ' ', '\t', '\n', '\r']).filter(|word| !word.is_empty()).collect();
        let mut policy = Self::default();
        match words.as_slice() {
            [] => return Err(EgressError::Empty),
            ["none"] => return Ok(policy),
            words if words.len() > MAX_ENTRIES => return Err(EgressError::TooMany { count: words.len() }),
            words => {
                for word in words {
                    policy.add(word, cluster)?;
                }
            }
        }
        Ok(policy)
    }

    fn add(&mut self, word: &str, cluster: &[Cidr]) -> Result<(), EgressError> {
        match word {
            "none" => return Err(EgressError::NoneAndMore),
            "cluster" if cluster.is_empty() => return Err(EgressError::NoCluster),
            "cluster" => self.networks.extend(cluster),
            word if is_numeric(word) => self.networks.push(word.parse()?),
            word => self.names.push(word.parse()?),
        }
        Ok(())
    }

    /// Whether one of the names is that of these labels, the topmost last.
    pub fn allows_name(&self, labels: &[&[u8]]) -> bool {
        self.names.iter().any(|pattern| pattern.matches(labels))
    }
}

/// An address or network, or meant to be one: no domain of the top level consists of digits.
fn is_numeric(word: &str) -> bool {
    let top = word.rsplit('.').find(|label| !label.is_empty()).unwrap_or(word);
    word.contains([':', '/']) || top.bytes().all(|byte| byte.is_ascii_digit())
}

/// Why an egress policy means nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EgressError {
    /// Nothing is written there.
    #[error("is empty; write none, cluster or a list, or leave it out for a pod that may reach everything")]
    Empty,
    /// More entries than a policy may have.
    #[error("has {count} entries, and {MAX_ENTRIES} is the most; name larger networks")]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// `none` in a list.
    #[error("none stands alone: leave it out of the list, or leave out the rest")]
    NoneAndMore,
    /// The node does not know its cluster's networks.
    #[error(
        "cluster means the networks of the setting network.cluster_cidrs, which is empty on this node: set it"
    )]
    NoCluster,
    /// Not a network.
    #[error("{text:?} is no network: {problem}")]
    Cidr {
        /// As written.
        text: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Not a name.
    #[error("{text:?} is no destination: {problem}")]
    Name {
        /// As written.
        text: String,
        /// What is wrong.
        problem: &'static str,
    },
}

/// A network of either family. Nothing is set behind its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    ip: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// The network of the first `prefix` bits of `ip`.
    pub fn around(ip: IpAddr, prefix: u8) -> Self {
        let prefix = prefix.min(full_length(ip));
        let ip = match ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask))
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask))
            }
        };
        Self { ip, prefix }
    }

    /// The network of one address.
    pub fn host(ip: IpAddr) -> Self {
        Self { ip, prefix: full_length(ip) }
    }

    /// Whether it is an IPv4 network.
    pub fn is_ipv4(&self) -> bool {
        self.ip.is_ipv4()
    }

    /// The length of its prefix in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether all of `other` is in it.
    pub fn contains(&self, other: &Cidr) -> bool {
        self.is_ipv4() == other.is_ipv4()
            && self.prefix <= other.prefix
            && Self::around(other.ip, self.prefix) == *self
    }
}

fn full_length(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

impl FromStr for Cidr {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, EgressError> {
        let bad = |problem| EgressError::Cidr { text: text.to_owned(), problem };
        let (ip, prefix) = match text.split_once('/') {
            Some((ip, prefix)) => (ip, Some(prefix)),
            None => (text, None),
        };
        let ip: IpAddr = ip.parse().map_err(|_| bad("it does not start with an IP address"))?;
        let prefix = match prefix {
            None => full_length(ip),
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                let prefix = digits.parse().ok().filter(|prefix| *prefix <= full_length(ip));
                prefix.ok_or_else(|| bad("the prefix length is not from 0 to 32 (IPv4) or 128 (IPv6)"))?
            }
            Some(_) => return Err(bad("the prefix length is not a number")),
        };
        let network = Self::around(ip, prefix);
        if network.ip != ip {
            return Err(bad("bits are set behind the prefix, so another network may be meant"));
        }
        Ok(network)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl TryFrom<String> for Cidr {
    type Error = EgressError;

    fn try_from(text: String) -> Result<Self, EgressError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

/// `example.com`, or `*.example.com` for all that is below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePattern {
    /// In lower case, without the root's dot.
    name: String,
    below: bool,
}

impl NamePattern {
    /// Label by label, so that a dot inside of one deceives nobody.
    fn matches(&self, labels: &[&[u8]]) -> bool {
        let own = self.name.split('.').count();
        let long_enough = if self.below { labels.len() > own } else { labels.len() == own };
        let end = &labels[labels.len().saturating_sub(own)..];
        long_enough
            && self.name.split('.').zip(end).all(|(ours, label)| ours.as_bytes().eq_ignore_ascii_case(label))
    }
}

impl FromStr for NamePattern {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, EgressError> {
        let bad = |problem| Err(EgressError::Name { text: text.to_owned(), problem });
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let usual = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        let is_label = |label: &str| (1..=63).contains(&label.len()) && label.bytes().all(usual);
        if !text.is_ascii() {
            return bad("write international names in their ASCII form, xn--…");
        }
        if name.contains('*') {
            return bad("a * stands for whole labels and comes first, as in *.example.com");
        }
        if !below && !name.contains('.') {
            return bad("it is not none, cluster, an address, a network or a name with a dot");
        }
        if name.len() > 253 || !name.split('.').all(is_label) {
            return bad("it is not none, cluster, an address, a network or a DNS name");
        }
        Ok(Self { name, below })
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

impl TryFrom<String> for NamePattern {
    type Error = EgressError;

    fn try_from(text: String) -> Result<Self, EgressError> {
        text.parse()
    }
}

impl From<NamePattern> for String {
    fn from(pattern: NamePattern) -> Self {
        pattern.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> Vec<Cidr> {
        vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()]
    }

    fn parse(text: &str) -> Result<EgressPolicy, EgressError> {
        EgressPolicy::parse(text, &cluster())
    }

    fn shown(text: &str) -> Vec<String> {
        let policy = parse(text).unwrap();
        let networks = policy.networks.iter().map(ToString::to_string);
        networks.chain(policy.names.iter().map(ToString::to_string)).collect()
    }

    #[test]
    fn a_policy_is_none_or_a_list_of_networks_addresses_names_and_cluster() {
        assert_eq!(parse("none").unwrap(), EgressPolicy::default());
        assert_eq!(shown("cluster"), ["10.0.0.0/8", "fd00::/8"]);
        assert_eq!(
            shown(" 192.0.2.7,2001:db8::/32 \n PyPI.org., *.Debian.org cluster"),
            ["192.0.2.7/32", "2001:db8::/32", "10.0.0.0/8", "fd00::/8", "pypi.org", "*.debian.org"]
        );
        assert_eq!(shown("0.0.0.0/0 ::/0 _x.a-b.c"), ["0.0.0.0/0", "::/0", "_x.a-b.c"]);
    }

    #[test]
    fn what_means_nothing_is_refused_and_says_what_would() {
        for (text, problem) in [
            ("", "is empty"),
            (" , ", "is empty"),
            ("none, 10.0.0.0/8", "none stands alone"),
            ("clutser", "\"clutser\" is no destination"),
            ("10.0.0.1/8", "bits are set behind the prefix"),
            ("10.0.0.0/33", "the prefix length"),
            ("10.0.0.0/", "the prefix length"),
            ("10.0.0.0/+8", "is not a number"),
            ("10.0.0.256", "does not start with an IP address"),
            ("10.0.0", "does not start with an IP address"),
            ("example.com:443", "does not start with an IP address"),
            ("https://example.com/", "does not start with an IP address"),
            ("*", "a * stands for whole labels"),
            ("a.*.com", "a * stands for whole labels"),
            ("*example.com", "a * stands for whole labels"),
            ("*.", "DNS name"),
            ("a..com", "DNS name"),
            ("bücher.example", "xn--"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(problem), "{text:?}: {error}");
        }
        let many = vec!["192.0.2.1"; MAX_ENTRIES + 1].join(",");
        assert_eq!(parse(&many), Err(EgressError::TooMany { count: MAX_ENTRIES + 1 }));
        let unknown = EgressPolicy::parse("cluster", &[]).unwrap_err();
        assert!(unknown.to_string().contains("network.cluster_cidrs"), "{unknown}");
    }

    #[test]
    fn names_are_compared_label_by_label_and_without_case() {
        let policy = parse("example.com *.example.org").unwrap();
        let allows =
            |labels: &[&str]| policy.allows_name(&labels.iter().map(|l| l.as_bytes()).collect::<Vec<_>>());
        assert!(allows(&["ExAmple", "COM"]));
        assert!(allows(&["a", "example", "org"]) && allows(&["a", "b", "example", "org"]));
        assert!(!allows(&["a", "example", "com"]) && !allows(&["example", "org"]));
        assert!(
            !allows(&["evilexample", "com"])
                && !allows(&["example.com"])
                && !allows(&["com"])
                && !allows(&[])
        );
        assert!(!allows(&["a", "x.example", "org"]), "a dot inside of a label is not the one between two");
    }

    #[test]
    fn networks_contain_what_begins_as_they_do() {
        let net = |text: &str| text.parse::<Cidr>().unwrap();
        assert!(net("10.0.0.0/8").contains(&net("10.1.0.0/16")));
        assert!(net("0.0.0.0/0").contains(&net("255.255.255.255")) && net("::/0").contains(&net("::1")));
        assert!(!net("10.1.0.0/16").contains(&net("10.0.0.0/8")));
        assert!(!net("0.0.0.0/0").contains(&net("::/0")) && !net("::/0").contains(&net("10.0.0.1")));
    }
}
