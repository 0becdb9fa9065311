//! Joint attention in tiles of queries; see `kernels::attention`.
//!
//! Samples run one after the other with exactly their valid keys. A tile holds the f32 scores of some rows of all
//! heads; the log-sum-exp of each row is kept for the backward pass, which computes the tile's probabilities again.

use crate::error::Result;
use crate::kernels::attention::{Stream, TextLengths};
use crate::kernels::composed::product::{product, product_f32};
use crate::kernels::composed::wide;
use crate::kernels::tape::{Value, record};
use candle_core::{D, Tensor};
use std::ops::Range;

/// Scores that a tile of all heads may hold: 128 MiB of f32.
const TILE_SCORES: usize = 1 << 25;

/// [`joint_attention`](crate::kernels::attention::joint_attention).
pub fn joint_attention(text: Stream, image: Stream, heads: usize, lengths: &TextLengths) -> Result<Vec<Value>> {
    #[cfg(feature = "cuda")]
    if let Some(outputs) = crate::kernels::cuda::attention::joint_attention(text, image, heads, lengths)? {
        return Ok(outputs);
    }
    in_tiles(text, image, heads, lengths.valid(), TILE_SCORES)
}

/// The same with tiles of at most `tile_scores` scores (but at least one row).
pub fn in_tiles(
    text: Stream,
    image: Stream,
    heads: usize,
    lengths: &[usize],
    tile_scores: usize,
) -> Result<Vec<Value>> {
    let (_, text_tokens, width) = text.q.tensor().dims3()?;
    let dims = Dims { heads, head: width / heads, text: text_tokens, lengths: lengths.to_vec(), tile_scores };
    let inputs = [text.q, text.k, text.v, image.q, image.k, image.v];
    let tensors = inputs.map(|v| v.tensor().clone());
    let (mut outputs, mut log_sums) = (Vec::new(), Vec::new());
    for sample in 0..lengths.len() {
        let (out, log_sum) = dims.forward(&tensors, sample)?;
        outputs.push(out.unsqueeze(0)?);
        log_sums.push(log_sum);
    }
    let out = Tensor::cat(&outputs, 0)?; // (B, S, W)
    let tokens = out.dims()[1];
    let outputs = vec![
        out.narrow(1, 0, text_tokens)?.contiguous()?,
        out.narrow(1, text_tokens, tokens - text_tokens)?.contiguous()?,
    ];
    drop(out);
    let saved = outputs.clone();
    Ok(record(&inputs, outputs, move |grads| dims.backward(&tensors, &saved, &log_sums, &grads)))
}

struct Dims {
    heads: usize,
    head: usize,
    /// Text tokens with their padding.
    text: usize,
    lengths: Vec<usize>,
    tile_scores: usize,
}

impl Dims {
    fn scale(&self) -> f64 {
        1.0 / (self.head as f64).sqrt()
    }

    /// The first `rows` tokens of one sample of (B, S, H * head), by head: (H, rows, head).
    fn by_head(&self, x: &Tensor, sample: usize, rows: usize) -> Result<Tensor> {
        let x = x.narrow(0, sample, 1)?.narrow(1, 0, rows)?.reshape((rows, self.heads, self.head))?;
        Ok(x.transpose(0, 1)?)
    }

    /// Text and image tokens of one sample one after the other, by head: (H, rows of text + S_img, head).
    fn joined(&self, text: &Tensor, image: &Tensor, sample: usize, text_rows: usize) -> Result<Tensor> {
        let text = self.by_head(text, sample, text_rows)?;
        let image = self.by_head(image, sample, image.dims()[1])?;
        Ok(if text_rows == 0 { image.contiguous()? } else { Tensor::cat(&[text, image], 1)?.contiguous()? })
    }

    /// (H, rows, head) -> (rows, H * head).
    fn by_token(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.dims()[1];
        Ok(x.transpose(0, 1)?.reshape((rows, self.heads * self.head))?)
    }

    fn tiles(&self, rows: Range<usize>, keys: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let size = (self.tile_scores / (self.heads * keys).max(1)).max(1);
        let end = rows.end;
        rows.step_by(size).map(move |start| (start, size.min(end - start)))
    }

    /// One sample's outputs (S, W) and the log-sum-exp of its rows (H, S, 1).
    fn forward(&self, tensors: &[Tensor; 6], sample: usize) -> Result<(Tensor, Tensor)> {
        let [qt, kt, vt, qi, ki, vi] = tensors;
        let length = self.lengths[sample];
        let q = self.joined(qt, qi, sample, self.text)?;
        let (k, v) = (self.joined(kt, ki, sample, length)?, self.joined(vt, vi, sample, length)?);
        let (mut outputs, mut log_sums) = (Vec::new(), Vec::new());
        for (start, rows) in self.tiles(0..q.dims()[1], k.dims()[1]) {
            let q = q.narrow(1, start, rows)?.contiguous()?;
            let scores = product_f32(&q, &k.t()?, self.scale())?; // (H, rows, keys)
            let top = scores.max_keepdim(D::Minus1)?;
            let p = scores.broadcast_sub(&top)?.exp()?;
            drop(scores);
            let total = p.sum_keepdim(D::Minus1)?;
            let out = product_f32(&p.to_dtype(v.dtype())?, &v, 1.0)?.broadcast_div(&total)?;
            outputs.push(self.by_token(&out.to_dtype(v.dtype())?)?);
            log_sums.push((top + total.log()?)?);
        }
        Ok((Tensor::cat(&outputs, 0)?, Tensor::cat(&log_sums, 1)?))
    }

