//! Checkpoints from the hub, against a server on the loopback that speaks the hub's API.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode},
    response::{IntoResponse, Response},
};
use helion::model::{
    fingerprint::Fingerprint,
    hub::{HubError, HubOptions, ModelFiles, Stage},
};
use sha2::{Digest, Sha256};

const MODEL: &str = "org/five-shards";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_right";

/// What the server has, and how it behaves.
#[derive(Clone)]
struct HubState(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    files: BTreeMap<String, Vec<u8>>,
    requests: Vec<String>,
    /// Status and error code of every answer about the model, and of every answer with a file.
    refuse_info: Option<(u16, &'static str)>,
    refuse_files: Option<(u16, &'static str)>,
    /// Only with the right token.
    gated: bool,
    /// Serves this content in place of the right one.
    damaged: Option<(String, Vec<u8>)>,
}

struct FakeHub {
    state: HubState,
    endpoint: String,
    cache: tempfile::TempDir,
}

fn shard(index: usize) -> String {
    format!("model-{index:05}-of-00005.safetensors")
}

/// A checkpoint of five shards, with one block in each.
fn five_shards() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::from([
        ("config.json".to_owned(), b"{\"model_type\": \"llama\"}".to_vec()),
        ("tokenizer.json".to_owned(), b"{}".to_vec()),
        ("README.md".to_owned(), b"# not needed".to_vec()),
        ("onnx/model.onnx".to_owned(), b"not needed either".to_vec()),
    ]);
    let mut weight_map = serde_json::Map::new();
    for index in 1..=5 {
        files.insert(shard(index), vec![index as u8; 10_000 + index]);
        weight_map.insert(format!("model.layers.{}.mlp.weight", index - 1), shard(index).into());
    }
    let index = serde_json::json!({"metadata": {"total_size": 50_015}, "weight_map": weight_map});
    files.insert("model.safetensors.index.json".to_owned(), index.to_string().into_bytes());
    files
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl FakeHub {
    async fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let state = HubState(Arc::new(Mutex::new(Inner { files, ..Inner::default() })));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().fallback(answer).with_state(state.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { state, endpoint, cache: tempfile::tempdir().unwrap() }
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.state.0.lock().unwrap());
    }

    /// What was asked for since the last call, without repeats.
    fn requests(&self) -> BTreeSet<String> {
        std::mem::take(&mut self.state.0.lock().unwrap().requests).into_iter().collect()
    }

    fn options(&self) -> HubOptions {
        HubOptions {
            endpoint: Some(self.endpoint.clone()),
            cache_dir: Some(self.cache.path().to_owned()),
            // Whatever the machine has stored must not get into the tests.
            token: Some("hf_wrong".to_owned()),
            hash_cache: Some(self.cache.path().join("file-hashes")),
            ..HubOptions::default()
        }
    }

    fn offline(&self) -> HubOptions {
        // Port 9 is closed: if anything asked the network after all, it would fail.
        HubOptions { offline: true, endpoint: Some("http://127.0.0.1:9".to_owned()), ..self.options() }
    }

    async fn resolve(&self) -> Result<ModelFiles, HubError> {
        ModelFiles::resolve(MODEL, self.options()).await
    }
}

async fn answer(State(HubState(state)): State<HubState>, request: Request) -> Response {
    let mut state = state.lock().unwrap();
    let path = request.uri().path().to_owned();
    state.requests.push(format!("{} {path}", request.method()));
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{MODEL}/revision/")) {
        if let Some(refusal) = state.refuse_info {
            return refuse(refusal);
        }
        if ![COMMIT, "main", "refs%2Fpr%2F1"].contains(&revision) {
            return refuse((404, "RevisionNotFound"));
        }
        assert_eq!(request.uri().query(), Some("blobs=true"));
        let siblings = state.files.iter().map(|(name, content)| {
            let lfs = serde_json::json!({"sha256": hex(&sha256(content)), "size": content.len(), "pointerSize": 134});
            let lfs = if name.ends_with(".safetensors") { lfs } else { serde_json::Value::Null };
            serde_json::json!({"rfilename": name, "size": content.len(), "blobId": "0", "lfs": lfs})
        });
        let siblings: Vec<_> = siblings.collect();
        return axum::Json(serde_json::json!({"id": MODEL, "sha": COMMIT, "siblings": siblings})).into_response();
    }
    let Some(name) = path.strip_prefix(&format!("/{MODEL}/resolve/{COMMIT}/")) else {
        return refuse((404, "RepoNotFound"));
    };
    let authorized = request.headers().get("authorization").is_some_and(|value| value == &format!("Bearer {TOKEN}"));
    if state.gated && !authorized {
        return refuse((401, "GatedRepo"));
    }
    if let Some(refusal) = state.refuse_files {
        return refuse(refusal);
    }
    let Some(content) = state.files.get(name) else { return refuse((404, "EntryNotFound")) };
    let mut headers = HeaderMap::new();
    headers.insert("x-repo-commit", COMMIT.parse().unwrap());
    headers.insert("etag", format!("\"{}\"", hex(&sha256(content))).parse().unwrap());
    if request.method() == Method::HEAD {
        headers.insert("x-linked-size", content.len().to_string().parse().unwrap());
        return (headers, Body::empty()).into_response();
    }
    let damaged = state.damaged.as_ref().filter(|(damaged, _)| damaged == name).map(|(_, content)| content);
    (headers, damaged.unwrap_or(content).clone()).into_response()
}

