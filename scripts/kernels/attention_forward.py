"""Joint attention, forward: FlashAttention-2's loop over blocks of keys (<https://arxiv.org/abs/2307.08691>)."""

import triton
import triton.language as tl

from attention_streams import LOG2_E, load_rows, rows_of_tile, sample_and_head, store_rows, stream_of
from spec import Kernel, Tile


@triton.jit
def attend(
    q,
    out,
    top,
    total,
    K,
    V,
    first,
    tokens,
    row_stride_qk,
    row_stride_v,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Goes on with one block of keys from row `first` of a stream of `tokens`; MASKED where it may be ragged."""
    to_base2 = LOG2_E * HEAD**-0.5
    rows = first + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, HEAD)
    k_at = K + rows[None, :] * row_stride_qk + columns[:, None]
    v_at = V + rows[:, None] * row_stride_v + columns[None, :]
    if MASKED:
        k = tl.load(k_at, mask=rows[None, :] < tokens, other=0.0)
        scores = tl.where(rows[None, :] < tokens, tl.dot(q, k), float("-inf"))
    else:
        scores = tl.dot(q, tl.load(k_at))
    new_top = tl.maximum(top, tl.max(scores, 1) * to_base2)
    p = tl.math.exp2(scores * to_base2 - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    out = out * shrink[:, None]
    if MASKED:
        v = tl.load(v_at, mask=rows[:, None] < tokens, other=0.0)
    else:
        v = tl.load(v_at)
    return tl.dot(p.to(v.dtype), v, out), new_top, total


@triton.jit
def attention_forward(
    TEXT_Q,
    TEXT_K,
    TEXT_V,
    TEXT_OUT,
    IMAGE_Q,
    IMAGE_K,
    IMAGE_V,
    IMAGE_OUT,
    LENGTHS,
    LOG_SUMS,
    text_tokens,
    image_tokens,
    heads,
    row_stride_qk,
    row_stride_v,
    row_stride_out,
    HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MASKED: tl.constexpr,
):
    """Outputs of both streams, and LOG_SUMS (B, heads, S). LENGTHS (B,) i32: valid text tokens, 0 to text_tokens.

    A program: one tile of queries of one head of one sample against all keys. There is at least one image token.
    """
    sample, head = sample_and_head(heads)
    is_text, rows, limit, first_row = rows_of_tile(text_tokens, image_tokens, BLOCK_Q)
    queries = stream_of(is_text, TEXT_Q, IMAGE_Q, sample, head, limit, row_stride_qk, HEAD)
    q = load_rows(queries, rows, limit, row_stride_qk, HEAD)
    out = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    k_image = IMAGE_K + sample * image_tokens * row_stride_qk + head * HEAD
    v_image = IMAGE_V + sample * image_tokens * row_stride_v + head * HEAD
    k_text = TEXT_K + sample * text_tokens * row_stride_qk + head * HEAD
    v_text = TEXT_V + sample * text_tokens * row_stride_v + head * HEAD
    length = tl.load(LENGTHS + sample)

    # The image's whole blocks need no mask. Its ragged end and the text go through a second loop, where every block has a
    # valid key: `top` is finite after it.
    whole = image_tokens // BLOCK_K
    for block in tl.range(0, whole):
        out, top, total = attend(
            q, out, top, total, k_image, v_image, block * BLOCK_K, 0, row_stride_qk, row_stride_v, HEAD, BLOCK_K, False
        )
    ragged = tl.cdiv(image_tokens - whole * BLOCK_K, BLOCK_MASKED)
    for block in tl.range(0, ragged + tl.cdiv(length, BLOCK_MASKED)):
        k, v, first, tokens = k_text, v_text, (block - ragged) * BLOCK_MASKED, length
        if block < ragged:
            k, v, first, tokens = k_image, v_image, whole * BLOCK_K + block * BLOCK_MASKED, image_tokens
        out, top, total = attend(
            q, out, top, total, k, v, first, tokens, row_stride_qk, row_stride_v, HEAD, BLOCK_MASKED, True
        )

    outputs = stream_of(is_text, TEXT_OUT, IMAGE_OUT, sample, head, limit, row_stride_out, HEAD)
    store_rows(outputs, rows, limit, row_stride_out, out / total[:, None], HEAD)
    log_sums = LOG_SUMS + tl.program_id(1).to(tl.int64) * (text_tokens + image_tokens) + first_row
    tl.store(log_sums + rows, top + tl.math.log2(total), mask=rows < limit)


def tile(arch, constants):
    """The largest that leaves every thread its 255 registers without spilling."""
    if arch == 90:
        return Tile({"BLOCK_Q": 128, "BLOCK_K": 128, "BLOCK_MASKED": 64}, num_warps=8, num_stages=2)
    return Tile({"BLOCK_Q": 128, "BLOCK_K": 64, "BLOCK_MASKED": 32}, num_warps=8, num_stages=2)


KERNELS = [
    Kernel(
        attention_forward,
        arguments={f"{stream}_{x}": "*bf16%16" for stream in ("TEXT", "IMAGE") for x in ("Q", "K", "V", "OUT")}
        | {
            "LENGTHS": "*i32%16",
            "LOG_SUMS": "*fp32%16",
            "text_tokens": "i32",
            "image_tokens": "i32",
            "heads": "i32",
            "row_stride_qk": "i32%16",
            "row_stride_v": "i32%16",
            "row_stride_out": "i32%16",
        },
        grid=("cdiv(text_tokens, BLOCK_Q) + cdiv(image_tokens, BLOCK_Q)", "samples * heads"),
        grid_arguments=("samples",),
        variants={"_d64": {"HEAD": 64}, "_d128": {"HEAD": 128}},
        tiles=tile,
    ),
]
