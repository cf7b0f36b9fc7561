//! Running blocks: the span of a node, its KV cache, and the batcher between the two; and the edges for a client.
//!
//! # Ragged batches
//!
//! The engine works on `[rows, hidden]`: the tokens of all steps that are ready, of all sessions, laid end to end without
//! padding. Linear layers see one matrix. Attention knows which rows belong to which lane, and at which positions, and
//! reads each lane's own pages. So prefill, decode, speculative runs and rollback are one code path, and they share a pass.
//!
//! ```text
//! sessions ─ Job ─► desk ─► batcher: pages, shares of the budget ─► pass: block, block, … ─► done(cache, output)
//! ```
//!
//! # Exact
//!
//! On the CPU a row's result depends on its lane and on nothing else: not on the other rows of the pass, not on how
//! the prompt was cut into steps or passes, not on how the model is cut into spans, and not on the machine. The first two hold
//! because every sum is taken in one order, which no width of vectors changes (`engine/kernels.rs`,
//! `engine/attention/tile.rs`), the third because the residual stream is rounded to the session's wire format after every
//! block, whether or not it travels. All hold bit for bit, for one checkpoint, engine dtype, format of the KV cache and wire
//! dtype, and are tested in f32, bf16 and f16. Sines, cosines and exponentials are not the system library's either (`engine/rope.rs`,
//! `engine/exp.rs`).
//!
//! The KV cache is kept in the engine's dtype, or in another that is asked for ([`KvDtype`]). Matrices that are floating
//! point numbers are in the engine's dtype, too; norms and biases, which are small, in f32. Matrices that a checkpoint has in
//! a packed format stay as they are, and others are quantized at load where that is asked for ([`Quant`]); each has a form of
//! its own (`engine/matrix.rs`). What is computed inside a block is in f32, with one exception: an engine of bf16 or f16 rounds
//! what it multiplies with matrices of q8_0, q4_0, q4_k, q6_k and mxfp4 to 8 bits, to multiply integers. An engine of f32
//! never does.
//!
//! # Plain slices
//!
//! On the CPU nothing here is a tensor of candle's, which serves on CUDA (`engine/cuda.rs`). A custom operation of candle's gets its
//! operands and allocates its result; but between two products a pass has several small things to do to the same rows,
//! and does them while these are in the nearest cache, on the thread that has them there, into buffers that are kept from pass to pass
//! (`engine/block.rs`). Weights lie in tiles that no stride describes, rows are interleaved as a kernel reads them, and the KV cache is
//! written in place by page: to candle each would be a tensor of bytes that only these kernels understand.
//!
//! # Pages
//!
//! The KV cache is allocated at start, in pages of [`PAGE_TOKENS`] tokens. A [`Cache`] owns the pages of one session and
//! gives them back when it is dropped. Lanes that were copied and sessions that share a prefix ([`Cache::copy_lanes`],
//! [`Cache::keep_prefix`]) hold the same pages, and a step that writes to one of these gets a copy of it. Pages for a
//! whole step are taken before it begins; a step that can't get them waits in order until its deadline, sessions that run
//! before new ones, and new ones leave one part in [`WATERMARK_SHARE`] of the pool free.
//!
//! # Moving
//!
//! A session can go on in another engine that computes alike: its pages are read here and written there, a few between two passes,
//! and nothing of it is computed again (`engine/snapshot.rs`).
//!
//! # Threads
//!
//! One thread runs the batcher and the passes. It shares them between sessions that decode and prompts, so that the former
//! never wait for long, and between owners, so that nobody gets more by opening more sessions (`engine/schedule.rs`). Sessions that
//! decode share passes, and it waits a moment for those that are about to come (`engine/schedule/gather.rs`). It
//! belongs to a pool with a thread for each core, or as many as are asked for, of which large products use the others; a
//! small model's step never leaves its thread.

