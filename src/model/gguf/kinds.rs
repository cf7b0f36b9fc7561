//! How a GGUF file says that a tensor's numbers are stored.

use crate::model::{Dtype, checkpoint::BlockFormat};

/// A tensor type of GGML.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// Floating point numbers.
    Floats(Dtype),
    /// Blocks of numbers with a scale.
    Blocks(BlockFormat),
    /// One that Helion doesn't compute with, by its number.
    Other(u32),
}

/// The numbers and names of the types that are not computed with (`ggml.h`).
const OTHERS: [(u32, &str); 20] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
    (4, "Q4_2"),
];

impl Kind {
    /// The type of that number (`enum ggml_type` of `ggml.h`).
    pub(super) fn of(number: u32) -> Self {
        match number {
            0 => Self::Floats(Dtype::F32),
            1 => Self::Floats(Dtype::F16),
            30 => Self::Floats(Dtype::Bf16),
            2 => Self::Blocks(BlockFormat::Q4_0),
            3 => Self::Blocks(BlockFormat::Q4_1),
            6 => Self::Blocks(BlockFormat::Q5_0),
            7 => Self::Blocks(BlockFormat::Q5_1),
            8 => Self::Blocks(BlockFormat::Q8_0),
            10 => Self::Blocks(BlockFormat::Q2K),
            11 => Self::Blocks(BlockFormat::Q3K),
            12 => Self::Blocks(BlockFormat::Q4K),
            13 => Self::Blocks(BlockFormat::Q5K),
            14 => Self::Blocks(BlockFormat::Q6K),
            20 => Self::Blocks(BlockFormat::Iq4Nl),
            23 => Self::Blocks(BlockFormat::Iq4Xs),
            39 => Self::Blocks(BlockFormat::Mxfp4),
            other => Self::Other(other),
        }
    }

    /// The name that users know.
    pub(super) fn name(self) -> String {
        match self {
            Self::Floats(dtype) => dtype.to_string(),
            Self::Blocks(format) => format.name().to_owned(),
            Self::Other(number) => match OTHERS.iter().find(|(other, _)| *other == number) {
                Some((_, name)) => (*name).to_owned(),
                None => format!("type {number}"),
            },
        }
    }

    /// Bytes of a row of `columns` numbers. `None` where rows can't have so many, or nothing is known about the type.
    pub(super) fn row_bytes(self, columns: usize) -> Option<usize> {
        let (numbers, bytes) = match self {
            Self::Floats(dtype) => (1, dtype.size_in_bytes()),
            Self::Blocks(format) => (format.numbers(), format.bytes()),
            Self::Other(_) => return None,
        };
        if columns.is_multiple_of(numbers) { (columns / numbers).checked_mul(bytes) } else { None }
    }
}
