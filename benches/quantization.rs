//! What each format costs and gives: bits a number, error, and the speed of a product with one row.
//!
//! `cargo bench --bench quantization`. Errors are root mean squares, divided by that of what is exact: of the widened numbers
//! of a matrix `[1024, 1024]` with a normal distribution, of its product with a row, and of what each block of the
//! demo's model adds to the residual stream. The tables in `src/engine/matrix.rs` and the README are its output.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    hint::black_box,
    path::Path,
    sync::mpsc,
    time::{Duration, Instant},
};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use helion::{
    engine::{Engine, EngineOptions, HiddenStates, Job, Keep, LaneRun, Matrix},
    model::{
        Dtype, Quant,
        checkpoint::{BlockFormat, BlockMatrix, Checkpoint, Fp8Matrix, GroupedMatrix, StoredMatrix, TensorData},
    },
};

const SIZE: usize = 1024;
/// Rows of the matrix whose product is timed: far more than any cache holds.
const TALL: usize = 32 * SIZE;
const LONGEST: Duration = Duration::from_millis(600);

fn main() {
    println!("| format | bits a number | error of numbers | of a product | GB/s | numbers a second |");
    println!("|---|---|---|---|---|---|");
    let exact = normal(SIZE * SIZE, 1);
    let x = normal(SIZE, 2);
    for name in ["bf16", "f16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "mxfp4"]
        .into_iter()
        .chain(["q3_k", "q2_k", "fp8", "int8", "int4"])
    {
        row(name, &exact, &x);
    }
    println!("\n| --quant | error of the demo's model's blocks, the mean and the worst |\n|---|---|");
    for quant in [Quant::None, Quant::Q8_0, Quant::Q6K, Quant::Q4K, Quant::Q4_0] {
        let errors = block_errors(quant);
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        println!("| {quant} | {:.2} %, {:.2} % |", 100.0 * mean, 100.0 * errors.iter().copied().fold(0.0, f64::max));
    }
}

fn row(name: &str, exact: &[f32], x: &[f32]) {
    let matrix = Matrix::new(name, packed(name, exact, SIZE)).unwrap();
    let mut scratch = vec![0.0; exact.len()];
    let numbers = error(matrix.widen(0..SIZE, &mut scratch), exact);
    let wide = Matrix::new(name, packed("f32", exact, SIZE)).unwrap();
    let product = error(&matrix.product(x), &wide.product(x));
    let bits = matrix.size_in_bytes() as f64 * 8.0 / exact.len() as f64;

    let tall = Matrix::new(name, repeated(packed(name, exact, SIZE))).unwrap();
    let mut best = Duration::MAX;
    let start = Instant::now();
    while start.elapsed() < LONGEST {
        let started = Instant::now();
        black_box(tall.product(black_box(x)));
        best = best.min(started.elapsed());
    }
    let seconds = best.as_secs_f64();
    let bytes = tall.size_in_bytes() as f64 / seconds / 1e9;
    let speed = (TALL * SIZE) as f64 / seconds / 1e9;
    println!(
        "| {name} | {bits:.2} | {:.3} % | {:.3} % | {bytes:.1} | {speed:.1} G |",
        100.0 * numbers,
        100.0 * product
    );
}

/// Numbers with a normal distribution.
fn normal(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1 << 24)
    };
    // Box and Muller 1958.
    (0..count)
        .map(|_| ((-2.0 * (1.0 - next()).ln()).sqrt() * (std::f64::consts::TAU * next()).cos()) as f32 * 0.02)
        .collect()
}

fn error(found: &[f32], exact: &[f32]) -> f64 {
    let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let off = squares(&mut found.iter().zip(exact).map(|(a, b)| a - b));
    (off / squares(&mut exact.iter().copied())).sqrt()
}

