//! The manifest of the compiled kernels, which `scripts/kernels/build.py` writes beside them.
//!
//! A kernel takes its `arguments` in order, then two pointers that Triton adds: global scratch and profile scratch, null
//! where a target says 0 bytes. Its block has `32 * num_warps` threads. Above 48 KiB, shared memory must be allowed for the
//! function before it is launched (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`).

use crate::error::{Error, Result};
use crate::kernels::cuda::grid::Expression;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// All compiled kernels.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// Version of the compiler.
    pub triton: String,
    /// The kernels.
    pub kernels: Vec<Kernel>,
}

/// One kernel in one variant.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Unique name: the entry and the variant's suffix.
    pub name: String,
    /// The function in the compiled module.
    pub entry: String,
    /// Source files that the machine code depends on, from the repository's root.
    pub sources: Vec<String>,
    /// SHA-256 of these files, one after the other.
    pub source_sha256: String,
    /// What the function takes.
    pub arguments: Vec<Argument>,
    /// Blocks in up to three dimensions.
    grid: Vec<Expression>,
    /// Names that the grid wants besides arguments and constants.
    pub grid_arguments: Vec<String>,
    /// The compiled forms.
    pub targets: Vec<Target>,
}

/// One argument.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Argument {
    /// Its name in the source.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub ty: ArgumentType,
    /// The caller's promise that the address in bytes, or the number, is a multiple of 16. The machine code relies on it.
    pub multiple_of_16: bool,
}

/// The type of an argument.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum ArgumentType {
    /// Pointer to bf16.
    #[serde(rename = "*bf16")]
    Bf16Pointer,
    /// Pointer to f16.
    #[serde(rename = "*fp16")]
    F16Pointer,
    /// Pointer to f32.
    #[serde(rename = "*fp32")]
    F32Pointer,
    /// Pointer to f64.
    #[serde(rename = "*fp64")]
    F64Pointer,
    /// Pointer to i8.
    #[serde(rename = "*i8")]
    I8Pointer,
    /// Pointer to i32.
    #[serde(rename = "*i32")]
    I32Pointer,
    /// Pointer to i64.
    #[serde(rename = "*i64")]
    I64Pointer,
    /// A number.
    #[serde(rename = "i32")]
    I32,
    /// A number.
    #[serde(rename = "i64")]
    I64,
    /// A number.
    #[serde(rename = "fp32")]
    F32,
    /// A number.
    #[serde(rename = "fp64")]
    F64,
}

impl ArgumentType {
    /// Whether it is the address of a buffer.
    pub fn is_pointer(self) -> bool {
        !matches!(self, Self::I32 | Self::I64 | Self::F32 | Self::F64)
    }
}

/// Machine code, or text that the driver compiles.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum TargetKind {
    /// Machine code for one architecture.
    Cubin,
    /// PTX for the architecture and all later ones.
    Ptx,
}

/// A kernel compiled for one architecture.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Cubin or PTX.
    pub kind: TargetKind,
    /// Compute capability, ten times the major and the minor number: 80, 89, 90.
    pub arch: u32,
    /// The file's name in `src/kernels/cuda/cubin/`.
    pub file: String,
    /// Its SHA-256.
    pub sha256: String,
    /// Tile sizes and switches compiled in.
    pub constants: BTreeMap<String, i64>,
    /// Warps of a block.
    pub num_warps: u32,
    /// Stages of the software pipeline.
    pub num_stages: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Global scratch of a block.
    pub global_scratch_bytes: u32,
    /// Profile scratch of a block.
    pub profile_scratch_bytes: u32,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread that did not fit in registers.
    pub spilled_bytes: u32,
}

impl Manifest {
    /// The manifest in this program.
    pub fn embedded() -> &'static Self {
        static MANIFEST: OnceLock<Manifest> = OnceLock::new();
        MANIFEST.get_or_init(|| {
            serde_json::from_str(include_str!("cubin/manifest.json")).expect("a test reads this very file")
        })
    }

    /// The kernel of a name.
    ///
    /// Errors: there is none.
    pub fn kernel(&self, name: &str) -> Result<&Kernel> {
        self.kernels.iter().find(|kernel| kernel.name == name).ok_or_else(|| {
            Error::run(format!("this program carries no GPU kernel `{name}`"))
                .hint("build.py writes the manifest: scripts/kernels/build.py")
        })
    }
}

impl Kernel {
    /// What runs on a card of this compute capability (times ten): the cubin made for it, else PTX that its driver
    /// compiles. `None` for cards before 8.0.
    ///
    /// An sm_90 cubin uses instructions that only 9.0 has, so it serves no other card; a cubin for sm_80 would run on
    /// 8.6, but the driver's own compilation for the card is at least as good.
    pub fn target(&self, capability: u32) -> Option<&Target> {
        let cubin = |t: &&Target| t.kind == TargetKind::Cubin && t.arch == capability;
        let ptx = |t: &&Target| t.kind == TargetKind::Ptx && t.arch <= capability;
        self.targets.iter().find(cubin).or_else(|| self.targets.iter().find(ptx))
    }

