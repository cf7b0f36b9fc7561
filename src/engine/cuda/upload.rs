//! From a checkpoint to a device's memory.
//!
//! | a matrix in the checkpoint | on the device |
//! |---|---|
//! | f32, bf16, f16 | in the engine's dtype |
//! | GGML blocks that candle has products for (`q4_0` to `q8_0`, `q2_k` to `q6_k`) | the same bytes |
//! | other packed formats (FP8, GPTQ, AWQ, MXFP4, `iq4`) | widened to the engine's dtype, which the log says |
//! | any, with `--quant q8_0`, `q4_0`, `q4_k` or `q6_k` | rounded to these blocks before it is sent |
//!
//! Norms, biases, sinks and routers are in f32.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};

use super::linear::{Linear, Weight};
use crate::{
    engine::{
        load::{LoadError, Source},
        matrix::Matrix,
    },
    model::{
        Dtype, Quant,
        checkpoint::{BlockFormat, BlockMatrix, StoredMatrix, TensorData},
        spec::LinearSpec,
    },
};

/// Brings weights to a device.
pub(super) struct Upload<'a, 'b> {
    source: &'a mut Source<'b>,
    device: &'a Device,
    /// How many matrices were widened, by what they were packed in.
    widened: BTreeMap<&'static str, usize>,
}

/// A matrix on its way: still the host's, but in the form that the device keeps.
enum Ready {
    /// Numbers in any floating point format, `[rows, columns]`.
    Floats(TensorData),
    /// Blocks in a format that candle multiplies.
    Blocks(GgmlDType, BlockMatrix),
}

impl<'a, 'b> Upload<'a, 'b> {
    pub(super) fn new(source: &'a mut Source<'b>, device: &'a Device) -> Self {
        Self { source, device, widened: BTreeMap::new() }
    }

    /// Ends the loading. Says in the log what takes more memory than in the checkpoint.
    pub(super) fn finish(self) {
        let dtype = self.source.dtype();
        for (format, count) in &self.widened {
            tracing::info!("{count} matrices in {format} are widened to {dtype}: the device has no products for them");
        }
    }

    pub(super) fn device(&self) -> &Device {
        self.device
    }

    /// What numbers that aren't packed are kept in.
    pub(super) fn dtype(&self) -> DType {
        tensor_dtype(self.source.dtype())
    }

    /// A small tensor in f32.
    pub(super) fn vector(&mut self, name: &str, width: usize) -> Result<Tensor, LoadError> {
        self.vector_of(name, &[width])
    }

    /// A small tensor of any shape in f32.
    pub(super) fn vector_of(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let values = self.source.vector_of(name, shape)?;
        Ok(Tensor::from_vec(values, shape, self.device)?)
    }

    /// Matrices that read the same rows, in as few products as their forms allow.
    pub(super) fn linear(&mut self, parts: &[&LinearSpec]) -> Result<Linear, LoadError> {
        let mut ready: Vec<Ready> = Vec::new();
        for part in parts {
            let stored = self.stored(part)?;
            let next = self.ready(&part.weight, stored)?;
            match ready.last_mut() {
                Some(last) if last.is_like(&next) => last.append(next),
                _ => ready.push(next),
            }
        }
        let weights = ready.into_iter().map(|ready| self.send(ready)).collect::<Result<_, _>>()?;
        Ok(Linear::new(weights, self.biases(parts)?))
    }

    /// One matrix that has been read, and its bias.
    pub(super) fn linear_of(
        &mut self,
        name: &str,
        stored: StoredMatrix,
        bias: Option<Tensor>,
    ) -> Result<Linear, LoadError> {
        let ready = self.ready(name, stored)?;
        Ok(Linear::new(vec![self.send(ready)?], bias))
    }

    /// Whether a matrix of so many columns is rounded to blocks, because the options ask for it.
    pub(super) fn packs(&self, columns: usize) -> bool {
        self.source.quant().format_for(columns).is_some()
    }

