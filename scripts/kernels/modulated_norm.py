"""adaLN: layer norm without weights, then `* (1 + scale) + shift` with a token's row of a modulation table.

CPU twin: `kernels::norm::modulated_norm`. Letters: T tokens of the whole batch, D width, R rows of the table and C
entries in each row: MODS is (R, C, D). TOKEN_ROWS (T) says which row a token takes.
"""

import triton
import triton.language as tl

from spec import Kernel, Tile


@triton.jit
def modulated_norm_forward(
    X, MODS, TOKEN_ROWS, OUT, STATS, width, entries, shift_entry, scale_entry, row_stride_out, eps, BLOCK: tl.constexpr
):
    """OUT (T, D), with rows of its own stride; STATS (T, 2): mean and 1 / std, kept for backward. One token each."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    inv_std = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    table = MODS + tl.load(TOKEN_ROWS + token).to(tl.int64) * entries * width
    shift = tl.load(table + shift_entry * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(table + scale_entry * width + columns, mask=inside, other=0.0).to(tl.float32)
    out = centred * inv_std * (1.0 + scale) + shift
    tl.store(OUT + token * row_stride_out + columns, out.to(OUT.dtype.element_ty), mask=inside)
    tl.store(STATS + 2 * token, mean)
    tl.store(STATS + 2 * token + 1, inv_std)


@triton.jit
def modulated_norm_backward(
    X, GRAD, MODS, TOKEN_ROWS, STATS, DX, width, entries, scale_entry, row_stride_grad, BLOCK: tl.constexpr
):
    """DX (T, D) from GRAD (T, D), with rows of its own stride. One token each."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    mean = tl.load(STATS + 2 * token)
    inv_std = tl.load(STATS + 2 * token + 1)
    x = tl.load(X + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    normed = tl.where(inside, (x - mean) * inv_std, 0.0)
    table = MODS + tl.load(TOKEN_ROWS + token).to(tl.int64) * entries * width
    scale = tl.load(table + scale_entry * width + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + token * row_stride_grad + columns, mask=inside, other=0.0).to(tl.float32) * (1.0 + scale)
    mean_g = tl.sum(grad, 0) / width
    mean_gx = tl.sum(grad * normed, 0) / width
    dx = inv_std * (grad - mean_g - normed * mean_gx)
    tl.store(DX + token * width + columns, dx.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def modulated_norm_table_gradient(
    X,
    GRAD,
    TOKEN_ROWS,
    STATS,
    DMODS,
    tokens,
    samples,
    width,
    entries,
    shift_entry,
    scale_entry,
    row_stride_grad,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entries shift and scale of DMODS (R, C, D) f32, each summed over the tokens that took the row, in order.

    `tokens` per sample; rows b and samples + b of the table belong to sample b. A program: one row, BLOCK columns.
    """
    table_row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = (table_row % samples).to(tl.int64) * tokens
    d_shift = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    d_scale = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK_T):
        within = start + tl.arange(0, BLOCK_T)
        token = first + within
        taken = (within < tokens) & (tl.load(TOKEN_ROWS + token, mask=within < tokens, other=-1) == table_row)
        mask = taken[:, None] & inside[None, :]
        mean = tl.load(STATS + 2 * token, mask=taken, other=0.0)
        inv_std = tl.load(STATS + 2 * token + 1, mask=taken, other=0.0)
        x = tl.load(X + token[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + token[:, None] * row_stride_grad + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        d_shift += grad
        d_scale += grad * (x - mean[:, None]) * inv_std[:, None]
    out = DMODS + table_row.to(tl.int64) * entries * width + columns
    tl.store(out + shift_entry * width, tl.sum(d_shift, 0), mask=inside)
    tl.store(out + scale_entry * width, tl.sum(d_scale, 0), mask=inside)


# A row in registers. Qwen-Image's width of 3072 leaves a quarter of the lanes idle, which costs no memory traffic.
BLOCK = 4096


def row_tile(arch, constants):
    return Tile({"BLOCK": BLOCK}, num_warps=8)


KERNELS = [
    Kernel(
        modulated_norm_forward,
        arguments={
            "X": "*bf16%16",
            "MODS": "*bf16%16",
            "TOKEN_ROWS": "*i32%16",
            "OUT": "*bf16%16",
            "STATS": "*fp32%16",
            "width": "i32%16",
            "entries": "i32",
            "shift_entry": "i32",
            "scale_entry": "i32",
            "row_stride_out": "i32%16",
            "eps": "fp32",
        },
        grid=("all_tokens",),
        grid_arguments=("all_tokens",),
        tiles=row_tile,
    ),
    Kernel(
        modulated_norm_backward,
        arguments={
            "X": "*bf16%16",
            "GRAD": "*bf16%16",
            "MODS": "*bf16%16",
            "TOKEN_ROWS": "*i32%16",
            "STATS": "*fp32%16",
            "DX": "*bf16%16",
            "width": "i32%16",
            "entries": "i32",
            "scale_entry": "i32",
            "row_stride_grad": "i32%16",
        },
        grid=("all_tokens",),
        grid_arguments=("all_tokens",),
        tiles=row_tile,
    ),
    Kernel(
        modulated_norm_table_gradient,
        arguments={
            "X": "*bf16%16",
            "GRAD": "*bf16%16",
            "TOKEN_ROWS": "*i32%16",
            "STATS": "*fp32%16",
            "DMODS": "*fp32%16",
            "tokens": "i32",
            "samples": "i32",
            "width": "i32%16",
            "entries": "i32",
            "shift_entry": "i32",
            "scale_entry": "i32",
            "row_stride_grad": "i32%16",
        },
        grid=("table_rows", "cdiv(width, BLOCK)"),
        grid_arguments=("table_rows",),
        tiles=lambda arch, constants: Tile({"BLOCK_T": 32, "BLOCK": 64}, num_warps=4),
    ),
]
