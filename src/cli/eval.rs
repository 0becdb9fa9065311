//! `qwen-lora eval`: what an adapter does, in numbers.

use crate::cli::generate::{parse_lora, read_prompts};
use crate::cli::sampling::Sampling;
use crate::cli::{Threads, print_line};
use crate::config::{Config, ImageSize, TrainingMode};
use crate::device;
use crate::error::{Error, Result};
use crate::eval::generated::{self, Run, Variant};
use crate::eval::rating::{self, Sheet};
use crate::eval::{Comparison, Networks, Places, Set, measure, output, page};
use crate::io::write_atomic;
use crate::progress::tell;
use crate::sample::{LoraUse, Recipe};
use crate::train::run_dir::{Found, RunDir};
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Measure what an adapter does: two folders of pictures, a model with and without adapters, or the checkpoints of a
/// run.
///
/// Writes table.csv, pictures.csv (each picture by itself), results.json and report.html. What cannot be measured is
/// named with the reason: networks that judge pictures do not ship with this program.
#[derive(Args, Clone, Debug)]
pub struct EvalArgs {
    /// A folder of pictures
    #[arg(long, value_name = "FOLDER", requires = "against", conflicts_with_all = ["model", "run"])]
    images: Option<PathBuf>,
    /// The folder to compare it with; pictures of one name are pairs
    #[arg(long, value_name = "FOLDER", requires = "images")]
    against: Option<PathBuf>,
    /// Compare the folders as wholes, without pairs
    #[arg(long, requires = "images")]
    sets_only: bool,
    /// Make the pictures with this model: a hub id, a folder in the diffusers layout, `synthetic:world` or `synthetic:tiny`
    #[arg(long, value_name = "MODEL", requires = "loras", conflicts_with = "run")]
    model: Option<String>,
    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REVISION", requires = "model")]
    revision: Option<String>,
    /// An adapter to compare with the base model, with its weight: `style.safetensors:0.8` (repeatable)
    #[arg(long = "lora", value_name = "FILE[:WEIGHT]", requires = "model")]
    loras: Vec<String>,
    /// Make the pictures with every checkpoint of this run directory and its base model
    #[arg(long, value_name = "FOLDER")]
    run: Option<PathBuf>,
    /// A UTF-8 text file with one prompt a line [default for a run: the prompts of its previews]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Word that the adapter was trained on: prompts are compared with and without it, to measure bleed
    #[arg(long, value_name = "WORD")]
    trigger: Option<String>,
    /// Ordinary word for the same thing, put in the trigger's place for comparison
    #[arg(long, value_name = "WORD", requires = "trigger")]
    class: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
    /// A folder of pictures that FID and KID are distances to [default: the other folder, or the base model's pictures]
    #[arg(long, value_name = "FOLDER")]
    reference: Option<PathBuf>,
    /// InceptionV3 of pytorch-fid, for FID and KID: a safetensors file, OWNER/NAME or OWNER/NAME:FILE on the hub
    #[arg(long, value_name = "WEIGHTS")]
    inception: Option<String>,
    /// AlexNet and the heads of LPIPS: one safetensors file, or two with a comma between; or hub ids
    #[arg(long, value_name = "WEIGHTS", value_delimiter = ',')]
    lpips: Vec<String>,
    /// CLIP for CLIPScore, and Chinese CLIP for Chinese prompts (repeatable): a folder, or OWNER/NAME on the hub
    #[arg(long, value_name = "MODEL")]
    clip: Vec<String>,
    /// A pose network that flags wrong bodies: `posenet` or `world` (built in), `openpose`, or the file of a heatmap network; not the
    /// one that the adapter was trained with
    #[arg(long, value_name = "NETWORK")]
    pose: Option<String>,
    /// Also write rating.html, a page on which people compare the pictures without knowing which is which
    #[arg(long)]
    rate: bool,
    /// What they are asked about each pair [default: 手脚质量,面部细节,风格一致性]
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "rate")]
    criteria: Vec<String>,
    /// Decides order and sides on the rating page
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    rate_seed: u64,
    /// Answers exported from the rating page, to be counted in the table (repeatable)
    #[arg(long, value_name = "FILE")]
    ratings: Vec<PathBuf>,
    /// Take files of the hub from the local cache only
    #[arg(long)]
    offline: bool,
    /// Folder for the results and the pictures made for them
    #[arg(long, value_name = "FOLDER", default_value = "eval")]
    output: PathBuf,
    #[command(flatten)]
    threads: Threads,
    /// Show no progress and no notes
    #[arg(long)]
    quiet: bool,
    /// Print the results as one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
