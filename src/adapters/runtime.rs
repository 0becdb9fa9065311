//! Adapters as they are applied at run time: any number of LoRA files as one pair of matrices for each module.
//!
//! A linear has one place for an adapter. Several are put beside each other: with A stacked and B side by side,
//! `[B1 B2] [A1; A2] = B1 A1 + B2 A2`.

use crate::adapters::delta::{Delta, Factors};
use crate::adapters::lora::{LoraAdapter, LoraModule};
use crate::adapters::matrix::Matrix;
use crate::adapters::read::{AdapterFile, ModuleEntry, ModuleTable, ReadOptions};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use std::path::Path;

/// Reads an adapter file of any spelling as a plain low-rank adapter; also what the user should know about its scale.
///
/// Errors (usage): those of [`AdapterFile::open`]; an adapter of another kind, such as LoHa or DoRA.
pub fn read_lora(path: &Path, table: &ModuleTable) -> Result<(LoraAdapter, Vec<String>)> {
    let options = ReadOptions { table, text_encoder: None, alpha: None, allow_unmatched: false };
    let file = AdapterFile::open(path, &options)?;
    let mut warnings = file.warnings.clone();
    if !file.text_encoder.is_empty() {
        warnings.push(format!("`{}` also adapts the text encoder; that part is not applied", path.display()));
    }
    let module = |(name, entry): (&String, &ModuleEntry)| -> Result<(String, LoraModule)> {
        let Delta { factors: Factors::Lora { a, b }, scale, magnitude: None } = file.delta(name, entry)? else {
            return Err(Error::usage(format!("`{}` is not a plain LoRA", path.display()))
                .detail(format!("`{name}` is another kind of adapter"))
                .hint("only plain LoRAs can be applied at run time"));
        };
        let tensor = |m: Matrix| Tensor::from_vec(m.data, (m.rows, m.cols), &Device::Cpu);
        let alpha = scale * a.rows as f64;
        Ok((name.clone(), LoraModule { a: tensor(a)?, b: tensor(b)?, alpha, scale }))
    };
    Ok((LoraAdapter { modules: file.transformer.iter().map(module).collect::<Result<_>>()? }, warnings))
}

/// The sum of adapters, each with its weight, as one adapter. Those of weight 0 are left out.
///
/// Where only one adapter changes a module, its matrices stay as they are and the weight goes into the scale; where
/// several do, their scales go into B and the sum's scale is 1.
pub fn combine(adapters: &[(&LoraAdapter, f64)]) -> Result<LoraAdapter> {
    let mut sum = LoraAdapter::default();
    for &(adapter, weight) in adapters.iter().filter(|(_, weight)| *weight != 0.0) {
        for (name, module) in &adapter.modules {
            let weighted = LoraModule { alpha: module.alpha * weight, scale: module.scale * weight, ..module.clone() };
            let joined = match sum.modules.get(name) {
                None => weighted,
                Some(first) => beside(first, &weighted)?,
            };
            sum.modules.insert(name.clone(), joined);
        }
    }
    Ok(sum)
}

fn beside(first: &LoraModule, second: &LoraModule) -> Result<LoraModule> {
    let a = Tensor::cat(&[&first.a, &second.a], 0)?; // (r1 + r2, in)
    let b = Tensor::cat(&[(&first.b * first.scale)?, (&second.b * second.scale)?], 1)?; // (out, r1 + r2)
    Ok(LoraModule { alpha: a.dims()[0] as f64, scale: 1.0, a, b })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::lora::tests::trained;

    #[test]
    fn the_combination_changes_weights_by_the_weighted_sum() {
        let (one, two) = (trained(&[4, 2]), trained(&[3]));
        let sum = combine(&[(&one, 0.5), (&two, -2.0), (&one, 0.0)]).unwrap();
        assert_eq!(sum.modules.len(), 2);
        let delta = |adapter: &LoraAdapter, name: &str| adapter.modules[name].delta().unwrap();
        let name = "blocks.0.to_q";
        assert_eq!(sum.modules[name].rank(), 7);
        let expected = ((delta(&one, name) * 0.5).unwrap() - (delta(&two, name) * 2.0).unwrap()).unwrap();
        let error = (delta(&sum, name) - &expected).unwrap().abs().unwrap().max_all().unwrap();
        assert!(error.to_scalar::<f32>().unwrap() < 1e-5);
        // Alone on a module: the very matrices, with the weight in the scale.
        let (alone, own) = (&sum.modules["blocks.1.to_q"], &one.modules["blocks.1.to_q"]);
        assert_eq!(alone.a.to_vec2::<f32>().unwrap(), own.a.to_vec2::<f32>().unwrap());
        assert_eq!(alone.scale, own.scale * 0.5);
        assert!(combine(&[(&one, 0.0)]).unwrap().modules.is_empty());
    }
}
