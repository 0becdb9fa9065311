//! A folder of drawn pictures: `000000.png` with its caption in `000000.txt`, and `index.jsonl` with what is exactly
//! where.

use crate::error::{Error, Result};
use crate::io::atomic::rename_synced;
use crate::io::png;
use crate::world::canvas::{Point, Rgb};
use crate::world::figure::Skeleton;
use crate::world::objects::Object;
use crate::world::split::Pool;
use crate::world::{Caption, Drawing, Language, Scene, Style};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The name of the file with one [`Entry`] a line.
pub const INDEX: &str = "index.jsonl";

/// What a picture holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Name of the picture.
    pub file: String,
    /// Its caption.
    pub caption: String,
    /// Of the caption.
    pub language: Language,
    /// The attributes.
    pub scene: Scene,
    /// How it is painted.
    pub style: Style,
    /// Colour of the ground, sRGB from 0 to 255.
    #[serde(default)]
    pub ground: Rgb,
    /// The objects.
    #[serde(default)]
    pub objects: Vec<Object>,
    /// The figures, each with its joints in pixels.
    #[serde(default)]
    pub figures: Vec<Skeleton>,
}

/// What to draw.
#[derive(Clone, Debug)]
pub struct Series {
    /// Number of pictures.
    pub count: usize,
    /// Of everything that is drawn by chance.
    pub seed: u64,
    /// The styles, which take turns.
    pub styles: Vec<Style>,
    /// Put before each caption.
    pub trigger: Option<String>,
}

impl Series {
    /// Picture `item`, with its entry.
    pub fn picture(&self, pool: &Pool, item: usize) -> (Drawing, Entry) {
        let scene = pool.draw(self.seed, item as u64);
        let caption = Caption::draw(self.seed, item as u64);
        let drawing = Drawing::new(scene, self.styles[item % self.styles.len()], self.seed, item as u64);
        let text = with_trigger(self.trigger.as_deref(), &caption.text(scene));
        let entry = Entry {
            file: format!("{item:06}.png"),
            caption: text,
            language: caption.language,
            scene,
            style: drawing.style,
            ground: drawing.ground.map(tenths),
            objects: drawing.objects.clone(),
            figures: drawing.figures.iter().map(rounded).collect(),
        };
        (drawing, entry)
    }

    /// Writes the pictures into the new folder `out`, which appears when it is whole.
    ///
    /// Errors: `out` exists (usage); a failed write.
    pub fn write(&self, pool: &Pool, out: &Path) -> Result<()> {
        if out.exists() {
            return Err(Error::usage(format!("`{}` exists already", out.display())).hint("nothing is overwritten"));
        }
        let name = out.file_name().ok_or_else(|| Error::usage(format!("`{}` has no name", out.display())))?;
        let part: PathBuf = out.with_file_name(format!(".{}.part", name.to_string_lossy()));
        let _ = std::fs::remove_dir_all(&part);
        std::fs::create_dir_all(&part).map_err(|e| Error::io("create", &part, e))?;
        let write = |name: &str, bytes: &[u8]| {
            let path = part.join(name);
            std::fs::write(&path, bytes).map_err(|e| Error::io("write", &path, e))
        };
        let draw = |item| -> Result<Entry> {
            let (drawing, entry) = self.picture(pool, item);
            write(&entry.file, &png::encode(&drawing.render(), &[])?)?;
            write(&entry.file.replace(".png", ".txt"), format!("{}\n", entry.caption).as_bytes())?;
            Ok(entry)
        };
        let entries: Vec<Entry> = (0..self.count).into_par_iter().map(draw).collect::<Result<_>>()?;
        let mut index = String::new();
        for entry in &entries {
            let line = serde_json::to_string(entry).expect("an entry is plain data");
            writeln!(index, "{line}").expect("a string takes any text");
        }
        write(INDEX, index.as_bytes())?;
        rename_synced(&part, out)
    }
}

/// The prompt with the word that calls an adapter, if there is one.
pub fn with_trigger(trigger: Option<&str>, prompt: &str) -> String {
    match trigger {
        Some(trigger) => format!("{trigger}, {prompt}"),
        None => prompt.to_string(),
    }
}

/// Rounded to a tenth: the index stays readable.
fn tenths(value: f32) -> f32 {
    (value * 10.0).round() / 10.0
}

fn rounded(skeleton: &Skeleton) -> Skeleton {
    let point = |[x, y]: Point| [tenths(x), tenths(y)];
    Skeleton {
        head: point(skeleton.head),
        neck: point(skeleton.neck),
        right_shoulder: point(skeleton.right_shoulder),
        right_elbow: point(skeleton.right_elbow),
        right_hand: point(skeleton.right_hand),
        left_shoulder: point(skeleton.left_shoulder),
        left_elbow: point(skeleton.left_elbow),
        left_hand: point(skeleton.left_hand),
        right_hip: point(skeleton.right_hip),
        right_knee: point(skeleton.right_knee),
        right_foot: point(skeleton.right_foot),
        left_hip: point(skeleton.left_hip),
        left_knee: point(skeleton.left_knee),
        left_foot: point(skeleton.left_foot),
    }
}

/// The entries of a folder's index.
///
/// Errors (usage): no index; a line that is none.
pub fn read_index(folder: &Path) -> Result<Vec<Entry>> {
    let path = folder.join(INDEX);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e).into_usage())?;
    let entry = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| {
            Error::usage(format!("line {} of `{}` is no picture of the world", i + 1, path.display()))
                .detail(e.to_string())
        })
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(entry).collect()
}
