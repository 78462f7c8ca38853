//! Durations as the Gateway API writes them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A duration in the format of Gateway API GEP-2257: one to four groups of one to five digits,
/// each followed by `h`, `m`, `s` or `ms` ("10s", "500ms", "1h30m"). Millisecond precision.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Duration(std::time::Duration);

/// Why a string is not a duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "'{0}' is not a duration: write one to four groups of up to five digits with a unit h, m, s or ms, such as \"10s\", \"500ms\" or \"1m30s\""
)]
pub struct InvalidDuration(String);

impl Duration {
    /// Whole milliseconds.
    pub fn from_millis(millis: u64) -> Self {
        Self(std::time::Duration::from_millis(millis))
    }

    /// Whole seconds.
    pub fn from_secs(secs: u64) -> Self {
        Self(std::time::Duration::from_secs(secs))
    }

    /// Length in milliseconds.
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// The same length as the standard library's type.
    pub fn as_std(self) -> std::time::Duration {
        self.0
    }

    /// True for "0s".
    pub fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

impl FromStr for Duration {
    type Err = InvalidDuration;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let fail = || InvalidDuration(given.chars().take(40).collect());
        let mut rest = given;
        let mut millis = 0u64;
        let mut groups = 0;
        while !rest.is_empty() {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let unit_len = rest[digits..].len()
                - rest[digits..]
                    .trim_start_matches(|c: char| c.is_ascii_lowercase())
                    .len();
            groups += 1;
            if groups > 4 || !(1..=5).contains(&digits) {
                return Err(fail());
            }
            let scale = match &rest[digits..digits + unit_len] {
                "h" => 3_600_000,
                "m" => 60_000,
                "s" => 1_000,
                "ms" => 1,
                _ => return Err(fail()),
            };
            let number: u64 = rest[..digits].parse().map_err(|_| fail())?;
            millis += number * scale;
            rest = &rest[digits + unit_len..];
        }
        if groups == 0 {
            return Err(fail());
        }
        Ok(Self::from_millis(millis))
    }
}

impl TryFrom<String> for Duration {
    type Error = InvalidDuration;

    fn try_from(given: String) -> Result<Self, Self::Error> {
        given.parse()
    }
}

impl From<Duration> for String {
    fn from(duration: Duration) -> Self {
        duration.to_string()
    }
}

impl fmt::Display for Duration {
    /// The shortest form with at most one group a unit.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut millis = self.as_millis();
        if millis == 0 {
            return f.write_str("0s");
        }
        for (scale, unit) in [(3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms")] {
            let number = millis / scale;
            millis %= scale;
            if number > 0 {
                write!(f, "{number}{unit}")?;
            }
        }
        Ok(())
    }
}