    /// Gradients of the six inputs.
    fn backward(
        &self,
        tensors: &[Tensor; 6],
        outputs: &[Tensor],
        log_sums: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut samples: [Vec<Tensor>; 6] = Default::default();
        for (sample, log_sums) in log_sums.iter().enumerate() {
            let parts = self.sample_backward(tensors, outputs, log_sums, grads, sample)?;
            samples.iter_mut().zip(parts).for_each(|(all, part)| all.push(part));
        }
        samples.into_iter().map(|all| Ok(Some(Tensor::cat(&all, 0)?))).collect()
    }

    /// One sample's gradients, each (1, S, W).
    fn sample_backward(
        &self,
        tensors: &[Tensor; 6],
        outputs: &[Tensor],
        log_sums: &Tensor,
        grads: &[Option<Tensor>],
        sample: usize,
    ) -> Result<[Tensor; 6]> {
        let [qt, kt, vt, qi, ki, vi] = tensors;
        let length = self.lengths[sample];
        let (k, v) = (self.joined(kt, ki, sample, length)?, self.joined(vt, vi, sample, length)?);
        let dtype = k.dtype();
        let (mut dk, mut dv): (Option<Tensor>, Option<Tensor>) = (None, None);
        let mut dqs = Vec::with_capacity(2);
        for (stream, q) in [qt, qi].into_iter().enumerate() {
            let tokens = q.dims()[1];
            // A stream whose output nobody used has a zero gradient, and its queries are not visited.
            let Some(dy) = &grads[stream] else {
                dqs.push(Tensor::zeros((1, tokens, self.heads * self.head), dtype, q.device())?);
                continue;
            };
            let q = self.by_head(q, sample, tokens)?;
            let (dy, out) = (self.by_head(dy, sample, tokens)?, self.by_head(&outputs[stream], sample, tokens)?);
            let first = if stream == 0 { 0 } else { self.text };
            let mut parts = Vec::new();
            for (start, rows) in self.tiles(0..tokens, k.dims()[1]) {
                let tile = |x: &Tensor| x.narrow(1, start, rows)?.contiguous();
                let (q, dy, out) = (tile(&q)?, tile(&dy)?, tile(&out)?);
                let log_sums = log_sums.narrow(1, first + start, rows)?;
                let p = product_f32(&q, &k.t()?, self.scale())?.broadcast_sub(&log_sums)?.exp()?; // (H, rows, keys)
                let mean = (wide(&out)? * wide(&dy)?)?.sum_keepdim(D::Minus1)?;
                let ds = (&p * product_f32(&dy, &v.t()?, 1.0)?.broadcast_sub(&mean)?)?.to_dtype(dtype)?;
                let p = p.to_dtype(dtype)?;
                accumulate(&mut dv, product_f32(&p.t()?, &dy, 1.0)?)?;
                drop(p);
                accumulate(&mut dk, product_f32(&ds.t()?, &q, self.scale())?)?;
                parts.push(self.by_token(&(product(&ds, &k)? * self.scale())?)?);
            }
            dqs.push(Tensor::cat(&parts, 0)?.unsqueeze(0)?);
        }
        let zeros = || wide(&k)?.zeros_like().map_err(crate::error::Error::from);
        let key_grads = |grad: Option<Tensor>| -> Result<(Tensor, Tensor)> {
            let grad = self.by_token(&grad.map_or_else(zeros, Ok)?.to_dtype(dtype)?)?.unsqueeze(0)?; // (1, keys, W)
            let keys = grad.dims()[1];
            let text = match length {
                0 => Tensor::zeros((1, self.text, self.heads * self.head), dtype, grad.device())?,
                _ => grad.narrow(1, 0, length)?.pad_with_zeros(1, 0, self.text - length)?,
            };
            Ok((text.contiguous()?, grad.narrow(1, length, keys - length)?.contiguous()?))
        };
        let ((dkt, dki), (dvt, dvi)) = (key_grads(dk)?, key_grads(dv)?);
        let dqi = dqs.pop().expect("one per stream");
        let dqt = dqs.pop().expect("one per stream");
        Ok([dqt, dkt, dvt, dqi, dki, dvi])
    }
}

fn accumulate(sum: &mut Option<Tensor>, part: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        None => part,
        Some(sum) => (sum + part)?,
    });
    Ok(())
}
