"""Attention over the paged KV cache in plain PyTorch: what kernels are held to, and the CPU path.

Shapes: B sequences, T query tokens of all of them, H query heads, K key/value heads, D head
dimension, N columns of the block table, Q query tokens and L context tokens of one sequence; caches
are [blocks, K, block tokens, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own abbreviation)

from rankwright.kernels.backend import ceil_div
from rankwright.kernels.paged_cache import kv_heads_of_queries


def softmax_with_sinks(scores: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
    """Return the softmax over the last axis, of which each head's sink takes a share.

    A sink is one more score that no value belongs to (gpt-oss, arXiv 2508.10925, section 2.2).

    Args:
        scores: float32 [H, ..., L].
        sinks_H: A score a head, not scaled; None: no sinks.
    """
    if sinks_H is None:
        return scores.softmax(-1)
    sinks = sinks_H.float().view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


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
    sinks_H: torch.Tensor | None = None,
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
        weights_HL = softmax_with_sinks(scores_HL, sinks_H)
        out_BHD[b] = (weights_HL.unsqueeze(1) @ v_HLD).squeeze(1)
        if lse_BH is not None:
            lse_BH[b] = scores_HL.logsumexp(-1)
    return out_BHD


def _seen(num_queries: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return bool [Q, L]: which context tokens each query token attends to."""
    position_Q1 = torch.arange(context - num_queries, context, device=device)[:, None]
    token_L = torch.arange(context, device=device)
    seen_QL = token_L <= position_Q1
    return seen_QL if window is None else seen_QL & (token_L > position_Q1 - window)


def _attend_explicitly(
    q_HQD: torch.Tensor,
    k_HLD: torch.Tensor,
    v_HLD: torch.Tensor,
    scale: float,
    window: int | None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    seen_QL = _seen(q_HQD.shape[1], k_HLD.shape[1], window, q_HQD.device)
    k_HLD, v_HLD = (x.repeat_interleave(len(q_HQD) // len(x), 0) for x in (k_HLD, v_HLD))
    scores_HQL = q_HQD.float() @ k_HLD.float().transpose(1, 2) * scale
    weights_HQL = softmax_with_sinks(scores_HQL.masked_fill(~seen_QL, -math.inf), sinks_H)
    return (weights_HQL @ v_HLD.float()).to(q_HQD.dtype)


def attend_sdpa(
    q_HQD: torch.Tensor, k_HLD: torch.Tensor, v_HLD: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Return the attention of one sequence's last Q tokens over its L, by PyTorch's own kernels."""
    num_queries, context = q_HQD.shape[1], k_HLD.shape[1]
    whole = window is None or window >= context
    mask: torch.Tensor | None = None
    if whole and num_queries == context:
        pass
    elif whole and q_HQD.is_cuda:
        # Here, not at the top: it imports torch._dynamo, seconds that a rank on CPUs never needs.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(num_queries, context)  # lets PyTorch choose FlashAttention
    else:
        mask = _seen(num_queries, context, window, q_HQD.device)
    return F.scaled_dot_product_attention(
        q_HQD[None],
        k_HLD[None],
        v_HLD[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=len(q_HQD) != len(k_HLD),
    )[0]


# cuDNN plans anew for each shape, which takes longer than the attention: few shapes.
_CUDNN_TOKENS = 512


def attend_cudnn(
    q_HQD: torch.Tensor, k_HLD: torch.Tensor, v_HLD: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Return the causal attention of a whole prompt by cuDNN's kernel; elsewhere by any of torch's.

    Padded behind, where no token of the prompt looks, to few lengths.

    Raises:
        ValueError: A window, or tokens before the queries.
        RuntimeError: cuDNN does not take heads of this size or dtype.
    """
    num_queries, context = q_HQD.shape[1], k_HLD.shape[1]
    if window is not None or num_queries != context:
        raise ValueError(
            f"prefill_attention: backend 'cudnn', {num_queries} queries of {context} tokens, "
            f"window {window}; expected whole prompts without a window"
        )
    from torch.nn.attention import SDPBackend, sdpa_kernel  # seconds, as in `attend_sdpa`

    padding = (0, 0, 0, -context % _CUDNN_TOKENS)
    q, k, v = (F.pad(x_HLD, padding)[None] for x_HLD in (q_HQD, k_HLD, v_HLD))
    backends = [SDPBackend.CUDNN_ATTENTION] if q_HQD.is_cuda else [SDPBackend.MATH]
    with sdpa_kernel(backends):
        out_HQD = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=len(q_HQD) != len(k_HLD)
        )[0]
    return out_HQD[:, :num_queries]


def one_by_one(
    attend: Callable[..., torch.Tensor],
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_BN: torch.Tensor,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    window: int | None,
    group: int | None,
    head_offset: int,
) -> torch.Tensor:
    """Return `attend` of every sequence, over keys and values copied out of its blocks."""
    num_kv_heads, block_tokens = k_cache.shape[1:3]
    heads: torch.Tensor | slice = slice(None)  # whole groups: `attend` shares their keys out
    if group is not None and q_THD.shape[1] != group * num_kv_heads:
        heads = kv_heads_of_queries(q_THD.shape[1], num_kv_heads, group, head_offset, q_THD.device)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    for b, context in enumerate(context_lens):
        start, stop = query_starts[b], query_starts[b + 1]
        if start == stop:
            continue
        blocks = block_tables_BN[b, : ceil_div(context, block_tokens)].long()
        k_HLD, v_HLD = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[heads, :context]
            for cache in (k_cache, v_cache)
        )
        out_HQD = attend(q_THD[start:stop].transpose(0, 1), k_HLD, v_HLD, scale, window)
        out_THD[start:stop] = out_HQD.transpose(0, 1)
    return out_THD


def prefill_attention_reference(
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
) -> torch.Tensor:
    """Return softmax(q k^T * scale, masked) v of each sequence, every score written out."""
    attend = partial(_attend_explicitly, sinks_H=sinks_H)
    return one_by_one(
        attend, q_THD, k_cache, v_cache, block_tables_BN,
        query_starts, context_lens, scale, window, group, head_offset,
    )  # fmt: skip
