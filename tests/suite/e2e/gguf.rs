//! Nodes and clients on GGUF files.

use serde_json::Value;

use super::harness::{Place, fixture, numbers, reference};

#[test]
fn a_split_file_is_served_and_used() {
    let place = Place::new();
    let part = |number: usize| fixture("gguf").join(format!("llama-0000{number}-of-00003.gguf"));
    let bootstrap = place.bootstrap();
    // Each names the model by another part of it.
    let _nodes =
        [("0:3", 1), ("3:6", 3)].map(|(span, number)| place.node(&part(number), &bootstrap, &["--blocks", span]));
    let reference = reference(&fixture("llama"));
    let result =
        place.generate(&part(2), &bootstrap, &reference.prompt, &["--max-tokens", "24", "--ignore-eos"]).json();
    assert_eq!(numbers(&result["output_ids"]), reference.output);
    assert_eq!(result["route"].as_array().unwrap().len(), 2, "{result}");
    let status = place.status(&part(1), &bootstrap);
    assert_eq!((&status["dht_prefix"], &status["complete"]), (&"llama".into(), &true.into()), "{status}");

    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("llama").join("golden.json")).unwrap()).unwrap();
    let (model, prompt) = (part(1).display().to_string(), golden["prompt"].as_str().unwrap());
    let asked = place.run(&[
        "client",
        "generate",
        "--model",
        &model,
        "--initial-peers",
        &bootstrap.address,
        "--no-mdns",
        "--dtype",
        "f32",
        "--json",
        "--max-tokens",
        "1",
        "--prompt",
        prompt,
    ]);
    assert_eq!(numbers(&asked.json()["prompt_ids"]), numbers(&golden["prompt_ids"]));
}

#[test]
fn what_cannot_be_used_is_said() {
    let place = Place::new();
    let serve = |model: &std::path::Path| {
        place.run(&["node", "serve", "--new-swarm", "--no-mdns", "--model", &model.display().to_string()])
    };
    let file = place.path().join("m-00001-of-00002.gguf");
    std::fs::copy(fixture("gguf").join("phi.gguf"), &file).unwrap();
    serve(&file).fails(1, &["m-00002-of-00002.gguf"]);
    let bytes = std::fs::read(fixture("gguf").join("phi.gguf")).unwrap();
    let file = place.path().join("half.gguf");
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    serve(&file).fails(1, &["half.gguf", "truncated", "download it again"]);
}
