//! Attention of ragged rows over paged keys and values, on a device.
//!
//! Keys and values lie in planes `[tokens of all pages, kv_heads, head_size]` in the engine's dtype. A pass writes those of
//! all its rows with one scatter each. Then it attends group by group: a group's rows have one shape, its lanes' pages are
//! gathered next to each other, and its scores are one batched product (`engine/cuda/plan.rs` says who is in which
//! group). Scores, softmax and sums are in f32: a score of 50 in bf16 would be off by an eighth.

use candle_core::{D, DType, Result as TensorResult, Tensor};
use candle_nn::{ops::softmax_last_dim, rotary_emb::rope_thd};

use super::{
    linear::Linear,
    norm::Norm,
    plan::{Group, Plan, Turns},
    upload::Upload,
};
use crate::{
    engine::{
        alibi::Alibi,
        hidden,
        lanes::PageCopy,
        load::LoadError,
        pages::{PAGE_TOKENS, PageId},
        pass::PagePlace,
    },
    model::{Dtype, spec::AttentionSpec},
};

/// A block's attention and its part of the KV cache.
pub(super) struct Attention {
    qkv: Linear,
    output: Linear,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    scale: f64,
    soft_cap: Option<f64>,
    /// `[1, heads, 1, 1]`.
    sinks: Option<Tensor>,
    /// `[1, heads, 1, positions]`: what is added to the scores of keys.
    biases: Option<Tensor>,
    /// `[pages, PAGE_TOKENS · kv_heads · head_size]`.
    keys: Tensor,
    /// Likewise.
    values: Tensor,
}

/// What the rows of a pass have in common at one block.
pub(super) struct Rows<'a> {
    /// Where in the planes each row's key and value go, `[rows, kv_heads · head_size]`.
    pub(super) slots: &'a Tensor,
    /// Rotary angles, where the block has them.
    pub(super) turns: Option<&'a Turns>,
    pub(super) plan: &'a Plan,
}

impl Attention {
    /// `pages` is the size of the planes, at least one.
    pub(super) fn load(spec: &AttentionSpec, pages: usize, upload: &mut Upload<'_, '_>) -> Result<Self, LoadError> {
        let AttentionSpec { heads, kv_heads, head_size, .. } = *spec;
        let (mut q_norm, mut k_norm) = (None, None);
        if let Some(norms) = &spec.qk_norm {
            q_norm = Some(Norm::load(&norms.q, head_size, upload)?);
            k_norm = Some(Norm::load(&norms.k, head_size, upload)?);
        }
        let sinks = spec.sinks.as_ref().map(|name| upload.vector(name, heads)).transpose()?;
        let biases = spec.alibi.as_ref().map(|alibi| {
            // As wide as a group's keys can get.
            let positions = pages.next_power_of_two() * PAGE_TOKENS;
            let alibi = Alibi::new(alibi, heads);
            let mut biases = vec![0.0; heads * positions];
            for (head, biases) in biases.chunks_exact_mut(positions).enumerate() {
                alibi.biases(head, 0, biases);
            }
            Tensor::from_vec(biases, (1, heads, 1, positions), upload.device())
        });
        let plane = || Tensor::zeros((pages, PAGE_TOKENS * kv_heads * head_size), upload.dtype(), upload.device());
        Ok(Self {
            keys: plane()?,
            values: plane()?,
            biases: biases.transpose()?,
            sinks: sinks.map(|sinks| sinks.reshape((1, heads, 1, 1))).transpose()?,
            qkv: upload.linear(&[&spec.q, &spec.k, &spec.v])?,
            output: upload.linear(&[&spec.o])?,
            q_norm,
            k_norm,
            heads,
            kv_heads,
            head_size,
            scale: spec.scale,
            soft_cap: spec.soft_cap,
        })
    }

