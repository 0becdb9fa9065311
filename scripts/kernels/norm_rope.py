"""RMS norm of every head, then rotary embedding of adjacent pairs: what queries and keys go through.

CPU twin: `kernels::rope::norm_rope`. X is (B, S, heads * HEAD) with rows of its own stride, so that queries and keys
may be columns of one wider product. A program takes BLOCK heads out of all tokens' heads in order, which makes any
number of heads fit (blocks are powers of two, Qwen-Image's 24 heads are none).
"""

import triton
import triton.language as tl

from spec import Kernel, Tile


@triton.jit
def heads_of_block(all_heads, heads, tokens, BLOCK: tl.constexpr):
    """(token in the flattened batch, head, position in the sequence, whether it is there) of a program's heads."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = index // heads
    return token.to(tl.int64), index % heads, token % tokens, index < all_heads


@triton.jit
def pairs(x, BLOCK: tl.constexpr, HEAD: tl.constexpr):
    """(BLOCK, HEAD) as its even and its odd columns."""
    return tl.split(tl.reshape(x, (BLOCK, HEAD // 2, 2)))


@triton.jit
def angles(COS, SIN, position, there, HEAD: tl.constexpr):
    at = position[:, None] * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, :]
    return tl.load(COS + at, mask=there[:, None], other=0.0), tl.load(SIN + at, mask=there[:, None], other=0.0)


@triton.jit
def norm_rope_forward(
    X,
    WEIGHT,
    COS,
    SIN,
    OUT,
    all_heads,
    heads,
    tokens,
    row_stride_x,
    row_stride_out,
    eps,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT (B, S, heads * HEAD). WEIGHT (HEAD,); COS, SIN (S, HEAD / 2) f32. all_heads = B * S * heads."""
    token, head, position, there = heads_of_block(all_heads, heads, tokens, BLOCK)
    columns = tl.arange(0, HEAD)
    offset = (head * HEAD)[:, None] + columns[None, :]
    x = tl.load(X + token[:, None] * row_stride_x + offset, mask=there[:, None], other=0.0).to(tl.float32)
    inv_rms = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD + eps)
    x = x * inv_rms[:, None] * tl.load(WEIGHT + columns).to(tl.float32)[None, :]
    a, b = pairs(x, BLOCK, HEAD)
    cos, sin = angles(COS, SIN, position, there, HEAD)
    out = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK, HEAD))
    tl.store(OUT + token[:, None] * row_stride_out + offset, out.to(OUT.dtype.element_ty), mask=there[:, None])


@triton.jit
def norm_rope_backward(
    X,
    GRAD,
    WEIGHT,
    COS,
    SIN,
    DX,
    all_heads,
    heads,
    tokens,
    row_stride_x,
    row_stride_grad,
    row_stride_dx,
    eps,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DX from GRAD; 1 / rms is computed again. The weight is taken as frozen."""
    token, head, position, there = heads_of_block(all_heads, heads, tokens, BLOCK)
    columns = tl.arange(0, HEAD)
    offset = (head * HEAD)[:, None] + columns[None, :]
    x = tl.load(X + token[:, None] * row_stride_x + offset, mask=there[:, None], other=0.0).to(tl.float32)
    grad = tl.load(GRAD + token[:, None] * row_stride_grad + offset, mask=there[:, None], other=0.0).to(tl.float32)
    a, b = pairs(grad, BLOCK, HEAD)
    cos, sin = angles(COS, SIN, position, there, HEAD)
    unrotated = tl.reshape(tl.join(a * cos + b * sin, b * cos - a * sin), (BLOCK, HEAD))
    grad = unrotated * tl.load(WEIGHT + columns).to(tl.float32)[None, :]
    inv_rms = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD + eps)
    normed = x * inv_rms[:, None]
    mean_gx = tl.sum(grad * normed, 1) / HEAD
    dx = (grad - normed * mean_gx[:, None]) * inv_rms[:, None]
    tl.store(DX + token[:, None] * row_stride_dx + offset, dx.to(DX.dtype.element_ty), mask=there[:, None])


def tile(arch, constants):
    return Tile({"BLOCK": 4096 // constants["HEAD"]}, num_warps=4)


NUMBERS = {"all_heads": "i32", "heads": "i32", "tokens": "i32", "row_stride_x": "i32%16"}
TABLES = {"WEIGHT": "*bf16%16", "COS": "*fp32%16", "SIN": "*fp32%16"}
LAUNCH = {
    "grid": ("cdiv(all_heads, BLOCK)",),
    "variants": {"_d64": {"HEAD": 64}, "_d128": {"HEAD": 128}},
    "tiles": tile,
}

KERNELS = [
    Kernel(
        norm_rope_forward,
        arguments={"X": "*bf16%16"}
        | TABLES
        | {"OUT": "*bf16%16"}
        | NUMBERS
        | {"row_stride_out": "i32%16", "eps": "fp32"},
        **LAUNCH,
    ),
    Kernel(
        norm_rope_backward,
        arguments={"X": "*bf16%16", "GRAD": "*bf16%16"}
        | TABLES
        | {"DX": "*bf16%16"}
        | NUMBERS
        | {"row_stride_grad": "i32%16", "row_stride_dx": "i32%16", "eps": "fp32"},
        **LAUNCH,
    ),
]
