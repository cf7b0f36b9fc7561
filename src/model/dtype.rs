//! How numbers are stored.

use std::{fmt, str::FromStr};

/// The floating point formats that hidden states travel in and that blocks compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// bfloat16: the upper half of an `f32`.
    Bf16,
    /// IEEE 754 half precision.
    F16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn size_in_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// The text names no [`Dtype`].
#[derive(Debug, thiserror::Error)]
#[error("unknown dtype {0:?}: the choices are f32, bf16 and f16")]
pub struct UnknownDtype(String);

impl FromStr for Dtype {
    type Err = UnknownDtype;

    /// Reads `f32`, `bf16`, `f16`, and the spellings of `config.json` (`float32`, `bfloat16`, `float16`).
    fn from_str(text: &str) -> Result<Self, UnknownDtype> {
        match text {
            "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "f16" | "float16" => Ok(Self::F16),
            _ => Err(UnknownDtype(text.to_owned())),
        }
    }
}

/// What keys and values are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE 754 single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE 754 half precision.
    F16,
    /// Codes of 8 bits, with one scale in f32 for each token and head.
    Q8,
}

impl KvDtype {
    /// Bytes of one token's keys, or values, in one head of `head_size` numbers.
    pub fn head_bytes(self, head_size: usize) -> usize {
        match self {
            Self::F32 => head_size.saturating_mul(4),
            Self::Bf16 | Self::F16 => head_size.saturating_mul(2),
            Self::Q8 => head_size.saturating_add(4),
        }
    }
}

impl From<Dtype> for KvDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Q8 => "q8",
        })
    }
}
