//! Replays training: the gradients of one step, ten AdamW steps, and outputs with an adapter active.

use super::transformer::{Call, image_shapes, lengths, load, load_changed};
use crate::adapters::read::ModuleTable;
use crate::adapters::runtime::{combine, read_lora};
use crate::adapters::{LoraAdapter, LoraModule};
use crate::error::{Error, Result};
use crate::io::JsonObject;
use crate::model::transformer::{Checkpointing, QwenImageTransformer};
use crate::model::vae::{pack, unpack};
use crate::optim::{AdamW, AdamWOptions, clip_grad_norm};
use crate::progress::tell;
use crate::train::checkpoint;
use crate::train::step::{NoisyBatch, forward_backward, predict};
use crate::train::trainable::Trainable;
use crate::verify::{Case, Computed};
use candle_core::{DType, Device, Tensor};

/// The recorded adapter under `lora.<stage>.`, with the recorded rank and alpha.
fn recorded_adapter(case: &Case, stage: &str) -> Result<LoraAdapter> {
    let settings = section(case, "lora")?;
    let (rank, alpha): (usize, f64) = (settings.get("rank")?, settings.get("alpha")?);
    let prefix = format!("lora.{stage}.");
    let mut adapter = LoraAdapter::default();
    for name in case.golden.names() {
        let Some(module) = name.strip_prefix(&prefix).and_then(|n| n.strip_suffix(".lora_A.weight")) else { continue };
        let (a, b) = (case.tensor(&name)?, case.tensor(&format!("{prefix}{module}.lora_B.weight"))?);
        adapter.modules.insert(module.into(), LoraModule { a, b, alpha, scale: alpha / rank as f64 });
    }
    Ok(adapter)
}

fn section(case: &Case, key: &str) -> Result<JsonObject> {
    case.json.section(key)?.ok_or_else(|| Error::usage(format!("`golden.json` has no `{key}`")))
}

/// Replays everything under `lora.`.
pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let mut computed = training(case)?;
    if case.has("lora.out.peft_active") {
        let trained = recorded_adapter(case, "after10")?;
        let inputs = Call::read(case, "tf.b2_mask.")?;
        let mut model = load(case, case.precision, |_| {})?;
        let base = inputs.run(&model, &mut |_, _| {})?;
        Trainable::attach(&mut model, &trained)?;
        let active = inputs.run(&model, &mut |_, _| {})?;
        let merged = inputs.run(&merged(case, &trained)?, &mut |_, _| {})?;
        computed.extend([
            Computed::new("lora.out.peft_active", active.clone()),
            Computed::new("lora.out.loaded", active),
            Computed::new("lora.out.fused", merged),
            Computed::new("lora.out.unloaded", base),
        ]);
    }
    Ok(computed)
}

/// The case's transformer with an adapter added to its weights.
fn merged(case: &Case, adapter: &LoraAdapter) -> Result<QwenImageTransformer> {
    load_changed(
        case,
        case.precision,
        |_| {},
        |name, weight| {
            let Some(module) = name.strip_suffix(".weight").and_then(|n| adapter.modules.get(n)) else {
                return Ok(weight);
            };
            let delta = module.delta()?.to_device(&case.device)?;
            Ok((weight.to_dtype(DType::F32)? + delta)?.to_dtype(weight.dtype())?)
        },
    )
}

