//! `qwen-lora generate`: text to image.

use crate::cli::adapters::path_and_weight;
use crate::cli::route::Routing;
use crate::cli::sampling::Sampling;
use crate::cli::{Threads, print_line};
use crate::device;
use crate::error::{Error, Result, nearest};
use crate::io::png;
use crate::progress::tell;
use crate::sample::generate::Job;
use crate::sample::recipe::{KEYWORD, PROGRAM};
use crate::sample::{Generator, LoraUse, Recipe, Timing, grid, label};
use clap::Args;
use image::RgbImage;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Make images from prompts, with any number of adapters.
#[derive(Args, Clone, Debug)]
pub struct GenerateArgs {
    /// Hub id, folder in the diffusers layout, `synthetic:world` or `synthetic:tiny` [default: Qwen/Qwen-Image]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// A file (safetensors, also fp8 with scales, or GGUF) or folder in place of the model's own transformer
    #[arg(long, value_name = "FILE")]
    transformer: Option<String>,
    /// Take a hub model from the local cache only
    #[arg(long)]
    offline: bool,
    /// What to show (repeatable); also in parts, see `qwen-lora prompt --help`
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// A UTF-8 text file with one prompt a line
    #[arg(long, value_name = "FILE", conflicts_with = "prompts")]
    prompt_file: Option<PathBuf>,
    /// An adapter file of any spelling, with its weight: `style.safetensors:0.8` (repeatable) [default weight: 1]
    #[arg(long = "lora", value_name = "FILE[:WEIGHT]")]
    loras: Vec<String>,
    /// A routes file: each prompt gets the adapters that its words call for, see `qwen-lora route --help`
    #[arg(long, value_name = "ROUTES.yaml")]
    auto_lora: Option<PathBuf>,
    /// One image for each of these factors on all adapter weights, and a grid: `0,0.5,1`
    #[arg(long, value_name = "LIST", value_delimiter = ',', allow_hyphen_values = true)]
    strengths: Vec<f64>,
    #[command(flatten)]
    sampling: Sampling,
    /// Make again what is in this image, as far as no other argument says otherwise
    #[arg(long, value_name = "IMAGE.png")]
    from: Option<PathBuf>,
    /// Folder for the images, or for a single one its file ending in .png
    #[arg(long, value_name = "PATH", default_value = "generated")]
    output: PathBuf,
    /// Also put all images into one, `grid.png`
    #[arg(long)]
    grid: bool,
    /// Replace images that are there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    threads: Threads,
    /// Show no progress and no notes
    #[arg(long)]
    quiet: bool,
    /// Print what was made as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
///
/// Errors: usage (2) for everything that is wrong with the arguments, before any network runs; run (1) otherwise.
pub fn run(args: &GenerateArgs) -> Result<()> {
    args.threads.start()?;
    args.sampling.check()?;
    let compute = device::open(args.sampling.device)?;
    let mut recipe = recipe(args, compute.device.is_cpu())?;
    let routing = args.auto_lora.as_deref().map(|path| Routing::new(path, &mut recipe)).transpose()?;
    let generator = Generator::open(recipe, args.offline, compute.device)?;
    if let Some(routing) = &routing {
        routing.check_bases(&generator.recipe().base_fingerprint)?;
        if !args.quiet {
            routing.explanation().for_each(|line| tell(format_args!("{line}")));
        }
    }
    if !args.quiet {
        compute.notes.iter().for_each(|note| tell(format_args!("note: {note}")));
        generator.notes().iter().for_each(|note| tell(format_args!("warning: {note}")));
    }
    let jobs = generator.jobs();
    let with_grid = args.grid || !generator.recipe().strengths.is_empty();
    let targets = Targets::new(args, generator.recipe(), &jobs, with_grid)?;

    let mut cells: Vec<RgbImage> = Vec::new();
    let timing = generator.run(args.sampling.batch_size, args.quiet, |image| {
        let Job { prompt, seed, strength } = image.job;
        let text = generator.recipe().single(prompt, seed, strength).to_text();
        png::write(&targets.images[image.index], &image.pixels, &[(KEYWORD, &text)])?;
        if targets.grid.is_some() {
            cells.push(image.pixels);
        }
        Ok(())
    })?;
    if let Some(path) = &targets.grid {
        png::write(path, &draw_grid(generator.recipe(), &cells), &[(KEYWORD, &generator.recipe().to_text())])?;
    }
    report(args, generator.recipe(), &jobs, &targets, timing)
}

/// The recipe that the arguments ask for: their own values, then those of `--from`, then the defaults.
fn recipe(args: &GenerateArgs, on_cpu: bool) -> Result<Recipe> {
    let base = match &args.from {
        Some(path) => Recipe::read(path)?,
        None => Recipe { dtype: Sampling::dtype(on_cpu).into(), ..Recipe::of("Qwen/Qwen-Image", Vec::new()) },
    };
    let mut recipe = Recipe { program: PROGRAM.into(), ..base };
    if let Some(model) = &args.model {
        (recipe.model, recipe.revision, recipe.base_fingerprint) = (model.clone(), None, String::new());
        recipe.transformer = None;
    }
    if let Some(transformer) = &args.transformer {
        (recipe.transformer, recipe.base_fingerprint) = (Some(transformer.clone()), String::new());
    }
    if let Some(revision) = &args.revision {
        (recipe.revision, recipe.base_fingerprint) = (Some(revision.clone()), String::new());
    }
    match &args.prompt_file {
        Some(path) => recipe.prompts = read_prompts(path)?,
        None if !args.prompts.is_empty() => recipe.prompts = args.prompts.clone(),
        None if args.from.is_none() => {
            return Err(Error::usage("there is no prompt").hint("give one with `--prompt` or `--prompt-file`"));
        }
        None => {}
    }
    if !args.loras.is_empty() {
        recipe.loras = args.loras.iter().map(|text| parse_lora(text)).collect::<Result<_>>()?;
    }
    if recipe.prompts.len() != recipe.routed.len() {
        recipe.routed.clear();
    }
    if !args.strengths.is_empty() {
        recipe.strengths = args.strengths.clone();
    }
    args.sampling.apply(&mut recipe)?;
    Ok(recipe)
}

/// One prompt a line; empty lines are skipped. Errors: unreadable, not UTF-8, no prompt.
pub(super) fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read the prompt file", path, e).into_usage())?;
    let text = String::from_utf8(bytes).map_err(|e| {
        Error::usage(format!("the prompt file `{}` is not UTF-8 text", path.display()))
            .detail(format!("the first bad byte is at offset {}", e.utf8_error().valid_up_to()))
            .hint("save it as UTF-8")
    })?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty());
    let prompts: Vec<String> = lines.map(String::from).collect();
    if prompts.is_empty() {
        return Err(Error::usage(format!("the prompt file `{}` is empty", path.display()))
            .expected("one prompt a line", "none"));
    }
    Ok(prompts)
}

