//! What the tests of adapters share: the recorded cases and a way to look at deltas.
#![allow(dead_code)] // each test file uses a part of it

use qwen_lora::adapters::matrix::Matrix;
use qwen_lora::adapters::read::{AdapterFile, Component, ModuleTable, ReadOptions};
use qwen_lora::io::safetensors::write;
use qwen_lora::model::transformer::TransformerConfig;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A file or folder of a recorded case, such as `case_a/lora/kohya_lora_unet.safetensors`.
pub fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference").join(path)
}

/// The modules of a case's transformer.
pub fn table(case: &str) -> ModuleTable {
    let config = TransformerConfig::from_file(&fixture(case).join("pipe/transformer/config.json")).unwrap();
    ModuleTable::new(&config.modules())
}

/// Strict reading.
pub fn options(table: &ModuleTable) -> ReadOptions<'_> {
    ReadOptions { table, text_encoder: None, alpha: None, allow_unmatched: false }
}

/// Every module's delta, multiplied out.
pub fn deltas(path: &Path, options: &ReadOptions) -> BTreeMap<String, Matrix> {
    let adapter = AdapterFile::open(path, options).unwrap();
    let modules = adapter.modules(Component::Transformer);
    modules.iter().map(|(name, entry)| (name.clone(), adapter.delta(name, entry).unwrap().dense())).collect()
}

/// The largest difference of any element, over the largest element of `want`.
pub fn worst(got: &BTreeMap<String, Matrix>, want: &BTreeMap<String, Matrix>) -> f32 {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    let (mut worst, mut largest) = (0f32, 0f32);
    for (name, want) in want {
        assert_eq!((got[name].rows, got[name].cols), (want.rows, want.cols), "{name}");
        for (g, w) in got[name].data.iter().zip(&want.data) {
            worst = worst.max((g - w).abs());
            largest = largest.max(w.abs());
        }
    }
    worst / largest
}

/// Runs the program: exit code, standard output, standard error.
pub fn run<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> (i32, String, String) {
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_qwen-lora")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap_or(-1), text(out.stdout), text(out.stderr))
}

/// Runs the program, which must succeed, and gives its standard output.
pub fn run_ok<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    let (code, out, err) = run(args);
    assert_eq!(code, 0, "{out}{err}");
    out
}

/// A float tensor for a file.
pub fn floats(name: &str, shape: &[usize], values: &[f32]) -> qwen_lora::io::safetensors::RawTensor {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    qwen_lora::io::safetensors::RawTensor {
        name: name.into(),
        dtype: safetensors::Dtype::F32,
        shape: shape.into(),
        bytes,
    }
}

/// Reproducible normals.
pub fn normals(item: u64, n: usize) -> Vec<f32> {
    qwen_lora::rng::Stream::new(11, 0, item, qwen_lora::rng::Purpose::Bench).normals(n, 0.2)
}

/// Bytes of a file, or of every file below a folder, by relative path.
pub fn contents(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut out = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else {
            out.insert(path.strip_prefix(root).unwrap().into(), std::fs::read(&path).unwrap());
        }
    }
    out
}

/// A copy of a folder that a test may link from or spoil.
pub fn copy_tree(from: &Path, to: &Path) {
    for (name, bytes) in contents(from) {
        std::fs::create_dir_all(to.join(&name).parent().unwrap()).unwrap();
        std::fs::write(to.join(&name), bytes).unwrap();
    }
}

/// A LoRA with ranks and alphas that differ from module to module, and a module that the recorded one has not.
pub fn mixed_adapter(path: &Path, table: &ModuleTable) {
    let mut tensors = Vec::new();
    for (i, (name, rank, alpha)) in
        [("transformer_blocks.0.attn.to_q", 2, 3.0), ("transformer_blocks.2.img_mlp.net.2", 5, 2.0), ("img_in", 1, 1.0)]
            .into_iter()
            .enumerate()
    {
        let (out, width) = table.shape(name).unwrap();
        let stem = format!("lora_unet_{}", name.replace('.', "_"));
        let item = 40 + 2 * i as u64;
        tensors.push(floats(&format!("{stem}.lora_down.weight"), &[rank, width], &normals(item, rank * width)));
        tensors.push(floats(&format!("{stem}.lora_up.weight"), &[out, rank], &normals(item + 1, out * rank)));
        tensors.push(floats(&format!("{stem}.alpha"), &[], &[alpha]));
    }
    write(path, tensors, &BTreeMap::new()).unwrap();
}
