//! Text to token ids and back, as `tokenizer.json` says.
//!
//! The work is done by Hugging Face's `tokenizers`; what this module adds is [`TextStream`], which turns the ids of a
//! running generation into text as they come, and never shows half a character. That is less simple than it sounds:
//!
//! - one token may hold a part of a character (byte-level BPE splits emoji over three or four tokens);
//! - a token's text may depend on what stands before it (metaspace tokenizers drop the space of the first word);
//! - decoding everything again for every token would cost a square of the length.
//!
//! So a stream decodes a short window: the last token whose text is settled, as context, and the tokens behind it.

use std::{
    collections::BTreeSet,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokenizers::decoders::DecoderWrapper;

use super::gguf::GgufError;

/// What decoders put where bytes are not UTF-8.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Tokens that a stream's window may grow to before it is cut. A character has four bytes at most and every token of
/// text brings at least one, so the tokens that can still change the end of the text are far fewer.
const MAX_WINDOW: usize = 32;

/// Tokens that are left of a window that was cut: enough to hold an unfinished character and one before it.
const CUT_WINDOW: usize = 8;

/// Prompt tokens that a stream looks at first for its context; doubled until they have text.
const FIRST_CONTEXT: usize = 4;

/// Why a tokenizer could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The checkpoint has no `tokenizer.json`.
    #[error("{} has no tokenizer.json{hint}", .dir.display())]
    Missing {
        /// Where it was looked for.
        dir: PathBuf,
        /// What to do, where something is known.
        hint: &'static str,
    },
    /// The file is there but can't be read.
    #[error("cannot read {}: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not a tokenizer.
    #[error("{} is not a tokenizer that this version reads: {reason}; download it again, or save it anew with transformers' save_pretrained", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A GGUF file has no vocabulary, or one that isn't understood.
    #[error(transparent)]
    Gguf(Box<GgufError>),
    /// The text could not be turned into ids.
    #[error("the tokenizer cannot encode this text of {bytes} bytes: {reason}")]
    Encode {
        /// The text's length in bytes.
        bytes: usize,
        /// What the tokenizer said.
        reason: String,
    },
    /// The ids could not be turned into text.
    #[error("the tokenizer cannot decode {tokens} tokens: {reason}")]
    Decode {
        /// How many ids there were.
        tokens: usize,
        /// What the tokenizer said.
        reason: String,
    },
}

