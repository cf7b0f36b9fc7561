//! How byte-level tokenizers split a text into words before they merge bytes: GGUF names the way, and doesn't describe it.
//!
//! The descriptions are those of the `tokenizer.json` files of the models that the names stand for (`tokenizer.ggml.pre`,
//! which llama.cpp's converter chooses by what a tokenizer does to a test text).

use serde_json::{Value as Json, json};

/// A way to split.
pub(super) struct Splitting {
    /// What is done to the text before, as `tokenizer.json` describes it.
    pub(super) normalizer: Option<Json>,
    /// The splitting, likewise.
    pub(super) pre_tokenizer: Json,
    /// A word that is a token as a whole is not merged from its bytes.
    pub(super) ignore_merges: bool,
    /// Whether texts begin with the begin-of-sequence token where the file doesn't say.
    pub(super) adds_bos: bool,
}

/// Words, and numbers of up to three digits.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words, and single digits.
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words in which capitals come first, and numbers of up to three digits.
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same without contractions, and with single digits.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Everything between spaces and the punctuation of many scripts.
const BLOOM: &str = r" ?[^(\s|[.,!?…。，、।۔،])]+";

/// The names that are known, for the message about one that isn't.
pub(super) const KNOWN: &str = "gpt-2, phi-2, llama-bpe, qwen2, gpt-4o, tekken, dbrx, smollm, falcon, falcon3, bloom, \
                                deepseek-coder, starcoder, refact, command-r";

impl Splitting {
    /// The way of that name.
    pub(super) fn named(name: &str) -> Option<Self> {
        let plain =
            |pre_tokenizer: Json| Self { normalizer: None, pre_tokenizer, ignore_merges: false, adds_bos: false };
        Some(match name {
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "a.x-4.0" | "mellum" | "exaone4" => plain(gpt_2()),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
                Self { ignore_merges: true, adds_bos: true, ..plain(pattern(LLAMA_3)) }
            }
            "dbrx" | "smaug-bpe" => plain(pattern(LLAMA_3)),
            "qwen2" | "deepseek-r1-qwen" | "megrez" => {
                Self { normalizer: Some(json!({ "type": "NFC" })), ..plain(pattern(QWEN_2)) }
            }
            "gpt-4o" => plain(pattern(GPT_4O)),
            "tekken" => Self { ignore_merges: true, adds_bos: true, ..plain(pattern(TEKKEN)) },
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
                plain(sequence(&[json!({ "type": "Digits", "individual_digits": true }), gpt_2()]))
            }
            "falcon" => plain(sequence(&[
                json!({ "type": "Punctuation", "behavior": "Contiguous" }),
                gpt_2(),
                json!({ "type": "Digits", "individual_digits": false }),
                split("[0-9][0-9][0-9]"),
            ])),
            "deepseek-coder" => plain(sequence(&[
                split(r"[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split("[一-龥ࠀ-一가-퟿]+"),
                json!({ "type": "Digits", "individual_digits": true }),
                bytes(),
            ])),
            "bloom" | "gpt3-finnish" => plain(pattern(BLOOM)),
            _ => return None,
        })
    }
}

/// GPT-2's own splitting, in which bytes become characters too.
fn gpt_2() -> Json {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true })
}

fn split(pattern: &str) -> Json {
    json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
}

fn sequence(parts: &[Json]) -> Json {
    json!({ "type": "Sequence", "pretokenizers": parts })
}

/// Splits by a pattern, and turns bytes into characters too.
fn pattern(pattern: &str) -> Json {
    sequence(&[split(pattern), bytes()])
}

/// Turns bytes into characters, and nothing else.
fn bytes() -> Json {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false })
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    use super::*;

    fn words(name: &str, text: &str) -> Vec<String> {
        let splitting: PreTokenizerWrapper =
            serde_json::from_value(Splitting::named(name).unwrap().pre_tokenizer).unwrap();
        let mut words = PreTokenizedString::from(text);
        splitting.pre_tokenize(&mut words).unwrap();
        let words = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        words.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    }

    #[test]
    fn every_name_splits_in_its_way() {
        assert!(KNOWN.split(", ").all(|name| Splitting::named(name).is_some()));
        let text = "It's 1234,5 CamelCase\n\n x";
        let of = |name: &str| words(name, text).join("|");
        assert_eq!(of("gpt-2"), "It|'s| 1234|,|5| CamelCase|\n\n| x");
        assert_eq!(of("llama-bpe"), "It|'s| |123|4|,|5| CamelCase|\n\n| x");
        assert_eq!(of("qwen2"), "It|'s| |1|2|3|4|,|5| CamelCase|\n\n| x");
        assert_eq!(of("gpt-4o"), "It's| |123|4|,|5| Camel|Case|\n\n| x");
        assert_eq!(of("tekken"), "It|'s| |1|2|3|4|,|5| Camel|Case|\n\n| x");
        assert_eq!(of("smollm"), "It|'s| |1|2|3|4|,|5| CamelCase|\n\n| x");
        assert_eq!(of("falcon"), "It|'|s| |123|4|,|5| CamelCase|\n\n| x");
        assert_eq!(of("bloom"), "It's| 1234|,|5| CamelCase|\n\n| x");
        assert_eq!(of("deepseek-coder"), "It|'|s| |1|2|3|4|,|5| CamelCase|\n|\n| x");
    }
}
