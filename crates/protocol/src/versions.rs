//! Which agents this build speaks to, by the number that they say in `Ready`: docs/versioning.md.
//!
//! A host boots agents of its own number only, because it installs both. But a box outlives the daemon that booted it, so a
//! daemon meets running agents of older builds, and after a downgrade of newer ones. The number is what the daemon that
//! booted the box has noted of it; the guest is not asked again.

use thiserror::Error;

use crate::PROTOCOL;

/// Running agents are spoken to from this number on. At least the number before [`PROTOCOL`].
pub const OLDEST_SPOKEN: u32 = 2;

/// What is noted of an agent by builds that did not note its number.
pub const UNRECORDED: u32 = 0;

/// The number that those agents are taken to have: of the last builds that noted none.
const LAST_UNRECORDED: u32 = 3;

/// Something that not every agent can do, and that a host must know of beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ability {
    /// WaitExec says how many bytes each output had.
    OutputLengths,
    /// Streams of the kind TCP.
    Ports,
    /// A NIC is found by the address that it started with, so that a guest boots before its network is made.
    NicsByFirstAddress,
    /// All sessions have one file system of a pod's volume, and parts of one can be mounted.
    SharedVolumes,
}

impl Ability {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::OutputLengths, Self::Ports, Self::NicsByFirstAddress, Self::SharedVolumes];

    /// The first number whose agents have it.
    pub const fn since(self) -> u32 {
        match self {
            Self::OutputLengths | Self::Ports => 2,
            Self::NicsByFirstAddress => 3,
            Self::SharedVolumes => 4,
        }
    }
}

/// What an agent that is spoken to can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    protocol: u32,
}

impl Abilities {
    /// Those of the agents that this build boots.
    pub const OURS: Self = Self { protocol: PROTOCOL };

    /// Whether it has this one.
    pub const fn has(self, ability: Ability) -> bool {
        self.protocol >= ability.since()
    }
}

/// A running agent that this build does not speak to. The words are a clause that follows "because".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Unspoken {
    /// It was booted by a build that is too old.
    #[error(
        "its guest agent speaks protocol {number} and this version of a3s-box {OLDEST_SPOKEN} to {PROTOCOL}; run the version \
         that started the pod again, or stop the pod and let it be made anew"
    )]
    Older {
        /// Its number.
        number: u32,
    },
    /// It was booted by a build that is newer than this one.
    #[error(
        "its guest agent speaks protocol {number} and this older version of a3s-box {OLDEST_SPOKEN} to {PROTOCOL}; run the \
         version that started the pod again, or stop the pod and let it be made anew"
    )]
    Newer {
        /// Its number.
        number: u32,
    },
}

/// Decides about a running agent of which this number was noted.
pub const fn speak(noted: u32) -> Result<Abilities, Unspoken> {
    let number = if noted == UNRECORDED { LAST_UNRECORDED } else { noted };
    if number < OLDEST_SPOKEN {
        Err(Unspoken::Older { number })
    } else if number > PROTOCOL {
        Err(Unspoken::Newer { number })
    } else {
        Ok(Abilities { protocol: number })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_number_has_every_ability() {
        let ours = speak(PROTOCOL).unwrap();
        assert_eq!(ours, Abilities::OURS);
        for ability in Ability::ALL {
            assert!(ours.has(ability), "{ability:?}");
            assert!((1..=PROTOCOL).contains(&ability.since()), "{ability:?}");
        }
    }

    #[test]
    fn abilities_come_with_their_numbers() {
        let of = |protocol| Ability::ALL.map(|ability| Abilities { protocol }.has(ability));
        assert_eq!(of(1), [false; 4]);
        assert_eq!(of(2), [true, true, false, false]);
        assert_eq!(of(3), [true, true, true, false]);
        assert_eq!(of(4), [true; 4]);
    }

    #[test]
    fn the_number_before_is_spoken_to_and_strangers_are_refused_with_what_to_do() {
        const { assert!(OLDEST_SPOKEN < PROTOCOL, "boxes of the build before are running") };
        assert!(speak(PROTOCOL - 1).is_ok());
        assert!(speak(OLDEST_SPOKEN).is_ok());
        let (older, newer) = (OLDEST_SPOKEN - 1, PROTOCOL + 1);
        assert_eq!(speak(older), Err(Unspoken::Older { number: older }));
        assert_eq!(speak(newer), Err(Unspoken::Newer { number: newer }));
        assert_eq!(speak(u32::MAX), Err(Unspoken::Newer { number: u32::MAX }));
        for number in [older, newer] {
            let said = speak(number).unwrap_err().to_string();
            assert!(said.contains(&format!("protocol {number}")), "{said}");
            assert!(said.contains("run the version that started the pod again"), "{said}");
        }
    }

    /// Boxes of builds from before the number was noted are running when the first build that notes it is installed.
    #[test]
    fn a_box_without_a_noted_number_is_one_of_the_last_such_build() {
        assert_eq!(speak(UNRECORDED), Ok(Abilities { protocol: 3 }));
    }
}
