//! Interrupted downloads, a hub in trouble, and hosts that files are redirected to.

use super::server::{
    Ending, FakeHub, OLD_COMMIT, TOKEN, block_1, blocks_1_and_2, content, five_shards, fixture, sha256, shard, weights,
};
use helion::model::{
    hub::{HubError, HubOptions, ModelFiles},
    source::{ModelSource, Part},
};

/// The range that begins at a byte.
fn from(byte: usize) -> Option<String> {
    Some(format!("bytes={byte}-"))
}

#[tokio::test]
async fn a_connection_that_breaks_is_gone_on_with() {
    let hub = FakeHub::start(five_shards()).await;
    let files = hub.resolve().await.unwrap();
    hub.end(&shard(2), &[Ending::Cut(4_000), Ending::Cut(3_000)]);
    let paths = files.fetch_weights(&block_1).await.unwrap();
    assert_eq!(hub.ranges(&shard(2)), [None, from(4_000), from(7_000)]);
    assert_eq!(std::fs::read(&paths[0]).unwrap(), content(2));
    assert!(!hub.incomplete(&content(2)).exists());
}

#[tokio::test]
async fn a_later_start_goes_on_where_an_earlier_one_stopped() {
    let hub = FakeHub::start(five_shards()).await;
    hub.end(&shard(2), &[Ending::Cut(1_000), Ending::Cut(0), Ending::Cut(0), Ending::Cut(0), Ending::Cut(0)]);
    let error = hub.resolve().await.unwrap().fetch_weights(&block_1).await.unwrap_err();
    let text = error.to_string();
    let total_bytes = content(2).len() as u64;
    let expected = matches!(&error, HubError::Interrupted { file, done_bytes: 1_000, total_bytes: total, .. }
        if *file == shard(2) && *total == total_bytes);
    assert!(expected && text.contains("start again"), "{text}");
    assert_eq!(std::fs::read(hub.incomplete(&content(2))).unwrap(), content(2)[..1_000]);
    hub.end(&shard(2), &[]);
    hub.asked();
    hub.resolve().await.unwrap().fetch_weights(&block_1).await.unwrap();
    assert_eq!(hub.ranges(&shard(2)), [from(1_000)]);
}

#[tokio::test]
async fn a_half_file_is_never_taken_for_whole() {
    let hub = FakeHub::start(five_shards()).await;
    hub.end(&shard(2), &[Ending::Cut(1_000), Ending::Cut(0), Ending::Cut(0), Ending::Cut(0), Ending::Cut(0)]);
    let files = hub.resolve().await.unwrap();
    files.fetch_weights(&block_1).await.unwrap_err();
    assert!(!files.dir().join(shard(2)).exists() && !hub.blob(&content(2)).exists());
    let offline = ModelFiles::resolve(super::MODEL, hub.offline()).await.unwrap();
    let error = offline.fetch_weights(&block_1).await.unwrap_err();
    assert!(matches!(error, HubError::NotCached { .. }), "{error}");
}

#[tokio::test]
async fn what_is_wrong_with_an_earlier_part_costs_one_more_download() {
    // Other bytes, more than there should be, and all of them but wrong.
    for left in [vec![9; 500], vec![9; content(2).len() + 5], vec![9; content(2).len()]] {
        let hub = FakeHub::start(five_shards()).await;
        let files = hub.resolve().await.unwrap();
        std::fs::create_dir_all(hub.folder().join("blobs")).unwrap();
        std::fs::write(hub.incomplete(&content(2)), &left).unwrap();
        let paths = files.fetch_weights(&block_1).await.unwrap();
        assert_eq!(std::fs::read(&paths[0]).unwrap(), content(2));
        assert_eq!(hub.ranges(&shard(2)).last(), Some(&None), "from the start, at last");
    }
}

#[tokio::test]
async fn a_part_that_is_all_there_needs_no_request() {
    let hub = FakeHub::start(five_shards()).await;
    let files = hub.resolve().await.unwrap();
    std::fs::create_dir_all(hub.folder().join("blobs")).unwrap();
    std::fs::write(hub.incomplete(&content(2)), content(2)).unwrap();
    files.fetch_weights(&block_1).await.unwrap();
    assert_eq!(hub.ranges(&shard(2)), []);
    assert!(hub.blob(&content(2)).is_file());
}

