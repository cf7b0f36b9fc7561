//! Tokenizers and chat templates of the fixtures, against what transformers made of them.

use std::path::{Path, PathBuf};

use helion::model::{
    chat::{Chat, ChatError, ChatTemplate, Message},
    generation::GenerationDefaults,
    tokenizer::Tokenizer,
};
use proptest::prelude::*;
use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn demo() -> PathBuf {
    root().join("src/cli/demo/helion-tiny")
}

/// Every fixture folder with a `golden.json`.
fn fixtures() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("tests/fixtures")).unwrap();
    let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    dirs.retain(|dir| dir.join("golden.json").exists());
    dirs.sort();
    assert!(dirs.len() >= 4, "the fixtures are there: {dirs:?}");
    dirs
}

fn golden(dir: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

/// The streamed pieces of `generated`, behind `prompt`, and the rest.
fn stream(tokenizer: &Tokenizer, prompt: &[u32], generated: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream(prompt);
    let mut pieces: Vec<String> = generated.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish());
    pieces
}

#[test]
fn prompts_have_the_reference_ids() {
    for dir in fixtures() {
        let (tokenizer, golden) = (Tokenizer::open(&dir).unwrap(), golden(&dir));
        let prompt = golden["prompt"].as_str().unwrap();
        assert_eq!(tokenizer.encode(prompt, true).unwrap(), ids(&golden["prompt_ids"]), "{}", dir.display());
        assert_eq!(tokenizer.decode(&ids(&golden["prompt_ids"]), true).unwrap(), prompt);
        assert_eq!(
            tokenizer.encode(golden["chat_text"].as_str().unwrap(), false).unwrap(),
            ids(&golden["chat_ids"]),
            "{}",
            dir.display()
        );
        assert_eq!(tokenizer.vocab_size(), 512);
        assert_eq!(tokenizer.token_to_id("<|bos|>"), Some(1));
        assert_eq!(tokenizer.id_to_token(1).as_deref(), Some("<|bos|>"));
        assert_eq!(tokenizer.special_ids().iter().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn the_demo_models_answers_decode_and_stream_to_the_reference_text() {
    let (tokenizer, golden) = (Tokenizer::open(&demo()).unwrap(), golden(&demo()));
    for case in golden["cases"].as_array().unwrap() {
        let (prompt, output) = (ids(&case["prompt_ids"]), ids(&case["output_ids"]));
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&output, true).unwrap(), text);
        assert_eq!(stream(&tokenizer, &prompt, &output).concat(), text);
    }
}

#[test]
fn a_character_of_several_tokens_comes_whole() {
    let tokenizer = Tokenizer::open(&demo()).unwrap();
    for text in ["😀", "naïve café", "東京 and 서울", "👩‍👩‍👧 family", "a\u{fffd}b", "tab\tand\nline"]
    {
        let generated = tokenizer.encode(text, false).unwrap();
        let pieces = stream(&tokenizer, &[], &generated);
        assert_eq!(pieces.concat(), text);
        if !text.contains('\u{fffd}') {
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "half a character in {pieces:?}");
        }
    }
    let emoji = tokenizer.encode("😀", false).unwrap();
    assert!(emoji.len() > 1, "the small vocabulary has no token for it");
    let pieces = stream(&tokenizer, &[], &emoji);
    assert!(pieces[..emoji.len() - 1].iter().all(String::is_empty), "{pieces:?}");
    assert_eq!(pieces[emoji.len() - 1], "😀");
    // Cut short: the reader is told that something was there.
    assert_eq!(stream(&tokenizer, &[], &emoji[..emoji.len() - 1]).concat(), "\u{fffd}");
}

#[test]
fn ids_without_a_token_have_no_text() {
    let tokenizer = Tokenizer::open(&demo()).unwrap();
    assert_eq!(tokenizer.decode(&[297, 70_000, 303], true).unwrap(), tokenizer.decode(&[297, 303], true).unwrap());
    assert_eq!(stream(&tokenizer, &[], &[297, 70_000, 303]).concat(), tokenizer.decode(&[297, 303], true).unwrap());
}

#[test]
fn a_long_run_of_bad_bytes_is_streamed_in_bounded_work() {
    let tokenizer = Tokenizer::open(&demo()).unwrap();
    // Byte-level BPE spells the byte 0x80 as U+0122, and it continues no character here.
    let bad = tokenizer.token_to_id("\u{122}").expect("byte-level vocabularies have all bytes");
    let generated = vec![bad; 5_000];
    let text = stream(&tokenizer, &[], &generated).concat();
    assert_eq!(text, tokenizer.decode(&generated, true).unwrap());
    assert_eq!(text.chars().count(), 5_000);
}

