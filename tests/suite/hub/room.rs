//! Room on the disk: eviction, limits, and what stays.

use std::{fs::File, path::Path, time::Duration};

use super::server::{
    COMMIT, FakeHub, OLD_COMMIT, block_1, blocks_1_and_2, content, five_shards, git_id, hex, sha256, shard,
};
use helion::model::hub::{HubCache, HubError, HubOptions, ModelFiles};

/// Enough for two shards and not for three.
const TWO_SHARDS: u64 = 25_000;

async fn resolve(hub: &FakeHub, limit: u64) -> ModelFiles {
    let options = HubOptions { max_disk_space_bytes: Some(limit), ..hub.options() };
    ModelFiles::resolve(super::MODEL, options).await.unwrap()
}

/// Says that a content was last used so long ago.
fn age(hub: &FakeHub, index: usize, seconds: u64) {
    let entry = hub.folder().join(".helion/files").join(hex(&sha256(&content(index))));
    let entry = File::options().write(true).open(entry).unwrap();
    entry.set_modified(std::time::SystemTime::now() - Duration::from_secs(seconds)).unwrap();
}

fn there(hub: &FakeHub) -> Vec<usize> {
    (1..=5).filter(|index| hub.blob(&content(*index)).exists()).collect()
}

fn block(index: usize) -> impl Fn(&str) -> bool {
    move |tensor: &str| tensor.starts_with(&format!("model.layers.{index}."))
}

#[tokio::test]
async fn the_least_recently_used_make_room() {
    let hub = FakeHub::start(five_shards()).await;
    let first = resolve(&hub, TWO_SHARDS).await;
    first.fetch_weights(&blocks_1_and_2).await.unwrap();
    drop(first);
    age(&hub, 2, 100);
    age(&hub, 3, 200);
    let second = resolve(&hub, TWO_SHARDS).await;
    second.fetch_weights(&block(3)).await.unwrap();
    assert_eq!(there(&hub), [2, 4]);
    assert!(!second.dir().join(shard(3)).is_symlink(), "no link leads nowhere");
    // What was removed comes back when it is wanted again.
    second.fetch_weights(&block(2)).await.unwrap();
    assert_eq!(there(&hub), [3, 4]);
    // Now both are in use by `second`.
    let error = second.fetch_weights(&block(0)).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HubError::NoSpace { freeable_bytes: 0, .. }), "{text}");
    assert!(["--max-disk-space", "helion model rm", "in use"].iter().all(|word| text.contains(word)), "{text}");
    assert_eq!(there(&hub), [3, 4]);
}

#[tokio::test]
async fn what_others_brought_into_the_cache_stays() {
    let hub = FakeHub::start(five_shards()).await;
    hub.resolve().await.unwrap();
    // As another tool leaves it.
    std::fs::write(hub.blob(&content(1)), content(1)).unwrap();
    let files = resolve(&hub, TWO_SHARDS).await;
    files.fetch_weights(&block(0)).await.unwrap();
    drop(files);
    let files = resolve(&hub, TWO_SHARDS).await;
    files.fetch_weights(&block(1)).await.unwrap();
    drop(files);
    age(&hub, 1, 100);
    let files = resolve(&hub, 11_000).await;
    files.fetch_weights(&block(2)).await.unwrap();
    assert_eq!(there(&hub), [1, 3]);
}

#[tokio::test]
async fn a_limit_below_the_need_downloads_nothing() {
    let hub = FakeHub::start(five_shards()).await;
    let files = resolve(&hub, 15_000).await;
    hub.asked();
    let error = files.fetch_weights(&blocks_1_and_2).await.unwrap_err();
    assert!(matches!(error, HubError::NoSpace { .. }), "{error}");
    assert!(hub.asked().is_empty());
    files.fetch_weights(&block_1).await.unwrap();
}

