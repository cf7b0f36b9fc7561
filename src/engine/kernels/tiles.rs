//! How tiles lie in memory.
//!
//! A tile takes the bytes of 16 rows of the format's own layout, to the byte, and packing only moves bits: a row can be taken
//! out again. In all block layouts, "four" is `[16 outputs][4 inputs]`, 64 bytes of codes; "eight" the same with codes of 4 bits, of
//! inputs 0–3 in the lower and 4–7 in the upper halves of the bytes.
//!
//! | layout | a tile's block |
//! |---|---|
//! | f32 | 16 numbers for an input |
//! | bf16 | 16 pairs for two inputs |
//! | f16 | 16 numbers for an input, and 16 for the next |
//! | q8_0 | 16 scales in f16, 8 fours |
//! | q4_0 | 16 scales in f16, 4 eights |
//! | mxfp4 | 16 scales in E8M0, 4 eights |
//! | q4_k | 16 scales and 16 minima's scales in f16; the 12 bytes of 6-bit scales, `[12, 16]`; for each 32 inputs 4 eights |
//! | q6_k | 16 scales in f16; the 16 scales of 8 bits, `[16, 16]`; for each 16 inputs 2 eights and 64 bytes of upper bits, of which byte `[output][j]` holds those of inputs `j`, `4 + j`, `8 + j` and `12 + j` |

use rayon::prelude::*;

use crate::model::{Dtype, checkpoint::BlockFormat};

/// Outputs of a tile.
pub(in crate::engine) const TILE: usize = 16;

/// Bytes of a tile's block of q4_k, and of its 6-bit scales.
pub(super) const Q4_K_BYTES: usize = 144 * TILE;
pub(super) const Q4_K_SCALES: usize = 12 * TILE;
/// Bytes of a tile's block of q6_k.
pub(super) const Q6_K_BYTES: usize = 210 * TILE;

/// A format that has tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Layout {
    F32,
    Bf16,
    F16,
    Q8_0,
    Q4_0,
    Q4K,
    Q6K,
    Mxfp4,
}

impl Layout {
    /// Of matrices of floating point numbers.
    pub(in crate::engine) fn of_floats(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
        }
    }

    /// Of matrices of blocks, where there is one.
    pub(in crate::engine) fn of_blocks(format: BlockFormat) -> Option<Self> {
        Some(match format {
            BlockFormat::Q8_0 => Self::Q8_0,
            BlockFormat::Q4_0 => Self::Q4_0,
            BlockFormat::Q4K => Self::Q4K,
            BlockFormat::Q6K => Self::Q6K,
            BlockFormat::Mxfp4 => Self::Mxfp4,
            _ => return None,
        })
    }

    /// Whether rows are rounded for it.
    pub(in crate::engine) fn has_blocks(self) -> bool {
        !matches!(self, Self::F32 | Self::Bf16 | Self::F16)
    }

    /// Inputs and bytes of a row's block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::Bf16 | Self::F16 => (2, 4),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Mxfp4 => (32, 17),
            Self::Q4K => (256, 144),
            Self::Q6K => (256, 210),
        }
    }

    /// Whether rows of so many inputs can be packed.
    pub(in crate::engine) fn fits(self, inputs: usize) -> bool {
        inputs > 0 && inputs.is_multiple_of(self.block().0)
    }

    /// Bytes of a row, or of a 16th of a tile.
    pub(in crate::engine) fn row_bytes(self, inputs: usize) -> usize {
        let (numbers, bytes) = self.block();
        inputs / numbers * bytes
    }

    /// Packs whole tiles' rows in place.
    pub(in crate::engine) fn pack_all(self, rows: &mut [u8], inputs: usize) {
        let size = self.row_bytes(inputs) * TILE;
        rows.par_chunks_exact_mut(size).for_each_init(
            || vec![0; size],
            |copy, tile| {
                copy.copy_from_slice(tile);
                self.pack(copy, tile);
            },
        );
    }

    /// Packs 16 rows.
    fn pack(self, rows: &[u8], tile: &mut [u8]) {
        let row_bytes = rows.len() / TILE;
        for (row, bytes) in rows.chunks_exact(row_bytes).enumerate() {
            self.each_move(row_bytes, row, |Move { in_row, in_tile, bits }| match bits {
                Bits::All => tile[in_tile] = bytes[in_row],
                Bits::Some { from, to, mask } => {
                    tile[in_tile] = tile[in_tile] & !(mask << to) | (bytes[in_row] >> from & mask) << to;
                }
            });
        }
    }

    /// Takes a row out of a tile.
    pub(in crate::engine) fn unpack(self, tile: &[u8], row: usize, bytes: &mut [u8]) {
        self.each_move(bytes.len(), row, |Move { in_row, in_tile, bits }| match bits {
            Bits::All => bytes[in_row] = tile[in_tile],
            Bits::Some { from, to, mask } => {
                bytes[in_row] = bytes[in_row] & !(mask << from) | (tile[in_tile] >> to & mask) << from;
            }
        });
    }

    /// Where the bits of a row lie in its tile.
    #[inline(always)]
    fn each_move(self, row_bytes: usize, row: usize, mut each: impl FnMut(Move)) {
        let (_, size) = self.block();
        for block in 0..row_bytes / size {
            let (from, to) = (block * size, block * size * TILE);
            let whole =
                |in_row: usize, in_tile: usize| Move { in_row: from + in_row, in_tile: to + in_tile, bits: Bits::All };
            match self {
                Self::F32 | Self::Bf16 => (0..4).for_each(|byte| each(whole(byte, 4 * row + byte))),
                Self::F16 => (0..4).for_each(|byte| each(whole(byte, 2 * TILE * (byte / 2) + 2 * row + byte % 2))),
                Self::Q8_0 => {
                    (0..2).for_each(|byte| each(whole(byte, 2 * row + byte)));
                    (0..32).for_each(|input| each(whole(2 + input, 32 + four(input) + 4 * row)));
                }
                Self::Q4_0 => {
                    (0..2).for_each(|byte| each(whole(byte, 2 * row + byte)));
                    for input in 0..32 {
                        // Input i + 16 is in the upper half of byte i.
                        let half = nibble(input / 16, input);
                        each(half.at(from + 2 + input % 16, to + 32 + eight(input) + 4 * row));
                    }
                }
                Self::Mxfp4 => {
                    each(whole(16, row));
                    for input in 0..32 {
                        let half = nibble(input % 2, input);
                        each(half.at(from + input / 2, to + 16 + eight(input) + 4 * row));
                    }
                }
                Self::Q4K => {
                    (0..2).for_each(|byte| each(whole(byte, 2 * row + byte)));
                    (0..2).for_each(|byte| each(whole(2 + byte, 32 + 2 * row + byte)));
                    (0..12).for_each(|byte| each(whole(4 + byte, 64 + TILE * byte + row)));
                    for input in 0..256 {
                        let half = nibble(input / 32 % 2, input);
                        let in_row = from + 16 + 32 * (input / 64) + input % 32;
                        each(half.at(in_row, to + 64 + Q4_K_SCALES + eight(input) + 4 * row));
                    }
                }
                Self::Q6K => {
                    (0..2).for_each(|byte| each(whole(208 + byte, 2 * row + byte)));
                    (0..16).for_each(|sub| each(whole(192 + sub, 32 + TILE * sub + row)));
                    for input in 0..256 {
                        // A half of 128 inputs is 64 bytes of lower and 32 of upper bits; in these, every 32 inputs have bits of
                        // their own.
                        let (half, quarter, place) = (input / 128, input % 128 / 32, input % 32);
                        let sub = to + 32 + 256 + 192 * (input / 16);
                        let lower = nibble(quarter / 2, input);
                        let in_row = from + 64 * half + 32 * (quarter % 2) + place;
                        each(lower.at(in_row, sub + eight(input % 16) + 4 * row));
                        let upper = Part { from: 2 * quarter, to: 2 * (input % 16 / 4), mask: 3 };
                        each(upper.at(from + 128 + 32 * half + place, sub + 128 + 4 * row + input % 4));
                    }
                }
            }
        }
    }
}

