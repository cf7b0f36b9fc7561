//! Packed experts: products of GGML's blocks, each with the rows that chose it.

use candle_core::{Result as TensorResult, Tensor};

use super::super::{ffn::Gate, linear::Linear, upload::Upload};
use crate::{
    engine::{load::LoadError, tensor},
    model::{
        checkpoint::StoredMatrix,
        spec::{ExpertTensors, ExpertsSpec, LinearSpec, MXFP4_GROUP, StackedFormat, expert_name},
    },
};

/// An expert.
pub(super) struct Packed {
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

/// The experts, if they are to be packed on the device: in the checkpoint's own blocks, or in those that were asked for.
pub(super) fn load(
    spec: &ExpertsSpec,
    hidden: usize,
    upload: &mut Upload<'_, '_>,
) -> Result<Option<Vec<Packed>>, LoadError> {
    match &spec.tensors {
        ExpertTensors::Separate { gate, up, down, biases } => {
            let parts = |expert: usize| {
                let part = |index: usize, name: &str, outputs: usize, inputs: usize| LinearSpec {
                    weight: expert_name(name, expert),
                    bias: biases.as_ref().map(|biases| expert_name(&biases[index], expert)),
                    outputs,
                    inputs,
                    rows: None,
                };
                let inner = spec.intermediate;
                [part(0, gate, inner, hidden), part(1, up, inner, hidden), part(2, down, hidden, inner)]
            };
            let mut are_packed = false;
            for part in &parts(0) {
                are_packed |= upload.keeps_packed(&upload.stored(part)?);
            }
            if !are_packed {
                return Ok(None);
            }
            let expert = |expert| {
                let [gate, up, down] = parts(expert);
                Ok(Packed { gate_up: upload.linear(&[&gate, &up])?, down: upload.linear(&[&down])? })
            };
            (0..spec.count).map(expert).collect::<Result<_, LoadError>>().map(Some)
        }
        ExpertTensors::Stacked { gate_up, gate_up_bias, down, down_bias, format } => {
            // As they are stored, no product takes them.
            if [hidden, spec.intermediate].iter().all(|inputs| !upload.packs(*inputs)) {
                return Ok(None);
            }
            let gate_up =
                Stacked { name: gate_up, bias: gate_up_bias, shape: [spec.count, 2 * spec.intermediate, hidden] };
            let down = Stacked { name: down, bias: down_bias, shape: [spec.count, hidden, spec.intermediate] };
            let experts = gate_up.load(*format, upload)?.into_iter().zip(down.load(*format, upload)?);
            Ok(Some(experts.map(|(gate_up, down)| Packed { gate_up, down }).collect()))
        }
    }
}

/// The same matrix of all experts in one tensor.
struct Stacked<'a> {
    name: &'a str,
    bias: &'a str,
    /// Experts, outputs, inputs.
    shape: [usize; 3],
}

impl Stacked<'_> {
    fn load(&self, format: StackedFormat, upload: &mut Upload<'_, '_>) -> Result<Vec<Linear>, LoadError> {
        let [count, outputs, inputs] = self.shape;
        let biases = upload.vector_of(self.bias, &[count, outputs])?;
        let matrices: Vec<StoredMatrix> = match format {
            StackedFormat::Mxfp4 => upload.mxfp4(self.name, [count, outputs, inputs / MXFP4_GROUP])?,
            StackedFormat::Transposed => {
                let read = |expert| {
                    let data = upload.entry(self.name, expert, &[count, inputs, outputs])?;
                    Ok(StoredMatrix::Floats(tensor::transposed(&data, inputs, outputs)))
                };
                (0..count).map(read).collect::<Result<_, LoadError>>()?
            }
        };
        let linear = |(expert, stored)| upload.linear_of(self.name, stored, Some(biases.get(expert)?));
        matrices.into_iter().enumerate().map(linear).collect()
    }
}

/// `x`, `[rows, hidden]`, through the experts that its rows have chosen: `route` is their numbers and their weights,
/// `[rows, active]` both.
pub(super) fn forward(experts: &[Packed], gate: &Gate, x: &Tensor, route: [&Tensor; 2]) -> TensorResult<Tensor> {
    let [ids, weights] = route;
    let active = ids.dim(1)?;
    let weights = weights.flatten_all()?.unsqueeze(1)?;
    // Of each expert, its places among all choices, row by row.
    let mut members: Vec<Vec<u32>> = vec![Vec::new(); experts.len()];
    for (place, expert) in ids.flatten_all()?.to_vec1::<u32>()?.into_iter().enumerate() {
        members[expert as usize].push(place as u32);
    }
    let mut sum = x.zeros_like()?;
    for (expert, places) in experts.iter().zip(members).filter(|(_, places)| !places.is_empty()) {
        let rows = Tensor::from_iter(places.iter().map(|place| place / active as u32), x.device())?;
        let inner = gate.forward(&expert.gate_up.forward(&x.index_select(&rows, 0)?)?)?;
        let weights = weights.index_select(&Tensor::new(places, x.device())?, 0)?;
        sum = sum.index_add(&rows, &expert.down.forward(&inner)?.broadcast_mul(&weights)?, 0)?;
    }
    Ok(sum)
}
