//! Which tensors a model is made of, with their shapes: what a node needs to read, and how much memory it will take.

use std::{collections::HashSet, ops::Range};

use super::{
    AttentionSpec, BlockSpec, ExpertTensors, ExpertsSpec, FfnSpec, LinearSpec, NormSpec, PackingSpec, RowsSpec,
    StackedFormat,
};

/// A tensor that a part of the model is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, with the `model.` prefix where Hugging Face's causal models have one.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it is made of.
    pub values: Values,
}

/// What a tensor is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Floating point numbers, which are loaded in the engine's dtype.
    Floats,
    /// Bytes of a quantized matrix, which are kept as they are.
    Bytes,
    /// What a packed matrix is made of.
    Packed {
        /// What one of the tensor's values takes in memory.
        bytes: usize,
    },
    /// What the checkpoint has in place of others in this list, where a layer is not packed as the rest are.
    Otherwise,
}

impl TensorSpec {
    pub(super) fn floats(name: &str, shape: &[usize]) -> Self {
        Self { name: name.to_owned(), shape: shape.to_vec(), values: Values::Floats }
    }

    fn bytes(name: String, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec(), values: Values::Bytes }
    }

    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Every tensor once: matrices that are rows of one tensor name it each.
pub(super) fn without_repetitions(tensors: Vec<TensorSpec>) -> Vec<TensorSpec> {
    let mut names = HashSet::new();
    tensors.into_iter().filter(|tensor| names.insert(tensor.name.clone())).collect()
}

impl BlockSpec {
    /// Rows and columns of the matrices, however they are stored.
    pub(super) fn matrices(&self, hidden: usize) -> impl Iterator<Item = [usize; 2]> {
        let AttentionSpec { q, k, v, o, .. } = &self.attention;
        let shape = |linear: &LinearSpec| [linear.outputs, linear.inputs];
        let ffn = match &self.ffn {
            FfnSpec::Gated { gate, up, down, .. } => vec![shape(gate), shape(up), shape(down)],
            FfnSpec::Plain { up, down, .. } => vec![shape(up), shape(down)],
            FfnSpec::Experts(ExpertsSpec { router, count, intermediate, .. }) => {
                vec![shape(router), [2 * count * intermediate, hidden], [count * hidden, *intermediate]]
            }
        };
        [q, k, v, o].map(shape).into_iter().chain(ffn)
    }

    pub(super) fn tensors(&self, hidden_size: usize, packing: Option<&PackingSpec>) -> Vec<TensorSpec> {
        let attention = &self.attention;
        let mut tensors = Vec::new();
        let output_norms = [&self.attention_output_norm, &self.ffn_output_norm].into_iter().flatten();
        for norm in [&self.attention_norm, &self.ffn_norm].into_iter().chain(output_norms) {
            norm.push_tensors(hidden_size, &mut tensors);
        }
        for linear in [&attention.q, &attention.k, &attention.v, &attention.o] {
            linear.push_tensors(packing, &mut tensors);
        }
        for norm in attention.qk_norm.iter().flat_map(|norms| [&norms.q, &norms.k]) {
            norm.push_tensors(attention.head_size, &mut tensors);
        }
        if let Some(sinks) = &attention.sinks {
            tensors.push(TensorSpec::floats(sinks, &[attention.heads]));
        }
        match &self.ffn {
            FfnSpec::Gated { gate, up, down, .. } => {
                for linear in [gate, up, down] {
                    linear.push_tensors(packing, &mut tensors);
                }
            }
            FfnSpec::Plain { up, down, .. } => {
                for linear in [up, down] {
                    linear.push_tensors(packing, &mut tensors);
                }
            }
            FfnSpec::Experts(experts) => experts.push_tensors(hidden_size, packing, &mut tensors),
        }
        without_repetitions(tensors)
    }
}

/// The tensors of a matrix of the given shape, `[outputs, inputs]`.
fn push_matrix(name: &str, shape: [usize; 2], packing: Option<&PackingSpec>, tensors: &mut Vec<TensorSpec>) {
    match packing {
        Some(packing) => packing.push_tensors(name, shape, tensors),
        None => tensors.push(TensorSpec::floats(name, &shape)),
    }
}

