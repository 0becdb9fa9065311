//! Building the transformer from its files, and reaching its linears by name.

use super::ahead::{Ahead, Modulation};
use super::block::{Attention, Block, FeedForward};
use super::origin::{Origin, Placement};
use super::{Precision, QwenImageTransformer, TimeTextEmbed, TransformerConfig};
use crate::error::{Error, Result};
use crate::io::Weights;
use crate::kernels::Value;
use crate::kernels::int8::Int8Matrix;
use crate::kernels::linear::{Linear, Lora};
use crate::kernels::swap::Swap;
use crate::kernels::weight::Weight;
use candle_core::{Device, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

/// Whether the base weights are trained themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseWeights {
    /// Constants: no gradient of them is ever computed.
    Frozen,
    /// Leaves, as full fine-tuning needs.
    Trained,
}

/// How the weights are kept.
struct Kept {
    base: BaseWeights,
    /// The modulation is left out where there is this.
    ahead: Option<Ahead>,
    /// Whether `ahead` is there, and which blocks wait in host memory; only what is frozen can.
    placement: Placement,
    /// Where these are made before they wait.
    home: Device,
}

impl Kept {
    /// On the device, all of them.
    fn resident(base: BaseWeights) -> Self {
        Self { base, ahead: None, placement: Placement::default(), home: Device::Cpu }
    }
}

/// Names that published or repackaged files carry beside the model's own tensors.
fn may_ignore(name: &str) -> bool {
    name.ends_with("__index_timestep_zero__")
}

impl QwenImageTransformer {
    /// Loads a folder with `config.json` and safetensors. Names and shapes are checked before any data is read.
    pub fn load(folder: &Path, precision: Precision, device: &Device, base: BaseWeights) -> Result<Self> {
        let config = TransformerConfig::from_file(&folder.join("config.json"))?;
        Self::from_weights(config, &Weights::open_folder(folder)?, precision, device, base)
    }

    /// Builds the network from weights that fit `config`. What is to be held in int8 is quantised as it is read: of no weight
    /// are more than a few rows there in another form.
    pub fn from_weights(
        config: TransformerConfig,
        weights: &Weights,
        precision: Precision,
        device: &Device,
        base: BaseWeights,
    ) -> Result<Self> {
        Self::check_weights(&config, weights)?;
        let float = |name: &str, shape: &[usize], on: &Device| weights.get(name, shape, precision.weights, on);
        let int8 = |name: &str, dims: (usize, usize), on: &Device| weights.int8(name, dims)?.to_device(on);
        Self::build_of(config, precision, device, Kept::resident(base), float, int8)
    }

    /// [`from_weights`](Self::from_weights) of frozen weights, kept as `placement` says.
    pub fn from_weights_placed(
        config: TransformerConfig,
        weights: Weights,
        precision: Precision,
        device: &Device,
        placement: Placement,
    ) -> Result<Self> {
        Self::check_weights(&config, &weights)?;
        Self::of_origin(config, Origin::Files(Rc::new(weights)), precision, device, placement)
    }

    /// Checks from the headers alone that `weights` are a whole transformer of these dimensions.
    pub fn check_weights(config: &TransformerConfig, weights: &Weights) -> Result<()> {
        weights.check(&config.tensors(), may_ignore)
    }

    /// A network of random weights, for benchmarks: normal with variance 1 / inputs, norm weights one, biases zero. On the
    /// CPU they are a function of the seed; on a GPU they are drawn there, tensor by tensor, in another stream.
    pub fn random(
        config: TransformerConfig,
        seed: u64,
        precision: Precision,
        device: &Device,
        base: BaseWeights,
    ) -> Result<Self> {
        let origin = Origin::random(seed, device)?;
        Self::build(config, precision, device, base, |name, shape| origin.float(name, shape, precision, device))
    }

    /// [`random`](Self::random) of frozen weights, kept as `placement` says. On the CPU they are the same.
    pub fn random_placed(
        config: TransformerConfig,
        seed: u64,
        precision: Precision,
        device: &Device,
        placement: Placement,
    ) -> Result<Self> {
        Self::of_origin(config, Origin::random(seed, device)?, precision, device, placement)
    }

