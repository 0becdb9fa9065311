"""What the kernels of joint attention share: two streams, text and image, that form one sequence without being copied
into one.

CPU twin: `kernels::attention`. Each stream has its own queries, keys and values, (B, S, heads * HEAD) with rows of a
stride that both share. The sequence is text, then image. Text keys beyond a sample's length take no part; text queries
beyond it attend like others and nobody reads them. Numbers of every query row, log-sum-exp (base 2) and delta, are
(B, heads, S_text + S_image).

Tiles never straddle the streams: the tiles of the text come first, then those of the image.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sample_and_head(heads):
    """(sample i64, head) of the second dimension of the grid."""
    index = tl.program_id(1)
    return (index // heads).to(tl.int64), index % heads


@triton.jit
def rows_of_tile(text_tokens, image_tokens, BLOCK: tl.constexpr):
    """(whether the tile is text, its rows in the stream (BLOCK,), rows of the stream, the stream's first row of all)"""
    tile = tl.program_id(0)
    text_tiles = tl.cdiv(text_tokens, BLOCK)
    is_text = tile < text_tiles
    first = tl.where(is_text, tile, tile - text_tiles) * BLOCK
    rows = first + tl.arange(0, BLOCK)
    return is_text, rows, tl.where(is_text, text_tokens, image_tokens), tl.where(is_text, 0, text_tokens)


@triton.jit
def stream_of(is_text, TEXT, IMAGE, sample, head, tokens, row_stride, HEAD: tl.constexpr):
    """Where a sample's head begins in the tile's stream of `tokens` rows."""
    base = IMAGE
    if is_text:
        base = TEXT
    return base + sample * tokens * row_stride + head * HEAD


@triton.jit
def load_rows(base, rows, limit, row_stride, HEAD: tl.constexpr):
    """(len(rows), HEAD); zeros from `limit` on."""
    at = base + rows[:, None] * row_stride + tl.arange(0, HEAD)[None, :]
    return tl.load(at, mask=rows[:, None] < limit, other=0.0)


@triton.jit
def store_rows(base, rows, limit, row_stride, values, HEAD: tl.constexpr):
    at = base + rows[:, None] * row_stride + tl.arange(0, HEAD)[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=rows[:, None] < limit)
