"""Latent attention (MLA): the rotary step with its cache write, and decode over latents.

Shapes: T tokens, B sequences, H query heads, L width of the latent, R rotary width, N columns of
the block table, S splits; the cache is [blocks, 1, block tokens, L + R]: a token's normed latent,
then its rotated key, both shared by all heads.

A head's keys are `W_UK latent`, so that its query, taken through W_UK^T once, meets the latents as
they are ("absorbed", arXiv 2405.04434, section 2.1.2); the values are the latents again. Decode is
then attention of all heads over one key/value head, whose values are the first L of its L + R key
columns: a tile of latents is read once for both.
"""

from __future__ import annotations

import math

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
from rankwright.kernels.decode_config import (
    DecodeConfig,
    decode_workspace_elements,
    mla_decode_config,
)
from rankwright.kernels.decode_merge import merge_splits, share
from rankwright.kernels.gpu_facts import gpu_facts


def mla_decode_reference(
    q_BHC: torch.Tensor,
    cache: torch.Tensor,
    block_tables_BN: torch.Tensor,
    context_lens_B: torch.Tensor,
    scale: float,
    latent: int,
    lse_BH: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(q c^T * scale) c[:, :L] of each sequence; zeros where it has no tokens."""
    block_tokens = cache.shape[2]
    out_BHL = torch.zeros(*q_BHC.shape[:2], latent, dtype=q_BHC.dtype, device=q_BHC.device)
    if lse_BH is not None:
        lse_BH.fill_(-math.inf)
    for b, context in enumerate(context_lens_B.tolist()):
        if context == 0:
            continue
        blocks = block_tables_BN[b, : ceil_div(context, block_tokens)].long()
        c_KC = cache[blocks, 0].flatten(0, 1)[:context].float()
        scores_HK = q_BHC[b].float() @ c_KC.T * scale
        out_BHL[b] = scores_HK.softmax(-1) @ c_KC[:, :latent]
        if lse_BH is not None:
            lse_BH[b] = scores_HK.logsumexp(-1)
    return out_BHL


@jit(do_not_specialize=("num_splits", "table_stride"))
def _mla_decode_kernel(
    q_ptr,
    cache_ptr,
    table_ptr,
    context_ptr,
    out_ptr,
    merged_lse_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    num_splits,
    block_stride,
    token_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_TILES: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    LN_2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Blocks of heads run fastest, so that they read their sequence's latents from L2.
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    context = tl.load(context_ptr + batch)
    start, stop, _ = share(context, context, split, num_splits, TILE, MIN_TILES)
    if IS_SPLIT:  # noqa: SIM102  (known when compiled; the other when run)
        if start >= stop:
            return  # the merge reads active splits only

    c = tl.arange(0, BLOCK_L)
    r = tl.arange(0, BLOCK_R)
    n = tl.arange(0, TILE)
    here = head < NUM_HEADS
    row = batch * NUM_HEADS + head
    q_at = q_ptr + row[:, None] * (LATENT + ROTARY)
    q = tl.load(q_at + c[None, :], mask=here[:, None] & (c < LATENT)[None, :], other=0.0)
    q_rotary = tl.load(
        q_at + LATENT + r[None, :], mask=here[:, None] & (r < ROTARY)[None, :], other=0.0
    )
    highest = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
    table_at = table_ptr + batch * table_stride
    next_block = tl.load(table_at + start * TILE // BLOCK_TOKENS, mask=start < stop, other=0)
    for tile in tl.range(start, stop):
        token = tile * TILE
        block = next_block.to(tl.int64)
        more = tile + 1 < stop
        next_block = tl.load(table_at + (token + TILE) // BLOCK_TOKENS, mask=more, other=0)
        seen = token + n < context
        at = cache_ptr + block * block_stride + (token % BLOCK_TOKENS + n)[:, None] * token_stride
        latents = tl.load(at + c[None, :], mask=seen[:, None] & (c < LATENT)[None, :], other=0.0)
        rotary = tl.load(
            at + LATENT + r[None, :], mask=seen[:, None] & (r < ROTARY)[None, :], other=0.0
        )
        scores = tl.dot(q, tl.trans(latents), input_precision=PRECISION)
        scores = tl.dot(q_rotary, tl.trans(rotary), scores, input_precision=PRECISION) * scale_log2
        scores = tl.where(seen[None, :], scores, -float("inf"))
        # Every tile of a share holds a seen token, so the new maximum is finite.
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(latents.dtype), latents, acc, input_precision=PRECISION)
        highest = new_highest

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    mask = here[:, None] & (c < LATENT)[None, :]
    if IS_SPLIT:
        part = row * num_splits + split
        tl.store(partial_ptr + part[:, None] * LATENT + c[None, :], out, mask=mask)
        tl.store(lse_ptr + part, highest + tl.log2(total), mask=here)
    else:
        out_at = out_ptr + row[:, None] * LATENT + c[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)
        if RETURN_LSE:
            # Of an empty context `highest` is -inf, and so is the sum.
            lse = (highest + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2
            tl.store(merged_lse_ptr + row, lse, mask=here)


def mla_decode_attention(
    q_BHC: torch.Tensor,
    cache: torch.Tensor,
    block_tables_BN: torch.Tensor,
    context_lens_B: torch.Tensor,
    scale: float,
    latent: int,
    *,
    lse_BH: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return [B, H, L]: each head's weighted mean of the latents; zeros where the context is empty.

    Args:
        q_BHC: Contiguous queries, L absorbed columns and then R rotated ones.
        cache: [blocks, 1, block tokens, L + R].
        block_tables_BN: int32, blocks of each sequence in order.
        context_lens_B: int32, tokens in the cache, the new one included; 0 marks a padding row.
        scale: Factor of the scores.
        latent: L.
        lse_BH: Contiguous float32, filled with the log-sum-exp of the scaled scores; -inf where the
            context is empty.
        config: Overrides `mla_decode_config` (for tuning).
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: Shapes disagree.
    """
    batch, num_heads, columns = q_BHC.shape
    if cache.shape[1] != 1 or cache.shape[3] != columns or not 0 < latent < columns:
        raise ValueError(
            f"mla_decode_attention: queries {tuple(q_BHC.shape)}, cache {tuple(cache.shape)}, "
            f"latent {latent}; expected [B, H, L + R] and [blocks, 1, block tokens, L + R]"
        )
    if lse_BH is not None and (
        lse_BH.shape != q_BHC.shape[:2]
        or lse_BH.dtype != torch.float32
        or not lse_BH.is_contiguous()
    ):
        raise ValueError(
            f"mla_decode_attention: log-sum-exp {tuple(lse_BH.shape)} of {lse_BH.dtype}; expected "
            f"contiguous float32 {tuple(q_BHC.shape[:2])}"
        )
    if not runs_triton(q_BHC, backend):
        return mla_decode_reference(
            q_BHC, cache, block_tables_BN, context_lens_B, scale, latent, lse_BH
        )
    out_BHL = torch.empty((batch, num_heads, latent), dtype=q_BHC.dtype, device=q_BHC.device)
    if batch == 0:
        return out_BHL
    block_tokens = cache.shape[2]
    block_h = min(max(16, next_power_of_two(num_heads)), 32)
    head_blocks = ceil_div(num_heads, block_h)
    if config is None:
        config = mla_decode_config(
            batch * head_blocks,
            block_tables_BN.shape[1],
            block_tokens,
            cache.dtype,
            gpu_facts(q_BHC.device).num_multiprocessors,
        )
    needed = decode_workspace_elements(batch, num_heads, latent, config.num_splits)
    workspace = torch.empty(max(needed, 1), dtype=torch.float32, device=q_BHC.device)
    lse = workspace[batch * num_heads * config.num_splits * latent :] if needed else workspace
    _mla_decode_kernel[(head_blocks, config.num_splits, batch)](
        q_BHC.contiguous(),
        cache,
        block_tables_BN,
        context_lens_B,
        out_BHL,
        workspace if lse_BH is None else lse_BH,  # any pointer will do
        workspace,
        lse,
        scale * math.log2(math.e),
        config.num_splits,
        cache.stride(0),
        cache.stride(2),
        block_tables_BN.stride(0),
        NUM_HEADS=num_heads,
        LATENT=latent,
        ROTARY=columns - latent,
        BLOCK_H=block_h,
        BLOCK_L=max(16, next_power_of_two(latent)),
        BLOCK_R=max(16, next_power_of_two(columns - latent)),
        BLOCK_TOKENS=block_tokens,
        TILE=config.tile,
        IS_SPLIT=config.num_splits > 1,
        MIN_TILES=config.min_tiles,
        RETURN_LSE=lse_BH is not None,
        LN_2=math.log(2),
        PRECISION=DOT_PRECISION[q_BHC.dtype],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if config.num_splits > 1:
        merge_splits(workspace, lse, context_lens_B, out_BHL, config, lse_BH=lse_BH)
    return out_BHL
