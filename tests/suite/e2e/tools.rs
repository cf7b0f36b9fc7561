//! The rest of the command line, as a newcomer tries it.

use serde_json::Value;

use super::harness::{Place, fixture, join, numbers, tiny};

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

/// The processes of this demo that are still there.
fn processes_of(place: &Place) -> usize {
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
        .count()
}

#[test]
fn the_demo_leaves_no_process_behind_when_it_is_interrupted_or_killed() {
    for signal in ["INT", "KILL"] {
        let place = Place::new();
        let scratch = place.path().join("tmp");
        std::fs::create_dir(&scratch).unwrap();
        let demo = place.start_with(&["demo"], &[("TMPDIR", &scratch)]);
        demo.error_with("chatting");
        assert!(processes_of(&place) >= 5, "{}", processes_of(&place));
        demo.signal(signal);
        let deadline = std::time::Instant::now() + super::harness::HANG;
        while processes_of(&place) > 0 {
            assert!(std::time::Instant::now() < deadline, "processes are left after {signal}");
            std::thread::sleep(std::time::Duration::from_millis(20));
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
