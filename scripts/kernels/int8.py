"""Frozen weights as int8 in blocks of 32 along a row, with an f16 scale each: GGUF's Q8_0, scales kept apart.

Quantises bit for bit as ggml (and candle's `BlockQ8_0` on the CPU) does: d = max |w| / 127, q = round(w / d), halves
away from zero, and d rounded to f16 afterwards. Backward uses the same dequantised W as forward, untransposed:
dx = dy W.
"""

import triton
import triton.language as tl

from spec import Kernel, Tile

GROUP = tl.constexpr(32)


@triton.jit
def groups_of_block(rows, width, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """Rows (N, 1), first columns of groups (1, G), offsets of scales (N, G), and whether a group is there (N, G)."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    g = (tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G))[None, :]
    groups = width // GROUP
    scales = n.to(tl.int64) * groups + g
    return n.to(tl.int64), g * GROUP, scales, (n < rows) & (g < groups)


@triton.jit
def weights_of(n, first, row_stride):
    """Offsets (N, G, 32) of the weights of groups that begin at columns `first`, in rows of a stride."""
    return (n * row_stride + first)[:, :, None] + tl.arange(0, GROUP)[None, None, :]


@triton.jit
def int8_quantise(W, Q, SCALES, rows, width, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """Q (N, K) i8 and SCALES (N, K / 32) f16 of W (N, K)."""
    n, first, scales, there = groups_of_block(rows, width, BLOCK_N, BLOCK_G)
    at = weights_of(n, first, width)
    w = tl.load(W + at, mask=there[:, :, None], other=0.0).to(tl.float32)
    d = tl.div_rn(tl.max(tl.abs(w), 2), 127.0)
    inverse = tl.where(d > 0.0, tl.div_rn(1.0, tl.where(d > 0.0, d, 1.0)), 0.0)
    scaled = w * inverse[:, :, None]
    whole = scaled.to(tl.int32)
    rest = scaled - whole.to(tl.float32)
    q = whole + tl.where(rest >= 0.5, 1, 0) - tl.where(rest <= -0.5, 1, 0)
    tl.store(Q + at, q.to(tl.int8), mask=there[:, :, None])
    tl.store(SCALES + scales, d.to(tl.float16), mask=there)


@triton.jit
def int8_dequantise(Q, SCALES, W, rows, width, row_stride_w, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """W (N, K), with rows of its own stride, from Q (N, K) i8 and SCALES (N, K / 32) f16."""
    n, first, scales, there = groups_of_block(rows, width, BLOCK_N, BLOCK_G)
    q = tl.load(Q + weights_of(n, first, width), mask=there[:, :, None], other=0).to(tl.float32)
    d = tl.load(SCALES + scales, mask=there, other=0.0).to(tl.float32)
    w = (q * d[:, :, None]).to(W.dtype.element_ty)
    tl.store(W + weights_of(n, first, row_stride_w), w, mask=there[:, :, None])


LAUNCH = {
    "grid": ("cdiv(rows, BLOCK_N)", "cdiv(width, 32 * BLOCK_G)"),
    "tiles": lambda arch, constants: Tile({"BLOCK_N": 4, "BLOCK_G": 32}, num_warps=8),
}
# A width is a multiple of 32; the promise of 16 is what the compiler understands.
SIZES = {"rows": "i32", "width": "i32%16"}

KERNELS = [
    # Fused, the rest beyond the whole number would be that of the product before rounding: another side of a half.
    Kernel(
        int8_quantise,
        arguments={"W": "*bf16%16", "Q": "*i8%16", "SCALES": "*fp16%16"} | SIZES,
        fused_multiply_add=False,
        **LAUNCH,
    ),
    Kernel(
        int8_dequantise,
        arguments={"Q": "*i8%16", "SCALES": "*fp16%16", "W": "*bf16%16"} | SIZES | {"row_stride_w": "i32%16"},
        **LAUNCH,
    ),
]
