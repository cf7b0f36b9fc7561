//! Bad input of any kind: a clear error, the right exit code, no panic, and nobody else disturbed.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
};

use super::harness::{Finished, Place, Server, copy_fixture, fixture, join, numbers, reference};

/// A copy of a fixture that may be broken.
fn copy(place: &Place, family: &str) -> PathBuf {
    let copy = place.path().join(family);
    copy_fixture(family, &copy);
    copy
}

fn serve(place: &Place, model: &Path, args: &[&str]) -> Finished {
    let (model, key) = (model.display().to_string(), place.path().join("node.key").display().to_string());
    let base = ["node", "serve", "--model", &model, "--identity-path", &key, "--new-swarm", "--no-mdns"];
    let listen = ["--host-maddrs", "/ip4/127.0.0.1/tcp/0"];
    let listen = if args.contains(&"--host-maddrs") { &[][..] } else { &listen };
    place.run(&[&base[..], listen, args].concat())
}

/// Serves a broken copy of a fixture and checks what is said about it.
fn broken(family: &str, says: &[&str], break_it: impl FnOnce(&Path)) {
    let place = Place::new();
    let model = copy(&place, family);
    break_it(&model);
    serve(&place, &model, &[]).fails(1, says);
}

fn edit(path: &Path, change: impl FnOnce(String) -> String) {
    let text = std::fs::read_to_string(path).unwrap();
    std::fs::write(path, change(text)).unwrap();
}

/// Changes the header of a safetensors file, which must keep its length.
fn edit_header(path: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    assert!(header.contains(from), "{header}");
    let header = header.replace(from, to);
    std::fs::write(path, [&bytes[..8], header.as_bytes(), &bytes[8 + length..]].concat()).unwrap();
}

#[test]
fn missing_model() {
    let place = Place::new();
    serve(&place, Path::new("/no/such/model"), &[]).fails(1, &["/no/such/model"]);
}

#[test]
fn missing_weights() {
    broken("qwen3", &["model.safetensors"], |model| std::fs::remove_file(model.join("model.safetensors")).unwrap());
}

#[test]
fn truncated_weights() {
    broken("qwen3", &["model.safetensors", "truncated"], |model| {
        let file = std::fs::OpenOptions::new().write(true).open(model.join("model.safetensors")).unwrap();
        file.set_len(300_000).unwrap();
    });
}

#[test]
fn weights_of_a_wrong_dtype() {
    broken("qwen3", &["I16"], |model| edit_header(&model.join("model.safetensors"), "\"BF16\"", "\"I16\" "));
}

#[test]
fn weights_of_a_wrong_shape() {
    broken("qwen3", &["shape"], |model| {
        // The model says another width than its tensors have.
        edit(&model.join("config.json"), |text| {
            text.replace("\"intermediate_size\": 112", "\"intermediate_size\": 128")
        });
    });
}

#[test]
fn an_index_that_names_a_missing_shard() {
    broken("llama", &["model-00002-of-00002.safetensors"], |model| {
        std::fs::remove_file(model.join("model-00002-of-00002.safetensors")).unwrap();
    });
}

#[test]
fn an_unknown_model_type() {
    broken("llama", &["mamba", "llama", "mistral", "qwen2", "qwen3"], |model| {
        edit(&model.join("config.json"), |text| text.replace("\"model_type\": \"llama\"", "\"model_type\": \"mamba\""));
    });
}

#[test]
fn a_config_of_garbage() {
    broken("llama", &["config.json"], |model| edit(&model.join("config.json"), |text| text[..50].to_owned()));
}

#[test]
fn blocks_that_the_model_does_not_have() {
    let place = Place::new();
    serve(&place, &fixture("llama"), &["--blocks", "5:99"]).fails(1, &["5:99", "0:6"]);
    serve(&place, &fixture("llama"), &["--num-blocks", "99"]).fails(1, &["--num-blocks 99", "6"]);
    serve(&place, &fixture("llama"), &["--blocks", "4:2"]).fails(2, &["4:2"]);
    serve(&place, &fixture("llama"), &["--blocks", "nonsense"]).fails(2, &["nonsense", "START:END"]);
    serve(&place, &fixture("llama"), &["--blocks", "0:2", "--num-blocks", "3"]).fails(2, &["--num-blocks"]);
}

