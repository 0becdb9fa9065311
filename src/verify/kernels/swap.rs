//! Ten training steps of a small model whose blocks wait in host memory, against the same model on the device: the same
//! numbers. On a GPU this tests the stream of copies, its events and the two buffers.

use super::model::{Small, Trained};
use super::{Row, Sizes};
use crate::config::BaseDtype;
use crate::error::Result;
use crate::model::transformer::{Checkpointing, Placement, Precision, QwenImageTransformer};
use candle_core::{DType, Device};

/// All blocks are swapped: one is computed with while the next comes, every time.
const BLOCKS: usize = 5;

pub(super) fn check(device: &Device, sizes: Sizes) -> Result<Vec<Row>> {
    let mut small = Small::new(sizes);
    small.config.num_layers = BLOCKS;
    let mut rows = Vec::new();
    for (how, precision) in
        [("bf16", Precision::uniform(DType::BF16)), ("int8 base", Precision::of(BaseDtype::Int8, DType::BF16))]
    {
        let train = |swapped_blocks: usize| -> Result<Trained> {
            let placement = Placement { streamed_modulation: false, swapped_blocks };
            let config = small.config.clone();
            small.steps(
                QwenImageTransformer::random_placed(config, 11, precision, device, placement)?,
                Checkpointing::Full,
            )
        };
        let (resident, swapped) = (train(0)?, train(BLOCKS)?);
        let row = |tensor: &str, error: f64| {
            Row::new(format!("{BLOCKS} of {BLOCKS} blocks swapped, {how}"), tensor, error, 0.0)
        };
        rows.push(row("losses", furthest(swapped.losses.iter().zip(&resident.losses).map(|(a, b)| a - b))));
        let flat = |t: &Trained| t.gradients.iter().flatten().flatten().copied().map(f64::from).collect::<Vec<_>>();
        let (a, b) = (flat(&swapped), flat(&resident));
        rows.push(row("gradients", furthest(a.iter().zip(&b).map(|(a, b)| a - b))));
    }
    Ok(rows)
}

/// The largest magnitude; infinite if one is not finite.
fn furthest(differences: impl Iterator<Item = f64>) -> f64 {
    differences.fold(0.0, |most, d| if d.is_finite() { d.abs().max(most) } else { f64::INFINITY })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swapped_blocks_train_to_the_very_numbers() {
        let rows = check(&Device::Cpu, Sizes::Small).unwrap();
        assert_eq!(rows.len(), 4);
        assert!(rows.iter().all(|row| row.ok), "{rows:?}");
        assert_eq!(furthest([0.5, -2.0, 1.0].into_iter()), 2.0);
        assert_eq!(furthest([0.5, f64::NAN].into_iter()), f64::INFINITY);
    }
}
