//! Loading: all published names and shapes from headers alone, and one clear error for each thing that can be wrong
//! with weight files.

use candle_core::{DType, Device, Tensor};
use qwen_lora::io::Weights;
use qwen_lora::io::safetensors::{MappedFile, RawTensor, write};
use qwen_lora::model::source::{ModelSource, ModelSpec};
use qwen_lora::model::synth::{self, Preset, SynthOptions};
use qwen_lora::model::text_encoder::TextEncoderConfig;
use qwen_lora::model::transformer::TransformerConfig;
use qwen_lora::model::vae::VaeConfig;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Writes the published layout as sparse files; `None`, with a message, where the file system has none.
fn published() -> Option<(TempDir, synth::Written)> {
    let dir = tempfile::tempdir().unwrap();
    match synth::write(&SynthOptions::preset(Preset::QwenImage), &dir.path().join("pipe")) {
        Ok(written) => Some((dir, written)),
        Err(e) if e.to_string().contains("no sparse files") => {
            eprintln!("SKIPPED: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Resident memory of this process in bytes, where the system tells.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Bytes that a folder takes up.
fn occupied_bytes(folder: &Path) -> u64 {
    let sizes = std::fs::read_dir(folder).unwrap().map(Result::unwrap).map(|entry| {
        if entry.path().is_dir() {
            return occupied_bytes(&entry.path());
        }
        #[cfg(unix)]
        let size = std::os::unix::fs::MetadataExt::blocks(&entry.metadata().unwrap()) * 512;
        #[cfg(not(unix))]
        let size = entry.metadata().unwrap().len();
        size
    });
    sizes.sum()
}

/// Replaces `from` by `to`, of the same length, in the header of a safetensors file.
fn edit_header(path: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut length = [0; 8];
    file.read_exact(&mut length).unwrap();
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    file.read_exact(&mut header).unwrap();
    let header = String::from_utf8(header).unwrap();
    assert!(header.contains(from), "`{from}` is not in the header");
    file.seek(SeekFrom::Start(8)).unwrap();
    file.write_all(header.replacen(from, to, 1).as_bytes()).unwrap();
}

#[test]
fn all_published_tensors_are_accepted_from_their_headers_and_a_wrong_shape_deep_inside_is_named() {
    let Some((dir, written)) = published() else { return };
    let pipe = dir.path().join("pipe");
    assert!(occupied_bytes(&pipe) < 10 << 20, "sparse files take up next to nothing");
    // 1,933 + 194 + 729 tensors; 9 + 1 + 4 files; 40.86 + 0.25 + 16.58 GB and the headers.
    assert_eq!((written.num_tensors, written.num_files), (2856, 14));
    assert_eq!(written.num_bytes / 100_000_000, 576);

    let before = resident_bytes();
    let start = std::time::Instant::now();
    let pipeline = ModelSource::resolve(&ModelSpec::new(pipe.to_str().unwrap())).unwrap();
    let transformer = TransformerConfig::from_file(&pipeline.transformer.config).unwrap().tensors();
    let weights = pipeline.transformer.open().unwrap();
    assert_eq!((transformer.len(), weights.files().len()), (1933, 9));
    weights.check(&transformer, |_| false).unwrap();
    assert_eq!(pipeline.transformer.files().unwrap().len(), 1 + 9);
    let vae = VaeConfig::from_file(&pipeline.vae.config).unwrap().tensors();
    pipeline.vae.open().unwrap().check(&vae, |_| false).unwrap();
    let text_encoder = TextEncoderConfig::from_file(&pipeline.text_encoder.config).unwrap().tensors();
    pipeline.text_encoder.open().unwrap().check(&text_encoder, |_| false).unwrap();
    // A tensor from the depth can be read without the rest.
    let norm = weights.get("transformer_blocks.37.attn.norm_k.weight", &[128], DType::F32, &Device::Cpu).unwrap();
    assert_eq!(norm.to_vec1::<f32>().unwrap(), [0.0; 128]);
    let elapsed = start.elapsed();
    if let (Some(before), Some(after)) = (before, resident_bytes()) {
        let grown = after.saturating_sub(before);
        eprintln!("opened and checked 58 GB of headers in {elapsed:.2?}, {} MB more resident", grown / 1_000_000);
        assert!(grown < 100_000_000, "{grown} bytes");
    }

    let name = "transformer_blocks.37.attn.to_q.weight";
    let shard: PathBuf = weights.file_of(name).unwrap().into();
    drop(weights);
    let offsets_of = |shape: &str| format!("\"shape\":{shape}}},\"transformer_blocks.37.attn.to_v.bias\"");
    edit_header(&shard, &offsets_of("[3072,3072]"), &offsets_of("[6144,1536]"));
    let error = pipeline.transformer.open().unwrap().check(&transformer, |_| false).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let file = shard.display();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot load `{name}` from `{file}`\n  expected shape [3072, 3072], found [6144, 1536]\n\
             hint: the weights do not belong to the config.json beside them"
        )
    );
}

#[test]
fn missing_shards_and_tensors_that_the_index_names_are_named() {
    let Some((dir, _)) = published() else { return };
    let folder = dir.path().join("pipe/transformer");
    let refused = || Weights::open_folder(&folder).err().expect("this must be refused").to_string();
    let shard = |i: usize| folder.join(format!("diffusion_pytorch_model-{i:05}-of-00009.safetensors"));

    let name = "transformer_blocks.0.attn.add_k_proj.bias";
    edit_header(&shard(1), name, &name.replace("add_k", "add_x"));
    assert_eq!(
        refused(),
        format!(
            "cannot load `{name}` from `{}`\n  expected the tensor there, as \
             `{}/diffusion_pytorch_model.safetensors.index.json` says, found no tensor of that name\n\
             hint: the index and the shards are of different downloads: fetch them again",
            shard(1).display(),
            folder.display()
        )
    );
    let length = std::fs::metadata(shard(4)).unwrap().len();
    OpenOptions::new().write(true).open(shard(4)).unwrap().set_len(length - 1).unwrap();
    let cut = refused();
    assert!(cut.contains(&format!("`{}` is not a whole safetensors file", shard(4).display())), "{cut}");
    assert!(cut.contains(&format!("expected {length} bytes, as its header says, found {} bytes", length - 1)), "{cut}");
    std::fs::remove_file(shard(7)).unwrap();
    let missing = refused();
    assert!(missing.contains(&format!("`{}` is missing", shard(7).display())), "{missing}");
    assert!(missing.contains("index.json` names it") && missing.contains("\nhint: "), "{missing}");
}

/// A folder with a small transformer, its config, and its weights in one file.
struct Small {
    dir: TempDir,
    file: PathBuf,
    expected: Vec<(String, Vec<usize>)>,
}

fn small() -> Small {
    let dir = tempfile::tempdir().unwrap();
    let pipe = synth::tiny_in(dir.path()).unwrap();
    let expected = TransformerConfig::from_file(&pipe.join("transformer/config.json")).unwrap().tensors();
    Small { dir, file: pipe.join("transformer/diffusion_pytorch_model.safetensors"), expected }
}

impl Small {
    /// Rewrites the file with other tensors.
    fn rewrite(&self, change: impl Fn(&str) -> Option<String>) {
        let file = MappedFile::open(&self.file).unwrap();
        let tensors = file.names().into_iter().filter_map(|name| {
            let (dtype, shape) = file.info(&name).unwrap();
            Some(RawTensor {
                name: change(&name)?,
                dtype,
                shape: shape.into(),
                bytes: file.bytes(&name).unwrap().into(),
            })
        });
        let tensors = tensors.collect();
        write(&self.file, tensors, &BTreeMap::new()).unwrap();
    }

    fn refused(&self) -> String {
        let folder = self.file.parent().unwrap();
        let result = Weights::open_folder(folder).and_then(|w| w.check(&self.expected, |_| false));
        let error = result.expect_err("this must be refused");
        assert_eq!(error.exit_code(), 2);
        error.to_string().replace(&*self.dir.path().to_string_lossy(), "")
    }

    fn assert_refused(&self, parts: &[&str]) {
        let text = self.refused();
        for part in parts {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
        assert!(text.contains("\nhint: "), "{text}");
    }
}

const TO_V: &str = "transformer_blocks.1.attn.to_v.weight";

#[test]
fn a_missing_a_misnamed_and_a_stray_tensor_are_told_apart() {
    let small = small();
    small.rewrite(|name| (name != TO_V).then(|| name.into()));
    small.assert_refused(&[
        &format!("cannot load `{TO_V}` from"),
        "expected a tensor of shape [64, 64], found no tensor of that name",
        "the file is incomplete",
    ]);
    // Among a hundred similar names, the one that has no other meaning is the misnamed one.
    let misnamed = "transformer_blocks.1.attn.to_val.weight";
    let small = self::small();
    small.rewrite(|name| Some(if name == TO_V { misnamed.into() } else { name.into() }));
    small.assert_refused(&[
        &format!("cannot load `{TO_V}` from"),
        &format!("the nearest name there is `{misnamed}` in `"),
        "diffusion_pytorch_model.safetensors",
    ]);
    let small = self::small();
    small.rewrite(|name| Some(name.into()));
    Weights::open_folder(small.file.parent().unwrap()).unwrap().check(&small.expected[1..], |_| true).unwrap();
    let mut fewer = small.expected.clone();
    fewer.retain(|(name, _)| name != TO_V);
    let small = Small { expected: fewer, ..small };
    small.assert_refused(&[
        &format!("unknown tensor `{TO_V}` in `"),
        "nearest known name is `transformer_blocks.1.attn.to_",
    ]);
}

#[test]
fn files_that_are_something_else_are_recognised() {
    let small = small();
    let whole = std::fs::read(&small.file).unwrap();
    std::fs::write(&small.file, &whole[..whole.len() - 100]).unwrap();
    let lengths = format!("expected {} bytes, as its header says, found {} bytes", whole.len(), whole.len() - 100);
    small.assert_refused(&["is not a whole safetensors file", &lengths, "truncated or corrupt"]);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n";
    for (bytes, says) in [
        (pointer.as_bytes(), "git-lfs pointer"),
        (b"PK\x03\x04pickle......................", "PyTorch pickle"),
        (b"", "the file is empty"),
    ] {
        File::create(&small.file).unwrap().write_all(bytes).unwrap();
        small.assert_refused(&["diffusion_pytorch_model.safetensors` is not a whole safetensors file", says]);
    }
    std::fs::write(&small.file, b"GGUF\x03......................").unwrap();
    small.assert_refused(&["diffusion_pytorch_model.safetensors` is not a GGUF file that can be read", "version"]);
    let a = Tensor::zeros((4, 64), DType::F32, &Device::Cpu).unwrap();
    let lora = |name: &str| RawTensor::from_tensor(format!("transformer.{TO_V}").replace("weight", name), &a).unwrap();
    write(&small.file, vec![lora("lora_A.weight"), lora("lora_B.weight")], &BTreeMap::new()).unwrap();
    small.assert_refused(&["cannot load `img_in.weight`", "looks like a LoRA file", "wants a base model"]);

    let small = self::small();
    small.rewrite(|name| Some(format!("net.{name}")));
    small.assert_refused(&["cannot load `img_in.weight`", "files whose names have `net.` before them"]);
    let small = self::small();
    let file = MappedFile::open(&small.file).unwrap();
    let eighth = |name: String| {
        let shape = file.info(&name).unwrap().1.to_vec();
        RawTensor { name, dtype: Dtype::F8_E4M3, bytes: vec![0; shape.iter().product()], shape }
    };
    write(&small.file, file.names().into_iter().map(eighth).collect(), &BTreeMap::new()).unwrap();
    small.assert_refused(&["cannot load `img_in.", "found fp8 without `img_in.", "a bare cast to fp8", "bf16 file"]);
    let small = self::small();
    std::fs::copy(&small.file, small.file.with_file_name("copy.safetensors")).unwrap();
    let error = small.refused();
    assert!(error.contains("stands in two files") && error.contains("copy.safetensors"), "{error}");
    std::fs::remove_file(&small.file).unwrap();
    std::fs::rename(small.file.with_file_name("copy.safetensors"), small.file.with_extension("bin")).unwrap();
    small.assert_refused(&["no weights in", "expected *.safetensors, found config.json, diffusion_pytorch_model.bin"]);
}
