//! The ops' steps as launches of compiled kernels. Each gives `None` where its kernel does not take these tensors (they
//! are not bf16, a width is not a multiple of 16, ...) or does not run on this GPU: the op is then composed.
//!
//! Letters: B samples, S tokens, T = B S, D width, R rows and C entries of a modulation table.

use crate::error::Result;
use crate::kernels::cuda::gpu::empty;
use crate::kernels::cuda::launch::Arg::{self, Float, Int, Tensor as Data};
use crate::kernels::cuda::launch::{constant, launch, runs};
use crate::kernels::modulation::TokenRows;
use crate::kernels::rope::Rope;
use candle_core::{DType, Tensor};

/// Whether every tensor is bf16 and contiguous: what the kernels of the activations take.
fn plain(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.dtype() == DType::BF16 && t.is_contiguous())
}

/// Whether a kernel that holds a whole row takes rows of `width`.
fn holds_row(on: &Tensor, name: &str, width: usize) -> Result<bool> {
    Ok(runs(on, name) && constant(on, name, "BLOCK")?.is_some_and(|block| width <= block))
}

fn width(x: &Tensor) -> usize {
    *x.dims().last().expect("an activation has a width")
}

/// Which entries of a modulation table (R, C, D) a norm uses.
#[derive(Clone, Copy)]
pub struct Entries {
    /// The entry that is added.
    pub shift: usize,
    /// The entry that multiplies, less one.
    pub scale: usize,
}

/// The modulated norm of `x` (B, S, D), and the statistics (T, 2) for [`modulated_norm_backward`].
pub fn modulated_norm(
    x: &Tensor,
    mods: &Tensor,
    entries: Entries,
    rows: &TokenRows,
    eps: f32,
) -> Result<Option<(Tensor, Tensor)>> {
    let (name, d) = ("modulated_norm_forward", width(x));
    if !(plain(&[x, mods]) && holds_row(x, name, d)?) {
        return Ok(None);
    }
    let all_tokens = x.elem_count() / d;
    let out = empty(x.shape(), DType::BF16, x)?;
    let stats = empty((all_tokens, 2), DType::F32, x)?;
    let token_rows = rows.on_device(x.device())?;
    let args = [
        ("X", Data(x)),
        ("MODS", Data(mods)),
        ("TOKEN_ROWS", Data(&token_rows)),
        ("OUT", Data(&out)),
        ("STATS", Data(&stats)),
        ("width", Int(d)),
        ("entries", Int(mods.dims()[1])),
        ("shift_entry", Int(entries.shift)),
        ("scale_entry", Int(entries.scale)),
        ("row_stride_out", Int(d)),
        ("eps", Float(eps)),
    ];
    Ok(launch(x, name, &args, &[("all_tokens", all_tokens)])?.then_some((out, stats)))
}

/// The gradient of [`modulated_norm`] with respect to `x`.
pub fn modulated_norm_backward(
    x: &Tensor,
    mods: &Tensor,
    stats: &Tensor,
    grad: &Tensor,
    entries: Entries,
    rows: &TokenRows,
) -> Result<Option<Tensor>> {
    let (name, d) = ("modulated_norm_backward", width(x));
    if !(plain(&[x, mods, grad]) && holds_row(x, name, d)?) {
        return Ok(None);
    }
    let dx = empty(x.shape(), DType::BF16, x)?;
    let token_rows = rows.on_device(x.device())?;
    let args = [
        ("X", Data(x)),
        ("GRAD", Data(grad)),
        ("MODS", Data(mods)),
        ("TOKEN_ROWS", Data(&token_rows)),
        ("STATS", Data(stats)),
        ("DX", Data(&dx)),
        ("width", Int(d)),
        ("entries", Int(mods.dims()[1])),
        ("scale_entry", Int(entries.scale)),
        ("row_stride_grad", Int(d)),
    ];
    Ok(launch(x, name, &args, &[("all_tokens", x.elem_count() / d)])?.then_some(dx))
}

