//! The name of a cache entry: a hash of everything that its content depends on.

use crate::data::Bucket;
use crate::data::image::PIXELS_VERSION;
use candle_core::DType;

/// Part of every key: raised when entries of older versions must not be used any more.
const FORMAT_VERSION: u64 = 1;

/// Raised when the boxes or counts that a pose network's maps lead to change.
const PEOPLE_VERSION: u32 = 1;

/// Identifies one cache entry by its inputs, so that an entry is right or absent, never stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    kind: &'static str,
    hash: blake3::Hash,
}

impl Key {
    /// The embedding of a caption: depends on the caption as written, the prompt template, the length at which tokens
    /// are cut off, the text encoder and tokenizer (their [`fingerprint`](super::fingerprint())), and the stored type.
    pub fn prompt_embeds(caption: &str, template: &str, max_length: usize, encoder: &str, dtype: DType) -> Self {
        let max_length = (max_length as u64).to_le_bytes();
        Self::new(
            "prompt_embeds",
            &[caption.as_bytes(), template.as_bytes(), &max_length, encoder.as_bytes(), dtype.as_str().as_bytes()],
        )
    }

    /// The latents of an image: depends on the image file's bytes, the bucket it is resized to, how this program
    /// decodes and resizes, and the VAE (its [`fingerprint`](super::fingerprint())).
    pub fn latents(image_hash: &blake3::Hash, bucket: Bucket, vae: &str) -> Self {
        let shape = [bucket.height() as u64, bucket.width() as u64, u64::from(PIXELS_VERSION)];
        let shape: Vec<u8> = shape.iter().flat_map(|n| n.to_le_bytes()).collect();
        Self::new("latents", &[image_hash.as_bytes(), &shape, vae.as_bytes()])
    }

    /// A mask at the resolution of latents: depends on the mask file's bytes, the bucket, and how this program decodes and
    /// resizes.
    pub fn mask(mask_hash: &blake3::Hash, bucket: Bucket) -> Self {
        let shape = [bucket.height() as u64, bucket.width() as u64, u64::from(PIXELS_VERSION)];
        let shape: Vec<u8> = shape.iter().flat_map(|n| n.to_le_bytes()).collect();
        Self::new("mask", &[mask_hash.as_bytes(), &shape])
    }

    /// The maps of what a pose network sees in a sample: depends on the sample's latents, the decoder and the network (their
    /// fingerprints), and the size of the pieces.
    pub fn pose_maps(latents: &Key, decoder: &str, network: &str, crop: usize) -> Self {
        let crop = (crop as u64).to_le_bytes();
        Self::new("pose_maps", &[latents.hash.as_bytes(), decoder.as_bytes(), network.as_bytes(), &crop])
    }

    /// The people in an image: depends on the image file's bytes, how this program decodes and resizes, how it makes
    /// boxes and counts, and the pose network (its fingerprint).
    pub fn people(image_hash: &blake3::Hash, network: &str) -> Self {
        let versions: Vec<u8> = [PIXELS_VERSION, PEOPLE_VERSION].iter().flat_map(|n| n.to_le_bytes()).collect();
        Self::new("people", &[image_hash.as_bytes(), &versions, network.as_bytes()])
    }

    fn new(kind: &'static str, parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&FORMAT_VERSION.to_le_bytes());
        for part in [&[kind.as_bytes()], parts].concat() {
            // Lengths keep ("ab", "c") and ("a", "bc") apart.
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        Self { kind, hash: hasher.finalize() }
    }

    /// What kind of entry it names: `prompt_embeds`, `latents`, `mask`, `people`, `pose_maps`.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// The key as 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.hash.to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_key_depends_on_every_part() {
        let hash = |text: &str| blake3::hash(text.as_bytes());
        let bucket = |h, w| Bucket::new(h, w).unwrap();
        let keys = [
            Key::prompt_embeds("a cat", "{}", 512, "f", DType::BF16),
            Key::prompt_embeds("a cat", "{}", 512, "f", DType::F32),
            Key::prompt_embeds("a cat", "{}", 256, "f", DType::BF16),
            Key::prompt_embeds("a cat", "{}", 512, "g", DType::BF16),
            Key::prompt_embeds("a ca", "t{}", 512, "f", DType::BF16),
            Key::prompt_embeds("", "{}", 512, "f", DType::BF16),
            Key::latents(&hash("1"), bucket(32, 16), "v"),
            Key::latents(&hash("1"), bucket(16, 32), "v"),
            Key::latents(&hash("2"), bucket(32, 16), "v"),
            Key::latents(&hash("1"), bucket(32, 16), "w"),
            Key::pose_maps(&Key::latents(&hash("1"), bucket(32, 16), "v"), "v", "n", 256),
            Key::pose_maps(&Key::latents(&hash("2"), bucket(32, 16), "v"), "v", "n", 256),
            Key::pose_maps(&Key::latents(&hash("1"), bucket(32, 16), "v"), "w", "n", 256),
            Key::pose_maps(&Key::latents(&hash("1"), bucket(32, 16), "v"), "v", "m", 256),
            Key::pose_maps(&Key::latents(&hash("1"), bucket(32, 16), "v"), "v", "n", 128),
            Key::mask(&hash("1"), bucket(32, 16)),
            Key::mask(&hash("1"), bucket(16, 32)),
            Key::people(&hash("1"), "p"),
            Key::people(&hash("1"), "q"),
        ];
        assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len());
        assert_eq!(keys[0], Key::prompt_embeds("a cat", "{}", 512, "f", DType::BF16));
    }
}
