//! The main job: exactly the tokens that the model would produce on one machine.

use std::{collections::HashSet, path::Path};

use super::harness::{Place, Server, copy_fixture, fixture, join, numbers, reference, tiny};

/// Generates 24 greedy tokens through a swarm and holds them against the reference.
fn check(place: &Place, model: &Path, peer: &Server, hops: usize, args: &[&str]) {
    let reference = reference(model);
    let result = place
        .generate(model, peer, &reference.prompt, &[&["--max-tokens", "24", "--ignore-eos"], args].concat())
        .json();
    assert_eq!(numbers(&result["output_ids"]), reference.output);
    assert_eq!(numbers(&result["prompt_ids"]), reference.prompt);
    assert_eq!(result["route"].as_array().unwrap().len(), hops, "{result}");
    assert_eq!(result["finish_reason"], "length");
    assert_eq!((&result["exact"], &result["recoveries"]), (&true.into(), &0.into()));
}

fn families_through(spans: &[&str]) {
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
        let place = Place::new();
        let (bootstrap, nodes) = place.swarm(&fixture(family), spans, &[]);
        check(&place, &fixture(family), &bootstrap, spans.len(), &[]);
        nodes.into_iter().for_each(Server::terminate);
    }
}

#[test]
fn one_node() {
    families_through(&["0:6"]);
}

#[test]
fn two_nodes() {
    families_through(&["0:2", "2:6"]);
}

#[test]
fn four_nodes() {
    families_through(&["0:1", "1:3", "3:5", "5:6"]);
}

#[test]
fn a_prompt_in_chunks() {
    let place = Place::new();
    let (bootstrap, _nodes) = place.swarm(&fixture("qwen3"), &["0:3", "3:6"], &[]);
    for chunk in ["1", "7", "40"] {
        check(&place, &fixture("qwen3"), &bootstrap, 2, &["--prefill-chunk", chunk]);
    }
}

#[test]
fn several_samples_are_one_object_a_line_and_say_which_they_are() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:6"], &[]);
    let sampled = ["--max-tokens", "6", "--ignore-eos", "--temperature", "1.1"];
    let many = |args: &[&str]| {
        let all = [&sampled[..], &["--num-return-sequences", "3", "--seed", "40"], args].concat();
        let ended = place.generate(&model, &bootstrap, &[3, 1, 4], &all);
        assert!(ended.status.success(), "{ended:?}");
        ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<serde_json::Value>>()
    };
    let samples = many(&[]);
    assert_eq!(samples.len(), 3);
    for (index, sample) in samples.iter().enumerate() {
        assert_eq!(sample["index"], index);
        let seed = (40 + index).to_string();
        let alone = [&sampled[..], &["--seed", &seed]].concat();
        let alone = place.generate(&model, &bootstrap, &[3, 1, 4], &alone).json();
        assert_eq!((&sample["output_ids"], &sample["text"]), (&alone["output_ids"], &alone["text"]));
        assert_eq!(alone.get("index"), None);
    }
    place.generate(&model, &bootstrap, &[3], &["--num-return-sequences", "65"]).fails(2, &["num-return-sequences"]);
}

#[test]
fn over_quic() {
    let place = Place::new();
    let quic = ["--host-maddrs", "/ip4/127.0.0.1/udp/0/quic-v1"];
    let (bootstrap, nodes) = place.swarm(&fixture("llama"), &["0:2", "2:6"], &quic);
    assert!(nodes.iter().all(|node| node.address.contains("/quic-v1/")), "{}", nodes[0].address);
    check(&place, &fixture("llama"), &bootstrap, 2, &[]);
}

#[test]
fn two_sessions_at_once() {
    let place = Place::new();
    let (bootstrap, _nodes) = place.swarm(&fixture("llama"), &["0:3", "3:6"], &[]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| check(&place, &fixture("llama"), &bootstrap, 2, &[]));
        }
    });
}

#[test]
fn overlapping_spans_make_one_route() {
    let place = Place::new();
    let (bootstrap, _nodes) = place.swarm(&fixture("llama"), &["0:4", "2:6"], &[]);
    check(&place, &fixture("llama"), &bootstrap, 2, &[]);
}