/// The gradient of [`modulated_norm`] with respect to the table, f32.
pub fn modulated_norm_table_gradient(
    x: &Tensor,
    mods: &Tensor,
    stats: &Tensor,
    grad: &Tensor,
    entries: Entries,
    rows: &TokenRows,
) -> Result<Option<Tensor>> {
    let (name, d) = ("modulated_norm_table_gradient", width(x));
    if !(plain(&[x, grad]) && runs(x, name)) {
        return Ok(None);
    }
    let d_mods = Tensor::zeros(mods.shape(), DType::F32, x.device())?;
    let token_rows = rows.on_device(x.device())?;
    let args = [
        ("X", Data(x)),
        ("GRAD", Data(grad)),
        ("TOKEN_ROWS", Data(&token_rows)),
        ("STATS", Data(stats)),
        ("DMODS", Data(&d_mods)),
        ("tokens", Int(rows.tokens())),
        ("samples", Int(rows.batch())),
        ("width", Int(d)),
        ("entries", Int(mods.dims()[1])),
        ("shift_entry", Int(entries.shift)),
        ("scale_entry", Int(entries.scale)),
        ("row_stride_grad", Int(d)),
    ];
    Ok(launch(x, name, &args, &[("table_rows", mods.dims()[0])])?.then_some(d_mods))
}

/// `x + gate * y`.
pub fn gated_residual(x: &Tensor, y: &Tensor, mods: &Tensor, gate: usize, rows: &TokenRows) -> Result<Option<Tensor>> {
    let (name, d) = ("gated_residual_forward", width(x));
    if !(plain(&[x, y, mods]) && holds_row(x, name, d)?) {
        return Ok(None);
    }
    let out = empty(x.shape(), DType::BF16, x)?;
    let token_rows = rows.on_device(x.device())?;
    let args = [
        ("X", Data(x)),
        ("Y", Data(y)),
        ("MODS", Data(mods)),
        ("TOKEN_ROWS", Data(&token_rows)),
        ("OUT", Data(&out)),
        ("width", Int(d)),
        ("entries", Int(mods.dims()[1])),
        ("gate_entry", Int(gate)),
    ];
    Ok(launch(x, name, &args, &[("all_tokens", x.elem_count() / d)])?.then_some(out))
}

/// The gradient of [`gated_residual`] with respect to `y`.
pub fn gated_residual_backward(grad: &Tensor, mods: &Tensor, gate: usize, rows: &TokenRows) -> Result<Option<Tensor>> {
    let (name, d) = ("gated_residual_backward", width(grad));
    if !(plain(&[grad, mods]) && holds_row(grad, name, d)?) {
        return Ok(None);
    }
    let dy = empty(grad.shape(), DType::BF16, grad)?;
    let token_rows = rows.on_device(grad.device())?;
    let args = [
        ("GRAD", Data(grad)),
        ("MODS", Data(mods)),
        ("TOKEN_ROWS", Data(&token_rows)),
        ("DY", Data(&dy)),
        ("width", Int(d)),
        ("entries", Int(mods.dims()[1])),
        ("gate_entry", Int(gate)),
    ];
    Ok(launch(grad, name, &args, &[("all_tokens", grad.elem_count() / d)])?.then_some(dy))
}

/// The gradient of [`gated_residual`] with respect to the table, f32.
pub fn gated_residual_table_gradient(
    y: &Tensor,
    grad: &Tensor,
    mods: &Tensor,
    gate: usize,
    rows: &TokenRows,
) -> Result<Option<Tensor>> {
    let (name, d) = ("gated_residual_table_gradient", width(y));
    if !(plain(&[y, grad]) && runs(y, name)) {
        return Ok(None);
    }
    let d_mods = Tensor::zeros(mods.shape(), DType::F32, y.device())?;
    let token_rows = rows.on_device(y.device())?;
    let args = [
        ("Y", Data(y)),
        ("GRAD", Data(grad)),
        ("TOKEN_ROWS", Data(&token_rows)),
        ("DMODS", Data(&d_mods)),
        ("tokens", Int(rows.tokens())),
        ("samples", Int(rows.batch())),
        ("width", Int(d)),
        ("entries", Int(mods.dims()[1])),
        ("gate_entry", Int(gate)),
    ];
    Ok(launch(y, name, &args, &[("table_rows", mods.dims()[0])])?.then_some(d_mods))
}

