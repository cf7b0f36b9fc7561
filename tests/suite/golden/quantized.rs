//! The fixtures with their matrices quantized at load, and their edges.
//!
//! A block's error is measured with the reference's own input, so that blocks are judged one by one. A token's error is the
//! root mean square of what the output is off by, divided by that of what the block adds to the residual stream; a
//! block's is that of the middle one of its tokens, because a router that sees two experts as nearly equal may choose
//! the other, and then a token's output is another one altogether.

use helion::model::spec::TensorSpec;

use super::{super::made::wide, *};

const QUANTS: [Quant; 5] = [Quant::None, Quant::Q8_0, Quant::Q6K, Quant::Q4K, Quant::Q4_0];

/// The largest error that a block may have.
///
/// A format rounds the numbers of a block of 32 in steps of its largest number's 127th (q8_0) or 8th (q4_0), which is 2.1
/// standard deviations where they have a normal distribution: an error of 2.1 / 127 / √12 = 0.5 % or 2.1 / 8 / √12 = 7.6 %
/// of a standard deviation. A product of independent errors is off by the same share. What a block adds has gone
/// through four products, one behind the other (values, output, gate and up, down), and as many errors add up to twice
/// the share; what comes through the softmax, which the fixtures' large weights make sharp, is taken to be as much
/// again, and a block may be half as much worse than others. The rows are 64 wide, so that q6_k and q4_k fall
/// back to q8_0 and q4_0.
fn bound(quant: Quant) -> f64 {
    match quant {
        Quant::Auto | Quant::None => 1e-4,
        Quant::Q8_0 | Quant::Q6K => 6.0 * 0.005,
        Quant::Q4_0 | Quant::Q4K => 6.0 * 0.076,
    }
}

fn root_mean_square(numbers: impl Iterator<Item = f32>) -> f64 {
    let squares: Vec<f64> = numbers.map(|x| f64::from(x).powi(2)).collect();
    (squares.iter().sum::<f64>() / squares.len() as f64).sqrt()
}

/// The worst block of a fixture in an engine of `dtype`; rows travel in f32.
fn worst_error(golden: &Golden, dtype: Dtype) -> f64 {
    let quant = golden.quant;
    let prompt = golden.prompt();
    let cuts: Vec<usize> = (1..golden.blocks()).collect();
    let errors = golden.engines(&cuts, dtype).into_iter().enumerate().map(|(block, engine)| {
        let packed = match quant {
            Quant::Q8_0 | Quant::Q6K => "q8_0",
            Quant::Q4_0 | Quant::Q4K => "q4_0",
            Quant::Auto => "mxfp4",
            Quant::None => "none",
        };
        assert_eq!(engine.quantization(), packed);
        let (input, expected) =
            (golden.floats(&format!("hidden.{block}")), golden.floats(&format!("hidden.{}", block + 1)));
        let width = input.len() / prompt.len();
        let hidden = HiddenStates::from_f32(Dtype::F32, width, &input);
        let output = Chain::new(&[engine]).step(&lane(0, prompt.len()), hidden, Keep::All).pop().unwrap().to_f32();
        block_error(&input, &output, &expected, width)
    });
    errors.fold(0.0, f64::max)
}

/// The error of a block that made `output` of `input`, all `[tokens, width]`.
fn block_error(input: &[f32], output: &[f32], expected: &[f32], width: usize) -> f64 {
    let rows = output.chunks(width).zip(expected.chunks(width)).zip(input.chunks(width));
    let mut errors: Vec<f64> = rows
        .map(|((output, expected), input)| {
            let error = root_mean_square(output.iter().zip(expected).map(|(a, b)| a - b));
            error / root_mean_square(expected.iter().zip(input).map(|(a, b)| a - b))
        })
        .collect();
    errors.sort_by(f64::total_cmp);
    errors[errors.len() / 2]
}