fn packed(name: &str, exact: &[f32], columns: usize) -> StoredMatrix {
    let rows = exact.len() / columns;
    let floats = |dtype: Dtype| {
        let bytes = match dtype {
            Dtype::F32 => exact.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::Bf16 => exact.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::F16 => exact.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        };
        StoredMatrix::Floats(TensorData { dtype, shape: vec![rows, columns], bytes })
    };
    let blocks =
        |format: BlockFormat, bytes: Vec<u8>| StoredMatrix::Blocks(BlockMatrix { format, rows, columns, bytes });
    let ggml = |format: BlockFormat, dtype: GgmlDType| {
        let tensor = Tensor::from_slice(exact, exact.len(), &Device::Cpu).unwrap();
        blocks(format, QTensor::quantize(&tensor, dtype).unwrap().data().unwrap().into_owned())
    };
    match name {
        "f32" => floats(Dtype::F32),
        "bf16" => floats(Dtype::Bf16),
        "f16" => floats(Dtype::F16),
        "q8_0" => ggml(BlockFormat::Q8_0, GgmlDType::Q8_0),
        "q6_k" => ggml(BlockFormat::Q6K, GgmlDType::Q6K),
        "q5_k" => ggml(BlockFormat::Q5K, GgmlDType::Q5K),
        "q5_1" => ggml(BlockFormat::Q5_1, GgmlDType::Q5_1),
        "q5_0" => ggml(BlockFormat::Q5_0, GgmlDType::Q5_0),
        "q4_k" => ggml(BlockFormat::Q4K, GgmlDType::Q4K),
        "q4_1" => ggml(BlockFormat::Q4_1, GgmlDType::Q4_1),
        "q4_0" => ggml(BlockFormat::Q4_0, GgmlDType::Q4_0),
        "q3_k" => ggml(BlockFormat::Q3K, GgmlDType::Q3K),
        "q2_k" => ggml(BlockFormat::Q2K, GgmlDType::Q2K),
        "mxfp4" => blocks(BlockFormat::Mxfp4, exact.as_chunks().0.iter().flat_map(mxfp4).collect()),
        "iq4_nl" => blocks(BlockFormat::Iq4Nl, exact.as_chunks().0.iter().flat_map(iq4_nl).collect()),
        "fp8" => fp8(exact, columns),
        "int8" => grouped(exact, columns, 8),
        "int4" => grouped(exact, columns, 4),
        other => panic!("{other}"),
    }
}

