//! Widening against references made by others, and what the engine promises of every form.

use std::path::Path;

use candle_core::{
    Device,
    quantized::{GgmlDType, QStorage, QTensor},
};
use safetensors::SafeTensors;

use super::*;
use crate::model::{
    Quant,
    checkpoint::{BlockMatrix, Checkpoint},
    spec::{FfnSpec, LinearSpec},
};

const FORMATS: [BlockFormat; 13] = [
    BlockFormat::Q4_0,
    BlockFormat::Q4_1,
    BlockFormat::Q5_0,
    BlockFormat::Q5_1,
    BlockFormat::Q8_0,
    BlockFormat::Q2K,
    BlockFormat::Q3K,
    BlockFormat::Q4K,
    BlockFormat::Q5K,
    BlockFormat::Q6K,
    BlockFormat::Iq4Nl,
    BlockFormat::Iq4Xs,
    BlockFormat::Mxfp4,
];

/// Numbers that look random, of a standard deviation of about a half.
fn random(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next() + next() + next()).collect()
}

fn bytes(count: usize, seed: u32) -> Vec<u8> {
    random(count, seed).into_iter().map(|value| (value * 1e4) as i32 as u8).collect()
}

/// Blocks and numbers of `tests/fixtures/blocks`, which the `gguf` package has made.
fn reference(format: BlockFormat) -> (Vec<u8>, Vec<f32>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/blocks/blocks.safetensors");
    let file = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let tensor = |what: &str| tensors.tensor(&format!("{}.{what}", format.name())).unwrap().data().to_vec();
    let numbers = tensor("numbers").as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    (tensor("bytes"), numbers)
}

/// A matrix of `rows` rows whose blocks are those of the reference, in turn.
fn blocks(format: BlockFormat, rows: usize, columns: usize) -> Matrix {
    let (reference, _) = reference(format);
    let size = format.bytes();
    let kinds = reference.len() / size;
    let block = |index: usize| &reference[(index * 7 + index / kinds) % kinds * size..][..size];
    let bytes = (0..rows * columns / format.numbers()).flat_map(|index| block(index).to_vec()).collect();
    Matrix::new("test", StoredMatrix::Blocks(BlockMatrix { format, rows, columns, bytes })).unwrap()
}

fn fp8(rows: usize, columns: usize, tile: [usize; 2]) -> Fp8Matrix {
    let codes = bytes(rows * columns, 5).into_iter().map(|code| if code & 127 == 127 { 1 } else { code }).collect();
    let scales = random(rows.div_ceil(tile[0]) * columns.div_ceil(tile[1]), 6);
    Fp8Matrix { rows, columns, codes, tile, scales }
}

fn grouped(rows: usize, columns: usize, bits: u32, ordered: bool) -> GroupedMatrix {
    let group = 32;
    let count = rows * columns / group;
    GroupedMatrix {
        rows,
        columns,
        bits,
        group,
        codes: bytes(rows * columns * bits as usize / 8, 7),
        scales: random(count, 8).into_iter().map(|scale| f16::from_f32(scale / 100.0).to_bits()).collect(),
        scale_dtype: Dtype::F16,
        zeros: (0..count).map(|index| (index * 5 % ((1 << bits) + 1)) as u16).collect(),
        order: ordered.then(|| (0..columns).map(|column| (column * 77 % columns) as u32).collect()),
    }
}

/// One matrix of every form.
fn every_form(rows: usize, columns: usize) -> Vec<Matrix> {
    let dense = Matrix::from_f32(random(rows * columns, 1), columns);
    let mut matrices: Vec<Matrix> = FORMATS.into_iter().map(|format| blocks(format, rows, columns)).collect();
    matrices.extend([Dtype::F32, Dtype::Bf16, Dtype::F16].map(|dtype| dense.to_dtype(dtype)));
    matrices.extend([[128, 128], [1, columns], [rows, columns], [5, 48]].map(|tile| {
        let stored = StoredMatrix::Fp8(fp8(rows, columns, tile));
        Matrix::new("test", stored).unwrap()
    }));
    matrices.extend([(4, false), (4, true), (8, false), (8, true)].map(|(bits, ordered)| {
        let stored = StoredMatrix::Grouped(grouped(rows, columns, bits, ordered));
        Matrix::new("test", stored).unwrap()
    }));
    matrices
}