#[tokio::test]
async fn a_server_without_ranges_sends_all_again() {
    let hub = FakeHub::start(five_shards()).await;
    hub.change(|hub| hub.no_ranges = true);
    hub.end(&shard(2), &[Ending::Cut(4_000)]);
    let paths = hub.resolve().await.unwrap().fetch_weights(&block_1).await.unwrap();
    assert_eq!(hub.ranges(&shard(2)), [None, from(4_000)]);
    assert_eq!(std::fs::read(&paths[0]).unwrap(), content(2));
}

#[tokio::test]
async fn a_server_that_never_comes_further_is_given_up() {
    let hub = FakeHub::start(five_shards()).await;
    let files = hub.resolve().await.unwrap();
    hub.change(|hub| hub.no_ranges = true);
    hub.end(&shard(2), &[Ending::Cut(4_000); 20]);
    let error = files.fetch_weights(&block_1).await.unwrap_err();
    assert!(matches!(error, HubError::Interrupted { .. }), "{error}");
    assert!(hub.ranges(&shard(2)).len() < 10);
}

#[tokio::test]
async fn another_version_is_another_download() {
    let hub = FakeHub::start(five_shards()).await;
    hub.end(&shard(2), &[Ending::Cut(1_000), Ending::Cut(0), Ending::Cut(0), Ending::Cut(0), Ending::Cut(0)]);
    hub.resolve().await.unwrap().fetch_weights(&block_1).await.unwrap_err();
    // The branch goes on, and the shard has other bytes now.
    let newer = weights("model.layers.1.mlp.weight", 10_002, 77);
    hub.change(|hub| hub.files.insert(shard(2), newer.clone()));
    hub.end(&shard(2), &[]);
    hub.asked();
    let paths = hub.resolve().await.unwrap().fetch_weights(&block_1).await.unwrap();
    assert_eq!(hub.ranges(&shard(2)), [None]);
    assert_eq!(std::fs::read(&paths[0]).unwrap(), newer);
    assert_eq!(std::fs::read(hub.incomplete(&content(2))).unwrap().len(), 1_000, "for whoever wants that version");
}

#[tokio::test]
async fn what_another_revision_has_is_not_downloaded_again() {
    let hub = FakeHub::start(five_shards()).await;
    hub.resolve().await.unwrap().fetch_weights(&block_1).await.unwrap();
    hub.asked();
    let old = HubOptions { revision: Some("old".to_owned()), ..hub.options() };
    let files = ModelFiles::resolve(super::MODEL, old).await.unwrap();
    assert_eq!(files.revision(), Some(OLD_COMMIT));
    let paths = files.fetch_weights(&block_1).await.unwrap();
    assert_eq!(std::fs::read(&paths[0]).unwrap(), content(2));
    assert_eq!(hub.asked().len(), 1, "only what the branch is");
}

#[tokio::test]
async fn trouble_that_passes_is_waited_for() {
    for trouble in [(429, Some("0")), (500, None), (502, None), (503, Some("0")), (504, None), (429, None)] {
        let hub = FakeHub::start(five_shards()).await;
        hub.change(|hub| hub.troubles = [trouble, trouble].into());
        let files = hub.resolve().await.unwrap();
        hub.change(|hub| hub.troubles = [trouble].into());
        files.fetch_weights(&block_1).await.unwrap();
    }
}

#[tokio::test]
async fn trouble_that_stays_is_told() {
    let hub = FakeHub::start(five_shards()).await;
    let files = hub.resolve().await.unwrap();
    hub.asked();
    hub.change(|hub| hub.refuse_files = Some((500, "")));
    let error = files.fetch_weights(&block_1).await.unwrap_err().to_string();
    assert!(error.contains("500") && error.contains(&hub.endpoint), "{error}");
    assert_eq!(hub.asked().len(), 4, "a bounded number of times");
    // A hub that wants us to wait for minutes is not waited for.
    hub.change(|hub| {
        hub.refuse_files = None;
        hub.troubles = [(429, Some("300"))].into();
    });
    let error = files.fetch_weights(&block_1).await.unwrap_err();
    assert!(matches!(error, HubError::RateLimited { retry_after_s: Some(300), .. }), "{error}");
    assert!(error.to_string().contains("in 300 s"), "{error}");
}

