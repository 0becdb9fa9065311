//! The names of all measures.

use crate::eval::table::{Better, Metric};

const fn metric(key: &'static str, title: &'static str, better: Better, digits: usize) -> Metric {
    Metric { key, title, better, digits }
}

/// Peak signal-to-noise ratio against the partner.
pub const PSNR: Metric = metric("psnr", "PSNR, dB", Better::Higher, 2);
/// SSIM with scikit-image's defaults.
pub const SSIM_UNIFORM: Metric = metric("ssim_uniform7", "SSIM, uniform 7x7", Better::Higher, 4);
/// SSIM of the original paper.
pub const SSIM_GAUSSIAN: Metric = metric("ssim_gaussian11", "SSIM, Gaussian 11x11 (Wang)", Better::Higher, 4);
/// SSIM over five scales.
pub const MS_SSIM: Metric = metric("ms_ssim", "MS-SSIM", Better::Higher, 4);
/// Root mean square difference of the pixels from the partner.
pub const DRIFT: Metric = metric("pixel_drift", "pixel drift", Better::Neither, 4);

/// Variance of the Laplacian.
pub const SHARPNESS: Metric = metric("sharpness", "sharpness (variance of Laplacian)", Better::Neither, 1);
/// Mean luma.
pub const BRIGHTNESS: Metric = metric("brightness", "brightness", Better::Neither, 3);
/// Standard deviation of the luma.
pub const CONTRAST: Metric = metric("contrast", "contrast", Better::Neither, 3);
/// Mean saturation.
pub const SATURATION: Metric = metric("saturation", "saturation", Better::Neither, 3);
/// Hasler and Süsstrunk.
pub const COLOURFULNESS: Metric = metric("colourfulness", "colourfulness", Better::Neither, 1);
/// Mean of 1 - SSIM between pictures of one prompt.
pub const DIVERSITY: Metric =
    metric("diversity_ssim", "diversity among seeds (1 - SSIM, Gaussian)", Better::Neither, 4);

/// Perceptual distance from the partner.
pub const LPIPS: Metric = metric("lpips_alex", "LPIPS, AlexNet", Better::Lower, 4);
/// Mean perceptual distance between pictures of one prompt.
pub const DIVERSITY_LPIPS: Metric = metric("diversity_lpips", "diversity among seeds (LPIPS)", Better::Neither, 4);
/// How well pictures fit their prompts.
pub const CLIP_SCORE: Metric = metric("clip_score", "CLIPScore", Better::Higher, 2);
/// The same for Chinese prompts.
pub const CHINESE_CLIP_SCORE: Metric = metric("chinese_clip_score", "CLIPScore, Chinese CLIP", Better::Higher, 2);
/// Fréchet inception distance.
pub const FID: Metric = metric("fid", "FID", Better::Lower, 3);
/// Kernel inception distance.
pub const KID: Metric = metric("kid", "KID", Better::Lower, 6);
/// Drift without the trigger over drift with it.
pub const BLEED: Metric = metric("bleed", "bleed: drift over that with the trigger", Better::Lower, 3);
/// Pictures with anatomy that a detector flags.
pub const ANATOMY: Metric = metric("anatomy_flagged", "detector-flagged anatomy", Better::Lower, 3);
/// Pictures without a person for the detector.
pub const NO_DETECTION: Metric = metric("no_person_detected", "no person detected", Better::Neither, 3);
/// How often people prefer a picture to its partner of the baseline.
pub const PREFERENCE: Metric = metric("preferred", "preferred by people", Better::Higher, 3);