/// The norm and rotation of the heads of `x` (B, S, H * head); there are kernels for heads of 64 and 128.
pub fn norm_rope(x: &Tensor, weight: &Tensor, rope: &Rope, eps: f32) -> Result<Option<Tensor>> {
    let head = weight.elem_count();
    let name = format!("norm_rope_forward_d{head}");
    if !(plain(&[x, weight]) && runs(x, &name)) {
        return Ok(None);
    }
    let out = empty(x.shape(), DType::BF16, x)?;
    let [cos, sin] = rope.tables(x.device())?;
    let (_, tokens, w) = x.dims3()?;
    let args = [
        ("X", Data(x)),
        ("WEIGHT", Data(weight)),
        ("COS", Data(&cos)),
        ("SIN", Data(&sin)),
        ("OUT", Data(&out)),
        ("all_heads", Int(x.elem_count() / head)),
        ("heads", Int(w / head)),
        ("tokens", Int(tokens)),
        ("row_stride_x", Int(w)),
        ("row_stride_out", Int(w)),
        ("eps", Float(eps)),
    ];
    Ok(launch(x, &name, &args, &[])?.then_some(out))
}

/// The gradient of [`norm_rope`] with respect to `x`.
pub fn norm_rope_backward(x: &Tensor, weight: &Tensor, rope: &Rope, grad: &Tensor, eps: f32) -> Result<Option<Tensor>> {
    let head = weight.elem_count();
    let name = format!("norm_rope_backward_d{head}");
    if !(plain(&[x, weight, grad]) && runs(x, &name)) {
        return Ok(None);
    }
    let dx = empty(x.shape(), DType::BF16, x)?;
    let [cos, sin] = rope.tables(x.device())?;
    let (_, tokens, w) = x.dims3()?;
    let args = [
        ("X", Data(x)),
        ("GRAD", Data(grad)),
        ("WEIGHT", Data(weight)),
        ("COS", Data(&cos)),
        ("SIN", Data(&sin)),
        ("DX", Data(&dx)),
        ("all_heads", Int(x.elem_count() / head)),
        ("heads", Int(w / head)),
        ("tokens", Int(tokens)),
        ("row_stride_x", Int(w)),
        ("row_stride_grad", Int(w)),
        ("row_stride_dx", Int(w)),
        ("eps", Float(eps)),
    ];
    Ok(launch(x, &name, &args, &[])?.then_some(dx))
}

/// GELU of every element.
pub fn gelu(x: &Tensor) -> Result<Option<Tensor>> {
    let (name, w) = ("gelu_forward", width(x));
    if !(plain(&[x]) && runs(x, name)) {
        return Ok(None);
    }
    let out = empty(x.shape(), DType::BF16, x)?;
    let args = [("X", Data(x)), ("OUT", Data(&out)), ("width", Int(w)), ("row_stride_out", Int(w))];
    Ok(launch(x, name, &args, &[("rows", x.elem_count() / w)])?.then_some(out))
}

/// Multiplies `grad` by GELU's derivative at `x`, in its storage, which nothing else may be using. False if it did not.
pub fn gelu_backward(x: &Tensor, grad: &Tensor) -> Result<bool> {
    let (name, w) = ("gelu_backward", width(x));
    if !(plain(&[x, grad]) && runs(x, name)) {
        return Ok(false);
    }
    // ACTIVATED is not written without the variant `_recompute`.
    let args = [
        ("X", Data(x)),
        ("GRAD", Data(grad)),
        ("ACTIVATED", Data(grad)),
        ("width", Int(w)),
        ("row_stride_activated", Int(w)),
    ];
    launch(x, name, &args, &[("rows", x.elem_count() / w)])
}