/// Products with blocks, as an engine of bf16 computes them in integers, against products with the numbers that the blocks stand for,
/// in an engine of f32: the rows that are rounded are all that they differ in, and rows are rounded as q8_0 rounds.
fn block_products_only_round_rows(family: &str, quant: Quant, packed: &str) {
    let golden = Golden { checkpoint: wide(family), quant, kv_dtype: Some(KvDtype::F32), tensors: HashMap::new() };
    let width = golden.checkpoint.spec().hidden_size;
    let engines = [Dtype::F32, Dtype::Bf16].map(|dtype| golden.engines(&[1], dtype));
    // Enough rows for all shapes of products; those that a kernel takes together, and a few more.
    for rows in [1, 3, 40] {
        let mut input: Vec<f32> = (0..rows * width).map(|i| ((i * 7919 % 10_007) as f32 - 5003.0) / 3000.0).collect();
        for (exact, rounded) in engines[0].iter().zip(&engines[1]) {
            assert_eq!([exact.quantization(), rounded.quantization()], [packed; 2]);
            let hidden = HiddenStates::from_f32(Dtype::F32, width, &input);
            let [expected, output] = [exact, rounded].map(|engine| {
                let mut chain = Chain::new(std::slice::from_ref(engine));
                chain.step(&lane(0, rows), hidden.clone(), Keep::All).pop().unwrap().to_f32()
            });
            let error = block_error(&input, &output, &expected, width);
            // More than nothing: rows were rounded.
            let range = 1e-5..bound(Quant::Q8_0);
            assert!(range.contains(&error), "{family} in {packed}, {rows} rows: {error}");
            input = expected;
        }
    }
}

#[test]
fn block_products_compute_what_their_numbers_do() {
    for (quant, packed) in [(Quant::Q8_0, "q8_0"), (Quant::Q4_0, "q4_0"), (Quant::Q4K, "q4_k"), (Quant::Q6K, "q6_k")] {
        block_products_only_round_rows("qwen3", quant, packed);
    }
    block_products_only_round_rows("mixtral", Quant::Q4K, "q4_k");
    block_products_only_round_rows("gpt_oss", Quant::Auto, "mxfp4");
}

/// As the checkpoint has them, its matrices are the reference's: only rows are rounded.
#[test]
fn mxfp4_stays_near_the_reference_with_rounded_rows() {
    let error = worst_error(&Golden::load("gpt_oss"), Dtype::Bf16);
    assert!(error > 0.001 && error < 2.0 * bound(Quant::Q8_0), "{error}");
}

fn stays_near_the_reference(family: &str) {
    for quant in QUANTS {
        let golden = Golden { quant, ..Golden::load(family) };
        let error = worst_error(&golden, Dtype::F32);
        assert!(error < bound(quant), "{family} in {quant}: {error}");
        // Not quantized at all would be nearer.
        assert!(quant == Quant::None || error > bound(quant) / 40.0, "{family} in {quant}: {error}");
    }
}

/// In an engine of bf16, rows are rounded to 8 bits in front of packed matrices, and everything else to the 8 bits of bf16:
/// as much as q8_0 is off by, once more for the rows and once for the rest.
fn stays_near_the_reference_with_rounded_rows(family: &str) {
    for quant in QUANTS {
        let golden = Golden { quant, ..Golden::load(family) };
        let error = worst_error(&golden, Dtype::Bf16);
        let most = bound(quant) + 2.0 * bound(Quant::Q8_0);
        assert!(error < most, "{family} in {quant} and bf16: {error}");
    }
}

/// The same bound for a cache in formats of its own, the coarsest of which rounds as q8_0 does.
fn stays_near_the_reference_with_a_narrow_cache(family: &str) {
    for kv_dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Q8] {
        let golden = Golden { quant: Quant::None, kv_dtype: Some(kv_dtype), ..Golden::load(family) };
        let error = worst_error(&golden, Dtype::F32);
        let most = if kv_dtype == KvDtype::F32 { bound(Quant::None) } else { bound(Quant::Q8_0) };
        assert!(error < most, "{family} with a cache in {kv_dtype}: {error}");
        assert!(kv_dtype == KvDtype::F32 || error > 1e-5, "{family} with a cache in {kv_dtype}: {error}");
    }
}

