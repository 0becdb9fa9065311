//! Joint attention of a text and an image stream, without ever holding the full score matrix.
//!
//! Queries are processed in tiles of rows against all valid keys; the log-sum-exp of each row is kept so that the
//! backward pass computes the probabilities of a tile again (the memory plan of FlashAttention,
//! <https://arxiv.org/abs/2205.14135>, with whole rows per tile because a row of scores fits a core's cache).
//! Text keys beyond a sample's length take no part; padded queries attend like others and nobody reads them.

use crate::error::Result;
use crate::kernels::composed;
use crate::kernels::cpu::{self, par_rows, uninit, view};
use crate::kernels::math::{dot, exp, max, sum, vectorized};
use crate::kernels::matmul::{Into, Mat, MatMut, gemm_one_thread};
use crate::kernels::route::is_composed;
use crate::kernels::tape::{Value, record};
use candle_core::Tensor;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Queries, keys and values of one stream, each (B, S, H * head).
#[derive(Clone, Copy)]
pub struct Stream<'a> {
    /// Queries.
    pub q: &'a Value,
    /// Keys.
    pub k: &'a Value,
    /// Values.
    pub v: &'a Value,
}

/// How many text tokens of each sample of a batch are valid.
#[derive(Clone, Debug)]
pub struct TextLengths {
    valid: Arc<[usize]>,
    /// The same on the GPU that first asked for it.
    #[cfg(feature = "cuda")]
    on_device: Arc<std::sync::OnceLock<Tensor>>,
}

impl TextLengths {
    /// One number per sample.
    pub fn new(valid: &[usize]) -> Self {
        Self {
            valid: valid.into(),
            #[cfg(feature = "cuda")]
            on_device: Arc::default(),
        }
    }

    /// The numbers.
    pub fn valid(&self) -> &[usize] {
        &self.valid
    }

    /// The numbers, (B) i32 on `device`; copied there once for all blocks.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(&self, device: &candle_core::Device) -> Result<Tensor> {
        if let Some(lengths) = self.on_device.get().filter(|t| t.device().same_device(device)) {
            return Ok(lengths.clone());
        }
        let lengths = Tensor::from_iter(self.valid.iter().map(|&n| n as i32), device)?;
        let _ = self.on_device.set(lengths.clone());
        Ok(lengths)
    }
}

/// Attends over `[text, image]` jointly; gives the text's and the image's outputs, each (B, S, H * head).
///
/// Text beyond its length takes no part; scores are scaled by `1 / sqrt(head)`.
pub fn joint_attention(text: Stream, image: Stream, heads: usize, lengths: &TextLengths) -> Result<Vec<Value>> {
    if is_composed(image.q.tensor()) {
        return composed::attention::joint_attention(text, image, heads, lengths);
    }
    let (batch, text_tokens, width) = text.q.tensor().dims3()?;
    let dims = Dims {
        batch,
        heads,
        head: width / heads,
        width,
        text: text_tokens,
        image: image.q.dims()[1],
        lengths: lengths.valid.clone(),
    };
    let inputs = [text.q, text.k, text.v, image.q, image.k, image.v];
    let tensors = inputs.map(|v| v.tensor().clone());
    let (outputs, log_sums) = forward(&tensors, &dims)?;
    let dtype = text.q.dtype();
    let [out_text, out_image] = outputs;
    let outputs = vec![
        cpu::from_f32(out_text, (batch, dims.text, width), dtype)?,
        cpu::from_f32(out_image, (batch, dims.image, width), dtype)?,
    ];
    let saved_outputs = outputs.clone();
    Ok(record(&inputs, outputs, move |grads| backward(&tensors, &saved_outputs, &log_sums, grads, &dims)))
}

struct Dims {
    batch: usize,
    heads: usize,
    head: usize,
    width: usize,
    text: usize,
    image: usize,
    lengths: Arc<[usize]>,
}

/// Scores that one tile may hold: 1 MiB of f32, which stays in a core's second-level cache.
const TILE_SCORES: usize = 1 << 18;

impl Dims {
    fn scale(&self) -> f32 {
        1.0 / (self.head as f32).sqrt()
    }

    fn keys(&self, sample: usize) -> usize {
        self.lengths[sample] + self.image
    }

