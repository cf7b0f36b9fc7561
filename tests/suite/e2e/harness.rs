//! Starts and stops processes of the binary, and reads what they print.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use helion::{
    client::{
        Client,
        local_model::{EdgesChoice, LocalModel, ModelIdentity},
        session::Patience,
    },
    engine::DeviceChoice,
    model::{Dtype, Quant, hub::HubOptions, source::ModelSource},
    swarm::{Role, SwarmConfig, identity::Identity},
};
use serde_json::Value;

/// A process that takes longer hangs: the slowest of these tests' commands takes a few seconds.
pub(super) const HANG: Duration = Duration::from_secs(60);

/// A checkpoint of the test data.
pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Copies a checkpoint of the test data to a folder that is made, to be changed there.
pub(super) fn copy_fixture(name: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(fixture(name)).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// The demo's chat model.
pub(super) fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/demo/helion-tiny")
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Finished {
    /// The JSON object that it printed.
    pub(super) fn json(&self) -> Value {
        assert!(self.status.success(), "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks a clear failure: the exit code, what the message says, and that nothing panicked.
    pub(super) fn fails(&self, code: i32, says: &[&str]) {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        for part in says {
            assert!(self.stderr.contains(part), "should say {part:?}: {}", self.stderr);
        }
    }
}

/// A place of its own for a test's processes: state, keys, files.
pub(super) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(super) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A command that is not started yet.
    pub(super) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_helion"));
        command.args(args).env("HELION_HOME", self.path()).env("RUST_BACKTRACE", "0").env_remove("INITIAL_PEERS");
        command
    }

    /// Runs a command to its end.
    pub(super) fn run(&self, args: &[&str]) -> Finished {
        self.start(args).finish()
    }

    /// Starts a command.
    pub(super) fn start(&self, args: &[&str]) -> Running {
        Running::spawn(self.command(args).stdin(Stdio::null()), args)
    }

    /// Starts a command with more environment, and an open standard input.
    pub(super) fn start_with(&self, args: &[&str], environment: &[(&str, &Path)]) -> Running {
        Running::spawn(self.command(args).envs(environment.iter().copied()).stdin(Stdio::piped()), args)
    }

    /// Starts a command and types `input` into it.
    pub(super) fn run_typing(&self, args: &[&str], input: &str) -> Finished {
        use std::io::Write;
        let mut running = Running::spawn(self.command(args).stdin(Stdio::piped()), args);
        let mut stdin = running.child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        running.finish()
    }

    /// Starts a bootstrap node.
    pub(super) fn bootstrap(&self) -> Server {
        let key = self.key();
        Server::start(self, &["node", "bootstrap", "--new-swarm", "--identity-path", &key])
    }

    /// A path for a key of its own.
    fn key(&self) -> String {
        let name = format!("{:x}.key", rand::random::<u64>());
        self.path().join(name).display().to_string()
    }

    /// Starts a node in f32 that joins by `peer`, and waits until it serves. `args` come last.
    pub(super) fn node(&self, model: &Path, peer: &Server, args: &[&str]) -> Server {
        let (model, key) = (model.display().to_string(), self.key());
        let mut all = vec!["node", "serve", "--model", &model, "--initial-peers", &peer.address];
        if !args.contains(&"--identity-path") {
            all.extend(["--identity-path", &key]);
        }
        if !args.contains(&"--dtype") {
            all.extend(["--dtype", "f32"]);
        }
        all.extend(args);
        Server::start(self, &all)
    }

    /// A swarm of one bootstrap node and a node for each range of blocks.
    pub(super) fn swarm(&self, model: &Path, spans: &[&str], args: &[&str]) -> (Server, Vec<Server>) {
        let bootstrap = self.bootstrap();
        let nodes =
            spans.iter().map(|span| self.node(model, &bootstrap, &[&["--blocks", span], args].concat())).collect();
        (bootstrap, nodes)
    }

    /// `client generate --json` with these prompt ids.
    pub(super) fn generate(&self, model: &Path, peer: &Server, ids: &[u32], args: &[&str]) -> Finished {
        let (model, ids) = (model.display().to_string(), join(ids));
        let base = ["client", "generate", "--model", &model, "--initial-peers", &peer.address, "--input-ids", &ids];
        self.run(&[&base[..], &["--no-mdns", "--dtype", "f32", "--json"], args].concat())
    }

    /// `client status --json`.
    pub(super) fn status(&self, model: &Path, peer: &Server) -> Value {
        let model = model.display().to_string();
        self.run(&["client", "status", "--model", &model, "--initial-peers", &peer.address, "--no-mdns", "--json"])
            .json()
    }
}

/// Ids as `--input-ids` takes them.
pub(super) fn join(ids: &[u32]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// A process; killed when dropped.
pub(super) struct Running {
    pub(super) child: Child,
    what: String,
    stdout: Lines,
    stderr: Lines,
}

/// What a process prints, line by line. Several threads of a test may look at one process.
type Lines = Mutex<mpsc::Receiver<String>>;

fn lines(source: impl Read + Send + 'static) -> Lines {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut source = BufReader::new(source);
        let mut line = Vec::new();
        while source.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
    Mutex::new(receiver)
}

impl Running {
    fn spawn(command: &mut Command, args: &[&str]) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = lines(child.stdout.take().unwrap());
        let stderr = lines(child.stderr.take().unwrap());
        Self { child, what: args.join(" "), stdout, stderr }
    }

    /// The next line of stdout that holds `mark`.
    pub(super) fn line_with(&self, mark: &str) -> String {
        self.wait_for(&self.stdout, mark)
    }

    /// The next line of stderr that holds `mark`.
    pub(super) fn error_with(&self, mark: &str) -> String {
        self.wait_for(&self.stderr, mark)
    }

    fn wait_for(&self, lines: &Lines, mark: &str) -> String {
        let lines = lines.lock().unwrap();
        let deadline = Instant::now() + HANG;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(mark) => return line,
                Ok(_) => {}
                Err(error) => {
                    panic!("{}: no line with {mark:?} ({error}); stderr: {:?}", self.what, self.said());
                }
            }
        }
    }

    /// What it has printed to stderr.
    pub(super) fn said(&self) -> String {
        self.stderr.lock().unwrap().try_iter().collect()
    }

    /// Waits for its end.
    pub(super) fn finish(mut self) -> Finished {
        let status = self.wait();
        // The readers end when the pipes do.
        let stdout = self.stdout.lock().unwrap().iter().collect();
        let stderr = self.stderr.lock().unwrap().iter().collect();
        Finished { status, stdout, stderr }
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + HANG;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} hangs; it said {}", self.what, self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it holds in memory now.
    pub(super) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// The process group that a process is in.
    pub(super) fn group_of(pid: u32) -> u32 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        // The name, in brackets, may hold anything.
        let (_, rest) = stat.rsplit_once(')').unwrap();
        rest.split_whitespace().nth(2).unwrap().parse().unwrap()
    }

    /// Sends a signal, by its name.
    pub(super) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A node or bootstrap process that is up.
