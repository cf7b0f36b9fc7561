//! `helion model`, as a user runs it: the binary against a server.

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::process::{Child, Command};

use super::server::{Ending, FakeHub, MODEL, TOKEN, fixture, weights};

/// A command that takes longer hangs.
const HANG: Duration = Duration::from_secs(60);

/// What a command printed and how it ended.
#[derive(Debug)]
struct Finished {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Finished {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn fails(&self, code: i32, says: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str()), (Some(code), ""), "{self:?}");
        assert!(says.iter().all(|part| self.stderr.contains(part)), "{says:?}: {self:?}");
        assert!(!self.stderr.contains("panicked") && !self.stderr.contains("hf_"), "{self:?}");
    }
}

/// A command with this hub and its cache, and nothing else of the environment that matters to it.
fn command(hub: &FakeHub, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HF_") || name.starts_with("HELION_")) {
        command.env_remove(name);
    }
    let home = hub.cache.path().join("home");
    command.args(args).env("HF_ENDPOINT", &hub.endpoint).env("HF_HUB_CACHE", hub.cache.path());
    command.env("HELION_HOME", home.join("helion")).env("HF_HOME", home.join("hf")).env("HOME", home);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn helion(hub: &FakeHub, args: &[&str]) -> Command {
    command(hub, env!("CARGO_BIN_EXE_helion"), args)
}

async fn finish(mut command: Command) -> Finished {
    Finished::of(tokio::time::timeout(HANG, command.output()).await.expect("it hangs").unwrap())
}

async fn run(hub: &FakeHub, args: &[&str]) -> Finished {
    finish(helion(hub, args)).await
}

/// A checkpoint of the test data, in two shards.
async fn llama() -> FakeHub {
    FakeHub::start(fixture("llama")).await
}

/// Waits until something is so.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + HANG;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_model_of_the_hub_is_inspected_without_its_weights() {
    let hub = llama().await;
    let inspected = run(&hub, &["model", "inspect", MODEL, "--json"]).await.json();
    assert!(!hub.cache.path().join("models--org--five-shards/blobs").read_dir().unwrap().any(|blob| {
        let length = blob.unwrap().metadata().unwrap().len();
        fixture("llama").iter().any(|(name, content)| name.ends_with(".safetensors") && content.len() as u64 == length)
    }));
    assert_eq!((&inspected["family"], &inspected["blocks"]), (&"llama".into(), &6.into()));
    assert_eq!(inspected["model"], MODEL);
    assert_eq!(inspected["fingerprint"].as_str().unwrap().len(), 64);
    assert!(inspected["kv_bytes_per_token"]["f32"]["block"].as_u64().unwrap() > 0);
    assert_eq!(inspected["fits"]["blocks"]["bf16"], 6);
    // The same as from a directory, but for what only the hub knows.
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama");
    let local = run(&hub, &["model", "inspect", dir.to_str().unwrap(), "--json"]).await.json();
    for key in ["parameters", "stored", "block_bytes", "edges_bytes", "kv_bytes_per_token", "context_tokens"] {
        assert_eq!(local[key], inspected[key], "{key}");
    }
    let text = run(&hub, &["model", "inspect", MODEL]).await.stdout;
    for word in ["llama", "parameters", "q4_k", "blocks that fit here", "KV in bf16", "fingerprint"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    run(&hub, &["model", "inspect", "org/none"]).await.fails(1, &["no model org/none"]);
    run(&hub, &["model", "inspect"]).await.fails(2, &["MODEL"]);
}

#[tokio::test]
async fn a_part_is_pulled_and_then_the_rest() {
    let hub = llama().await;
    let pulled = run(&hub, &["model", "pull", MODEL, "--blocks", "0:1", "--json"]).await.json();
    assert_eq!(pulled["files"].as_array().unwrap().len(), 1, "{pulled}");
    let listed = run(&hub, &["model", "list", "--json"]).await.json();
    assert_eq!(listed["models"][0]["model"], MODEL);
    assert_eq!(listed["models"][0]["revisions"][0]["complete"], false);
    run(&hub, &["model", "pull", MODEL, "--blocks", "5:9"]).await.fails(2, &["blocks 0:6"]);
    let pulled = run(&hub, &["model", "pull", MODEL]).await;
    assert!(pulled.stdout.trim().ends_with(super::COMMIT), "{pulled:?}");
    assert!(Path::new(pulled.stdout.trim()).join("model-00002-of-00002.safetensors").is_file());
    let listed = run(&hub, &["model", "list", "--json"]).await.json();
    assert_eq!(listed["models"][0]["revisions"][0]["complete"], true);
    assert_eq!(listed["models"][0]["in_use"], false);
    let table = run(&hub, &["model", "list"]).await.stdout;
    assert!(table.contains(MODEL) && table.contains("complete") && table.contains("main"), "{table}");
    // Without a network all of it is there.
    let mut offline = helion(&hub, &["model", "pull", MODEL]);
    offline.env("HF_HUB_OFFLINE", "1").env("HF_ENDPOINT", "http://127.0.0.1:9");
    assert_eq!(finish(offline).await.code, Some(0));

    run(&hub, &["model", "rm", MODEL]).await.fails(2, &["--yes"]);
    run(&hub, &["model", "rm", MODEL, "--revision", "v9", "--yes"]).await.fails(1, &["\"v9\""]);
    let removed = run(&hub, &["model", "rm", MODEL, "--yes", "--json"]).await.json();
    assert_eq!(removed["commits"][0], super::COMMIT);
    run(&hub, &["model", "rm", MODEL, "--yes"]).await.fails(1, &["holds no org/five-shards", "model list"]);
    let listed = run(&hub, &["model", "list"]).await;
    assert!(listed.stdout.is_empty() && listed.stderr.contains("holds no model"), "{listed:?}");
    let mut offline = helion(&hub, &["model", "inspect", MODEL, "--offline"]);
    offline.env("HF_ENDPOINT", "http://127.0.0.1:9");
    finish(offline).await.fails(1, &["offline", "config.json"]);
}

