//! The Qwen2.5 tokenizer: byte-level BPE over NFC text, from either of the two file layouts.

use crate::error::{Error, Result, nearest};
use crate::io::JsonObject;
use crate::prompt::Template;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

/// Tokens that the original keeps of a prompt, besides the template's prefix.
///
/// Source: <https://github.com/huggingface/diffusers/blob/73ba2c74ae42f90ce07ad9f23fe39038d921c8e0/src/diffusers/pipelines/qwenimage/pipeline_qwenimage.py>
pub const MAX_PROMPT_TOKENS: usize = 1024;

/// How Qwen2 cuts text into words before byte-pair merging.
///
/// Source: <https://github.com/huggingface/transformers/blob/efa7189c5546a94e8c1194b2ccc6669e0f7ad65e/src/transformers/models/qwen2/tokenization_qwen2.py>
const WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Text to token ids.
pub struct PromptTokenizer {
    folder: PathBuf,
    tokenizer: Tokenizer,
}

impl PromptTokenizer {
    /// Loads the files in a `tokenizer/` folder: `tokenizer.json`, or `vocab.json` and `merges.txt` with the added
    /// tokens of `tokenizer_config.json` or `added_tokens.json`.
    ///
    /// Errors: no tokenizer files, a corrupt one, two sources that give an added token different ids.
    pub fn load(folder: &Path) -> Result<Self> {
        let (fast, vocab) = (folder.join("tokenizer.json"), folder.join("vocab.json"));
        let mut tokenizer = if fast.is_file() {
            Tokenizer::from_file(&fast).map_err(|e| {
                Error::usage(format!("`{}` is not a tokenizer", fast.display()))
                    .detail(e.to_string())
                    .hint("download or copy the file again")
            })?
        } else if vocab.is_file() {
            from_vocab_and_merges(folder)?
        } else {
            let listing =
                std::fs::read_dir(folder).map_err(|e| Error::io("read the folder", folder, e).into_usage())?;
            let mut names: Vec<String> = listing.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
            names.sort();
            return Err(Error::usage(format!("no tokenizer in `{}`", folder.display()))
                .expected("tokenizer.json, or vocab.json and merges.txt", names.join(", ")));
        };
        // Lengths are decided here, not by what the file was saved with.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).expect("no truncation is always possible");
        Ok(Self { folder: folder.into(), tokenizer })
    }

    /// Token ids of `text` as it stands; special tokens written in it become single ids.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(|e| {
            Error::run(format!("cannot tokenize with `{}`", self.folder.display())).detail(e.to_string())
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of `caption` inside `template`, cut to `MAX_PROMPT_TOKENS` behind the prefix.
    pub fn encode_prompt(&self, template: &Template, caption: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(&template.apply(caption))?;
        ids.truncate(self.num_prefix_tokens(template)? + MAX_PROMPT_TOKENS);
        Ok(ids)
    }

    /// How many tokens the template's prefix has: the number of leading hidden states to drop.
    pub fn num_prefix_tokens(&self, template: &Template) -> Result<usize> {
        Ok(self.encode(&template.prefix)?.len())
    }

    /// Tokens that exist, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }
}

fn from_vocab_and_merges(folder: &Path) -> Result<Tokenizer> {
    let (vocab_path, merges_path) = (folder.join("vocab.json"), folder.join("merges.txt"));
    if !merges_path.is_file() {
        return Err(Error::usage(format!("`{}` is missing", merges_path.display()))
            .detail("`vocab.json` is there without it")
            .hint("the download is incomplete: fetch this file"));
    }
    let bad_files = |e: tokenizers::Error| {
        Error::usage(format!("`{}` and `{}` make no tokenizer", vocab_path.display(), merges_path.display()))
            .detail(e.to_string())
            .hint("download or copy both files again")
    };
    let (mut vocab, merges) =
        BPE::read_file(&vocab_path.to_string_lossy(), &merges_path.to_string_lossy()).map_err(bad_files)?;
    let added = added_tokens(folder)?;
    // In the vocabulary itself, the added tokens keep the ids of their files even where those leave gaps.
    for (&id, token) in &added {
        if let Some(other) = vocab.insert(token.content.clone(), id).filter(|&other| other != id) {
            return Err(contradiction(folder, &token.content, other, id));
        }
    }
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(bad_files)?;
    let split = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Isolated, false);
    let words = split.expect("a constant pattern that the tests compile");
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(NFC)).map_err(bad_files)?;
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), bytes.into()])));
    tokenizer.add_tokens(added.into_values()).map_err(bad_files)?;
    Ok(tokenizer)
}

