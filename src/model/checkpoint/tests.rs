use tempfile::TempDir;

use super::*;
use crate::model::spec::Values;

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

/// A copy of a fixture that may be broken.
fn copy(family: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(family)).unwrap().flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("model") || name == "config.json" {
            fs::write(dir.path().join(&name), fs::read(entry.path()).unwrap()).unwrap();
        }
    }
    dir
}

const EMBEDDING: (&str, &[usize]) = ("model.embed_tokens.weight", &[512, 64]);
const NORM: (&str, &[usize]) = ("model.norm.weight", &[64]);

fn read(dir: &TempDir, (name, shape): (&str, &[usize])) -> Result<TensorData, CheckpointError> {
    Checkpoint::open(dir.path())?.read(name, shape)
}

/// Checks the error's message; a wrong file must never be a panic.
fn fails(result: Result<impl Sized, CheckpointError>, words: &[&str]) {
    let Err(error) = result else { panic!("no error that says {words:?}") };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

/// Writes a safetensors file with this header and so many bytes of data.
fn write(dir: &TempDir, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(dir.path().join(SINGLE), bytes).unwrap();
}

#[test]
fn single_and_sharded_checkpoints_are_read() {
    for (family, files) in [
        ("qwen3", 1),
        ("llama", 2),
        ("mistral", 1),
        ("mixtral", 4),
        ("qwen3_moe", 1),
        ("phi", 1),
        ("phi3", 1),
        ("gemma3", 3),
        ("gemma3_text", 1),
        ("gpt_oss", 1),
        ("falcon-7b-style", 1),
        ("falcon-40b-style", 1),
        ("falcon-rw-style", 1),
        ("bloom", 1),
    ] {
        let checkpoint = Checkpoint::open(&fixture(family)).unwrap();
        let mut tensors = checkpoint.spec().edge_tensors();
        tensors.extend((0..checkpoint.spec().num_blocks()).flat_map(|block| checkpoint.spec().block_tensors(block)));
        for tensor in &tensors {
            if tensor.values == Values::Bytes {
                let bytes = checkpoint.read_bytes(&tensor.name, &tensor.shape).unwrap();
                assert_eq!(bytes.len(), tensor.elements());
                continue;
            }
            let data = checkpoint.read(&tensor.name, &tensor.shape).unwrap();
            assert_eq!((data.dtype, &data.shape), (Dtype::Bf16, &tensor.shape));
            assert_eq!(data.bytes.len(), 2 * tensor.elements());
        }
        let paths = checkpoint.weight_files().unwrap();
        assert_eq!(paths.len(), files);
        assert!(paths.is_sorted() && checkpoint.dir() == fixture(family));
        // The specification names every tensor that there is, but for those of a vision tower.
        let stored: Vec<String> = paths.iter().flat_map(|path| Shard::open(path).unwrap().names()).collect();
        let language =
            stored.iter().filter(|name| !name.starts_with("vision_tower") && !name.starts_with("multi_modal"));
        assert_eq!(tensors.len(), language.count(), "{family}");
    }
}

#[test]
fn some_rows_of_a_tensor_are_read() {
    let checkpoint = Checkpoint::open(&fixture("qwen3")).unwrap();
    let (name, shape) = EMBEDDING;
    let all = checkpoint.read(name, shape).unwrap().bytes;
    let rows = [3..5, 0..1, 511..512, 7..7];
    let some = checkpoint.read_rows(name, shape, rows.iter().cloned()).unwrap();
    let expected: Vec<u8> = rows.iter().flat_map(|rows| all[rows.start * 128..rows.end * 128].to_vec()).collect();
    assert_eq!((some.shape, some.bytes), (vec![4, 64], expected));
    fails(checkpoint.read_rows(name, shape, std::iter::once(510..513)), &[name, "512 rows", "510..513"]);
    fails(checkpoint.read_bytes(name, shape), &[name, "BF16", "U8"]);
    fails(checkpoint.read_rows(name, &[512, 63], std::iter::once(0..1)), &["[512, 63]"]);
}

#[test]
fn names_are_found_inside_a_multimodal_checkpoint() {
    for (name, stored) in [
        ("model.norm.weight", "norm.weight"),
        ("model.norm.weight", "language_model.model.norm.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("transformer.ln_f.bias", "ln_f.bias"),
    ] {
        assert!(spellings(name).contains(&stored.to_owned()), "{name} as {stored}");
        assert_eq!(spellings(name)[0], name);
    }
    assert_eq!(spellings("lm_head.weight").len(), 2);
}

#[test]
fn the_bytes_are_the_tensor_s() {
    let bytes = fs::read(fixture("qwen3").join(SINGLE)).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let checkpoint = Checkpoint::open(&fixture("qwen3")).unwrap();
    for (name, view) in expected.iter() {
        assert_eq!(checkpoint.read(name, view.shape()).unwrap().bytes, view.data(), "{name}");
    }
}

#[test]
fn names_are_found_without_the_prefix() {
    let dir = copy("qwen3");
    let path = dir.path().join(SINGLE);
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    // Spaces keep the offsets valid: a header may be padded with them.
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    let renamed = format!("{:length$}", header.replace("\"model.", "\""));
    fs::write(&path, [&bytes[..8], renamed.as_bytes(), &bytes[8 + length..]].concat()).unwrap();
    assert!(read(&dir, NORM).is_ok());
    fails(read(&dir, ("lm_head.weight", &[512, 64])), &["lm_head.weight", SINGLE]);
}

#[test]
fn only_the_files_of_the_tensors_are_opened() {
    let dir = copy("llama");
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(read(&dir, EMBEDDING).is_ok());
    fails(read(&dir, NORM), &["model-00002-of-00002.safetensors", INDEX]);
    fails(Checkpoint::open(dir.path()).unwrap().weight_files(), &["model-00002-of-00002.safetensors"]);
}

#[test]
fn missing_things_are_named() {
    fails(Checkpoint::open(Path::new("/no/such/folder")), &["/no/such/folder", "config.json"]);
    let dir = tempfile::tempdir().unwrap();
    fails(Checkpoint::open(dir.path()), &["no config.json"]);
    fs::copy(fixture("qwen3").join(CONFIG), dir.path().join(CONFIG)).unwrap();
    fails(Checkpoint::open(dir.path()), &[SINGLE, INDEX]);
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    fails(Checkpoint::open(dir.path()), &["pytorch_model.bin", "convert", "safetensors"]);
    fs::write(dir.path().join(CONFIG), r#"{"model_type": "mamba"}"#).unwrap();
    fails(Checkpoint::open(dir.path()), &[CONFIG, "mamba", "qwen3"]);
    let dir = copy("qwen3");
    fails(read(&dir, ("model.layers.9.x", &[1])), &["model.layers.9.x", SINGLE]);
    let dir = copy("llama");
    fails(read(&dir, ("model.layers.9.x", &[1])), &["model.layers.9.x", INDEX]);
}

#[test]
fn an_index_that_lies_is_found_out() {
    let dir = copy("llama");
    let index = dir.path().join(INDEX);
    let text = fs::read_to_string(&index).unwrap();
    let wrong = text.replace(
        r#""model.norm.weight": "model-00002-of-00002.safetensors""#,
        r#""model.norm.weight": "model-00001-of-00002.safetensors""#,
    );
    assert_ne!(wrong, text);
    fs::write(&index, wrong).unwrap();
    fails(read(&dir, NORM), &["model.norm.weight", "model-00001-of-00002.safetensors"]);
    for (text, word) in [
        ("{", "not a usable index"),
        (r#"{"weight_map": {}}"#, "no tensors"),
        (r#"{"weight_map": {"a": "../../etc/passwd"}}"#, "../../etc/passwd"),
        (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "/etc/passwd"),
    ] {
        fs::write(&index, text).unwrap();
        fails(Checkpoint::open(dir.path()), &[INDEX, word]);
    }
}

#[test]
fn truncated_files_are_found_out() {
    let dir = copy("qwen3");
    let path = dir.path().join(SINGLE);
    let bytes = fs::read(&path).unwrap();
    for length in [0, 7, 8, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        fails(read(&dir, NORM), &[SINGLE, "truncated"]);
    }
    // After the header was read, too: an error, and not the end of the process.
    fs::write(&path, &bytes).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.read(NORM.0, NORM.1).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
    fails(checkpoint.read(NORM.0, NORM.1), &[SINGLE]);
}

#[test]
fn broken_headers_are_found_out() {
    let dir = copy("qwen3");
    for (header, data, word) in [
        ("garbage", 0, "not a safetensors file"),
        (r#"{"model.norm.weight": 3}"#, 0, "not a safetensors file"),
        (r#"{"model.norm.weight":{"dtype":"BF16","shape":[64],"data_offsets":[0,128]}}"#, 127, "truncated"),
        (r#"{"model.norm.weight":{"dtype":"BF16","shape":[64],"data_offsets":[0,128]}}"#, 129, "1 bytes follow"),
        (r#"{"model.norm.weight":{"dtype":"BF16","shape":[64],"data_offsets":[0,64]}}"#, 64, "not a safetensors file"),
        (
            r#"{"model.norm.weight":{"dtype":"BF16","shape":[64],"data_offsets":[128,0]}}"#,
            128,
            "not a safetensors file",
        ),
        (
            r#"{"model.norm.weight":{"dtype":"BF16","shape":[64,18446744073709551615],"data_offsets":[0,128]}}"#,
            128,
            "not a safetensors file",
        ),
    ] {
        write(&dir, header, data);
        fails(read(&dir, NORM), &[SINGLE, word]);
    }
    let mut bytes = u64::MAX.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{}");
    fs::write(dir.path().join(SINGLE), bytes).unwrap();
    fails(read(&dir, NORM), &[SINGLE, "18446744073709551615"]);
}

#[test]
fn dtypes_and_shapes_are_checked() {
    let dir = copy("qwen3");
    write(&dir, r#"{"model.norm.weight":{"dtype":"I64","shape":[64],"data_offsets":[0,512]}}"#, 512);
    fails(read(&dir, NORM), &["model.norm.weight", "I64", "BF16"]);
    write(&dir, r#"{"model.norm.weight":{"dtype":"F32","shape":[32],"data_offsets":[0,128]}}"#, 128);
    fails(read(&dir, NORM), &["model.norm.weight", "[32]", "[64]"]);
    write(&dir, r#"{"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}"#, 256);
    assert_eq!(read(&dir, NORM).unwrap().dtype, Dtype::F32);
}

#[test]
fn a_head_is_the_embedding_only_where_no_other_is_stored() {
    let head = |dir: &TempDir| Checkpoint::open(dir.path()).unwrap().head().unwrap();
    assert_eq!(head(&copy("qwen3")), HeadSpec::Tied);
    // A head of its own, though the configuration says otherwise.
    let dir = copy("mistral");
    let own = head(&dir);
    let path = dir.path().join(CONFIG);
    let config = fs::read_to_string(&path).unwrap();
    let tied = config.replace(r#""tie_word_embeddings": false"#, r#""tie_word_embeddings": true"#);
    assert_ne!(tied, config);
    fs::write(&path, tied).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().spec().edges.head, HeadSpec::Tied);
    assert_eq!(head(&dir), own);
    // Stored twice.
    let stored = fs::read(dir.path().join(SINGLE)).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&stored).unwrap();
    let twice = stored.names().into_iter().map(|name| {
        let source = if name == HEAD { EMBEDDING.0 } else { name };
        (name, stored.tensor(source).unwrap())
    });
    fs::write(dir.path().join(SINGLE), safetensors::serialize(twice, None).unwrap()).unwrap();
    assert_eq!(head(&dir), HeadSpec::Tied);
    write(&dir, &format!(r#"{{"{HEAD}":{{"dtype":"BF16","shape":[2,64],"data_offsets":[0,256]}}}}"#), 256);
    fails(Checkpoint::open(dir.path()).unwrap().head(), &[EMBEDDING.0]);
}
