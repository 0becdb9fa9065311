"""Joint attention, backward: probabilities are computed again from the log-sum-exp that forward kept.

Two kernels, one that walks over keys for each tile of queries and one that walks over queries for each tile of keys, so
that no sum is shared between programs: no atomics, one order, the same bytes every time. The first also writes delta,
the sum of output times gradient of every query row, which the second reads: launch them in this order.

`text_gradient` is 0 where nothing read the text's output, as in the last block: its queries are then not visited, their
gradient is zero, and TEXT_OUT and TEXT_GRAD are not read.
"""

import triton
import triton.language as tl

from attention_streams import LOG2_E, load_rows, rows_of_tile, sample_and_head, store_rows, stream_of
from spec import Kernel, Tile


@triton.jit
def add_keys(
    dq,
    q,
    grad,
    log_sum,
    delta,
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
    """dq, less the factor 1 / sqrt(HEAD), from one block of keys; MASKED where it may be ragged."""
    rows = first + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, HEAD)
    k_at = K + rows[:, None] * row_stride_qk + columns[None, :]
    v_at = V + rows[None, :] * row_stride_v + columns[:, None]
    if MASKED:
        k = tl.load(k_at, mask=rows[:, None] < tokens, other=0.0)
        v = tl.load(v_at, mask=rows[None, :] < tokens, other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    p = tl.math.exp2(tl.dot(q, tl.trans(k)) * (LOG2_E * HEAD**-0.5) - log_sum[:, None])
    ds = p * (tl.dot(grad, v) - delta[:, None])
    if MASKED:
        # The score of a missing key is 0, and exp2(-log_sum) may be infinite.
        ds = tl.where(rows[None, :] < tokens, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit
def attention_backward_queries(
    TEXT_Q,
    TEXT_K,
    TEXT_V,
    TEXT_OUT,
    TEXT_GRAD,
    TEXT_DQ,
    IMAGE_Q,
    IMAGE_K,
    IMAGE_V,
    IMAGE_OUT,
    IMAGE_GRAD,
    IMAGE_DQ,
    LENGTHS,
    LOG_SUMS,
    DELTA,
    text_tokens,
    image_tokens,
    text_gradient,
    heads,
    row_stride_qk,
    row_stride_v,
    row_stride_out,
    row_stride_dqk,
    HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MASKED: tl.constexpr,
):
    """DQ of both streams, and DELTA (B, heads, S). A program: one tile of queries of one head of one sample."""
    sample, head = sample_and_head(heads)
    is_text, rows, limit, first_row = rows_of_tile(text_tokens, image_tokens, BLOCK_Q)
    visited = (not is_text) | (text_gradient != 0)
    read = tl.where(visited, limit, 0)
    q_base = stream_of(is_text, TEXT_Q, IMAGE_Q, sample, head, limit, row_stride_qk, HEAD)
    out_base = stream_of(is_text, TEXT_OUT, IMAGE_OUT, sample, head, limit, row_stride_out, HEAD)
    grad_base = stream_of(is_text, TEXT_GRAD, IMAGE_GRAD, sample, head, limit, row_stride_out, HEAD)
    grad = load_rows(grad_base, rows, read, row_stride_out, HEAD)
    out = load_rows(out_base, rows, read, row_stride_out, HEAD)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    numbers = tl.program_id(1).to(tl.int64) * (text_tokens + image_tokens) + first_row + rows
    tl.store(DELTA + numbers, delta, mask=rows < limit)
    # An infinite log-sum-exp makes the probabilities of rows that are not there zero.
    log_sum = tl.load(LOG_SUMS + numbers, mask=rows < read, other=float("inf"))
    q = load_rows(q_base, rows, read, row_stride_qk, HEAD)
    dq = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    k_image = IMAGE_K + sample * image_tokens * row_stride_qk + head * HEAD
    v_image = IMAGE_V + sample * image_tokens * row_stride_v + head * HEAD
    k_text = TEXT_K + sample * text_tokens * row_stride_qk + head * HEAD
    v_text = TEXT_V + sample * text_tokens * row_stride_v + head * HEAD
    length = tl.load(LENGTHS + sample)

    # As forward: whole blocks of the image, then with masks its ragged end and the text.
    whole = image_tokens // BLOCK_K
    for block in tl.range(0, tl.where(visited, whole, 0)):
        dq = add_keys(
            dq,
            q,
            grad,
            log_sum,
            delta,
            k_image,
            v_image,
            block * BLOCK_K,
            0,
            row_stride_qk,
            row_stride_v,
            HEAD,
            BLOCK_K,
            False,
        )
    ragged = tl.cdiv(image_tokens - whole * BLOCK_K, BLOCK_MASKED)
    for block in tl.range(0, tl.where(visited, ragged + tl.cdiv(length, BLOCK_MASKED), 0)):
        k, v, first, tokens = k_text, v_text, (block - ragged) * BLOCK_MASKED, length
        if block < ragged:
            k, v, first, tokens = k_image, v_image, whole * BLOCK_K + block * BLOCK_MASKED, image_tokens
        dq = add_keys(
            dq, q, grad, log_sum, delta, k, v, first, tokens, row_stride_qk, row_stride_v, HEAD, BLOCK_MASKED, True
        )

    dq_base = stream_of(is_text, TEXT_DQ, IMAGE_DQ, sample, head, limit, row_stride_dqk, HEAD)
    store_rows(dq_base, rows, limit, row_stride_dqk, dq * HEAD**-0.5, HEAD)


@triton.jit
def attention_backward_keys(
    TEXT_Q,
    TEXT_K,
    TEXT_V,
    TEXT_GRAD,
    TEXT_DK,
    TEXT_DV,
    IMAGE_Q,
    IMAGE_K,
    IMAGE_V,
    IMAGE_GRAD,
    IMAGE_DK,
    IMAGE_DV,
    LENGTHS,
    LOG_SUMS,
    DELTA,
    text_tokens,
    image_tokens,
    text_gradient,
    heads,
    row_stride_qk,
    row_stride_v,
    row_stride_out,
    row_stride_dqk,
    row_stride_dv,
    HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """DK and DV of both streams; zero for text keys that take no part. A program: one tile of keys of one head of one
    sample against all queries. Scores are transposed, so that the products with the gradients need no other layout."""
    sample, head = sample_and_head(heads)
    is_text, rows, limit, _ = rows_of_tile(text_tokens, image_tokens, BLOCK_K)
    valid = image_tokens
    if is_text:
        valid = tl.load(LENGTHS + sample)
    k_base = stream_of(is_text, TEXT_K, IMAGE_K, sample, head, limit, row_stride_qk, HEAD)
    v_base = stream_of(is_text, TEXT_V, IMAGE_V, sample, head, limit, row_stride_v, HEAD)
    k = load_rows(k_base, rows, valid, row_stride_qk, HEAD)
    v = load_rows(v_base, rows, valid, row_stride_v, HEAD)
    dk = tl.zeros([BLOCK_K, HEAD], tl.float32)
    dv = tl.zeros([BLOCK_K, HEAD], tl.float32)
    numbers = tl.program_id(1).to(tl.int64) * (text_tokens + image_tokens)
    q_text = TEXT_Q + sample * text_tokens * row_stride_qk + head * HEAD
    q_image = IMAGE_Q + sample * image_tokens * row_stride_qk + head * HEAD
    grad_text = TEXT_GRAD + sample * text_tokens * row_stride_out + head * HEAD
    grad_image = IMAGE_GRAD + sample * image_tokens * row_stride_out + head * HEAD

    text_blocks = tl.where(text_gradient != 0, tl.cdiv(text_tokens, BLOCK_Q), 0)
    blocks = tl.where(tl.min(rows, 0) < valid, text_blocks + tl.cdiv(image_tokens, BLOCK_Q), 0)
    for block in tl.range(0, blocks):
        q_base, grad_base, first, tokens, first_number = (
            q_image,
            grad_image,
            (block - text_blocks) * BLOCK_Q,
            image_tokens,
            numbers + text_tokens,
        )
        if block < text_blocks:
            q_base, grad_base, first, tokens, first_number = q_text, grad_text, block * BLOCK_Q, text_tokens, numbers
        queries = first + tl.arange(0, BLOCK_Q)
        q = load_rows(q_base, queries, tokens, row_stride_qk, HEAD)
        # An infinite log-sum-exp makes the probabilities of rows that are not there zero.
        log_sum = tl.load(LOG_SUMS + first_number + queries, mask=queries < tokens, other=float("inf"))
        p = tl.math.exp2(tl.dot(k, tl.trans(q)) * (LOG2_E * HEAD**-0.5) - log_sum[None, :])
        grad = load_rows(grad_base, queries, tokens, row_stride_out, HEAD)
        dv = tl.dot(p.to(grad.dtype), grad, dv)
        delta = tl.load(DELTA + first_number + queries, mask=queries < tokens, other=0.0)
        ds = p * (tl.dot(v, tl.trans(grad)) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)

    # A key that takes no part had a score of 0 here, whose probability may be anything.
    there = rows[:, None] < valid
    dk_base = stream_of(is_text, TEXT_DK, IMAGE_DK, sample, head, limit, row_stride_dqk, HEAD)
    dv_base = stream_of(is_text, TEXT_DV, IMAGE_DV, sample, head, limit, row_stride_dv, HEAD)
    store_rows(dk_base, rows, limit, row_stride_dqk, tl.where(there, dk * HEAD**-0.5, 0.0), HEAD)
    store_rows(dv_base, rows, limit, row_stride_dv, tl.where(there, dv, 0.0), HEAD)


def queries_tile(arch, constants):
    """As forward: the largest without spilling, and on sm_80 and sm_89 within their shared memory."""
    block = 64 if arch == 90 else 32
    return Tile({"BLOCK_Q": 128, "BLOCK_K": block, "BLOCK_MASKED": block}, num_warps=8, num_stages=2)


def keys_tile(arch, constants):
    if arch == 90:
        return Tile({"BLOCK_Q": 64, "BLOCK_K": 128}, num_warps=8, num_stages=2)
    if constants["HEAD"] == 128:
        return Tile({"BLOCK_Q": 64, "BLOCK_K": 64}, num_warps=8, num_stages=2)
    return Tile({"BLOCK_Q": 32, "BLOCK_K": 128}, num_warps=8, num_stages=2)


def arguments(*names):
    """Buffers of the text, then of the image; what both kernels take besides."""
    return {f"{stream}_{x}": "*bf16%16" for stream in ("TEXT", "IMAGE") for x in names} | {
        "LENGTHS": "*i32%16",
        "LOG_SUMS": "*fp32%16",
        "DELTA": "*fp32%16",
        "text_tokens": "i32",
        "image_tokens": "i32",
        "text_gradient": "i32",
        "heads": "i32",
        "row_stride_qk": "i32%16",
        "row_stride_v": "i32%16",
        "row_stride_out": "i32%16",
        "row_stride_dqk": "i32%16",
    }


HEADS = {"grid_arguments": ("samples",), "variants": {"_d64": {"HEAD": 64}, "_d128": {"HEAD": 128}}}

KERNELS = [
    Kernel(
        attention_backward_queries,
        arguments=arguments("Q", "K", "V", "OUT", "GRAD", "DQ"),
        grid=("cdiv(text_tokens, BLOCK_Q) + cdiv(image_tokens, BLOCK_Q)", "samples * heads"),
        tiles=queries_tile,
        **HEADS,
    ),
    Kernel(
        attention_backward_keys,
        arguments=arguments("Q", "K", "V", "GRAD", "DK", "DV") | {"row_stride_dv": "i32%16"},
        grid=("cdiv(text_tokens, BLOCK_K) + cdiv(image_tokens, BLOCK_K)", "samples * heads"),
        tiles=keys_tile,
        **HEADS,
    ),
]
