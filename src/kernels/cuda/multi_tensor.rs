//! One launch for many tensors: the norm of all gradients, and AdamW's step.

use crate::error::Result;
use crate::kernels::cuda::gpu::{address, empty};
use crate::kernels::cuda::launch::Arg::{Double, Int, Tensor as Data};
use crate::kernels::cuda::launch::{constant, launch, runs};
use candle_core::{DType, Tensor};

/// One parameter's part of an AdamW step: contiguous f32 tensors of one shape.
pub struct AdamwItem<'a> {
    /// Updated in place.
    pub weights: &'a Tensor,
    /// The gradient.
    pub grad: &'a Tensor,
    /// First moment, updated in place.
    pub exp_avg: &'a Tensor,
    /// Second moment, updated in place.
    pub exp_avg_sq: &'a Tensor,
    /// `optim::adamw`'s `Update`, field by field.
    pub numbers: [f32; 7],
}

/// AdamW's step on all items. False if it did not.
pub fn adamw(items: &[AdamwItem]) -> Result<bool> {
    let Some(first) = items.first() else { return Ok(true) };
    let on = first.weights;
    let tensors = |i: &AdamwItem| [i.weights, i.grad, i.exp_avg, i.exp_avg_sq].into_iter().all(is_plain);
    if !(runs(on, "adamw") && items.iter().all(tensors)) {
        return Ok(false);
    }
    let mut pointers = Vec::with_capacity(5 * items.len());
    for item in items {
        for tensor in [item.weights, item.grad, item.exp_avg, item.exp_avg_sq] {
            pointers.push(address(tensor)? as i64);
        }
        // No bf16 copy of the weights is kept.
        pointers.push(0);
    }
    let lengths = items.iter().map(|i| i.weights.elem_count());
    let Some(list) = List::new(on, "adamw", pointers, lengths)? else { return Ok(false) };
    let numbers: Vec<f32> = items.iter().flat_map(|i| i.numbers).collect();
    let numbers = Tensor::from_vec(numbers, (items.len(), 7), on.device())?;
    let coefficient = Tensor::ones(1, DType::F32, on.device())?;
    let args = [
        ("POINTERS", Data(&list.pointers)),
        ("LENGTHS", Data(&list.lengths)),
        ("CHUNKS", Data(&list.chunks)),
        ("NUMBERS", Data(&numbers)),
        ("COEFFICIENT", Data(&coefficient)),
    ];
    launch(on, "adamw", &args, &[("chunks", list.num_chunks)])
}

/// The norm of all gradients together, f32 and contiguous, summed in f64. `None` if it was not computed.
pub fn norm(grads: &[&Tensor]) -> Result<Option<f64>> {
    let Some(&on) = grads.first() else { return Ok(Some(0.0)) };
    if !(runs(on, "squared_norm") && runs(on, "clip_coefficient") && grads.iter().all(|g| is_plain(g))) {
        return Ok(None);
    }
    let mut pointers = Vec::with_capacity(5 * grads.len());
    for grad in grads {
        pointers.extend([0, address(grad)? as i64, 0, 0, 0]);
    }
    let lengths = grads.iter().map(|g| g.elem_count());
    let Some(list) = List::new(on, "squared_norm", pointers, lengths)? else { return Ok(None) };
    let partials = empty(list.num_chunks, DType::F64, on)?;
    let args = [
        ("POINTERS", Data(&list.pointers)),
        ("LENGTHS", Data(&list.lengths)),
        ("CHUNKS", Data(&list.chunks)),
        ("PARTIALS", Data(&partials)),
    ];
    if !launch(on, "squared_norm", &args, &[("chunks", list.num_chunks)])? {
        return Ok(None);
    }
    let (norm, coefficient) = (empty(1, DType::F64, on)?, empty(1, DType::F32, on)?);
    let args = [
        ("PARTIALS", Data(&partials)),
        ("NORM", Data(&norm)),
        ("COEFFICIENT", Data(&coefficient)),
        ("chunks", Int(list.num_chunks)),
        ("max_norm", Double(0.0)),
    ];
    if !launch(on, "clip_coefficient", &args, &[])? {
        return Ok(None);
    }
    Ok(Some(norm.to_vec1::<f64>()?[0]))
}

/// Whether the kernels take a tensor: f32, contiguous, beginning at a multiple of 16 bytes.
fn is_plain(t: &Tensor) -> bool {
    t.dtype() == DType::F32 && t.is_contiguous() && address(t).is_ok_and(|a| a.is_multiple_of(16))
}

/// The tables that the kernels find their tensors in, on the GPU.
struct List {
    pointers: Tensor,
    lengths: Tensor,
    chunks: Tensor,
    num_chunks: usize,
}

impl List {
    fn new(
        on: &Tensor,
        kernel: &str,
        pointers: Vec<i64>,
        lengths: impl ExactSizeIterator<Item = usize>,
    ) -> Result<Option<Self>> {
        let Some(size) = constant(on, kernel, "CHUNK")? else { return Ok(None) };
        let (count, lengths) = (lengths.len(), lengths.map(|n| n as i64).collect::<Vec<_>>());
        let pieces = |(tensor, &n): (usize, &i64)| {
            (0..(n as usize).div_ceil(size)).flat_map(move |piece| [tensor as i32, piece as i32])
        };
        let chunks: Vec<i32> = lengths.iter().enumerate().flat_map(pieces).collect();
        let num_chunks = chunks.len() / 2;
        Ok(Some(Self {
            pointers: Tensor::from_vec(pointers, (count, 5), on.device())?,
            lengths: Tensor::from_vec(lengths, count, on.device())?,
            chunks: Tensor::from_vec(chunks, (num_chunks, 2), on.device())?,
            num_chunks,
        }))
    }
}
