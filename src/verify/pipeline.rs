//! `pipe.*`: the whole pipeline, from a prompt and given latents to an image, without and with guidance.

use super::{Case, Computed};
use crate::error::{Error, Result};
use crate::flow::FlowMatchEuler;
use crate::kernels::no_grad;
use crate::model::text_encoder::{PromptEncoder, Residency, TextEncoder};
use crate::model::tokenizer::PromptTokenizer;
use crate::model::transformer::{BaseWeights, Checkpointing, Inputs, Precision, QwenImageTransformer};
use crate::model::vae::Vae;
use crate::prompt::TEXT_TO_IMAGE;
use crate::sample::{Guidance, PromptBatch, decode_image, denoise};
use candle_core::{DType, Device, Tensor};

/// The pipeline's own default, shorter than what the text encoder may be given.
const MAX_SEQUENCE_LENGTH: usize = 512;

pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let args = case
        .json
        .section("pipe.args")?
        .ok_or_else(|| Error::usage("cannot replay `pipe.*`").expected("`pipe.args` in golden.json", "no such key"))?;
    let (height, width): (usize, usize) = (args.get("height")?, args.get("width")?);
    let prompts: [String; 2] = [args.get("prompt")?, args.get("negative_prompt")?];
    let [prompt, negative] = encode(case, &prompts)?;
    let scheduler = FlowMatchEuler::from_file(&case.model.join("scheduler/scheduler_config.json"))?;
    let precision = Precision::uniform(DType::F32);
    let transformer =
        QwenImageTransformer::load(&case.model.join("transformer"), precision, &Device::Cpu, BaseWeights::Frozen)?;
    let vae = Vae::load(&case.model.join("vae"))?;

    let latents = case.tensor("pipe.latents")?; // (1, S, C)
    let side = vae.config().spatial_compression() * transformer.config().patch_size;
    let sigmas = scheduler.inference_sigmas(args.get("steps")?, latents.dims()[1]);
    let predict = |latents: &Tensor, sigma: f32, prompt: &PromptBatch| {
        let inputs = Inputs {
            hidden_states: latents,
            encoder_hidden_states: &prompt.embeds,
            text_lengths: &prompt.lengths,
            // Through the timestep and back, as the original does.
            timesteps: &[scheduler.timestep(sigma) / 1000.0],
            image_shapes: &[(1, height / side, width / side)],
            additional_t_cond: None,
        };
        no_grad(|| Ok(transformer.forward(inputs, Checkpointing::None)?.into_tensor()))
    };
    let mut computed = Vec::new();
    for tag in ["nocfg", "cfg"] {
        let guidance = match tag {
            "cfg" => Some(Guidance { negative: &negative, scale: args.get("cfg")? }),
            _ => None,
        };
        let out = denoise(latents.clone(), &sigmas, &prompt, guidance, predict, |_| {})?;
        computed.push(Computed::new(format!("pipe.{tag}.image"), decode_image(&vae, &out, height, width)?));
        computed.push(Computed::new(format!("pipe.{tag}.latents_out"), out));
    }
    Ok(computed)
}

/// The embeddings of each prompt, as a batch of one; the text encoder is dropped again.
fn encode(case: &Case, prompts: &[String; 2]) -> Result<[PromptBatch; 2]> {
    let tokenizer = PromptTokenizer::load(&case.model.join("tokenizer"))?;
    let text_encoder = TextEncoder::load(&case.model.join("text_encoder"), Residency::Streamed)?;
    let mut encoder = PromptEncoder::new(&tokenizer, &text_encoder, TEXT_TO_IMAGE);
    encoder.max_sequence_length = MAX_SEQUENCE_LENGTH;
    let embeds = encoder.encode(&prompts.each_ref().map(String::as_str), |_| {})?;
    Ok([PromptBatch::new(&embeds[..1])?, PromptBatch::new(&embeds[1..])?])
}
