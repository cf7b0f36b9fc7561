//! What matrices are kept in: the `--quant` and `--head-quant` of the command line.

use std::{fmt, str::FromStr};

use super::checkpoint::BlockFormat;

/// What the matrices of a span, or of the edges, are kept in. Norms, biases, sinks and routers, which are small and
/// sensitive, stay floating point numbers in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Quant {
    /// Each as the checkpoint has it: a packed matrix stays packed.
    #[default]
    Auto,
    /// Floating point numbers; what is packed in the checkpoint is widened.
    None,
    /// 8.5 bits a number.
    Q8_0,
    /// 4.5 bits a number, in blocks of 32.
    Q4_0,
    /// 4.5 bits a number, in blocks of 256.
    Q4K,
    /// 6.5625 bits a number, in blocks of 256.
    Q6K,
}

impl Quant {
    /// All of them, as users see them.
    pub const ALL: [Self; 6] = [Self::Auto, Self::None, Self::Q8_0, Self::Q4_0, Self::Q4K, Self::Q6K];

    /// The blocks that this asks for, whatever the matrix.
    pub fn format(self) -> Option<BlockFormat> {
        match self {
            Self::Auto | Self::None => None,
            Self::Q8_0 => Some(BlockFormat::Q8_0),
            Self::Q4_0 => Some(BlockFormat::Q4_0),
            Self::Q4K => Some(BlockFormat::Q4K),
            Self::Q6K => Some(BlockFormat::Q6K),
        }
    }

    /// The blocks that a matrix of `columns` columns is put in: those asked for, or the nearest whose numbers divide the
    /// columns (`q4_k` becomes `q4_0` and `q6_k` becomes `q8_0`, as in llama.cpp). `None`: it stays in floating point.
    pub fn format_for(self, columns: usize) -> Option<BlockFormat> {
        let asked = self.format()?;
        let nearest = match asked {
            BlockFormat::Q4K => BlockFormat::Q4_0,
            BlockFormat::Q6K => BlockFormat::Q8_0,
            other => other,
        };
        [asked, nearest].into_iter().find(|format| columns.is_multiple_of(format.numbers()))
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4K => "q4_k",
            Self::Q6K => "q6_k",
        })
    }
}

/// The text names no [`Quant`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown quantization {0:?}: the choices are auto, none, q8_0, q4_0, q4_k and q6_k")]
pub struct UnknownQuant(String);

impl FromStr for Quant {
    type Err = UnknownQuant;

    fn from_str(text: &str) -> Result<Self, UnknownQuant> {
        let known = Self::ALL.into_iter().find(|quant| quant.to_string() == text);
        known.ok_or_else(|| UnknownQuant(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for quant in Quant::ALL {
            assert_eq!(quant.to_string().parse(), Ok(quant));
        }
        let error = "q3_k".parse::<Quant>().unwrap_err().to_string();
        assert!(error.contains("q3_k") && error.contains("q4_k"), "{error}");
    }

    #[test]
    fn narrow_matrices_are_put_in_smaller_blocks_or_none() {
        assert_eq!(Quant::Q4K.format_for(512), Some(BlockFormat::Q4K));
        assert_eq!(Quant::Q4K.format_for(2880), Some(BlockFormat::Q4_0));
        assert_eq!(Quant::Q6K.format_for(64), Some(BlockFormat::Q8_0));
        assert_eq!(Quant::Q8_0.format_for(36), None);
        assert_eq!(Quant::Auto.format_for(512), None);
    }
}