    /// Tiles of query rows of one head: stream (0 text, 1 image) and rows.
    fn tiles(&self, sample: usize) -> Vec<(usize, Range<usize>)> {
        let rows = (TILE_SCORES / self.keys(sample).max(1)).clamp(16, 128);
        let stream = |s: usize, n: usize| (0..n).step_by(rows).map(move |i| (s, i..(i + rows).min(n)));
        stream(0, self.text).chain(stream(1, self.image)).collect()
    }

    /// Rows of one head of one sample as a matrix inside a (B, S, H * head) slice.
    fn rows<'a>(&self, x: &'a [f32], tokens: usize, sample: usize, head: usize, rows: Range<usize>) -> Mat<'a> {
        let start = (sample * tokens + rows.start) * self.width + head * self.head;
        Mat::strided(&x[start.min(x.len())..], rows.len(), self.head, self.width)
    }

    fn row<'a>(&self, x: &'a [f32], tokens: usize, sample: usize, head: usize, row: usize) -> &'a [f32] {
        &x[(sample * tokens + row) * self.width + head * self.head..][..self.head]
    }

    /// The valid rows of text and image of one head, one after the other.
    fn gather(&self, text: &[f32], image: &[f32], sample: usize, head: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.keys(sample) * self.head);
        for i in 0..self.lengths[sample] {
            out.extend_from_slice(self.row(text, self.text, sample, head, i));
        }
        for i in 0..self.image {
            out.extend_from_slice(self.row(image, self.image, sample, head, i));
        }
        out
    }

    fn per_head<R: Send>(&self, f: impl Fn(usize, usize) -> R + Sync + Send) -> Vec<R> {
        (0..self.batch * self.heads).into_par_iter().map(|i| f(i / self.heads, i % self.heads)).collect()
    }

    /// Heads' rows, each (tokens, head), back into (B, tokens, H * head); rows beyond a head's end become zero.
    fn scatter<'a>(&self, tokens: usize, part: impl Fn(usize, usize) -> &'a [f32] + Sync + Send) -> Vec<f32> {
        let mut out = uninit(self.batch * tokens * self.width);
        par_rows(&mut out, self.width, |i, row| {
            let (sample, token) = (i / tokens, i % tokens);
            for (head, out) in row.chunks_exact_mut(self.head).enumerate() {
                match part(sample, head).get(token * self.head..(token + 1) * self.head) {
                    Some(x) => out.copy_from_slice(x),
                    None => out.fill(0.0),
                }
            }
        });
        out
    }
}

/// The log-sum-exp of every query row: per (sample, head), text rows then image rows.
type LogSums = Vec<Vec<f32>>;

/// Text and image outputs.
fn forward(tensors: &[Tensor; 6], dims: &Dims) -> Result<([Vec<f32>; 2], LogSums)> {
    let [qt, kt, vt, qi, ki, vi] = tensors;
    let queries = [view(qt)?, view(qi)?];
    let (kt, vt, ki, vi) = (view(kt)?, view(vt)?, view(ki)?, view(vi)?);
    let (kt, vt, ki, vi): (&[f32], &[f32], &[f32], &[f32]) = (&kt, &vt, &ki, &vi);
    let queries: [&[f32]; 2] = [&queries[0], &queries[1]];
    let tokens = [dims.text, dims.image];
    let heads = dims.per_head(|sample, head| {
        let n = dims.keys(sample);
        let (keys, values) = (dims.gather(kt, ki, sample, head), dims.gather(vt, vi, sample, head));
        let mut outputs = tokens.map(|t| uninit(t * dims.head));
        let mut log_sums = Vec::with_capacity(dims.text + dims.image);
        let mut scores = Vec::new();
        for (stream, rows) in dims.tiles(sample) {
            let m = rows.len();
            scores.resize(m * n, 0.0);
            let q = dims.rows(queries[stream], tokens[stream], sample, head, rows.clone());
            let k = Mat::new(&keys, n, dims.head);
            gemm_one_thread(MatMut::new(&mut scores, m, n), Into::Overwrite, q, k.t(), dims.scale());
            let sums: Vec<f32> =
                scores.chunks_exact_mut(n).map(|row| vectorized!(exponentiate(row, &mut log_sums))).collect();
            let out = &mut outputs[stream][rows.start * dims.head..rows.end * dims.head];
            let (p, v) = (Mat::new(&scores, m, n), Mat::new(&values, n, dims.head));
            gemm_one_thread(MatMut::new(out, m, dims.head), Into::Overwrite, p, v, 1.0);
            for (out, sum) in out.chunks_exact_mut(dims.head).zip(sums) {
                out.iter_mut().for_each(|o| *o /= sum);
            }
        }
        (outputs, log_sums)
    });
    let part = |stream: usize| {
        let heads = &heads;
        move |sample: usize, head: usize| heads[sample * dims.heads + head].0[stream].as_slice()
    };
    let outputs = [dims.scatter(dims.text, part(0)), dims.scatter(dims.image, part(1))];
    Ok((outputs, heads.into_iter().map(|(_, log_sums)| log_sums).collect()))
}

