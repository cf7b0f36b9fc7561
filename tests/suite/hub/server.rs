//! A server on the loopback that speaks the hub's API, and misbehaves when it is told to.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::StreamExt;
use helion::model::{
    fingerprint::Fingerprint,
    hub::{HubError, HubOptions, ModelFiles},
};
use sha2::{Digest, Sha256};

pub(super) const MODEL: &str = "org/five-shards";
pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// What the branch `old` leads to; it has the same files.
pub(super) const OLD_COMMIT: &str = "fedcba9876543210fedcba9876543210fedcba98";
pub(super) const TOKEN: &str = "hf_right";

/// A request that came.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) path: String,
    pub(super) range: Option<String>,
    pub(super) authorization: Option<String>,
}

/// How the next answer with a file ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    /// The connection breaks after so many bytes.
    Cut(usize),
    /// Nothing more comes after so many bytes.
    Silence(usize),
}

#[derive(Default)]
pub(super) struct Inner {
    pub(super) files: BTreeMap<String, Vec<u8>>,
    pub(super) asked: Vec<Asked>,
    /// Status and error code of every answer about the model, and of every answer with a file.
    pub(super) refuse_info: Option<(u16, &'static str)>,
    pub(super) refuse_files: Option<(u16, &'static str)>,
    /// Statuses of the next answers, and what `Retry-After` says.
    pub(super) troubles: VecDeque<(u16, Option<&'static str>)>,
    /// Only with the right token.
    pub(super) gated: bool,
    /// Serves this content in place of the right one.
    pub(super) damaged: Option<(String, Vec<u8>)>,
    /// How the next answers with a file end.
    pub(super) endings: BTreeMap<String, VecDeque<Ending>>,
    pub(super) no_ranges: bool,
    /// Where files are, as the whole first part of an address.
    pub(super) redirect: Option<String>,
    /// The list leaves sizes and hashes out.
    pub(super) reticent: bool,
}

/// What the server has, and how it behaves.
#[derive(Clone, Default)]
pub(super) struct HubState(Arc<Mutex<Inner>>);

pub(super) struct FakeHub {
    pub(super) state: HubState,
    pub(super) port: u16,
    pub(super) endpoint: String,
    pub(super) cache: tempfile::TempDir,
}

pub(super) fn shard(index: usize) -> String {
    format!("model-{index:05}-of-00005.safetensors")
}

/// A safetensors file of one tensor of bytes.
pub(super) fn weights(tensor: &str, bytes: usize, value: u8) -> Vec<u8> {
    let header = serde_json::json!({tensor: {"dtype": "U8", "shape": [bytes], "data_offsets": [0, bytes]}}).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![value; bytes]].concat()
}

/// The content of a shard.
pub(super) fn content(index: usize) -> Vec<u8> {
    weights(&format!("model.layers.{}.mlp.weight", index - 1), 10_000 + index, index as u8)
}

/// A checkpoint of five shards, with one block in each.
pub(super) fn five_shards() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::from([
        ("config.json".to_owned(), b"{\"model_type\": \"llama\"}".to_vec()),
        ("tokenizer.json".to_owned(), b"{}".to_vec()),
        ("README.md".to_owned(), b"# not needed".to_vec()),
        ("onnx/model.onnx".to_owned(), b"not needed either".to_vec()),
    ]);
    let mut weight_map = serde_json::Map::new();
    for index in 1..=5 {
        files.insert(shard(index), content(index));
        weight_map.insert(format!("model.layers.{}.mlp.weight", index - 1), shard(index).into());
    }
    let index = serde_json::json!({"metadata": {"total_size": 50_015}, "weight_map": weight_map});
    files.insert("model.safetensors.index.json".to_owned(), index.to_string().into_bytes());
    files
}

/// The files of a checkpoint of the test data.
pub(super) fn fixture(name: &str) -> BTreeMap<String, Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| !path.file_name().unwrap().to_str().unwrap().starts_with("golden"))
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect()
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Something like git's id of a content: as long, and another one for each.
pub(super) fn git_id(content: &[u8]) -> String {
    hex(&sha256(content))[..40].to_owned()
}

