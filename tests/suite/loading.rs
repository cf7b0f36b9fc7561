//! How much memory loading takes, measured in processes of their own on a checkpoint of about 240 MB.

use helion::{
    engine::{DeviceChoice, Engine, EngineOptions},
    model::{Dtype, Quant},
};

use super::made::{Shape, What, load_if_asked, load_in_child, wide};

const SHAPE: Shape =
    Shape { hidden: 1024, intermediate: 3072, blocks: 8, heads: 16, kv_heads: 8, vocab: 12_000, shards: 3 };

/// Threads, buffers of the allocator and the 64 tokens of cache.
const ASIDE: f64 = 12e6;

/// Not a test: what the processes do that the test starts.
#[test]
fn a_process_that_loads() {
    load_if_asked();
}

#[test]
fn the_peak_is_near_the_final_size() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = SHAPE.write(dir.path());
    assert!(bytes > 200_000_000);
    // A block of the checkpoint: attention's four matrices and three others.
    let block = 2.0 * 1024.0 * (2.0 * 1024.0 + 2.0 * 512.0 + 3.0 * 3072.0);
    for quant in [Quant::Auto, Quant::Q8_0, Quant::Q4K] {
        for what in [What::Blocks, What::Edges] {
            let args = ["--exact", "loading::a_process_that_loads", "--nocapture"];
            let report = load_in_child(&args, dir.path(), what, quant);
            let limit = 1.2 * report.loaded as f64 + block + ASIDE;
            assert!((report.grown() as f64) < limit, "{what:?} {quant}: limit {limit:.0}, {report:?}");
        }
    }
}

/// Of matrices: packing for the kernels, scales and what else is kept beside the numbers.
#[test]
fn weights_take_the_memory_of_their_format() {
    let bits = |quant: Quant, dtype: Dtype| match quant {
        Quant::Auto | Quant::None => 8.0 * dtype.size_in_bytes() as f64,
        Quant::Q8_0 => 8.5,
        Quant::Q6K => 6.5625,
        Quant::Q4K | Quant::Q4_0 => 4.5,
    };
    let loaded = |family: &str, quant: Quant, dtype: Dtype| {
        let checkpoint = wide(family);
        let options = EngineOptions { quant, device: DeviceChoice::Cpu, ..EngineOptions::new(0..2, dtype) };
        let loaded = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap().loaded_bytes();
        let spec = checkpoint.spec();
        (loaded as f64, (0..2).flat_map(|block| spec.block_tensors(block)).collect::<Vec<_>>())
    };
    for quant in Quant::ALL {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let (loaded, tensors) = loaded("qwen3", quant, dtype);
            // Norms are in f32.
            let size = |dimensions: usize| if dimensions == 2 { bits(quant, dtype) } else { 32.0 };
            let own: f64 = tensors.iter().map(|it| it.elements() as f64 * size(it.shape.len()) / 8.0).sum();
            assert!(loaded <= 1.02 * own && loaded >= own, "{quant} in {dtype}: {loaded} bytes of {own}");
        }
    }
    // Experts in MXFP4; what isn't one of them is in bf16, biases in f32.
    let (loaded, tensors) = loaded("gpt_oss", Quant::Auto, Dtype::Bf16);
    let size = |name: &str, dimensions: usize| match name {
        name if name.ends_with("_blocks") || name.ends_with("_scales") => 1.0,
        name if name.ends_with("bias") || dimensions == 1 => 4.0,
        _ => 2.0,
    };
    let own: f64 = tensors.iter().map(|it| it.elements() as f64 * size(&it.name, it.shape.len())).sum();
    assert!(loaded <= 1.02 * own && loaded >= own, "mxfp4: {loaded} bytes of {own}");
}