#[test]
fn a_node_that_joins_later_makes_the_swarm_complete() {
    let (place, model) = (Place::new(), fixture("mistral"));
    let (bootstrap, _first) = place.swarm(&model, &["0:4"], &[]);
    let incomplete = place.generate(&model, &bootstrap, &[1, 2, 3], &[]);
    incomplete.fails(1, &["no peer serves blocks 4:6", "1 peer serves 0:4", "--blocks 4:6"]);
    let status = place.status(&model, &bootstrap);
    assert_eq!((&status["complete"], &status["missing"]), (&false.into(), &serde_json::json!([[4, 6]])));

    // This one chooses for itself: what is missing.
    let _second = place.node(&model, &bootstrap, &["--num-blocks", "2"]);
    check(&place, &model, &bootstrap, 2, &[]);
    let status = place.status(&model, &bootstrap);
    assert_eq!((&status["complete"], &status["coverage"]), (&true.into(), &serde_json::json!([1, 1, 1, 1, 1, 1])));
}

#[test]
fn a_client_may_wait_for_the_missing_blocks() {
    let (place, model) = (Place::new(), fixture("qwen2"));
    let (bootstrap, _first) = place.swarm(&model, &["0:3"], &[]);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| check(&place, &model, &bootstrap, 2, &["--wait", "30"]));
        let _second = place.node(&model, &bootstrap, &["--blocks", "3:6"]);
        waiting.join().unwrap();
    });
}

#[test]
fn two_models_in_one_dht_do_not_mix() {
    let place = Place::new();
    let (bootstrap, _nodes) = place.swarm(&fixture("llama"), &["0:3", "3:6"], &[]);
    let _others = [
        place.node(&fixture("qwen3"), &bootstrap, &["--blocks", "0:2"]),
        place.node(&fixture("qwen3"), &bootstrap, &["--blocks", "2:6"]),
    ];
    check(&place, &fixture("llama"), &bootstrap, 2, &[]);
    check(&place, &fixture("qwen3"), &bootstrap, 2, &[]);
    assert_eq!(place.status(&fixture("llama"), &bootstrap)["peers"].as_array().unwrap().len(), 2);
    let models = place.run(&["client", "models", "--initial-peers", &bootstrap.address, "--json"]).json();
    let listed: Vec<_> =
        models.as_array().unwrap().iter().map(|m| (&m["model"], &m["peers"], &m["complete"])).collect();
    assert_eq!(listed, [(&"llama".into(), &2.into(), &true.into()), (&"qwen3".into(), &2.into(), &true.into())]);
}

/// Copies a checkpoint and changes one weight: another revision of the model, with the same name.
fn other_revision(place: &Place, family: &str) -> std::path::PathBuf {
    let copy = place.path().join("other").join(family);
    copy_fixture(family, &copy);
    let weights = copy.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(weights, bytes).unwrap();
    copy
}

#[test]
fn another_revision_under_the_same_prefix_is_named_and_never_used() {
    let (place, model) = (Place::new(), fixture("qwen3"));
    let (bootstrap, _first) = place.swarm(&model, &["0:3"], &[]);
    let other = other_revision(&place, "qwen3");
    let foreign = place.node(&other, &bootstrap, &["--blocks", "3:6"]);
    let refused = place.generate(&model, &bootstrap, &[1, 2, 3], &[]);
    refused.fails(1, &["no peer serves blocks 3:6", "another model or revision", &foreign.peer_id]);

    let _own = place.node(&model, &bootstrap, &["--blocks", "3:6"]);
    check(&place, &model, &bootstrap, 2, &[]);
}

