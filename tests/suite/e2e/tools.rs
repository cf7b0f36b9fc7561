//! The rest of the command line, as a newcomer tries it.

use std::{
    net::TcpListener,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::harness::{HANG, Place, Running, Server, fixture, join, numbers, tiny};

#[test]
fn the_demo_answers() {
    let place = Place::new();
    let answered = place.run(&["demo", "What is the capital of France?"]);
    assert!(answered.status.success(), "{answered:?}");
    assert!(answered.stdout.starts_with("The capital of France is Paris."), "{answered:?}");
    assert_eq!(answered.stdout.matches("\nhop ").count(), 3, "{answered:?}");
    assert!(answered.stdout.contains("tokens a second"), "{answered:?}");
}

#[test]
fn the_demo_as_json_with_other_numbers_of_nodes() {
    for nodes in ["1", "4"] {
        let place = Place::new();
        let result = place.run(&["demo", "What is 7 plus 8?", "--nodes", nodes, "--json"]).json();
        assert_eq!(result["text"], "7 plus 8 is 15.");
        assert_eq!(result["route"].as_array().unwrap().len().to_string(), nodes);
    }
    Place::new().run(&["demo", "x", "--nodes", "9"]).fails(1, &["9 nodes", "8 at most"]);
}

#[test]
fn the_demo_chats() {
    let place = Place::new();
    let chat =
        place.run_typing(&["demo"], "What is the capital of Italy?\n/nonsense\n/reset\nWhat is 7 plus 8?\n/quit\n");
    assert!(chat.status.success(), "{chat:?}");
    for answer in ["The capital of Italy is Rome.", "7 plus 8 is 15."] {
        assert!(chat.stdout.contains(answer), "{chat:?}");
    }
    assert!(chat.stderr.contains("unknown command /nonsense"), "{chat:?}");
}

#[test]
fn settings_of_the_demo_are_not_those_of_its_nodes() {
    let place = Place::new();
    let nobody = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
    let environment = [
        ("INITIAL_PEERS", nobody),
        ("HELION_NUM_BLOCKS", "1"),
        ("HELION_DHT_PREFIX", "another"),
        ("HELION_PUBLIC_NAME", "another"),
        ("HELION_CONFIG", "/no/such/file.yaml"),
        ("HELION_PORT", "nonsense"),
    ];
    let environment = environment.map(|(name, value)| (name, Path::new(value)));
    let answered = place.start_with(&["demo", "What is 7 plus 8?", "--json"], &environment).finish();
    assert_eq!(answered.json()["text"], "7 plus 8 is 15.");
    assert!(place.path().join("hashes").exists(), "the nodes share the hashes of files");
    assert!(!place.path().join("peers").exists(), "a demo's peers are no good for later");
}

/// The processes of this demo that are still there.
fn processes_of(place: &Place) -> Vec<u32> {
    let needle = place.path().display().to_string();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        .filter(|entry| {
            let read = |file| std::fs::read(entry.path().join(file)).unwrap_or_default();
            let environment = read("environ");
            // A process that has ended and not been waited for has no command line.
            !read("cmdline").is_empty() && environment.windows(needle.len()).any(|part| part == needle.as_bytes())
        })
        .map(|entry| entry.file_name().to_string_lossy().parse().unwrap())
        .collect()
}

#[test]
fn the_demo_leaves_no_process_behind_when_it_is_interrupted_or_killed() {
    for signal in ["INT", "KILL"] {
        let place = Place::new();
        let scratch = place.path().join("tmp");
        std::fs::create_dir(&scratch).unwrap();
        let demo = place.start_with(&["demo"], &[("TMPDIR", &scratch)]);
        demo.error_with("chatting");
        let (processes, own) = (processes_of(&place), demo.child.id());
        assert!(processes.len() >= 5, "{processes:?}");
        // Ctrl-C in a terminal goes to the whole group of the demo; its nodes must live on.
        let nodes = processes.into_iter().filter(|process| *process != own);
        assert!(nodes.into_iter().all(|node| Running::group_of(node) != Running::group_of(own)));
        demo.signal(signal);
        let deadline = Instant::now() + HANG;
        while !processes_of(&place).is_empty() {
            assert!(Instant::now() < deadline, "processes are left after {signal}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_stream_of_json() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let (name, ids) = (model.display().to_string(), join(&[1, 2, 3]));
    let streamed = place.run(&[
        "client",
        "generate",
        "--model",
        &name,
        "--initial-peers",
        &bootstrap.address,
        "--no-mdns",
        "--dtype",
        "f32",
        "--input-ids",
        &ids,
        "--max-tokens",
        "5",
        "--ignore-eos",
        "--json-stream",
    ]);
    assert!(streamed.status.success(), "{streamed:?}");
    let lines: Vec<Value> = streamed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 7);
    assert_eq!(lines[0]["route"][1]["peer_id"], nodes[1].peer_id.as_str());
    let tokens: Vec<u32> = lines[1..6].iter().map(|line| line["token_id"].as_u64().unwrap() as u32).collect();
    assert_eq!(tokens, numbers(&lines[6]["output_ids"]));
    let text: String = lines[1..6].iter().map(|line| line["text"].as_str().unwrap()).collect();
    assert_eq!(text, lines[6]["text"].as_str().unwrap());
}

#[test]
fn seeds_and_stop_strings() {
    let (place, model) = (Place::new(), tiny());
    let (bootstrap, _nodes) = place.swarm(&model, &["0:4", "4:8"], &[]);
    let name = model.display().to_string();
    let ask = |args: &[&str]| {
        let base = ["client", "generate", "--model", &name, "--initial-peers", &bootstrap.address, "--no-mdns"];
        let prompt = ["--chat", "--prompt", "What is the capital of France?", "--json"];
        place.run(&[&base[..], &prompt, args].concat()).json()
    };
    let stopped = ask(&["--stop", "Lyon", "--stop", " is"]);
    assert_eq!((&stopped["text"], &stopped["finish_reason"]), (&"The capital of France".into(), &"stop".into()));

    let random = ["--temperature", "3", "--max-tokens", "12", "--ignore-eos"];
    let seeded = |seed| ask(&[&random[..], &["--seed", seed]].concat())["output_ids"].clone();
    assert_eq!(seeded("1"), seeded("1"));
    assert_ne!(seeded("1"), seeded("2"));
}

#[test]
fn status_for_people_and_scripts() {
    let (place, model) = (Place::new(), fixture("qwen2"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6"], &["--public-name", "attic"]);
    let status = place.status(&model, &bootstrap);
    assert_eq!((&status["model"], &status["blocks"]), (&"qwen2".into(), &6.into()));
    let peer = &status["peers"][1];
    assert_eq!(peer["peer_id"], nodes[1].peer_id.as_str());
    assert_eq!((&peer["span"], &peer["state"]), (&serde_json::json!([3, 6]), &"ONLINE".into()));
    assert_eq!((&peer["dtype"], &peer["quant"]), (&"f32".into(), &"none".into()));
    assert!(peer["rtt_ms"].as_f64().unwrap() > 0.0 && peer["throughput"].as_f64().unwrap() > 0.0, "{peer}");
    let name = model.display().to_string();
    let table = place.run(&["client", "status", "--model", &name, "--initial-peers", &bootstrap.address, "--no-mdns"]);
    assert!(table.stdout.contains("complete") && table.stdout.contains("attic"), "{table:?}");
}

#[test]
fn identities() {
    let place = Place::new();
    let path = place.path().join("new.key").display().to_string();
    let last_word = |text: &str| text.split_whitespace().last().unwrap().to_owned();
    let made = place.run(&["identity", "new", &path]);
    let shown = place.run(&["identity", "show", &path]);
    assert_eq!(last_word(&made.stdout), last_word(&shown.stdout));
    assert!(last_word(&made.stdout).starts_with("12D3Koo"), "{made:?}");
    place.run(&["identity", "new", &path]).fails(1, &["new.key"]);
    place.run(&["identity", "show", "/no/such.key"]).fails(1, &["/no/such.key"]);
}

#[test]
fn a_node_keeps_its_identity_and_memory_holds_only_its_span() {
    let (place, model) = (Place::new(), tiny());
    let bootstrap = place.bootstrap();
    let key = place.path().join("kept.key").display().to_string();
    let node = |blocks: &str| place.node(&model, &bootstrap, &["--blocks", blocks, "--identity-path", &key]);
    let small = node("0:1");
    let (id, one) = (small.peer_id.clone(), small.running.resident_bytes());
    small.terminate();
    let all = node("0:8");
    assert_eq!(all.peer_id, id);
    let eight = all.running.resident_bytes();
    // Seven more blocks in f32, and nothing of the embedding: between 0.5 and 2 times their size.
    let block = 4.0 * 7.0 * (192.0 * (2.0 * 192.0 + 2.0 * 96.0 + 3.0 * 512.0) + 2.0 * 192.0);
    let grown = (eight as f64 - one as f64) / block;
    assert!((0.5..2.0).contains(&grown), "one block: {one}, eight: {eight}, grown by {grown} of the blocks' size");
}

/// The arguments of a client command for the llama fixture's swarm.
fn client<'a>(command: &'a str, model: &'a str, peer: &'a Server, args: &[&'a str]) -> Vec<&'a str> {
    let base = ["client", command, "--model", model, "--initial-peers", &peer.address, "--no-mdns"];
    [&base[..], args].concat()
}

/// An endless generation, for a client that is ended before it ends.
const ENDLESS: [&str; 6] = ["--input-ids", "5,5,5,5", "--max-tokens", "500", "--ignore-eos", "--json-stream"];

#[test]
fn a_client_that_is_stopped_gives_its_session_back_at_once() {
    let (place, model) = (Place::new(), fixture("llama"));
    // With room for one session, the next client is refused as long as the first one's is held.
    let (bootstrap, _nodes) = place.swarm(&model, &["0:6"], &["--max-sessions", "1"]);
    let name = model.display().to_string();
    for signal in ["INT", "TERM"] {
        let generating = place.start(&client("generate", &name, &bootstrap, &ENDLESS));
        generating.line_with("token_id");
        generating.signal(signal);
        generating.finish().fails(1, &["interrupted"]);
        let next = place.generate(&model, &bootstrap, &[1, 2], &["--max-tokens", "2"]);
        assert!(next.status.success(), "after {signal}: {next:?}");
    }
}

#[test]
fn watching_ends_well() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:6"], &[]);
    let name = model.display().to_string();
    let watching = place.start(&client("status", &name, &bootstrap, &["--watch", "--every", "86400"]));
    watching.line_with("complete");
    watching.signal("INT");
    assert!(watching.finish().status.success());
}

#[test]
fn nobody_reads_standard_output() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:6"], &[]);
    let name = model.display().to_string();
    let key = place.path().join("new.key").display().to_string();
    for args in [
        vec!["identity", "new", &key],
        client("status", &name, &bootstrap, &["--watch"]),
        client("status", &name, &bootstrap, &["--json"]),
        client("generate", &name, &bootstrap, &ENDLESS),
        client("generate", &name, &bootstrap, &ENDLESS[..5]),
        client("generate", &name, &bootstrap, &["--input-ids", "1", "--json"]),
        vec!["demo", "hi"],
    ] {
        let mut child =
            place.command(&args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && !said.contains("panicked") && !said.contains("error"), "{args:?}: {said}");
    }
    // And standard error, where `2>&1 | head` closes both.
    let mut child = place.command(&["identity", "show", "/no/such"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
    drop(nodes);
}

#[test]
fn a_node_can_be_stopped_while_it_joins() {
    let place = Place::new();
    // It takes connections, and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let peer = format!("/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp");
    let model = fixture("llama").display().to_string();
    let listen = ["--no-mdns", "--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--join-timeout", "86400"];
    for command in [&["node", "bootstrap"][..], &["node", "serve", "--model", &model, "--blocks", "0:6"]] {
        let joining = place.start(&[command, &["--initial-peers", &peer], &listen].concat());
        joining.error_with("listening");
        joining.signal("TERM");
        let ended = joining.finish();
        assert!(ended.status.success(), "{ended:?}");
    }
}

#[test]
fn a_node_logs_in_json() {
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    let node = place.node(&model, &bootstrap, &["--blocks", "0:6", "--log-format", "json"]);
    node.running.signal("TERM");
    let ended = node.running.finish();
    let lines: Vec<Value> = ended.stderr.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let messages: Vec<&str> = lines.iter().filter_map(|line| line["fields"]["message"].as_str()).collect();
    for expected in ["starting", "listening", "joined", "hosting blocks 0:6 of 6", "loading", "online", "leaving"] {
        assert!(messages.iter().any(|message| message.starts_with(expected)), "no {expected}: {messages:?}");
    }
    assert!(lines.iter().all(|line| line["level"] == "INFO"), "{}", ended.stderr);
}
