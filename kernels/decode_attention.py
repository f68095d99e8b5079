"""Attention of one new token a sequence over its paged KV cache (decode).

Shapes: B sequences, H query heads, K key/value heads, G = H / K query heads that share one, D head
dimension, N columns of the block table, S splits; caches are [blocks, K, block tokens, D].

Reading the cache is the whole cost, so a program takes all query heads of one key/value head
(packed as the 16 rows that a tensor-core product has anyway) and reads each key and value once.
Few sequences cannot fill a GPU: their context is cut into splits, merged by a second small kernel.
The number of splits is fixed by the launch, as a CUDA graph needs; each program finds its share of
the context on the device.

Ranks that cut the heads unevenly hold parts of groups: the first query head here is head
`head_offset` of the first group, and the last group may be cut short as well. Ranks that cut the
context merge their results by the log-sum-exp of the scores, which is returned when asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from rankwright.kernels.backend import (
    DOT_PRECISION,
    Backend,
    ceil_div,
    jit,
    next_power_of_two,
    runs_triton,
    tl,
)
from rankwright.kernels.paged_cache import check_paged_cache, kv_heads_of_queries


def decode_attention_reference(
    q_BHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_BN: torch.Tensor,
    context_lens_B: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    windows_B: torch.Tensor | None = None,
    group: int | None = None,
    head_offset: int = 0,
    lse_BH: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(q k^T * scale) v over each sequence's own blocks; zeros where it has none."""
    _, num_kv_heads, block_tokens, _ = k_cache.shape
    heads_H = kv_heads_of_queries(q_BHD.shape[1], num_kv_heads, group, head_offset, q_BHD.device)
    out_BHD = torch.zeros_like(q_BHD)
    if lse_BH is not None:
        lse_BH.fill_(-math.inf)
    for b, context in enumerate(context_lens_B.tolist()):
        if context == 0:
            continue
        seen_here = window if windows_B is None else int(windows_B[b])
        first = 0 if seen_here is None else max(0, context - seen_here)
        first_block = first // block_tokens
        blocks = block_tables_BN[b, first_block : ceil_div(context, block_tokens)].long()
        seen = slice(first - first_block * block_tokens, context - first_block * block_tokens)
        k_HLD, v_HLD = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[heads_H][:, seen].float()
            for cache in (k_cache, v_cache)
        )
        scores_HL = (k_HLD @ q_BHD[b].float().unsqueeze(2)).squeeze(2) * scale
        out_BHD[b] = (scores_HL.softmax(-1).unsqueeze(1) @ v_HLD).squeeze(1)
        if lse_BH is not None:
            lse_BH[b] = scores_HL.logsumexp(-1)
    return out_BHD


