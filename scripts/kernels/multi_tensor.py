"""Many tensors of any length in one launch: a list of chunks, each a piece of one tensor.

POINTERS (tensors, 5) i64 holds addresses of f32 weights, gradient, first and second moment, and of a bf16 copy of the
weights or 0. LENGTHS (tensors,) i64. CHUNKS (chunks, 2) i32: the tensor, and which piece of CHUNK elements of it.
"""

import triton
import triton.language as tl

from spec import Kernel, Tile

# As a kernel sees them: POINTERS' columns.
WEIGHTS, GRAD, EXP_AVG, EXP_AVG_SQ, COPY = (tl.constexpr(i) for i in range(5))
COLUMNS = tl.constexpr(5)


@triton.jit
def piece(CHUNKS, LENGTHS, CHUNK: tl.constexpr):
    """(tensor, offsets in it, whether they are there) of a program's chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(CHUNKS + 2 * chunk).to(tl.int64)
    offsets = tl.load(CHUNKS + 2 * chunk + 1).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    return tensor, offsets, offsets < tl.load(LENGTHS + tensor)


@triton.jit
def f32_at(POINTERS, tensor, column):
    """One of a tensor's f32 buffers."""
    return tl.load(POINTERS + tensor * COLUMNS + column).to(tl.pointer_type(tl.float32))


@triton.jit
def adamw(POINTERS, LENGTHS, CHUNKS, NUMBERS, COEFFICIENT, CHUNK: tl.constexpr):
    """One step of AdamW, bit for bit that of `optim::adamw`. NUMBERS (tensors, 7) f32 is its `Update`, field by field.

    Gradients count times COEFFICIENT (1,) f32, that of clipping.
    """
    tensor, offsets, there = piece(CHUNKS, LENGTHS, CHUNK)
    numbers = NUMBERS + tensor * 7
    shrink, one_minus_beta1, beta2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    one_minus_beta2, bias_correction2_sqrt = tl.load(numbers + 3), tl.load(numbers + 4)
    eps, neg_step_size = tl.load(numbers + 5), tl.load(numbers + 6)
    weights = f32_at(POINTERS, tensor, WEIGHTS) + offsets
    first = f32_at(POINTERS, tensor, EXP_AVG) + offsets
    second = f32_at(POINTERS, tensor, EXP_AVG_SQ) + offsets
    g = tl.load(f32_at(POINTERS, tensor, GRAD) + offsets, mask=there, other=0.0) * tl.load(COEFFICIENT)
    m = tl.load(first, mask=there, other=0.0)
    v = tl.load(second, mask=there, other=0.0)
    w = tl.load(weights, mask=there, other=0.0)
    # PyTorch's lerp: this form below a weight of 0.5, the mirrored one above.
    m = tl.where(one_minus_beta1 < 0.5, m + one_minus_beta1 * (g - m), g - (g - m) * (1.0 - one_minus_beta1))
    v = v * beta2 + one_minus_beta2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), bias_correction2_sqrt) + eps
    w = w * shrink + tl.div_rn(neg_step_size * m, denominator)
    tl.store(first, m, mask=there)
    tl.store(second, v, mask=there)
    tl.store(weights, w, mask=there)
    copy = tl.load(POINTERS + tensor * COLUMNS + COPY)
    target = copy.to(tl.pointer_type(tl.bfloat16)) + offsets
    tl.store(target, w.to(tl.bfloat16), mask=there & (copy != 0))


@triton.jit
def squared_norm(POINTERS, LENGTHS, CHUNKS, PARTIALS, CHUNK: tl.constexpr):
    """PARTIALS (chunks,) f64: each chunk's sum of squares of the gradient."""
    tensor, offsets, there = piece(CHUNKS, LENGTHS, CHUNK)
    g = tl.load(f32_at(POINTERS, tensor, GRAD) + offsets, mask=there, other=0.0).to(tl.float64)
    tl.store(PARTIALS + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def clip_coefficient(PARTIALS, NORM, COEFFICIENT, chunks, max_norm, BLOCK: tl.constexpr):
    """NORM (1,) f64 of all gradients together, and the COEFFICIENT (1,) f32 that brings it to `max_norm` at most.

    1 where nothing is to be clipped: a norm that is small enough or not finite, or a `max_norm` of 0. One program, so
    that the sum has one order. CPU twin: `optim::clip`.
    """
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(PARTIALS + at, mask=at < chunks, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    coefficient = max_norm / (norm + 1e-6)
    clips = (max_norm > 0.0) & (coefficient < 1.0) & (norm < float("inf"))
    tl.store(NORM, norm)
    tl.store(COEFFICIENT, tl.where(clips, coefficient, 1.0).to(tl.float32))


TENSORS = {"POINTERS": "*i64%16", "LENGTHS": "*i64%16", "CHUNKS": "*i32%16"}


def chunk_tile(arch, constants):
    return Tile({"CHUNK": 2048}, num_warps=8)


CHUNK_GRID = {"grid": ("chunks",), "grid_arguments": ("chunks",), "tiles": chunk_tile}

KERNELS = [
    Kernel(
        adamw,
        arguments=TENSORS | {"NUMBERS": "*fp32%16", "COEFFICIENT": "*fp32%16"},
        fused_multiply_add=False,
        **CHUNK_GRID,
    ),
    Kernel(squared_norm, arguments=TENSORS | {"PARTIALS": "*fp64%16"}, **CHUNK_GRID),
    Kernel(
        clip_coefficient,
        arguments={
            "PARTIALS": "*fp64%16",
            "NORM": "*fp64%16",
            "COEFFICIENT": "*fp32%16",
            "chunks": "i32",
            "max_norm": "fp64",
        },
        grid=("1",),
        tiles=lambda arch, constants: Tile({"BLOCK": 1024}, num_warps=4),
    ),
]
