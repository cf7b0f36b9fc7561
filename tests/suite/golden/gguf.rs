//! The same models out of the GGUF files that llama.cpp's converter made of them compute what transformers computes.

use std::path::Path;

use helion::model::checkpoint::Checkpoint;

use super::{Golden, fixture};

fn matches(family: &str, file: &str) {
    let checkpoint = Checkpoint::open(&fixture("gguf").join(file)).unwrap();
    Golden { checkpoint, ..Golden::load(family) }.matches();
}

macro_rules! files {
    ($($name:ident: $family:literal from $file:literal,)*) => {$(
        #[test]
        fn $name() {
            matches($family, $file);
        }
    )*};
}

files! {
    llama_in_three_parts: "llama" from "llama-00002-of-00003.gguf",
    qwen2_in_f16: "qwen2" from "qwen2.gguf",
    qwen3_moe: "qwen3_moe" from "qwen3_moe.gguf",
    gemma3: "gemma3_text" from "gemma3_text.gguf",
    gpt_oss: "gpt_oss" from "gpt_oss.gguf",
    phi: "phi" from "phi.gguf",
    phi3: "phi3" from "phi3.gguf",
    falcon_40b: "falcon-40b-style" from "falcon-40b-style.gguf",
    bloom: "bloom" from "bloom.gguf",
}

#[test]
fn a_folder_with_one_model_is_that_model() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("gguf").join("phi.gguf"), dir.path().join("x.gguf")).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let files = checkpoint.weight_files().unwrap();
    assert_eq!(files.iter().map(|path| path.file_name().unwrap()).collect::<Vec<_>>(), ["x.gguf"]);
    assert!(Checkpoint::open(Path::new("/nonexistent.gguf")).is_err());
}