/// Whatever the format, any cut and any chunks give the same bits.
fn cuts_and_chunks_change_nothing(family: &str, quant: Quant) {
    let golden = Golden { quant, ..Golden::load(family) };
    let edges = golden.edges(Dtype::Bf16);
    let prompt = golden.prompt();
    let whole = golden.engines(&[], Dtype::Bf16);
    let expected = prefill(&mut Chain::new(&whole), &edges, &prompt, prompt.len(), Dtype::Bf16);
    for cut in [1, golden.blocks() / 2] {
        let engines = golden.engines(&[cut], Dtype::Bf16);
        for chunk in [1, 7, prompt.len()] {
            let found = prefill(&mut Chain::new(&engines), &edges, &prompt, chunk, Dtype::Bf16);
            assert!(found == expected, "{family} in {quant}: cut at {cut}, chunks of {chunk}");
        }
    }
}

macro_rules! families {
    ($($name:ident: $fixture:literal,)*) => {$(
        #[test]
        fn $name() {
            stays_near_the_reference($fixture);
            stays_near_the_reference_with_rounded_rows($fixture);
            stays_near_the_reference_with_a_narrow_cache($fixture);
            for quant in [Quant::Q8_0, Quant::Q4_0] {
                cuts_and_chunks_change_nothing($fixture, quant);
            }
        }
    )*};
}

families! {
    llama: "llama",
    mistral: "mistral",
    qwen2: "qwen2",
    qwen3: "qwen3",
    mixtral: "mixtral",
    qwen3_moe: "qwen3_moe",
    phi: "phi",
    phi3: "phi3",
    gemma3: "gemma3",
    gemma3_text: "gemma3_text",
    gpt_oss: "gpt_oss",
    falcon_7b: "falcon-7b-style",
    falcon_40b: "falcon-40b-style",
    falcon_rw: "falcon-rw-style",
    bloom: "bloom",
}

#[test]
fn quantized_matrices_take_the_memory_that_their_format_says() {
    for (quant, bytes_of_32) in [(Quant::None, 64), (Quant::Q8_0, 34), (Quant::Q4_0, 18)] {
        let golden = Golden { quant, ..Golden::load("llama") };
        let spec = golden.checkpoint.spec();
        let size = |tensor: &TensorSpec| match tensor.shape[..] {
            // The matrix that reads a row of 112 numbers can't be cut into blocks of 32.
            [rows, columns] if columns % 32 == 0 => rows * columns / 32 * bytes_of_32,
            [rows, columns] => rows * columns * 2,
            _ => tensor.elements() * 4,
        };
        let blocks: usize = (0..golden.blocks()).flat_map(|block| spec.block_tensors(block)).map(|it| size(&it)).sum();
        let edges: usize = spec.edge_tensors().iter().map(size).sum();
        assert_eq!(golden.engine(0..golden.blocks(), Dtype::Bf16).loaded_bytes(), blocks as u64, "{quant}");
        assert_eq!(golden.edges(Dtype::Bf16).loaded_bytes(), edges as u64, "{quant}");
    }
}

#[test]
fn edges_are_quantized_too() {
    for family in ["llama", "gemma3", "qwen2"] {
        let golden = Golden::load(family);
        let prompt = golden.prompt();
        let last = golden.floats(&format!("hidden.{}", golden.blocks()));
        let (embedding, logits) = (golden.floats("hidden.0"), golden.floats("logits"));
        let hidden = HiddenStates::from_f32(Dtype::F32, last.len() / prompt.len(), &last);
        for (quant, share) in [(Quant::Q8_0, 0.005), (Quant::Q4_0, 0.076)] {
            let edges = Golden { quant, ..Golden::load(family) }.edges(Dtype::F32);
            let off = |found: &[f32], expected: &[f32]| {
                let error = root_mean_square(found.iter().zip(expected).map(|(a, b)| a - b));
                error / root_mean_square(expected.iter().copied())
            };
            let embedded = edges.embed(&prompt, Dtype::F32).unwrap().to_f32();
            for error in [off(&embedded, &embedding), off(&edges.logits(&hidden).unwrap(), &logits)] {
                assert!(error > share / 3.0 && error < 2.0 * share, "{family} in {quant}: {error}");
            }
        }
    }
}