    /// Numbers of one token's keys.
    pub(super) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_size
    }

    /// Attends from every row of `x`, `[rows, hidden]`, after writing the rows' own keys and values to the planes.
    pub(super) fn forward(&self, x: &Tensor, rows: &Rows<'_>) -> TensorResult<Tensor> {
        let (count, _) = x.dims2()?;
        let qkv = self.qkv.forward(x)?.reshape((count, self.heads + 2 * self.kv_heads, self.head_size))?;
        let (q, k) = if self.q_norm.is_none() && self.k_norm.is_none() {
            let both = turn(&qkv.narrow(1, 0, self.heads + self.kv_heads)?, rows.turns)?;
            (both.narrow(1, 0, self.heads)?, both.narrow(1, self.heads, self.kv_heads)?)
        } else {
            let q = through(self.q_norm.as_ref(), &qkv.narrow(1, 0, self.heads)?)?;
            let k = through(self.k_norm.as_ref(), &qkv.narrow(1, self.heads, self.kv_heads)?)?;
            (turn(&q, rows.turns)?, turn(&k, rows.turns)?)
        };
        let v = qkv.narrow(1, self.heads + self.kv_heads, self.kv_heads)?;
        self.store(rows.slots, &k, &v)?;

        let q = (q * self.scale)?;
        let mixed = rows.plan.groups.iter().map(|group| self.attend(&q, group)).collect::<TensorResult<Vec<_>>>()?;
        let mixed = match &mixed[..] {
            [only] => only.clone(),
            several => Tensor::cat(several, 0)?,
        };
        let mixed = match &rows.plan.order {
            Some(order) => mixed.index_select(order, 0)?,
            None => mixed,
        };
        self.output.forward(&mixed)
    }

    /// Writes keys and values, `[rows, kv_heads, head_size]`, to the planes.
    fn store(&self, slots: &Tensor, keys: &Tensor, values: &Tensor) -> TensorResult<()> {
        for (plane, rows) in [(&self.keys, keys), (&self.values, values)] {
            let rows = rows.reshape(slots.shape())?.to_dtype(plane.dtype())?.contiguous()?;
            plane.reshape(((), self.kv_width()))?.scatter_set(slots, &rows, 0)?;
        }
        Ok(())
    }

    /// Copies all keys and values of pages over those of others, one after the other.
    pub(super) fn copy_pages(&self, copies: &[PageCopy]) -> TensorResult<()> {
        for PageCopy { from, to } in copies {
            for plane in [&self.keys, &self.values] {
                plane.slice_set(&plane.narrow(0, *from as usize, 1)?.force_contiguous()?, 0, *to as usize)?;
            }
        }
        Ok(())
    }

    /// Appends the keys and the values of a page's first `tokens`, `[PAGE_TOKENS, kv_heads, head_size]` each in the planes'
    /// `dtype`; the others are zeros.
    pub(super) fn read_page(&self, at: PagePlace, dtype: Dtype, bytes: &mut Vec<u8>) -> TensorResult<()> {
        for plane in [&self.keys, &self.values] {
            let page = plane.narrow(0, at.page as usize, 1)?.to_dtype(DType::F32)?;
            let mut numbers = page.flatten_all()?.to_vec1::<f32>()?;
            numbers[at.tokens.min(PAGE_TOKENS) * self.kv_width()..].fill(0.0);
            hidden::encode(dtype, &numbers, bytes);
        }
        Ok(())
    }

    /// Takes over what was read from a page: keys and values, `[2, PAGE_TOKENS · kv_heads · head_size]`.
    pub(super) fn write_page(&self, page: PageId, numbers: &[f32]) -> TensorResult<()> {
        let (keys, values) = numbers.split_at(numbers.len() / 2);
        for (plane, numbers) in [(&self.keys, keys), (&self.values, values)] {
            let page_of = Tensor::from_slice(numbers, (1, numbers.len()), plane.device())?.to_dtype(plane.dtype())?;
            plane.slice_set(&page_of, 0, page as usize)?;
        }
        Ok(())
    }

    /// Forgets what was written to `slots`, `[rows, kv_heads · head_size]`.
    pub(super) fn erase(&self, slots: &Tensor) -> TensorResult<()> {
        let zeros = slots.zeros_like()?.to_dtype(DType::F32)?.reshape(((), self.kv_heads, self.head_size))?;
        self.store(slots, &zeros, &zeros)
    }

    /// Of a group's rows, from all queries `[rows, heads, head_size]` to `[rows of the group, heads · head_size]`.
    fn attend(&self, q: &Tensor, group: &Group) -> TensorResult<Tensor> {
        let Group { lanes, rows, .. } = *group;
        let shared = self.heads / self.kv_heads;
        let (batch, size, keys) = (lanes * self.kv_heads, self.head_size, group.pages_each * PAGE_TOKENS);
        let q = group
            .select(q)?
            .reshape((lanes, rows, self.kv_heads, shared, size))?
            .permute((0, 2, 3, 1, 4))?
            .contiguous()?
            .reshape((batch, shared * rows, size))?;
        let scores = q.matmul(&self.gather(&self.keys, group)?.transpose(1, 2)?)?;
        let mut scores = scores.reshape((lanes, self.heads, rows, keys))?;
        if let Some(cap) = self.soft_cap {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        if let Some(biases) = &self.biases {
            scores = scores.broadcast_add(&biases.narrow(D::Minus1, 0, keys)?)?;
        }
        scores = scores.broadcast_add(&group.mask)?;
        let weights = match &self.sinks {
            None => softmax_last_dim(&scores)?,
            Some(sinks) => softmax_with(sinks, &scores)?,
        };
        weights
            .reshape((batch, shared * rows, keys))?
            .matmul(&self.gather(&self.values, group)?)?
            .reshape((lanes, self.kv_heads, shared, rows, size))?
            .permute((0, 3, 1, 2, 4))?
            .reshape((lanes * rows, self.heads * size))
    }

    /// The pages of a group's lanes side by side, `[lanes · kv_heads, tokens, head_size]` in f32.
    fn gather(&self, plane: &Tensor, group: &Group) -> TensorResult<Tensor> {
        let tokens = group.pages_each * PAGE_TOKENS;
        plane
            .index_select(&group.pages, 0)?
            .reshape((group.lanes, tokens, self.kv_heads, self.head_size))?
            .permute((0, 2, 1, 3))?
            .to_dtype(DType::F32)?
            .contiguous()?
            .reshape((group.lanes * self.kv_heads, tokens, self.head_size))
    }
}