mod alibi;
mod attention;
mod batcher;
mod block;
mod cache;
#[cfg(any(test, feature = "cuda"))]
mod cuda;
mod edges;
mod exp;
mod experts;
mod ffn;
mod floats;
mod head;
mod hidden;
mod job;
mod kept;
mod kernels;
mod lanes;
mod linear;
mod load;
mod matrix;
mod norm;
mod pages;
mod pass;
mod planes;
mod product;
mod rope;
mod schedule;
mod scratch;
mod snapshot;
pub mod speed;
mod tensor;
mod threads;

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use batcher::Batcher;
pub use cache::Cache;
use cache::{Desk, DeskState, Pending};
pub use edges::{EdgeError, Edges, EdgesOptions};
pub use head::Seat;
pub use hidden::{HiddenStates, WrongLength};
pub use job::{Job, Keep, Owner, Place, StepError, StepOutput};
pub use kept::PageKey;
pub use kernels::UnknownKernels;
pub use lanes::{LaneLayout, LaneRun};
pub use load::LoadError;
use load::{Loaded, Source};
pub use matrix::Matrix;
pub use pages::{PAGE_TOKENS, WATERMARK_SHARE};
use pass::{Pass, Span};
use planes::KvPlanes;
use schedule::Meeting;
pub use snapshot::{ReadDone, Snapshot, TransferError, WriteDone};
pub use threads::{MAX_THREADS, ThreadsError};

use crate::model::{Dtype, KvDtype, Quant, checkpoint::Checkpoint, spec::ModelSpec};

/// Where blocks and edges run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The best that this build and this machine have.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A CUDA device, in a build with `--features cuda`.
    Cuda(usize),
}

/// Where blocks run, once that has been decided.
enum Target {
    Cpu,
    #[cfg(any(test, feature = "cuda"))]
    Device(candle_core::Device),
}

impl DeviceChoice {
    /// Where blocks run.
    fn target(self) -> Result<Target, LoadError> {
        match self {
            Self::Cpu => Ok(Target::Cpu),
            #[cfg(not(feature = "cuda"))]
            Self::Auto => Ok(Target::Cpu),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(index) => Err(LoadError::Device(format!(
                "device cuda:{index} was asked for, and this build runs on the CPU only: use --device cpu or auto, or build \
                 with --features cuda"
            ))),
            #[cfg(feature = "cuda")]
            Self::Auto => Ok(cuda::open(0).map(Target::Device).unwrap_or_else(|reason| {
                tracing::info!(reason, "blocks run on the CPU");
                Target::Cpu
            })),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => cuda::open(index).map(Target::Device).map_err(LoadError::Device),
        }
    }
}

/// How to load a span.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The blocks.
    pub span: Range<usize>,
    /// What weights that aren't quantized are kept in.
    pub dtype: Dtype,
    /// What the KV cache is kept in; `None`: as `dtype` says.
    pub kv_dtype: Option<KvDtype>,
    /// How matrices are quantized.
    pub quant: Quant,
    /// Where the blocks run.
    pub device: DeviceChoice,
    /// Size of the KV cache, over all sessions; rounded down to whole pages.
    pub cache_tokens: usize,
    /// Rows of one pass, at most: while sessions decode, prompts get no more than what keeps a pass short.
    pub batch_tokens: usize,
    /// Jobs that may wait, half of them of one owner. Each holds its hidden states, so this bounds memory, too.
    pub queue: usize,
    /// Bytes of the rows that are kept with the pages of prefixes, at most; see [`Cache::keep_prefix`].
    pub kept_bytes: usize,
    /// Threads that compute, from 1 to [`MAX_THREADS`]; `None`: one a core. Results don't depend on it.
    pub threads: Option<usize>,
}

impl EngineOptions {
    /// Options for `span` in `dtype`: matrices as the checkpoint has them, on the best device, 8192 tokens of cache, passes of 512 rows, 256 jobs waiting,
    /// a thread for each core.
    pub fn new(span: Range<usize>, dtype: Dtype) -> Self {
        Self {
            span,
            dtype,
            kv_dtype: None,
            quant: Quant::Auto,
            device: DeviceChoice::Auto,
            cache_tokens: 8192,
            batch_tokens: 512,
            queue: 256,
            kept_bytes: 0,
            threads: None,
        }
    }
}

/// A loaded span and its KV cache. Clones are handles to the same one; it ends with the last of them.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    desk: Arc<Desk>,
    spec: ModelSpec,
    span: Range<usize>,
    dtype: Dtype,
    kv_dtype: KvDtype,
    loaded: Loaded,
    kernel_path: String,
    queue: usize,
    threads: usize,
}