#[test]
fn a_port_in_use() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let address = format!("/ip4/127.0.0.1/tcp/{port}");
    serve(&place, &fixture("llama"), &["--host-maddrs", &address]).fails(1, &[&port, "in use"]);
}

#[test]
fn an_identity_that_is_broken_or_in_use() {
    let place = Place::new();
    std::fs::write(place.path().join("node.key"), "not a key").unwrap();
    serve(&place, &fixture("llama"), &[]).fails(1, &["node.key"]);
    assert_eq!(std::fs::read(place.path().join("node.key")).unwrap(), b"not a key", "a broken key was replaced");

    let key = place.path().join("other.key").display().to_string();
    let args = ["node", "bootstrap", "--new-swarm", "--no-mdns", "--host-maddrs", "/ip4/127.0.0.1/tcp/0"];
    let args = [&args[..], &["--identity-path", &key]].concat();
    let first = place.start(&args);
    first.line_with("--initial-peers");
    place.run(&args).fails(1, &["other.key", "in use"]);
}

#[test]
fn an_unreachable_or_malformed_initial_peer() {
    let place = Place::new();
    let nobody = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
    let model = fixture("llama").display().to_string();
    let base = ["client", "generate", "--model", &model, "--no-mdns", "--input-ids", "1,2", "--initial-peers"];
    place.run(&[&base[..], &[nobody]].concat()).fails(1, &["12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"]);
    place.run(&[&base[..], &["/ip4/127.0.0.1/tcp/1"]].concat()).fails(1, &["/ip4/127.0.0.1/tcp/1", "/p2p/"]);
    place.run(&[&base[..], &["localhost:31337"]].concat()).fails(2, &["localhost:31337"]);
    let none = ["client", "generate", "--model", &model, "--no-mdns", "--input-ids", "1,2"];
    place.run(&none).fails(1, &["--initial-peers"]);
}

#[test]
fn prompts_that_the_model_can_not_take() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:6"], &[]);
    place.generate(&model, &bootstrap, &[7; 513], &[]).fails(1, &["513", "512"]);
    place.generate(&model, &bootstrap, &[1, 512, 2], &[]).fails(1, &["512", "0 to 511"]);
    let name = model.display().to_string();
    place.run(&["client", "generate", "--model", &name]).fails(2, &["--prompt"]);
    // The context's last token can still be generated.
    let result = place.generate(&model, &bootstrap, &[7; 511], &["--ignore-eos", "--max-tokens", "9"]).json();
    assert_eq!((&result["finish_reason"], numbers(&result["output_ids"]).len()), (&"length".into(), 1));
}

#[test]
fn numbers_out_of_range_are_wrong_usage_before_anything_is_started() {
    let (place, model) = (Place::new(), fixture("llama").display().to_string());
    let huge = u64::MAX.to_string();
    for (flag, value) in [
        ("--max-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
        ("--frequency-penalty", "3"),
        ("--presence-penalty", "-3"),
        ("--wait", &huge),
        ("--step-timeout", &huge),
        ("--step-timeout", "0"),
        ("--join-timeout", &huge),
        ("--prefill-chunk", "0"),
    ] {
        // Nobody is there: what would start the network first would end with 1.
        let args = ["client", "generate", "--model", &model, "--no-mdns", "--input-ids", "1", flag, value];
        place.run(&args).fails(2, &[flag]);
    }
    place.run(&["client", "chat", "--model", &model, "--no-mdns", "--top-p", "2"]).fails(2, &["--top-p is 2"]);
    place.run(&["client", "status", "--model", &model, "--watch", "--every", &huge]).fails(2, &["--every"]);
    place.run(&["demo", "x", "--max-tokens", "0"]).fails(2, &["--max-tokens"]);
    for (flag, value) in [
        ("--join-timeout", huge.as_str()),
        ("--step-deadline", &huge),
        ("--max-sessions", "0"),
        ("--max-sessions", "65537"),
        ("--attn-cache-tokens", "0"),
    ] {
        serve(&place, &fixture("llama"), &[flag, value]).fails(2, &[flag]);
    }
}

#[test]
fn a_flag_wins_over_a_variable_that_excludes_it() {
    let place = Place::new();
    let nobody = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
    let key = place.path().join("node.key").display().to_string();
    let args = ["node", "bootstrap", "--new-swarm", "--no-mdns", "--host-maddrs", "/ip4/127.0.0.1/tcp/0"];
    let args = [&args[..], &["--identity-path", &key]].concat();
    place.start_with(&args, &[("INITIAL_PEERS", Path::new(nobody))]).line_with("--initial-peers");
    let both = [&args[..], &["--initial-peers", nobody]].concat();
    place.run(&both).fails(2, &["--new-swarm", "--initial-peers"]);

    let model = fixture("llama").display().to_string();
    let serve = [&["node", "serve", "--model", &model, "--blocks", "1:3"], &args[2..]].concat();
    let node = place.start_with(&serve, &[("HELION_NUM_BLOCKS", Path::new("nonsense"))]);
    node.line_with("serving blocks 1:3");
}

#[test]
fn a_full_kv_pool() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:6"], &["--attn-cache-tokens", "64", "--step-deadline", "1"]);
    place.generate(&model, &bootstrap, &[7; 200], &[]).fails(1, &["64", &nodes[0].peer_id, "0:6"]);
    // The node goes on with what fits.
    let result = place.generate(&model, &bootstrap, &[7; 20], &["--max-tokens", "4", "--ignore-eos"]).json();
    assert_eq!(numbers(&result["output_ids"]).len(), 4);
}

