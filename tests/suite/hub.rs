//! Checkpoints from the hub, against a server on the loopback that speaks the hub's API.

mod commands;
mod resume;
mod room;
mod server;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use helion::model::hub::{HubError, HubOptions, ModelFiles, Stage};

use server::{
    COMMIT, FakeHub, Inner, MODEL, TOKEN, blocks_1_and_2, content, expected_fingerprint, five_shards, names, shard,
};

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
    assert!(!hub.paths().iter().any(|path| path.ends_with(".safetensors")));

    let paths = files.fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(names(&paths), [shard(2), shard(3)]);
    assert_eq!(std::fs::read(&paths[0]).unwrap(), content(2));
    let shards = [2, 3].map(|index| format!("/{MODEL}/resolve/{COMMIT}/{}", shard(index)));
    assert_eq!(hub.paths(), shards.into(), "these and nothing else");
    let bytes = content(3).len() as u64;
    assert_eq!(seen.lock().unwrap()[&shard(3)], (bytes, bytes));
}

#[tokio::test]
async fn the_second_start_needs_no_network() {
    let hub = FakeHub::start(five_shards()).await;
    hub.resolve().await.unwrap().fetch_weights(&blocks_1_and_2).await.unwrap();
    hub.paths();

    // Online, one question tells whether the branch has moved.
    hub.resolve().await.unwrap().fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(hub.paths(), [format!("/api/models/{MODEL}/revision/main")].into());

    // A commit can't move.
    let pinned = HubOptions { revision: Some(COMMIT.to_owned()), ..hub.options() };
    ModelFiles::resolve(MODEL, pinned).await.unwrap().fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(hub.paths(), BTreeSet::new());

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
    assert_eq!(hub.paths(), BTreeSet::new());
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
    refused(|hub| hub.refuse_info = Some((503, "")), same, &["cannot reach", "503"]).await;
    refused(|hub| hub.refuse_info = Some((500, "")), same, &["cannot reach", "500"]).await;
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
    let length = content(2).len();
    for content in [vec![2; 9_000], vec![7; length], vec![7; length + 1]] {
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
    std::fs::write(std::fs::canonicalize(&path).unwrap(), vec![9; content(2).len()]).unwrap();
    let offline = ModelFiles::resolve(MODEL, hub.options()).await.unwrap();
    offline.fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), content(2));
}

#[tokio::test]
async fn several_at_once_download_once() {
    let hub = FakeHub::start(five_shards()).await;
    let starts = (0..3).map(|_| async { hub.resolve().await.unwrap().fetch_weights(&|_| true).await.unwrap().len() });
    assert_eq!(futures::future::join_all(starts).await, [5, 5, 5]);
    for index in 1..=5 {
        let ending = shard(index);
        let asked = hub.change(|hub| hub.asked.iter().filter(|asked| asked.path.ends_with(&ending)).count());
        assert_eq!(asked, 1, "{ending}");
    }
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
