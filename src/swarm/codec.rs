//! How hidden states are packed on the wire.
//!
//! As they are, as a rule: in the session's dtype, in which the residual is rounded after every block anyway, so that the wire
//! costs nothing. Where a link is narrow a session may ask for [`WireCodec::Q8`], which takes 34 bytes for 32 numbers (53% of
//! bf16, 27% of f32) and loses some of what they say: its results are not those of one machine. A node announces the lossy codecs
//! that it speaks, and the tickets say which one counts.

use std::{fmt, str::FromStr};

use bytes::Bytes;
use half::{bf16, f16};

use super::proto::announcement as wire;
use crate::model::Dtype;

/// Numbers that share a scale.
const BLOCK: usize = 32;
/// Bytes of a scale, a bf16: it has the range of an f32, as residuals need.
const SCALE_BYTES: usize = 2;

/// A way to pack hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WireCodec {
    /// As they are.
    #[default]
    Raw,
    /// 8-bit blockwise: 32 consecutive numbers of a row as one scale (bf16, the block's largest magnitude ÷ 127, rounded up) and a
    /// signed byte each. A number is off by a 253rd of the block's largest at the most.
    Q8,
}

/// A packed tensor can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{got} bytes, and {rows} rows of {hidden} in {dtype}, packed as {codec}, are {expected}")]
pub struct WrongLength {
    got: usize,
    expected: usize,
    rows: usize,
    hidden: usize,
    dtype: Dtype,
    codec: WireCodec,
}

/// The text names no [`WireCodec`].
#[derive(Debug, thiserror::Error)]
#[error("unknown wire codec {0:?}: the choices are raw and q8")]
pub struct UnknownCodec(String);

impl WireCodec {
    /// Those that a node has to announce, since not all versions speak them.
    pub const LOSSY: [Self; 1] = [Self::Q8];

    /// Whether what comes out is what went in.
    pub fn is_lossless(self) -> bool {
        self == Self::Raw
    }

    /// Bytes of a packed row of `hidden` numbers.
    pub fn row_bytes(self, dtype: Dtype, hidden: usize) -> usize {
        match self {
            Self::Raw => hidden.saturating_mul(dtype.size_in_bytes()),
            Self::Q8 => hidden.saturating_add(SCALE_BYTES * hidden.div_ceil(BLOCK)),
        }
    }

    /// Packs rows of `hidden` numbers. Each row is packed for itself, so that it doesn't matter which others go with it.
    pub fn encode(self, dtype: Dtype, hidden: usize, states: Bytes) -> Bytes {
        if self.is_lossless() {
            return states;
        }
        let width = dtype.size_in_bytes();
        let mut packed =
            Vec::with_capacity(states.len() / width + states.len() / (width * BLOCK / SCALE_BYTES) + BLOCK);
        for row in states.chunks_exact(hidden.max(1) * width) {
            for block in row.chunks(BLOCK * width) {
                pack(dtype, block, &mut packed);
            }
        }
        packed.into()
    }

    /// Unpacks what [`WireCodec::encode`] packed, or a stranger says it did.
    ///
    /// # Errors
    /// Where the length is wrong. Numbers that are not finite come out as such, and are for whoever computes with them to refuse.
    pub fn decode(self, dtype: Dtype, (rows, hidden): (usize, usize), packed: Bytes) -> Result<Bytes, WrongLength> {
        let expected = rows.saturating_mul(self.row_bytes(dtype, hidden));
        if packed.len() != expected {
            return Err(WrongLength { got: packed.len(), expected, rows, hidden, dtype, codec: self });
        }
        if self.is_lossless() {
            return Ok(packed);
        }
        let mut states = Vec::with_capacity(rows * hidden * dtype.size_in_bytes());
        for row in packed.chunks_exact(self.row_bytes(dtype, hidden).max(1)) {
            for block in row.chunks(SCALE_BYTES + BLOCK) {
                unpack(dtype, block, &mut states);
            }
        }
        Ok(states.into())
    }
}

fn pack(dtype: Dtype, block: &[u8], packed: &mut Vec<u8>) {
    let mut values = [0f32; BLOCK];
    let count = block.len() / dtype.size_in_bytes();
    for (value, bytes) in values.iter_mut().zip(block.chunks_exact(dtype.size_in_bytes())) {
        *value = match (dtype, bytes) {
            (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Dtype::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            _ => 0.0, // chunks have the size that was asked for
        };
    }
    let largest = values[..count].iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let exact = largest / 127.0;
    let mut scale = bf16::from_f32(exact);
    if scale.to_f32() < exact {
        scale = bf16::from_bits(scale.to_bits() + 1); // the next larger one: no number is cut
    }
    packed.extend_from_slice(&scale.to_le_bytes());
    let scale = scale.to_f32();
    packed.extend(values[..count].iter().map(|value| {
        let steps = if scale > 0.0 { (value / scale).round() } else { 0.0 };
        (steps.clamp(-127.0, 127.0) as i8).to_le_bytes()[0]
    }));
}

fn unpack(dtype: Dtype, block: &[u8], states: &mut Vec<u8>) {
    let Some((&[low, high], steps)) = block.split_first_chunk::<SCALE_BYTES>() else { return };
    let scale = bf16::from_le_bytes([low, high]).to_f32();
    for step in steps {
        let value = f32::from(i8::from_le_bytes([*step])) * scale;
        match dtype {
            Dtype::F32 => states.extend_from_slice(&value.to_le_bytes()),
            Dtype::Bf16 => states.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
            Dtype::F16 => states.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
        }
    }
}

impl fmt::Display for WireCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Q8 => "q8",
        })
    }
}

