//! Modulation computed ahead, so that its weights need not stay in memory.
//!
//! `img_mod.1` and `txt_mod.1` are a third of the published model's weights, and read nothing but the noise level. Where
//! neither they nor the time embedding are trained, their outputs are known as soon as the noise levels are: the tables
//! of many passes are computed in one reading of the weights, block by block, and the weights are dropped again. A table is
//! made by the same op on the same input as in a pass with the weights in memory: the numbers are the same bit for bit.
//!
//! Letters: R rows of a table (samples, or samples and their conditions), D the model's width.

use super::origin::Origin;
use super::{Precision, QwenImageTransformer, TransformerConfig};
use crate::error::Result;
use crate::kernels::linear::Linear;
use crate::kernels::math::Activation;
use crate::kernels::weight::Weight;
use crate::kernels::{Value, no_grad};
use candle_core::Device;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// The linears that make the modulation tables of a block.
pub struct Modulation {
    pub(super) img_mod: Linear,
    pub(super) txt_mod: Linear,
}

/// `linear` of a time embedding (R, D), as a table (R, 6, D).
pub(super) fn table(linear: &Linear, temb: &Value) -> Result<Value> {
    let flat = linear.forward_activated(temb, Activation::Silu)?; // (R, 6 D)
    flat.reshape((temb.dims()[0], 6, temb.dims()[1]))
}

/// What the time embedding of a pass is made of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// The bits of the noise levels.
    levels: Vec<u32>,
    conditions: Option<Vec<usize>>,
}

impl Key {
    fn new(levels: &[f32], conditions: Option<&[usize]>) -> Self {
        Self { levels: levels.iter().map(|l| l.to_bits()).collect(), conditions: conditions.map(<[_]>::to_vec) }
    }

    fn levels(&self) -> Vec<f32> {
        self.levels.iter().map(|&bits| f32::from_bits(bits)).collect()
    }
}

/// The tables of one pass: image and text of each block.
pub(super) type Tables = Rc<Vec<[Value; 2]>>;

/// Where the weights are that are not held, and the tables that are.
pub(super) struct Ahead {
    weights: Origin,
    tables: RefCell<BTreeMap<Key, Tables>>,
}

impl Ahead {
    pub(super) fn new(weights: Origin) -> Self {
        Self { weights, tables: RefCell::default() }
    }

    fn modulation(
        &self,
        block: usize,
        config: &TransformerConfig,
        p: Precision,
        device: &Device,
    ) -> Result<Modulation> {
        let d = config.dim();
        let linear = |name: &str| -> Result<Linear> {
            let name = format!("transformer_blocks.{block}.{name}");
            let float = |part: &str, shape: &[usize]| -> Result<Value> {
                Ok(Value::constant(self.weights.float(&format!("{name}.{part}"), shape, p, device)?))
            };
            // As a block would hold it.
            let weight = match p.int8 {
                true => Weight::Int8(self.weights.int8(&format!("{name}.weight"), (6 * d, d), p, device)?),
                false => float("weight", &[6 * d, d])?.into(),
            };
            Ok(Linear { weight, bias: Some(float("bias", &[6 * d])?), lora: None })
        };
        Ok(Modulation { img_mod: linear("img_mod.1")?, txt_mod: linear("txt_mod.1")? })
    }
}

/// Tables that are held as long as this lives.
#[must_use]
pub struct Held<'a> {
    model: &'a QwenImageTransformer,
    keys: Vec<Key>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(ahead) = &self.model.ahead {
            let mut tables = ahead.tables.borrow_mut();
            self.keys.iter().for_each(|key| drop(tables.remove(key)));
        }
    }
}

impl QwenImageTransformer {
    /// Whether the weights of the modulation are left on the disk.
    pub fn modulates_ahead(&self) -> bool {
        self.ahead.is_some()
    }

    /// Computes the modulation of passes at these noise levels, one list for each, in one reading of its weights. Passes
    /// that are held already are not computed again. Does nothing where the weights are in memory.
    ///
    /// Without it a pass reads the weights for itself, and gives the same numbers.
    pub fn modulate_ahead(&self, passes: &[Vec<f32>]) -> Result<Held<'_>> {
        let mut keys: Vec<Key> = passes.iter().map(|levels| Key::new(levels, None)).collect();
        keys.sort();
        keys.dedup();
        if let Some(ahead) = &self.ahead {
            keys.retain(|key| !ahead.tables.borrow().contains_key(key));
            let tables = self.compute(ahead, &keys)?;
            ahead.tables.borrow_mut().extend(keys.iter().cloned().zip(tables));
        }
        Ok(Held { model: self, keys })
    }

    /// The tables of a pass, held or computed now; `None` where the blocks have the weights.
    pub(super) fn tables(&self, levels: &[f32], conditions: Option<&[usize]>) -> Result<Option<Tables>> {
        let Some(ahead) = &self.ahead else { return Ok(None) };
        let key = Key::new(levels, conditions);
        if let Some(tables) = ahead.tables.borrow().get(&key) {
            return Ok(Some(tables.clone()));
        }
        Ok(self.compute(ahead, &[key])?.pop())
    }

    fn compute(&self, ahead: &Ahead, keys: &[Key]) -> Result<Vec<Tables>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        no_grad(|| {
            let compute = self.precision.compute;
            let embed = |key: &Key| {
                self.time_text_embed.forward(&key.levels(), key.conditions.as_deref(), compute, &self.device)
            };
            let embeddings: Vec<Value> = keys.iter().map(embed).collect::<Result<_>>()?;
            let mut tables = vec![Vec::with_capacity(self.config.num_layers); keys.len()];
            for block in 0..self.config.num_layers {
                let Modulation { img_mod, txt_mod } =
                    ahead.modulation(block, &self.config, self.precision, &self.device)?;
                for (temb, tables) in embeddings.iter().zip(&mut tables) {
                    tables.push([table(&img_mod, temb)?, table(&txt_mod, temb)?]);
                }
            }
            Ok(tables.into_iter().map(Rc::new).collect())
        })
    }
}
