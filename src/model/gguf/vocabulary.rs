//! From a GGUF file's vocabulary to the tokenizer that the model has on the hub.
//!
//! There are two kinds. `gpt2` merges bytes, in the order of a list that the file has; how a text is split into words
//! before that, the file names ([`splitting`](super::splitting)). `llama` is SentencePiece's: pairs of pieces are merged in
//! the order of the scores of what they become, and what is no piece is spelled in bytes. For that one the list of merges is
//! made here as Hugging Face's converter makes it.

use std::collections::HashMap;

use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
    models::bpe::{BPE, Vocab},
    processors::template::TemplateProcessing,
};

use super::{
    GgufError,
    metadata::Metadata,
    splitting::{self, Splitting},
};

/// The tokens' texts.
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
/// The id that begins a text.
pub(super) const BOS: &str = "tokenizer.ggml.bos_token_id";
/// The id that ends one.
pub(super) const EOS: &str = "tokenizer.ggml.eos_token_id";
const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";

/// What SentencePiece writes for a space.
const SPACE: char = '\u{2581}';

/// What a token is (`llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// A token of the vocabulary.
struct Token<'a> {
    id: u32,
    text: &'a str,
    kind: TokenType,
}

/// Builds the tokenizer that the metadata describe.
pub(super) fn tokenizer(metadata: &Metadata) -> Result<Tokenizer, GgufError> {
    let tokens = tokens(metadata)?;
    let model = metadata.text(MODEL)?;
    let pieces = model == Some("llama");
    let (mut tokenizer, adds_bos) = match model {
        Some("gpt2") => byte_level(metadata, &tokens)?,
        Some("llama") => sentence_piece(metadata, &tokens)?,
        Some(other) => {
            return Err(metadata.wrong(MODEL, format!("{other:?} is not supported: the kinds are gpt2 and llama")));
        }
        None => return Err(metadata.missing(MODEL)),
    };
    let added = tokens.iter().filter_map(|token| {
        let special = match token.kind {
            TokenType::Control | TokenType::Unknown => true,
            // SentencePiece's spaces are merged like all other pieces.
            TokenType::UserDefined if pieces && token.text.chars().all(|c| c == ' ' || c == SPACE) => return None,
            TokenType::UserDefined => false,
            _ => return None,
        };
        Some(AddedToken::from(token.text, special).normalized(false))
    });
    let added: Vec<AddedToken> = added.collect();
    let broken = |error: tokenizers::Error| metadata.wrong(TOKENS, error.to_string());
    tokenizer.add_tokens(added).map_err(broken)?;
    tokenizer.with_post_processor(template(metadata, &tokens, adds_bos)?);
    Ok(tokenizer)
}

/// The tokens of the vocabulary, but for those that only fill it up.
fn tokens(metadata: &Metadata) -> Result<Vec<Token<'_>>, GgufError> {
    let texts = metadata.texts(TOKENS)?.ok_or_else(|| metadata.missing(TOKENS))?;
    let types = metadata.integers(TYPES)?;
    if types.is_some_and(|types| types.len() != texts.len()) {
        return Err(metadata.wrong(TYPES, format!("must have one entry for each of {} tokens", texts.len())));
    }
    let mut tokens = Vec::with_capacity(texts.len());
    for (id, text) in (0u32..).zip(texts) {
        let kind = match types.map_or(1, |types| types[id as usize]) {
            1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            // Models pad their vocabulary, and tokenizers don't: ids without a token have no text.
            5 if text == format!("[PAD{id}]") => continue,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            other => return Err(metadata.wrong(TYPES, format!("token {id} is of the unknown type {other}"))),
        };
        tokens.push(Token { id, text, kind });
    }
    Ok(tokens)
}

/// A tokenizer that merges bytes, and whether its texts begin with the begin-of-sequence token by default.
fn byte_level(metadata: &Metadata, tokens: &[Token<'_>]) -> Result<(Tokenizer, bool), GgufError> {
    let Some(name) = metadata.text(PRE)? else {
        let reason = "the file doesn't say how texts are split into words: convert the model with a newer llama.cpp";
        return Err(metadata.wrong(PRE, reason));
    };
    let Some(splitting) = Splitting::named(name) else {
        return Err(metadata.wrong(PRE, format!("{name:?} is not supported: those known are {}", splitting::KNOWN)));
    };
    let merges = metadata.texts(MERGES)?.ok_or_else(|| metadata.missing(MERGES))?;
    let pair = |merge: &&str| merge.split_once(' ').map(|(one, other)| (one.to_owned(), other.to_owned()));
    let pairs: Option<Vec<_>> = merges.iter().map(pair).collect();
    let pairs = pairs.ok_or_else(|| metadata.wrong(MERGES, "each entry must be two pieces with a space between"))?;
    let vocab: Vocab = tokens.iter().map(|token| (token.text.to_owned(), token.id)).collect();
    let model = BPE::builder().vocab_and_merges(vocab, pairs).ignore_merges(splitting.ignore_merges).build();
    let mut tokenizer = Tokenizer::new(model.map_err(|error| metadata.wrong(MERGES, error.to_string()))?);
    let normalizer: Option<NormalizerWrapper> = splitting.normalizer.map(|json| part(metadata, json)).transpose()?;
    tokenizer.with_normalizer(normalizer).map_err(|error| metadata.wrong(PRE, error.to_string()))?;
    tokenizer.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(metadata, splitting.pre_tokenizer)?));
    let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    tokenizer.with_decoder(Some(part::<DecoderWrapper>(metadata, decoder)?));
    Ok((tokenizer, splitting.adds_bos))
}

