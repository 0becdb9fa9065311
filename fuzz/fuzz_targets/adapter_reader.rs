//! Whatever bytes come, reading an adapter ends with an adapter or an error: no panic, no runaway memory.
//!
//! The first byte chooses: how strict to be, whether widths are known, and whether the rest is a whole file or a
//! header alone, which gets its length prefix and as many zeros as it asks for (up to 1 MB), so that the fuzzer need
//! not guess numbers that fit each other.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qwen_lora::adapters::read::{AdapterFile, Component, ModuleTable, ReadOptions};
use qwen_lora::adapters::target::ModuleInfo;
use std::path::Path;
use std::sync::LazyLock;

fn modules() -> Vec<ModuleInfo> {
    let parts = ["attn.to_q", "attn.to_out.0", "attn.add_q_proj", "img_mlp.net.0.proj", "img_mlp.net.2"];
    let names = (0..2).flat_map(|block| parts.iter().map(move |part| format!("transformer_blocks.{block}.{part}")));
    let module = |name: String| {
        let wide = |end: &str| if name.ends_with(end) { 192 } else { 48 };
        let (in_features, out_features) = (wide("net.2"), wide("net.0.proj"));
        ModuleInfo { name, in_features, out_features, groups: vec![] }
    };
    names.chain(["img_in".to_string()]).map(module).collect()
}

static KNOWN: LazyLock<ModuleTable> = LazyLock::new(|| ModuleTable::new(&modules()));
static NAMES: LazyLock<ModuleTable> = LazyLock::new(|| ModuleTable::names_only(&modules()));

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else { return };
    let (rest, config) = match rest.iter().rposition(|b| *b == 0xff).filter(|_| choice & 8 != 0) {
        Some(at) => (&rest[..at], std::str::from_utf8(&rest[at + 1..]).ok()),
        None => (rest, None),
    };
    let file = if choice & 1 == 0 { rest.to_vec() } else { whole_file(rest) };
    let options = ReadOptions {
        table: if choice & 2 == 0 { &KNOWN } else { &NAMES },
        text_encoder: None,
        alpha: None,
        allow_unmatched: choice & 4 != 0,
    };
    match AdapterFile::from_bytes(Path::new("fuzz.safetensors"), file, config, &options) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(adapter) => {
            for component in [Component::Transformer, Component::TextEncoder] {
                for (name, entry) in adapter.modules(component) {
                    let (out, width) = entry.shape;
                    if let Ok(delta) = adapter.delta(name, entry) {
                        assert_eq!(delta.shape(), entry.shape);
                        if out * width <= 1 << 16 {
                            assert_eq!(delta.dense().data.len(), out * width);
                            let _ = delta.exact_factors(64);
                        }
                    }
                }
            }
        }
    }
});

/// A header with its length before it and the zeros behind it that it describes.
fn whole_file(header: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    // The largest number in the header is the end of its data, if it is a sound one.
    let numbers = header.split(|b| !b.is_ascii_digit()).filter_map(|n| std::str::from_utf8(n).ok()?.parse::<usize>().ok());
    let end = numbers.filter(|n| *n <= 1 << 20).max().unwrap_or(0);
    file.resize(file.len() + end, 0);
    file
}
