//! Every path against the definition in plain numbers, and tiles against rows.

mod operations;

use half::{bf16, f16};
use proptest::prelude::*;

use super::{tiles::mxfp4_table, *};
use crate::{
    engine::matrix::Matrix,
    model::{
        Dtype,
        checkpoint::{BlockFormat, BlockMatrix, StoredMatrix, TensorData},
    },
};

const LAYOUTS: [Layout; 8] =
    [Layout::F32, Layout::Bf16, Layout::F16, Layout::Q8_0, Layout::Q4_0, Layout::Q4K, Layout::Q6K, Layout::Mxfp4];

/// Numbers that look random, from -0.5 to 0.5.
pub(in crate::engine) fn random(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// The same from -1 to 1.
pub(in crate::engine) fn numbers(count: usize, seed: u32) -> Vec<f32> {
    random(count, seed).into_iter().map(|number| 2.0 * number).collect()
}

fn random_bytes(count: usize, seed: u32) -> Vec<u8> {
    random(count, seed).into_iter().map(|value| ((value + 0.5) * 65_536.0) as u32 as u8).collect()
}

/// A matrix that has the layout once it is packed, with any bits in it but for scales, which are small numbers.
fn matrix(layout: Layout, outputs: usize, inputs: usize, seed: u32) -> Matrix {
    let floats =
        |dtype: Dtype, bytes: Vec<u8>| StoredMatrix::Floats(TensorData { dtype, shape: vec![outputs, inputs], bytes });
    let numbers = random(outputs * inputs, seed);
    let blocks = |format: BlockFormat, halves: &[usize]| {
        let mut bytes = random_bytes(outputs * inputs / format.numbers() * format.bytes(), seed);
        for (index, block) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
            for at in halves {
                let scale = f16::from_f32_const((index * 37 % 61) as f32 / 1000.0 - 0.03).to_le_bytes();
                block[*at..at + 2].copy_from_slice(&scale);
            }
            if format == BlockFormat::Mxfp4 {
                block[16] = 110 + (index * 7 % 20) as u8;
            }
        }
        StoredMatrix::Blocks(BlockMatrix { format, rows: outputs, columns: inputs, bytes })
    };
    let stored = match layout {
        Layout::F32 => floats(Dtype::F32, numbers.iter().flat_map(|value| value.to_le_bytes()).collect()),
        Layout::Bf16 => {
            floats(Dtype::Bf16, numbers.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect())
        }
        Layout::F16 => {
            floats(Dtype::F16, numbers.iter().flat_map(|value| f16::from_f32_const(*value).to_le_bytes()).collect())
        }
        Layout::Q8_0 => blocks(BlockFormat::Q8_0, &[0]),
        Layout::Q4_0 => blocks(BlockFormat::Q4_0, &[0]),
        Layout::Q4K => blocks(BlockFormat::Q4K, &[0, 2]),
        Layout::Q6K => blocks(BlockFormat::Q6K, &[208]),
        Layout::Mxfp4 => blocks(BlockFormat::Mxfp4, &[]),
    };
    Matrix::new("test", stored).unwrap()
}

