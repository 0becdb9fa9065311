//! Putting samples together to a batch.

use crate::data::bucket::Bucket;
use crate::error::{Error, Result};
use candle_core::Tensor;

/// One sample, as it lies in the caches.
#[derive(Clone, Debug)]
pub struct Example {
    /// Index in the dataset.
    pub item: usize,
    /// Latents (C, h, w).
    pub latents: Tensor,
    /// Prompt embeddings (L, D), unpadded; those of [`NO_PROMPT`](crate::config::NO_PROMPT) if `caption_dropped`.
    pub prompt_embeds: Tensor,
    /// Whether the caption was replaced by the empty one.
    pub caption_dropped: bool,
}

/// The samples of one step, in one shape.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Clean latents (B, C, h, w).
    pub latents: Tensor,
    /// Prompt embeddings (B, L_max, D), padded with zeros on the right.
    pub prompt_embeds: Tensor,
    /// The number of embeddings of each sample that are not padding, each in 1..=L_max.
    pub lengths: Vec<usize>,
    /// Dataset index of each sample.
    pub items: Vec<usize>,
    /// For each sample, whether its caption was replaced by the empty one.
    pub caption_dropped: Vec<bool>,
    /// The shape of the images.
    pub bucket: Bucket,
}

impl Batch {
    /// The number of samples.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are no samples; a planned batch has one at least.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

/// Stacks `examples`; types stay as they are.
///
/// Errors: no examples; latents of different shapes; embeddings that are empty or of different widths; types that
/// differ between examples.
pub fn collate(bucket: Bucket, examples: &[Example]) -> Result<Batch> {
    let wrong = |what: &str, e: &Example, expected: String, found: String| {
        Error::run(format!("the {what} of item {} do not fit into the batch", e.item)).expected(expected, found)
    };
    let Some(first) = examples.first() else { return Err(Error::run("a batch needs at least one sample")) };
    let describe = |t: &Tensor| format!("{:?} {}", t.dims(), t.dtype().as_str());
    let (_, width) = first.prompt_embeds.dims2()?;
    let (latents_like, embeds_dtype) = (describe(&first.latents), first.prompt_embeds.dtype());
    for e in examples {
        if describe(&e.latents) != latents_like {
            return Err(wrong("latents", e, latents_like, describe(&e.latents)));
        }
        let (length, found_width) = e.prompt_embeds.dims2()?;
        if length == 0 || found_width != width || e.prompt_embeds.dtype() != embeds_dtype {
            let expected = format!("[1 or more, {width}] {}", embeds_dtype.as_str());
            return Err(wrong("prompt embeddings", e, expected, describe(&e.prompt_embeds)));
        }
    }
    let lengths: Vec<usize> = examples.iter().map(|e| e.prompt_embeds.dims()[0]).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let padded = examples
        .iter()
        .map(|e| e.prompt_embeds.pad_with_zeros(0, 0, longest - e.prompt_embeds.dims()[0]))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let latents: Vec<&Tensor> = examples.iter().map(|e| &e.latents).collect();
    Ok(Batch {
        latents: Tensor::stack(&latents, 0)?,
        prompt_embeds: Tensor::stack(&padded, 0)?,
        lengths,
        items: examples.iter().map(|e| e.item).collect(),
        caption_dropped: examples.iter().map(|e| e.caption_dropped).collect(),
        bucket,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    fn example(item: usize, length: usize, width: usize, dtype: DType) -> Example {
        let ones = |shape: &[usize]| (Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap() * (item as f64)).unwrap();
        Example {
            item,
            latents: ones(&[16, 2, 4]),
            prompt_embeds: ones(&[length, width]).to_dtype(dtype).unwrap(),
            caption_dropped: item == 2,
        }
    }

    #[test]
    fn embeddings_are_padded_on_the_right_with_zeros() {
        let bucket = Bucket::new(16, 32).unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let batch = collate(bucket, &[example(1, 3, 2, dtype), example(2, 1, 2, dtype)]).unwrap();
            assert_eq!(batch.latents.dims(), [2, 16, 2, 4]);
            assert_eq!(batch.prompt_embeds.dtype(), dtype);
            let embeds: Vec<Vec<Vec<f32>>> = batch.prompt_embeds.to_dtype(DType::F32).unwrap().to_vec3().unwrap();
            assert_eq!(embeds, [[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]]);
            assert_eq!((batch.lengths, batch.items), (vec![3, 1], vec![1, 2]));
            assert_eq!((batch.caption_dropped, batch.bucket), (vec![false, true], bucket));
            let latents: Vec<f32> = batch.latents.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!((latents[127], latents[128]), (1.0, 2.0));
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused_with_the_item() {
        let bucket = Bucket::new(16, 32).unwrap();
        let good = example(1, 3, 2, DType::F32);
        let mut other_shape = example(7, 3, 2, DType::F32);
        other_shape.latents = other_shape.latents.narrow(2, 0, 2).unwrap();
        for bad in
            [example(7, 3, 4, DType::F32), example(7, 3, 2, DType::BF16), example(7, 0, 2, DType::F32), other_shape]
        {
            let error = collate(bucket, &[good.clone(), bad]).unwrap_err().to_string();
            assert!(error.contains("of item 7"), "{error}");
        }
        assert!(collate(bucket, &[]).is_err());
    }
}