/// A hub whose files are on another host.
async fn with_another_host() -> (FakeHub, FakeHub) {
    let (hub, host) = (FakeHub::start(five_shards()).await, FakeHub::start(five_shards()).await);
    hub.change(|hub| {
        hub.gated = true;
        hub.redirect = Some(format!("http://localhost:{}", host.port));
    });
    (hub, host)
}

#[tokio::test]
async fn a_redirect_to_another_host_carries_no_token() {
    let (hub, host) = with_another_host().await;
    host.end(&shard(2), &[Ending::Cut(4_000)]);
    let options = HubOptions { token: Some(TOKEN.to_owned()), ..hub.options() };
    let files = ModelFiles::resolve(super::MODEL, options).await.unwrap();
    let paths = files.fetch_weights(&blocks_1_and_2).await.unwrap();
    assert_eq!(std::fs::read(&paths[0]).unwrap(), content(2));
    let bearer = format!("Bearer {TOKEN}");
    assert!(hub.asked().iter().all(|asked| asked.authorization.as_deref() == Some(&bearer)));
    let asked = host.asked();
    assert!(asked.iter().all(|asked| asked.authorization.is_none()), "{asked:?}");
    let resumed = asked.iter().filter(|asked| asked.range == from(4_000)).count();
    assert_eq!((resumed, asked.len()), (1, 6), "config, tokenizer, index, two shards, one of them twice: {asked:?}");
}

#[tokio::test]
async fn a_redirect_to_another_port_of_the_same_host_carries_no_token_either() {
    let (hub, host) = with_another_host().await;
    hub.change(|hub| hub.redirect = Some(host.endpoint.clone()));
    let options = HubOptions { token: Some(TOKEN.to_owned()), ..hub.options() };
    ModelFiles::resolve(super::MODEL, options).await.unwrap().fetch_weights(&block_1).await.unwrap();
    assert!(host.asked().iter().all(|asked| asked.authorization.is_none()));
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let (hub, host) = with_another_host().await;
    hub.change(|hub| hub.gated = false);
    host.change(|host| host.redirect = Some(hub.endpoint.clone()));
    let error = hub.resolve().await.unwrap_err().to_string();
    assert!(error.contains("redirect"), "{error}");
}

/// A checkpoint of the test data as shards without an index.
fn without_index() -> std::collections::BTreeMap<String, Vec<u8>> {
    let mut files = fixture("llama");
    files.remove("model.safetensors.index.json").unwrap();
    files
}

#[tokio::test]
async fn headers_stand_in_for_an_index() {
    let hub = FakeHub::start(without_index()).await;
    let open = |options| ModelSource::open(super::MODEL, options);
    let source = open(hub.options()).await.unwrap();
    let sizes = source.weight_files().await.unwrap();
    assert_eq!(sizes.len(), 2);
    hub.asked();
    // The edges are in the first shard and in the last.
    let files = source.fetch(&Part::Blocks(0..1)).await.unwrap();
    assert_eq!(files.len(), 1, "{files:?}");
    let asked = hub.asked();
    assert_eq!(asked.len(), 1, "the headers were kept: {asked:?}");
    let checkpoint = source.fetch_blocks(0..1).await.unwrap();
    let tensor = &source.spec().block_tensors(0)[0];
    checkpoint.read(&tensor.name, &tensor.shape).unwrap();
    // Another start, without a network, knows what is where.
    let offline = open(hub.offline()).await.unwrap();
    offline.fetch_blocks(0..1).await.unwrap();
    assert!(offline.fetch(&Part::All).await.unwrap_err().to_string().contains("offline"));
    // The same from a directory, and with all of them.
    source.fetch(&Part::All).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    without_index().iter().for_each(|(name, content)| std::fs::write(dir.path().join(name), content).unwrap());
    let local = ModelSource::open(dir.path().to_str().unwrap(), HubOptions::default()).await.unwrap();
    local.fetch_blocks(0..1).await.unwrap();
    assert_eq!(local.fingerprint().await.unwrap(), source.fingerprint().await.unwrap());
}