@jit()
def _share(context, window, split, num_splits, TILE, MIN_TILES):
    """Return first and last + 1 tile of a split, and how many splits have any."""
    first_tile = tl.maximum(context - window, 0) // TILE
    num_tiles = (context + TILE - 1) // TILE - first_tile
    tiles_per_split = tl.maximum((num_tiles + num_splits - 1) // num_splits, MIN_TILES)
    start = first_tile + split * tiles_per_split
    stop = tl.minimum(start + tiles_per_split, first_tile + num_tiles)
    active = (num_tiles + tiles_per_split - 1) // tiles_per_split
    return start, stop, active


# The number of splits changes with the batch: compiled in, every new batch size would wait for the
# compiler.
@jit(do_not_specialize=("window", "num_splits", "table_stride"))
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    context_ptr,
    windows_ptr,
    out_ptr,
    merged_lse_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    window,
    num_splits,
    q_stride_b,
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
    HAS_WINDOWS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    LN_2: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    context = tl.load(context_ptr + batch)
    if HAS_WINDOWS:
        window = tl.load(windows_ptr + batch)
    start, stop, _ = _share(context, window, split, num_splits, TILE, MIN_TILES)
    if IS_SPLIT:  # noqa: SIM102  (known when compiled; the other when run)
        if start >= stop:
            return  # the merge reads active splits only

    g = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, TILE)
    head = kv_head * GROUP + g - HEAD_OFFSET
    here = (g < GROUP) & (head >= 0) & (head < NUM_HEADS)
    q_mask = here[:, None] & (d < HEAD_DIM)[None, :]
    q_at = q_ptr + batch * q_stride_b + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0)

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_at = k_ptr + kv_head * k_head_stride + d[:, None]
    v_at = v_ptr + kv_head * v_head_stride + d[None, :]
    # Block numbers are loaded one tile ahead: loaded in place, they would take up pipeline stages
    # that keys and values need. int64: a pool may hold more than 2**31 values.
    table_at = table_ptr + batch * table_stride
    next_block = tl.load(table_at + start * TILE // BLOCK_TOKENS, mask=start < stop, other=0)
    for tile in tl.range(start, stop):
        token = tile * TILE
        block = next_block.to(tl.int64)
        next_token = token + TILE
        more = tile + 1 < stop
        next_block = tl.load(table_at + next_token // BLOCK_TOKENS, mask=more, other=0)
        offset = token % BLOCK_TOKENS + n
        seen = (token + n < context) & (token + n >= context - window)
        k = tl.load(
            k_at + block * k_block_stride + offset[None, :] * k_token_stride,
            mask=seen[None, :] & (d < HEAD_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        scores = tl.where(seen[None, :], scores, -float("inf"))
        # Every tile of a share holds a seen token, so the new maximum is finite.
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(
            v_at + block * v_block_stride + offset[:, None] * v_token_stride,
            mask=seen[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new_highest

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    row = batch * NUM_HEADS + head
    if IS_SPLIT:
        part = row * num_splits + split
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + d[None, :], out, mask=q_mask)
        tl.store(lse_ptr + part, highest + tl.log2(total), mask=here)
    else:
        out_at = out_ptr + row[:, None] * HEAD_DIM + d[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=q_mask)
        if RETURN_LSE:
            # Of an empty context `highest` is -inf, and so is the sum.
            lse = (highest + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2
            tl.store(merged_lse_ptr + row, lse, mask=here)


@jit(do_not_specialize=("window", "num_splits"))
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    context_ptr,
    windows_ptr,
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
    RETURN_LSE: tl.constexpr,
    LN_2: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Write the mean of a row's splits, weighted with their log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    context = tl.load(context_ptr + row // NUM_HEADS)
    if HAS_WINDOWS:
        window = tl.load(windows_ptr + row // NUM_HEADS)
    _, _, active = _share(context, window, 0, num_splits, TILE, MIN_TILES)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * num_splits + s, mask=s < active, other=-float("inf"))
    # An empty context has no maximum; 0 in its place keeps inf - inf out.
    highest = tl.where(active > 0, tl.max(lse, axis=0), 0.0)
    total = tl.sum(tl.exp2(lse - highest), axis=0)
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


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is cut and compiled: `tile` tokens a loop iteration, `min_tiles` a split."""

    tile: int
    num_warps: int
    num_stages: int
    num_splits: int = 1
    min_tiles: int = 1


# (padded head dim, bytes a value), for sm_90. A program keeps (num_stages - 1) tiles of keys and
# values in shared memory: 64 KB at (128, 2), so that two or three fit in the 227 KB of an H100 or
# H200 (CUDA C programming guide, compute capability 9.0). A multiprocessor's share of their 3.0 and
# 4.3 TB/s is 23 and 33 KB in a microsecond, about the latency of a load from a busy memory.
_SHAPES: dict[tuple[int, int], DecodeConfig] = {
    (64, 2): DecodeConfig(tile=64, num_warps=4, num_stages=4),
    (128, 2): DecodeConfig(tile=64, num_warps=4, num_stages=3),
    (256, 2): DecodeConfig(tile=32, num_warps=4, num_stages=3),
    (64, 4): DecodeConfig(tile=64, num_warps=4, num_stages=3),
    (128, 4): DecodeConfig(tile=32, num_warps=4, num_stages=3),
    (256, 4): DecodeConfig(tile=16, num_warps=4, num_stages=3),
}
_PROGRAMS_PER_MULTIPROCESSOR = 2
# The merge reads S x D floats a head, one program a head: 64 KB at 128 splits of dimension 128.
_MAX_SPLITS = 128
# Lanes of the merge, a warp at least: three widths to compile, whatever the batch. It adds up
# `_MERGE_CHUNK` splits at a time, 8 KB of them at dimension 128.
_MERGE_LANES = 32
_MERGE_CHUNK = 16


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter runs one program at a time; 4 lets its tests meet splits
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_config(
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    max_blocks: int,
    block_tokens: int,
    dtype: torch.dtype,
    num_multiprocessors: int,
) -> DecodeConfig:
    """Return the launch configuration of a geometry: the same for every step of a CUDA graph.

    Splits fill the GPU: the fewest whose programs come in waves at least 95 % as full as the best
    number's. (FlashAttention-2's `num_splits_heuristic` asks for 85 %, which is 29 splits of a
    sequence with 8 key/value heads on an H100: a context of 8192 tokens then takes rounds of 5
    tiles, of 32 splits 4.)
    """
    shape = _SHAPES[max(64, next_power_of_two(head_dim)), dtype.itemsize]
    tile = min(shape.tile, block_tokens)
    programs = max(batch * num_kv_heads, 1)
    slots = num_multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR
    # Past four waves the last, partly filled one no longer matters.
    limit = 1 if programs >= 4 * slots else max(4, ceil_div(slots, programs))
    limit = max(1, min(limit, _MAX_SPLITS, ceil_div(max_blocks * block_tokens, tile)))
    waves = [programs * num_splits / slots for num_splits in range(1, limit + 1)]
    fullness = [wave / math.ceil(wave) for wave in waves]
    num_splits = 1 + next(i for i, full in enumerate(fullness) if full >= 0.95 * max(fullness))
    return replace(shape, tile=tile, num_splits=num_splits)


def decode_workspace_elements(batch: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Return the float32 values of scratch memory that `decode_attention` needs."""
    return 0 if num_splits == 1 else batch * num_heads * num_splits * (head_dim + 1)


def decode_attention(
    q_BHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_BN: torch.Tensor,
    context_lens_B: torch.Tensor,
    scale: float,
    window: int | None = None,
    num_splits: int | None = None,
    workspace: torch.Tensor | None = None,
    *,
    windows_B: torch.Tensor | None = None,
    group: int | None = None,
    head_offset: int = 0,
    lse_BH: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the attention of one query a sequence as [B, H, D]; zeros where the context is empty.

    Args:
        q_BHD: One query token a sequence; the first two axes may be strided.
        k_cache: Pool of key blocks; all axes but the last may be strided.
        v_cache: Pool of value blocks.
        block_tables_BN: int32, blocks of each sequence in order; entries past the context (or
            wholly before the window) are never read.
        context_lens_B: int32, tokens in the cache, the new one included; 0 marks a padding row.
        scale: Factor of the scores, usually `head_dim ** -0.5`.
        window: Attend to the last `window` tokens only; None: to all.
        num_splits: Parts that a context is cut into; None: `decode_config` chooses.
        workspace: float32 scratch of `decode_workspace_elements` values, or None to allocate.
        windows_B: int32, in place of `window` where each sequence has another; at least 1, but for
            empty contexts.
        group: Query heads that share a key/value head; None: `H / K`.
        head_offset: Place of the first query head in the group of the first key/value head.
        lse_BH: float32, filled with the log-sum-exp of the scaled scores; -inf where the context is
            empty.
        config: Overrides `decode_config` (for tuning).
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: When shapes disagree or the workspace is too small.
    """
    check_paged_cache("decode_attention", q_BHD, k_cache, v_cache, window, group, head_offset)
    if len(block_tables_BN) != len(q_BHD) or context_lens_B.shape != q_BHD.shape[:1]:
        raise ValueError(
            f"decode_attention: block tables {tuple(block_tables_BN.shape)} and context lengths "
            f"{tuple(context_lens_B.shape)}; expected one row for each of {len(q_BHD)} sequences"
        )
    if lse_BH is not None and (
        lse_BH.shape != q_BHD.shape[:2]
        or lse_BH.dtype != torch.float32
        or not lse_BH.is_contiguous()
    ):
        raise ValueError(
            f"decode_attention: log-sum-exp {tuple(lse_BH.shape)} of {lse_BH.dtype}; expected "
            f"contiguous float32 {tuple(q_BHD.shape[:2])}"
        )
    if not runs_triton(q_BHD, backend):
        return decode_attention_reference(
            q_BHD, k_cache, v_cache, block_tables_BN, context_lens_B, scale, window,
            windows_B=windows_B, group=group, head_offset=head_offset, lse_BH=lse_BH,
        )  # fmt: skip
    batch, num_heads, head_dim = q_BHD.shape
    _, num_kv_heads, block_tokens, _ = k_cache.shape
    out_BHD = torch.empty(q_BHD.shape, dtype=q_BHD.dtype, device=q_BHD.device)
    if batch == 0:
        return out_BHD
    if block_tables_BN.stride(1) != 1:
        raise ValueError("decode_attention: strides of the tables; expected a dense last axis")
    if q_BHD.stride(2) != 1:
        q_BHD = q_BHD.contiguous()
    if config is None:
        config = decode_config(
            batch,
            num_kv_heads,
            head_dim,
            block_tables_BN.shape[1],
            block_tokens,
            k_cache.dtype,
            _num_multiprocessors(q_BHD.device),
        )
    if num_splits is not None:
        config = replace(config, num_splits=num_splits)
    num_splits = config.num_splits
    needed = decode_workspace_elements(batch, num_heads, head_dim, num_splits)
    if workspace is None:
        workspace = torch.empty(max(needed, 1), dtype=torch.float32, device=q_BHD.device)
    elif workspace.numel() < needed or workspace.dtype != torch.float32:
        raise ValueError(
            f"decode_attention: workspace of {workspace.numel()} {workspace.dtype}; expected "
            f"{needed} float32 for {num_splits} splits"
        )
    lse = workspace[batch * num_heads * num_splits * head_dim :] if num_splits > 1 else workspace
    # Without a window every token lies in it: int32 positions never reach the limit.
    window = 2**31 - 1 if window is None else window
    block_d = max(16, next_power_of_two(head_dim))
    group = group or num_heads // num_kv_heads
    shared = {
        "TILE": config.tile,
        "MIN_TILES": config.min_tiles,
        "HAS_WINDOWS": windows_B is not None,
        "RETURN_LSE": lse_BH is not None,
        "LN_2": math.log(2),
    }
    windows_B = context_lens_B if windows_B is None else windows_B  # any pointer will do
    merged_lse = workspace if lse_BH is None else lse_BH
    _decode_kernel[(num_kv_heads, num_splits, batch)](
        q_BHD,
        k_cache,
        v_cache,
        block_tables_BN,
        context_lens_B,
        windows_B,
        out_BHD,
        merged_lse,
        workspace,
        lse,
        scale * math.log2(math.e),
        window,
        num_splits,
        *q_BHD.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_tables_BN.stride(0),
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_OFFSET=head_offset,
        HEAD_DIM=head_dim,
        BLOCK_M=max(16, next_power_of_two(group)),
        BLOCK_D=block_d,
        BLOCK_TOKENS=block_tokens,
        IS_SPLIT=num_splits > 1,
        PRECISION=DOT_PRECISION[q_BHD.dtype],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )
    if num_splits > 1:
        _merge_kernel[(batch * num_heads,)](
            workspace,
            lse,
            context_lens_B,
            windows_B,
            out_BHD,
            merged_lse,
            window,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_S=max(_MERGE_LANES, next_power_of_two(num_splits)),
            CHUNK=_MERGE_CHUNK,
            num_warps=4,
            **shared,
        )
    return out_BHD