impl FromStr for WireCodec {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        match text {
            "raw" => Ok(Self::Raw),
            "q8" => Ok(Self::Q8),
            other => Err(UnknownCodec(other.to_owned())),
        }
    }
}

impl From<WireCodec> for wire::WireCodec {
    fn from(codec: WireCodec) -> Self {
        match codec {
            WireCodec::Raw => Self::Raw,
            WireCodec::Q8 => Self::Q8,
        }
    }
}

impl From<wire::WireCodec> for WireCodec {
    fn from(codec: wire::WireCodec) -> Self {
        match codec {
            wire::WireCodec::Raw => Self::Raw,
            wire::WireCodec::Q8 => Self::Q8,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(dtype: Dtype, values: &[f32]) -> Bytes {
        let one = |value: &f32| match dtype {
            Dtype::F32 => value.to_le_bytes().to_vec(),
            Dtype::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(one).collect::<Vec<u8>>().into()
    }

    fn values(bytes: &Bytes) -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    #[test]
    fn raw_is_what_it_was() {
        let states = bytes(Dtype::Bf16, &[1.0, -2.0, 3.5, 4.0]);
        let packed = WireCodec::Raw.encode(Dtype::Bf16, 2, states.clone());
        assert_eq!(WireCodec::Raw.decode(Dtype::Bf16, (2, 2), packed).unwrap(), states);
        assert!(WireCodec::Raw.decode(Dtype::Bf16, (3, 2), states).is_err());
    }

    #[test]
    fn a_packed_row_has_the_size_that_is_said() {
        for (hidden, expected) in [(64, 68), (33, 37), (1, 3), (4096, 4352)] {
            assert_eq!(WireCodec::Q8.row_bytes(Dtype::Bf16, hidden), expected);
            for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
                let packed = WireCodec::Q8.encode(dtype, hidden, bytes(dtype, &vec![0.5; 3 * hidden]));
                assert_eq!(packed.len(), 3 * expected);
                let states = WireCodec::Q8.decode(dtype, (3, hidden), packed.clone()).unwrap();
                assert_eq!(states.len(), 3 * hidden * dtype.size_in_bytes());
                assert!(WireCodec::Q8.decode(dtype, (3, hidden + 1), packed.clone()).is_err());
                assert!(WireCodec::Q8.decode(dtype, (usize::MAX, hidden), packed).is_err());
            }
        }
    }

    #[test]
    fn the_text_is_the_name() {
        for codec in [WireCodec::Raw, WireCodec::Q8] {
            assert_eq!(codec.to_string().parse::<WireCodec>().unwrap(), codec);
        }
        assert!("q4".parse::<WireCodec>().unwrap_err().to_string().contains("raw and q8"));
    }

    /// The figures that the README states: nearly normal rows, and such in which one number in 500 is a hundred times as large.
    #[test]
    fn the_error_of_q8_is_what_the_readme_says() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let normal: Vec<f32> = (0..64 * 1024).map(|_| (0..12).map(|_| next()).sum::<f32>()).collect();
        let spiked: Vec<f32> =
            normal.iter().enumerate().map(|(at, value)| if at % 500 == 0 { value * 100.0 } else { *value }).collect();
        for (rows, most) in [(normal, 0.006), (spiked, 0.014)] {
            let packed = WireCodec::Q8.encode(Dtype::F32, 1024, bytes(Dtype::F32, &rows));
            let back = values(&WireCodec::Q8.decode(Dtype::F32, (64, 1024), packed).unwrap());
            let (error, power) = rows.iter().zip(&back).fold((0.0, 0.0), |(error, power), (was, is)| {
                (error + f64::from(was - is).powi(2), power + f64::from(*was).powi(2))
            });
            let relative = (error / power).sqrt();
            eprintln!("relative error of q8: {relative:.5}");
            assert!(relative < most, "{relative}");
        }
    }

    proptest! {
        #[test]
        fn no_number_is_off_by_more_than_a_253rd_of_its_blocks_largest(
            row in proptest::collection::vec(-1e6f32..1e6, 1..100), shift in -30i32..30,
        ) {
            let row: Vec<f32> = row.into_iter().map(|value| value * 2f32.powi(shift)).collect();
            let packed = WireCodec::Q8.encode(Dtype::F32, row.len(), bytes(Dtype::F32, &row));
            let back = values(&WireCodec::Q8.decode(Dtype::F32, (1, row.len()), packed).unwrap());
            for (was, is) in row.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                let largest = was.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                prop_assert!(was.iter().zip(is).all(|(was, is)| (was - is).abs() <= largest / 252.0));
            }
        }

        #[test]
        fn whatever_a_stranger_sends_is_read_or_refused(packed in proptest::collection::vec(any::<u8>(), 0..200), rows in 0usize..5, hidden in 0usize..70) {
            let _ = WireCodec::Q8.decode(Dtype::Bf16, (rows, hidden), packed.into());
        }
    }
}