///
/// Errors: usage (2) for folders, pictures, weights and arguments that cannot be used; run (1) otherwise.
pub fn run(args: &EvalArgs) -> Result<()> {
    args.threads.start()?;
    let places = Places {
        inception: args.inception.clone(),
        lpips: args.lpips.clone(),
        clip: args.clip.clone(),
        pose: args.pose.clone(),
        offline: args.offline,
    };
    // Before hours of generation.
    let networks = Networks::open(&places)?;
    let reference = args.reference.as_deref().map(|folder| Set::from_folder(&name_of(folder), folder)).transpose()?;
    let Subject { title, sets, baseline, steps } = subject(args)?;
    let comparison = Comparison { sets, baseline, paired: !args.sets_only, reference };
    let sheet = args.rate.then(|| Sheet::new(&comparison, &criteria(args), args.rate_seed)).transpose()?;

    let mut evaluation = measure(&comparison, &networks, args.quiet)?;
    rating::add(&comparison, &args.ratings, &mut evaluation.table)?;
    let mut files = output::write(&args.output, &comparison, &evaluation)?;
    let mut put = |name: &str, text: String| -> Result<()> {
        files.push(args.output.join(name));
        write_atomic(&args.output.join(name), |file| file.write_all(text.as_bytes()))
    };
    put("report.html", page::page(&title, &comparison, &evaluation, &steps)?)?;
    if let Some(sheet) = &sheet {
        put("rating.html", sheet.html()?)?;
    }
    if args.json {
        let mut json = evaluation.table.to_json();
        json["files"] = files.iter().map(|f| f.display().to_string()).collect();
        return print_line(json);
    }
    print_line(evaluation.table.to_text())?;
    if args.quiet {
        return Ok(());
    }
    print_line("")?;
    files.iter().try_for_each(|file| print_line(file.display()))
}

fn criteria(args: &EvalArgs) -> Vec<String> {
    match args.criteria.as_slice() {
        [] => rating::CRITERIA.map(String::from).to_vec(),
        own => own.to_vec(),
    }
}

/// The columns of the table.
struct Subject {
    title: String,
    sets: Vec<Set>,
    baseline: usize,
    /// Columns that are checkpoints, with their steps.
    steps: Vec<(usize, u64)>,
}

fn subject(args: &EvalArgs) -> Result<Subject> {
    match (&args.images, &args.against, &args.model, &args.run) {
        (Some(images), Some(against), ..) => folders(args, images, against),
        (_, _, Some(model), _) => adapters(args, model),
        (_, _, _, Some(run)) => checkpoints(args, run),
        _ => Err(Error::usage("there is nothing to evaluate")
            .hint("give `--images A --against B`, or `--model M --lora FILE --prompts FILE`, or `--run FOLDER`")),
    }
}

/// Two folders, the second one the baseline. Columns are named by the folders, as far as those differ.
fn folders(args: &EvalArgs, images: &Path, against: &Path) -> Result<Subject> {
    if args.prompts.is_some() || args.trigger.is_some() {
        return Err(Error::usage("`--prompts` and `--trigger` are for pictures that are made here")
            .hint("the prompt of a picture in a folder is a .txt file of its name beside it"));
    }
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(images, against) {
        return Err(Error::usage("`--images` and `--against` are one folder").detail(images.display().to_string()));
    }
    let (mut a, mut b) = (name_of(images), name_of(against));
    if a == b {
        (a, b) = (images.display().to_string(), against.display().to_string());
    }
    let title = format!("{a} against {b}");
    let sets = vec![Set::from_folder(&a, images)?, Set::from_folder(&b, against)?];
    Ok(Subject { title, sets, baseline: 1, steps: Vec::new() })
}

