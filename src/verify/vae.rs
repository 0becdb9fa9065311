//! `vae.*`: encoding, the posterior, the latents as the transformer sees them, and decoding.
//!
//! Recorded images and latents have a time axis of one frame, (B, C, 1, H, W); ours have none.

use super::{Case, Computed};
use crate::error::Result;
use crate::model::vae::{Vae, pack};

pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let vae = Vae::load(&case.model.join("vae"))?;
    let mut computed = Vec::new();
    if case.has("vae.pixels") {
        let posterior = vae.encode(&case.tensor("vae.pixels")?.squeeze(2)?)?;
        let normalized = vae.config().normalize(&posterior.mean)?;
        if case.has("vae.eps") {
            let sample = posterior.sample(&case.tensor("vae.eps")?.squeeze(2)?)?;
            computed.push(Computed::new("vae.sample", sample.unsqueeze(2)?));
        }
        computed.extend([
            Computed::new("vae.decoded_mode", vae.decode(&posterior.mean)?.unsqueeze(2)?),
            Computed::new("vae.mean", posterior.mean.unsqueeze(2)?),
            Computed::new("vae.logvar", posterior.logvar.unsqueeze(2)?),
            Computed::new("vae.mode_normalized", normalized.unsqueeze(2)?),
            Computed::new("vae.mode_normalized_packed", pack(&normalized)?),
        ]);
    }
    if case.has("vae.z_normalized") {
        let latents = vae.config().denormalize(&case.tensor("vae.z_normalized")?.squeeze(2)?)?;
        computed.push(Computed::new("vae.decoded_z", vae.decode(&latents)?.unsqueeze(2)?));
    }
    Ok(computed)
}
