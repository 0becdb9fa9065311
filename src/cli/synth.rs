//! `qwen-lora synth`: writes a synthetic model in the published layout.

use crate::cli::print_line;
use crate::error::{Error, Result};
use crate::io::disk::human;
use crate::model::synth::{self, Precision, Preset, SynthOptions};
use std::path::PathBuf;
use std::str::FromStr;

/// Write a synthetic model in the published layout, for tests and benchmarks.
#[derive(Clone, Debug, clap::Args)]
pub struct SynthArgs {
    /// `tiny`: a whole pipeline of a few megabytes; `bench`: the transformer of the speed comparison alone;
    /// `qwen-image`: all names and shapes of the published model, as sparse files of zeros (41 GB + 17 GB apparent)
    #[arg(long, value_enum)]
    pub preset: PresetArg,
    /// The new folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Blocks of the transformer
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Attention heads of the transformer
    #[arg(long, value_name = "N")]
    pub heads: Option<usize>,
    /// Width of an attention head
    #[arg(long, value_name = "N")]
    pub head_dim: Option<usize>,
    /// Rotary dimensions of frame, height and width; they add up to the width of a head
    #[arg(long, value_name = "T,H,W")]
    pub axes: Option<Axes>,
    /// Width of the prompt embeddings
    #[arg(long, value_name = "N")]
    pub joint_dim: Option<usize>,
    /// Storage type of the weights [default: f32, and bf16 for qwen-image]
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// Seed of the random weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// The values of `--preset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PresetArg {
    /// A whole tiny pipeline
    Tiny,
    /// The transformer of the speed comparison
    Bench,
    /// The published names and shapes
    QwenImage,
}

/// The values of `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeArg {
    /// 32 bits
    F32,
    /// bfloat16
    Bf16,
}

/// Three numbers, `T,H,W`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axes(pub [usize; 3]);

impl FromStr for Axes {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers: Vec<usize> = text
            .split(',')
            .map(|n| n.trim().parse().map_err(|_| format!("`{n}` is not a number")))
            .collect::<Result<_, _>>()?;
        numbers.try_into().map(Self).map_err(|n: Vec<usize>| format!("expected three numbers T,H,W, found {}", n.len()))
    }
}

impl SynthArgs {
    /// The pipeline that the arguments describe.
    ///
    /// Errors: dimensions that do not fit together.
    pub fn options(&self) -> Result<SynthOptions> {
        let preset = match self.preset {
            PresetArg::Tiny => Preset::Tiny,
            PresetArg::Bench => Preset::Bench,
            PresetArg::QwenImage => Preset::QwenImage,
        };
        let mut options = SynthOptions::preset(preset);
        let geometry = &mut options.geometry;
        let set = |place: &mut usize, value: Option<usize>| *place = value.unwrap_or(*place);
        set(&mut geometry.num_layers, self.layers);
        set(&mut geometry.num_heads, self.heads);
        set(&mut geometry.head_dim, self.head_dim);
        set(&mut geometry.joint_dim, self.joint_dim);
        geometry.axes = self.axes.map_or(geometry.axes, |a| a.0);
        let sum: usize = geometry.axes.iter().sum();
        if sum != geometry.head_dim {
            return Err(Error::usage("--axes and --head-dim do not fit together")
                .expected(format!("axes that add up to {}", geometry.head_dim), format!("{:?}", geometry.axes))
                .hint("give both, for instance `--head-dim 64 --axes 8,28,28`"));
        }
        options.precision = match self.dtype {
            Some(DtypeArg::F32) => Precision::F32,
            Some(DtypeArg::Bf16) => Precision::Bf16,
            None => options.precision,
        };
        options.seed = self.seed;
        Ok(options)
    }
}

/// Writes the model and says what was made.
pub fn run(args: &SynthArgs) -> Result<()> {
    let options = args.options()?;
    let written = synth::write(&options, &args.out)?;
    let (out, size) = (args.out.display(), human(written.num_bytes));
    print_line(format_args!("wrote {out}: {} tensors in {} files, {size}", written.num_tensors, written.num_files))?;
    match options.preset {
        Preset::Tiny => print_line(format_args!("train on it with `model: {out}`")),
        Preset::Bench => print_line(format_args!("time it with `qwen-lora bench --model {out}`")),
        Preset::QwenImage => print_line("the files are sparse zeros: they take up next to no space"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Weights;
    use crate::model::transformer::TransformerConfig;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: SynthArgs,
    }

    fn options(line: &str) -> std::result::Result<SynthOptions, String> {
        let words = ["synth", "--out", "o"].into_iter().chain(line.split_whitespace());
        let cli = Cli::try_parse_from(words).map_err(|e| e.to_string())?;
        cli.args.options().map_err(|e| e.to_string())
    }

    #[test]
    fn flags_override_the_preset() {
        assert_eq!(options("--preset bench").unwrap(), SynthOptions::preset(Preset::Bench));
        let line = "--preset qwen-image --layers 2 --heads 3 --head-dim 32 --axes 8,12,12 --joint-dim 256 --dtype f32 --seed 7";
        let made = options(line).unwrap();
        let geometry = synth::Geometry { num_layers: 2, num_heads: 3, head_dim: 32, axes: [8, 12, 12], joint_dim: 256 };
        let expected = SynthOptions { preset: Preset::QwenImage, geometry, precision: Precision::F32, seed: 7 };
        assert_eq!(made, expected);
    }

    #[test]
    fn bench_writes_the_transformer_into_the_folder_itself() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("deeper/bench");
        let line = "synth --preset bench --layers 1 --heads 2 --head-dim 16 --axes 4,6,6 --joint-dim 24 --out";
        let mut cli = Cli::parse_from(line.split(' ').chain(["unused"]));
        cli.args.out = out.clone();
        run(&cli.args).unwrap();
        let tensors = TransformerConfig::from_file(&out.join("config.json")).unwrap().tensors();
        Weights::open_folder(&out).unwrap().check(&tensors, |_| false).unwrap();
        assert_eq!(tensors.len(), 13 + 32);
        assert!(run(&cli.args).unwrap_err().to_string().contains("nothing is overwritten"));
    }

    #[test]
    fn wrong_flags_are_named() {
        for (line, word) in [
            ("--preset huge", "huge"),
            ("--preset tiny --axes 8,8", "three numbers"),
            ("--preset tiny --axes 8,x,8", "`x` is not a number"),
            ("--preset tiny --axes 8,4,8", "axes that add up to 16"),
            ("--preset tiny --head-dim 32", "--axes and --head-dim"),
            ("--preset tiny --dtype f16", "f16"),
        ] {
            let error = options(line).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