fn refuse((status, code): (u16, &'static str)) -> Response {
    (StatusCode::from_u16(status).unwrap(), [("x-error-code", code)]).into_response()
}

fn names(paths: &[PathBuf]) -> Vec<String> {
    paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// The tensors of blocks 1 and 2, which are in the second and third shard.
fn blocks_1_and_2(tensor: &str) -> bool {
    tensor.starts_with("model.layers.1.") || tensor.starts_with("model.layers.2.")
}

fn expected_fingerprint() -> Fingerprint {
    let weights = five_shards().into_iter().filter(|(name, _)| name.ends_with(".safetensors"));
    let weights: Vec<_> = weights.map(|(name, content)| (name, sha256(&content))).collect();
    Fingerprint::of(b"canonical", &weights)
}

#[tokio::test]
async fn only_the_shards_that_are_needed_are_downloaded() {
    let hub = FakeHub::start(five_shards()).await;
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let sink = Arc::clone(&seen);
    let progress: helion::model::hub::Progress = Arc::new(move |transfer| {
        if transfer.stage == Stage::Downloading {
            sink.lock().unwrap().insert(transfer.file.to_owned(), (transfer.done_bytes, transfer.total_bytes));
        }
    });
    let options = HubOptions { progress: Some(progress), ..hub.options() };
    let files = ModelFiles::resolve(MODEL, options).await.unwrap();
    assert_eq!(files.revision(), Some(COMMIT));
    assert_eq!(std::fs::read(files.dir().join("tokenizer.json")).unwrap(), b"{}");
    assert!(!files.dir().join("README.md").exists());

    // The fingerprint is known before any shard is there.
    assert_eq!(files.fingerprint(b"canonical").await.unwrap(), expected_fingerprint());
    assert!(!hub.requests().iter().any(|request| request.contains("safetensors") && !request.contains("index")));

    let paths = files.fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(names(&paths), [shard(2), shard(3)]);
    assert_eq!(std::fs::read(&paths[0]).unwrap(), vec![2; 10_002]);
    let shards: BTreeSet<String> = [2, 3]
        .iter()
        .flat_map(|index| ["HEAD", "GET"].map(|method| format!("{method} /{MODEL}/resolve/{COMMIT}/{}", shard(*index))))
        .collect();
    assert_eq!(hub.requests(), shards, "these and nothing else");
    assert_eq!(seen.lock().unwrap()[&shard(3)], (10_003, 10_003));
}

#[tokio::test]
async fn the_second_start_needs_no_network() {
    let hub = FakeHub::start(five_shards()).await;
    hub.resolve().await.unwrap().fetch_weights(&blocks_1_and_2).await.unwrap();
    hub.requests();

    // Online, one question tells whether the branch has moved.
    hub.resolve().await.unwrap().fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(hub.requests(), [format!("GET /api/models/{MODEL}/revision/main")].into());

    // A commit can't move.
    let pinned = HubOptions { revision: Some(COMMIT.to_owned()), ..hub.options() };
    ModelFiles::resolve(MODEL, pinned).await.unwrap().fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(hub.requests(), BTreeSet::new());

    // Offline, and where the hub can't be reached.
    let unreachable = HubOptions { offline: false, ..hub.offline() };
    for options in [hub.offline(), unreachable] {
        let files = ModelFiles::resolve(MODEL, options).await.unwrap();
        assert_eq!(names(&files.fetch_weights(&blocks_1_and_2).await.unwrap()), [shard(2), shard(3)]);
        assert_eq!(files.fingerprint(b"canonical").await.unwrap(), expected_fingerprint());
        let error = files.fetch_weights(&|_| true).await.unwrap_err().to_string();
        let missing = [1, 4, 5].map(shard).join(", ");
        assert!(error.contains(&missing) && error.contains(MODEL) && error.contains("network"), "{error}");
    }
    assert_eq!(hub.requests(), BTreeSet::new());
}

#[tokio::test]
async fn offline_without_a_cache_says_what_is_missing() {
    let hub = FakeHub::start(five_shards()).await;
    let error = ModelFiles::resolve(MODEL, hub.offline()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HubError::NotCached { .. }) && text.contains("config.json"), "{text}");
    let unreachable = HubOptions { offline: false, ..hub.offline() };
    let error = ModelFiles::resolve(MODEL, unreachable).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HubError::Unreachable { .. }) && text.contains("127.0.0.1:9"), "{text}");
}

