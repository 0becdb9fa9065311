//! Built-in pipelines are made once and kept in the user's cache folder. `synthetic:tiny` is here.

use super::configs::{self, PipelineConfigs};
use super::{Preset, SynthOptions, dense, tokenizer, write};
use crate::error::{Error, Result};
use crate::io::Weights;
use crate::model::identify::{PARTS, check_layout, is_network};
use std::path::{Path, PathBuf};

/// Raised whenever the same configs and laws get other weights, so that an old copy in a cache is not taken for the new one.
const VERSION: u32 = 1;

/// The folder of the tiny pipeline, which is made there unless it is whole: `synthetic-tiny-<hash>` in the cache
/// folder.
pub fn tiny_in_cache() -> Result<PathBuf> {
    tiny_in(&cache_folder()).map_err(|e| e.hint("XDG_CACHE_HOME can name another folder for it"))
}

/// `qwen-lora` under `$XDG_CACHE_HOME`, or `~/.cache`, or the system's temporary folder.
pub(super) fn cache_folder() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    // The specification says that a relative path is to be ignored.
    let cache = from("XDG_CACHE_HOME").filter(|p| p.is_absolute());
    let cache = cache.or_else(|| from("HOME").map(|h| h.join(".cache"))).or_else(|| from("LOCALAPPDATA"));
    cache.unwrap_or_else(std::env::temp_dir).join("qwen-lora")
}

/// The same under another folder.
pub fn tiny_in(folder: &Path) -> Result<PathBuf> {
    let options = SynthOptions::preset(Preset::Tiny);
    let name = format!("synthetic-tiny-{}", hash(&options)?);
    made_once(folder, &name, is_whole, |place| write(&options, place).map(|_| ()))
}

/// The folder `name` in `folder`. Unless it is whole, `make` makes it, which must let it appear whole or not at all.
pub(super) fn made_once(
    folder: &Path,
    name: &str,
    is_whole: impl Fn(&Path) -> bool,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let place = folder.join(name);
    if is_whole(&place) {
        return Ok(place);
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    // Looked at again: another process may just have made it.
    if place.exists() && !is_whole(&place) {
        std::fs::remove_dir_all(&place).map_err(|e| Error::io("remove the broken", &place, e))?;
    }
    match make(&place) {
        Err(e) if !is_whole(&place) => Err(e),
        // If it failed, another process has put it there in the meantime.
        _ => Ok(place),
    }
}

/// Whether every file is there and as long as it should be. What was renamed into place was written whole, but people
/// and failing disks may have touched it since.
fn is_whole(place: &Path) -> bool {
    let weights_whole = |part: &&str| !is_network(part) || Weights::open_folder(&place.join(part)).is_ok();
    let files = ["added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"];
    check_layout(place, &|_| false).is_ok()
        && PARTS.iter().all(weights_whole)
        && files.iter().all(|f| std::fs::metadata(place.join("tokenizer").join(f)).is_ok_and(|m| m.len() > 0))
}

/// Names the content: version, laws of the weights, configs and seed.
fn hash(options: &SynthOptions) -> Result<String> {
    let configs = PipelineConfigs::of(options)?;
    let text = format!(
        "{VERSION} {options:?} {:?} {} {} {} {} {}",
        [dense::TRANSFORMER, dense::VAE, dense::TEXT_ENCODER],
        configs.scheduler,
        configs::transformer(&options.geometry),
        configs.vae,
        configs.text_encoder,
        tokenizer::vocab_size()
    );
    Ok(blake3::hash(text.as_bytes()).to_hex()[..12].to_string())
}