/// Turns a row of scores into unnormalised probabilities; returns their sum and notes the row's log-sum-exp.
#[inline(always)]
fn exponentiate(row: &mut [f32], log_sums: &mut Vec<f32>) -> f32 {
    let top = max(row);
    row.iter_mut().for_each(|s| *s = exp(*s - top));
    let total = sum(row);
    log_sums.push(top + total.ln());
    total
}

fn backward(
    tensors: &[Tensor; 6],
    outputs: &[Tensor],
    log_sums: &LogSums,
    grads: Vec<Option<Tensor>>,
    dims: &Dims,
) -> Result<Vec<Option<Tensor>>> {
    let [qt, kt, vt, qi, ki, vi] = tensors;
    let (qt, kt, vt, qi, ki, vi) = (view(qt)?, view(kt)?, view(vt)?, view(qi)?, view(ki)?, view(vi)?);
    let (ot, oi) = (view(&outputs[0])?, view(&outputs[1])?);
    let (gt, gi) = (grads[0].as_ref().map(view).transpose()?, grads[1].as_ref().map(view).transpose()?);
    let queries: [&[f32]; 2] = [&qt, &qi];
    let outs: [&[f32]; 2] = [&ot, &oi];
    let grad_outs: [Option<&[f32]>; 2] = [gt.as_deref(), gi.as_deref()];
    let (kt, vt, ki, vi): (&[f32], &[f32], &[f32], &[f32]) = (&kt, &vt, &ki, &vi);
    let tokens = [dims.text, dims.image];
    let (scale, width) = (dims.scale(), dims.head);
    let heads = dims.per_head(|sample, head| {
        let n = dims.keys(sample);
        let (keys, values) = (dims.gather(kt, ki, sample, head), dims.gather(vt, vi, sample, head));
        let (k, v) = (Mat::new(&keys, n, width), Mat::new(&values, n, width));
        let (mut dk, mut dv) = (vec![0f32; n * width], vec![0f32; n * width]);
        // A stream whose output nobody used has a zero gradient, and its queries are not visited.
        let mut dq = [0, 1].map(|s| vec![0f32; if grad_outs[s].is_some() { tokens[s] * width } else { 0 }]);
        let log_sums = &log_sums[sample * dims.heads + head];
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        for (stream, rows) in dims.tiles(sample) {
            let Some(grad_out) = grad_outs[stream] else { continue };
            let m = rows.len();
            p.resize(m * n, 0.0);
            ds.resize(m * n, 0.0);
            let q = dims.rows(queries[stream], tokens[stream], sample, head, rows.clone());
            let dy = dims.rows(grad_out, tokens[stream], sample, head, rows.clone());
            gemm_one_thread(MatMut::new(&mut p, m, n), Into::Overwrite, q, k.t(), scale);
            gemm_one_thread(MatMut::new(&mut ds, m, n), Into::Overwrite, dy, v.t(), 1.0);
            for (i, row) in rows.clone().enumerate() {
                let log_sum = log_sums[stream * dims.text + row];
                let o = dims.row(outs[stream], tokens[stream], sample, head, row);
                let dy = dims.row(grad_out, tokens[stream], sample, head, row);
                let (p, ds) = (&mut p[i * n..(i + 1) * n], &mut ds[i * n..(i + 1) * n]);
                vectorized!({
                    let mean = dot(o, dy);
                    for (p, ds) in p.iter_mut().zip(ds) {
                        *p = exp(*p - log_sum);
                        *ds = *p * (*ds - mean);
                    }
                });
            }
            let (p, ds) = (Mat::new(&p, m, n), Mat::new(&ds, m, n));
            gemm_one_thread(MatMut::new(&mut dv, n, width), Into::Add, p.t(), dy, 1.0);
            gemm_one_thread(MatMut::new(&mut dk, n, width), Into::Add, ds.t(), q, scale);
            let dq = &mut dq[stream][rows.start * width..rows.end * width];
            gemm_one_thread(MatMut::new(dq, m, width), Into::Overwrite, ds, k, scale);
        }
        (dq, dk, dv)
    });
    let at = |sample: usize, head: usize| &heads[sample * dims.heads + head];
    let text_end = |sample: usize| dims.lengths[sample] * width;
    let parts = [
        dims.scatter(dims.text, |b, h| at(b, h).0[0].as_slice()),
        dims.scatter(dims.text, |b, h| &at(b, h).1[..text_end(b)]),
        dims.scatter(dims.text, |b, h| &at(b, h).2[..text_end(b)]),
        dims.scatter(dims.image, |b, h| at(b, h).0[1].as_slice()),
        dims.scatter(dims.image, |b, h| &at(b, h).1[text_end(b)..]),
        dims.scatter(dims.image, |b, h| &at(b, h).2[text_end(b)..]),
    ];
    parts.into_iter().zip(tensors).map(|(part, t)| cpu::from_f32(part, t.shape(), t.dtype()).map(Some)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check_both, randn, relative_error};

    /// Softmax attention over explicit scores, with a key-padding mask, in plain ops.
    fn twin(t: &[Tensor], heads: usize, lengths: &[usize]) -> candle_core::Result<Vec<Tensor>> {
        let (batch, text, width) = t[0].dims3()?;
        let head = width / heads;
        let join = |a: &Tensor, b: &Tensor| {
            Tensor::cat(&[a, b], 1)?.reshape((batch, (), heads, head))?.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (join(&t[0], &t[3])?, join(&t[1], &t[4])?, join(&t[2], &t[5])?);
        let tokens = q.dim(2)?;
        let mask: Vec<f64> = (0..batch * tokens)
            .map(|i| if (lengths[i / tokens]..text).contains(&(i % tokens)) { -1e9 } else { 0.0 })
            .collect();
        let mask = Tensor::from_vec(mask, (batch, 1, 1, tokens), q.device())?;
        let scores = (q.matmul(&k.t()?)? / (head as f64).sqrt())?.broadcast_add(&mask)?;
        let p = candle_nn::ops::softmax(&scores, 3)?;
        let out = p.matmul(&v)?.transpose(1, 2)?.reshape((batch, tokens, width))?;
        Ok(vec![out.narrow(1, 0, text)?, out.narrow(1, text, tokens - text)?])
    }

    fn run(v: &[Value], heads: usize, lengths: &[usize]) -> Result<Vec<Value>> {
        let (text, image) = (Stream { q: &v[0], k: &v[1], v: &v[2] }, Stream { q: &v[3], k: &v[4], v: &v[5] });
        joint_attention(text, image, heads, &TextLengths::new(lengths))
    }

    fn inputs(batch: usize, text: usize, image: usize, width: usize) -> Vec<Tensor> {
        (0..6).map(|i| randn(i, &[batch, if i < 3 { text } else { image }, width], 1.0)).collect()
    }

    #[test]
    fn equals_its_twin_with_padding_and_ragged_tiles() {
        check_both(&inputs(2, 5, 12, 24), 5e-6, |v| run(v, 3, &[5, 3]), |t| twin(t, 3, &[5, 3]));
        // More rows than one tile of 128 holds.
        check_both(&inputs(1, 7, 150, 8), 5e-6, |v| run(v, 1, &[4]), |t| twin(t, 1, &[4]));
    }

    #[test]
    fn an_unused_text_output_gives_exactly_zero_query_gradients() {
        let leaves: Vec<Value> = inputs(1, 4, 6, 8).into_iter().map(Value::leaf).collect();
        let outputs = run(&leaves, 2, &[4]).unwrap();
        let mut grads = crate::kernels::backward(vec![(outputs[1].clone(), randn(9, &[1, 6, 8], 1.0))]).unwrap();
        let dq = grads.take(&leaves[0]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(dq.iter().all(|&g| g == 0.0));
        assert!(grads.take(&leaves[1]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 0.0);
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let big: Vec<Value> = inputs(1, 3, 5, 8).iter().map(|t| Value::constant((t * 40.0).unwrap())).collect();
        let f64s: Vec<Tensor> = big.iter().map(|v| v.tensor().to_dtype(candle_core::DType::F64).unwrap()).collect();
        let (got, want) = (run(&big, 2, &[3]).unwrap(), twin(&f64s, 2, &[3]).unwrap());
        // Scores near 5000 carry an f32 rounding of 3e-4, which the exponential passes on.
        assert!(relative_error(got[1].tensor(), &want[1]) < 2e-3);
    }
}
