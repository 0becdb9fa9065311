//! `pipe.*`: the whole pipeline, from a prompt and given latents to an image, without and with guidance.

use super::{Case, Computed};
use crate::error::{Error, Result};
use crate::flow::FlowMatchEuler;
use crate::model::source::{ModelSource, ModelSpec};
use crate::sample::stages::{encode_prompts, load_transformer, load_vae};
use crate::sample::{Denoiser, Guidance, PromptBatch, decode_image};

pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let args = case
        .json
        .section("pipe.args")?
        .ok_or_else(|| Error::usage("cannot replay `pipe.*`").expected("`pipe.args` in golden.json", "no such key"))?;
    let (height, width): (usize, usize) = (args.get("height")?, args.get("width")?);
    let prompts: [String; 2] = [args.get("prompt")?, args.get("negative_prompt")?];
    let pipeline = ModelSource::resolve(&ModelSpec::new(case.model.to_string_lossy()))?;
    let embeds = encode_prompts(&pipeline, &prompts.each_ref().map(String::as_str), |_, _| {})?;
    let (prompt, negative) = (PromptBatch::new(&embeds[..1])?, PromptBatch::new(&embeds[1..])?);
    let scheduler = FlowMatchEuler::from_file(&pipeline.scheduler)?;
    let transformer = load_transformer(&pipeline, case.precision, &case.device)?;
    let vae = load_vae(&pipeline)?;

    let latents = case.tensor("pipe.latents")?; // (1, S, C)
    let side = vae.config().spatial_compression() * transformer.config().patch_size;
    let denoiser =
        Denoiser { transformer: &transformer, scheduler: &scheduler, image_shape: (1, height / side, width / side) };
    let steps: usize = args.get("steps")?;
    let mut computed = Vec::new();
    for tag in ["nocfg", "cfg"] {
        let guidance = match tag {
            "cfg" => Some(Guidance { negative: &negative, scale: args.get("cfg")? }),
            _ => None,
        };
        let out = denoiser.run(latents.clone(), steps, &prompt, guidance, |_| {})?;
        computed.push(Computed::new(format!("pipe.{tag}.image"), decode_image(&vae, &out, height, width)?));
        computed.push(Computed::new(format!("pipe.{tag}.latents_out"), out));
    }
    Ok(computed)
}
