"""GELU in its tanh approximation, the activation between the two linears of an MLP. CPU twin: `kernels::math`."""

import triton
import triton.language as tl

from spec import Kernel, Tile

# 2 sqrt(2 / pi), as a number here because a kernel sees no other globals.
TWICE_C = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid_of_argument(x):
    """(1 + tanh u) / 2 is sigmoid(2u): no cancellation for negative x."""
    return 1.0 / (1.0 + tl.exp(-TWICE_C * (x + CUBIC * x * x * x)))


@triton.jit
def gelu_forward(X, OUT, width, row_stride_out, BLOCK: tl.constexpr):
    """OUT = gelu(X): X (M, width), OUT (M, width) with rows of its own stride. A program: one row, BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = x * sigmoid_of_argument(x)
    tl.store(OUT + row * row_stride_out + columns, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(X, GRAD, ACTIVATED, width, row_stride_activated, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """GRAD *= gelu'(X), in place; with WRITE also ACTIVATED = gelu(X), which the adapter's gradient wants again."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid_of_argument(x)
    derivative = s + x * s * (1.0 - s) * TWICE_C * (1.0 + 3.0 * CUBIC * x * x)
    tl.store(GRAD + row * width + columns, (grad * derivative).to(GRAD.dtype.element_ty), mask=inside)
    if WRITE:
        y = (x * s).to(ACTIVATED.dtype.element_ty)
        tl.store(ACTIVATED + row * row_stride_activated + columns, y, mask=inside)


def tile(arch, constants):
    return Tile({"BLOCK": 2048}, num_warps=4)


KERNELS = [
    Kernel(
        gelu_forward,
        arguments={"X": "*bf16%16", "OUT": "*bf16%16", "width": "i32%16", "row_stride_out": "i32%16"},
        grid=("rows", "cdiv(width, BLOCK)"),
        grid_arguments=("rows",),
        tiles=tile,
    ),
    Kernel(
        gelu_backward,
        arguments={
            "X": "*bf16%16",
            "GRAD": "*bf16%16",
            "ACTIVATED": "*bf16%16",
            "width": "i32%16",
            "row_stride_activated": "i32%16",
        },
        grid=("rows", "cdiv(width, BLOCK)"),
        grid_arguments=("rows",),
        variants={"": {"WRITE": False}, "_recompute": {"WRITE": True}},
        tiles=tile,
    ),
]