pub(super) fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
}

impl FakeHub {
    pub(super) async fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let state = HubState::default();
        state.0.lock().unwrap().files = files;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let app = Router::new().fallback(answer).with_state(state.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { state, port, endpoint: format!("http://127.0.0.1:{port}"), cache: tempfile::tempdir().unwrap() }
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        change(&mut self.state.0.lock().unwrap())
    }

    /// The next answers with this file end so.
    pub(super) fn end(&self, file: &str, endings: &[Ending]) {
        self.change(|hub| hub.endings.insert(file.to_owned(), endings.iter().copied().collect()));
    }

    /// What was asked for since the last call.
    pub(super) fn asked(&self) -> Vec<Asked> {
        self.change(|hub| std::mem::take(&mut hub.asked))
    }

    /// The paths of that, without repeats.
    pub(super) fn paths(&self) -> BTreeSet<String> {
        self.asked().into_iter().map(|asked| asked.path).collect()
    }

    /// The ranges that were asked for of a file since the last call, in their order.
    pub(super) fn ranges(&self, file: &str) -> Vec<Option<String>> {
        let ending = format!("/{file}");
        self.asked().into_iter().filter(|asked| asked.path.ends_with(&ending)).map(|asked| asked.range).collect()
    }

    pub(super) fn options(&self) -> HubOptions {
        HubOptions {
            endpoint: Some(self.endpoint.clone()),
            cache_dir: Some(self.cache.path().to_owned()),
            // Whatever the machine has stored must not get into the tests.
            token: Some("hf_wrong".to_owned()),
            hash_cache: Some(self.cache.path().join("file-hashes")),
            ..HubOptions::default()
        }
    }

    pub(super) fn offline(&self) -> HubOptions {
        // Port 9 is closed: if anything asked the network after all, it would fail.
        HubOptions { offline: true, endpoint: Some("http://127.0.0.1:9".to_owned()), ..self.options() }
    }

    pub(super) async fn resolve(&self) -> Result<ModelFiles, HubError> {
        ModelFiles::resolve(MODEL, self.options()).await
    }

    /// The model's folder in the cache.
    pub(super) fn folder(&self) -> PathBuf {
        self.cache.path().join("models--org--five-shards")
    }

    /// Where a content is in the cache.
    pub(super) fn blob(&self, content: &[u8]) -> PathBuf {
        self.folder().join("blobs").join(hex(&sha256(content)))
    }

    /// Where it is while it is downloaded.
    pub(super) fn incomplete(&self, content: &[u8]) -> PathBuf {
        self.blob(content).with_extension("incomplete")
    }
}

async fn answer(State(HubState(state)): State<HubState>, request: Request) -> Response {
    let mut state = state.lock().unwrap();
    let path = request.uri().path().to_owned();
    let header = |name| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let asked = Asked { path, range: header(header::RANGE), authorization: header(header::AUTHORIZATION) };
    state.asked.push(asked.clone());
    assert_eq!(request.method(), Method::GET);
    if let Some((status, retry_after)) = state.troubles.pop_front() {
        let mut response = refuse((status, ""));
        if let Some(retry_after) = retry_after {
            response.headers_mut().insert("retry-after", retry_after.parse().unwrap());
        }
        return response;
    }
    if let Some(revision) = asked.path.strip_prefix(&format!("/api/models/{MODEL}/revision/")) {
        assert_eq!(request.uri().query(), Some("blobs=true"));
        return info(&state, revision);
    }
    let name = [COMMIT, OLD_COMMIT]
        .iter()
        .find_map(|commit| asked.path.strip_prefix(&format!("/{MODEL}/resolve/{commit}/")).map(str::to_owned));
    match name {
        Some(name) => file(&mut state, &name, &asked),
        None => refuse((404, "RepoNotFound")),
    }
}