/// A model without and with each adapter.
fn adapters(args: &EvalArgs, model: &str) -> Result<Subject> {
    let variant = |text: &String| -> Result<Variant> {
        let lora = parse_lora(text)?;
        let path = Path::new(&lora.file);
        // The adapter of a run is named by the run.
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let run = path.parent().and_then(Path::file_name).filter(|_| stem == "adapter");
        let stem = run.map(|r| r.to_string_lossy().into_owned()).unwrap_or(stem);
        let name = if lora.weight == 1.0 { stem } else { format!("{stem}:{}", lora.weight) };
        Ok(Variant { name, loras: vec![lora] })
    };
    let variants = Variant::beside_base(args.loras.iter().map(variant).collect::<Result<_>>()?);
    let Some(prompts) = &args.prompts else {
        return Err(Error::usage("there are no prompts").hint("name a file of them with `--prompts`"));
    };
    let recipe = Recipe {
        revision: args.revision.clone(),
        seeds: vec![0, 1, 2, 3],
        ..Recipe::of(model, read_prompts(prompts)?)
    };
    let title =
        format!("{} against {}", variants[1..].iter().map(|v| v.name.as_str()).collect::<Vec<_>>().join(", "), model);
    Ok(Subject { title, sets: made(args, recipe, &variants)?, baseline: 0, steps: Vec::new() })
}

/// The base model of a run, and its adapter at every checkpoint that is there.
fn checkpoints(args: &EvalArgs, root: &Path) -> Result<Subject> {
    let dir = RunDir::new(root);
    if !dir.config().is_file() {
        return Err(Error::usage(format!("`{}` is no run directory", root.display()))
            .expected("a folder with config.yaml, as `qwen-lora train` makes it", "none"));
    }
    let config = Config::load(&dir.config(), &[])?;
    let refuse = |why: &str| Err(Error::usage(format!("cannot evaluate the run `{}`", root.display())).detail(why));
    if config.training.mode != TrainingMode::Lora {
        return refuse("it trained all weights, not an adapter");
    }
    let model = &config.model;
    if model.vae.is_some() || model.text_encoder.is_some() {
        return refuse("its base model is put together from several places");
    }
    let Found::Checkpoints(found) = dir.look()? else { return refuse("it has no checkpoint yet") };
    let variant = |&step: &u64| {
        let file = dir.checkpoint(step).join("adapter.safetensors").display().to_string();
        Variant { name: format!("step {step}"), loras: vec![LoraUse { file, weight: 1.0, hash: String::new() }] }
    };
    let variants = Variant::beside_base(found.iter().map(variant).collect());
    let preview = &config.preview;
    let prompts = match &args.prompts {
        Some(path) => read_prompts(path)?,
        None if preview.prompts.is_empty() => {
            return Err(Error::usage("there are no prompts")
                .detail("the run has no previews whose prompts could be taken")
                .hint("name a file of them with `--prompts`"));
        }
        None => preview.prompts.clone(),
    };
    let size = preview.size.unwrap_or_else(|| ImageSize::square(config.data.resolution.sides()[0]));
    let recipe = Recipe {
        revision: model.revision.clone(),
        transformer: model.transformer.as_ref().map(|path| path.display().to_string()),
        negative_prompt: preview.negative_prompt.clone(),
        seeds: preview.seeds.clone(),
        steps: preview.steps,
        guidance: preview.guidance,
        size: size.to_string(),
        ..Recipe::of(&model.path, prompts)
    };
    let steps = found.iter().enumerate().map(|(i, &step)| (i + 1, step)).collect();
    Ok(Subject {
        title: format!("{} by checkpoint", name_of(root)),
        sets: made(args, recipe, &variants)?,
        baseline: 0,
        steps,
    })
}

/// Makes the pictures, with what the arguments say about them.
fn made(args: &EvalArgs, mut recipe: Recipe, variants: &[Variant]) -> Result<Vec<Set>> {
    let sampling = &args.sampling;
    sampling.check()?;
    let compute = device::open(sampling.device)?;
    recipe.dtype = Sampling::dtype(compute.device.is_cpu()).into();
    sampling.apply(&mut recipe)?;
    if let Some(twice) = recipe.seeds.iter().enumerate().find_map(|(i, s)| recipe.seeds[..i].contains(s).then_some(s)) {
        return Err(Error::usage(format!("seed {twice} is there twice")).hint("give each seed once"));
    }
    let prompts = generated::by_trigger(&recipe.prompts, args.trigger.as_deref(), args.class.as_deref())?;
    if !args.quiet {
        compute.notes.iter().for_each(|note| tell(format_args!("note: {note}")));
    }
    let run = Run { device: compute.device, batch_size: sampling.batch_size, offline: args.offline, quiet: args.quiet };
    let (sets, notes) = generated::make(&recipe, variants, &prompts, &args.output.join("images"), &run)?;
    if !args.quiet {
        notes.iter().for_each(|note| tell(format_args!("warning: {note}")));
    }
    Ok(sets)
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}
