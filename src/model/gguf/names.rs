//! What the tensors of a model are called in GGUF files.
//!
//! GGUF names tensors by their part in the model, alike in all architectures: `blk.3.attn_q.weight` is the query matrix of
//! block 3 in each of them. So there is no table from one spelling to the other: the names in a [`ModelSpec`] are replaced
//! by walking through it. Where matrices are stored as one, the rows are found here too: the converter lays queries, keys
//! and values one below the other, whatever the order on the hub. A bias is where the file has one.

use std::collections::HashSet;

use super::tensors::{Interleaved, Tensors};
use crate::model::spec::{
    BlockSpec, ExpertTensors, ExpertsSpec, FfnSpec, HeadSpec, LinearSpec, ModelSpec, NormSpec, RowsSpec,
};

/// The architecture whose query and key rows the converter reorders.
const INTERLEAVED: &str = "llama";
/// Tensors that hold what can be computed, or what the configuration is read from.
const NOT_WEIGHTS: [&str; 4] =
    ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd"];

/// Gives the tensors of `spec` the names that they have among `tensors`.
pub(super) fn rename(spec: &mut ModelSpec, tensors: &Tensors) {
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        Block { index, tensors }.rename(block);
    }
    let names = Block { index: 0, tensors };
    let edges = &mut spec.edges;
    edges.embedding = "token_embd.weight".into();
    rename_norm(&mut edges.final_norm, "output_norm");
    if let Some(norm) = &mut edges.embedding_norm {
        rename_norm(norm, "token_embd_norm");
    }
    if let HeadSpec::Separate(head) = &mut edges.head {
        let tied = !tensors.has("output.weight");
        names.set(head, "output");
        if tied {
            head.weight.clone_from(&edges.embedding);
        }
    }
}

/// Brings the rows of query and key matrices into the engine's order, where the converter has changed it.
pub(super) fn interleave(spec: &ModelSpec, architecture: &str, tensors: &mut Tensors) {
    if architecture != INTERLEAVED {
        return;
    }
    for block in &spec.blocks {
        let attention = &block.attention;
        let head_size = attention.head_size;
        let fused = attention.q.weight == attention.k.weight;
        for part in [&attention.q, &attention.k] {
            let rows = if fused { attention.q.outputs + attention.k.outputs } else { part.outputs };
            for name in [Some(&part.weight), part.bias.as_ref()].into_iter().flatten() {
                tensors.interleave(name.clone(), Interleaved { rows, head_size });
            }
        }
    }
}

/// The name of a tensor that `spec` makes no use of, if there is one.
pub(super) fn unused<'a>(spec: &ModelSpec, tensors: &'a Tensors) -> Option<&'a str> {
    let of_blocks = (0..spec.num_blocks()).flat_map(|index| spec.block_tensors(index));
    let mut used = HashSet::new();
    for tensor in of_blocks.chain(spec.edge_tensors()) {
        // Entries of one tensor are used together.
        used.insert(tensor.name.split('[').next().unwrap_or_default().to_owned());
    }
    let known = |name: &str| used.contains(name) || NOT_WEIGHTS.iter().any(|other| name.contains(other));
    tensors.names().filter(|name| !known(name)).min()
}

/// The names of a block.
struct Block<'a> {
    index: usize,
    tensors: &'a Tensors,
}

