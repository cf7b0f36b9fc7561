//! `helion bench`, as a person uses it.

use std::path::Path;

use serde_json::Value;

use super::harness::{Place, fixture, tiny};

/// Few tokens, so that it is done within a moment.
const SHORT: [&str; 8] = ["--prefill", "20,7", "--lanes", "1,3", "--steps", "2", "--rounds", "1"];

fn bench(model: &Path, more: &[&str]) -> Value {
    let model = model.display().to_string();
    let args = [&["bench", "--model", &model, "--json"], &SHORT[..], more].concat();
    Place::new().run(&args).json()
}

fn check(report: &Value) {
    for (list, of, counts) in [("prefill", "tokens", [20, 7]), ("decode", "lanes", [1, 3])] {
        let list = report[list].as_array().unwrap();
        let found: Vec<u64> = list.iter().map(|entry| entry[of].as_u64().unwrap()).collect();
        assert_eq!(found, counts, "{report}");
        assert!(list.iter().all(|entry| entry["tokens_per_second"].as_f64().unwrap() > 0.0), "{report}");
    }
    let keys: Vec<&str> = report.as_object().unwrap().keys().map(String::as_str).collect();
    let expected =
        "model dtype quant threads device prefill decode weights_bytes loaded_bytes memory_bandwidth_bytes_per_second";
    assert_eq!(keys, expected.split(' ').collect::<Vec<_>>());
    assert!(report["memory_bandwidth_bytes_per_second"].as_f64().unwrap() > 1e6, "{report}");
    assert!(report["threads"].as_u64().unwrap() > 0 && report["device"] == "cpu", "{report}");
}

#[test]
fn a_model_as_json() {
    let report = bench(&tiny(), &[]);
    check(&report);
    assert_eq!((&report["model"], &report["quant"]), (&"helion-tiny".into(), &"none".into()));
    let [weights, loaded] = ["weights_bytes", "loaded_bytes"].map(|key| report[key].as_f64().unwrap());
    assert!((0.9..1.1).contains(&(loaded / weights)), "{report}");
}

#[test]
fn blocks_alone_quantized_from_a_context() {
    let whole = bench(&fixture("llama"), &["--dtype", "bf16"]);
    let part = bench(&fixture("llama"), &["--dtype", "bf16", "--quant", "q8_0", "--blocks", "1:2", "--context", "20"]);
    check(&part);
    assert_eq!((&part["dtype"], &part["quant"]), (&"bf16".into(), &"q8_0".into()));
    assert!(part["weights_bytes"].as_u64() < whole["weights_bytes"].as_u64(), "{part}");
}

#[test]
fn a_configuration_is_enough() {
    for family in ["llama", "gpt_oss"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(family).join("config.json"), dir.path().join("config.json")).unwrap();
        check(&bench(dir.path(), &["--random-weights"]));
        let model = dir.path().display().to_string();
        Place::new().run(&["bench", "--model", &model]).fails(1, &["model.safetensors"]);
    }
}

#[test]
fn a_table_for_people() {
    let model = tiny().display().to_string();
    let args = [&["bench", "--model", &model], &SHORT[..]].concat();
    let answered = Place::new().run(&args);
    assert!(answered.status.success(), "{answered:?}");
    for text in ["helion-tiny", "prefill    20", "decode   3", "of the bus", "%"] {
        assert!(answered.stdout.contains(text), "{text}: {answered:?}");
    }
}

#[test]
fn wrong_usage() {
    let model = tiny().display().to_string();
    let fails = |code: i32, args: &[&str], words: &[&str]| {
        Place::new().run(&[&["bench", "--model", &model], args].concat()).fails(code, words);
    };
    fails(2, &["--lanes", "0"], &["--lanes", "0"]);
    fails(2, &["--prefill", "x"], &["--prefill"]);
    fails(2, &["--blocks", "3:99"], &["3:99", "0:"]);
    fails(2, &["--prefill", "1000000000000"], &["1000000000000", "context"]);
    fails(2, &["--context", "100000"], &["100000", "context"]);
    fails(1, &["--device", "cuda:0"], &["cuda:0"]);
    Place::new().run(&["bench"]).fails(2, &["--model"]);
}