/// The added tokens by id: those of `tokenizer_config.json`, with their flags, and those of `added_tokens.json`.
fn added_tokens(folder: &Path) -> Result<BTreeMap<u32, AddedToken>> {
    let mut tokens: BTreeMap<u32, AddedToken> = BTreeMap::new();
    let config = folder.join("tokenizer_config.json");
    let decoder = if config.is_file() { JsonObject::open(&config)?.section("added_tokens_decoder")? } else { None };
    if let Some(decoder) = decoder {
        for (key, value) in decoder.entries() {
            let id: u32 = key.parse().map_err(|_| decoder.bad_value(key, "a token id as key", key))?;
            let entry = decoder.section(key)?.ok_or_else(|| decoder.bad_value(key, "an object", value))?;
            let token = AddedToken {
                content: entry.get("content")?,
                single_word: entry.get_or("single_word", false)?,
                lstrip: entry.get_or("lstrip", false)?,
                rstrip: entry.get_or("rstrip", false)?,
                normalized: entry.get_or("normalized", false)?,
                special: entry.get_or("special", true)?,
            };
            tokens.insert(id, token);
        }
    }
    let names = folder.join("added_tokens.json");
    if names.is_file() {
        let names = JsonObject::open(&names)?;
        for (content, value) in names.entries() {
            let id = value.as_u64().and_then(|v| u32::try_from(v).ok());
            let id = id.ok_or_else(|| names.bad_value(content, "a token id", value))?;
            let known = tokens.iter().find(|(_, t)| t.content == content).map(|(&i, _)| i);
            match known {
                Some(known) if known != id => return Err(contradiction(folder, content, known, id)),
                Some(_) => {}
                None => {
                    tokens.insert(id, AddedToken::from(content, true));
                }
            }
        }
    }
    if tokens.is_empty() {
        let sources = ["tokenizer_config.json", "added_tokens.json"];
        let mut error = Error::usage(format!("no added tokens in `{}`", folder.display()))
            .expected("tokenizer_config.json with added_tokens_decoder, or added_tokens.json", "neither")
            .hint("without them the prompt template's `<|im_start|>` would be split into letters");
        let listing = std::fs::read_dir(folder).into_iter().flatten();
        for name in listing.filter_map(|e| e.ok()?.file_name().into_string().ok()) {
            if let Some(meant) = nearest(&name, sources).filter(|m| *m != name) {
                error = error.detail(format!("`{name}` there is near to `{meant}`"));
            }
        }
        return Err(error);
    }
    Ok(tokens)
}