/// A checkpoint's tokenizer. Clones share one copy.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    special: BTreeSet<u32>,
    /// Tokens like `<0xE2>` stand for single bytes.
    byte_fallback: bool,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Opens the `tokenizer.json` in `dir`.
    ///
    /// The truncation and padding that the file may state are left out, as in transformers: both belong to training
    /// and batching, and a prompt must never be cut in silence.
    ///
    /// # Errors
    /// [`TokenizerError::Missing`], [`TokenizerError::Unreadable`] and [`TokenizerError::Malformed`].
    pub fn open(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let json = match std::fs::read(&path) {
            Ok(json) => json,
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(TokenizerError::Missing { dir: dir.to_owned(), hint: missing_hint(dir) });
            }
            Err(source) => return Err(TokenizerError::Unreadable { path, source }),
        };
        Self::from_json(&json).map_err(|reason| TokenizerError::Malformed { path, reason })
    }

    fn from_json(json: &[u8]) -> Result<Self, String> {
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        Ok(Self::of(tokenizer))
    }

    /// Takes a tokenizer that neither pads nor truncates.
    pub(super) fn of(tokenizer: tokenizers::Tokenizer) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let byte_fallback = tokenizer.get_decoder().is_some_and(has_byte_fallback);
        Self(Arc::new(Inner { tokenizer, special, byte_fallback }))
    }

    /// The ids of `text`. With `add_special_tokens`, the tokens that the checkpoint wants around every text (such as
    /// the begin-of-sequence token) are added; a rendered chat has them already, so there it is `false`.
    ///
    /// Special tokens that are spelled out in `text` become their single ids, as in transformers.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.0.tokenizer.encode_fast(text, add_special_tokens);
        let encoding =
            encoding.map_err(|error| TokenizerError::Encode { bytes: text.len(), reason: error.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, without the special tokens' own text where `skip_special` is set.
    ///
    /// Ids without a token have no text (models pad their vocabulary), as in transformers. Bytes that are not UTF-8
    /// become U+FFFD. Where a byte-fallback tokenizer (`<0xE2>`) has good and bad bytes in one run, transformers gives
    /// one U+FFFD for each byte of the run; here the good characters are kept, so that text that was streamed already
    /// never has to be taken back.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        if !self.0.byte_fallback {
            return self.decode_at_once(ids, skip_special);
        }
        let mut stream = TextStream::new(self.clone(), skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id)?);
        }
        text.push_str(&stream.finish());
        Ok(text)
    }

    fn decode_at_once(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let text = self.0.tokenizer.decode(ids, skip_special);
        text.map_err(|error| TokenizerError::Decode { tokens: ids.len(), reason: error.to_string() })
    }

    /// A stream for the text that follows `prompt`. Special tokens have no text in it.
    ///
    /// With an empty prompt, all the pieces together are exactly [`decode`](Self::decode) of the generated ids. With a
    /// prompt they are the text that follows the prompt's: the same, but that a metaspace tokenizer keeps the space of
    /// the first word (`The capital is` goes on with ` Paris`, not with `Paris`).
    pub fn stream(&self, prompt: &[u32]) -> TextStream {
        let mut stream = TextStream::new(self.clone(), true);
        stream.take_context(prompt);
        stream
    }

    /// How many tokens there are, added ones included. The model's own vocabulary may be larger (it is padded).
    pub fn vocab_size(&self) -> usize {
        self.0.tokenizer.get_vocab_size(true)
    }

    /// The id of a token, spelled as in the vocabulary (`Ġthe`, not ` the`).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// The token of an id, spelled as in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// The ids of the special tokens: those that steer the model and are no text.
    pub fn special_ids(&self) -> &BTreeSet<u32> {
        &self.0.special
    }

    /// Whether `id` is a special token's.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.contains(&id)
    }

    /// The byte that a byte-fallback token stands for.
    fn byte_of(&self, id: u32) -> Option<u8> {
        if !self.0.byte_fallback {
            return None;
        }
        let token = self.id_to_token(id)?;
        let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
        if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
    }
}

fn missing_hint(dir: &Path) -> &'static str {
    if dir.join("tokenizer.model").exists() || dir.join("vocab.json").exists() {
        ": only files in an older format are there; convert them with transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    } else {
        ": copy it from the model's page on the hub"
    }
}

fn has_byte_fallback(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(has_byte_fallback),
        _ => false,
    }
}

/// The text of a running generation, piece by piece; see [`Tokenizer::stream`].
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// A token or two of settled context, then the tokens whose text is not complete yet.
    window: Vec<u32>,
    /// Bytes of the window's text that are context or were handed out.
    settled: usize,
    /// The window's text ends in an unfinished character, which was not handed out.
    unfinished: bool,
    /// The first bytes of a character, from byte-fallback tokens.
    bytes: Vec<u8>,
}