#[tokio::test]
async fn a_cache_that_another_program_filled_serves_offline() {
    let hub = FakeHub::start(five_shards()).await;
    let folder = hub.cache.path().join("models--org--five-shards");
    let snapshot = folder.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(folder.join("refs")).unwrap();
    std::fs::write(folder.join("refs/main"), COMMIT).unwrap();
    for (name, content) in five_shards().into_iter().filter(|(name, _)| !name.contains('/')) {
        std::fs::write(snapshot.join(name), content).unwrap();
    }
    let files = ModelFiles::resolve(MODEL, hub.offline()).await.unwrap();
    assert_eq!(files.fetch_weights(&blocks_1_and_2).await.unwrap().len(), 2);
    assert_eq!(files.fingerprint(b"canonical").await.unwrap(), expected_fingerprint());
    // Without one of the shards it can't be known.
    std::fs::remove_file(snapshot.join(shard(5))).unwrap();
    let error = files.fingerprint(b"canonical").await.unwrap_err();
    assert!(matches!(error, HubError::NotCached { .. }), "{error}");
}

#[tokio::test]
async fn a_local_copy_has_the_same_fingerprint() {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in five_shards().into_iter().filter(|(name, _)| !name.contains('/')) {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    let options = HubOptions { hash_cache: Some(dir.path().join("hashes")), ..HubOptions::default() };
    let files = ModelFiles::resolve(dir.path().to_str().unwrap(), options).await.unwrap();
    assert_eq!((files.revision(), files.dir()), (None, dir.path()));
    assert_eq!(files.fingerprint(b"canonical").await.unwrap(), expected_fingerprint());
    assert_eq!(names(&files.fetch_weights(&blocks_1_and_2).await.unwrap()), [shard(2), shard(3)]);
    std::fs::remove_file(dir.path().join(shard(3))).unwrap();
    let error = files.fetch_weights(&blocks_1_and_2).await.unwrap_err().to_string();
    assert!(error.contains(&shard(3)), "{error}");
    assert!(files.fetch_weights(&|tensor| tensor.starts_with("model.layers.1.")).await.is_ok());
}

/// Resolving, with the server changed first, fails with a text that has all these words.
async fn refused(change: impl FnOnce(&mut Inner), options: impl FnOnce(HubOptions) -> HubOptions, words: &[&str]) {
    let hub = FakeHub::start(five_shards()).await;
    hub.change(change);
    let error = ModelFiles::resolve(MODEL, options(hub.options())).await.unwrap_err().to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    assert!(!error.contains("hf_"), "a token in {error}");
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let same = |options| options;
    refused(|hub| hub.refuse_info = Some((404, "RepoNotFound")), same, &["no model org/five-shards", "HF_TOKEN"]).await;
    refused(|hub| hub.refuse_info = Some((401, "RepoNotFound")), same, &["no model org/five-shards", "private"]).await;
    refused(|hub| hub.refuse_info = Some((401, "")), same, &["gated or private", "hf auth login"]).await;
    refused(|hub| hub.refuse_info = Some((403, "")), same, &["no access", "org/five-shards"]).await;
    refused(|hub| hub.refuse_info = Some((429, "")), same, &["rate"]).await;
    refused(|hub| hub.refuse_info = Some((503, "")), same, &["cannot reach", "503"]).await;
    // What a gated model does: everybody may read about it, and nobody may have it without asking.
    refused(|hub| hub.gated = true, same, &["ask for access", "/org/five-shards", "HF_TOKEN"]).await;
    refused(|hub| hub.refuse_files = Some((403, "GatedRepo")), same, &["no access", "granted"]).await;
    let revision = |options| HubOptions { revision: Some("v9".to_owned()), ..options };
    refused(|_| (), revision, &["\"v9\"", "org/five-shards"]).await;
    let escape = |options| HubOptions { revision: Some("../../x".to_owned()), ..options };
    refused(|_| (), escape, &["../../x", "branch"]).await;
}

#[tokio::test]
async fn a_gated_model_comes_with_the_right_token() {
    let hub = FakeHub::start(five_shards()).await;
    hub.change(|hub| hub.gated = true);
    let options = HubOptions { token: Some(TOKEN.to_owned()), ..hub.options() };
    let files = ModelFiles::resolve(MODEL, options).await.unwrap();
    assert_eq!(files.fetch_weights(&blocks_1_and_2).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_branch_with_a_slash_is_one_branch() {
    let hub = FakeHub::start(five_shards()).await;
    let pull_request = |options| HubOptions { revision: Some("refs/pr/1".to_owned()), ..options };
    assert!(ModelFiles::resolve(MODEL, pull_request(hub.options())).await.is_ok());
    assert!(ModelFiles::resolve(MODEL, pull_request(hub.offline())).await.is_ok());
}

#[tokio::test]
async fn damaged_downloads_are_noticed_and_removed() {
    for content in [vec![2; 9_000], vec![7; 10_002]] {
        let hub = FakeHub::start(five_shards()).await;
        let files = hub.resolve().await.unwrap();
        hub.change(|hub| hub.damaged = Some((shard(2), content)));
        let error = files.fetch_weights(&blocks_1_and_2).await.unwrap_err();
        assert!(matches!(&error, HubError::Damaged { file, .. } if *file == shard(2)), "{error}");
        assert!(!files.dir().join(shard(2)).exists());
        hub.change(|hub| hub.damaged = None);
        assert_eq!(files.fetch_weights(&blocks_1_and_2).await.unwrap().len(), 2);
    }
}

#[tokio::test]
async fn damage_in_the_cache_is_repaired() {
    let hub = FakeHub::start(five_shards()).await;
    let files = hub.resolve().await.unwrap();
    let path = files.fetch_weights(&blocks_1_and_2).await.unwrap().remove(0);
    std::fs::write(std::fs::canonicalize(&path).unwrap(), vec![9; 10_002]).unwrap();
    let offline = ModelFiles::resolve(MODEL, hub.options()).await.unwrap();
    offline.fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), vec![2; 10_002]);
}

#[tokio::test]
async fn several_at_once_download_once() {
    let hub = FakeHub::start(five_shards()).await;
    let starts = (0..3).map(|_| async { hub.resolve().await.unwrap().fetch_weights(&|_| true).await.unwrap().len() });
    assert_eq!(futures::future::join_all(starts).await, [5, 5, 5]);
    let requests = &hub.state.0.lock().unwrap().requests;
    let downloads = requests.iter().filter(|request| request.starts_with("GET /org") && request.contains("of-00005"));
    assert_eq!(downloads.count(), 5, "{requests:?}");
}

/// What resolving and fetching everything of a model of these files fails with.
async fn unusable(files: &[(&str, &str)]) -> String {
    let files = files.iter().map(|(name, content)| ((*name).to_owned(), content.as_bytes().to_vec()));
    let hub = FakeHub::start(files.collect()).await;
    match hub.resolve().await {
        Ok(files) => files.fetch_weights(&|_| true).await.unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn models_of_other_formats_are_refused() {
    let config = ("config.json", "{}");
    let error = unusable(&[config, ("pytorch_model.bin", "")]).await;
    assert!(error.contains("pytorch_model.bin") && error.contains("safetensors"), "{error}");
    let error = unusable(&[config, ("model.gguf", "")]).await;
    assert!(error.contains("neither model.safetensors nor"), "{error}");
    assert!(unusable(&[("model.safetensors", "")]).await.contains("config.json"));
    let index = ("model.safetensors.index.json", r#"{"weight_map": {"a": "../x.safetensors"}}"#);
    assert!(unusable(&[config, index]).await.contains("../x.safetensors"));
}

#[tokio::test]
async fn names_that_are_no_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    std::fs::write(&file, "").unwrap();
    let resolve = |model: PathBuf| async move {
        let model = model.to_str().unwrap().to_owned();
        ModelFiles::resolve(&model, HubOptions { offline: true, ..HubOptions::default() })
            .await
            .unwrap_err()
            .to_string()
    };
    for name in ["gpt2", "./no/such/dir", "a/b/c", ""] {
        let error = resolve(PathBuf::from(name)).await;
        assert!(error.contains("neither a directory nor a hub id"), "{error}");
    }
    assert!(resolve(file).await.contains("directory of this file"));
    assert!(resolve(dir.path().to_owned()).await.contains("no config.json"));
}

#[tokio::test]
async fn the_fixtures_resolve_as_directories() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for (name, shards) in [("llama", 2), ("qwen3", 1)] {
        let dir = fixtures.join(name);
        let files = ModelFiles::resolve(dir.to_str().unwrap(), HubOptions::default()).await.unwrap();
        assert_eq!(files.fetch_weights(&|_| true).await.unwrap().len(), shards, "{name}");
    }
}
