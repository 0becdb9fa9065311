"""`x + gate * y` with a token's row of a modulation table. CPU twin: `kernels::modulation::gated_residual`.

Letters as in modulated_norm.py. The gradient of X is the incoming gradient itself, so no kernel makes it.
"""

import triton
import triton.language as tl

from spec import Kernel, Tile


@triton.jit
def gated_residual_forward(X, Y, MODS, TOKEN_ROWS, OUT, width, entries, gate_entry, BLOCK: tl.constexpr):
    """OUT (T, D) from X, Y (T, D). One token each."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gates = MODS + (tl.load(TOKEN_ROWS + token).to(tl.int64) * entries + gate_entry) * width
    x = tl.load(X + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(Y + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + token * width + columns, (x + gate * y).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def gated_residual_backward(GRAD, MODS, TOKEN_ROWS, DY, width, entries, gate_entry, BLOCK: tl.constexpr):
    """DY (T, D) = gate * GRAD. One token each."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gates = MODS + (tl.load(TOKEN_ROWS + token).to(tl.int64) * entries + gate_entry) * width
    grad = tl.load(GRAD + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(DY + token * width + columns, (gate * grad).to(DY.dtype.element_ty), mask=inside)


@triton.jit
def gated_residual_table_gradient(
    Y, GRAD, TOKEN_ROWS, DMODS, tokens, samples, width, entries, gate_entry, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr
):
    """Entry gate of DMODS (R, C, D) f32: the sum of GRAD * Y over the tokens that took the row, in order.

    `tokens` per sample; rows b and samples + b of the table belong to sample b. A program: one row, BLOCK columns.
    """
    table_row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = (table_row % samples).to(tl.int64) * tokens
    d_gate = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK_T):
        within = start + tl.arange(0, BLOCK_T)
        token = first + within
        taken = (within < tokens) & (tl.load(TOKEN_ROWS + token, mask=within < tokens, other=-1) == table_row)
        mask = taken[:, None] & inside[None, :]
        at = token[:, None] * width + columns[None, :]
        y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
        d_gate += y * tl.load(GRAD + at, mask=mask, other=0.0).to(tl.float32)
    out = DMODS + (table_row.to(tl.int64) * entries + gate_entry) * width + columns
    tl.store(out, tl.sum(d_gate, 0), mask=inside)


def row_tile(arch, constants):
    return Tile({"BLOCK": 4096}, num_warps=8)


TOKEN_GRID = {"grid": ("all_tokens",), "grid_arguments": ("all_tokens",), "tiles": row_tile}
TABLE = {"width": "i32%16", "entries": "i32", "gate_entry": "i32"}

KERNELS = [
    Kernel(
        gated_residual_forward,
        arguments={
            "X": "*bf16%16",
            "Y": "*bf16%16",
            "MODS": "*bf16%16",
            "TOKEN_ROWS": "*i32%16",
            "OUT": "*bf16%16",
        }
        | TABLE,
        **TOKEN_GRID,
    ),
    Kernel(
        gated_residual_backward,
        arguments={"GRAD": "*bf16%16", "MODS": "*bf16%16", "TOKEN_ROWS": "*i32%16", "DY": "*bf16%16"} | TABLE,
        **TOKEN_GRID,
    ),
    Kernel(
        gated_residual_table_gradient,
        arguments={
            "Y": "*bf16%16",
            "GRAD": "*bf16%16",
            "TOKEN_ROWS": "*i32%16",
            "DMODS": "*fp32%16",
            "tokens": "i32",
            "samples": "i32",
        }
        | TABLE,
        grid=("table_rows", "cdiv(width, BLOCK)"),
        grid_arguments=("table_rows",),
        tiles=lambda arch, constants: Tile({"BLOCK_T": 32, "BLOCK": 64}, num_warps=4),
    ),
]