/// `FILE` or `FILE:WEIGHT`. Errors: no such file, with the nearest name beside it; a bad weight.
pub fn parse_lora(text: &str) -> Result<LoraUse> {
    let (file, weight) = path_and_weight(text)?;
    if Path::new(file).exists() {
        return Ok(LoraUse { file: file.into(), weight, hash: String::new() });
    }
    let error = Error::usage(format!("no adapter at `{file}`"));
    Err(match near_sibling(Path::new(file)) {
        Some(near) => error.hint(format!("the nearest name there is `{near}`")),
        None => error.hint("`--lora` wants FILE or FILE:WEIGHT, such as style.safetensors:0.8"),
    })
}

fn near_sibling(path: &Path) -> Option<String> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let names: Vec<String> =
        std::fs::read_dir(parent).ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    nearest(path.file_name()?.to_str()?, names.iter().map(String::as_str)).map(String::from)
}

/// The files that will be written.
struct Targets {
    images: Vec<PathBuf>,
    grid: Option<PathBuf>,
}

impl Targets {
    /// Errors (usage): several images for one file; a file that is there, without `--overwrite`.
    fn new(args: &GenerateArgs, recipe: &Recipe, jobs: &[Job], with_grid: bool) -> Result<Self> {
        let output = &args.output;
        let is_file = output.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
        let targets = match is_file {
            true if jobs.len() == 1 && !with_grid => Self { images: vec![output.clone()], grid: None },
            true => {
                return Err(Error::usage(format!("`--output {}` is one file", output.display())).expected(
                    "a folder",
                    format!("{} images{}", jobs.len(), if with_grid { " and a grid" } else { "" }),
                ));
            }
            false => Self {
                images: jobs.iter().map(|job| output.join(file_name(recipe, job))).collect(),
                grid: with_grid.then(|| output.join("grid.png")),
            },
        };
        let all: Vec<&PathBuf> = targets.images.iter().chain(&targets.grid).collect();
        if let (false, Some(there)) = (args.overwrite, all.iter().find(|path| path.exists())) {
            return Err(Error::usage(format!("`{}` is there already", there.display()))
                .hint("give another `--output`, or replace images with `--overwrite`"));
        }
        if let Some(twice) = all.iter().enumerate().find_map(|(i, path)| all[..i].contains(path).then_some(path)) {
            return Err(Error::usage(format!("two images would have the name `{}`", twice.display()))
                .hint("give each seed and strength once"));
        }
        let folder = if is_file { output.parent() } else { Some(output.as_path()) };
        if let Some(folder) = folder.filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e).into_usage())?;
        }
        Ok(targets)
    }
}

