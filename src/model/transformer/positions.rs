//! Positions: the sinusoidal features of the noise level, and the rotary angles of image and text tokens.

use super::config::{TIME_FEATURES, TransformerConfig};
use crate::kernels::rope::Rope;

/// Frames, rows and columns of one image in latent patches.
pub type ImageShape = (usize, usize, usize);

/// Sinusoidal features of each noise level, row-major (levels, 256): cosines then sines of `1000 t f_i`.
///
/// Everything is f32 in the original's order of operations, so that the angles (up to 1000) agree to their last bit.
/// Source: <https://github.com/huggingface/diffusers/blob/v0.35.1/src/diffusers/models/embeddings.py#L27>
pub fn time_features(timesteps: &[f32]) -> Vec<f32> {
    let half = TIME_FEATURES / 2;
    let frequency = |i: usize| (-(10000f32.ln()) * i as f32 / half as f32).exp();
    let angle = |t: f32, i: usize| 1000.0 * (t * frequency(i));
    let row = |&t: &f32| (0..half).map(move |i| angle(t, i).cos()).chain((0..half).map(move |i| angle(t, i).sin()));
    timesteps.iter().flat_map(row).collect()
}

/// Rotary tables of the image tokens of one sample and of its text tokens.
///
/// Image tokens: frame index, and rows and columns centred so that an odd side has one more negative position. Text
/// token j stands at M + j on all axes, where M is the largest half side among the images (and with
/// `use_layer3d_rope` also the number of layers). There the last image is the condition image, at frame -1.
///
/// Source: <https://github.com/huggingface/diffusers/blob/v0.35.1/src/diffusers/models/transformers/transformer_qwenimage.py#L155>
pub fn rotary_tables(config: &TransformerConfig, images: &[ImageShape], text_tokens: usize) -> (Rope, Rope) {
    let mut image_positions = Vec::new();
    let mut text_start = 0;
    for (index, &(frames, height, width)) in images.iter().enumerate() {
        let is_condition = config.use_layer3d_rope && index + 1 == images.len();
        text_start = text_start.max(height / 2).max(width / 2);
        for f in 0..frames {
            let frame = if is_condition { -1.0 } else { (index + f) as f32 };
            for h in 0..height {
                for w in 0..width {
                    let centred = |i: usize, side: usize| i as f32 - (side - side / 2) as f32;
                    image_positions.push([frame, centred(h, height), centred(w, width)]);
                }
            }
        }
    }
    if config.use_layer3d_rope {
        text_start = text_start.max(images.len().saturating_sub(1));
    }
    let text_positions: Vec<[f32; 3]> = (0..text_tokens).map(|j| [(text_start + j) as f32; 3]).collect();
    (table(config, &image_positions), table(config, &text_positions))
}

fn table(config: &TransformerConfig, positions: &[[f32; 3]]) -> Rope {
    let half = config.attention_head_dim / 2;
    let mut cos = Vec::with_capacity(positions.len() * half);
    let mut sin = Vec::with_capacity(positions.len() * half);
    let frequencies = config
        .axes_dims_rope
        .map(|d| -> Vec<f32> { (0..d / 2).map(|k| 1.0 / 10000f32.powf(2.0 * k as f32 / d as f32)).collect() });
    for position in positions {
        for (p, frequencies) in position.iter().zip(&frequencies) {
            for f in frequencies {
                let (s, c) = (p * f).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
    }
    Rope::new(cos, sin, half)
}
