//! Which of the ranges that a guest reports as free may be given back to the host.
//!
//! A report is the guest's word alone. Giving back what does not belong to the guest would empty whatever the VMM has
//! mapped there, so a range counts only if it lies wholly in one region of guest memory. Nothing is cut to fit: an honest
//! guest reports whole pages of its own.

use std::sync::atomic::{AtomicU64, Ordering};

/// The unit in which memory can be given back.
pub(super) const PAGE: u64 = 4096;

/// A region of guest memory, in guest addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) length: u64,
}

/// One descriptor of a report, as the guest wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) start: u64,
    pub(super) length: u32,
    /// The device may write to it. The pages of a report are the device's until it answers, so they all are.
    pub(super) writable: bool,
}

/// What may be given back: `length` bytes at `offset` of the region with this index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Discard {
    pub(super) region: usize,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Why a range is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("it is not the device's to write to")]
    ReadOnly,
    #[error("it is empty")]
    Empty,
    #[error("it is not made of whole pages")]
    Unaligned,
    #[error("it does not lie in one region of the guest's memory")]
    Outside,
}

/// Decides about one reported range.
pub(super) fn judge(regions: &[Region], report: Report) -> Result<Discard, Refusal> {
    let Report { start, length, writable } = report;
    let length = u64::from(length);
    if !writable {
        return Err(Refusal::ReadOnly);
    }
    if length == 0 {
        return Err(Refusal::Empty);
    }
    if !start.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) {
        return Err(Refusal::Unaligned);
    }
    let within = |region: &Region| {
        let offset = start.checked_sub(region.start)?;
        let left = region.length.checked_sub(offset)?;
        (length <= left).then_some(offset)
    };
    let found = regions.iter().enumerate().find_map(|(index, region)| Some((index, within(region)?)));
    let (region, offset) = found.ok_or(Refusal::Outside)?;
    Ok(Discard { region, offset, length })
}

/// What became of all reports so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    given_back: AtomicU64,
    refused: AtomicU64,
}

impl Tally {
    pub(super) fn gave_back(&self, length: u64) {
        self.given_back.fetch_add(length, Ordering::Relaxed);
    }

    /// Counts a refusal. The first one answers true: it is worth a line in the log, and a guest can cause no second.
    pub(super) fn refuse(&self) -> bool {
        self.refused.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// Bytes that were given back.
    #[cfg(test)]
    pub(super) fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }

    /// Ranges that were refused.
    #[cfg(test)]
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LOW: Region = Region { start: 0, length: 64 * PAGE };
    /// Begins where `LOW` ends: two mappings of the VMM that are neighbours only in the guest's view.
    const NEXT: Region = Region { start: 64 * PAGE, length: 64 * PAGE };
    const HIGH: Region = Region { start: 1 << 32, length: 16 * PAGE };
    /// Its last byte is the last address there is.
    const LAST: Region = Region { start: u64::MAX - 4 * PAGE + 1, length: 4 * PAGE };

    fn judged(start: u64, length: u64) -> Result<Discard, Refusal> {
        let report = Report { start, length: u32::try_from(length).unwrap(), writable: true };
        judge(&[LOW, NEXT, HIGH, LAST], report)
    }

    #[test]
    fn whole_regions_and_single_pages_at_their_edges_are_given_back() {
        assert_eq!(judged(0, 64 * PAGE), Ok(Discard { region: 0, offset: 0, length: 64 * PAGE }));
        assert_eq!(judged(127 * PAGE, PAGE), Ok(Discard { region: 1, offset: 63 * PAGE, length: PAGE }));
        assert_eq!(
            judged(HIGH.start + 15 * PAGE, PAGE),
            Ok(Discard { region: 2, offset: 15 * PAGE, length: PAGE })
        );
        assert_eq!(judged(LAST.start, 4 * PAGE), Ok(Discard { region: 3, offset: 0, length: 4 * PAGE }));
    }

