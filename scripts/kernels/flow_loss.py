"""The flow-matching loss of a micro-batch and its gradient. CPU twin: `train::step`."""

import triton
import triton.language as tl

from spec import Kernel, Tile


@triton.jit
def flow_loss(PREDICTION, TARGET, FACTORS, SEED, PARTIALS, size, BLOCK: tl.constexpr):
    """SEED = factor * (PREDICTION - TARGET), and PARTIALS (B, blocks) f64: sums of squared errors, for the host to add.

    PREDICTION, SEED (B, size), TARGET the same in f32. FACTORS (B,) f32: 2 * weight / (size * B). A program: one block
    of one sample.
    """
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    at = sample * size + offsets
    prediction = tl.load(PREDICTION + at, mask=inside, other=0.0).to(tl.float32)
    error = prediction - tl.load(TARGET + at, mask=inside, other=0.0)
    tl.store(SEED + at, (tl.load(FACTORS + sample) * error).to(SEED.dtype.element_ty), mask=inside)
    wide = error.to(tl.float64)
    tl.store(PARTIALS + sample * tl.num_programs(1) + tl.program_id(1), tl.sum(wide * wide, 0))


KERNELS = [
    Kernel(
        flow_loss,
        arguments={
            "PREDICTION": "*bf16%16",
            "TARGET": "*fp32%16",
            "FACTORS": "*fp32%16",
            "SEED": "*bf16%16",
            "PARTIALS": "*fp64%16",
            "size": "i32%16",
        },
        grid=("samples", "cdiv(size, BLOCK)"),
        grid_arguments=("samples",),
        tiles=lambda arch, constants: Tile({"BLOCK": 4096}, num_warps=8),
    ),
]