/// How busy an engine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLoad {
    /// Tokens that the free pages have room for, and those that are only kept for sessions to come.
    pub cache_tokens_left: usize,
    /// Tokens that all pages have room for.
    pub cache_tokens_total: usize,
    /// Tokens that the pages have room for which more than one lane or handle refer to.
    pub cache_tokens_shared: usize,
    /// Tokens in pages that are kept for sessions to come.
    pub cache_tokens_kept: usize,
    /// Bytes of rows that are kept with them.
    pub kept_bytes: usize,
    /// Jobs that haven't begun.
    pub queue: usize,
    /// Steps that were computed since the start.
    pub steps: u64,
    /// Rows of these.
    pub tokens: u64,
    /// Passes since the start.
    pub passes: u64,
    /// Rows of these; over their number, how well the weights that each of them read were used.
    pub rows: u64,
    /// Time in passes.
    pub busy: Duration,
    /// Short steps (decode tokens, speculative runs) that were computed.
    pub decodes: u64,
    /// Those of them that more than one chunk of somebody's prompt was in the way of. None
    /// are, unless all short steps together are more than half a pass.
    pub late_decodes: u64,
    /// Those that took longer than two passes of decode steps and one chunk of a prompt, from when they came, or had their pages,
    /// until they were answered. A machine that is busy with other things makes some.
    pub slow_decodes: u64,
}

impl Engine {
    /// Loads a span, block by block; of the checkpoint only its tensors are read. `progress` is called with the blocks
    /// that are done and their number.
    ///
    /// # Errors
    /// The model has no such blocks, a tensor can't be read, or the device or the cache's size is impossible.
    pub fn load(
        checkpoint: &Checkpoint,
        options: EngineOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let target = options.device.target()?;
        Self::load_on(target, checkpoint, options, progress)
    }

    fn load_on(
        target: Target,
        checkpoint: &Checkpoint,
        options: EngineOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let EngineOptions {
            span, dtype, kv_dtype, quant, cache_tokens, batch_tokens, queue, kept_bytes, threads, ..
        } = options;
        let spec = checkpoint.spec().clone();
        if span.is_empty() || span.end > spec.num_blocks() {
            return Err(LoadError::Span { start: span.start, end: span.end, blocks: spec.num_blocks() });
        }
        let kv_dtype = kv_dtype.unwrap_or(dtype.into());
        let pages = check_cache(&spec, &span, kv_dtype, (cache_tokens, &target))?;
        let threads = threads::pool("engine", threads)?;
        let mut source = Source::new(checkpoint, dtype, quant, Some(&threads));
        let (path, blocks): (String, Box<dyn Pass>) = match target {
            Target::Cpu => {
                let cache = (kv_dtype, pages as usize);
                let blocks = Span::load(&spec, span.clone(), cache, &mut source, progress)?;
                ("cpu".to_owned(), Box::new(blocks))
            }
            #[cfg(any(test, feature = "cuda"))]
            Target::Device(device) => {
                if kv_dtype != dtype.into() {
                    return Err(LoadError::Device(format!(
                        "on CUDA keys and values are kept in what the blocks compute in, {dtype}: leave --kv-dtype \
                         {kv_dtype} out"
                    )));
                }
                let path = cuda::path(&device);
                let cache = (device, pages as usize);
                let blocks = cuda::DeviceSpan::load(&spec, span.clone(), cache, &mut source, progress)?;
                source.has_forms_of_its_own();
                (path, Box::new(blocks))
            }
        };
        let kernel_path = if kv_dtype == dtype.into() { path } else { format!("{path}-kv-{kv_dtype}") };
        let loaded = source.finish();
        let meeting = if span.start == 0 { Meeting::FirstHop } else { Meeting::LaterHop };
        let desk = Arc::new(Desk::new(pages, kept_bytes, meeting));
        let batcher = Batcher::new(desk.clone(), blocks, batch_tokens);
        let count = threads.current_num_threads();
        // What was spawned keeps the pool alive. The batcher is one of its workers, so that it can share a product with
        // the others without handing over and waking up.
        threads.spawn(move || batcher.run());
        let shared = Shared { desk, spec, span, dtype, kv_dtype, loaded, kernel_path, queue, threads: count };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.shared.spec
    }