    /// The number of blocks in each dimension. `value` gives the numbers among the arguments and the grid arguments.
    ///
    /// Errors: a value is missing, or the result is no positive number that a grid takes.
    pub fn grid(&self, target: &Target, value: impl Fn(&str) -> Option<i64>) -> Result<(u32, u32, u32)> {
        let mut blocks = [1u32; 3];
        for (blocks, expression) in blocks.iter_mut().zip(&self.grid) {
            let number = expression
                .evaluate(&|name| target.constants.get(name).copied().or_else(|| value(name)))
                .map_err(|error| error.detail(format!("in the grid of kernel `{}`", self.name)))?;
            *blocks = u32::try_from(number).ok().filter(|&n| n > 0).ok_or_else(|| {
                Error::run(format!("kernel `{}` cannot run in {number} blocks", self.name))
                    .detail(format!("from `{expression}`"))
            })?;
        }
        Ok(blocks.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};
    use std::collections::BTreeSet;
    use std::path::Path;

    const ROOT: &str = env!("CARGO_MANIFEST_DIR");

    fn hex_sha256(files: impl IntoIterator<Item = impl AsRef<Path>>) -> String {
        let mut hash = Sha256::new();
        for file in files {
            hash.update(std::fs::read(Path::new(ROOT).join(file)).unwrap());
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn every_kernel_was_compiled_from_the_sources_that_are_here() {
        for kernel in &Manifest::embedded().kernels {
            let hash = hex_sha256(&kernel.sources);
            assert_eq!(hash, kernel.source_sha256, "`{}`: run scripts/kernels/build.py", kernel.name);
        }
    }

    #[test]
    fn the_files_are_those_that_the_manifest_names_and_no_more() {
        let folder = Path::new("src/kernels/cuda/cubin");
        let mut named = BTreeSet::from(["manifest.json".to_string(), "files.rs".to_string()]);
        for target in Manifest::embedded().kernels.iter().flat_map(|kernel| &kernel.targets) {
            assert_eq!(hex_sha256([folder.join(&target.file)]), target.sha256, "{}", target.file);
            assert!(named.insert(target.file.clone()), "{} is named twice", target.file);
        }
        let there = std::fs::read_dir(Path::new(ROOT).join(folder)).unwrap();
        let there: BTreeSet<_> = there.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(there, named);
    }

    #[test]
    fn every_kernel_has_three_cubins_and_ptx_that_fit_the_cards() {
        let manifest = Manifest::embedded();
        let names: BTreeSet<_> = manifest.kernels.iter().map(|kernel| &kernel.name).collect();
        assert_eq!(names.len(), manifest.kernels.len());
        for kernel in &manifest.kernels {
            let target = |capability| kernel.target(capability).map(|t| (t.kind, t.arch));
            let (cubin, ptx) = (TargetKind::Cubin, TargetKind::Ptx);
            assert_eq!([80, 89, 90].map(target), [80, 89, 90].map(|arch| Some((cubin, arch))), "{}", kernel.name);
            assert_eq!([75, 86, 120].map(target), [None, Some((ptx, 80)), Some((ptx, 80))], "{}", kernel.name);
            for target in &kernel.targets {
                let limit = if target.arch == 90 { 227 << 10 } else { 99 << 10 };
                assert!(target.shared_bytes <= limit && target.spilled_bytes == 0, "{}", target.file);
                assert_eq!((target.global_scratch_bytes, target.profile_scratch_bytes), (0, 0), "{}", target.file);
            }
        }
    }

    #[test]
    fn grids_use_only_what_is_declared() {
        for kernel in &Manifest::embedded().kernels {
            let number = |name: &str| {
                let argument = kernel.arguments.iter().any(|a| a.name == name && !a.ty.is_pointer());
                (argument || kernel.grid_arguments.iter().any(|g| g == name)).then_some(1000)
            };
            for target in &kernel.targets {
                assert!((1..=3).contains(&kernel.grid.len()));
                kernel.grid(target, number).unwrap();
            }
        }
        let kernel = Manifest::embedded().kernel("gelu_forward").unwrap();
        let value = |name: &str| [("rows", 7), ("width", 2049)].iter().find(|v| v.0 == name).map(|v| v.1);
        assert_eq!(kernel.grid(&kernel.targets[0], value).unwrap(), (7, 2, 1));
        let error = kernel.grid(&kernel.targets[0], |_| None).unwrap_err().to_string();
        assert!(error.contains("`rows`") && error.contains("gelu_forward"), "{error}");
    }
}