/// A tokenizer of SentencePiece's, likewise.
fn sentence_piece(metadata: &Metadata, tokens: &[Token<'_>]) -> Result<(Tokenizer, bool), GgufError> {
    for key in ["tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.treat_whitespace_as_suffix"] {
        if metadata.flag(key)? == Some(true) {
            return Err(metadata.wrong(key, "tokenizers that do this are not supported"));
        }
    }
    let scores = metadata.floats(SCORES)?.ok_or_else(|| metadata.missing(SCORES))?;
    let unknown = tokens.iter().find(|token| token.kind == TokenType::Unknown).map(|token| token.text);
    let mut vocab = Vocab::default();
    let mut pieces = HashMap::new();
    for token in tokens {
        let score = *scores
            .get(token.id as usize)
            .ok_or_else(|| metadata.wrong(SCORES, "must have one entry for each token"))?;
        // The converter has put spaces for what SentencePiece writes for them, in the tokens that the model's authors chose.
        let user_defined = token.kind == TokenType::UserDefined;
        let text = if user_defined { token.text.replace(' ', &SPACE.to_string()) } else { token.text.to_owned() };
        // Those are found before all others, and have no score of their own.
        let score = if user_defined { f64::INFINITY } else { score };
        pieces.insert(text.clone(), (token.id, score));
        vocab.insert(text, token.id);
    }
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges(&pieces)).fuse_unk(true).byte_fallback(true);
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.to_owned());
    }
    let mut tokenizer = Tokenizer::new(builder.build().map_err(|error| metadata.wrong(TOKENS, error.to_string()))?);

    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let back = json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " });
    let mut decoders = vec![back, json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let normalizer = if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": SPACE }, replace] })
    } else {
        replace
    };
    let normalizer: NormalizerWrapper = part(metadata, normalizer)?;
    tokenizer.with_normalizer(Some(normalizer)).map_err(|error| metadata.wrong(MODEL, error.to_string()))?;
    let decoder = json!({ "type": "Sequence", "decoders": decoders });
    tokenizer.with_decoder(Some(part::<DecoderWrapper>(metadata, decoder)?));
    Ok((tokenizer, true))
}

/// All pairs of pieces that make a piece, those first that make the one with the highest score (as transformers'
/// `convert_slow_tokenizer.py` orders them).
fn merges(pieces: &HashMap<String, (u32, f64)>) -> Vec<(String, String)> {
    struct Merge<'a> {
        score: f64,
        /// Ids of what it makes and of its parts, by which merges of one score are ordered.
        ids: [u32; 3],
        parts: (&'a str, &'a str),
    }
    let mut merges = Vec::new();
    for (piece, (id, score)) in pieces {
        for (middle, _) in piece.char_indices().skip(1) {
            let parts = piece.split_at(middle);
            if let (Some((one, _)), Some((other, _))) = (pieces.get(parts.0), pieces.get(parts.1)) {
                merges.push(Merge { score: *score, ids: [*id, *one, *other], parts });
            }
        }
    }
    merges.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.ids.cmp(&b.ids)));
    merges.into_iter().map(|merge| (merge.parts.0.to_owned(), merge.parts.1.to_owned())).collect()
}

/// What is put around every text.
fn template(
    metadata: &Metadata,
    tokens: &[Token<'_>],
    adds_bos: bool,
) -> Result<Option<PostProcessorWrapper>, GgufError> {
    let token = |wanted: bool, key: &str| -> Result<Option<&Token<'_>>, GgufError> {
        if !wanted {
            return Ok(None);
        }
        let id = metadata.id(key)?.ok_or_else(|| metadata.missing(key))?;
        let token = tokens.binary_search_by_key(&id, |token| token.id).ok().map(|index| &tokens[index]);
        token.map(Some).ok_or_else(|| metadata.wrong(key, format!("there is no token {id}")))
    };
    let flag = |key: &str, default: bool| Ok::<_, GgufError>(metadata.flag(key)?.unwrap_or(default));
    let bos = token(flag("tokenizer.ggml.add_bos_token", adds_bos && metadata.id(BOS)?.is_some())?, BOS)?;
    let eos = token(flag("tokenizer.ggml.add_eos_token", false)?, EOS)?;
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    // Pieces by id, since a token's text may hold what separates pieces.
    let around = |text: Json| -> Vec<Json> {
        let special = |token: &Token<'_>| json!({ "SpecialToken": { "id": token.text, "type_id": 0 } });
        bos.map(special).into_iter().chain([text]).chain(eos.map(special)).collect()
    };
    let text = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
    let special: HashMap<&str, Json> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|token| (token.text, json!({ "id": token.text, "ids": [token.id], "tokens": [token.text] })))
        .collect();
    let pair: Vec<Json> = around(text("A")).into_iter().chain(around(text("B"))).collect();
    let json = json!({
        "type": "TemplateProcessing", "single": around(text("A")), "pair": pair, "special_tokens": special,
    });
    Ok(Some(part::<TemplateProcessing>(metadata, json)?.into()))
}

/// A part of a tokenizer, from how `tokenizer.json` describes it.
fn part<T: DeserializeOwned>(metadata: &Metadata, json: Json) -> Result<T, GgufError> {
    serde_json::from_value(json).map_err(|error| metadata.wrong(MODEL, error.to_string()))
}