/// A softmax over the last dimension of `scores`, `[lanes, heads, rows, keys]`, and a score of each head that stands for no
/// key.
fn softmax_with(sinks: &Tensor, scores: &Tensor) -> TensorResult<Tensor> {
    let highest = scores.max_keepdim(D::Minus1)?.broadcast_maximum(sinks)?;
    let weights = scores.broadcast_sub(&highest)?.exp()?;
    let sink = highest.broadcast_sub(sinks)?.neg()?.exp()?;
    weights.broadcast_div(&(weights.sum_keepdim(D::Minus1)? + sink)?)
}

fn through(norm: Option<&Norm>, heads: &Tensor) -> TensorResult<Tensor> {
    match norm {
        Some(norm) => norm.forward(heads),
        None => Ok(heads.clone()),
    }
}

/// Rotates heads, `[rows, heads, head_size]`: number `i` against number `i + pairs`. What follows stays as it is.
fn turn(heads: &Tensor, turns: Option<&Turns>) -> TensorResult<Tensor> {
    let Some(Turns { cos, sin, pairs }) = turns else { return Ok(heads.clone()) };
    let (width, size) = (2 * pairs, heads.dim(D::Minus1)?);
    let turned = heads.narrow(D::Minus1, 0, width)?.contiguous()?.unsqueeze(0)?;
    let turned = rope_thd(&turned, cos, sin)?.squeeze(0)?;
    if width == size {
        return Ok(turned);
    }
    Tensor::cat(&[&turned, &heads.narrow(D::Minus1, width, size - width)?.contiguous()?], D::Minus1)
}