fn wide(matrix: &Matrix) -> Vec<f32> {
    let mut scratch = vec![f32::NAN; matrix.outputs * matrix.inputs];
    matrix.widen(0..matrix.outputs, &mut scratch).to_vec()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

#[test]
fn blocks_are_widened_as_the_gguf_package_does_bit_for_bit() {
    for format in FORMATS {
        let (bytes, expected) = reference(format);
        let mut numbers = vec![f32::NAN; expected.len()];
        super::blocks::widen(format, &bytes, &mut numbers);
        assert_eq!(numbers.len() * format.bytes(), bytes.len() * format.numbers(), "{}", format.name());
        for (index, (found, expected)) in numbers.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{} {index}", format.name());
        }
    }
}

/// The rows of queries and keys are brought into another order on the way; the reference has them in ours.
#[test]
fn matrices_of_a_gguf_file_are_the_numbers_that_the_gguf_package_reads() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf");
    let checkpoint = Checkpoint::open(&dir.join("blocks.gguf")).unwrap();
    let file = std::fs::read(dir.join("blocks.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&file).unwrap();
    let mut formats = std::collections::BTreeSet::new();
    for block in &checkpoint.spec().blocks {
        let FfnSpec::Gated { gate, up, down, .. } = &block.ffn else { panic!("it is a Llama") };
        let attention = &block.attention;
        for part in [&attention.q, &attention.k, &attention.v, &attention.o, gate, up, down] {
            // One of a format that is not computed with.
            let Ok(stored) = checkpoint.matrix(part) else { continue };
            let matrix = Matrix::new(&part.weight, stored).unwrap();
            formats.extend(matrix.packed_in());
            let numbers = wide(&matrix);
            let rows = expected.tensor(&part.weight).unwrap().data().to_vec();
            let rows: Vec<f32> = rows.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            for (row, expected) in [0, 1, 2, 65, 127].into_iter().zip(rows.chunks(part.inputs)) {
                let found = &numbers[row * part.inputs..][..part.inputs];
                // Not of bits: the package has no negative zero in MXFP4.
                assert_eq!(found, expected, "{}, row {row}", part.weight);
                let one = LinearSpec { outputs: 1, ..part.rows(row, 1, 1, 1) };
                let one = Matrix::new(&part.weight, checkpoint.matrix(&one).unwrap()).unwrap();
                assert_eq!(wide(&one), expected, "{}, row {row} alone", part.weight);
            }
        }
    }
    assert_eq!(formats.len(), FORMATS.len(), "{formats:?}");
}

#[test]
fn blocks_are_widened_as_candle_does() {
    for (format, dtype) in [
        (BlockFormat::Q4_0, GgmlDType::Q4_0),
        (BlockFormat::Q4_1, GgmlDType::Q4_1),
        (BlockFormat::Q5_0, GgmlDType::Q5_0),
        (BlockFormat::Q5_1, GgmlDType::Q5_1),
        (BlockFormat::Q8_0, GgmlDType::Q8_0),
        (BlockFormat::Q2K, GgmlDType::Q2K),
        (BlockFormat::Q3K, GgmlDType::Q3K),
        (BlockFormat::Q4K, GgmlDType::Q4K),
        (BlockFormat::Q5K, GgmlDType::Q5K),
        (BlockFormat::Q6K, GgmlDType::Q6K),
    ] {
        let matrix = blocks(format, 3, 1024);
        let Values::Blocks(_, bytes) = &matrix.values else { unreachable!() };
        let storage = QStorage::from_data(bytes.into(), &Device::Cpu, dtype).unwrap();
        let tensor = QTensor::new(storage, (3, 1024)).unwrap().dequantize(&Device::Cpu).unwrap();
        let expected: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(wide(&matrix), expected, "{}", format.name());
    }
}

#[test]
fn any_rows_are_widened_as_all_are() {
    for matrix in every_form(11, 512) {
        let all = wide(&matrix);
        for rows in [0..1, 3..4, 4..11, 10..11] {
            let mut scratch = vec![f32::NAN; 512 * rows.len()];
            let some = matrix.widen(rows.clone(), &mut scratch);
            assert_eq!(bits(some), bits(&all[rows.start * 512..rows.end * 512]), "{:?}", matrix.packed_in());
        }
    }
}

/// The promise of every form: a product equals that of the widened matrix bit for bit, in any batch.
#[test]
fn a_product_equals_that_of_the_widened_matrix_bit_for_bit() {
    let (rows, outputs, inputs) = (7, 301, 768);
    let x = random(rows * inputs, 2);
    for matrix in every_form(outputs, inputs) {
        let dense = Matrix::from_f32(wide(&matrix), inputs);
        let expected = dense.product(&x);
        for (first, count) in [(0, 7), (0, 1), (3, 1), (2, 2), (1, 3), (0, 5)] {
            let x = &x[first * inputs..][..count * inputs];
            let y = matrix.product(x);
            assert_eq!(bits(&y), bits(&expected[first * outputs..][..count * outputs]), "{:?}", matrix.packed_in());
        }
    }
}

#[test]
fn fp8_scales_belong_to_tiles() {
    let stored = fp8(11, 500, [4, 128]);
    let matrix = Matrix::new("test", StoredMatrix::Fp8(stored.clone())).unwrap();
    let unscaled = Fp8Matrix { scales: vec![1.0; stored.scales.len()], ..stored.clone() };
    let unscaled = wide(&Matrix::new("test", StoredMatrix::Fp8(unscaled)).unwrap());
    for (index, number) in wide(&matrix).into_iter().enumerate() {
        let (row, column) = (index / 500, index % 500);
        assert_eq!(number, unscaled[index] * stored.scales[row / 4 * 4 + column / 128]);
    }
}

#[test]
fn grouped_integers_are_scaled_around_their_zeros() {
    for bits in [4, 8] {
        let stored = grouped(5, 96, bits, false);
        let matrix = Matrix::new("test", StoredMatrix::Grouped(stored.clone())).unwrap();
        for (index, number) in wide(&matrix).into_iter().enumerate() {
            let code = match bits {
                4 => stored.codes[index / 2] >> (index % 2 * 4) & 15,
                _ => stored.codes[index],
            };
            let scale = f16::from_bits(stored.scales[index / 32]).to_f32();
            assert_eq!(number, scale * (f32::from(code) - f32::from(stored.zeros[index / 32])));
        }
    }
}

#[test]
fn a_conversion_puts_columns_back_in_order() {
    let stored = grouped(5, 96, 4, true);
    let order = stored.order.clone().unwrap();
    let matrix = Matrix::new("test", StoredMatrix::Grouped(stored)).unwrap();
    let (before, after) = (wide(&matrix), matrix.to_dtype(Dtype::F32));
    assert_eq!((after.order(), after.packed_in()), (None, None));
    let after = wide(&after);
    for (index, number) in before.into_iter().enumerate() {
        assert_eq!(number, after[index / 96 * 96 + order[index % 96] as usize]);
    }
}

/// What rounding to a format costs, of numbers with a normal distribution: near what its bits allow, and what candle's own
/// way there and back gives.
#[test]
fn quantizing_is_as_good_as_the_format_allows() {
    let (rows, columns) = (64, 1024);
    let dense = Matrix::from_f32(random(rows * columns, 3), columns);
    let exact = wide(&dense);
    let norm: f32 = exact.iter().map(|x| x * x).sum();
    for (quant, bound) in [(Quant::Q8_0, 0.006), (Quant::Q6K, 0.02), (Quant::Q4K, 0.075), (Quant::Q4_0, 0.1)] {
        let format = quant.format_for(columns).unwrap();
        let packed = dense.to_blocks(format).unwrap();
        assert!(packed.is_in(format));
        assert_eq!(packed.size_in_bytes(), rows * columns / format.numbers() * format.bytes());
        let error: f32 = wide(&packed).iter().zip(&exact).map(|(a, b)| (a - b) * (a - b)).sum();
        let error = (error / norm).sqrt();
        assert!(error < bound && error > bound / 4.0, "{quant}: {error}");
        // Widening and quantizing again, as `--quant` does with what is packed already.
        let again = packed.to_dtype(Dtype::F32).to_blocks(format).unwrap();
        let drift: f32 = wide(&again).iter().zip(&wide(&packed)).map(|(a, b)| (a - b) * (a - b)).sum();
        assert!((drift / norm).sqrt() < bound, "{quant}: drifts by {drift}");
    }
    let error = dense.to_blocks(BlockFormat::Q5K).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("q5_k"), "{error}");
}