#[tokio::test]
async fn tokens_come_from_where_hugging_face_keeps_them() {
    let hub = llama().await;
    hub.change(|hub| hub.gated = true);
    let pull = ["model", "pull", MODEL, "--edges"];
    let failed = run(&hub, &pull).await;
    failed.fails(1, &["gated", "ask for access", "/org/five-shards", "--token", "HF_TOKEN", "hf auth login"]);
    for variable in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HELION_TOKEN"] {
        let mut command = helion(&hub, &pull);
        command.env(variable, TOKEN).env("HF_HUB_CACHE", hub.cache.path().join(variable));
        let pulled = finish(command).await;
        assert_eq!(pulled.code, Some(0), "{variable}: {pulled:?}");
    }
    let login = hub.cache.path().join("home/hf");
    std::fs::create_dir_all(&login).unwrap();
    std::fs::write(login.join("token"), format!("{TOKEN}\n")).unwrap();
    assert_eq!(run(&hub, &pull).await.code, Some(0));
    // The flag wins over the login, and a wrong one is not printed.
    let other = hub.cache.path().join("other");
    let wrong =
        run(&hub, &[&pull[..], &["--token", "hf_wrong", "--cache-dir", other.to_str().unwrap()]].concat()).await;
    wrong.fails(1, &["gated"]);
}

/// A model with one file of weights, of three MiB, and the file.
fn large() -> (BTreeMap<String, Vec<u8>>, Vec<u8>) {
    let mut files = fixture("qwen3");
    let large = weights("model.layers.0.mlp.weight", 3 << 20, 1);
    files.insert("model.safetensors".to_owned(), large.clone());
    (files, large)
}

/// Starts to pull, and returns when so much of the file has been written.
async fn begin(hub: &FakeHub, file: &[u8], bytes: u64) -> Child {
    let child = helion(hub, &["model", "pull", MODEL]).spawn().unwrap();
    let incomplete = hub.incomplete(file);
    until("nothing is written", || incomplete.metadata().is_ok_and(|metadata| metadata.len() >= bytes)).await;
    child
}

#[tokio::test]
async fn a_process_that_was_killed_goes_on_where_it_was() {
    let (files, large) = large();
    let hub = FakeHub::start(files).await;
    hub.end("model.safetensors", &[Ending::Silence((2 << 20) + 1_000)]);
    let mut child = begin(&hub, &large, 1 << 20).await;
    child.kill().await.unwrap();
    let length = hub.incomplete(&large).metadata().unwrap().len();
    hub.asked();
    assert_eq!(run(&hub, &["model", "pull", MODEL]).await.code, Some(0));
    assert_eq!(hub.ranges("model.safetensors"), [Some(format!("bytes={length}-"))]);
    assert_eq!(std::fs::read(hub.blob(&large)).unwrap(), large);
    assert!(!hub.incomplete(&large).exists());
}

#[tokio::test]
async fn two_processes_at_once_share_a_download() {
    let (files, large) = large();
    let hub = FakeHub::start(files).await;
    // The second comes while the first waits for bytes, which it gets when it asks again.
    hub.end("model.safetensors", &[Ending::Silence((1 << 20) + 9)]);
    let mut first = begin(&hub, &large, 1 << 20).await;
    let second = helion(&hub, &["model", "pull", MODEL]).spawn().unwrap();
    let entries = || hub.change(|hub| hub.asked.iter().filter(|asked| asked.path.contains("/api/")).count());
    until("the second doesn't start", || entries() == 2).await;
    // The first dies, and the second takes over what it has.
    first.kill().await.unwrap();
    let second = Finished::of(tokio::time::timeout(HANG, second.wait_with_output()).await.unwrap().unwrap());
    assert_eq!(second.code, Some(0), "{second:?}");
    let ranges = hub.ranges("model.safetensors");
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges[1].is_some());
    // And where both live, each file is asked for once.
    assert_eq!(run(&hub, &["model", "rm", MODEL, "--yes"]).await.code, Some(0));
    hub.asked();
    let pull = || async { run(&hub, &["model", "pull", MODEL]).await };
    let both = tokio::join!(pull(), pull());
    assert_eq!((both.0.code, both.1.code), (Some(0), Some(0)), "{both:?}");
    assert_eq!(hub.ranges("model.safetensors").len(), 1);
}

