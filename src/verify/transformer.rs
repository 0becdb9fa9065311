//! Replays the transformer: outputs and intermediate values of every recorded call, in f32 and bf16.

use crate::error::{Error, Result};
use crate::kernels::no_grad;
use crate::model::transformer::{
    BaseWeights, Checkpointing, ImageShape, Inputs, Precision, QwenImageTransformer, TransformerConfig,
};
use crate::verify::{Case, Computed};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Recorded inputs of one call.
pub(super) struct Call {
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    text_lengths: Vec<usize>,
    timesteps: Vec<f32>,
    image_shapes: Vec<ImageShape>,
    additional_t_cond: Option<Vec<usize>>,
}

impl Call {
    /// The inputs recorded under `prefix` (`tf.b2_mask.`).
    pub(super) fn read(case: &Case, prefix: &str) -> Result<Self> {
        let get = |name: &str| case.tensor(&format!("{prefix}{name}"));
        let encoder_hidden_states = get("encoder_hidden_states")?;
        let (batch, text_tokens, _) = encoder_hidden_states.dims3()?;
        let mask_name = format!("{prefix}encoder_hidden_states_mask");
        let text_lengths = match case.has(&mask_name) {
            true => lengths(&case.tensor(&mask_name)?)?,
            false => vec![text_tokens; batch],
        };
        let conditions = format!("{prefix}additional_t_cond");
        let additional_t_cond = match case.has(&conditions) {
            true => Some(case.tensor(&conditions)?.to_vec1::<i64>()?.into_iter().map(|c| c as usize).collect()),
            false => None,
        };
        Ok(Self {
            hidden_states: get("hidden_states")?,
            encoder_hidden_states,
            text_lengths,
            timesteps: get("timestep")?.to_vec1()?,
            image_shapes: image_shapes(&get("img_shapes")?)?,
            additional_t_cond,
        })
    }

    /// The output for these inputs, in f32, showing intermediate tensors to `observe`.
    pub(super) fn run(&self, model: &QwenImageTransformer, observe: &mut dyn FnMut(&str, &Tensor)) -> Result<Tensor> {
        let inputs = Inputs {
            hidden_states: &self.hidden_states,
            encoder_hidden_states: &self.encoder_hidden_states,
            text_lengths: &self.text_lengths,
            timesteps: &self.timesteps,
            image_shapes: &self.image_shapes,
            additional_t_cond: self.additional_t_cond.as_deref(),
        };
        let output = no_grad(|| model.forward_observed(inputs, Checkpointing::None, false, observe))?;
        Ok(output.tensor().to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
    }

    /// With every noise level rounded to bf16, as the original rounds it before the time embedding.
    fn with_bf16_timesteps(mut self) -> Self {
        self.timesteps.iter_mut().for_each(|t| *t = half::bf16::from_f32(*t).to_f32());
        self
    }
}

/// Valid tokens of each row of a mask of ones and zeros.
pub(super) fn lengths(mask: &Tensor) -> Result<Vec<usize>> {
    Ok(mask.to_vec2::<i64>()?.iter().map(|row| row.iter().sum::<i64>() as usize).collect())
}

/// Rows (frame, height, width).
pub(super) fn image_shapes(rows: &Tensor) -> Result<Vec<ImageShape>> {
    let shape = |row: &Vec<i64>| match row[..] {
        [f, h, w] => Ok((f as usize, h as usize, w as usize)),
        _ => {
            Err(Error::usage("an image shape has three numbers").expected("(frame, height, width)", format!("{row:?}")))
        }
    };
    rows.to_vec2::<i64>()?.iter().map(shape).collect()
}

/// The case's transformer.
pub(super) fn load(
    case: &Case,
    precision: Precision,
    change: impl FnOnce(&mut TransformerConfig),
) -> Result<QwenImageTransformer> {
    load_changed(case, precision, change, |_, tensor| Ok(tensor))
}

/// [`load`] with every tensor, in the type of the float weights, changed by `weight`.
pub(super) fn load_changed(
    case: &Case,
    precision: Precision,
    change: impl FnOnce(&mut TransformerConfig),
    weight: impl Fn(&str, Tensor) -> Result<Tensor>,
) -> Result<QwenImageTransformer> {
    let dtype = precision.weights;
    let folder = folder(case);
    let mut config = TransformerConfig::from_file(&folder.join("config.json"))?;
    change(&mut config);
    let weights = crate::io::Weights::open_folder(&folder)?;
    let get = |name: &str, shape: &[usize]| {
        // The recorded layered call brings the one weight that the published text-to-image models lack.
        let tensor = match name == ADDITION && !weights.contains(ADDITION) {
            true => case.tensor("tf.layered.addition_t_embedding")?.to_dtype(dtype)?.to_device(&case.device)?,
            false => weights.get(name, shape, dtype, &case.device)?,
        };
        weight(name, tensor)
    };
    QwenImageTransformer::build(config, precision, &case.device, BaseWeights::Frozen, get)
}

const ADDITION: &str = "time_text_embed.addition_t_embedding.weight";

fn folder(case: &Case) -> PathBuf {
    case.model.join("transformer")
}

/// Replays everything under `tf.`.
pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let names = case.golden.names();
    let calls: BTreeSet<&str> =
        names.iter().filter_map(|n| n.strip_prefix("tf.")?.strip_suffix(".hidden_states")).collect();
    let plain = load(case, case.precision, |_| {})?;
    let mut computed = Vec::new();
    for call in calls {
        let prefix = format!("tf.{call}.");
        let name = |end: &str| format!("{prefix}{end}");
        let inputs = Call::read(case, &prefix)?;
        if inputs.additional_t_cond.is_some() {
            let layered = load(case, case.precision, |c| (c.use_additional_t_cond, c.use_layer3d_rope) = (true, true))?;
            computed.push(Computed::new(name("output"), inputs.run(&layered, &mut |_, _| {})?));
            continue;
        }
        let mut observed = Vec::new();
        let output = inputs.run(&plain, &mut |what, tensor| {
            let name = name(&format!("dbg.{what}"));
            if case.has(&name) {
                observed.push(Computed::new(name, tensor.clone()));
            }
        })?;
        computed.extend(observed);
        computed.push(Computed::new(name("output"), output));
        if case.has(&name("output_zero_cond_t")) {
            let model = load(case, case.precision, |c| c.zero_cond_t = true)?;
            computed.push(Computed::new(name("output_zero_cond_t"), inputs.run(&model, &mut |_, _| {})?));
        }
        let rounded = inputs.with_bf16_timesteps();
        if case.has(&name("output_f32_model_bf16_timestep")) {
            let output = rounded.run(&plain, &mut |_, _| {})?;
            computed.push(Computed::new(name("output_f32_model_bf16_timestep"), output));
        }
        if case.has(&name("output_bf16_model")) {
            let output = rounded.run(&load(case, Precision::uniform(DType::BF16), |_| {})?, &mut |_, _| {})?;
            computed.push(Computed::new(name("output_bf16_model"), output));
        }
    }
    Ok(computed)
}
