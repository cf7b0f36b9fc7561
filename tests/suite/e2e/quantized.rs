//! Nodes and clients that quantize.

use super::harness::{Place, fixture, numbers, reference};

#[test]
fn a_quantized_swarm_generates_and_says_what_it_is() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:2", "2:6"], &["--quant", "q8_0"]);
    let status = place.status(&model, &bootstrap);
    for peer in status["peers"].as_array().unwrap() {
        assert_eq!((&peer["quant"], &peer["dtype"]), (&"q8_0".into(), &"f32".into()));
    }
    let reference = reference(&model);
    let prompt = &reference.prompt;
    let ask = |args: &[&str]| {
        let args = [&["--max-tokens", "24", "--ignore-eos"], args].concat();
        numbers(&place.generate(&model, &bootstrap, prompt, &args).json()["output_ids"])
    };
    // The fixtures' greedy choices have a margin that q8_0 keeps for a while, at least.
    let ids = ask(&[]);
    assert_eq!((ids.len(), &ids[..2]), (24, &reference.output[..2]));
    assert_eq!(ask(&["--prefill-chunk", "7"]), ids);
    assert_eq!(ask(&["--head-quant", "q8_0"]).len(), 24);
}

#[test]
fn the_environment_sets_a_quantization() {
    let (place, model) = (Place::new(), fixture("llama"));
    let name = model.display().to_string();
    let args = ["node", "serve", "--model", &name, "--new-swarm", "--no-mdns", "--port", "0"];
    place.start_with(&args, &[("HELION_QUANT", "q3_k".as_ref())]).finish().fails(2, &["q3_k", "q4_k"]);
    let running = place.start_with(&args, &[("HELION_QUANT", "q4_k".as_ref())]);
    // Rows of 64 numbers can't be cut into blocks of 256, nor rows of 112 into blocks of 32.
    running.error_with("are kept in bf16");
    running.error_with("are kept in q4_0");
}
