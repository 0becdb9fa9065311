//! An adapter from the difference of two checkpoints.

use crate::adapters::convert::of_dense;
use crate::adapters::merge::Base;
use crate::adapters::write::OutModule;
use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};
use safetensors::Dtype;

/// The adapter of one module, and how well it stands for the difference.
pub struct Extracted {
    /// As it will be written, in f32.
    pub module: OutModule,
    /// Share of the difference's energy (sum of squares) that the rank has cost.
    pub lost: f64,
    /// Size of the difference relative to the base weight: ratio of their Frobenius norms.
    pub relative: f64,
}

/// The LoRA of at most `rank` that comes nearest to the change from `base` to `tuned`, for one module; `None` if the
/// module has not changed.
///
/// Errors: the module is missing in either, or shaped differently: the checkpoints are of different models.
pub fn extract_module(base: &Base, tuned: &Base, module: &str, rank: usize) -> Result<Option<Extracted>> {
    let (Some(before), Some(mut after)) = (base.weight(module)?, tuned.weight(module)?) else {
        return Err(Error::usage(format!("only one of the checkpoints has `{module}`"))
            .hint("both must be of the same architecture"));
    };
    if (before.rows, before.cols) != (after.rows, after.cols) {
        return Err(Error::usage(format!("`{module}` differs in shape between the checkpoints"))
            .expected(format!("{} x {}", before.rows, before.cols), format!("{} x {}", after.rows, after.cols)));
    }
    after.add_scaled(&before, -1.0);
    let energy = after.energy();
    if !energy.is_finite() {
        return Err(Error::usage(format!("`{module}` holds NaN or infinite values")));
    }
    if energy == 0.0 {
        return Ok(None);
    }
    let rank = rank.min(after.rows).min(after.cols);
    let relative = (energy / before.energy().max(f64::MIN_POSITIVE)).sqrt();
    drop(before);
    let (b, a, lost) = of_dense(&after, rank, &mut Stream::named(0, module, Purpose::Adapters));
    Ok(Some(Extracted { module: OutModule::lora(module, b, a, 1.0, None, Dtype::F32), lost, relative }))
}
