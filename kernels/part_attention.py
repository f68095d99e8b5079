"""Causal attention of prompt tokens over one rank's part of their contexts.

Under context parallelism block `j` of a sequence is on rank `j % C`, so that the keys of a part lie
apart in the sequence. Each part is attended to alone, with the log-sum-exp of its scores;
`merge_attention` makes the whole of the parts.

Shapes: T query tokens of P pieces, one after the other, H query heads, K key/value heads, D head
dimension, E = D + 1, N columns of the block table, C parts; caches are [blocks, K, block tokens,
D].
A piece is neighbouring tokens of one sequence, inside one block of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rankwright.kernels.attention_tiles import attend_rows, program_rows
from rankwright.kernels.backend import Backend, ceil_div, jit, runs_triton, tl
from rankwright.kernels.paged_cache import check_paged_cache, kv_heads_of_queries
from rankwright.kernels.prefill_config import (
    check_starts,
    launch_constants,
    prefill_config,
    prefill_work,
)


def blocks_before(block: int, part: int, parts: int) -> int:
    """Return how many of a sequence's first `block` blocks are in `part`.

    >>> [blocks_before(5, part, 2) for part in (0, 1)]
    [3, 2]
    """
    return (block + parts - 1 - part) // parts


def part_attention_reference(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_PN: torch.Tensor,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    out_THE: torch.Tensor,
    *,
    part: int,
    parts: int,
    window: int | None = None,
    group: int | None = None,
    head_offset: int = 0,
) -> None:
    """Fill `out_THE`, every score written out; see `part_attention`."""
    block_tokens = k_cache.shape[2]
    heads_H = kv_heads_of_queries(
        q_THD.shape[1], k_cache.shape[1], group, head_offset, q_THD.device
    )
    out_THE[..., :-1] = 0.0
    out_THE[..., -1] = -math.inf
    offset_B = torch.arange(block_tokens, device=q_THD.device)
    for piece, context in enumerate(context_lens):
        start, stop = query_starts[piece], query_starts[piece + 1]
        count = blocks_before(ceil_div(context, block_tokens), part, parts)
        if start == stop or not count:
            continue
        blocks = block_tables_PN[piece, :count].long()
        token_L = (
            (torch.arange(count, device=q_THD.device) * parts + part)[:, None] * block_tokens
            + offset_B
        ).flatten()
        position_Q1 = torch.arange(context - (stop - start), context, device=q_THD.device)[:, None]
        seen_QL = token_L <= position_Q1
        if window is not None:
            seen_QL &= token_L > position_Q1 - window
        k_HLD, v_HLD = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[heads_H].float()
            for cache in (k_cache, v_cache)
        )
        scores_HQL = q_THD[start:stop].transpose(0, 1).float() @ k_HLD.transpose(1, 2) * scale
        scores_HQL = scores_HQL.masked_fill(~seen_QL, -math.inf)
        lse_HQ = scores_HQL.logsumexp(-1)
        # A query that sees nothing has no maximum; 0 in its place keeps inf - inf out.
        weights_HQL = (scores_HQL - lse_HQ.where(lse_HQ.isfinite(), 0.0).unsqueeze(-1)).exp()
        # What lies beyond the context may be anything, and 0 times that must be 0.
        v_HLD = v_HLD.where((token_L < context)[:, None], 0.0)
        out_THE[start:stop, :, :-1] = (weights_HQL @ v_HLD).transpose(0, 1)
        out_THE[start:stop, :, -1] = lse_HQ.T


@jit(do_not_specialize=("window", "table_stride", "part_index"))
def _part_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    work_ptr,
    found_ptr,
    scale_log2,
    window,
    part_index,
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
    PARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    LN_2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, piece, row, num_rows, first_position, q = program_rows(
        q_ptr, work_ptr, q_stride_t, q_stride_h, HEAD_DIM, BLOCK_M, BLOCK_D
    )
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    context = first_position + num_rows
    # The rows lie in one block: of earlier ones they see all, of their own what came before.
    block_of_rows = first_position // BLOCK_TOKENS
    unmasked = (block_of_rows + PARTS - 1 - part_index) // PARTS * (BLOCK_TOKENS // TILE)
    in_block = (context - block_of_rows * BLOCK_TOKENS + TILE - 1) // TILE
    last = unmasked + tl.where(block_of_rows % PARTS == part_index, in_block, 0)
    first = 0
    if HAS_WINDOW:
        oldest = tl.maximum(first_position - window + 1, 0) // BLOCK_TOKENS
        first = (oldest + PARTS - 1 - part_index) // PARTS * (BLOCK_TOKENS // TILE)
        unmasked = first
    kv_head = (head + HEAD_OFFSET) // GROUP
    acc, total, highest = attend_rows(
        q, first, unmasked, last,
        k_ptr + kv_head * k_head_stride, v_ptr + kv_head * v_head_stride,
        table_ptr + piece * table_stride,
        k_block_stride, k_token_stride, v_block_stride, v_token_stride,
        scale_log2, first_position + m, window, context, part_index,
        PARTS, HAS_WINDOW, HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_TOKENS, TILE, PRECISION,
    )  # fmt: skip
    row_mask = (m < num_rows)[:, None] & (d < HEAD_DIM)[None, :]
    total = tl.where(total > 0, total, 1.0)
    found_at = found_ptr + (row * NUM_HEADS + head) * (HEAD_DIM + 1)
    tl.store(found_at[:, None] + d[None, :], acc / total[:, None], mask=row_mask)
    # Of rows that see nothing here `highest` is -inf, and so is the sum.
    tl.store(found_at + HEAD_DIM, (highest + tl.log2(total)) * LN_2, mask=m < num_rows)


def part_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_PN: torch.Tensor,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    out_THE: torch.Tensor,
    *,
    part: int,
    parts: int,
    window: int | None = None,
    group: int | None = None,
    head_offset: int = 0,
    backend: Backend = "auto",
) -> None:
    """Fill `out_THE` with what each query finds in one part, as `merge_attention` takes it.

    Args:
        q_THD: Query tokens of all pieces, concatenated; the first two axes may be strided.
        k_cache: Pool of key blocks of this part.
        v_cache: Pool of value blocks.
        block_tables_PN: int32, the part's blocks of each piece's sequence in order; entries past
            the context are never read.
        query_starts: P + 1 rising numbers: a piece has the tokens from one to the next.
        context_lens: Tokens of the whole sequence up to the end of each piece.
        scale: Factor of the scores.
        out_THE: Contiguous float32, filled: D means, then the log-sum-exp of the scaled scores; 0
            and -inf where a query sees nothing of the part.
        part: Which part the pools are.
        parts: C.
        window: Each token attends to the last `window` tokens up to itself; None: to all.
        group: Query heads that share a key/value head; None: `H / K`.
        head_offset: Place of the first query head in the group of the first key/value head.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: Shapes or lengths disagree, or a piece is in two blocks.
    """
    check_paged_cache("part_attention", q_THD, k_cache, v_cache, window, group, head_offset)
    num_tokens, num_heads, head_dim = q_THD.shape
    block_tokens = k_cache.shape[2]
    if (
        out_THE.shape != (num_tokens, num_heads, head_dim + 1)
        or out_THE.dtype != torch.float32
        or not out_THE.is_contiguous()
    ):
        raise ValueError(
            f"part_attention: result {tuple(out_THE.shape)} of {out_THE.dtype}; expected "
            f"contiguous float32 {(num_tokens, num_heads, head_dim + 1)}"
        )
    if not 0 <= part < parts:
        raise ValueError(f"part_attention: part {part} of {parts}")
    _check_pieces(query_starts, context_lens, len(block_tables_PN), num_tokens, block_tokens)
    if not runs_triton(q_THD, backend):
        part_attention_reference(
            q_THD, k_cache, v_cache, block_tables_PN, query_starts, context_lens, scale, out_THE,
            part=part, parts=parts, window=window, group=group, head_offset=head_offset,
        )  # fmt: skip
        return
    if not num_tokens:
        return
    if block_tables_PN.stride(1) != 1:
        raise ValueError("part_attention: strides of the tables; expected a dense last axis")
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    longest = max(query_starts[i + 1] - query_starts[i] for i in range(len(context_lens)))
    config = prefill_config(longest, head_dim, block_tokens, q_THD.dtype, q_THD.device)
    work = prefill_work(tuple(query_starts), tuple(context_lens), config.block_m, q_THD.device)
    _part_kernel[(num_heads, len(work))](
        q_THD,
        k_cache,
        v_cache,
        block_tables_PN,
        work,
        out_THE,
        scale * math.log2(math.e),
        2**31 - 1 if window is None else window,  # positions never get this far apart
        part,
        *q_THD.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_tables_PN.stride(0),
        PARTS=parts,
        **launch_constants(q_THD, k_cache, window, group, head_offset, config),
    )


def _check_pieces(
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    num_tables: int,
    num_tokens: int,
    block_tokens: int,
) -> None:
    check_starts("part_attention", num_tokens, num_tables, query_starts, context_lens)
    for piece, context in enumerate(context_lens):
        rows = query_starts[piece + 1] - query_starts[piece]
        in_block = (context - 1) % block_tokens + 1
        if not 0 <= rows <= in_block:
            raise ValueError(
                f"part_attention: piece {piece} has {rows} tokens up to the {context}th of its "
                f"sequence; expected tokens of one block of {block_tokens}"
            )
