//! What a folder of weights is: a Qwen-Image pipeline, a part of one, or something else that people take for one.

use crate::error::{Error, Result};
use crate::io::JsonObject;
use crate::io::safetensors::MappedFile;
use crate::io::weights::Choice;
use std::path::Path;

/// The folders of a pipeline.
pub const PARTS: [&str; 5] = ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"];

/// Whether a part has weights.
pub fn is_network(part: &str) -> bool {
    matches!(part, "transformer" | "vae" | "text_encoder")
}

/// Beginnings of class names, and whose they are; the first that fits counts.
const FAMILIES: [(&str, &str); 16] = [
    ("QwenImage21", "Qwen-Image-2.1, a single-stream architecture with other networks"),
    ("AutoencoderKLQwenImage21", "Qwen-Image-2.1, a single-stream architecture with other networks"),
    ("QwenImage", "Qwen-Image"),
    ("AutoencoderKLQwenImage", "Qwen-Image"),
    ("Qwen2_5_VL", "Qwen2.5-VL, the text encoder of Qwen-Image"),
    ("Flux2", "FLUX.2"),
    ("Flux", "FLUX.1"),
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("StableDiffusionXL", "Stable Diffusion XL"),
    ("StableDiffusion", "Stable Diffusion"),
    ("ZImage", "Z-Image"),
    ("Wan", "Wan"),
    ("HunyuanVideo", "HunyuanVideo"),
    ("HunyuanImage", "HunyuanImage"),
    ("Sana", "Sana"),
    ("PixArt", "PixArt"),
];

/// The model family that a class belongs to, in words.
fn family(class: &str) -> Option<&'static str> {
    FAMILIES.iter().find(|(prefix, _)| class.starts_with(prefix)).map(|(_, family)| *family)
}

/// Refuses a pipeline of another family by its `model_index.json`. Without that file the parts speak for themselves.
pub fn check_pipeline_class(folder: &Path) -> Result<()> {
    let index = folder.join("model_index.json");
    if !index.is_file() {
        return Ok(());
    }
    let json = JsonObject::open(&index)?;
    let class: String = json.get("_class_name")?;
    let family = family(&class);
    if family == Some("Qwen-Image") {
        return Ok(());
    }
    let found = family.map_or(class.clone(), |f| format!("{class} ({f})"));
    Err(json.bad_value("_class_name", "a Qwen-Image pipeline", found).hint(
        "supported: Qwen/Qwen-Image, Qwen/Qwen-Image-2512 and the Edit and Layered models of the same architecture",
    ))
}

/// Checks that `folder` has every part of a pipeline, and says what it is if it is something else. The weights of
/// parts for which `is_overridden` holds are not needed.
pub fn check_layout(folder: &Path, is_overridden: &dyn Fn(&str) -> bool) -> Result<()> {
    let has = |part: &str| folder.join(part).is_dir();
    if !folder.join("model_index.json").is_file() && !PARTS.iter().all(|p| has(p)) {
        return Err(not_a_pipeline(folder));
    }
    check_pipeline_class(folder)?;
    let missing = |part: &str, wanted: &str| {
        let found = match names_in(&folder.join(part)) {
            None => "no such folder".to_string(),
            Some(names) if names.is_empty() => "an empty folder".to_string(),
            Some(names) => names.join(", "),
        };
        Err(Error::usage(format!("`{}` has no whole `{part}/`", folder.display()))
            .expected(wanted, found)
            .hint("the download is incomplete: fetch this part"))
    };
    for part in PARTS {
        let names = names_in(&folder.join(part)).unwrap_or_default();
        let has_file = |name: &str| names.iter().any(|n| n == name);
        match part {
            "tokenizer" if has_file("tokenizer.json") || (has_file("vocab.json") && has_file("merges.txt")) => {}
            "tokenizer" => return missing(part, "tokenizer.json, or vocab.json and merges.txt"),
            "scheduler" if has_file("scheduler_config.json") => {}
            "scheduler" => return missing(part, "scheduler_config.json"),
            _ if !has_file("config.json") => return missing(part, "config.json"),
            _ if !is_overridden(part) && Choice::of(&names) == Choice::Files(Vec::new()) => {
                return missing(part, "*.safetensors");
            }
            _ => {}
        }
    }
    Ok(())
}

/// The error for a folder that is no pipeline, with what it seems to be.
fn not_a_pipeline(folder: &Path) -> Error {
    let shown = folder.display();
    let names = names_in(folder).unwrap_or_default();
    let error = Error::usage(format!("`{shown}` is not a model in the diffusers layout"));
    let weights: Vec<&String> = names.iter().filter(|n| n.ends_with(".safetensors")).collect();
    let is_adapter = |name: &&String| {
        MappedFile::open(&folder.join(name)).is_ok_and(|f| f.names().iter().any(|n| n.contains("lora_")))
    };
    if names.iter().any(|n| n == "adapter_config.json") || weights.iter().any(is_adapter) {
        return error.detail("it holds a LoRA").hint("`model:` wants the base model that the LoRA belongs to");
    }
    if let Some(class) = class_of(&folder.join("config.json")) {
        let family = family(&class).map(|f| format!(" ({f})")).unwrap_or_default();
        let error = error.detail(format!("it is one network alone: {class}{family}"));
        let part = match class.as_str() {
            "QwenImageTransformer2DModel" => "transformer",
            "AutoencoderKLQwenImage" => "vae",
            "Qwen2_5_VLForConditionalGeneration" => "text_encoder",
            _ => return error.hint("`model:` wants a base model such as Qwen/Qwen-Image"),
        };
        return error.hint(format!("use it inside a whole model: `model: {{path: Qwen/Qwen-Image, {part}: {shown}}}`"));
    }
    if let Some(nested) = names.iter().find(|n| folder.join(n).join("model_index.json").is_file()) {
        return error.hint(format!("did you mean `{}`?", folder.join(nested).display()));
    }
    let found = match names.len() {
        0 => "an empty folder".to_string(),
        1..=12 => names.join(", "),
        _ => format!("{}, ...", names[..12].join(", ")),
    };
    let error = error.expected(format!("model_index.json, {}", PARTS.join(", ")), found);
    if weights.is_empty() && !names.iter().any(|n| n.ends_with(".gguf")) {
        error.hint("`model:` wants a base model such as Qwen/Qwen-Image")
    } else {
        error.hint("single-file checkpoints replace one network: `model: {path: Qwen/Qwen-Image, transformer: FILE}`")
    }
}

/// `_class_name` of a diffusers config, or the first of a transformers config's `architectures`.
fn class_of(config: &Path) -> Option<String> {
    let json = JsonObject::open(config).ok()?;
    let class = json.optional::<String>("_class_name").ok()?;
    class.or_else(|| json.optional::<Vec<String>>("architectures").ok()??.into_iter().next())
}

/// The names in a folder, sorted; `None` if there is no such folder.
fn names_in(folder: &Path) -> Option<Vec<String>> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_told_apart() {
        assert_eq!(family("QwenImageEditPlusPipeline"), Some("Qwen-Image"));
        assert_eq!(family("QwenImagePipeline"), Some("Qwen-Image"));
        assert!(family("QwenImage21Pipeline").unwrap().starts_with("Qwen-Image-2.1"));
        assert_eq!(family("FluxPipeline"), Some("FLUX.1"));
        assert_eq!(family("StableDiffusionXLPipeline"), Some("Stable Diffusion XL"));
        assert_eq!(family("SomethingNew"), None);
    }
}
