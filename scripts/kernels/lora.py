"""What a linear with an adapter adds to the product with its frozen weight. CPU twin: `kernels::linear`.

The products with a wide side, x W', x A', dy W and those of the adapter's own gradients, are cuBLAS's; what it does not
do is add a bias and a product of small rank to a bf16 matrix in one pass over it, rounded once.
"""

import triton
import triton.language as tl

from spec import Kernel, Tile


@triton.jit
def lora_add(
    Y,
    BIAS,
    T,
    B,
    rows,
    width,
    rank,
    row_stride_y,
    row_stride_t,
    row_stride_b,
    has_bias,
    scale,
    BY_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Y += BIAS + scale * T B', in place: Y (M, N), T (M, rank), BIAS (N,).

    Forward: T = x A' and B is lora_B (N, rank). Backward: Y is dx, T = dt (M, rank), and with BY_RANK B is lora_A
    (rank, N), so that dx += dt A. A rank of 0 adds the bias alone.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        t = T + m.to(tl.int64)[:, None] * row_stride_t + r[None, :]
        t = tl.load(t, mask=(m < rows)[:, None] & (r < rank)[None, :], other=0.0)
        if BY_RANK:
            b = B + r.to(tl.int64)[:, None] * row_stride_b + n[None, :]
        else:
            b = B + n.to(tl.int64)[None, :] * row_stride_b + r[:, None]
        b = tl.load(b, mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
        product = tl.dot(t, b, product)
    bias = tl.load(BIAS + n, mask=(n < width) & (has_bias != 0), other=0.0).to(tl.float32)
    at = Y + m.to(tl.int64)[:, None] * row_stride_y + n[None, :]
    inside = (m < rows)[:, None] & (n < width)[None, :]
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (y + bias[None, :] + scale * product).to(Y.dtype.element_ty), mask=inside)


KERNELS = [
    Kernel(
        lora_add,
        arguments={
            "Y": "*bf16%16",
            "BIAS": "*bf16%16",
            "T": "*bf16%16",
            "B": "*bf16%16",
            "rows": "i32",
            "width": "i32%16",
            "rank": "i32",
            "row_stride_y": "i32%16",
            "row_stride_t": "i32",
            "row_stride_b": "i32",
            "has_bias": "i32",
            "scale": "fp32",
        },
        grid=("cdiv(rows, BLOCK_M)", "cdiv(width, BLOCK_N)"),
        variants={"": {"BY_RANK": False}, "_by_rank": {"BY_RANK": True}},
        tiles=lambda arch, constants: Tile({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_R": 16}, num_warps=8),
    ),
]
