//! Matrices as checkpoints hold them: floating point numbers, or one of the packed formats that people's files are in.
//!
//! A packed matrix stays packed: whoever reads it gets its bytes in one of few canonical layouts, all row-major, so that
//! the rows of a matrix, or of several one below the other, are runs of bytes.

use super::TensorData;
use crate::model::Dtype;

/// A matrix `[rows, columns]`.
#[derive(Debug, Clone)]
pub enum StoredMatrix {
    /// Floating point numbers.
    Floats(TensorData),
    /// Blocks of consecutive numbers of a row, each with its own scale.
    Blocks(BlockMatrix),
    /// Numbers of 8 bits with a scale for each tile.
    Fp8(Fp8Matrix),
    /// Integers with a scale and a zero for each group of a row.
    Grouped(GroupedMatrix),
}

/// How the blocks of a [`BlockMatrix`] are laid out. All but [`BlockFormat::Mxfp4`] are GGML's, byte by byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    /// 32 numbers of 4 bits, an f16 scale.
    Q4_0,
    /// 32 numbers of 4 bits, an f16 scale and minimum.
    Q4_1,
    /// 32 numbers of 5 bits, an f16 scale.
    Q5_0,
    /// 32 numbers of 5 bits, an f16 scale and minimum.
    Q5_1,
    /// 32 numbers of 8 bits, an f16 scale.
    Q8_0,
    /// 256 numbers of 2 bits; scales and minima of 4 bits for each 16.
    Q2K,
    /// 256 numbers of 3 bits; scales of 6 bits for each 16.
    Q3K,
    /// 256 numbers of 4 bits; scales and minima of 6 bits for each 32.
    Q4K,
    /// 256 numbers of 5 bits; scales and minima of 6 bits for each 32.
    Q5K,
    /// 256 numbers of 6 bits; scales of 8 bits for each 16.
    Q6K,
    /// 32 numbers of 4 bits that index a fixed table, an f16 scale.
    Iq4Nl,
    /// 256 numbers of 4 bits that index the same table; scales of 6 bits for each 32.
    Iq4Xs,
    /// 32 numbers of 4 bits (E2M1), two in a byte, the first in its lower half; then a scale of 8 bits (E8M0).
    Mxfp4,
}

impl BlockFormat {
    /// Numbers of a block.
    pub fn numbers(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Iq4Nl | Self::Mxfp4 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => 256,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Iq4Xs => 136,
            Self::Mxfp4 => 17,
        }
    }

    /// The name that users know.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::Iq4Nl => "iq4_nl",
            Self::Iq4Xs => "iq4_xs",
            Self::Mxfp4 => "mxfp4",
        }
    }
}

/// A matrix in blocks. Its columns are a multiple of a block's numbers.
#[derive(Debug, Clone)]
pub struct BlockMatrix {
    /// How a block is laid out.
    pub format: BlockFormat,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// `rows · columns / format.numbers()` blocks.
    pub bytes: Vec<u8>,
}

/// Numbers of 8 bits (E4M3: a sign, four bits of exponent with a bias of 7, three of mantissa; no infinities), each
/// multiplied by the scale of the tile it lies in.
#[derive(Debug, Clone)]
pub struct Fp8Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// `[rows, columns]`.
    pub codes: Vec<u8>,
    /// Rows and columns of a tile; those at the edges may be smaller.
    pub tile: [usize; 2],
    /// `[⌈rows / tile[0]⌉, ⌈columns / tile[1]⌉]`.
    pub scales: Vec<f32>,
}

/// Integers `q` that stand for `scale · (q − zero)`, with one scale and zero for every `group` columns of a row: what GPTQ
/// and AWQ make.
#[derive(Debug, Clone)]
pub struct GroupedMatrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Bits of an integer: 4 or 8.
    pub bits: u32,
    /// Columns of a group. It divides `columns`.
    pub group: usize,
    /// `[rows, columns · bits / 8]`; of 4 bits, the first of two is in a byte's lower half.
    pub codes: Vec<u8>,
    /// `[rows, columns / group]`, the bits of an f16 or bf16.
    pub scales: Vec<u16>,
    /// F16 or Bf16.
    pub scale_dtype: Dtype,
    /// `[rows, columns / group]`. One more than 8 bits can hold is possible (GPTQ counts from 1).
    pub zeros: Vec<u16>,
    /// Where there is one, column `i` here is column `order[i]` of the layer's inputs.
    pub order: Option<Vec<u32>>,
}

impl StoredMatrix {
    /// Rows.
    pub fn rows(&self) -> usize {
        match self {
            Self::Floats(data) => data.shape.first().copied().unwrap_or(0),
            Self::Blocks(matrix) => matrix.rows,
            Self::Fp8(matrix) => matrix.rows,
            Self::Grouped(matrix) => matrix.rows,
        }
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        match self {
            Self::Floats(data) => data.shape.get(1).copied().unwrap_or(0),
            Self::Blocks(matrix) => matrix.columns,
            Self::Fp8(matrix) => matrix.columns,
            Self::Grouped(matrix) => matrix.columns,
        }
    }
}