pub(super) struct Server {
    pub running: Running,
    /// Its address, with its peer id.
    pub(super) address: String,
    pub(super) peer_id: String,
    /// Its key file.
    pub(super) key: String,
}

impl Server {
    fn start(place: &Place, args: &[&str]) -> Self {
        let mut all = args.to_vec();
        if !args.contains(&"--host-maddrs") {
            all.extend(["--host-maddrs", "/ip4/127.0.0.1/tcp/0"]);
        }
        all.push("--no-mdns");
        let running = place.start(&all);
        let line = running.line_with("--initial-peers ");
        let address = line.split_once("--initial-peers ").unwrap().1.trim().to_owned();
        let peer_id = address.rsplit_once("/p2p/").unwrap().1.to_owned();
        let key = args.iter().skip_while(|arg| **arg != "--identity-path").nth(1);
        Self { running, address, peer_id, key: key.map(ToString::to_string).unwrap_or_default() }
    }

    /// Stops it as an operator does, and checks that it leaves well.
    pub(super) fn terminate(self) {
        self.running.signal("TERM");
        self.ends_well();
    }

    /// Waits for its end, which must be a good one.
    pub(super) fn ends_well(mut self) {
        let status = self.running.wait();
        assert!(status.success(), "{status}: {}", self.running.said());
    }
}

/// A fixture's reference: prompt and greedy continuation.
pub(super) struct Reference {
    pub(super) prompt: Vec<u32>,
    pub(super) output: Vec<u32>,
}

/// Reads a fixture's reference.
pub(super) fn reference(model: &Path) -> Reference {
    let bytes = std::fs::read(model.join("golden.safetensors")).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let data = golden.tensor(name).unwrap();
        data.data().chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32).collect()
    };
    let prompt = ids("input_ids");
    let output = ids("greedy_ids")[prompt.len()..].to_vec();
    Reference { prompt, output }
}

/// The numbers of a JSON array.
pub(super) fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The network of a client in this process.
pub(super) fn network(peer: &Server) -> SwarmConfig {
    SwarmConfig {
        initial_peers: vec![peer.address.parse().unwrap()],
        mdns: false,
        ..SwarmConfig::new(Identity::ephemeral(), Role::Client)
    }
}

/// A client in this process, in f32.
pub(super) async fn client(model: &Path, peer: &Server, patience: Patience) -> Client {
    connect(local_model(model).await, peer, patience).await
}

/// A client's part of a model, in f32.
pub(super) async fn local_model(model: &Path) -> Arc<LocalModel> {
    let source = ModelSource::open(&model.display().to_string(), HubOptions::default()).await.unwrap();
    let identity = ModelIdentity::of(&source).await.unwrap();
    let checkpoint = source.fetch_edges().await.unwrap();
    let choice = EdgesChoice { dtype: Some(Dtype::F32), quant: Quant::Auto, device: DeviceChoice::Cpu, threads: None };
    Arc::new(LocalModel::load(&checkpoint, identity, choice).unwrap())
}

/// A client with an identity of its own.
pub(super) async fn connect(model: Arc<LocalModel>, peer: &Server, patience: Patience) -> Client {
    // With RUST_LOG, a test that fails shows what its client did; another test's client may have begun it.
    let log = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env());
    let _ = log.with_test_writer().try_init();
    Client::connect(model, network(peer), patience, Duration::from_secs(10)).await.unwrap()
}
