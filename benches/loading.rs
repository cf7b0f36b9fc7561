//! How long loading takes and how much memory, against the size of the files, for a checkpoint of 2.3 GB that is made on
//! the spot.
//!
//! `cargo bench --bench loading`. Each line is a process of its own. The checkpoint is made in the temporary directory (TMPDIR)
//! and removed; it is read once before the first measurement, so that the disk doesn't count.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, dead_code)]

#[path = "../tests/suite/made.rs"]
mod made;

use helion::model::Quant;
use made::{Shape, What, load_if_asked, load_in_child};

const SHAPE: Shape =
    Shape { hidden: 2048, intermediate: 8192, blocks: 16, heads: 32, kv_heads: 8, vocab: 64_000, shards: 4 };

fn main() {
    if load_if_asked() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = SHAPE.write(dir.path());
    let block = 2.0 * 2048.0 * (2.0 * 2048.0 + 2.0 * 512.0 + 3.0 * 8192.0);
    println!("{:.2} GB in {} files, {:.3} GB a block", bytes as f64 / 1e9, SHAPE.shards, block / 1e9);
    println!(
        "| part | --quant | seconds | loaded, GB | peak, GB | peak / (1.2 · loaded + a block) |\n|---|---|---|---|---|---|"
    );
    load_in_child(&[], dir.path(), What::Blocks, Quant::Auto);
    for what in [What::Blocks, What::Edges] {
        for quant in [Quant::Auto, Quant::Q8_0, Quant::Q6K, Quant::Q4K, Quant::Q4_0] {
            let report = load_in_child(&[], dir.path(), what, quant);
            println!(
                "| {what:?} | {quant} | {:.1} | {:.3} | {:.3} | {:.2} |",
                report.seconds,
                report.loaded as f64 / 1e9,
                report.grown() as f64 / 1e9,
                report.grown() as f64 / (1.2 * report.loaded as f64 + block)
            );
        }
    }
}
