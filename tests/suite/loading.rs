//! How much memory loading takes, measured in processes of their own on a checkpoint of about 240 MB.

use helion::model::Quant;

use super::made::{Shape, What, load_if_asked, load_in_child};

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
