"""Causal attention of several new tokens a sequence over its paged KV cache (prefill chunks).

Shapes: T query tokens of all sequences, one after the other, B sequences, H query heads, K
key/value heads, G = H / K, D head dimension, N columns of the block table, Q query tokens and L
context tokens of one sequence; caches are [blocks, K, block tokens, D].

The last query token of a sequence is the last token of its context (lower-right alignment), so a
chunk sees all that came before it and itself. Ranks that cut the heads unevenly hold parts of
groups: the first query head here is head `head_offset` of the first group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch

from rankwright.kernels.attention_plain import (
    attend_cudnn,
    attend_sdpa,
    one_by_one,
    prefill_attention_reference,
)
from rankwright.kernels.backend import DOT_PRECISION, jit, next_power_of_two, runs_triton, tl
from rankwright.kernels.limits import padded_head_dim
from rankwright.kernels.paged_cache import check_paged_cache
from rankwright.kernels.tuned import tuned_rows

PrefillBackend = Literal["auto", "triton", "reference", "sdpa", "cudnn"]


@jit()
def attend_tiles(
    q,
    acc,
    total,
    highest,
    start,
    stop,
    k_at,
    v_at,
    table_at,
    k_block_stride,
    k_token_stride,
    v_block_stride,
    v_token_stride,
    scale_log2,
    position,
    window,
    context,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the running sum, total and maximum after the tiles `start` to `stop`."""
    n = tl.arange(0, TILE)
    d = tl.arange(0, BLOCK_D)
    # Block numbers are loaded one tile ahead: loaded in place, they would take up pipeline stages
    # that keys and values need. int64: a pool may hold more than 2**31 values.
    next_block = tl.load(table_at + start * TILE // BLOCK_TOKENS, mask=start < stop, other=0)
    for tile in tl.range(start, stop):  # pyright: ignore[reportGeneralTypeIssues]
        token = tile * TILE
        block = next_block.to(tl.int64)
        next_token = token + TILE
        more = tile + 1 < stop
        next_block = tl.load(table_at + next_token // BLOCK_TOKENS, mask=more, other=0)
        offset = token % BLOCK_TOKENS + n
        k_tile = k_at + block * k_block_stride + offset[None, :] * k_token_stride + d[:, None]
        v_tile = v_at + block * v_block_stride + offset[:, None] * v_token_stride + d[None, :]
        if MASKED:
            inside = token + n < context
            k = tl.load(k_tile, mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(v_tile, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM != BLOCK_D:
            k = tl.load(k_tile, mask=(d < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(v_tile, mask=(d < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        if MASKED:
            ahead = position[:, None] - (token + n)[None, :]
            scores = tl.where((ahead >= 0) & (ahead < window), scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A row whose window starts past this tile has seen nothing: keep inf - inf out of it.
        shift = tl.where(new_highest == -float("inf"), 0.0, new_highest) if MASKED else new_highest
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new_highest
    return acc, total, highest


# Tables of prompts stand after those of any number of sequences that decode.
@jit(do_not_specialize=("window", "table_stride"), any_alignment=("table_ptr",))
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    work_ptr,
    sinks_ptr,
    out_ptr,
    scale_log2,
    window,
    q_stride_t,
    q_stride_h,
    k_block_stride,
    k_head_stride,
    k_token_stride,
    v_block_stride,
    v_head_stride,
    v_token_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    LN_2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads run fastest, so that the heads of a group read their keys and values from L2.
    head = tl.program_id(0)
    work = work_ptr + tl.program_id(1) * 4
    sequence = tl.load(work).to(tl.int64)
    first_row = tl.load(work + 1).to(tl.int64)
    num_rows = tl.load(work + 2)
    first_position = tl.load(work + 3)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row_mask = (m < num_rows)[:, None] & (d < HEAD_DIM)[None, :]
    row = first_row + m
    q_at = q_ptr + row[:, None] * q_stride_t + head * q_stride_h + d[None, :]
    q = tl.load(q_at, mask=row_mask, other=0.0)

    position = first_position + m
    context = first_position + num_rows
    last = (context + TILE - 1) // TILE
    first = 0
    # Tiles that every row sees whole need no mask; with a window there may be none.
    unmasked = (first_position + 1) // TILE
    if HAS_WINDOW:
        first = tl.maximum(first_position - window + 1, 0) // TILE
        unmasked = first
    kv_head = (head + HEAD_OFFSET) // GROUP
    k_at = k_ptr + kv_head * k_head_stride
    v_at = v_ptr + kv_head * v_head_stride
    table_at = table_ptr + sequence * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if not HAS_WINDOW:
        acc, total, highest = attend_tiles(
            q, acc, total, highest, first, unmasked, k_at, v_at, table_at,
            k_block_stride, k_token_stride, v_block_stride, v_token_stride,
            scale_log2, position, window, context,
            HEAD_DIM, BLOCK_D, BLOCK_TOKENS, TILE, False, PRECISION,
        )  # fmt: skip
    acc, total, highest = attend_tiles(
        q, acc, total, highest, unmasked, last, k_at, v_at, table_at,
        k_block_stride, k_token_stride, v_block_stride, v_token_stride,
        scale_log2, position, window, context,
        HEAD_DIM, BLOCK_D, BLOCK_TOKENS, TILE, True, PRECISION,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) / LN_2
        new_highest = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.exp2(sink - new_highest)
        acc = acc * shrink[:, None]
    out_at = out_ptr + (row[:, None] * NUM_HEADS + head) * HEAD_DIM + d[None, :]
    # Rows past the last may lie beyond every window; nothing of them is stored.
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=row_mask)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel is cut and compiled: `block_m` query tokens and `tile` context tokens."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


# (padded head dim, bytes a value), for sm_90: 128 rows are two warpgroups of 64, the height of
# Hopper's matrix instruction. More stages or larger tiles than these spill registers (ptxas) or no
# longer fit beside the queries in 227 KB of shared memory. float32 is for checks, not for speed.
_SHAPES: dict[tuple[int, int], PrefillConfig] = {
    (64, 2): PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3),
    (128, 2): PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3),
    (256, 2): PrefillConfig(block_m=128, tile=32, num_warps=8, num_stages=2),
    (64, 4): PrefillConfig(block_m=32, tile=32, num_warps=4, num_stages=2),
    (128, 4): PrefillConfig(block_m=16, tile=16, num_warps=4, num_stages=2),
    (256, 4): PrefillConfig(block_m=16, tile=16, num_warps=8, num_stages=2),
}


def prefill_config(
    max_queries: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> PrefillConfig:
    """Return the launch configuration for chunks of up to `max_queries` tokens.

    What was measured on `device` (`tuned.py`) comes before the table above.
    """
    key = padded_head_dim(head_dim), dtype.itemsize
    config = _SHAPES[key]
    if device is not None and (row := tuned_rows(device, "prefill").get(key)):
        config = PrefillConfig(**row)
    config = replace(config, tile=min(config.tile, block_tokens))
    block_m = min(config.block_m, max(16, next_power_of_two(max_queries)))
    if block_m < config.block_m:
        config = replace(config, block_m=block_m, num_warps=4)
    return config


@lru_cache(maxsize=8)
def prefill_work(
    query_starts: tuple[int, ...], context_lens: tuple[int, ...], block_m: int, device: torch.device
) -> torch.Tensor:
    """Return int32 [programs, 4]: sequence, first row, rows, position of the first row.

    Cached because every layer of a step asks for the same. Longest first, so that the last
    programs to start are short.
    """
    rows: list[tuple[int, int, int, int]] = []
    for b, context in enumerate(context_lens):
        start, stop = query_starts[b], query_starts[b + 1]
        for row in range(start, stop, block_m):
            rows.append((b, row, min(block_m, stop - row), context - stop + row))
    rows.sort(key=lambda r: -(r[2] + r[3]))
    table = torch.tensor(rows, dtype=torch.int32)
    if device.type != "cuda":
        return table
    # Pinned, so that the copy does not wait for the work already queued.
    return table.pin_memory().to(device, non_blocking=True)


def _check_lengths(
    num_tokens: int, num_tables: int, query_starts: Sequence[int], context_lens: Sequence[int]
) -> None:
    batch = len(context_lens)
    if len(query_starts) != batch + 1 or num_tables != batch:
        raise ValueError(
            f"prefill_attention: {len(query_starts)} query starts and {num_tables} block tables; "
            f"expected {batch + 1} and {batch} for {batch} context lengths"
        )
    lengths = [query_starts[b + 1] - query_starts[b] for b in range(batch)]
    if query_starts[0] != 0 or query_starts[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"prefill_attention: query starts {list(query_starts)}; expected to rise from 0 "
            f"to {num_tokens}"
        )
    if any(lengths[b] > context_lens[b] for b in range(batch)):
        raise ValueError(
            f"prefill_attention: contexts {list(context_lens)} are shorter than chunks {lengths}"
        )


def whole_prompts_backend(
    q_THD: torch.Tensor, query_starts: Sequence[int], context_lens: Sequence[int]
) -> PrefillBackend:
    """Return what is fastest for these prompts, where it was measured; Triton else."""
    key = padded_head_dim(q_THD.shape[2]), q_THD.dtype.itemsize
    row = tuned_rows(q_THD.device, "whole_prompts").get(key)
    if row is None or min(context_lens, default=0) < row["from_tokens"]:
        return "auto"
    lengths = [stop - start for start, stop in pairwise(query_starts)]
    if lengths != list(context_lens):
        return "auto"
    return "cudnn" if row["is_cudnn"] else "sdpa"


def prefill_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_BN: torch.Tensor,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    window: int | None = None,
    *,
    group: int | None = None,
    head_offset: int = 0,
    sinks_H: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
    backend: PrefillBackend = "auto",
) -> torch.Tensor:
    """Return the causal attention of each sequence's new tokens as [T, H, D].

    Args:
        q_THD: Query tokens of all sequences, concatenated; the first two axes may be strided.
        k_cache: Pool of key blocks, the new tokens already in it.
        v_cache: Pool of value blocks.
        block_tables_BN: int32, blocks of each sequence in order; entries past the context are
            never read.
        query_starts: B + 1 rising numbers: sequence b has the tokens from the b-th to the next.
        context_lens: Tokens of each sequence in the cache, this chunk included.
        scale: Factor of the scores, usually `head_dim ** -0.5`.
        window: Each token attends to the last `window` tokens up to itself; None: to all.
        group: Query heads that share a key/value head; None: `H / K`.
        head_offset: Place of the first query head in the group of the first key/value head.
        sinks_H: One more score a head, not scaled, that no value belongs to (gpt-oss).
        config: Overrides `prefill_config` (for tuning).
        backend: "sdpa" and "cudnn" copy each sequence's keys and values out of the cache and call
            PyTorch, "cudnn" only its kernel of that name, for whole prompts; "auto" runs "sdpa" on
            the CPU, and on a GPU Triton, or for long whole prompts what was measured to be faster
            there (`tuned.py`); else see `runs_triton`.

    Raises:
        ValueError: When shapes or lengths disagree.
    """
    check_paged_cache("prefill_attention", q_THD, k_cache, v_cache, window, group, head_offset)
    _check_lengths(len(q_THD), len(block_tables_BN), query_starts, context_lens)
    if sinks_H is not None and sinks_H.shape != q_THD.shape[1:2]:
        raise ValueError(
            f"prefill_attention: sinks {tuple(sinks_H.shape)}; expected one for each of "
            f"{q_THD.shape[1]} heads"
        )
    if backend == "auto" and not runs_triton(q_THD, backend):
        # PyTorch's own attention knows no sinks.
        backend = "sdpa" if sinks_H is None else "reference"
    elif backend == "auto" and config is None and sinks_H is None and window is None:
        backend = whole_prompts_backend(q_THD, query_starts, context_lens)
    if backend == "sdpa" or backend == "cudnn":
        if sinks_H is not None:
            raise ValueError(f"prefill_attention: backend '{backend}' has no sinks; use 'triton'")
        attend = attend_cudnn if backend == "cudnn" else attend_sdpa
        return one_by_one(
            attend, q_THD, k_cache, v_cache, block_tables_BN,
            query_starts, context_lens, scale, window, group, head_offset,
        )  # fmt: skip
    if not runs_triton(q_THD, backend):
        return prefill_attention_reference(
            q_THD, k_cache, v_cache, block_tables_BN, query_starts, context_lens, scale, window,
            group=group, head_offset=head_offset, sinks_H=sinks_H,
        )  # fmt: skip
    num_tokens, num_heads, head_dim = q_THD.shape
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if num_tokens == 0:
        return out_THD
    if block_tables_BN.stride(1) != 1:
        raise ValueError("prefill_attention: strides of the tables; expected a dense last axis")
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    block_tokens = k_cache.shape[2]
    if config is None:
        longest = max(query_starts[b + 1] - query_starts[b] for b in range(len(context_lens)))
        config = prefill_config(longest, head_dim, block_tokens, q_THD.dtype, q_THD.device)
    work = prefill_work(tuple(query_starts), tuple(context_lens), config.block_m, q_THD.device)
    _prefill_kernel[(num_heads, len(work))](
        q_THD,
        k_cache,
        v_cache,
        block_tables_BN,
        work,
        work if sinks_H is None else sinks_H,
        out_THD,
        scale * math.log2(math.e),
        2**31 - 1 if window is None else window,  # positions never get this far apart
        *q_THD.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_tables_BN.stride(0),
        NUM_HEADS=num_heads,
        GROUP=group or num_heads // k_cache.shape[1],
        HEAD_OFFSET=head_offset,
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_D=max(16, next_power_of_two(head_dim)),
        BLOCK_TOKENS=block_tokens,
        TILE=config.tile,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks_H is not None,
        LN_2=math.log(2),
        PRECISION=DOT_PRECISION[q_THD.dtype],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out_THD