    /// The blocks that are loaded.
    pub fn span(&self) -> Range<usize> {
        self.shared.span.clone()
    }

    /// What weights that aren't quantized are kept in.
    pub fn dtype(&self) -> Dtype {
        self.shared.dtype
    }

    /// What the KV cache is kept in.
    pub fn kv_dtype(&self) -> KvDtype {
        self.shared.kv_dtype
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Bytes that the span's weights take in memory.
    pub fn loaded_bytes(&self) -> u64 {
        self.shared.loaded.bytes
    }

    /// What the span's matrices are packed in, for announcements: `none` where all are floating point numbers, else the
    /// format that most bytes of the packed ones are in (`q8_0`, `q4_k`, `mxfp4`, `fp8`, `int4`, …).
    pub fn quantization(&self) -> &'static str {
        self.shared.loaded.quantization
    }

    /// The settings of [`EngineOptions::quant`] under each of which all matrices of the span would be kept just as they are, the one
    /// that was asked for among them. Engines on one checkpoint that have one in common keep their blocks' matrices alike; that both have the same
    /// [`Engine::quantization`] doesn't say so.
    pub fn quant_settings(&self) -> &[Quant] {
        &self.shared.loaded.settings
    }

    /// What the arithmetic runs on, as one word: `cpu`, on which results have the same bits whatever the instruction set, or CUDA
    /// with the device's compute capability (`cuda-sm90`); and where the KV cache is not in the engine's dtype its format,
    /// as in `cpu-kv-q8`. Two engines that are alike in all but this may differ in the last bits of a result.
    pub fn kernel_path(&self) -> &str {
        &self.shared.kernel_path
    }

    /// An empty KV cache for one session that runs through `blocks`.
    ///
    /// # Errors
    /// `blocks` is not a part of the span.
    pub fn cache(&self, blocks: Range<usize>) -> Result<Cache, StepError> {
        let span = self.span();
        if blocks.is_empty() || blocks.start < span.start || blocks.end > span.end {
            return Err(StepError::WrongBlocks { asked: blocks, span });
        }
        Ok(Cache::new(self.shared.desk.clone(), blocks))
    }

    /// Hands a step in. Never blocks; the answer comes through the job's `done`, at once where the job is refused.
    pub fn submit(&self, job: Job) {
        let submitted = Instant::now();
        let refusal = self.check(&job, submitted).err().or_else(|| {
            let state = self.shared.desk.lock();
            let possible = job.cache.table.could_ever(&job.lanes, &state.pages);
            (!possible).then(|| batcher::cache_full(&state, &job))
        });
        if let Some(error) = refusal {
            return batcher::refuse(job, error);
        }
        let mut state = self.shared.desk.lock();
        if let Err(error) = state.enter(job.cache.owner, self.shared.queue) {
            drop(state);
            return batcher::refuse(job, error);
        }
        state.arrivals.push_back(Pending { job, submitted, starved: false });
        drop(state);
        self.shared.desk.notify();
    }

    /// How busy the engine is now.
    pub fn load_now(&self) -> EngineLoad {
        let state = self.shared.desk.lock();
        EngineLoad {
            cache_tokens_left: state.pages.available() * PAGE_TOKENS,
            cache_tokens_total: state.pages.total() * PAGE_TOKENS,
            cache_tokens_shared: state.pages.shared() * PAGE_TOKENS,
            cache_tokens_kept: state.kept.count() * PAGE_TOKENS,
            kept_bytes: state.kept.row_bytes(),
            queue: state.queued,
            steps: state.counts.steps,
            tokens: state.counts.tokens,
            passes: state.counts.passes,
            rows: state.counts.rows,
            busy: state.counts.busy,
            decodes: state.counts.decodes,
            late_decodes: state.counts.late_decodes,
            slow_decodes: state.counts.slow_decodes,
        }
    }

    /// Gives up the pages of prefixes that nobody has used since `before`.
    pub fn forget_prefixes(&self, before: Instant) {
        let mut state = self.shared.desk.lock();
        let DeskState { pages, kept, .. } = &mut *state;
        kept.expire(before, pages);
    }