    /// Whether a matrix is in blocks on the device.
    pub(super) fn keeps_packed(&self, stored: &StoredMatrix) -> bool {
        let has_product = |matrix: &BlockMatrix| ggml_dtype(matrix.format).is_some();
        self.packs(stored.columns())
            || self.source.quant() == Quant::Auto && matches!(stored, StoredMatrix::Blocks(m) if has_product(m))
    }

    /// A matrix in f32, whatever the options say.
    pub(super) fn exact(&mut self, part: &LinearSpec) -> Result<Linear, LoadError> {
        let stored = self.stored(part)?;
        let matrix = self.floats(&part.weight, stored, DType::F32)?;
        Ok(Linear::new(vec![Weight::Floats(matrix)], self.biases(&[part])?))
    }

    /// A matrix `[rows, columns]` in `dtype`, whatever the checkpoint and the options say.
    pub(super) fn floats(&mut self, name: &str, stored: StoredMatrix, dtype: DType) -> Result<Tensor, LoadError> {
        let data = match stored {
            StoredMatrix::Floats(data) => data,
            packed => self.widen(name, packed)?,
        };
        let tensor = self.tensor(&data)?.to_dtype(dtype)?;
        self.source.count_bytes(bytes_of(&tensor), None);
        Ok(tensor)
    }

    /// The matrices of a stack in MXFP4.
    pub(super) fn mxfp4(&self, name: &str, shape: [usize; 3]) -> Result<Vec<StoredMatrix>, LoadError> {
        self.source.stored_mxfp4(name, shape)
    }

    /// The matrix of a layer as it is stored.
    pub(super) fn stored(&self, part: &LinearSpec) -> Result<StoredMatrix, LoadError> {
        Ok(self.source.checkpoint().matrix(part)?)
    }

    /// Entry `index` of a stack of matrices as it is stored.
    pub(super) fn entry(&self, name: &str, index: usize, shape: &[usize]) -> Result<TensorData, LoadError> {
        Ok(self.source.checkpoint().read_rows(name, shape, std::iter::once(index..index + 1))?)
    }

    /// A tensor of any shape in the engine's dtype.
    pub(super) fn stack(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let tensor = self.tensor(&self.source.checkpoint().read(name, shape)?)?.to_dtype(self.dtype())?;
        self.source.count_bytes(bytes_of(&tensor), None);
        Ok(tensor)
    }

    fn biases(&mut self, parts: &[&LinearSpec]) -> Result<Option<Tensor>, LoadError> {
        let biases = self.source.biases(parts)?;
        Ok(biases.map(|values| Tensor::new(values, self.device)).transpose()?)
    }

    fn tensor(&self, data: &TensorData) -> Result<Tensor, LoadError> {
        Ok(Tensor::from_raw_buffer(&data.bytes, tensor_dtype(data.dtype), &data.shape, self.device)?)
    }

    /// A matrix in the form that the options ask for.
    fn ready(&mut self, name: &str, stored: StoredMatrix) -> Result<Ready, LoadError> {
        let asked = self.source.quant().format_for(stored.columns());
        let keeps_blocks = self.source.quant() == Quant::Auto;
        match (stored, asked) {
            (StoredMatrix::Blocks(matrix), asked)
                if asked == Some(matrix.format) || (asked.is_none() && keeps_blocks) =>
            {
                match ggml_dtype(matrix.format) {
                    Some(format) => Ok(Ready::Blocks(format, matrix)),
                    None => Ok(Ready::Floats(self.widen(name, StoredMatrix::Blocks(matrix))?)),
                }
            }
            (stored, Some(format)) => quantized(name, stored, format),
            (StoredMatrix::Floats(data), None) => Ok(Ready::Floats(data)),
            (packed, None) => Ok(Ready::Floats(self.widen(name, packed)?)),
        }
    }

    /// A packed matrix in f32, which is noted.
    fn widen(&mut self, name: &str, packed: StoredMatrix) -> Result<TensorData, LoadError> {
        let matrix = Matrix::new(name, packed)?;
        if let Some(format) = matrix.packed_in() {
            *self.widened.entry(format).or_default() += 1;
        }
        Ok(wide(&matrix))
    }

