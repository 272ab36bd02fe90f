//! Sizes of boxes on the command line.

use a3s_box_host::config::parse_size;

const LEAST_MIB: u64 = 128;
const MOST_MIB: u64 = 1 << 20;

/// `512M`, `2G`: whole MiB, at least what a guest needs to boot.
pub(crate) fn parse_memory_mib(text: &str) -> Result<u32, String> {
    // Docker's users write a bare number of bytes; nobody means 512 of them.
    let bytes = parse_size(text).ok_or_else(|| format!("{text:?} is not a size such as 512M or 2G"))?;
    let mib = bytes.div_ceil(1 << 20);
    match u32::try_from(mib) {
        Ok(fitting) if (LEAST_MIB..=MOST_MIB).contains(&mib) => Ok(fitting),
        Ok(_) | Err(_) => Err(format!("{text:?} is out of range: a box has between {LEAST_MIB}M and 1T")),
    }
}

/// 1 to 64; fractions belong to limits inside a box, a virtual machine has whole CPUs.
pub(crate) fn parse_vcpus(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(count) if (1..=64).contains(&count) => Ok(count),
        Ok(_) | Err(_) => Err(format!("{text:?} is not a whole number from 1 to 64")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_whole_mebibytes_within_bounds() {
        assert_eq!(parse_memory_mib("512M"), Ok(512));
        assert_eq!(parse_memory_mib("2G"), Ok(2048));
        assert_eq!(parse_memory_mib("536870913"), Ok(513));
        for bad in ["512", "64M", "2T", "much", "-1G"] {
            assert!(parse_memory_mib(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_box_has_at_least_one_cpu() {
        assert_eq!(parse_vcpus("4"), Ok(4));
        for bad in ["0", "65", "1.5", ""] {
            assert!(parse_vcpus(bad).is_err(), "{bad}");
        }
    }
}