fn nearest(table: &[f32], x: f32) -> u8 {
    let distance = |code: &usize| (table[*code] - x).abs();
    (0..table.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap() as u8
}

/// The standard's own way: the scale is the largest number's power of two, less that of the format's largest.
fn mxfp4(numbers: &[f32; 32]) -> [u8; 17] {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let largest = numbers.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let exponent = largest.log2().floor() as i32 - 2;
    let code = |x: f32| nearest(&MAGNITUDES, x.abs() * 2f32.powi(-exponent)) | u8::from(x < 0.0) << 3;
    let mut block = [0; 17];
    for (byte, pair) in block.iter_mut().zip(numbers.chunks(2)) {
        *byte = code(pair[0]) | code(pair[1]) << 4;
    }
    block[16] = (exponent + 127) as u8;
    block
}

/// The scale of the largest number, which takes the code of the table's largest.
fn iq4_nl(numbers: &[f32; 32]) -> [u8; 18] {
    const TABLE: [f32; 16] =
        [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];
    let largest = numbers.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
    let scale = half::f16::from_f32(largest / -127.0);
    let code = |x: f32| nearest(&TABLE, x / scale.to_f32());
    let mut block = [0; 18];
    block[..2].copy_from_slice(&scale.to_le_bytes());
    for i in 0..16 {
        block[2 + i] = code(numbers[i]) | code(numbers[16 + i]) << 4;
    }
    block
}

/// In tiles of 128 by 128 whose largest number becomes 448.
fn fp8(exact: &[f32], columns: usize) -> StoredMatrix {
    const TILE: usize = 128;
    let (rows, across) = (exact.len() / columns, columns / TILE);
    let mut scales = vec![0.0f32; rows / TILE * across];
    let tile = |at: usize| at / columns / TILE * across + at % columns / TILE;
    for (at, x) in exact.iter().enumerate() {
        scales[tile(at)] = scales[tile(at)].max(x.abs() / 448.0);
    }
    let value = |code: u8| match (i32::from(code >> 3), f32::from(code & 7)) {
        (0, mantissa) => mantissa / 512.0,
        (exponent, mantissa) => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    let table: Vec<f32> = (0..127).map(value).collect();
    let code = |(at, x): (usize, &f32)| nearest(&table, x.abs() / scales[tile(at)]) | u8::from(*x < 0.0) << 7;
    let codes = exact.iter().enumerate().map(code).collect();
    StoredMatrix::Fp8(Fp8Matrix { rows, columns, codes, tile: [TILE, TILE], scales })
}

/// In groups of 128 from their least to their largest number.
fn grouped(exact: &[f32], columns: usize, bits: u32) -> StoredMatrix {
    const GROUP: usize = 128;
    let most = ((1 << bits) - 1) as f32;
    let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
    for group in exact.chunks(GROUP) {
        let (least, largest) = group.iter().fold((0.0f32, 0.0f32), |(a, b), x| (a.min(*x), b.max(*x)));
        let scale = half::f16::from_f32((largest - least) / most);
        let zero = (-least / scale.to_f32()).round();
        let code = |x: &f32| (x / scale.to_f32() + zero).round().clamp(0.0, most) as u8;
        match bits {
            4 => codes.extend(group.chunks(2).map(|pair| code(&pair[0]) | code(&pair[1]) << 4)),
            _ => codes.extend(group.iter().map(code)),
        }
        scales.push(scale.to_bits());
        zeros.push(zero as u16);
    }
    let (rows, scale_dtype) = (exact.len() / columns, Dtype::F16);
    StoredMatrix::Grouped(GroupedMatrix {
        rows,
        columns,
        bits,
        group: GROUP,
        codes,
        scales,
        scale_dtype,
        zeros,
        order: None,
    })
}

/// The same rows again and again, `TALL` in all.
fn repeated(stored: StoredMatrix) -> StoredMatrix {
    fn more<T: Copy>(values: &mut Vec<T>) {
        *values = values.repeat(TALL / SIZE);
    }
    match stored {
        StoredMatrix::Floats(mut data) => {
            more(&mut data.bytes);
            data.shape[0] = TALL;
            StoredMatrix::Floats(data)
        }
        StoredMatrix::Blocks(mut matrix) => {
            more(&mut matrix.bytes);
            StoredMatrix::Blocks(BlockMatrix { rows: TALL, ..matrix })
        }
        StoredMatrix::Fp8(mut matrix) => {
            more(&mut matrix.codes);
            more(&mut matrix.scales);
            StoredMatrix::Fp8(Fp8Matrix { rows: TALL, ..matrix })
        }
        StoredMatrix::Grouped(mut matrix) => {
            more(&mut matrix.codes);
            more(&mut matrix.scales);
            more(&mut matrix.zeros);
            StoredMatrix::Grouped(GroupedMatrix { rows: TALL, ..matrix })
        }
    }
}

/// Of each block of the demo's model, given the input that it has in f32.
fn block_errors(quant: Quant) -> Vec<f64> {
    const TOKENS: usize = 32;
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/demo/helion-tiny");
    let checkpoint = Checkpoint::open(&model).unwrap();
    let (blocks, width) = (checkpoint.spec().num_blocks(), checkpoint.spec().hidden_size);
    let mut input = normal(TOKENS * width, 3).into_iter().map(|x| x * 50.0).collect::<Vec<f32>>();
    let run = |block: usize, quant: Quant, input: &[f32]| {
        let options = EngineOptions { quant, cache_tokens: 64, ..EngineOptions::new(block..block + 1, Dtype::F32) };
        let engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
        let (answer, answers) = mpsc::sync_channel(1);
        engine.submit(Job {
            cache: engine.cache(block..block + 1).unwrap(),
            lanes: vec![LaneRun { lane: 0, position: 0, tokens: TOKENS }],
            hidden: HiddenStates::from_f32(Dtype::F32, width, input),
            rope_length: None,
            keep: Keep::All,
            deadline: Instant::now() + Duration::from_secs(60),
            cancelled: Default::default(),
            done: Box::new(move |_, result| answer.send(result.unwrap().hidden.to_f32()).unwrap()),
        });
        answers.recv().unwrap()
    };
    (0..blocks)
        .map(|block| {
            let (exact, found) = (run(block, Quant::None, &input), run(block, quant, &input));
            let added: Vec<f32> = exact.iter().zip(&input).map(|(after, before)| after - before).collect();
            let off: Vec<f32> = found.iter().zip(&input).map(|(after, before)| after - before).collect();
            input = exact;
            error(&off, &added)
        })
        .collect()
}