    fn send(&mut self, ready: Ready) -> Result<Weight, LoadError> {
        match ready {
            Ready::Floats(data) => {
                let tensor = self.tensor(&data)?.to_dtype(self.dtype())?;
                self.source.count_bytes(bytes_of(&tensor), None);
                Ok(Weight::Floats(tensor))
            }
            Ready::Blocks(format, BlockMatrix { format: blocks, rows, columns, bytes }) => {
                self.source.count_bytes(bytes.len() as u64, Some(blocks.name()));
                let storage = QStorage::from_data(Cow::Owned(bytes), self.device, format)?;
                Ok(Weight::Blocks(Arc::new(QTensor::new(storage, (rows, columns))?)))
            }
        }
    }
}

impl Ready {
    /// Whether the two can be one matrix.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Floats(data), Self::Floats(other)) => data.dtype == other.dtype,
            (Self::Blocks(format, _), Self::Blocks(other, _)) => format == other,
            _ => false,
        }
    }

    /// Puts the rows of a matrix that is like this below it.
    fn append(&mut self, other: Self) {
        match (self, other) {
            (Self::Floats(data), Self::Floats(other)) => {
                data.bytes.extend_from_slice(&other.bytes);
                data.shape[0] += other.shape[0];
            }
            (Self::Blocks(_, matrix), Self::Blocks(_, other)) => {
                matrix.bytes.extend_from_slice(&other.bytes);
                matrix.rows += other.rows;
            }
            _ => {}
        }
    }
}

/// `stored`, rounded to blocks as candle rounds them.
fn quantized(name: &str, stored: StoredMatrix, format: BlockFormat) -> Result<Ready, LoadError> {
    let Some(dtype) = ggml_dtype(format) else {
        return Err(LoadError::Device(format!("the device has no products for matrices in {}", format.name())));
    };
    let (rows, columns) = (stored.rows(), stored.columns());
    let data = match stored {
        StoredMatrix::Floats(data) => data,
        packed => wide(&Matrix::new(name, packed)?),
    };
    let values = Tensor::from_raw_buffer(&data.bytes, tensor_dtype(data.dtype), &data.shape, &Device::Cpu)?;
    let bytes = QTensor::quantize(&values, dtype)?.data()?.into_owned();
    Ok(Ready::Blocks(dtype, BlockMatrix { format, rows, columns, bytes }))
}

/// The numbers of a matrix in f32.
fn wide(matrix: &Matrix) -> TensorData {
    let matrix = matrix.to_dtype(Dtype::F32);
    let values = matrix.widen(0..matrix.outputs(), &mut []);
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    TensorData { dtype: Dtype::F32, shape: vec![matrix.outputs(), matrix.inputs()], bytes }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

/// A dtype as candle names it.
pub(super) fn tensor_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
    }
}

/// A block format as candle names it, where candle has products for it on all devices.
fn ggml_dtype(format: BlockFormat) -> Option<GgmlDType> {
    match format {
        BlockFormat::Q4_0 => Some(GgmlDType::Q4_0),
        BlockFormat::Q4_1 => Some(GgmlDType::Q4_1),
        BlockFormat::Q5_0 => Some(GgmlDType::Q5_0),
        BlockFormat::Q5_1 => Some(GgmlDType::Q5_1),
        BlockFormat::Q8_0 => Some(GgmlDType::Q8_0),
        BlockFormat::Q2K => Some(GgmlDType::Q2K),
        BlockFormat::Q3K => Some(GgmlDType::Q3K),
        BlockFormat::Q4K => Some(GgmlDType::Q4K),
        BlockFormat::Q5K => Some(GgmlDType::Q5K),
        BlockFormat::Q6K => Some(GgmlDType::Q6K),
        BlockFormat::Iq4Nl | BlockFormat::Iq4Xs | BlockFormat::Mxfp4 => None,
    }
}