fn contradiction(folder: &Path, token: &str, one: u32, other: u32) -> Error {
    Error::usage(format!("the files in `{}` contradict each other", folder.display()))
        .detail(format!("token `{token}` has id {one} in one and {other} in another"))
        .hint("download or copy the tokenizer files again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::TEXT_TO_IMAGE;
    use serde_json::{Value, json};
    use std::io::Read;
    use std::sync::LazyLock;

    /// The Qwen2.5 tokenizer (tests/fixtures/README.md says where it comes from).
    static TOKENIZER_JSON: LazyLock<String> = LazyLock::new(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/qwen2_5_tokenizer.json.gz");
        let mut text = String::new();
        flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_string(&mut text).unwrap();
        text
    });

    fn fast_folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), &*TOKENIZER_JSON).unwrap();
        dir
    }

    /// The same tokenizer in the layout of the published repositories.
    fn slow_folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let json: Value = serde_json::from_str(&TOKENIZER_JSON).unwrap();
        let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
        write("vocab.json", json["model"]["vocab"].to_string());
        let merges: Vec<String> = json["model"]["merges"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| match m {
                Value::String(pair) => pair.clone(),
                pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
            })
            .collect();
        write("merges.txt", format!("#version: 0.2\n{}\n", merges.join("\n")));
        let added = json["added_tokens"].as_array().unwrap();
        let by_name: serde_json::Map<_, _> =
            added.iter().map(|t| (t["content"].as_str().unwrap().into(), t["id"].clone())).collect();
        write("added_tokens.json", Value::Object(by_name).to_string());
        let by_id: serde_json::Map<_, _> = added.iter().map(|t| (t["id"].to_string(), t.clone())).collect();
        write("tokenizer_config.json", json!({"added_tokens_decoder": by_id}).to_string());
        dir
    }

    /// Recorded from the Python tokenizer.
    const PREFIX: [u32; 34] = [
        151644, 8948, 198, 74785, 279, 2168, 553, 44193, 279, 1894, 11, 6083, 11, 1379, 11, 10434, 11, 12194, 11, 1467,
        11, 27979, 11871, 315, 279, 6171, 323, 4004, 25, 151645, 198, 151644, 872, 198,
    ];
    const SUFFIX: [u32; 5] = [151645, 198, 151644, 77091, 198];

    #[test]
    fn the_published_tokenizer_gives_the_recorded_ids() {
        let dir = fast_folder();
        let tokenizer = PromptTokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 151_665);
        assert_eq!(tokenizer.encode(&TEXT_TO_IMAGE.prefix).unwrap(), PREFIX);
        assert_eq!(tokenizer.num_prefix_tokens(&TEXT_TO_IMAGE).unwrap(), 34);
        let prompt = |caption: &str| tokenizer.encode_prompt(&TEXT_TO_IMAGE, caption).unwrap();
        assert_eq!(prompt("A cat"), [&PREFIX[..], &[32, 8251], &SUFFIX].concat());
        assert_eq!(prompt(" "), [&PREFIX[..], &[220], &SUFFIX].concat());
        assert_eq!(prompt(""), [&PREFIX[..], &SUFFIX].concat());
        let picture = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>";
        assert_eq!(tokenizer.encode(picture).unwrap(), [24669, 220, 16, 25, 220, 151652, 151655, 151653]);
        // Decomposed and composed accents are one text after NFC.
        assert_eq!(prompt("cafe\u{301}"), prompt("caf\u{e9}"));
    }

    #[test]
    fn a_long_caption_is_cut_behind_the_prefix() {
        let dir = fast_folder();
        let tokenizer = PromptTokenizer::load(dir.path()).unwrap();
        let ids = tokenizer.encode_prompt(&TEXT_TO_IMAGE, &"cat ".repeat(3000)).unwrap();
        assert_eq!(ids.len(), 34 + MAX_PROMPT_TOKENS);
        assert_eq!(ids[..34], PREFIX);
    }

    #[test]
    fn vocab_and_merges_give_the_ids_of_tokenizer_json() {
        let (fast, slow) = (fast_folder(), slow_folder());
        let fast = PromptTokenizer::load(fast.path()).unwrap();
        let slow_tokenizer = PromptTokenizer::load(slow.path()).unwrap();
        let texts = [
            "a red fox sits on the snow, detailed fur",
            "一只猫坐在雪地上，写着“你好，世界” 12345",
            "I'm sure they'll SHE'S  don't\r\n\n  two  spaces \t tab ",
            "héllo wörld e\u{301} 🙂👩‍👩‍👧 ＡＢＣ ½ ٣",
            "<tool_call>x</tool_call><|im_end|> <|fim_pad|> <|endoftext|>",
            "",
        ];
        for text in texts {
            assert_eq!(fast.encode(text).unwrap(), slow_tokenizer.encode(text).unwrap(), "{text:?}");
        }
        assert_eq!(fast.vocab_size(), slow_tokenizer.vocab_size());
        // One of the two sources of added tokens is enough.
        for file in ["added_tokens.json", "tokenizer_config.json"] {
            let only = slow_folder();
            std::fs::remove_file(only.path().join(file)).unwrap();
            let only = PromptTokenizer::load(only.path()).unwrap();
            assert_eq!(fast.encode(texts[4]).unwrap(), only.encode(texts[4]).unwrap(), "without {file}");
        }
    }

    #[test]
    fn broken_folders_are_named() {
        let refused = |spoil: &dyn Fn(&Path)| {
            let dir = slow_folder();
            spoil(dir.path());
            PromptTokenizer::load(dir.path()).err().expect("refused").to_string()
        };
        let remove = |name: &'static str| move |dir: &Path| std::fs::remove_file(dir.join(name)).unwrap();
        assert!(refused(&remove("merges.txt")).contains("merges.txt` is missing"));
        assert!(refused(&remove("vocab.json")).contains("found added_tokens.json, merges.txt, tokenizer_config.json"));
        let neither = refused(&|dir| {
            remove("added_tokens.json")(dir);
            std::fs::rename(dir.join("tokenizer_config.json"), dir.join("tokeniser_config.json")).unwrap();
        });
        assert!(neither.contains("`tokeniser_config.json` there is near to `tokenizer_config.json`"), "{neither}");
        let moved = refused(&|dir| std::fs::write(dir.join("added_tokens.json"), r#"{"<|im_end|>": 7}"#).unwrap());
        assert!(moved.contains("token `<|im_end|>` has id 151645 in one and 7 in another"), "{moved}");
        let cut = refused(&|dir| std::fs::write(dir.join("vocab.json"), "{\"a\": 1").unwrap());
        assert!(cut.contains("vocab.json"), "{cut}");
        let cut = refused(&|dir| std::fs::write(dir.join("tokenizer.json"), "{}").unwrap());
        assert!(cut.contains("tokenizer.json` is not a tokenizer"), "{cut}");
    }
}