    // A report that ends behind its region made libkrun's fork empty pages of the VMM itself.
    #[test]
    fn a_range_that_reaches_over_the_end_of_its_region_is_refused_whole() {
        for (start, length) in [
            (HIGH.start, 17 * PAGE),
            (HIGH.start + 15 * PAGE, 2 * PAGE),
            (HIGH.start - PAGE, 2 * PAGE),
            (63 * PAGE, 2 * PAGE),
            (0, 128 * PAGE),
            (128 * PAGE, PAGE),
        ] {
            assert_eq!(judged(start, length), Err(Refusal::Outside), "{start:#x}+{length:#x}");
        }
    }

    #[test]
    fn addresses_that_wrap_around_are_refused() {
        assert_eq!(judged(u64::MAX - PAGE + 1, 2 * PAGE), Err(Refusal::Outside));
        assert_eq!(judged(u64::MAX - 4 * PAGE + 1, u64::from(u32::MAX) + 1 - PAGE), Err(Refusal::Outside));
        assert_eq!(judge(&[], Report { start: 0, length: 4096, writable: true }), Err(Refusal::Outside));
    }

    #[test]
    fn parts_of_pages_empty_and_read_only_ranges_are_refused() {
        assert_eq!(judged(PAGE, 0), Err(Refusal::Empty));
        assert_eq!(judged(PAGE, PAGE - 1), Err(Refusal::Unaligned));
        assert_eq!(judged(PAGE + 512, PAGE), Err(Refusal::Unaligned));
        assert_eq!(judged(0, u64::from(u32::MAX)), Err(Refusal::Unaligned));
        let report = Report { start: 0, length: 4096, writable: false };
        assert_eq!(judge(&[LOW], report), Err(Refusal::ReadOnly));
    }

    #[test]
    fn only_the_first_refusal_is_worth_a_line() {
        let tally = Tally::default();
        assert_eq!([tally.refuse(), tally.refuse(), tally.refuse()], [true, false, false]);
        assert_eq!(tally.refused(), 3);
    }

    /// Regions in order, with or without gaps, like a VM's.
    fn regions() -> impl Strategy<Value = Vec<Region>> {
        prop::collection::vec((0_u64..8, 1_u64..64), 0..6).prop_map(|parts| {
            let mut end = 0;
            let place = |(gap, pages): (u64, u64)| {
                let start = end + gap * PAGE;
                end = start + pages * PAGE;
                Region { start, length: pages * PAGE }
            };
            parts.into_iter().map(place).collect()
        })
    }

    fn reports() -> impl Strategy<Value = Report> {
        let near = (0_u64..600, 0_u32..200).prop_map(|(start, pages)| (start * PAGE, pages * PAGE as u32));
        let ranges = prop_oneof![4 => near, 1 => any::<(u64, u32)>()];
        (ranges, any::<bool>()).prop_map(|((start, length), writable)| Report { start, length, writable })
    }

    proptest! {
        #[test]
        fn what_is_given_back_is_exactly_what_was_reported_and_all_of_it_guest_memory(
            regions in regions(), report in reports()
        ) {
            // 128 bits, so that the model itself cannot wrap.
            let (start, length) = (u128::from(report.start), u128::from(report.length));
            let holds = |region: &Region| {
                let end = u128::from(region.start) + u128::from(region.length);
                start >= u128::from(region.start) && start + length <= end
            };
            let whole = length > 0 && start % u128::from(PAGE) == 0 && length % u128::from(PAGE) == 0;
            match judge(&regions, report) {
                Ok(discard) => {
                    let region = regions[discard.region];
                    prop_assert!(report.writable && whole && holds(&region));
                    prop_assert_eq!(region.start + discard.offset, report.start);
                    prop_assert_eq!(discard.length, u64::from(report.length));
                }
                Err(_) => prop_assert!(!report.writable || !whole || !regions.iter().any(holds)),
            }
        }
    }
}