#[test]
fn rows_are_put_below_others() {
    let dense = Matrix::from_f32(random(12 * 256, 4), 256);
    for form in [
        |m: &Matrix| m.to_dtype(Dtype::F32),
        |m: &Matrix| m.to_dtype(Dtype::Bf16),
        |m: &Matrix| m.to_blocks(BlockFormat::Q4K).unwrap(),
    ] {
        let (above, below) = (Matrix::from_f32(wide(&dense)[..2560].to_vec(), 256), &wide(&dense)[2560..]);
        let mut whole = form(&above);
        whole.reserve_rows(12);
        whole.extend(form(&Matrix::from_f32(below.to_vec(), 256))).unwrap();
        assert_eq!(wide(&whole), wide(&form(&dense)));
        assert_eq!(whole.outputs(), 12);
        whole.extend(blocks(BlockFormat::Mxfp4, 1, 256)).unwrap_err();
    }
}

#[test]
fn matrices_that_are_not_what_their_shape_says_are_refused() {
    let refused = |stored: StoredMatrix, reason: &str| {
        let error = Matrix::new("blk.weight", stored).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("blk.weight"), "{error}");
    };
    let floats = |shape: &[usize], size: usize| {
        StoredMatrix::Floats(TensorData { dtype: Dtype::Bf16, shape: shape.to_vec(), bytes: vec![0; size] })
    };
    refused(floats(&[2, 3], 11), "11 bytes");
    refused(floats(&[usize::MAX, 3], 12), "beyond counting");
    refused(floats(&[2, 3, 1], 12), "3 dimensions");
    let blocks = |columns: usize, size: usize| {
        let bytes = vec![0; size];
        StoredMatrix::Blocks(BlockMatrix { format: BlockFormat::Q4K, rows: 2, columns, bytes })
    };
    refused(blocks(256, 287), "287 bytes");
    refused(blocks(128, 144), "multiple of 256");
    let changed = |change: fn(&mut Fp8Matrix)| {
        let mut matrix = fp8(6, 96, [4, 32]);
        change(&mut matrix);
        StoredMatrix::Fp8(matrix)
    };
    refused(changed(|matrix| matrix.tile = [0, 32]), "0 × 32");
    refused(changed(|matrix| matrix.scales.truncate(5)), "5 scales");
    refused(changed(|matrix| matrix.codes.push(0)), "577 bytes");
    let changed = |change: fn(&mut GroupedMatrix)| {
        let mut matrix = grouped(6, 96, 4, true);
        change(&mut matrix);
        StoredMatrix::Grouped(matrix)
    };
    refused(changed(|matrix| matrix.bits = 3), "3 bits");
    refused(changed(|matrix| matrix.group = 0), "multiple of 0");
    refused(changed(|matrix| matrix.group = 64), "multiple of 64");
    refused(changed(|matrix| matrix.group = 1), "multiple of 2");
    refused(changed(|matrix| matrix.scale_dtype = Dtype::F32), "f32");
    refused(changed(|matrix| matrix.zeros.truncate(3)), "3 zeros");
    refused(changed(|matrix| matrix.codes.truncate(9)), "9 bytes");
    refused(changed(|matrix| matrix.order = Some(vec![0; 96])), "column 0 twice");
    refused(changed(|matrix| matrix.order = Some(vec![96; 96])), "column 96");
    refused(changed(|matrix| matrix.order = Some(vec![])), "0 places");
}