impl Block<'_> {
    fn name(&self, part: &str) -> String {
        format!("blk.{}.{part}", self.index)
    }

    fn has(&self, part: &str) -> bool {
        self.tensors.has(&format!("{}.weight", self.name(part)))
    }

    fn rename(&self, block: &mut BlockSpec) {
        self.rename_norms(block);
        let attention = &mut block.attention;
        if self.has("attn_qkv") {
            self.set_rows(&self.name("attn_qkv"), [&mut attention.q, &mut attention.k, &mut attention.v]);
        } else {
            for (part, name) in
                [(&mut attention.q, "attn_q"), (&mut attention.k, "attn_k"), (&mut attention.v, "attn_v")]
            {
                self.set(part, &self.name(name));
            }
        }
        self.set(&mut attention.o, &self.name("attn_output"));
        if let Some(norms) = &mut attention.qk_norm {
            rename_norm(&mut norms.q, &self.name("attn_q_norm"));
            rename_norm(&mut norms.k, &self.name("attn_k_norm"));
        }
        if attention.sinks.is_some() {
            attention.sinks = Some(self.name("attn_sinks.weight"));
        }
        match &mut block.ffn {
            FfnSpec::Gated { gate, up, down, .. } => {
                if self.has("ffn_gate") {
                    self.set(gate, &self.name("ffn_gate"));
                    self.set(up, &self.name("ffn_up"));
                } else {
                    self.set_rows(&self.name("ffn_up"), [gate, up]);
                }
                self.set(down, &self.name("ffn_down"));
            }
            FfnSpec::Plain { up, down, .. } => {
                self.set(up, &self.name("ffn_up"));
                self.set(down, &self.name("ffn_down"));
            }
            FfnSpec::Experts(experts) => self.rename_experts(experts),
        }
    }

    fn rename_norms(&self, block: &mut BlockSpec) {
        let shared = block.attention_norm.weight == block.ffn_norm.weight;
        if shared {
            rename_norm(&mut block.attention_norm, &self.name("attn_norm"));
            block.ffn_norm = block.attention_norm.clone();
        } else if self.has("attn_norm_2") {
            // Falcon's two, of which the second is attention's.
            rename_norm(&mut block.attention_norm, &self.name("attn_norm_2"));
            rename_norm(&mut block.ffn_norm, &self.name("attn_norm"));
        } else {
            rename_norm(&mut block.attention_norm, &self.name("attn_norm"));
            // Where nothing is behind attention, the norm in front of the other part may be called by its place behind it.
            let only = block.attention_output_norm.is_none() && !self.has("ffn_norm");
            rename_norm(&mut block.ffn_norm, &self.name(if only { "post_attention_norm" } else { "ffn_norm" }));
        }
        if let Some(norm) = &mut block.attention_output_norm {
            rename_norm(norm, &self.name("post_attention_norm"));
        }
        if let Some(norm) = &mut block.ffn_output_norm {
            rename_norm(norm, &self.name("post_ffw_norm"));
        }
    }

    fn rename_experts(&self, experts: &mut ExpertsSpec) {
        self.set(&mut experts.router, &self.name("ffn_gate_inp"));
        // The first files had a tensor an expert.
        let stacked = self.has("ffn_gate_exps");
        let weight = |part: &str| {
            if stacked {
                self.name(&format!("{part}_exps.weight[{{}}]"))
            } else {
                self.name(&format!("{part}.{{}}.weight"))
            }
        };
        let bias = |part: &str| self.name(&format!("{part}_exps.bias[{{}}]"));
        let biases = self.tensors.has(&self.name("ffn_gate_exps.bias"));
        experts.tensors = ExpertTensors::Separate {
            gate: weight("ffn_gate"),
            up: weight("ffn_up"),
            down: weight("ffn_down"),
            biases: biases.then(|| ["ffn_gate", "ffn_up", "ffn_down"].map(bias)),
        };
    }

    /// Makes `part` the matrix of that name.
    fn set(&self, part: &mut LinearSpec, name: &str) {
        part.weight = format!("{name}.weight");
        part.bias = Some(format!("{name}.bias")).filter(|bias| self.tensors.has(bias));
        part.rows = None;
    }

    /// Makes the parts rows of the matrix of that name, one below the other.
    fn set_rows<const N: usize>(&self, name: &str, parts: [&mut LinearSpec; N]) {
        let of = parts.iter().map(|part| part.outputs).sum();
        let mut first = 0;
        for part in parts {
            self.set(part, name);
            part.rows = Some(RowsSpec { of, first, run: part.outputs, stride: part.outputs });
            first += part.outputs;
        }
    }
}

fn rename_norm(norm: &mut NormSpec, name: &str) {
    norm.weight = format!("{name}.weight");
    if let Some(bias) = &mut norm.bias {
        *bias = format!("{name}.bias");
    }
}