fn info(state: &Inner, revision: &str) -> Response {
    if let Some(refusal) = state.refuse_info {
        return refuse(refusal);
    }
    let commit = match revision {
        COMMIT | "main" | "refs%2Fpr%2F1" => COMMIT,
        OLD_COMMIT | "old" => OLD_COMMIT,
        _ => return refuse((404, "RevisionNotFound")),
    };
    let siblings = state.files.iter().map(|(name, content)| {
        if state.reticent {
            return serde_json::json!({"rfilename": name});
        }
        let lfs = serde_json::json!({"sha256": hex(&sha256(content)), "size": content.len(), "pointerSize": 134});
        let lfs = if is_weights(name) { lfs } else { serde_json::Value::Null };
        serde_json::json!({"rfilename": name, "size": content.len(), "blobId": git_id(content), "lfs": lfs})
    });
    let siblings: Vec<_> = siblings.collect();
    axum::Json(serde_json::json!({"id": MODEL, "sha": commit, "siblings": siblings})).into_response()
}

fn file(state: &mut Inner, name: &str, asked: &Asked) -> Response {
    if state.gated && asked.authorization.as_deref() != Some(&format!("Bearer {TOKEN}")) {
        return refuse((401, "GatedRepo"));
    }
    if let Some(refusal) = state.refuse_files {
        return refuse(refusal);
    }
    if let Some(elsewhere) = &state.redirect {
        return (StatusCode::FOUND, [(header::LOCATION, format!("{elsewhere}{}", asked.path))]).into_response();
    }
    let damaged = state.damaged.as_ref().filter(|(damaged, _)| damaged == name).map(|(_, content)| content.clone());
    let Some(content) = damaged.or_else(|| state.files.get(name).cloned()) else {
        return refuse((404, "EntryNotFound"));
    };
    let mut headers = HeaderMap::new();
    let (mut status, mut first, mut end) = (StatusCode::OK, 0, content.len());
    if let Some(range) = asked.range.as_deref().filter(|_| !state.no_ranges) {
        let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        first = from.parse().unwrap();
        if first >= content.len() {
            return refuse((416, ""));
        }
        end = to.parse::<usize>().map_or(end, |last| end.min(last + 1));
        status = StatusCode::PARTIAL_CONTENT;
        let range = format!("bytes {first}-{}/{}", end - 1, content.len());
        headers.insert(header::CONTENT_RANGE, range.parse().unwrap());
    }
    let body = Bytes::from(content).slice(first..end);
    headers.insert(header::CONTENT_LENGTH, body.len().to_string().parse().unwrap());
    let body = match state.endings.get_mut(name).and_then(VecDeque::pop_front) {
        None => Body::from(body),
        Some(ending) => ended(&body, ending),
    };
    (status, headers, body).into_response()
}

/// The front of a body, and no end.
fn ended(body: &Bytes, ending: Ending) -> Body {
    let (Ending::Cut(bytes) | Ending::Silence(bytes)) = ending;
    let front = body.slice(..bytes.min(body.len()));
    let front = futures::stream::iter([Ok::<_, Infallible>(front)]).map(|front| Ok(front.unwrap()));
    let end = futures::stream::once(async move {
        // Waiting once has what came before sent.
        tokio::task::yield_now().await;
        if let Ending::Silence(_) = ending {
            std::future::pending::<()>().await;
        }
        Err(io::Error::from(io::ErrorKind::ConnectionReset))
    });
    Body::from_stream(front.chain(end))
}

fn refuse((status, code): (u16, &'static str)) -> Response {
    (StatusCode::from_u16(status).unwrap(), [("x-error-code", code)]).into_response()
}

pub(super) fn names(paths: &[PathBuf]) -> Vec<String> {
    paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// The tensors of blocks 1 and 2, which are in the second and third shard.
pub(super) fn blocks_1_and_2(tensor: &str) -> bool {
    tensor.starts_with("model.layers.1.") || tensor.starts_with("model.layers.2.")
}

/// The tensor of block 1, in the second shard.
pub(super) fn block_1(tensor: &str) -> bool {
    tensor.starts_with("model.layers.1.")
}

pub(super) fn expected_fingerprint() -> Fingerprint {
    let weights = five_shards().into_iter().filter(|(name, _)| is_weights(name));
    let weights: Vec<_> = weights.map(|(name, content)| (name, sha256(&content))).collect();
    Fingerprint::of(b"canonical", &weights)
}