    fn of_origin(
        config: TransformerConfig,
        origin: Origin,
        precision: Precision,
        device: &Device,
        placement: Placement,
    ) -> Result<Self> {
        let kept = Kept {
            base: BaseWeights::Frozen,
            ahead: placement.streamed_modulation.then(|| Ahead::new(origin.clone())),
            placement,
            home: origin.home(device),
        };
        let float = |name: &str, shape: &[usize], on: &Device| origin.float(name, shape, precision, on);
        let int8 = |name: &str, dims: (usize, usize), on: &Device| origin.int8(name, dims, precision, on);
        Self::build_of(config, precision, device, kept, float, int8)
    }

    /// Builds the network from what `tensor` gives for each name and shape of the config, tensor by tensor quantised if
    /// `precision` says so.
    pub fn build(
        config: TransformerConfig,
        precision: Precision,
        device: &Device,
        base: BaseWeights,
        tensor: impl Fn(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let float = |name: &str, shape: &[usize], _: &Device| tensor(name, shape);
        let int8 = |name: &str, (n, k): (usize, usize), on: &Device| {
            Int8Matrix::quantise(name, &tensor(name, &[n, k])?)?.to_device(on)
        };
        Self::build_of(config, precision, device, Kept::resident(base), float, int8)
    }

    /// `float` and `int8` make a weight of this name and shape on a device.
    ///
    /// Errors (usage): weights that are to be trained, in int8.
    fn build_of(
        config: TransformerConfig,
        precision: Precision,
        device: &Device,
        kept: Kept,
        float: impl Fn(&str, &[usize], &Device) -> Result<Tensor>,
        int8: impl Fn(&str, (usize, usize), &Device) -> Result<Int8Matrix>,
    ) -> Result<Self> {
        let Kept { base, ahead, placement, home } = kept;
        if precision.int8 && base == BaseWeights::Trained {
            return Err(Error::usage("weights in int8 are not trained").hint("hold them in f32"));
        }
        let shapes: BTreeMap<String, Vec<usize>> = config.tensors().into_iter().collect();
        let value = |name: &str| -> Result<Value> {
            let tensor = float(name, &shapes[name], device)?;
            Ok(match base {
                BaseWeights::Frozen => Value::constant(tensor),
                BaseWeights::Trained => Value::leaf(tensor),
            })
        };
        let linear = |name: &str| -> Result<Linear> {
            let bias = Some(value(&format!("{name}.bias"))?);
            Ok(Linear { weight: value(&format!("{name}.weight"))?.into(), bias, lora: None })
        };
        let swap = (placement.swapped_blocks > 0).then(|| Swap::new(device)).transpose()?;
        let block_linear = |name: &str, swap: Option<&Rc<Swap>>| -> Result<Linear> {
            if swap.is_none() && !precision.int8 {
                return linear(name);
            }
            let bias = Some(value(&format!("{name}.bias"))?);
            let name = format!("{name}.weight");
            let (shape, on) = (&shapes[&name], if swap.is_some() { &home } else { device });
            let weight = match precision.int8 {
                true => Weight::Int8(int8(&name, (shape[0], shape[1]), on)?),
                false => Value::constant(float(&name, shape, on)?).into(),
            };
            let weight = match swap {
                Some(swap) => swap.add(weight)?,
                None => weight,
            };
            Ok(Linear { weight, bias, lora: None })
        };
        let block = |i: usize| -> Result<Rc<Block>> {
            let swap = swap.as_ref().filter(|_| placement.swaps(i, config.num_layers));
            if let Some(swap) = swap {
                swap.begin_group();
            }
            let value = |name: &str| value(&format!("transformer_blocks.{i}.{name}"));
            let linear = |name: &str| block_linear(&format!("transformer_blocks.{i}.{name}"), swap);
            let mlp = |name: &str| -> Result<FeedForward> {
                Ok(FeedForward { proj: linear(&format!("{name}.net.0.proj"))?, out: linear(&format!("{name}.net.2"))? })
            };
            let modulation =
                || Ok::<_, Error>(Modulation { img_mod: linear("img_mod.1")?, txt_mod: linear("txt_mod.1")? });
            Ok(Rc::new(Block {
                modulation: ahead.is_none().then(modulation).transpose()?,
                attn: Attention {
                    to_q: linear("attn.to_q")?,
                    to_k: linear("attn.to_k")?,
                    to_v: linear("attn.to_v")?,
                    add_q_proj: linear("attn.add_q_proj")?,
                    add_k_proj: linear("attn.add_k_proj")?,
                    add_v_proj: linear("attn.add_v_proj")?,
                    to_out: linear("attn.to_out.0")?,
                    to_add_out: linear("attn.to_add_out")?,
                    norm_q: value("attn.norm_q.weight")?,
                    norm_k: value("attn.norm_k.weight")?,
                    norm_added_q: value("attn.norm_added_q.weight")?,
                    norm_added_k: value("attn.norm_added_k.weight")?,
                },
                img_mlp: mlp("img_mlp")?,
                txt_mlp: mlp("txt_mlp")?,
            }))
        };
        let addition = "time_text_embed.addition_t_embedding.weight";
        Ok(Self {
            precision,
            placement,
            device: device.clone(),
            img_in: linear("img_in")?,
            txt_norm: value("txt_norm.weight")?,
            txt_in: linear("txt_in")?,
            time_text_embed: TimeTextEmbed {
                linear_1: linear("time_text_embed.timestep_embedder.linear_1")?,
                linear_2: linear("time_text_embed.timestep_embedder.linear_2")?,
                addition_t_embedding: config.use_additional_t_cond.then(|| value(addition)).transpose()?,
            },
            transformer_blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
            norm_out: linear("norm_out.linear")?,
            proj_out: linear("proj_out")?,
            ahead,
            last_rotary: RefCell::default(),
            config,
        })
    }

    /// Puts an adapter on the linear `module`, or takes it off. False if there is no such linear.
    ///
    /// No value of an earlier forward pass may be alive.
    pub fn set_adapter(&mut self, module: &str, lora: Option<Lora>) -> bool {
        match self.linear_mut(module) {
            Some(linear) => {
                linear.lora = lora;
                true
            }
            None => false,
        }
    }

    fn linear_mut(&mut self, module: &str) -> Option<&mut Linear> {
        if let Some(rest) = module.strip_prefix("transformer_blocks.") {
            let (index, name) = rest.split_once('.')?;
            let block = self.transformer_blocks.get_mut(index.parse::<usize>().ok()?)?;
            return Rc::get_mut(block)
                .expect("adapters change between passes, when nothing else holds a block")
                .linear_mut(name);
        }
        Some(match module {
            "img_in" => &mut self.img_in,
            "txt_in" => &mut self.txt_in,
            "time_text_embed.timestep_embedder.linear_1" => &mut self.time_text_embed.linear_1,
            "time_text_embed.timestep_embedder.linear_2" => &mut self.time_text_embed.linear_2,
            "norm_out.linear" => &mut self.norm_out,
            "proj_out" => &mut self.proj_out,
            _ => return None,
        })
    }

    /// Every base parameter that is held as floats on the device by its checkpoint name, in the model's order.
    pub fn parameters(&self) -> Vec<(String, Value)> {
        let mut out = Vec::new();
        let ends = [
            ("img_in", &self.img_in),
            ("txt_in", &self.txt_in),
            ("time_text_embed.timestep_embedder.linear_1", &self.time_text_embed.linear_1),
            ("time_text_embed.timestep_embedder.linear_2", &self.time_text_embed.linear_2),
            ("norm_out.linear", &self.norm_out),
            ("proj_out", &self.proj_out),
        ];
        let mut add = |name: String, linear: &Linear| {
            out.extend(linear.weight.value().map(|w| (format!("{name}.weight"), w.clone())));
            out.extend(linear.bias.iter().map(|b| (format!("{name}.bias"), b.clone())));
        };
        ends.into_iter().for_each(|(name, linear)| add(name.into(), linear));
        for (i, block) in self.transformer_blocks.iter().enumerate() {
            block.linears().into_iter().for_each(|(name, l)| add(format!("transformer_blocks.{i}.{name}"), l));
        }
        out.push(("txt_norm.weight".into(), self.txt_norm.clone()));
        if let Some(table) = &self.time_text_embed.addition_t_embedding {
            out.push(("time_text_embed.addition_t_embedding.weight".into(), table.clone()));
        }
        for (i, block) in self.transformer_blocks.iter().enumerate() {
            let a = &block.attn;
            let norms = [
                ("norm_q", &a.norm_q),
                ("norm_k", &a.norm_k),
                ("norm_added_q", &a.norm_added_q),
                ("norm_added_k", &a.norm_added_k),
            ];
            let name = |norm: &str| format!("transformer_blocks.{i}.attn.{norm}.weight");
            out.extend(norms.map(|(norm, value)| (name(norm), value.clone())));
        }
        out
    }
}
