//! Files that are cut short, contradict themselves, or were made to hurt.

use std::path::PathBuf;

use helion::model::gguf::GgufModel;
use proptest::prelude::*;

/// Numbers of GGUF's value types.
const U32: u32 = 4;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Writes files piece by piece.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn new(tensors: u64, entries: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(entries)
    }

    fn u32(mut self, number: u32) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn text(mut self, text: &str) -> Self {
        self = self.u64(text.len() as u64);
        self.0.extend(text.bytes());
        self
    }

    fn entry(self, key: &str, value: &str) -> Self {
        self.text(key).u32(TEXT).text(value)
    }

    /// A tensor of f32.
    fn tensor(self, name: &str, shape: &[u64], start: u64) -> Self {
        let begun = self.text(name).u32(shape.len() as u32);
        shape.iter().fold(begun, |writer, size| writer.u64(*size)).u32(0).u64(start)
    }

    /// Zeros up to `bytes`.
    fn padded(mut self, bytes: usize) -> Self {
        self.0.resize(bytes, 0);
        self
    }

    /// What is said about the file.
    fn error(self) -> String {
        error(&self.0)
    }
}

fn error(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    std::fs::write(&path, bytes).unwrap();
    let error = GgufModel::open(&path).expect_err("this file is broken").to_string();
    assert!(error.contains("x.gguf"), "{error}");
    error
}

fn says(writer: Writer, words: &str) {
    let error = writer.error();
    assert!(error.contains(words), "{error:?} lacks {words:?}");
}

fn fixture(name: &str) -> PathBuf {
    super::file(name)
}

#[test]
fn other_files_are_told_apart() {
    assert!(error(b"").contains("too short"));
    assert!(error(b"PK\x03\x04 and so on").contains("other bytes"));
    says(Writer(b"GGUF".to_vec()).u32(1), "version 1");
    says(Writer(b"GGUF".to_vec()).u32(3u32.swap_bytes()), "big-endian");
    says(Writer(b"GGUF".to_vec()).u32(77), "77");
}

#[test]
fn claims_beyond_the_file_cost_nothing() {
    says(Writer::new(u64::MAX, 0), "tensors");
    says(Writer::new(0, u64::MAX), "metadata entries");
    says(Writer::new(0, 1).u64(u64::MAX), "truncated");
    says(Writer::new(0, 1).text("k").u32(TEXT).u64(1 << 40), "truncated");
    says(Writer::new(0, 1).text("k").u32(ARRAY).u32(U32).u64(u64::MAX / 2), "truncated");
    says(Writer::new(0, 1).text("k").u32(ARRAY).u32(TEXT).u64(u64::MAX / 2), "truncated");
    says(Writer::new(0, 1).text("k").u32(ARRAY).u32(ARRAY).u64(1), "array of arrays");
    says(Writer::new(0, 1).text("k").u32(13), "unknown type 13");
    says(Writer::new(0, 2).entry("k", "v").entry("k", "v"), "twice");
}

#[test]
fn tensors_lie_in_the_file_and_apart() {
    let one = |shape: &[u64], start: u64| Writer::new(1, 0).tensor("a", shape, start).padded(4096);
    says(one(&[1 << 20], 0), "truncated");
    says(one(&[4], 1 << 40), "truncated");
    says(one(&[4], u64::MAX - 31), "beyond");
    says(one(&[4], 7), "multiple of 32");
    says(one(&[u64::MAX, 8], 0), "can't be stored as f32");
    says(one(&[1 << 40, 1 << 40], 0), "overflows");
    says(one(&[0], 0), "dimension of 0");
    says(one(&[], 0), "0 dimensions");
    says(one(&[1; 5], 0), "5 dimensions");
    let two = |name: &str, start: u64| Writer::new(2, 0).tensor("a", &[16], 0).tensor(name, &[16], start).padded(4096);
    says(two("b", 32), "overlap");
    says(two("a", 64), "twice");
    says(two("b", 64), "general.architecture");
    // Rows of 33 numbers in blocks of 32.
    let blocks = Writer::new(1, 0).text("a").u32(1).u64(33).u32(8).u64(0).padded(4096);
    says(blocks, "33 numbers can't be stored as q8_0");
    let aligned = Writer::new(1, 1).text("general.alignment").u32(U32).u32(48).tensor("a", &[4], 0).padded(4096);
    says(aligned, "power of two");
}

#[test]
fn models_that_are_not_known_are_named() {
    says(Writer::new(0, 1).entry("general.architecture", "mamba"), "\"mamba\" is not supported");
    says(Writer::new(0, 1).entry("general.architecture", "llama"), "llama.embedding_length");
}

/// The header of a fixture with one text in it changed for another of the same length.
fn changed(name: &str, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(fixture(name)).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    bytes
}

#[test]
fn what_changes_the_arithmetic_is_refused() {
    let error = error(&changed("phi.gguf", "blk.3.ffn_up.bias", "blk.3.ffn_xx.bias"));
    assert!(error.contains("blk.3.ffn_xx.bias") && error.contains("phi2"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    std::fs::write(&path, changed("phi.gguf", "gpt-2", "gpt-3")).unwrap();
    let error = GgufModel::open(&path).unwrap().tokenizer().unwrap_err().to_string();
    assert!(error.contains("gpt-3") && error.contains("llama-bpe"), "{error}");
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let part = |number: usize| dir.path().join(format!("m-0000{number}-of-00002.gguf"));
    for number in [1, 2] {
        std::fs::copy(fixture(&format!("llama-0000{number}-of-00003.gguf")), part(number)).unwrap();
    }
    let error = GgufModel::open(&part(1)).unwrap_err().to_string();
    assert!(error.contains("3 parts") && error.contains("says 2"), "{error}");
    let path = dir.path().join("m.gguf");
    std::fs::copy(fixture("llama-00001-of-00003.gguf"), &path).unwrap();
    assert!(GgufModel::open(&path).unwrap_err().to_string().contains("00001-of-00003"));
    for number in 1..=3 {
        let other = if number == 2 { 3 } else { number };
        let to = dir.path().join(format!("n-0000{number}-of-00003.gguf"));
        std::fs::copy(fixture(&format!("llama-0000{other}-of-00003.gguf")), to).unwrap();
    }
    let error = GgufModel::open(&dir.path().join("n-00001-of-00003.gguf")).unwrap_err().to_string();
    assert!(error.contains("part 3 by what it says, and part 2 by its name"), "{error}");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = std::fs::read(fixture("phi.gguf")).unwrap();
    let ends = (0..400).chain((400..bytes.len()).step_by(6151)).chain([bytes.len() - 1]);
    for end in ends {
        error(&bytes[..end]);
    }
}

proptest! {
    // Nothing to check but that it ends, without a panic and without taking memory for what isn't there.
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((0usize..16_000, any::<u8>()), 1..8)) {
        let mut bytes = std::fs::read(fixture("qwen2.gguf")).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(model) = GgufModel::open(&path) {
            let _ = (model.tokenizer(), model.chat_template(), model.generation_defaults());
            for linear in [&model.spec().blocks[0].attention.q, &model.spec().blocks[0].attention.o] {
                let _ = model.matrix(linear);
            }
        }
    }
}