fn wide(matrix: &Matrix) -> Vec<f32> {
    let mut scratch = vec![f32::NAN; matrix.outputs() * matrix.inputs()];
    matrix.widen(0..matrix.outputs(), &mut scratch).to_vec()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// `[rows, outputs]` of the packed `matrix` on `path`.
fn product(path: Path, matrix: &Matrix, x: &[f32]) -> Vec<f32> {
    let layout = matrix.layout().unwrap();
    let (inputs, outputs) = (matrix.inputs(), matrix.outputs());
    let (rows, tiles) = (x.len() / inputs, outputs.div_ceil(TILE));
    let mut prepared = Rows::default();
    if layout.has_blocks() {
        prepared.fill_blocks(x, inputs, path);
    } else {
        prepared.fill_floats(x, inputs, path);
    }
    let mut y = vec![f32::NAN; tiles * rows * TILE];
    TileProduct { layout, tiles: matrix.tiles(0..tiles), inputs, rows: &prepared, y: &mut y }.run(path);
    let at = |row: usize, output: usize| y[(output / TILE * rows + row) * TILE + output % TILE];
    (0..rows).flat_map(|row| (0..outputs).map(move |output| (row, output))).map(|(r, o)| at(r, o)).collect()
}

fn packed(mut matrix: Matrix) -> Matrix {
    matrix.pack(true);
    assert!(matrix.layout().is_some());
    matrix
}

fn multiple(layout: Layout) -> usize {
    match layout {
        Layout::F32 => 1,
        Layout::Bf16 | Layout::F16 => 2,
        Layout::Q8_0 | Layout::Q4_0 | Layout::Mxfp4 => 32,
        Layout::Q4K | Layout::Q6K => 256,
    }
}

#[test]
fn packing_moves_bits_and_loses_none() {
    for layout in LAYOUTS {
        for (outputs, inputs) in [(1, 1), (16, 3), (37, 2)] {
            let matrix = || matrix(layout, outputs, inputs * multiple(layout), 3);
            let (before, after) = (matrix(), packed(matrix()));
            assert_eq!(bits(&wide(&after)), bits(&wide(&before)), "{layout:?} {outputs} {inputs}");
            let size = before.size_in_bytes() / outputs * outputs.next_multiple_of(TILE);
            assert_eq!(after.size_in_bytes(), size, "{layout:?}");
            let last = outputs - 1..outputs;
            let (mut one, mut other) = (vec![0.0; before.inputs()], vec![0.0; before.inputs()]);
            assert_eq!(after.widen(last.clone(), &mut one), before.widen(last, &mut other));
        }
    }
}

/// The codes of a row and their scales, as numbers.
fn rounded(x: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let mut codes = Vec::new();
    let mut scales = Vec::new();
    for block in x.chunks(32) {
        let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let scale = largest / 127.0;
        scales.push(scale);
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        codes.extend(block.iter().map(|x| (x * inverse).round_ties_even() as i32));
    }
    (codes, scales)
}

/// What a product is to be, to the rounding of the last sums: rows as they are or rounded, and the widened matrix.
fn exact(layout: Layout, matrix: &Matrix, x: &[f32]) -> Vec<f64> {
    let inputs = matrix.inputs();
    let weights = wide(matrix);
    let mut y = Vec::new();
    for x in x.chunks(inputs) {
        let x: Vec<f64> = if layout.has_blocks() {
            let (codes, scales) = rounded(x);
            codes.iter().enumerate().map(|(at, code)| f64::from(*code) * f64::from(scales[at / 32])).collect()
        } else {
            x.iter().map(|x| f64::from(*x)).collect()
        };
        y.extend(weights.chunks(inputs).map(|w| w.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum::<f64>()));
    }
    y
}

/// On all paths the same bits, and close to the exact sums.
fn check(layout: Layout, rows: usize, outputs: usize, inputs: usize, seed: u32) {
    let x = random(rows * inputs, seed);
    let plain = matrix(layout, outputs, inputs, seed + 1);
    let exact = exact(layout, &plain, &x);
    let matrix = packed(plain);
    let portable = product(Path::Portable, &matrix, &x);
    let size = exact.iter().map(|y| y * y).sum::<f64>().sqrt() / (exact.len() as f64).sqrt();
    for (found, exact) in portable.iter().zip(&exact) {
        let error = (f64::from(*found) - exact).abs();
        assert!(error <= 2e-5 * size.max(1e-3), "{layout:?} {rows} {outputs} {inputs}: {found} is not {exact}");
    }
    for path in Path::all() {
        let found = product(path, &matrix, &x);
        assert_eq!(bits(&found), bits(&portable), "{layout:?} on {}: {rows} {outputs} {inputs}", path.name());
    }
}

#[test]
fn every_path_gives_what_the_numbers_say() {
    for layout in LAYOUTS {
        // Every size of a group of rows, and tiles for and beyond every number that is taken at a time. What is interpreted is
        // 10,000 times as slow: there each is taken once.
        let (most_rows, blocks) = if cfg!(miri) { (13, 1) } else { (25, 2) };
        for rows in 1..=most_rows {
            check(layout, rows, 16 + rows % 3 * (blocks - 1), multiple(layout) * (1 + rows % blocks), rows as u32);
        }
        for tiles in 1..=9 {
            check(layout, 1, 16 * tiles - tiles % 2, blocks * multiple(layout), 40 + tiles as u32);
            if !cfg!(miri) || !layout.has_blocks() {
                check(layout, 2, 16 * tiles, blocks * multiple(layout), 60 + tiles as u32);
            }
        }
        if cfg!(miri) {
            continue;
        }
        check(layout, 300, 20, multiple(layout), 99);
        check(layout, 67, 33, 5120, 100);
    }
}

/// What the bits of one product in each layout are hashed to (FNV-1a).
#[test]
fn bits_are_the_same_on_every_machine() {
    let hashes = LAYOUTS.map(|layout| {
        let inputs = 512;
        let y = product(Path::chosen(), &packed(matrix(layout, 20, inputs, 8)), &random(3 * inputs, 9));
        let bytes = y.iter().flat_map(|y| y.to_bits().to_le_bytes());
        bytes.fold(0x811C_9DC5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
    });
    let expected = [
        1_809_148_447,
        1_642_386_653,
        2_083_002_683,
        583_572_497,
        460_323_205,
        2_384_860_657,
        279_305_822,
        3_551_888_823,
    ];
    assert_eq!(hashes, expected);
}

#[test]
fn the_largest_codes_do_not_overflow() {
    let inputs = if cfg!(miri) { 256 } else { 512 };
    let x = [vec![1.0; inputs], vec![-1.0; inputs]].concat();
    for layout in LAYOUTS.into_iter().filter(|layout| layout.has_blocks()) {
        let format = match layout {
            Layout::Q8_0 => BlockFormat::Q8_0,
            Layout::Q4_0 => BlockFormat::Q4_0,
            Layout::Q4K => BlockFormat::Q4K,
            Layout::Q6K => BlockFormat::Q6K,
            _ => BlockFormat::Mxfp4,
        };
        // -128 and 127, 0 and 15, 0 and 63, -6 and 6, with scales of 1 wherever they are.
        for fill in [0x00, 0xFF, 0x80, 0x7F, 0x77] {
            let size = 16 * inputs / format.numbers() * format.bytes();
            let mut bytes = vec![fill; size];
            for block in bytes.chunks_exact_mut(format.bytes()) {
                let one = f16::ONE.to_le_bytes();
                match format {
                    BlockFormat::Q6K => block[208..].copy_from_slice(&one),
                    BlockFormat::Mxfp4 => block[16] = 127,
                    _ => block[..2].copy_from_slice(&one),
                }
                if format == BlockFormat::Q4K {
                    block[2..4].copy_from_slice(&one);
                }
            }
            let stored = StoredMatrix::Blocks(BlockMatrix { format, rows: 16, columns: inputs, bytes });
            let plain = Matrix::new("test", stored).unwrap();
            let exact = exact(layout, &plain, &x);
            let matrix = packed(plain);
            for path in Path::all() {
                for (found, exact) in product(path, &matrix, &x).iter().zip(&exact) {
                    let error = (f64::from(*found) - exact).abs();
                    assert!(error <= 1e-5 * exact.abs(), "{layout:?} {fill} on {}: {found}, not {exact}", path.name());
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for layout in LAYOUTS {
        let inputs = 2 * multiple(layout).max(32);
        let matrix = packed(matrix(layout, 20, inputs, 5));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = random(3 * inputs, 6);
            x[inputs + 5] = bad;
            for path in Path::all() {
                let y = product(path, &matrix, &x);
                let name = path.name();
                assert!(y[..20].iter().chain(&y[40..]).all(|y| y.is_finite()), "{layout:?} {bad} on {name}");
                assert!(y[20..40].iter().all(|y| !y.is_finite()), "{layout:?} {bad} on {name}");
            }
        }
    }
}

#[test]
fn rows_of_zeros_and_of_tiny_numbers_give_zeros() {
    for layout in LAYOUTS.into_iter().filter(|layout| layout.has_blocks()) {
        let inputs = multiple(layout);
        let matrix = packed(matrix(layout, 16, inputs, 7));
        for path in Path::all() {
            for tiny in [0.0, -0.0, 1e-31, 1e-45] {
                let y = product(path, &matrix, &vec![tiny; inputs]);
                assert!(y.iter().all(|y| *y == 0.0), "{layout:?} on {}: {y:?}", path.name());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn every_path_gives_what_the_numbers_say_for_any_shape(
        layout in prop::sample::select(LAYOUTS.to_vec()),
        rows in prop_oneof![1..20usize, 1..=300usize],
        outputs in 1..=80usize,
        blocks in 1..4usize,
        seed in 0..u32::MAX,
    ) {
        check(layout, rows, outputs, blocks * multiple(layout), seed);
    }

    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn a_row_has_the_same_bits_in_every_batch(
        layout in prop::sample::select(LAYOUTS.to_vec()),
        rows in 1..40usize,
        outputs in 1..50usize,
        blocks in 1..4usize,
        seed in any::<u32>(),
    ) {
        let inputs = blocks * multiple(layout);
        let x = random(rows * inputs, seed);
        let matrix = packed(matrix(layout, outputs, inputs, seed ^ 1));
        for path in Path::all() {
            let all = product(path, &matrix, &x);
            for (row, all) in all.chunks(outputs).enumerate() {
                let alone = product(path, &matrix, &x[row * inputs..][..inputs]);
                prop_assert_eq!(bits(&alone), bits(all), "{}", path.name());
            }
        }
    }
}