impl TextStream {
    fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, window: Vec::new(), settled: 0, unfinished: false, bytes: Vec::new() }
    }

    /// Takes as context the shortest end of `prompt` that has text (special tokens have none).
    fn take_context(&mut self, prompt: &[u32]) {
        let mut length = FIRST_CONTEXT;
        loop {
            let tail = &prompt[prompt.len().saturating_sub(length)..];
            match self.tokenizer.decode_at_once(tail, self.skip_special) {
                // A prompt that stops within a character is no context: its last bytes would mix with the answer's.
                Ok(text) if !text.is_empty() && !text.ends_with(REPLACEMENT) => {
                    self.window = tail.to_vec();
                    self.settled = text.len();
                    return;
                }
                Ok(text) if text.is_empty() && length < prompt.len() => length *= 2,
                _ => return,
            }
        }
    }

    /// The text that is certain now that `id` has come: empty while a character is incomplete. The work does not grow
    /// with the length of the text.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        match self.tokenizer.byte_of(id) {
            // At the very start an ASCII byte goes through the decoder, which may strip it (a leading space).
            Some(byte) if !(self.window.is_empty() && byte.is_ascii()) => self.push_byte(id, byte),
            _ => self.push_token(id),
        }
    }

    fn push_byte(&mut self, id: u32, byte: u8) -> Result<String, TokenizerError> {
        self.bytes.push(byte);
        let text = take_characters(&mut self.bytes);
        self.window = vec![id];
        self.settled = self.tokenizer.decode_at_once(&self.window, self.skip_special)?.len();
        Ok(text)
    }

    fn push_token(&mut self, id: u32) -> Result<String, TokenizerError> {
        let mut out = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        self.window.push(id);
        let text = self.tokenizer.decode_at_once(&self.window, self.skip_special)?;
        // An incomplete character is exactly one replacement character, at the end. With byte fallback it would sit in
        // `self.bytes`, and a replacement character is just that.
        self.unfinished = !self.tokenizer.0.byte_fallback && text.ends_with(REPLACEMENT);
        let end = text.len() - if self.unfinished { REPLACEMENT.len_utf8() } else { 0 };
        // `get`: no decoder takes back what stands before its last character; were there one, its text is skipped.
        if let Some(certain) = text.get(self.settled..end) {
            out.push_str(certain);
        }
        self.settled = end;
        self.shorten()?;
        Ok(out)
    }

    /// Keeps the window short without changing what the next token's text will be.
    fn shorten(&mut self) -> Result<(), TokenizerError> {
        let keep = match (self.unfinished, self.settled) {
            (false, 1..) => 1,
            _ if self.window.len() > MAX_WINDOW => CUT_WINDOW,
            _ => return Ok(()),
        };
        // A context without text is none (the decoder would treat what follows as the first word), so take more.
        for length in keep..self.window.len() {
            let tail = &self.window[self.window.len() - length..];
            let text = self.tokenizer.decode_at_once(tail, self.skip_special)?;
            if !text.is_empty() || keep == CUT_WINDOW {
                self.settled = text.len() - if self.unfinished { REPLACEMENT.len_utf8() } else { 0 };
                self.window.drain(..self.window.len() - length);
                return Ok(());
            }
        }
        // Tokens without any text behind the context: they change nothing, so they need not be kept.
        if !self.unfinished && self.window.len() > MAX_WINDOW {
            self.window.truncate(MAX_WINDOW);
        }
        Ok(())
    }

    /// What is left when no more tokens come: a replacement character for a character that was never finished.
    pub fn finish(self) -> String {
        if self.unfinished || !self.bytes.is_empty() { REPLACEMENT.to_string() } else { String::new() }
    }
}

