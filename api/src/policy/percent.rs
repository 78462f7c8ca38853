//! Shares of a hundred.

use serde::{Deserialize, Serialize};

/// A share in percent, 0 to 100.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(try_from = "u32", into = "u32")]
pub struct Percent(u8);

/// A number that is no share of a hundred.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0} is not a percentage: write a whole number from 0 to 100")]
pub struct InvalidPercent(u32);

impl Percent {
    /// 100.
    pub const ALL: Self = Self(100);

    /// The number, 0 to 100.
    pub fn get(self) -> u32 {
        u32::from(self.0)
    }
}

impl TryFrom<u32> for Percent {
    type Error = InvalidPercent;

    fn try_from(given: u32) -> Result<Self, Self::Error> {
        match u8::try_from(given) {
            Ok(number @ 0..=100) => Ok(Self(number)),
            _ => Err(InvalidPercent(given)),
        }
    }
}

impl From<Percent> for u32 {
    fn from(percent: Percent) -> Self {
        percent.get()
    }
}