impl NormSpec {
    pub(super) fn push_tensors(&self, width: usize, tensors: &mut Vec<TensorSpec>) {
        tensors.extend(
            [Some(&self.weight), self.bias.as_ref()]
                .into_iter()
                .flatten()
                .map(|name| TensorSpec::floats(name, &[width])),
        );
    }
}

impl LinearSpec {
    /// A matrix of its own: tensors `<name>.weight` and perhaps `<name>.bias`.
    pub fn named(name: &str, outputs: usize, inputs: usize, bias: bool) -> Self {
        let bias = bias.then(|| format!("{name}.bias"));
        Self { weight: format!("{name}.weight"), bias, outputs, inputs, rows: None }
    }

    /// Some rows of the tensors that `self` names.
    #[must_use]
    pub fn rows(&self, first: usize, run: usize, stride: usize, outputs: usize) -> Self {
        let rows = RowsSpec { of: self.outputs, first, run, stride };
        Self { outputs, rows: Some(rows), ..self.clone() }
    }

    /// Rows that the tensors have.
    pub fn stored_rows(&self) -> usize {
        self.rows.map_or(self.outputs, |rows| rows.of)
    }

    pub(super) fn push_tensors(&self, packing: Option<&PackingSpec>, tensors: &mut Vec<TensorSpec>) {
        push_matrix(&self.weight, [self.stored_rows(), self.inputs], packing, tensors);
        tensors.extend(self.bias.iter().map(|bias| TensorSpec::floats(bias, &[self.stored_rows()])));
    }
}

impl RowsSpec {
    /// The runs of a part of `outputs` rows.
    pub fn runs(&self, outputs: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let Self { first, run, stride, .. } = *self;
        (0..outputs / run).map(move |index| first + index * stride..first + index * stride + run)
    }
}

impl ExpertsSpec {
    pub(super) fn push_tensors(&self, hidden: usize, packing: Option<&PackingSpec>, tensors: &mut Vec<TensorSpec>) {
        self.router.push_tensors(packing, tensors);
        let Self { count, intermediate: inner, .. } = *self;
        match &self.tensors {
            ExpertTensors::Separate { gate, up, down, biases } => {
                for expert in 0..count {
                    for (name, shape) in [(gate, [inner, hidden]), (up, [inner, hidden]), (down, [hidden, inner])] {
                        push_matrix(&expert_name(name, expert), shape, packing, tensors);
                    }
                    for (name, width) in biases.iter().flatten().zip([inner, inner, hidden]) {
                        tensors.push(TensorSpec::floats(&expert_name(name, expert), &[width]));
                    }
                }
            }
            ExpertTensors::Stacked { gate_up, gate_up_bias, down, down_bias, format } => {
                tensors.push(TensorSpec::floats(gate_up_bias, &[count, 2 * inner]));
                tensors.push(TensorSpec::floats(down_bias, &[count, hidden]));
                for (name, outputs, inputs) in [(gate_up, 2 * inner, hidden), (down, hidden, inner)] {
                    match format {
                        StackedFormat::Transposed => {
                            tensors.push(TensorSpec::floats(name, &[count, inputs, outputs]));
                        }
                        StackedFormat::Mxfp4 => {
                            let groups = inputs / MXFP4_GROUP;
                            let shape = [count, outputs, groups, MXFP4_GROUP / 2];
                            tensors.push(TensorSpec::bytes(format!("{name}_blocks"), &shape));
                            tensors.push(TensorSpec::bytes(format!("{name}_scales"), &shape[..3]));
                        }
                    }
                }
            }
        }
    }
}

/// Numbers that share a scale in MXFP4.
pub const MXFP4_GROUP: usize = 32;

/// The name of an expert's tensor.
pub(crate) fn expert_name(pattern: &str, expert: usize) -> String {
    pattern.replacen("{}", &expert.to_string(), 1)
}
