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
from itertools import pairwise
from typing import Literal

import torch

from rankwright.kernels.attention_plain import (
    attend_cudnn,
    attend_sdpa,
    one_by_one,
    prefill_attention_reference,
)
from rankwright.kernels.attention_tiles import attend_rows, program_rows
from rankwright.kernels.backend import jit, runs_triton, tl
from rankwright.kernels.limits import padded_head_dim
from rankwright.kernels.paged_cache import check_paged_cache
from rankwright.kernels.prefill_config import (
    PrefillConfig,
    check_starts,
    launch_constants,
    prefill_config,
    prefill_work,
)
from rankwright.kernels.tuned import tuned_rows

PrefillBackend = Literal["auto", "triton", "reference", "sdpa", "cudnn"]


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
    head, sequence, row, num_rows, first_position, q = program_rows(
        q_ptr, work_ptr, q_stride_t, q_stride_h, HEAD_DIM, BLOCK_M, BLOCK_D
    )
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    context = first_position + num_rows
    last = (context + TILE - 1) // TILE
    first = 0
    # Tiles that every row sees whole need no mask; with a window there may be none.
    unmasked = (first_position + 1) // TILE
    if HAS_WINDOW:
        first = tl.maximum(first_position - window + 1, 0) // TILE
        unmasked = first
    kv_head = (head + HEAD_OFFSET) // GROUP
    acc, total, highest = attend_rows(
        q, first, unmasked, last,
        k_ptr + kv_head * k_head_stride, v_ptr + kv_head * v_head_stride,
        table_ptr + sequence * table_stride,
        k_block_stride, k_token_stride, v_block_stride, v_token_stride,
        scale_log2, first_position + m, window, context, 0,
        1, HAS_WINDOW, HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_TOKENS, TILE, PRECISION,
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
    row_mask = (m < num_rows)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=row_mask)


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
    tables = len(block_tables_BN)
    check_starts("prefill_attention", len(q_THD), tables, query_starts, context_lens)
    lengths = [stop - start for start, stop in pairwise(query_starts)]
    if any(length > context for length, context in zip(lengths, context_lens, strict=True)):
        raise ValueError(
            f"prefill_attention: contexts {list(context_lens)} are shorter than chunks {lengths}"
        )
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
    num_tokens, num_heads, _ = q_THD.shape
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if num_tokens == 0:
        return out_THD
    if block_tables_BN.stride(1) != 1:
        raise ValueError("prefill_attention: strides of the tables; expected a dense last axis")
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    if config is None:
        config = prefill_config(
            max(lengths), q_THD.shape[2], k_cache.shape[2], q_THD.dtype, q_THD.device
        )
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
        HAS_SINKS=sinks_H is not None,
        **launch_constants(q_THD, k_cache, window, group, head_offset, config),
    )
    return out_THD
