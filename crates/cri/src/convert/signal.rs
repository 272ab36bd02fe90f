//! Signals by CRI's enum, by the names images use and by number.

use crate::proto::Signal;

const SIGTERM: i32 = 15;

/// Linux' numbers on x86_64 and aarch64, for images that name a signal.
const NAMED: [(&str, i32); 36] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", SIGTERM),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("RTMIN", 34),
    ("RTMAX", 64),
];

/// The signal a session is stopped with: the client's choice, else the image's, else SIGTERM. A word
/// in the image that is no signal counts as none: it must not keep the image from running.
pub fn stop_signal(client: Signal, image: &str) -> i32 {
    number(client).or_else(|| parse(image)).unwrap_or(SIGTERM)
}

/// The number behind CRI's enum; `None` where the client leaves the choice.
pub fn number(signal: Signal) -> Option<i32> {
    signal.as_str_name().strip_prefix("SIGNAL_").and_then(parse)
}

/// CRI's name for a number.
pub fn name(number: i32) -> Signal {
    // Aliases come after the name that people know the number by.
    let preferred = [("IO", 29), ("ABRT", 6), ("CHLD", 17)];
    let known =
        preferred.iter().chain(&NAMED).find(|(_, n)| *n == number).map(|(name, _)| format!("SIG{name}"));
    let real_time = || match number {
        35..=49 => Some(format!("SIGRTMINPLUS{}", number - 34)),
        50..=63 => Some(format!("SIGRTMAXMINUS{}", 64 - number)),
        _ => None,
    };
    known
        .or_else(real_time)
        .and_then(|name| Signal::from_str_name(&format!("SIGNAL_{name}")))
        .unwrap_or(Signal::RuntimeDefault)
}

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, `RTMAXMINUS2`.
fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let word = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMED.iter().find(|(name, _)| *name == word) {
        return Some(*number);
    }
    let offset = |prefix: &str, sign: &str, long: &str| {
        let rest = word.strip_prefix(prefix)?;
        rest.strip_prefix(sign).or_else(|| rest.strip_prefix(long))?.parse::<i32>().ok()
    };
    let from_min = offset("RTMIN", "+", "PLUS").map(|n| 34i32.saturating_add(n));
    let from_max = || offset("RTMAX", "-", "MINUS").map(|n| 64i32.saturating_sub(n));
    from_min.or_else(from_max).filter(|number| (34..=64).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All values that the enum has.
    fn all() -> impl Iterator<Item = Signal> {
        (0..=65).map(|value| Signal::try_from(value).expect("the enum has no gaps"))
    }

    #[test]
    fn every_signal_of_cri_has_a_number_except_the_default() {
        for signal in all() {
            assert_eq!(number(signal).is_some(), signal != Signal::RuntimeDefault, "{signal:?}");
        }
    }

    #[test]
    fn every_number_has_a_name_that_leads_back_to_it() {
        for signal in 1..=64 {
            // 32 and 33 are used by the C library and have no name.
            let expected = (!(32..=33).contains(&signal)).then_some(signal);
            assert_eq!(number(name(signal)), expected, "{signal}");
        }
    }

    #[test]
    fn the_client_wins_over_the_image_and_the_image_over_the_default() {
        assert_eq!(stop_signal(Signal::Sigusr1, "SIGQUIT"), 10);
        assert_eq!(stop_signal(Signal::RuntimeDefault, "SIGQUIT"), 3);
        assert_eq!(stop_signal(Signal::RuntimeDefault, "quit"), 3);
        assert_eq!(stop_signal(Signal::RuntimeDefault, "37"), 37);
        assert_eq!(stop_signal(Signal::RuntimeDefault, "SIGRTMIN+3"), 37);
        for nonsense in ["", "SIGNONSENSE", "0", "65", "-1", "SIGRTMIN+99", "RTMAX-99999999999"] {
            assert_eq!(stop_signal(Signal::RuntimeDefault, nonsense), 15, "{nonsense}");
        }
    }
}