/// The steps: noising, forward, loss, backward, clipping, AdamW.
fn training(case: &Case) -> Result<Vec<Computed>> {
    let adamw =
        section(case, "lora")?.section("adamw")?.ok_or_else(|| Error::usage("`golden.json` has no `lora.adamw`"))?;
    let betas: Vec<f64> = adamw.get("betas")?;
    let [beta1, beta2] = betas[..] else {
        return Err(Error::usage("`lora.adamw.betas` of `golden.json`").expected("two numbers", format!("{betas:?}")));
    };
    let options = AdamWOptions { beta1, beta2, eps: adamw.get("eps")?, weight_decay: adamw.get("weight_decay")? };
    let (lr, max_norm): (f64, f64) = (adamw.get("lr")?, adamw.get("clip")?);

    let mut model = load(case, case.precision, |_| {})?;
    let trainable = Trainable::attach(&mut model, &recorded_adapter(case, "init")?)?;
    let params = trainable.parameters();
    let mut optimizer = AdamW::new(options);
    let frames = |t: Tensor| -> Result<Tensor> { Ok(t.squeeze(2)?) }; // (B, C, 1, h, w) -> (B, C, h, w)
    let latents = frames(case.tensor("lora.in.x0")?)?;
    let (_, _, height, width) = latents.dims4()?;
    let noise = case.tensor("lora.in.noise")?;
    let sigmas: Vec<Vec<f32>> = case.tensor("lora.in.sigma")?.to_vec2()?;
    let text = case.tensor("lora.in.encoder_hidden_states")?;
    let text_lengths = lengths(&case.tensor("lora.in.encoder_hidden_states_mask")?)?;
    let shapes = image_shapes(&case.tensor("lora.in.img_shapes")?)?;

    let (mut losses, mut norms, mut computed) = (Vec::new(), Vec::new(), Vec::new());
    for (step, sigma) in sigmas.iter().enumerate() {
        let batch = NoisyBatch::mix(
            &pack(&latents)?,
            &pack(&frames(noise.get(step)?)?)?,
            text.clone(),
            text_lengths.clone(),
            sigma.clone(),
            vec![1.0; sigma.len()],
            shapes.clone(),
        )?;
        if step == 0 {
            let prediction = unpack(&predict(&model, &batch)?, height, width)?.unsqueeze(2)?;
            computed.push(Computed::new("lora.step0.packed_noisy", batch.noisy.clone()));
            computed.push(Computed::new("lora.step0.pred_unpacked", prediction));
        }
        let (loss, mut gradients) = forward_backward(&model, &batch, Checkpointing::None)?;
        let mut gradients = trainable.take_gradients(&mut gradients);
        if step == 0 {
            let named = trainable.names().iter().zip(&gradients);
            computed.extend(named.filter_map(|(n, g)| Some(Computed::new(format!("lora.grad.{n}"), g.clone()?))));
        }
        losses.push(loss.mean as f32);
        norms.push(clip_grad_norm(&mut gradients, max_norm)? as f32);
        optimizer.step(&params, &gradients, lr)?;
        if case.golden.names().iter().any(|n| n.starts_with(&format!("lora.after{}.", step + 1))) {
            let after = |(n, leaf): (&String, &crate::kernels::Value)| -> Result<Computed> {
                Ok(Computed::new(format!("lora.after{}.{n}", step + 1), leaf.tensor().copy()?))
            };
            computed.extend(trainable.names().iter().zip(trainable.leaves()).map(after).collect::<Result<Vec<_>>>()?);
        }
    }
    computed.push(Computed::floats("lora.losses", losses)?);
    computed.push(Computed::floats("lora.grad_norms", norms)?);
    Ok(computed)
}

/// `adapter.output`: the transformer's output for the `tf.b2_mask` inputs with the case's adapters, exported files or
/// checkpoint folders, active at run time, each at its weight.
pub(super) fn adapter_output(case: &Case) -> Result<Computed> {
    let mut model = load(case, case.precision, |_| {})?;
    let table = ModuleTable::new(&model.config().modules());
    let mut adapters = Vec::new();
    for (path, weight) in &case.adapters {
        let adapter = if path.join("state.json").exists() {
            checkpoint::load_adapter(path, &Device::Cpu)?
        } else {
            let (adapter, warnings) = read_lora(path, &table)?;
            warnings.iter().for_each(|w| tell(format_args!("warning: {w}")));
            adapter
        };
        adapters.push((adapter, *weight));
    }
    let weighted: Vec<(&LoraAdapter, f64)> = adapters.iter().map(|(adapter, weight)| (adapter, *weight)).collect();
    Trainable::attach(&mut model, &combine(&weighted)?)?;
    Ok(Computed::new("adapter.output", Call::read(case, "tf.b2_mask.")?.run(&model, &mut |_, _| {})?))
}
