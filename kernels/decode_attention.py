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
from dataclasses import replace

import torch

from rankwright.kernels.attention_plain import decode_attention_reference
from rankwright.kernels.attention_tiles import fold_in
from rankwright.kernels.backend import (
    DOT_PRECISION,
    Backend,
    jit,
    next_power_of_two,
    runs_triton,
    tl,
)
from rankwright.kernels.decode_config import (
    DecodeConfig,
    decode_config,
    decode_workspace_elements,
)
from rankwright.kernels.decode_merge import merge_splits, share
from rankwright.kernels.gpu_facts import gpu_facts
from rankwright.kernels.overlap import overlap, take_turn
from rankwright.kernels.paged_cache import check_paged_cache


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
    sinks_ptr,
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
    HAS_SINKS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    LN_2: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    take_turn(OVERLAP)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    context = tl.load(context_ptr + batch)
    if HAS_WINDOWS:
        window = tl.load(windows_ptr + batch)
    start, stop, _ = share(context, window, split, num_splits, TILE, MIN_TILES)
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
        v = tl.load(
            v_at + block * v_block_stride + offset[:, None] * v_token_stride,
            mask=seen[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        # Every tile of a share holds a seen token, so every row has a maximum.
        acc, total, highest = fold_in(scores, v, acc, total, highest, False, PRECISION)

    if HAS_SINKS and not IS_SPLIT:
        sink = tl.load(sinks_ptr + head, mask=here, other=0.0).to(tl.float32) / LN_2
        new_highest = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.exp2(sink - new_highest)
        acc = acc * shrink[:, None]
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
    sinks_H: torch.Tensor | None = None,
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
        sinks_H: One more score a head, not scaled, that no value belongs to (gpt-oss); not together
            with `lse_BH`, as parts of a context must share one sink.
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
    if sinks_H is not None and (lse_BH is not None or sinks_H.shape != q_BHD.shape[1:2]):
        raise ValueError(
            f"decode_attention: sinks {tuple(sinks_H.shape)} for {q_BHD.shape[1]} heads; expected "
            "one a head, and no log-sum-exp asked for"
        )
    if not runs_triton(q_BHD, backend):
        return decode_attention_reference(
            q_BHD, k_cache, v_cache, block_tables_BN, context_lens_B, scale, window,
            windows_B=windows_B, group=group, head_offset=head_offset, lse_BH=lse_BH,
            sinks_H=sinks_H,
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
            gpu_facts(q_BHD.device).num_multiprocessors,
            q_BHD.device,
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
    _decode_kernel[(num_kv_heads, num_splits, batch)](
        q_BHD,
        k_cache,
        v_cache,
        block_tables_BN,
        context_lens_B,
        context_lens_B if windows_B is None else windows_B,  # any pointer will do
        workspace if sinks_H is None else sinks_H,
        out_BHD,
        workspace if lse_BH is None else lse_BH,
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
        TILE=config.tile,
        MIN_TILES=config.min_tiles,
        HAS_WINDOWS=windows_B is not None,
        HAS_SINKS=sinks_H is not None,
        RETURN_LSE=lse_BH is not None,
        LN_2=math.log(2),
        **overlap(q_BHD),
    )
    if num_splits > 1:
        merge_splits(
            workspace,
            lse,
            context_lens_B,
            out_BHD,
            config,
            window=window,
            windows_B=windows_B,
            sinks_H=sinks_H,
            lse_BH=lse_BH,
        )
    return out_BHD
