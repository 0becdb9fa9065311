//! A byte-level BPE of a few hundred words with the real special tokens, in the published file layout.
//!
//! Every word of the prompt template is one token, so that the template's prefix has as many tokens as with the real
//! tokenizer; all other text falls apart into letters and bytes.

use super::configs;
use crate::error::{Error, Result};
use crate::prompt::TEXT_TO_IMAGE;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The added tokens of the published tokenizer in the order of their ids; the first fourteen are control tokens.
const SPECIALS: [&str; 22] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];
const NUM_CONTROL: usize = 14;

/// Token ids that exist.
pub fn vocab_size() -> usize {
    plain_tokens().0.len() + SPECIALS.len()
}

/// The id of an added token.
pub fn special_id(token: &str) -> usize {
    let index = SPECIALS.iter().position(|s| *s == token).expect("asked for tokens of the list only");
    plain_tokens().0.len() + index
}

/// Writes `vocab.json`, `merges.txt`, `added_tokens.json`, `special_tokens_map.json` and `tokenizer_config.json`.
pub fn save(folder: &Path) -> Result<()> {
    let (tokens, merges) = plain_tokens();
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, t)| (t.clone(), id.into())).collect();
    configs::save(&folder.join("vocab.json"), &Value::Object(vocab))?;
    let lines: String = merges.iter().map(|(left, right)| format!("{left} {right}\n")).collect();
    let path = folder.join("merges.txt");
    std::fs::write(&path, format!("#version: 0.2\n{lines}")).map_err(|e| Error::io("write", &path, e))?;

    let specials = || SPECIALS.iter().enumerate().map(|(i, s)| (tokens.len() + i, *s, i < NUM_CONTROL));
    let ids: Map<String, Value> = specials().map(|(id, s, _)| (s.into(), id.into())).collect();
    configs::save(&folder.join("added_tokens.json"), &Value::Object(ids))?;
    let additional = &SPECIALS[1..NUM_CONTROL];
    configs::save(
        &folder.join("special_tokens_map.json"),
        &json!({
            "additional_special_tokens": additional, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"
        }),
    )?;
    let decoder: Map<String, Value> = specials()
        .map(|(id, content, special)| {
            let flags = json!({
                "content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
                "special": special
            });
            (id.to_string(), flags)
        })
        .collect();
    configs::save(
        &folder.join("tokenizer_config.json"),
        &json!({
            "add_bos_token": false,
            "add_prefix_space": false,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": additional,
            "bos_token": null,
            "clean_up_tokenization_spaces": false,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131_072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": false,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": null,
        }),
    )
}

/// The tokens before the added ones, by id, and the merges by rank.
///
/// Each word is merged from the left, letter by letter. Words behind a space come first: their chains begin with the
/// space, so that no merge of a lower rank can begin in the middle of a word and break its chain.
fn plain_tokens() -> (Vec<String>, Vec<(String, String)>) {
    let text = TEXT_TO_IMAGE.apply(" ");
    let word = regex::Regex::new(r"<\|[a-z_]+\|>| ?\p{L}+").expect("a constant pattern that the tests compile");
    let mut words: Vec<&str> = word.find_iter(&text).map(|m| m.as_str()).filter(|w| !w.starts_with('<')).collect();
    words.sort_by_key(|w| !w.starts_with(' '));

    let mut tokens: Vec<String> = byte_letters().iter().map(char::to_string).collect();
    tokens.sort();
    let mut merges = Vec::new();
    let letters = byte_letters();
    for word in words {
        let mut chain = word.bytes().map(|b| letters[usize::from(b)]);
        let mut left: String = chain.next().expect("a match of + is not empty").into();
        for right in chain {
            let merged = format!("{left}{right}");
            let merge = (left, right.to_string());
            if !merges.contains(&merge) {
                merges.push(merge);
                tokens.push(merged.clone());
            }
            left = merged;
        }
    }
    (tokens, merges)
}

/// The printable letter that stands for each byte: itself where it is printable, else the next one from U+0100 on.
///
/// Source: <https://github.com/openai/gpt-2/blob/9b63575ef42771a015060c964af2c3da4cf7c8ab/src/encoder.py#L9>
fn byte_letters() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("U+0100 to U+0143 are letters")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tokenizer::PromptTokenizer;

    #[test]
    fn the_template_has_as_many_tokens_as_with_the_real_tokenizer_and_no_text_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path()).unwrap();
        let tokenizer = PromptTokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.num_prefix_tokens(&TEXT_TO_IMAGE).unwrap(), 34);
        assert_eq!(tokenizer.encode_prompt(&TEXT_TO_IMAGE, "").unwrap().len(), 39);
        assert_eq!(tokenizer.vocab_size(), vocab_size());
        for (i, special) in SPECIALS.iter().enumerate() {
            assert_eq!(tokenizer.encode(special).unwrap(), [special_id(special) as u32], "{special}");
            assert_eq!(special_id(special), vocab_size() - SPECIALS.len() + i);
        }
        // Three bytes for each Chinese character, four for an emoji, and different texts stay different.
        assert_eq!(tokenizer.encode("一只猫🙂").unwrap().len(), 13);
        let ids = tokenizer.encode("The texture, the color: shape!").unwrap();
        assert_ne!(ids, tokenizer.encode("The texture, the colour: shape!").unwrap());
        assert!(ids.iter().all(|&id| (id as usize) < vocab_size()));
    }

    #[test]
    fn the_alphabet_has_256_letters() {
        let mut letters = byte_letters().to_vec();
        assert_eq!((letters[usize::from(b' ')], letters[usize::from(b'\n')], letters[0xad]), ('Ġ', 'Ċ', 'Ń'));
        letters.sort_unstable();
        letters.dedup();
        assert_eq!(letters.len(), 256);
    }
}
