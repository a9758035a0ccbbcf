//! What can be wrong with a field of a message.

use crate::limits;

/// A field from the wire that was refused. The message starts with the field's name as in the `.proto` file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// Empty, zero or absent where a value is needed.
    #[error("{field}: missing; set it")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// More characters, bytes or elements than the field's bound.
    #[error("{field}: length {length} is over the bound of {max}")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        length: usize,
        /// The longest accepted.
        max: usize,
    },
    /// A number outside its bounds.
    #[error("{field}: {value} is not within {min}..={max}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// What it was.
        value: u64,
        /// The least accepted.
        min: u64,
        /// The greatest accepted.
        max: u64,
    },
    /// Text with characters that the field does not take.
    #[error("{field}: holds a character outside {allowed}")]
    Charset {
        /// The field.
        field: &'static str,
        /// What is allowed, in words.
        allowed: &'static str,
    },
    /// Anything else about its form.
    #[error("{field}: {expected}")]
    Malformed {
        /// The field.
        field: &'static str,
        /// What was expected, in words.
        expected: &'static str,
    },
}

impl FieldError {
    /// The name of the field, as in the `.proto` file.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Missing { field }
            | Self::TooLong { field, .. }
            | Self::OutOfRange { field, .. }
            | Self::Charset { field, .. }
            | Self::Malformed { field, .. } => field,
        }
    }
}

impl From<FieldError> for tonic::Status {
    fn from(error: FieldError) -> Self {
        tonic::Status::invalid_argument(error.to_string())
    }
}

/// Checks a length against its bound.
pub(crate) fn bounded(field: &'static str, length: usize, max: usize) -> Result<(), FieldError> {
    if length > max {
        Err(FieldError::TooLong { field, length, max })
    } else {
        Ok(())
    }
}

/// Checks a number against its bounds, both inclusive.
pub(crate) fn within(
    field: &'static str,
    value: u64,
    min: u64,
    max: u64,
) -> Result<u64, FieldError> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(FieldError::OutOfRange {
            field,
            value,
            min,
            max,
        })
    }
}

/// A name: letters, digits, `.`, `_`, `-`, of 1 to [`limits::MAX_NAME`] characters.
pub(crate) fn name(field: &'static str, text: &str) -> Result<(), FieldError> {
    word(
        field,
        text,
        limits::MAX_NAME,
        |b| b.is_ascii_alphanumeric() || b"._-".contains(&b),
        "A-Z a-z 0-9 . _ -",
    )
}

/// A label's key or a total's name: a name that may also hold `/`.
pub(crate) fn key(field: &'static str, text: &str) -> Result<(), FieldError> {
    word(
        field,
        text,
        limits::MAX_NAME,
        |b| b.is_ascii_alphanumeric() || b"._-/".contains(&b),
        "A-Z a-z 0-9 . _ - /",
    )
}

/// A label's value: printable, may be empty.
pub(crate) fn value(field: &'static str, text: &str) -> Result<(), FieldError> {
    if text.is_empty() {
        return Ok(());
    }
    word(
        field,
        text,
        limits::MAX_NAME,
        |b| (0x20..0x7f).contains(&b),
        "printable ASCII",
    )
}

fn word(
    field: &'static str,
    text: &str,
    max: usize,
    allow: impl Fn(u8) -> bool,
    allowed: &'static str,
) -> Result<(), FieldError> {
    if text.is_empty() {
        return Err(FieldError::Missing { field });
    }
    bounded(field, text.len(), max)?;
    if text.bytes().all(allow) {
        Ok(())
    } else {
        Err(FieldError::Charset { field, allowed })
    }
}

/// A host name or address literal: letters, digits, `.`, `-`, `_`, `:` and brackets.
pub(crate) fn host(field: &'static str, text: &str) -> Result<(), FieldError> {
    let allow = |b: u8| b.is_ascii_alphanumeric() || b".-_:[]%".contains(&b);
    word(
        field,
        text,
        limits::MAX_HOST,
        allow,
        "A-Z a-z 0-9 . - _ : [ ] %",
    )
}

/// A socket name or path: printable ASCII without spaces.
pub(crate) fn socket_name(field: &'static str, text: &str, max: usize) -> Result<(), FieldError> {
    word(
        field,
        text,
        max,
        |b| b.is_ascii_graphic(),
        "printable ASCII without spaces",
    )
}
