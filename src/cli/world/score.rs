//! `qwen-lora world score`: what a model makes of the world's prompts, checked.

use crate::cli::generate::parse_lora;
use crate::cli::world::Which;
use crate::cli::world::distance::{self, Distance};
use crate::cli::{Threads, print_line};
use crate::config::DeviceChoice;
use crate::device;
use crate::error::{Error, Result};
use crate::io::png;
use crate::sample::recipe::KEYWORD;
use crate::sample::{Generator, LoraUse, Recipe};
use crate::world::check::report::Report;
use crate::world::check::{Verdict, check};
use crate::world::folder::{Entry, INDEX, with_trigger};
use crate::world::split::Pool;
use crate::world::{Caption, SIDE, Scene, Style};
use clap::Args;
use image::{Rgb, RgbImage, imageops};
use std::path::{Path, PathBuf};

/// Prompts that share a seed, and so their noise.
const PROMPTS_PER_SEED: usize = 25;

/// Images in a row of the sheet.
const SHEET_COLUMNS: usize = 10;

/// Make images from the world's prompts with a model, and check them.
#[derive(Args, Clone, Debug)]
pub struct ScoreArgs {
    /// Hub id or folder in the diffusers layout
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// An adapter file, with its weight: `style.safetensors:0.8` (repeatable) [default weight: 1]
    #[arg(long = "lora", value_name = "FILE[:WEIGHT]")]
    loras: Vec<String>,
    /// Number of prompts, all different
    #[arg(long, value_name = "N", default_value_t = 500)]
    count: usize,
    #[command(flatten)]
    which: Which,
    /// Drawings of this style are what the pictures are compared with as a whole
    #[arg(long, value_enum, value_name = "STYLE", default_value_t = Style::Plain)]
    style: Style,
    /// A word put before each prompt
    #[arg(long, value_name = "WORD")]
    trigger: Option<String>,
    /// Denoising steps
    #[arg(long, value_name = "N", default_value_t = 20)]
    steps: usize,
    /// Scale of true classifier-free guidance; 1 turns it off
    #[arg(long, value_name = "SCALE", default_value_t = 2.0)]
    guidance: f64,
    /// The first seed: of the prompts' order and of the noise
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Images that go through the transformer together
    #[arg(long, value_name = "N", default_value_t = 25)]
    batch_size: usize,
    /// Also write the images and their index into this new folder, for `world check`
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Also draw the first images into one, a red dot beside those that are not as asked
    #[arg(long, value_name = "FILE.png")]
    sheet: Option<PathBuf>,
    /// Images on the sheet
    #[arg(long, value_name = "N", default_value_t = 60)]
    sheet_count: usize,
    /// Where to compute
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    #[command(flatten)]
    threads: Threads,
    /// Show no progress
    #[arg(long)]
    quiet: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
///
/// Errors: those of `generate`; more prompts than there are (usage).
pub fn run(args: &ScoreArgs) -> Result<()> {
    args.threads.start()?;
    for (flag, value) in [("--batch-size", args.batch_size), ("--count", args.count)] {
        if value == 0 {
            return Err(Error::usage(format!("`{flag}` is 0")).expected("1 or more", 0));
        }
    }
    let prompts = Pool::new(args.which.split, args.which.kind).prompts(args.seed, args.count)?;
    let loras: Vec<LoraUse> = args.loras.iter().map(|text| parse_lora(text)).collect::<Result<_>>()?;
    if let Some(out) = &args.out {
        if out.exists() {
            return Err(Error::usage(format!("`{}` exists already", out.display())).hint("nothing is overwritten"));
        }
        std::fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
    }
    let compute = device::open(args.device)?;
    let mut report = Report::default();
    let mut distance = Distance::to(args.style);
    let mut sheet = Vec::new();
    let mut index = String::new();
    for (group, prompts) in prompts.chunks(PROMPTS_PER_SEED).enumerate() {
        let recipe = recipe(args, prompts, args.seed + group as u64, loras.clone());
        let generator = Generator::open(recipe, false, compute.device.clone())?;
        generator.run(args.batch_size, args.quiet, |image| {
            let (scene, caption) = prompts[image.job.prompt];
            let number = group * PROMPTS_PER_SEED + image.job.prompt;
            let verdict = check(&image.pixels, scene);
            report.add(&image.pixels, scene, &verdict);
            distance.add(&image.pixels, scene, number);
            if let Some(out) = &args.out {
                let entry = entry(number, scene, caption, args.trigger.as_deref());
                let text = generator.recipe().single(image.job.prompt, image.job.seed, None).to_text();
                png::write(&out.join(&entry.file), &image.pixels, &[(KEYWORD, &text)])?;
                index += &serde_json::to_string(&entry).expect("an entry is plain data");
                index.push('\n');
            }
            if number < args.sheet_count {
                sheet.push((image.pixels, is_right(&verdict)));
            }
            Ok(())
        })?;
    }
    if let Some(out) = &args.out {
        let path = out.join(INDEX);
        std::fs::write(&path, index).map_err(|e| Error::io("write", &path, e))?;
    }
    if let Some(path) = &args.sheet {
        draw_sheet(path, &sheet)?;
        if !args.json {
            print_line(format_args!("wrote {}", path.display()))?;
        }
    }
    let distances = distance.measure()?;
    if args.json {
        let mut json = report.to_json();
        json["distance"] = distance::to_json(distances);
        return print_line(json);
    }
    report.lines().iter().try_for_each(print_line)?;
    if let Some([made, drawn]) = distances {
        print_line(format_args!(
            "{:<22} {made:>7.3}   (drawings among themselves: {drawn:.3})",
            format!("distance to {}", args.style.name())
        ))?;
    }
    Ok(())
}

/// Whether the attributes are right and the bodies whole.
fn is_right(verdict: &Verdict) -> bool {
    let whole = verdict.found.anatomy.as_ref().is_none_or(|a| !a.hand_error() && !a.limb_error());
    verdict.all() && whole
}

fn recipe(args: &ScoreArgs, prompts: &[(Scene, Caption)], seed: u64, loras: Vec<LoraUse>) -> Recipe {
    let text = |&(scene, caption): &(Scene, Caption)| with_trigger(args.trigger.as_deref(), &caption.text(scene));
    Recipe {
        seeds: vec![seed],
        loras,
        steps: args.steps,
        guidance: args.guidance,
        size: format!("{SIDE}x{SIDE}"),
        ..Recipe::of(&args.model, prompts.iter().map(text).collect())
    }
}

/// What the index says of a generated image: what was asked for, and nothing of where it is.
fn entry(number: usize, scene: Scene, caption: Caption, trigger: Option<&str>) -> Entry {
    Entry {
        file: format!("{number:06}.png"),
        caption: with_trigger(trigger, &caption.text(scene)),
        language: caption.language,
        scene,
        style: Style::Plain,
        ground: [0.0; 3],
        objects: Vec::new(),
        figures: Vec::new(),
    }
}

/// The images side by side, with a red dot in the corner of those that are not right.
fn draw_sheet(path: &Path, images: &[(RgbImage, bool)]) -> Result<()> {
    let step = SIDE + 4;
    let rows = images.len().div_ceil(SHEET_COLUMNS).max(1);
    let mut out = RgbImage::from_pixel((SHEET_COLUMNS * step) as u32, (rows * step) as u32, Rgb([110; 3]));
    for (i, (image, right)) in images.iter().enumerate() {
        let (x, y) = (i % SHEET_COLUMNS * step + 2, i / SHEET_COLUMNS * step + 2);
        imageops::replace(&mut out, image, x as i64, y as i64);
        if !right {
            let dot = RgbImage::from_pixel(6, 6, Rgb([255, 0, 0]));
            imageops::replace(&mut out, &dot, x as i64, y as i64);
        }
    }
    png::write(path, &out, &[])
}