    /// What can be found wrong with a job before it runs.
    fn check(&self, job: &Job, now: Instant) -> Result<(), StepError> {
        let bad = |reason: String| Err(StepError::BadShape(reason));
        let Job { cache, lanes, hidden, .. } = job;
        if !Arc::ptr_eq(&cache.desk, &self.shared.desk) {
            return bad("its cache belongs to another engine".into());
        }
        if !cache.incoming.is_empty() {
            return bad("its cache is still being rebuilt".into());
        }
        if !hidden.has_right_length() {
            return bad(format!(
                "{} bytes are not {} rows of {} numbers",
                hidden.bytes.len(),
                hidden.rows,
                hidden.hidden
            ));
        }
        if hidden.hidden != self.shared.spec.hidden_size {
            return bad(format!(
                "rows are {} wide, and the model's are {}",
                hidden.hidden, self.shared.spec.hidden_size
            ));
        }
        let mut seen = BTreeSet::new();
        let mut rows = 0usize;
        for run in lanes {
            if run.tokens == 0 {
                return bad(format!("lane {} has no tokens", run.lane));
            }
            if !seen.insert(run.lane) {
                return bad(format!("lane {} appears twice", run.lane));
            }
            rows = rows.saturating_add(run.tokens);
        }
        if rows != hidden.rows || rows == 0 {
            return bad(format!("the lanes have {rows} tokens, and there are {} rows", hidden.rows));
        }
        for run in lanes {
            let (end, limit) = (cache.end(run.lane), self.shared.spec.max_context);
            if run.position > end {
                return Err(StepError::WrongPosition { lane: run.lane, position: run.position, end });
            }
            if run.end() > limit {
                return Err(StepError::ContextExceeded { lane: run.lane, tokens: run.end(), limit });
            }
        }
        if let Some(row) = hidden.first_non_finite() {
            return Err(StepError::NonFinite { row, place: Place::Input });
        }
        if batcher::is_cancelled(job) {
            return Err(StepError::Cancelled);
        }
        if job.deadline <= now {
            return Err(StepError::Deadline);
        }
        Ok(())
    }
}

/// The paths that this machine's processor can take through the arithmetic, the one that is taken by itself last: `portable`, `avx2`,
/// `avx2-vnni`, `avx512`, `avx512-vnni`, `neon`, `neon-dot`. Results have the same bits on all of them; the environment variable `HELION_KERNELS` chooses another.
pub fn kernel_paths() -> Vec<&'static str> {
    kernels::Path::all().iter().map(kernels::Path::name).collect()
}

/// Whether this machine has the kernels that `HELION_KERNELS` asks for, if it asks.
///
/// # Errors
/// It hasn't. Who doesn't ask here gets the best ones, and a line in the log.
pub fn check_kernels() -> Result<(), UnknownKernels> {
    kernels::Path::asked().map(|_| ())
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("model_type", &self.shared.spec.model_type)
            .field("span", &self.shared.span)
            .field("dtype", &self.shared.dtype)
            .finish_non_exhaustive()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.desk.lock().closed = true;
        self.desk.notify();
    }
}

/// Pages for `tokens` tokens, after making sure that the system has the address space for them: an allocation that
/// fails later would end the process. A device says itself when it is full.
fn check_cache(
    spec: &ModelSpec,
    span: &Range<usize>,
    dtype: KvDtype,
    (tokens, target): (usize, &Target),
) -> Result<u32, LoadError> {
    let pages = tokens / PAGE_TOKENS;
    let sizes = spec.blocks[span.clone()].iter().map(|block| {
        let attention = &block.attention;
        KvPlanes::size_in_bytes(dtype, pages, attention.kv_heads, attention.head_size)
    });
    let bytes = sizes.sum::<Option<usize>>().unwrap_or(usize::MAX);
    let fits = match target {
        Target::Cpu => Vec::<u8>::new().try_reserve_exact(bytes).is_ok(),
        // The places of its tokens are counted in 32 bits.
        #[cfg(any(test, feature = "cuda"))]
        Target::Device(_) => u32::try_from(tokens).is_ok(),
    };
    match u32::try_from(pages) {
        Ok(pages) if pages > 0 && fits => Ok(pages),
        _ => Err(LoadError::Cache { tokens, bytes }),
    }
}

#[cfg(test)]
mod tests;
