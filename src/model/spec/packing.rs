//! Packed matrices: which format a checkpoint's layers are in, and the tensors that such a layer is made of.
//!
//! A layer that would have the tensor `<name>.weight` has some others in place of it. Which layers are packed and which
//! were left as they were, the tensors say: the router of a mixture and the output head are floating point numbers as a
//! rule. [`PackingSpec::except`] serves to tell how much memory a block will take, before any tensor is there to look at.

use serde::Serialize;

use super::{TensorSpec, Values};

/// How the layers of a checkpoint are packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct PackingSpec {
    /// The format.
    pub format: Packing,
    /// Names, or parts of names between dots, of layers that are said to be floating point numbers.
    #[serde(skip)]
    pub except: Vec<String>,
}

/// Formats of packed matrices. In all of them a number stands for `scale · (q − zero)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Numbers of 8 bits (E4M3): `<name>.weight`, `[outputs, inputs]`, and `<name>.weight_scale_inv` or
    /// `<name>.weight_scale`, which is multiplied by in spite of the first one's name.
    Fp8 {
        /// Rows and columns that share a scale; `None` where the scale's shape says it: one for all, or one a row.
        tile: Option<[usize; 2]>,
    },
    /// GPTQ (Frantar et al. 2022) as AutoGPTQ and GPTQModel write it: words of 32 bits along the inputs in
    /// `<name>.qweight`, `[inputs · bits / 32, outputs]`; `<name>.qzeros`, `[groups, outputs · bits / 32]`;
    /// `<name>.scales`, `[groups, outputs]`; and the group of each input in `<name>.g_idx`, `[inputs]`.
    Gptq {
        /// Of a number: 4 or 8.
        bits: usize,
        /// Inputs that share a scale and a zero; all of them if `None`.
        group: Option<usize>,
        /// Whether the groups were made in the order of the inputs' importance, so that `g_idx` is needed.
        act_order: bool,
        /// Whether zeros are stored less one, as in all but the second version of the format.
        zeros_less_one: bool,
    },
    /// AWQ (Lin et al. 2023), the layout that AutoAWQ calls GEMM: words of eight numbers along the outputs in
    /// `<name>.qweight`, `[inputs, outputs / 8]`; `<name>.qzeros`, `[groups, outputs / 8]`; `<name>.scales`,
    /// `[groups, outputs]`.
    Awq {
        /// Inputs that share a scale and a zero; all of them if `None`.
        group: Option<usize>,
    },
    /// The layout that compressed-tensors calls pack-quantized: words of 32 bits along the inputs in
    /// `<name>.weight_packed`, `[outputs, inputs · bits / 32]`; `<name>.weight_scale`, `[outputs, groups]`; and where there
    /// are zeros `<name>.weight_zero_point`, `[outputs · bits / 32, groups]`.
    RowWords {
        /// Of a number: 4 or 8.
        bits: usize,
        /// Inputs that share a scale and a zero; all of them if `None`.
        group: Option<usize>,
        /// Whether there are zeros; otherwise the middle of the numbers is the zero.
        zeros: bool,
        /// Whether `<name>.weight_g_idx`, `[inputs]`, says which group an input is in.
        act_order: bool,
    },
}

/// Bits of the words that hold packed integers.
pub(crate) const WORD_BITS: usize = 32;

/// Numbers of a word of AWQ.
pub(crate) const AWQ_PER_WORD: usize = WORD_BITS / 4;

impl PackingSpec {
    /// Whether the layer `name` is said not to be packed.
    fn excepts(&self, name: &str) -> bool {
        let found = |part: &String| {
            name.match_indices(part.as_str()).any(|(start, part)| {
                let end = start + part.len();
                (start == 0 || name.as_bytes()[start - 1] == b'.')
                    && (end == name.len() || name.as_bytes()[end] == b'.')
            })
        };
        self.except.iter().filter(|part| !part.is_empty()).any(found)
    }

    /// The tensors of the matrix `weight`, `[outputs, inputs]`, if it is packed, and the one it is if not.
    pub(super) fn push_tensors(&self, weight: &str, [outputs, inputs]: [usize; 2], tensors: &mut Vec<TensorSpec>) {
        let Some(name) = weight.strip_suffix(".weight") else {
            return tensors.push(TensorSpec::floats(weight, &[outputs, inputs]));
        };
        let floats = self.excepts(name);
        // Of a layer that may be either, only what is expected counts where memory is planned.
        let mut push = |suffix: &str, shape: &[usize], bytes: usize| {
            let values = if floats { Values::Otherwise } else { Values::Packed { bytes } };
            tensors.push(TensorSpec { name: format!("{name}.{suffix}"), shape: shape.to_vec(), values });
        };
        let groups = |group: Option<usize>| inputs.div_ceil(group.unwrap_or(inputs));
        match self.format {
            Packing::Fp8 { tile } => {
                let scales = match tile {
                    Some([rows, columns]) => vec![outputs.div_ceil(rows), inputs.div_ceil(columns)],
                    None => vec![outputs, 1],
                };
                if !floats {
                    push("weight", &[outputs, inputs], 1);
                }
                push("weight_scale_inv", &scales, size_of::<f32>());
            }
            Packing::Gptq { bits, group, act_order, .. } => {
                let per_word = WORD_BITS / bits;
                push("qweight", &[inputs.div_ceil(per_word), outputs], size_of::<u32>());
                // A zero has two bytes in memory.
                push("qzeros", &[groups(group), outputs.div_ceil(per_word)], per_word * size_of::<u16>());
                push("scales", &[groups(group), outputs], size_of::<u16>());
                push("g_idx", &[inputs], if act_order { size_of::<u32>() } else { 0 });
            }
            Packing::Awq { group } => {
                let words = outputs.div_ceil(AWQ_PER_WORD);
                push("qweight", &[inputs, words], size_of::<u32>());
                push("qzeros", &[groups(group), words], AWQ_PER_WORD * size_of::<u16>());
                push("scales", &[groups(group), outputs], size_of::<u16>());
            }
            Packing::RowWords { bits, group, zeros, act_order } => {
                let per_word = WORD_BITS / bits;
                push("weight_packed", &[outputs, inputs.div_ceil(per_word)], size_of::<u32>());
                push("weight_scale", &[outputs, groups(group)], 2 * size_of::<u16>());
                if zeros {
                    push("weight_zero_point", &[outputs.div_ceil(per_word), groups(group)], 0);
                }
                if act_order {
                    push("weight_g_idx", &[inputs], size_of::<u32>());
                }
            }
        }
        match (self.format, floats) {
            (_, true) => tensors.push(TensorSpec::floats(weight, &[outputs, inputs])),
            (Packing::Fp8 { .. }, false) => tensors.push(TensorSpec {
                name: format!("{name}.weight_scale"),
                shape: vec![outputs, 1],
                values: Values::Otherwise,
            }),
            (_, false) => tensors.push(TensorSpec {
                name: weight.to_owned(),
                shape: vec![outputs, inputs],
                values: Values::Otherwise,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_are_whole_parts_of_names() {
        let packing = PackingSpec {
            format: Packing::Awq { group: Some(128) },
            except: ["model.layers.1", "mlp.gate", "lm_head", ""].map(str::to_owned).into(),
        };
        for (name, excepted) in [
            ("model.layers.1.mlp.up_proj", true),
            ("model.layers.10.mlp.up_proj", false),
            ("model.layers.4.mlp.gate", true),
            ("model.layers.4.mlp.gate_proj", false),
            ("model.language_model.lm_head", true),
        ] {
            assert_eq!(packing.excepts(name), excepted, "{name}");
        }
    }
}