/// A frozen weight (N, K) as int8 in blocks of 32: bytes (N, K), and f16 scales (N, K / 32).
pub fn int8_quantise(weight: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
    let (name, (n, k)) = ("int8_quantise", weight.dims2()?);
    if !(k.is_multiple_of(32) && plain(&[weight]) && runs(weight, name)) {
        return Ok(None);
    }
    let quants = empty((n, k), DType::U8, weight)?;
    let scales = empty((n, k / 32), DType::F16, weight)?;
    let args =
        [("W", Data(weight)), ("Q", Data(&quants)), ("SCALES", Data(&scales)), ("rows", Int(n)), ("width", Int(k))];
    Ok(launch(weight, name, &args, &[])?.then_some((quants, scales)))
}

/// The weight (N, K) in bf16 of what [`int8_quantise`] gives.
pub fn int8_dequantise(quants: &Tensor, scales: &Tensor) -> Result<Option<Tensor>> {
    let (name, (n, k)) = ("int8_dequantise", quants.dims2()?);
    let takes = k.is_multiple_of(32) && quants.is_contiguous() && scales.is_contiguous();
    if !(takes && runs(quants, name)) {
        return Ok(None);
    }
    let weight = empty((n, k), DType::BF16, quants)?;
    let args = [
        ("Q", Data(quants)),
        ("SCALES", Data(scales)),
        ("W", Data(&weight)),
        ("rows", Int(n)),
        ("width", Int(k)),
        ("row_stride_w", Int(k)),
    ];
    Ok(launch(quants, name, &args, &[])?.then_some(weight))
}

/// The product of small rank that an adapter adds.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// (M, rank).
    pub t: &'a Tensor,
    /// (N, rank), or (rank, N) if `by_rank`.
    pub b: &'a Tensor,
    /// Whether `b` has the rank as its rows.
    pub by_rank: bool,
    /// What the product is multiplied by.
    pub scale: f64,
}

/// `y += bias + scale * t b'`, in the storage of `y` (M, N), which nothing else may be using. False if it did not.
pub fn lora_add(y: &Tensor, bias: Option<&Tensor>, low_rank: Option<LowRank>) -> Result<bool> {
    let by_rank = low_rank.is_some_and(|l| l.by_rank);
    let name = if by_rank { "lora_add_by_rank" } else { "lora_add" };
    let parts = [Some(y), bias, low_rank.map(|l| l.t), low_rank.map(|l| l.b)];
    if !(plain(&parts.into_iter().flatten().collect::<Vec<_>>()) && runs(y, name)) {
        return Ok(false);
    }
    let (m, n) = y.dims2()?;
    let rank = low_rank.map_or(0, |l| l.t.dims()[1]);
    let stride = |t: &Tensor| t.dims()[1];
    // With a rank of 0, and without a bias, the kernel reads neither; any address does.
    let args: [(&str, Arg); 12] = [
        ("Y", Data(y)),
        ("BIAS", Data(bias.unwrap_or(y))),
        ("T", Data(low_rank.map_or(y, |l| l.t))),
        ("B", Data(low_rank.map_or(y, |l| l.b))),
        ("rows", Int(m)),
        ("width", Int(n)),
        ("rank", Int(rank)),
        ("row_stride_y", Int(n)),
        ("row_stride_t", Int(low_rank.map_or(0, |l| stride(l.t)))),
        ("row_stride_b", Int(low_rank.map_or(0, |l| stride(l.b)))),
        ("has_bias", Int(usize::from(bias.is_some()))),
        ("scale", Float(low_rank.map_or(1.0, |l| l.scale) as f32)),
    ];
    launch(y, name, &args, &[])
}