/// `001-42.png`: number of the prompt and seed; in a sweep `001-42-x0.5.png`.
fn file_name(recipe: &Recipe, job: &Job) -> String {
    let digits = recipe.prompts.len().to_string().len().max(3);
    let strength = job.strength.map(|s| format!("-x{s}")).unwrap_or_default();
    format!("{:0digits$}-{}{strength}.png", job.prompt + 1, job.seed)
}

/// Prompts by seeds; in a sweep prompts and seeds by strengths. Prompts that the font cannot write go by their number.
fn draw_grid(recipe: &Recipe, cells: &[RgbImage]) -> RgbImage {
    let prompt = |i: usize| label::writable(&recipe.prompts[i], &format!("prompt {}", i + 1)).to_string();
    let prompts = 0..recipe.prompts.len();
    let seeds = recipe.seeds.iter().map(|seed| format!("seed {seed}"));
    if recipe.strengths.is_empty() {
        return grid::draw(&seeds.collect::<Vec<_>>(), &prompts.map(prompt).collect::<Vec<_>>(), cells);
    }
    let seeds: Vec<String> = seeds.collect();
    let rows: Vec<String> =
        prompts.flat_map(|i| seeds.iter().map(move |seed| format!("{seed}: {}", prompt(i)))).collect();
    let columns: Vec<String> = recipe.strengths.iter().map(|s| format!("strength {s}")).collect();
    grid::draw(&columns, &rows, cells)
}

fn report(args: &GenerateArgs, recipe: &Recipe, jobs: &[Job], targets: &Targets, timing: Timing) -> Result<()> {
    let evaluations = if recipe.guidance > 1.0 { 2 } else { 1 };
    let step_s = timing.denoise_s / (jobs.len() * recipe.steps) as f64;
    if args.json {
        let image = |(job, path): (&Job, &PathBuf)| json!({"path": path, "prompt": recipe.prompts[job.prompt], "seed": job.seed, "strength": job.strength});
        return print_line(json!({
            "images": jobs.iter().zip(&targets.images).map(image).collect::<Vec<_>>(),
            "grid": targets.grid,
            "recipe": recipe,
            "forward_passes_per_step": evaluations,
            "seconds": {
                "encode": timing.encode_s,
                "load": timing.load_s,
                "denoise": timing.denoise_s,
                "decode": timing.decode_s,
                "per_image_and_step": step_s,
            },
        }));
    }
    if args.quiet {
        return Ok(());
    }
    targets.images.iter().chain(&targets.grid).try_for_each(|path| print_line(path.display()))?;
    print_line(format!("{} in {:.1} s, {step_s:.3} s a step", count(jobs.len()), total(timing)))
}

fn total(timing: Timing) -> f64 {
    timing.encode_s + timing.load_s + timing.denoise_s + timing.decode_s
}

fn count(images: usize) -> String {
    if images == 1 { "1 image".into() } else { format!("{images} images") }
}