/// Whether the node still answers sessions as it should.
fn still_serves(place: &Place, model: &Path, node: &Server) {
    let reference = reference(model);
    let result = place.generate(model, node, &reference.prompt, &["--max-tokens", "24", "--ignore-eos"]).json();
    assert_eq!(numbers(&result["output_ids"]), reference.output);
}

#[test]
fn garbage_on_the_port() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (_bootstrap, nodes) = place.swarm(&model, &["0:6"], &[]);
    let port = nodes[0].address.split('/').nth(4).unwrap();
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 100_000], &[], b"\x13/multistream/1.0.0\n\xff\xff\xff\xff\xff"]
    {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
        // The node may hang up in the middle of it.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    still_serves(&place, &model, &nodes[0]);
}

#[test]
fn settings_files() {
    let place = Place::new();
    let config = place.path().join("node.toml");
    let config_text = config.display().to_string();
    std::fs::write(&config, "num-blokcs = 3\n").unwrap();
    serve(&place, &fixture("llama"), &["--config", &config_text]).fails(2, &["num-blokcs", "num-blocks", "node.toml"]);
    std::fs::write(&config, "num-blocks = \"many\"\n").unwrap();
    serve(&place, &fixture("llama"), &["--config", &config_text]).fails(2, &["many"]);
    serve(&place, &fixture("llama"), &["--config", "/no/such/file.yaml"]).fails(2, &["/no/such/file.yaml"]);

    // A file's setting counts, and a flag wins over it.
    std::fs::write(&config, "num-blocks = 2\npublic_name = \"from the file\"\n").unwrap();
    let bootstrap = place.bootstrap();
    let _node = place.node(&fixture("llama"), &bootstrap, &["--config", &config_text]);
    let _other = place.node(&fixture("llama"), &bootstrap, &["--config", &config_text, "--num-blocks", "4"]);
    let status = place.status(&fixture("llama"), &bootstrap);
    assert_eq!(status["coverage"], serde_json::json!([1, 1, 1, 1, 1, 1]));
    assert_eq!(status["peers"][0]["public_name"], "from the file");
}

#[test]
fn unsupported_devices_and_features_are_refused() {
    let place = Place::new();
    serve(&place, &fixture("llama"), &["--device", "cuda:0"]).fails(1, &["cuda"]);
    serve(&place, &fixture("llama"), &["--device", "tpu"]).fails(2, &["tpu"]);
    serve(&place, &fixture("llama"), &["--quant", "q3_k"]).fails(2, &["--quant", "q3_k", "q4_k"]);
    let ids = join(&[1]);
    place.run(&["client", "generate", "--model", "x", "--input-ids", &ids, "--beams", "4"]).fails(2, &["--beams"]);
}

#[test]
fn kernels_that_the_machine_has_not_got() {
    let place = Place::new();
    let running = place.start_with(&["identity", "show", "none"], &[("HELION_KERNELS", Path::new("bogus"))]);
    running.finish().fails(2, &["HELION_KERNELS=bogus", "portable"]);
}