#[test]
fn in_bf16_the_cut_changes_no_bit() {
    let model = fixture("llama");
    let ids = join(&reference(&model).prompt);
    let mut seen = HashSet::new();
    for spans in [&["0:6"][..], &["0:1", "1:6"], &["0:2", "2:6"], &["0:3", "3:6"], &["0:4", "4:6"], &["0:5", "5:6"]] {
        let place = Place::new();
        let (bootstrap, _nodes) = place.swarm(&model, spans, &["--dtype", "bf16"]);
        let out = place.path().join("logits.safetensors");
        let (model, out_text) = (model.display().to_string(), out.display().to_string());
        let base = ["client", "score", "--model", &model, "--initial-peers", &bootstrap.address, "--no-mdns"];
        let scored = place.run(&[&base[..], &["--input-ids", &ids, "--out", &out_text]].concat());
        assert!(scored.status.success(), "{scored:?}");
        seen.insert(std::fs::read(out).unwrap());
    }
    assert_eq!(seen.len(), 1, "some cuts give other logits");
}

#[test]
fn score_writes_the_reference_logits() {
    let (place, model) = (Place::new(), fixture("qwen2"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let out = place.path().join("logits.safetensors");
    let (name, ids, out_text) =
        (model.display().to_string(), join(&reference(&model).prompt), out.display().to_string());
    let base = ["client", "score", "--model", &name, "--initial-peers", &bootstrap.address, "--no-mdns"];
    let scored = place.run(
        &[&base[..], &["--dtype", "f32", "--input-ids", &ids, "--out", &out_text, "--prefill-chunk", "7"]].concat(),
    );
    assert!(scored.status.success(), "{scored:?}");
    let floats = |path: &Path| -> (Vec<usize>, Vec<f32>) {
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("logits").unwrap();
        let values = logits.data().chunks_exact(4).map(|v| f32::from_le_bytes(v.try_into().unwrap())).collect();
        (logits.shape().to_vec(), values)
    };
    let (shape, logits) = floats(&out);
    let (_, expected) = floats(&model.join("golden.safetensors"));
    assert_eq!(shape, [40, 512]);
    let deviation = (expected.iter().map(|v| v * v).sum::<f32>() / expected.len() as f32).sqrt();
    let worst = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst / deviation < 1e-4, "{worst} of {deviation}");
}

/// A model whose positions all change when a sequence grows past 20 tokens: what was computed before that counts no more.
#[test]
fn a_sequence_that_grows_past_the_longrope_boundary() {
    let place = Place::new();
    let model = place.path().join("longrope");
    copy_fixture("phi3", &model);
    copy_fixture("variants/phi3-longrope", &model);
    let golden = std::fs::read(model.join("golden.safetensors")).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&golden).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let values = golden.tensor(name).unwrap().data().chunks_exact(8);
        values.map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32).collect()
    };
    let (bootstrap, _nodes) = place.swarm(&model, &["0:1", "1:2"], &[]);
    for length in ["12", "20"] {
        let (prompt, greedy) = (ids(&format!("{length}.input_ids")), ids(&format!("{length}.greedy_ids")));
        let count = (greedy.len() - prompt.len()).to_string();
        let args = ["--ignore-eos", "--prefill-chunk", "9", "--max-tokens", &count];
        let result = place.generate(&model, &bootstrap, &prompt, &args).json();
        assert_eq!(numbers(&result["output_ids"]), greedy[prompt.len()..], "{length}");
    }
}

#[test]
fn the_chat_model_answers_its_ten_questions() {
    let (place, model) = (Place::new(), tiny());
    let (bootstrap, _nodes) = place.swarm(&model, &["0:4", "4:8"], &[]);
    let golden: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(model.join("golden.json")).unwrap()).unwrap();
    let name = model.display().to_string();
    for case in golden["cases"].as_array().unwrap() {
        let question = case["user"].as_str().unwrap();
        let base = ["client", "generate", "--model", &name, "--initial-peers", &bootstrap.address, "--no-mdns"];
        let result =
            place.run(&[&base[..], &["--dtype", "f32", "--json", "--chat", "--prompt", question]].concat()).json();
        for key in ["prompt_ids", "output_ids", "text"] {
            assert_eq!(result[key], case[key], "{question}");
        }
        assert_eq!(result["finish_reason"], "eos");
    }
}
