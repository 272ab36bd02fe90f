//! What a pod's annotations limit its traffic to.
//!
//! The annotations, their form (a Kubernetes quantity, in bits per second) and their bounds are those that kubelet
//! defined for its plugins; every runtime reads them the same way.

use std::collections::BTreeMap;

use thiserror::Error;

/// Limits what the pod receives.
pub const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// Limits what the pod sends.
pub const EGRESS: &str = "kubernetes.io/egress-bandwidth";

const LEAST: u64 = 1_000;
const MOST: u64 = 1_000_000_000_000_000;

/// Limits in bits per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Into the pod.
    pub ingress: Option<u64>,
    /// Out of the pod.
    pub egress: Option<u64>,
}

/// An annotation that says no bandwidth.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{value:?} is not a bandwidth in bits per second from 1k to 1P, such as \"10M\" or \"512Ki\"")]
pub struct BadBandwidth {
    /// Which.
    pub annotation: &'static str,
    /// Its beginning.
    pub value: String,
}

impl Bandwidth {
    /// Reads a pod's annotations.
    pub fn of(annotations: &BTreeMap<String, String>) -> Result<Self, BadBandwidth> {
        let limit = |annotation: &'static str| {
            let Some(text) = annotations.get(annotation) else { return Ok(None) };
            let value = quantity(text).filter(|value| (LEAST..=MOST).contains(value));
            let bad = || BadBandwidth { annotation, value: text.chars().take(40).collect() };
            value.map(Some).ok_or_else(bad)
        };
        Ok(Self { ingress: limit(INGRESS)?, egress: limit(EGRESS)? })
    }
}

/// A quantity as Kubernetes writes them, rounded up to a whole number; `None` as well for what is beyond any use.
fn quantity(text: &str) -> Option<u64> {
    const DIGITS: usize = 18;
    let text = text.strip_prefix('+').unwrap_or(text);
    let number = &text[..text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len())];
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || digits.len() > DIGITS {
        return None;
    }
    let mantissa: u128 = digits.parse().ok()?;
    let (ten, two) = suffix(&text[number.len()..])?;
    let ten = ten - i32::try_from(fraction.len()).ok()?;
    let power = 10_u128.checked_pow(ten.unsigned_abs())?;
    let scaled = mantissa.checked_mul(1 << two)?;
    u64::try_from(if ten < 0 { scaled.div_ceil(power) } else { scaled.checked_mul(power)? }).ok()
}

/// The powers of ten and of two that a suffix stands for.
fn suffix(text: &str) -> Option<(i32, u32)> {
    Some(match text {
        "n" => (-9, 0),
        "u" => (-6, 0),
        "m" => (-3, 0),
        "" => (0, 0),
        "k" => (3, 0),
        "M" => (6, 0),
        "G" => (9, 0),
        "T" => (12, 0),
        "P" => (15, 0),
        "E" => (18, 0),
        "Ki" => (0, 10),
        "Mi" => (0, 20),
        "Gi" => (0, 30),
        "Ti" => (0, 40),
        "Pi" => (0, 50),
        "Ei" => (0, 60),
        exponent => (exponent.strip_prefix(['e', 'E'])?.parse::<i8>().ok()?.into(), 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<u64>, BadBandwidth> {
        Bandwidth::of(&BTreeMap::from([(INGRESS.to_owned(), text.to_owned())])).map(|limits| limits.ingress)
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, bits) in [
            ("10M", 10_000_000),
            ("1k", 1_000),
            ("1P", MOST),
            ("1Mi", 1 << 20),
            ("1.5Ki", 1536),
            (".5M", 500_000),
            ("5.M", 5_000_000),
            ("+2G", 2_000_000_000),
            ("1e6", 1_000_000),
            ("12E3", 12_000),
            ("2500000m", 2_500),
            ("1000.0001", 1_001),
        ] {
            assert_eq!(read(text), Ok(Some(bits)), "{text}");
        }
        assert_eq!(Bandwidth::of(&BTreeMap::new()), Ok(Bandwidth::default()));
    }

    #[test]
    fn what_is_no_bandwidth_is_refused_by_its_annotation() {
        for text in [
            "",
            "M",
            ".",
            "-5M",
            "10 M",
            "10Mb",
            "10MB",
            "ten",
            "1.2.3M",
            "999",
            "2P",
            "1E",
            "16Ei",
            "1e99",
            "1e-99",
            "9999999999999999999",
            "0",
            "1e",
            "10M\n",
        ] {
            let error = read(text).unwrap_err();
            assert_eq!((error.annotation, error.value.as_str()), (INGRESS, text));
        }
        let egress = Bandwidth::of(&BTreeMap::from([(EGRESS.to_owned(), "fast".to_owned())]));
        assert_eq!(egress.unwrap_err().annotation, EGRESS);
    }
}
