//! Sizes as people write them: `64M`, `1.5G`.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// The smallest size accepted: below a page there is nothing to lend.
const MIN_BYTES: u64 = 4096;

/// The largest size accepted: the user half of a 47-bit address space. More could not be mapped.
const MAX_BYTES: u64 = 1 << 47;

/// Digits accepted behind the point. More would say nothing that a byte count could keep.
const MAX_FRACTION_DIGITS: usize = 9;

/// A number of bytes, never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Size(u64);

impl Size {
    /// The size of so many bytes, brought into the accepted range.
    pub(crate) fn clamped(bytes: u64) -> Self {
        Self(bytes.clamp(MIN_BYTES, MAX_BYTES))
    }

    /// The number of bytes.
    pub(crate) fn bytes(self) -> u64 {
        self.0
    }
}

/// Why a text is not a size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    #[error(
        "a size is a number with an optional unit K, M, G, T or P (powers of 1024), such as 64M or 1.5G"
    )]
    Malformed,
    #[error("{0} has no meaning here; write {1} (powers of 1024)")]
    DecimalUnit(String, &'static str),
    #[error("a fraction needs a unit: write 1.5G, or a whole number of bytes")]
    FractionOfByte,
    #[error("a size of zero gives the program no memory; give at least 4K")]
    Zero,
    #[error("less than one page; give at least 4K")]
    TooSmall,
    #[error("more than 128T, which no process can map; give a smaller size")]
    TooLarge,
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let text = text.trim();
        let digits = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = unit_shift(unit)?;
        let (whole, fraction) = match number.split_once('.') {
            Some((whole, fraction)) if !whole.is_empty() && !fraction.is_empty() => {
                (whole, fraction)
            }
            Some(_) => return Err(SizeError::Malformed),
            None => (number, ""),
        };
        if whole.is_empty() || fraction.contains('.') || fraction.len() > MAX_FRACTION_DIGITS {
            return Err(SizeError::Malformed);
        }
        if !fraction.is_empty() && shift == 0 {
            return Err(SizeError::FractionOfByte);
        }
        // Only digits are left, so that the one way to fail is being too long for the type.
        let whole: u64 = whole.parse().map_err(|_| SizeError::TooLarge)?;
        let scale = 10_u128.pow(fraction.len() as u32);
        let fraction: u128 = if fraction.is_empty() {
            0
        } else {
            fraction.parse().map_err(|_| SizeError::Malformed)?
        };
        let bytes = (u128::from(whole) << shift) + (fraction << shift) / scale;
        match u64::try_from(bytes) {
            Ok(0) => Err(SizeError::Zero),
            Ok(bytes) if bytes < MIN_BYTES => Err(SizeError::TooSmall),
            Ok(bytes) if bytes <= MAX_BYTES => Ok(Self(bytes)),
            _ => Err(SizeError::TooLarge),
        }
    }
}

/// The power of two that a unit stands for.
fn unit_shift(unit: &str) -> Result<u32, SizeError> {
    let lower = unit.to_ascii_lowercase();
    let (shift, name) = match lower.chars().next() {
        None => return Ok(0),
        Some('b') => (0, "B"),
        Some('k') => (10, "K"),
        Some('m') => (20, "M"),
        Some('g') => (30, "G"),
        Some('t') => (40, "T"),
        Some('p') => (50, "P"),
        Some(_) => return Err(SizeError::Malformed),
    };
    match lower.get(1..) {
        Some("") => Ok(shift),
        Some("i" | "ib") if shift > 0 => Ok(shift),
        // 64MB is 64,000,000 bytes to some and 67,108,864 to others.
        Some("b") if shift > 0 => Err(SizeError::DecimalUnit(unit.to_owned(), name)),
        _ => Err(SizeError::Malformed),
    }
}

impl fmt::Display for Size {
    /// Writes the shortest exact form that parses back to the same size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(50, "P"), (40, "T"), (30, "G"), (20, "M"), (10, "K")];
        for (shift, unit) in units {
            if self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// Bytes for reading: one decimal, in the unit that keeps the number short.
pub(crate) fn readable(bytes: u64) -> String {
    let units = [
        (1_u64 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ];
    for (unit, name) in units {
        if bytes >= unit {
            return format!("{:.1} {name}", bytes as f64 / unit as f64);
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<u64, SizeError> {
        text.parse().map(Size::bytes)
    }

    #[test]
    fn usual_forms() {
        assert_eq!(parse("64M"), Ok(64 << 20));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("64MiB"), Ok(64 << 20));
        assert_eq!(parse("8192"), Ok(8192));
        assert_eq!(parse("8k"), Ok(8192));
        assert_eq!(parse("128T"), Ok(1 << 47));
    }

    #[test]
    fn refused_forms() {
        for text in [
            "", "M", "1.5.5G", "-4M", "+4M", "4 M", "1e9", "0x10M", ".5G", "5.G", "4MM", "4iB",
            "٤M",
        ] {
            assert_eq!(parse(text), Err(SizeError::Malformed), "{text}");
        }
        assert_eq!(parse("0"), Err(SizeError::Zero));
        assert_eq!(parse("0.0G"), Err(SizeError::Zero));
        assert_eq!(parse("1"), Err(SizeError::TooSmall));
        assert_eq!(parse("1.5"), Err(SizeError::FractionOfByte));
        assert_eq!(parse("64MB"), Err(SizeError::DecimalUnit("MB".into(), "M")));
        for text in ["129T", "1P", "16777216P", "99999999999999999999999999"] {
            assert_eq!(parse(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,24}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_is_written_is_read_back(bytes in MIN_BYTES..=MAX_BYTES) {
            prop_assert_eq!(parse(&Size::clamped(bytes).to_string()), Ok(bytes));
        }

        #[test]
        fn units_multiply(whole in 1_u64..1000, tenths in 0_u64..10, unit in 1_usize..4) {
            let text = format!("{whole}.{tenths}{}", ["", "K", "M", "G"][unit]);
            let scale = 1_u64 << (10 * unit);
            let bytes = whole * scale + tenths * scale / 10;
            let expected = if bytes < MIN_BYTES { Err(SizeError::TooSmall) } else { Ok(bytes) };
            prop_assert_eq!(parse(&text), expected);
        }
    }
}
