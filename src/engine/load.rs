//! Reading a span's weights.

use std::collections::BTreeMap;

use rayon::ThreadPool;

use super::{matrix::Matrix, pages::PAGE_TOKENS, tensor, threads::ThreadsError};
use crate::model::{
    Dtype, Quant,
    checkpoint::{BlockFormat, BlockMatrix, Checkpoint, CheckpointError, StoredMatrix},
    spec::{LinearSpec, MXFP4_GROUP},
};

/// Why a span or the edges can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A tensor can't be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model hasn't got these blocks.
    #[error("blocks {start}:{end} are not a span of this model, which has blocks 0:{blocks}")]
    Span {
        /// First block asked for.
        start: usize,
        /// Behind the last block asked for.
        end: usize,
        /// How many the model has.
        blocks: usize,
    },
    /// The device can't be used.
    #[error("{0}")]
    Device(String),
    /// The KV cache is too small or too large.
    #[error(
        "a cache of {tokens} tokens ({bytes} bytes) can't be allocated: it must hold at least {} tokens and fit into \
         memory",
        PAGE_TOKENS
    )]
    Cache {
        /// Tokens asked for.
        tokens: usize,
        /// What they would take, where it can be counted.
        bytes: usize,
    },
    /// A packed matrix is not what its shape says.
    #[error("matrix {name}: {reason}; the checkpoint is damaged, fetch it again")]
    Matrix {
        /// Its tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There are no threads to compute on.
    #[error(transparent)]
    Threads(#[from] ThreadsError),
    /// A tensor has an impossible layout.
    #[error("tensor library: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// Numbers of an embedding or head that are read and converted at a time: it may be as large as several blocks, and
/// loading must not need twice its size.
const READ_AT_ONCE: usize = 1 << 22;
/// Rows that are read of one are a multiple of this, so that no tile of scales is cut.
const ROWS_TOGETHER: usize = 256;

/// Where weights come from, what they are kept in, and how many bytes of memory they have taken.
pub(super) struct Source<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Dtype,
    quant: Quant,
    loaded_bytes: u64,
    /// Bytes of the matrices that are packed, by what they are packed in.
    packed: BTreeMap<&'static str, u64>,
    /// How many matrices were too narrow for the format asked for, by what they are kept in.
    narrow: BTreeMap<String, usize>,
    settings: Settings,
    /// Who converts and packs; the process's own threads where there is no pool.
    threads: Option<&'a ThreadPool>,
}

/// What has been loaded.
pub(super) struct Loaded {
    /// Bytes of memory.
    pub(super) bytes: u64,
    /// What most of the packed matrices' bytes are packed in, or `none`.
    pub(super) quantization: &'static str,
    /// The settings under each of which all matrices would be kept just as they are; the one that was asked for is among them.
    pub(super) settings: Vec<Quant>,
}

/// Which settings come to the same as the one asked for, for the matrices so far.
struct Settings {
    asked: Quant,
    alike: Vec<Quant>,
}

impl Settings {
    fn new(asked: Quant) -> Self {
        Self { asked, alike: Quant::ALL.to_vec() }
    }

    /// One more matrix, by what the checkpoint has it packed in, if it is, and its columns.
    fn note(&mut self, stored: Option<&'static str>, columns: usize) {
        let kept = |quant: Quant| {
            let format = quant.format_for(columns).map(BlockFormat::name);
            format.or_else(|| stored.filter(|_| quant == Quant::Auto))
        };
        let asked = kept(self.asked);
        self.alike.retain(|quant| kept(*quant) == asked);
    }
}

impl<'a> Source<'a> {
    /// A source of what `checkpoint` has. `threads` convert and pack; those of the process where there are none.
    pub(super) fn new(checkpoint: &'a Checkpoint, dtype: Dtype, quant: Quant, threads: Option<&'a ThreadPool>) -> Self {
        Self {
            checkpoint,
            dtype,
            quant,
            loaded_bytes: 0,
            packed: BTreeMap::new(),
            narrow: BTreeMap::new(),
            settings: Settings::new(quant),
            threads,
        }
    }

    /// Bytes of memory that what was loaded takes.
    pub(super) fn loaded_bytes(&self) -> u64 {
        self.loaded_bytes
    }

    /// Ends the loading. Says in the log where a matrix is kept in another format than was asked for.
    pub(super) fn finish(self) -> Loaded {
        for (format, count) in &self.narrow {
            tracing::info!(
                "{count} matrices are too narrow for the blocks of {}: they are kept in {format}",
                self.quant
            );
        }
        let most = self.packed.iter().max_by_key(|(_, bytes)| **bytes);
        let quantization = most.map_or("none", |(format, _)| *format);
        Loaded { bytes: self.loaded_bytes, quantization, settings: self.settings.alike }
    }

    /// What weights are read from.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// What matrices that aren't packed are kept in.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How matrices are to be packed.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn quant(&self) -> Quant {
        self.quant
    }

    /// What was loaded is in forms that only the setting asked for tells: no other is known to come to the same.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn has_forms_of_its_own(&mut self) {
        self.settings.alike = vec![self.quant];
    }

    /// A vector in f32.
    pub(super) fn vector(&mut self, name: &str, width: usize) -> Result<Vec<f32>, LoadError> {
        self.vector_of(name, &[width])
    }

    /// The numbers of a small tensor of any shape in f32.
    pub(super) fn vector_of(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let values = tensor::to_f32(&self.checkpoint.read(name, shape)?);
        self.loaded_bytes += size_of_val(&values[..]) as u64;
        Ok(values)
    }

    /// The biases of `parts` in f32, one behind the other, with zeros where one has none; `None` where none has.
    pub(super) fn biases(&mut self, parts: &[&LinearSpec]) -> Result<Option<Vec<f32>>, LoadError> {
        if parts.iter().all(|part| part.bias.is_none()) {
            return Ok(None);
        }
        let mut values = Vec::new();
        for part in parts {
            match &part.bias {
                Some(name) => {
                    let shape = [part.stored_rows()];
                    let data = match &part.rows {
                        Some(rows) => self.checkpoint.read_rows(name, &shape, rows.runs(part.outputs))?,
                        None => self.checkpoint.read(name, &shape)?,
                    };
                    self.loaded_bytes += (part.outputs * size_of::<f32>()) as u64;
                    values.extend(tensor::to_f32(&data));
                }
                None => values.resize(values.len() + part.outputs, 0.0),
            }
        }
        Ok(Some(values))
    }

    /// A matrix, kept in what the options say.
    pub(super) fn matrix(&mut self, part: &LinearSpec) -> Result<Matrix, LoadError> {
        let matrix = self.convert(self.read(part)?)?;
        Ok(self.packed(matrix))
    }

    /// A matrix as the checkpoint has it.
    fn read(&self, part: &LinearSpec) -> Result<Matrix, LoadError> {
        let checkpoint = self.checkpoint;
        self.on_threads(|| Matrix::new(&part.weight, checkpoint.matrix(part)?))
    }

    fn on_threads<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self.threads {
            Some(threads) => threads.install(work),
            None => work(),
        }
    }

    /// The same, for a matrix that is perhaps too large to be held twice: if it has to be converted, some rows at a time.
    pub(super) fn large_matrix(&mut self, part: &LinearSpec) -> Result<Matrix, LoadError> {
        let rows = (READ_AT_ONCE / part.inputs.max(1)).max(1).next_multiple_of(ROWS_TOGETHER);
        if part.rows.is_some() || rows >= part.outputs {
            return self.matrix(part);
        }
        let read = |source: &Self, first: usize| {
            let count = rows.min(part.outputs - first);
            source.read(&part.rows(first, count, count, count))
        };
        let first = read(self, 0)?;
        let needs_nothing = self.quant.format_for(part.inputs).is_none() && first.dtype() == Some(self.dtype);
        if needs_nothing || first.dtype().is_none() {
            return self.matrix(part);
        }
        self.settings.note(None, part.inputs);
        let mut whole = self.in_form(first)?;
        whole.reserve_rows(part.outputs);
        for start in (rows..part.outputs).step_by(rows) {
            whole.extend(self.in_form(read(self, start)?)?)?;
        }
        self.note_form(&whole);
        Ok(self.packed(whole))
    }

    /// A matrix in the engine's dtype, whatever the other options say.
    pub(super) fn plain_matrix(&mut self, part: &LinearSpec) -> Result<Matrix, LoadError> {
        let matrix = self.in_dtype(self.read(part)?);
        Ok(self.packed(matrix))
    }

    /// Matrix `index` of the tensor `name`, `[count, inputs, outputs]`, transposed.
    pub(super) fn transposed(&mut self, name: &str, index: usize, shape: [usize; 3]) -> Result<Matrix, LoadError> {
        let data = self.checkpoint.read_rows(name, &shape, std::iter::once(index..index + 1))?;
        let data = tensor::transposed(&data, shape[1], shape[2]);
        let matrix = self.convert(Matrix::new(name, StoredMatrix::Floats(data))?)?;
        Ok(self.packed(matrix))
    }

    /// The matrices `name` in MXFP4, of which the checkpoint has numbers and scales apart: `count` of them.
    pub(super) fn mxfp4(&mut self, name: &str, shape: [usize; 3]) -> Result<Vec<Matrix>, LoadError> {
        let stored = self.stored_mxfp4(name, shape)?;
        let each = stored.into_iter().map(|stored| {
            let matrix = self.convert(Matrix::new(name, stored)?)?;
            Ok(self.packed(matrix))
        });
        each.collect()
    }

    /// The same, as they are.
    pub(super) fn stored_mxfp4(&self, name: &str, shape: [usize; 3]) -> Result<Vec<StoredMatrix>, LoadError> {
        let [count, outputs, groups] = shape;
        let codes = [count, outputs, groups, MXFP4_GROUP / 2];
        let codes = self.checkpoint.read_bytes(&format!("{name}_blocks"), &codes)?;
        let scales = self.checkpoint.read_bytes(&format!("{name}_scales"), &shape)?;
        let (codes, _) = codes.as_chunks::<{ MXFP4_GROUP / 2 }>();
        let each = codes.chunks_exact(outputs * groups).zip(scales.chunks_exact(outputs * groups));
        let matrices = each.map(|(codes, scales)| {
            let blocks = codes.iter().zip(scales);
            let bytes = blocks.flat_map(|(codes, scale)| codes.iter().copied().chain([*scale])).collect();
            let columns = groups * MXFP4_GROUP;
            StoredMatrix::Blocks(BlockMatrix { format: BlockFormat::Mxfp4, rows: outputs, columns, bytes })
        });
        Ok(matrices.collect())
    }

    /// A matrix in what the options say.
    fn convert(&mut self, matrix: Matrix) -> Result<Matrix, LoadError> {
        self.settings.note(matrix.packed_in(), matrix.inputs());
        let matrix = self.in_form(matrix)?;
        self.note_form(&matrix);
        Ok(matrix)
    }

    /// Notes where a matrix is not kept in what the options ask for.
    fn note_form(&mut self, matrix: &Matrix) {
        if let Some(asked) = self.quant.format()
            && !matrix.is_in(asked)
        {
            let used = matrix.packed_in().map_or_else(|| self.dtype.to_string(), str::to_owned);
            *self.narrow.entry(used).or_default() += 1;
        }
    }

    fn in_form(&self, matrix: Matrix) -> Result<Matrix, LoadError> {
        match self.quant.format_for(matrix.inputs()) {
            Some(format) if matrix.is_in(format) => Ok(matrix),
            Some(format) => self.on_threads(|| matrix.to_blocks(format)),
            None if self.quant == Quant::Auto && matrix.packed_in().is_some() => Ok(matrix),
            None => Ok(self.in_dtype(matrix)),
        }
    }

    fn in_dtype(&self, matrix: Matrix) -> Matrix {
        if matrix.dtype() == Some(self.dtype) {
            return matrix;
        }
        self.on_threads(|| matrix.to_dtype(self.dtype))
    }

    /// Packs a matrix that has its final form, and counts its bytes.
    fn packed(&mut self, mut matrix: Matrix) -> Matrix {
        // In f32, results are those of the numbers as they are.
        let rounds_rows = self.dtype != Dtype::F32;
        self.on_threads(|| matrix.pack(rounds_rows));
        self.count(&matrix);
        matrix
    }

    fn count(&mut self, matrix: &Matrix) {
        self.count_bytes(matrix.size_in_bytes() as u64, matrix.packed_in());
    }

    /// Counts the bytes of a matrix that has been loaded, which is packed in `format` if it is packed.
    pub(super) fn count_bytes(&mut self, bytes: u64, format: Option<&'static str>) {
        self.loaded_bytes += bytes;
        if let Some(format) = format {
            *self.packed.entry(format).or_default() += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The settings that come to the same as `asked` for matrices that are stored like this.
    fn alike(asked: Quant, stored: &[(Option<&'static str>, usize)]) -> Vec<Quant> {
        let mut settings = Settings::new(asked);
        stored.iter().for_each(|(format, columns)| settings.note(*format, *columns));
        settings.alike
    }

    #[test]
    fn settings_that_keep_all_matrices_alike_are_told_apart_from_those_that_only_look_alike() {
        let q4_k_m = [(Some("q4_k"), 256), (Some("q6_k"), 512), (Some("q4_k"), 512)];
        assert_eq!(alike(Quant::Auto, &q4_k_m), [Quant::Auto]);
        assert_eq!(alike(Quant::Q4K, &q4_k_m), [Quant::Q4K]);
        assert_eq!(alike(Quant::Auto, &q4_k_m[..1]), [Quant::Auto, Quant::Q4K]);
        assert_eq!(alike(Quant::Q4K, &q4_k_m[..1]), [Quant::Auto, Quant::Q4K]);
        assert_eq!(alike(Quant::None, &q4_k_m), [Quant::None]);
        // Rows that are too narrow for blocks of 256, and for any.
        assert_eq!(alike(Quant::Q4K, &[(None, 64), (None, 36)]), [Quant::Q4_0, Quant::Q4K]);
        assert_eq!(alike(Quant::Q8_0, &[(None, 64)]), [Quant::Q8_0, Quant::Q6K]);
        assert_eq!(alike(Quant::Auto, &[(None, 64), (None, 256)]), [Quant::Auto, Quant::None]);
        assert_eq!(alike(Quant::Q6K, &[(None, 36)]), Quant::ALL);
        assert_eq!(alike(Quant::Auto, &[(Some("fp8"), 256), (None, 256)]), [Quant::Auto]);
    }
}