#[tokio::test]
async fn the_cache_is_listed_and_emptied() {
    let hub = FakeHub::start(five_shards()).await;
    let cache = HubCache::of(&hub.options());
    assert_eq!(cache.models().unwrap(), []);
    let files = hub.resolve().await.unwrap();
    files.fetch_weights(&blocks_1_and_2).await.unwrap();
    let old = HubOptions { revision: Some("old".to_owned()), ..hub.options() };
    let whole = ModelFiles::resolve(super::MODEL, old).await.unwrap();
    whole.fetch_weights(&|_| true).await.unwrap();
    std::fs::write(hub.folder().join("blobs/abc.incomplete"), [0; 7]).unwrap();

    let [model] = cache.models().unwrap().try_into().unwrap();
    assert_eq!((model.model.as_str(), model.in_use, model.incomplete_bytes), (super::MODEL, true, 7));
    assert!(model.last_used.is_some());
    let files_of = |wanted: &dyn Fn(&str) -> bool| -> u64 {
        five_shards().iter().filter(|(name, _)| wanted(name)).map(|(_, content)| content.len() as u64).sum()
    };
    let needed = |name: &str| name.ends_with(".safetensors") || name.ends_with(".json");
    assert_eq!(model.bytes, files_of(&needed));
    let [main, old] = model.revisions.clone().try_into().unwrap();
    assert_eq!(
        (main.commit.as_str(), main.refs, main.files, main.complete),
        (COMMIT, vec!["main".to_owned()], 5, false)
    );
    assert_eq!((old.commit.as_str(), old.refs, old.files, old.complete), (OLD_COMMIT, vec!["old".to_owned()], 8, true));
    assert_eq!(old.bytes, model.bytes);

    // In use, nothing goes.
    for revision in [None, Some("old")] {
        let error = cache.remove(super::MODEL, revision).unwrap_err();
        assert!(matches!(error, HubError::InUse { .. }) && error.to_string().contains("in use"), "{error}");
    }
    drop(whole);
    let removed = cache.remove(super::MODEL, Some("old")).unwrap();
    let freed: u64 = [1, 4, 5].iter().map(|index| content(*index).len() as u64).sum();
    assert_eq!((removed.commits, removed.bytes), (vec![OLD_COMMIT.to_owned()], freed));
    assert_eq!(there(&hub), [2, 3]);
    assert_eq!(std::fs::read(files.dir().join(shard(2))).unwrap(), content(2));
    assert!(cache.remove(super::MODEL, Some("old")).is_err());
    drop(files);
    let removed = cache.remove(super::MODEL, None).unwrap();
    assert_eq!(removed.commits, [COMMIT]);
    assert!(!hub.folder().exists());
    assert_eq!(cache.models().unwrap(), []);
    // And it can all be had again.
    hub.resolve().await.unwrap().fetch_weights(&block_1).await.unwrap();
}

#[test]
fn what_is_not_there_cannot_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("keep")).unwrap();
    let cache = HubCache::of(&HubOptions { cache_dir: Some(dir.path().to_owned()), ..HubOptions::default() });
    for (model, revision) in [("org/none", None), ("../keep", None), ("keep", None), ("org/none", Some("../../keep"))] {
        let error = cache.remove(model, revision).unwrap_err();
        assert!(matches!(error, HubError::NothingCached { .. }), "{error}");
    }
    assert!(dir.path().join("keep").exists());
}

#[cfg(unix)]
#[tokio::test]
async fn the_layout_is_the_one_of_hugging_faces_tools() {
    let hub = FakeHub::start(five_shards()).await;
    let files = hub.resolve().await.unwrap();
    files.fetch_weights(&block_1).await.unwrap();
    let folder = hub.folder();
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    let link = |file: &str| std::fs::read_link(folder.join("snapshots").join(COMMIT).join(file)).unwrap();
    assert_eq!(link(&shard(2)), Path::new("../../blobs").join(hex(&sha256(&content(2)))));
    let config = &five_shards()["config.json"];
    assert_eq!(link("config.json"), Path::new("../../blobs").join(git_id(config)));
}
