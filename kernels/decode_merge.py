"""Decode attention in splits: each one's share of a context, and the merge of what they found.

Shapes: B sequences, H query heads, D value dimension, S splits.
"""

from __future__ import annotations

import math

import torch

from rankwright.kernels.backend import jit, next_power_of_two, tl
from rankwright.kernels.decode_config import DecodeConfig
from rankwright.kernels.overlap import overlap, take_turn


@jit()
def share(context, window, split, num_splits, TILE, MIN_TILES):
    """Return first and last + 1 tile of a split, and how many splits have any."""
    first_tile = tl.maximum(context - window, 0) // TILE
    num_tiles = (context + TILE - 1) // TILE - first_tile
    tiles_per_split = tl.maximum((num_tiles + num_splits - 1) // num_splits, MIN_TILES)
    start = first_tile + split * tiles_per_split
    stop = tl.minimum(start + tiles_per_split, first_tile + num_tiles)
    active = (num_tiles + tiles_per_split - 1) // tiles_per_split
    return start, stop, active


@jit(do_not_specialize=("window", "num_splits"))
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    context_ptr,
    windows_ptr,
    sinks_ptr,
    out_ptr,
    merged_lse_ptr,
    window,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOWS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    LN_2: tl.constexpr,
    MIN_TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write the mean of a row's splits, weighted with their log-sum-exp."""
    take_turn(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    context = tl.load(context_ptr + row // NUM_HEADS)
    if HAS_WINDOWS:
        window = tl.load(windows_ptr + row // NUM_HEADS)
    _, _, active = share(context, window, 0, num_splits, TILE, MIN_TILES)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * num_splits + s, mask=s < active, other=-float("inf"))
    # An empty context has no maximum; 0 in its place keeps inf - inf out.
    highest = tl.where(active > 0, tl.max(lse, axis=0), 0.0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + row % NUM_HEADS).to(tl.float32) / LN_2
        highest = tl.maximum(highest, sink)
    total = tl.sum(tl.exp2(lse - highest), axis=0)
    if HAS_SINKS:
        total += tl.exp2(sink - highest)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, active, CHUNK):
        c = first + tl.arange(0, CHUNK)
        at = row * num_splits + c
        chunk_lse = tl.load(lse_ptr + at, mask=c < active, other=-float("inf"))
        part = tl.load(
            partial_ptr + at[:, None] * HEAD_DIM + d[None, :],
            mask=(c < active)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        acc += tl.sum(part * tl.exp2(chunk_lse - highest)[:, None], axis=0)
    total = tl.where(active > 0, total, 1.0)
    out = acc / total
    tl.store(out_ptr + row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    if RETURN_LSE:
        merged = tl.where(active > 0, (highest + tl.log2(total)) * LN_2, -float("inf"))
        tl.store(merged_lse_ptr + row, merged)


# Lanes of the merge, a warp at least: three widths to compile, whatever the batch. It adds up
# `_MERGE_CHUNK` splits at a time, 8 KB of them at dimension 128.
_MERGE_LANES = 32
_MERGE_CHUNK = 16


def merge_splits(
    partial: torch.Tensor,
    lse: torch.Tensor,
    context_lens_B: torch.Tensor,
    out_BHD: torch.Tensor,
    config: DecodeConfig,
    *,
    window: int = 2**31 - 1,
    windows_B: torch.Tensor | None = None,
    sinks_H: torch.Tensor | None = None,
    lse_BH: torch.Tensor | None = None,
) -> None:
    """Fill `out_BHD` with the mean of each row's splits.

    Args:
        partial: float32 [B, H, S, D]: what each split found.
        lse: float32 [B, H, S]: base-2 logarithm of the sum of its weights.
        context_lens_B: As the splits were cut by.
        out_BHD: Contiguous.
        config: As the splits were cut by.
        window: As the splits were cut by.
        windows_B: In its place.
        sinks_H: One more score a head.
        lse_BH: float32, filled with the natural log-sum-exp of all scores.
    """
    batch, num_heads, head_dim = out_BHD.shape
    _merge_kernel[(batch * num_heads,)](
        partial,
        lse,
        context_lens_B,
        context_lens_B if windows_B is None else windows_B,  # any pointer will do
        partial if sinks_H is None else sinks_H,
        out_BHD,
        partial if lse_BH is None else lse_BH,
        window,
        config.num_splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_two(head_dim)),
        BLOCK_S=max(_MERGE_LANES, next_power_of_two(config.num_splits)),
        CHUNK=_MERGE_CHUNK,
        TILE=config.tile,
        MIN_TILES=config.min_tiles,
        HAS_WINDOWS=windows_B is not None,
        HAS_SINKS=sinks_H is not None,
        RETURN_LSE=lse_BH is not None,
        LN_2=math.log(2),
        num_warps=4,
        **overlap(out_BHD),
    )