#[tokio::test]
async fn only_headers_are_read_to_look_at_a_model() {
    let mut files = fixture("llama");
    // Far larger than its header, so that it shows if it is downloaded.
    let large = weights("model.layers.0.mlp.weight", 1 << 20, 1);
    files.insert("model-00002-of-00002.safetensors".to_owned(), large);
    let hub = FakeHub::start(files).await;
    for no_ranges in [false, true] {
        hub.change(|hub| hub.no_ranges = no_ranges);
        let source = ModelSource::open(super::MODEL, hub.options()).await.unwrap();
        hub.asked();
        let tensors = source.stored_tensors().await.unwrap();
        assert_eq!(tensors["model.layers.0.mlp.weight"].bytes, 1 << 20);
        assert!(hub.asked().iter().all(|asked| asked.range.as_deref() == Some("bytes=0-131071")));
        assert!(hub.folder().join(".helion/headers").is_dir());
        std::fs::remove_dir_all(hub.folder().join(".helion/headers")).unwrap();
    }
}

#[tokio::test]
async fn a_long_header_takes_a_second_request() {
    let mut files = without_index();
    let name = "x".repeat(200_000);
    files.insert("model-00002-of-00002.safetensors".to_owned(), weights(&name, 1 << 20, 1));
    let hub = FakeHub::start(files).await;
    let files = hub.resolve().await.unwrap();
    let tensors = files.stored_tensors().await.unwrap();
    assert_eq!(tensors[&name].bytes, 1 << 20);
    let ranges = hub.ranges("model-00002-of-00002.safetensors");
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges[1].as_deref().unwrap().starts_with("bytes=131072-200"), "{ranges:?}");
}

#[tokio::test]
async fn hostile_headers_are_refused() {
    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    let long = [&1_000u64.to_le_bytes()[..], b"{}"].concat();
    let mut overlapping = weights("a", 8, 1);
    let at = overlapping.windows(5).position(|part| part == b"[0,8]").unwrap();
    overlapping[at + 1] = b'4';
    for (content, says) in
        [(huge, "are allowed"), (long, "ends within"), (vec![1, 2], "2 bytes"), (vec![], ""), (overlapping, "")]
    {
        let mut files = without_index();
        files.insert("model-00002-of-00002.safetensors".to_owned(), content);
        let hub = FakeHub::start(files).await;
        let error = hub.resolve().await.unwrap().fetch_weights(&|_| true).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, HubError::Header { .. }) && text.contains(says), "{says}: {text}");
        assert!(text.contains("model-00002-of-00002.safetensors"), "{text}");
    }
}

#[tokio::test]
async fn a_missing_shard_is_named() {
    let mut files = without_index();
    files.remove("model-00001-of-00002.safetensors").unwrap();
    let hub = FakeHub::start(files).await;
    let error = hub.resolve().await.unwrap().fetch_weights(&|_| true).await.unwrap_err().to_string();
    assert!(error.contains("model-00001-of-00002.safetensors"), "{error}");
}

#[tokio::test]
async fn a_hub_that_tells_no_sizes_and_hashes_serves_too() {
    let hub = FakeHub::start(five_shards()).await;
    hub.change(|hub| hub.reticent = true);
    let files = hub.resolve().await.unwrap();
    hub.end(&shard(2), &[Ending::Cut(4_000)]);
    let paths = files.fetch_weights(&block_1).await.unwrap();
    assert_eq!(std::fs::read(&paths[0]).unwrap(), content(2));
    // Its identity has to be taken from the bytes.
    let shards: Vec<_> = (1..=5).map(|index| (shard(index), sha256(&content(index)))).collect();
    let expected = helion::model::fingerprint::Fingerprint::of(b"canonical", &shards);
    assert_eq!(files.fingerprint(b"canonical").await.unwrap(), expected);
}
