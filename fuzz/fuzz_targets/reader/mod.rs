//! One input of the fuzzer, or of the tests that keep what it found.
//!
//! The first byte chooses: how strict to be, whether widths are known, and whether the rest is a whole file or a
//! header alone, which gets its length prefix and as many zeros as it asks for (up to 1 MB), so that the fuzzer need
//! not guess numbers that fit each other. After a byte 0xff may stand the text of an `adapter_config.json`.

use qwen_lora::adapters::convert::{Convert, convert_module};
use qwen_lora::adapters::inspect::{Model, inspect, page};
use qwen_lora::adapters::read::{AdapterFile, Component, ModuleTable, ReadOptions};
use qwen_lora::adapters::target::ModuleInfo;
use qwen_lora::adapters::write::Format;
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

/// Weights of more values than this are read, not multiplied out: time is for many inputs, not for large ones.
const LARGE: usize = 1 << 16;

/// Reads, inspects and converts what `data` says. Panics where the program would.
pub fn read(data: &[u8]) {
    let Some((choice, rest)) = data.split_first() else { return };
    let (rest, config) = match rest.iter().rposition(|b| *b == 0xff).filter(|_| choice & 8 != 0) {
        Some(at) => (&rest[..at], std::str::from_utf8(&rest[at + 1..]).ok()),
        None => (rest, None),
    };
    let file = if choice & 1 == 0 { rest.to_vec() } else { whole_file(rest) };
    let options = ReadOptions {
        table: if choice & 2 == 0 { &KNOWN } else { &NAMES },
        text_encoder: None,
        alpha: (choice & 16 != 0).then_some(3.0),
        allow_unmatched: choice & 4 != 0,
    };
    match AdapterFile::from_bytes(Path::new("fuzz.safetensors"), file, config, &options) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(adapter) => {
            let is_large = adapter.entries().any(|e| e.shape.0 * e.shape.1 > LARGE);
            for component in [Component::Transformer, Component::TextEncoder] {
                for (name, entry) in adapter.modules(component) {
                    let (out, width) = entry.shape;
                    if let Ok(delta) = adapter.delta(name, entry) {
                        assert_eq!(delta.shape(), entry.shape);
                        if !is_large {
                            assert_eq!(delta.dense().data.len(), out * width);
                            let _ = delta.exact_factors(64);
                        }
                    }
                }
            }
            if !is_large {
                look(&adapter, &options);
            }
        }
    }
}

/// What `inspect` and `convert` do with an adapter that was read.
fn look(adapter: &AdapterFile, options: &ReadOptions) {
    let model = Model { num_blocks: None, no_gradient: &|_| false };
    let inspection = inspect(adapter, options.table, &|_| None, None, &model).expect("no base to fail on");
    assert!(inspection.to_string().contains("fuzz.safetensors") && page(&inspection).ends_with("</html>\n"));
    for format in [Format::Diffusers, Format::Kohya] {
        let how = Convert { format, rank: 2, to_lora: false, base: None };
        for (name, entry) in &adapter.transformer {
            if let Ok(converted) = convert_module(adapter, name, entry, &how) {
                assert!(format.holds(&converted.module));
            }
        }
    }
}

/// A header with its length before it and the zeros behind it that it describes.
fn whole_file(header: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    // The largest number in the header is the end of its data, if it is a sound one.
    let numbers = header.split(|b| !b.is_ascii_digit());
    let numbers = numbers.filter_map(|n| std::str::from_utf8(n).ok()?.parse::<usize>().ok());
    let end = numbers.filter(|n| *n <= 1 << 20).max().unwrap_or(0);
    file.resize(file.len() + end, 0);
    file
}