#[tokio::test]
async fn a_model_in_use_is_neither_removed_nor_evicted() {
    let (files, large) = large();
    let hub = FakeHub::start(files).await;
    hub.end("model.safetensors", &[Ending::Silence((1 << 20) + 9)]);
    let mut busy = begin(&hub, &large, 1 << 20).await;
    run(&hub, &["model", "rm", MODEL, "--yes"]).await.fails(1, &["in use"]);
    let listed = run(&hub, &["model", "list", "--json"]).await.json();
    assert_eq!(listed["models"][0]["in_use"], true);
    busy.kill().await.unwrap();
    assert_eq!(run(&hub, &["model", "rm", MODEL, "--yes"]).await.code, Some(0));
    assert!(!hub.folder().exists());
}

#[tokio::test]
async fn the_limit_is_a_flag() {
    let hub = FakeHub::start(fixture("qwen3")).await;
    run(&hub, &["model", "pull", MODEL, "--max-disk-space", "10KB"])
        .await
        .fails(1, &["--max-disk-space leaves 9.8 KiB", "have to be downloaded"]);
    run(&hub, &["model", "pull", MODEL, "--max-disk-space", "lots"]).await.fails(2, &["50GiB"]);
    assert_eq!(run(&hub, &["model", "pull", MODEL, "--max-disk-space", "1GiB"]).await.code, Some(0));
}

/// Runs the binary where no file may grow beyond so many bytes.
#[cfg(unix)]
async fn limited(hub: &FakeHub, bytes: usize, args: &[&str]) -> Finished {
    // What the limit stops is an error and no signal then.
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", bytes / 512);
    let all = [&["-c", &script, env!("CARGO_BIN_EXE_helion")], args].concat();
    finish(command(hub, "sh", &all)).await
}

#[cfg(unix)]
#[tokio::test]
async fn a_full_disk_is_said_and_leaves_the_cache_usable() {
    let (files, large) = large();
    let hub = FakeHub::start(files).await;
    let failed = limited(&hub, 2 << 20, &["model", "pull", MODEL]).await;
    failed.fails(1, &["the disk is full", "helion model rm", "--cache-dir"]);
    assert!(!hub.blob(&large).exists());
    let length = hub.incomplete(&large).metadata().unwrap().len();
    assert!((1 << 20..=2 << 20).contains(&length), "{length}");
    // The rest is of use, and with more room the download goes on.
    let listed = run(&hub, &["model", "list", "--json"]).await.json();
    assert_eq!(listed["models"][0]["incomplete_bytes"], length);
    hub.asked();
    assert_eq!(run(&hub, &["model", "pull", MODEL]).await.code, Some(0));
    assert_eq!(hub.ranges("model.safetensors"), [Some(format!("bytes={length}-"))]);
    assert_eq!(std::fs::read(hub.blob(&large)).unwrap(), large);
}

/// Runs the binary with a cache on a file system of 2 MiB, where the system lets us make one.
#[cfg(target_os = "linux")]
async fn on_a_small_disk(hub: &FakeHub, args: &[&str]) -> Option<Finished> {
    let small = hub.cache.path().join("small");
    std::fs::create_dir_all(&small).unwrap();
    let script = "mount -t tmpfs -o size=2m tmpfs \"$1\" || exit 77; shift; exec \"$0\" \"$@\"";
    let cache = small.to_str().unwrap();
    let all = [&["-rm", "sh", "-c", script, env!("CARGO_BIN_EXE_helion"), cache], args].concat();
    let mut command = command(hub, "unshare", &all);
    command.env("HF_HUB_CACHE", cache);
    let finished = Finished::of(command.output().await.ok()?);
    (finished.code != Some(77) && !finished.stderr.starts_with("unshare:")).then_some(finished)
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_small_disk_is_noticed_before_the_download_or_within() {
    let (files, _) = large();
    let hub = FakeHub::start(files).await;
    let Some(failed) = on_a_small_disk(&hub, &["model", "pull", MODEL]).await else { return };
    failed.fails(1, &["3.0 MiB", "the disk has 1.", "to spare", "can be freed"]);
    assert!(hub.ranges("model.safetensors").is_empty());
    // Where the size isn't known before, it shows when the disk is full.
    hub.change(|hub| hub.reticent = true);
    let failed = on_a_small_disk(&hub, &["model", "pull", MODEL]).await.unwrap();
    failed.fails(1, &["the disk is full"]);
}

#[tokio::test]
async fn every_command_with_a_model_knows_the_flags_of_the_hub() {
    let hub = llama().await;
    let commands: [&[&str]; 7] = [
        &["node", "serve"],
        &["client", "generate"],
        &["client", "chat"],
        &["client", "score"],
        &["client", "status"],
        &["model", "inspect"],
        &["model", "pull"],
    ];
    for words in commands {
        let help = run(&hub, &[words, &["--help"]].concat()).await.stdout;
        for flag in ["--revision", "--token", "--cache-dir", "--offline", "--max-disk-space"] {
            assert!(help.contains(flag), "{words:?} lacks {flag}");
        }
    }
}