/// Tokenizers of the kinds that the families use, against what transformers made of them (`generate.py` there).
#[test]
fn every_kind_of_tokenizer_has_the_reference_ids() {
    let folder = root().join("tests/fixtures/tokenizers");
    let reference: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("cases.json")).unwrap()).unwrap();
    let kinds = reference.as_object().unwrap();
    assert_eq!(kinds.len(), 10);
    for (kind, cases) in kinds {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(folder.join(format!("{kind}.json")), dir.path().join("tokenizer.json")).unwrap();
        let tokenizer = Tokenizer::open(dir.path()).unwrap();
        for case in cases.as_array().unwrap() {
            let (text, decoded) = (case["text"].as_str().unwrap(), case["decoded"].as_str().unwrap());
            let expected = ids(&case["ids"]);
            assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{kind}: {text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&case["bare"]), "{kind}: {text:?}");
            assert_eq!(tokenizer.decode(&expected, true).unwrap(), decoded, "{kind}: {text:?}");
            let pieces = stream(&tokenizer, &[], &expected);
            assert_eq!(pieces.concat(), decoded, "{kind}: {text:?}");
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{kind}: half a character in {pieces:?}");
            // Behind a prompt, too: nothing is lost or comes twice, wherever the answer begins.
            for cut in 0..expected.len() {
                let pieces = stream(&tokenizer, &expected[..cut], &expected[cut..]);
                let tail = pieces.concat();
                assert!(
                    decoded.ends_with(tail.trim_start_matches([' ', '\u{fffd}'])),
                    "{kind}: {text:?} from {cut}: {pieces:?}"
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn streams_equal_decoding_whatever_the_model_says(generated in prop::collection::vec(0u32..1024, 0..120)) {
        let tokenizer = Tokenizer::open(&demo()).unwrap();
        prop_assert_eq!(stream(&tokenizer, &[], &generated).concat(), tokenizer.decode(&generated, true).unwrap());
    }

    // The first 300 tokens are mostly single bytes: many incomplete and broken characters.
    #[test]
    fn streams_of_single_bytes_equal_decoding(generated in prop::collection::vec(0u32..300, 0..120)) {
        let tokenizer = Tokenizer::open(&demo()).unwrap();
        prop_assert_eq!(stream(&tokenizer, &[], &generated).concat(), tokenizer.decode(&generated, true).unwrap());
    }
}

#[test]
fn chats_render_to_the_reference_text() {
    for dir in fixtures() {
        let (template, golden) = (ChatTemplate::open(&dir).unwrap().unwrap(), golden(&dir));
        let messages: Vec<Message> = serde_json::from_value(golden["chat"].clone()).unwrap();
        let text = template.render(&messages, true).unwrap();
        assert_eq!(text, golden["chat_text"].as_str().unwrap(), "{}", dir.display());
        let tokenizer = Tokenizer::open(&dir).unwrap();
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids(&golden["chat_ids"]), "{}", dir.display());
    }
}

#[test]
fn questions_to_the_demo_model_have_the_reference_ids() {
    let (tokenizer, golden) = (Tokenizer::open(&demo()).unwrap(), golden(&demo()));
    let template = ChatTemplate::open(&demo()).unwrap().unwrap();
    let defaults = GenerationDefaults::open(&demo()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let text = template.render(&[Message::new("user", case["user"].as_str().unwrap())], true).unwrap();
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids(&case["prompt_ids"]), "{text}");
        assert!(defaults.is_eos(*ids(&case["output_ids"]).last().unwrap()));
    }
}

/// The templates of widely used models, against what transformers' own environment made of them (`generate.py` there).
#[test]
fn well_known_templates_render_as_in_transformers() {
    let templates = root().join("tests/fixtures/chat-templates");
    let reference: Value =
        serde_json::from_str(&std::fs::read_to_string(templates.join("cases.json")).unwrap()).unwrap();
    let cases = reference["cases"].as_array().unwrap();
    assert!(cases.len() >= 150);
    for case in cases {
        let dir = tempfile::tempdir().unwrap();
        let source = templates.join(case["template"].as_str().unwrap());
        std::fs::copy(source, dir.path().join("chat_template.jinja")).unwrap();
        let config = serde_json::json!({"bos_token": reference["bos_token"], "eos_token": reference["eos_token"]});
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let asked = &reference["chats"][case["chat"].as_str().unwrap()];
        let list = |name: &str| asked.get(name).map(|list| list.as_array().unwrap().clone());
        let chat = Chat {
            messages: list("messages").unwrap(),
            tools: list("tools"),
            documents: None,
            add_generation_prompt: asked["add_generation_prompt"].as_bool().unwrap(),
            arguments: asked["arguments"].as_object().cloned().unwrap_or_default(),
            now: Some(reference["now"].as_str().unwrap().parse().unwrap()),
        };
        let rendered = ChatTemplate::open(dir.path()).unwrap().unwrap().render_chat(&chat);
        let name = format!("{} / {}", case["template"], case["chat"]);
        match (rendered, case["text"].as_str()) {
            (Ok(text), Some(expected)) => assert_eq!(text, expected, "{name}"),
            (Err(ChatError::Refused { message }), None) => {
                assert_eq!(message, case["error"].as_str().unwrap(), "{name}")
            }
            (rendered, expected) => panic!("{name}: {rendered:?} where transformers has {expected:?}"),
        }
    }
}
