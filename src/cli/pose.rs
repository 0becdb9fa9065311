//! `qwen-lora pose`: what a pose network sees in pictures.

use crate::cli::{Threads, print_line};
use crate::data::image::load;
use crate::error::{Error, Result};
use crate::io::hub::HubOptions;
use crate::io::png;
use crate::pose::{Detection, PoseNetwork, PoseSpec, detect_image, draw::draw};
use crate::progress::tell;
use crate::sample::label;
use image::{Rgb, RgbImage};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Show what the pose term of the loss sees in pictures: skeletons, boxes and counts, as PNG and JSON.
#[derive(clap::Args, Clone, Debug)]
pub struct PoseArgs {
    /// Pictures: jpg, png or webp
    #[arg(value_name = "IMAGE", required = true)]
    pub images: Vec<PathBuf>,
    /// `posenet` (built in, for photos), `world` (built in, for the drawn world), `openpose`, or the file of a heatmap network
    #[arg(long, value_name = "NETWORK", default_value = "posenet")]
    pub network: String,
    /// OpenPose's body weights: a file or a hub id [default: lllyasviel/Annotators]
    #[arg(long, value_name = "WEIGHTS")]
    pub body: Option<String>,
    /// `builtin` (hands and their 21 points in photos), or OpenPose's hand weights: a file or a hub id [default: no hand network]
    #[arg(long, value_name = "WEIGHTS")]
    pub hand: Option<String>,
    /// Folder for the drawn pictures, `NAME.pose.png` [default: beside each picture]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Draw nothing
    #[arg(long, conflicts_with = "out")]
    pub no_pictures: bool,
    /// Print one JSON object for all pictures
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// Runs the verb.
pub fn run(args: &PoseArgs) -> Result<()> {
    args.threads.start()?;
    let defaults = PoseSpec::default();
    let spec = PoseSpec {
        network: args.network.clone(),
        body: args.body.clone().unwrap_or(defaults.body),
        hand: args.hand.clone(),
    };
    if spec.network != "openpose" && args.body.is_some() {
        return Err(Error::usage("`--body` is OpenPose's weights")
            .expected("`--network openpose` with it", format!("`--network {}`", spec.network)));
    }
    let network = spec.load(HubOptions::from_env(), &mut |notice| tell(format_args!("note: {notice}")))?;
    if let Some(folder) = &args.out {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create the folder", folder, e).into_usage())?;
    }
    let mut all = Vec::new();
    for path in &args.images {
        let image = load(path)?;
        let found = detect_image(network.as_ref(), &image)?;
        let drawn = (!args.no_pictures).then(|| target(path, args.out.as_deref()));
        if let Some(drawn) = &drawn {
            png::write(drawn, &picture(image, &found, network.as_ref()), &[])?;
        }
        if args.json {
            let mut json = found.to_json(network.skeleton());
            json["image"] = json!(path);
            json["drawn"] = json!(drawn);
            all.push(json);
        } else {
            let wrote = drawn.map(|d| format!(" -> {}", d.display())).unwrap_or_default();
            print_line(format!("{}: {}{wrote}", path.display(), counts(&found, network.as_ref())))?;
        }
    }
    if args.json {
        let page = json!({
            "network": network.name(),
            "counted": network.skeleton().counted().what,
            "pictures": all,
        });
        print_line(serde_json::to_string_pretty(&page).expect("plain data is JSON"))?;
    }
    Ok(())
}

/// `NAME.pose.png` beside the picture or in `folder`.
fn target(path: &Path, folder: Option<&Path>) -> PathBuf {
    let name = format!("{}.pose.png", path.file_stem().unwrap_or_default().to_string_lossy());
    folder.map_or_else(|| path.with_file_name(&name), |folder| folder.join(&name))
}

fn counts(found: &Detection, network: &dyn PoseNetwork) -> String {
    let plural = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
    let sure = found.persons.first().map(|p| format!(" (surest {:.2})", p.score)).unwrap_or_default();
    format!(
        "{}{sure}, {}, {}",
        plural(found.persons.len(), "person", "persons"),
        plural(found.hands.len(), "hand", "hands"),
        plural(found.num_limb_ends(network.skeleton()), "limb end", "limb ends"),
    )
}

/// The picture with what was found, below a line with the counts.
fn picture(mut image: RgbImage, found: &Detection, network: &dyn PoseNetwork) -> RgbImage {
    draw(&mut image, found, network.skeleton());
    let scale = (image.width() as usize / 400).max(1);
    let text = vec![format!("{}: {}", network.name(), counts(found, network))];
    let strip = label::line_height(scale) + 4 * scale;
    let mut page = RgbImage::from_pixel(image.width(), image.height() + strip as u32, Rgb([255; 3]));
    label::draw(&mut page, &text, 3 * scale, 3 * scale, scale);
    image::imageops::replace(&mut page, &image, 0, strip as i64);
    page
}