/// Takes the complete characters from the front of `bytes`, with bad bytes replaced, and leaves an incomplete one.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid: Vec<u8> = bytes.drain(..error.valid_up_to()).collect();
                text.push_str(&String::from_utf8_lossy(&valid));
                let Some(bad) = error.error_len() else { return text };
                text.push(REPLACEMENT);
                bytes.drain(..bad);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A Llama-2-like tokenizer: metaspace, byte fallback, and a decoder that strips the first space.
    fn llama2() -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        for token in ["<unk>", "<s>", "</s>"] {
            vocab.insert(token.to_owned(), vocab.len().into());
        }
        for byte in 0..=255u8 {
            vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
        }
        for token in ["▁", "▁Paris", "▁is", "Hello", "é", ".", "\u{fffd}"] {
            vocab.insert(token.to_owned(), vocab.len().into());
        }
        let special: Vec<_> = (0..3)
            .map(|id| {
                let content = ["<unk>", "<s>", "</s>"][id];
                serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": special, "normalizer": null,
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "vocab": vocab, "merges": []},
        });
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    fn ids(tokenizer: &Tokenizer, tokens: &[&str]) -> Vec<u32> {
        tokens.iter().map(|token| tokenizer.token_to_id(token).unwrap()).collect()
    }

    fn pieces(tokenizer: &Tokenizer, prompt: &[u32], generated: &[u32]) -> Vec<String> {
        let mut stream = tokenizer.stream(prompt);
        let mut pieces: Vec<String> = generated.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert!(stream.window.len() <= MAX_WINDOW, "the window is bounded");
        pieces.push(stream.finish());
        pieces
    }

    #[test]
    fn the_first_space_belongs_to_the_context() {
        let tokenizer = llama2();
        let paris = ids(&tokenizer, &["▁Paris", "▁is"]);
        assert_eq!(tokenizer.decode(&paris, true).unwrap(), "Paris is");
        assert_eq!(pieces(&tokenizer, &[], &paris), ["Paris", " is", ""]);
        assert_eq!(pieces(&tokenizer, &ids(&tokenizer, &["Hello"]), &paris), [" Paris", " is", ""]);
        // Special tokens alone are no context, as they have no text.
        assert_eq!(pieces(&tokenizer, &ids(&tokenizer, &["<s>"]), &paris), ["Paris", " is", ""]);
        let prompt = ids(&tokenizer, &["Hello", "<s>", "<s>", "<s>", "<s>", "<s>", "</s>"]);
        assert_eq!(pieces(&tokenizer, &prompt, &paris), [" Paris", " is", ""]);
    }

    #[test]
    fn bytes_wait_for_their_character() {
        let tokenizer = llama2();
        let emoji = ids(&tokenizer, &["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁is"]);
        assert_eq!(pieces(&tokenizer, &[], &emoji), ["", "", "", "😀", " is", ""]);
        assert_eq!(pieces(&tokenizer, &[], &emoji[..3]), ["", "", "", "\u{fffd}"]);
        let broken = ids(&tokenizer, &["<0xF0>", "<0x9F>", "▁is"]);
        assert_eq!(pieces(&tokenizer, &[], &broken), ["", "", "\u{fffd} is", ""]);
        assert_eq!(tokenizer.decode(&broken, true).unwrap(), "\u{fffd} is");
    }

    #[test]
    fn whole_runs_of_bytes_decode_as_transformers_has_them() {
        let tokenizer = llama2();
        let run = ids(&tokenizer, &["<0xC3>", "<0xA9>", "<0x41>", "▁is", "é", "\u{fffd}", "<0x0A>"]);
        assert_eq!(tokenizer.decode(&run, true).unwrap(), tokenizer.decode_at_once(&run, true).unwrap());
        assert_eq!(tokenizer.decode(&run, true).unwrap(), "éA isé\u{fffd}\n");
    }

    #[test]
    fn bad_bytes_are_replaced_one_sequence_at_a_time() {
        let mut bytes = vec![b'a', 0xFF, 0xE2, 0x82, b'b', 0xC3];
        assert_eq!(take_characters(&mut bytes), "a\u{fffd}\u{fffd}b");
        assert_eq!(bytes, [0xC3]);
    }

    #[test]
    fn a_missing_or_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Tokenizer::open(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("no tokenizer.json") && missing.contains("hub"), "{missing}");
        std::fs::write(dir.path().join("tokenizer.model"), b"x").unwrap();
        assert!(Tokenizer::open(dir.path()).unwrap_err().to_string().contains("save_pretrained"));
        for garbage in ["", "{}", "{\"version\": \"1.0\"", "[1, 2]"] {
            std::fs::write(dir.path().join("tokenizer.json"), garbage).unwrap();
            let error = Tokenizer::open(dir.path()).unwrap_err();
            assert!(matches!(error, TokenizerError::Malformed { .. }), "{garbage:?}: {error}");
            assert!(error.to_string().contains("tokenizer.json"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn streamed_text_is_decoded_text(ids in prop::collection::vec(0u32..270, 0..80)) {
            let tokenizer = llama2();
            prop_assert_eq!(pieces(&tokenizer, &[], &ids).concat(), tokenizer.decode(&ids, true).unwrap());
        }

        #[test]
        fn streamed_good_text_is_what_transformers_decodes(text in "[ a-z😀é€]{0,20}", prefix in 0usize..3) {
            let tokenizer = llama2();
            let words = ids(&tokenizer, &["▁Paris", "Hello", "▁"]);
            let mut all: Vec<u32> = words[..prefix].to_vec();
            for byte in text.bytes() {
                all.push(tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap());
            }
            all.extend(&words);
            prop_assert_eq!(pieces(&tokenizer, &[], &all).concat(), tokenizer.decode_at_once(&all, true).unwrap());
        }
    }
}