/// Bits that are in one byte of a row and in one byte of its tile.
struct Move {
    in_row: usize,
    in_tile: usize,
    bits: Bits,
}

enum Bits {
    All,
    /// Those of `mask`, from bit `from` on in the row and from bit `to` on in the tile.
    Some {
        from: usize,
        to: usize,
        mask: u8,
    },
}

struct Part {
    from: usize,
    to: usize,
    mask: u8,
}

impl Part {
    #[inline(always)]
    fn at(self, in_row: usize, in_tile: usize) -> Move {
        let Self { from, to, mask } = self;
        Move { in_row, in_tile, bits: Bits::Some { from, to, mask } }
    }
}

/// The code of `input`, in half `half` of a byte of its row.
#[inline(always)]
fn nibble(half: usize, input: usize) -> Part {
    Part { from: 4 * half, to: input / 4 % 2 * 4, mask: 15 }
}

/// Where in a run of fours the code of `input` is, of output 0.
#[inline(always)]
fn four(input: usize) -> usize {
    64 * (input / 4) + input % 4
}

/// Where in a run of eights the code of `input` is, of output 0.
#[inline(always)]
fn eight(input: usize) -> usize {
    64 * (input / 8) + input % 4
}

/// The scales and minima of 6 bits, of the 8 parts of q4_k's blocks: the first four parts' in the lower bits of bytes 0–3
/// and 4–7, the others' in the halves of bytes 8–11 and what is left of the first eight.
#[inline(always)]
pub(super) fn q4_k_scales(bytes: &[u8; Q4_K_SCALES]) -> ([[u8; TILE]; 8], [[u8; TILE]; 8]) {
    let bytes = bytes.as_chunks::<TILE>().0;
    let (mut scales, mut minima) = ([[0; TILE]; 8], [[0; TILE]; 8]);
    for part in 0..4 {
        for lane in 0..TILE {
            scales[part][lane] = bytes[part][lane] & 63;
            minima[part][lane] = bytes[part + 4][lane] & 63;
        }
        for lane in 0..TILE {
            scales[part + 4][lane] = bytes[part + 8][lane] & 15 | bytes[part][lane] >> 6 << 4;
            minima[part + 4][lane] = bytes[part + 8][lane] >> 4 | bytes[part + 4][lane] >> 6 << 4;
        }
    }
    (scales, minima)
}

/// Twice what the codes of MXFP4 stand for, and 12 more, so that none is negative.
#[inline(always)]
pub(super) fn mxfp4_table() -> [u8; 16] {
    [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0]
}