#[test]
fn mxfp4_stays_unless_something_else_is_asked_for() {
    let load = |quant: Quant| {
        let golden = Golden { quant, ..Golden::load("gpt_oss") };
        let engine = golden.engine(0..golden.blocks(), Dtype::Bf16);
        (engine.quantization(), engine.loaded_bytes(), engine.quant_settings().to_vec())
    };
    let (auto, none, q8) = (load(Quant::Auto), load(Quant::None), load(Quant::Q8_0));
    assert_eq!((auto.0, none.0, q8.0), ("mxfp4", "none", "q8_0"));
    assert!(auto.1 < q8.1 && q8.1 < none.1);
    assert_eq!(
        (auto.2, none.2, q8.2),
        (vec![Quant::Auto], vec![Quant::None], vec![Quant::Q8_0, Quant::Q6K]),
        "rows of 64 can't be cut into the blocks of q6_k, which become those of q8_0"
    );
}

/// A packed checkpoint computes what its widened numbers do: bit for bit where the columns are in order, and within
/// rounding where they are stored in another one and sums are taken in that.
fn packed_equals_widened(name: &str, packed_in: &str) {
    let open = |quant: Quant| {
        let checkpoint = Checkpoint::open(&fixture("packed-checkpoints").join(name)).unwrap();
        Golden { checkpoint, quant, kv_dtype: None, tensors: HashMap::new() }
    };
    let (packed, wide) = (open(Quant::Auto), open(Quant::None));
    let prompt: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % 500).collect();
    let edges = wide.edges(Dtype::F32);
    let engines = [&packed, &wide].map(|golden| golden.engine(0..golden.blocks(), Dtype::F32));
    assert_eq!((engines[0].quantization(), engines[1].quantization()), (packed_in, "none"));
    assert!(engines[0].loaded_bytes() < engines[1].loaded_bytes());
    let outputs = engines.map(|engine| prefill(&mut Chain::new(&[engine]), &edges, &prompt, 40, Dtype::F32));
    let [found, expected] = [&outputs[0], &outputs[1]].map(|bytes| floats(bytes));
    assert_close(&found, &expected, name);
    if !["gptq-llama", "gptq-phi3"].contains(&name) {
        assert!(outputs[0] == outputs[1], "{name}");
    }
    // In chunks, and cut in two.
    let engines = packed.engines(&[1], Dtype::F32);
    assert!(prefill(&mut Chain::new(&engines), &edges, &prompt, 7, Dtype::F32) == outputs[0], "{name}");
    // Packed again in another format.
    let golden = open(Quant::Q8_0);
    let engine = golden.engine(0..golden.blocks(), Dtype::F32);
    assert_eq!(engine.quantization(), "q8_0");
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn packed_checkpoints_compute_what_their_numbers_do() {
    for (name, packed_in) in [
        ("fp8-qwen3", "fp8"),
        ("fp8-qwen3_moe", "fp8"),
        ("fp8-phi3", "fp8"),
        ("fp8-llama", "fp8"),
        ("fp8-qwen2", "fp8"),
        ("gptq-llama", "int4"),
        ("gptq-phi3", "int8"),
        ("gptq-qwen3_moe", "int4"),
        ("awq-phi3", "int4"),
        ("awq-qwen2", "int4"),
        ("int4-qwen3", "int4"),
        ("int8-llama", "int8"),
    ] {
        packed_equals_widened(name, packed_in);
    }
}
