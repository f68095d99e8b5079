"""The checks that every operation on the paged KV cache makes."""

from __future__ import annotations

import torch

from rankwright.kernels.limits import LEAST_BLOCK_TOKENS, blocks_are_legal


def kv_heads_of_queries(
    num_heads: int, num_kv_heads: int, group: int | None, head_offset: int, device: torch.device
) -> torch.Tensor:
    """Return int64 [query heads]: the key/value head that each reads.

    >>> kv_heads_of_queries(4, 2, 3, 1, torch.device("cpu")).tolist()
    [0, 0, 1, 1]
    """
    heads_H = torch.arange(num_heads, device=device) + head_offset
    return heads_H // (group or num_heads // num_kv_heads)


def check_paged_cache(
    op: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    window: int | None,
    group: int | None = None,
    head_offset: int = 0,
) -> None:
    """Raise ValueError unless queries, caches and window fit together.

    Args:
        op: Name for the message.
        q: Queries [rows, heads, head dim].
        k_cache: Pool of key blocks [blocks, kv heads, block tokens, head dim].
        v_cache: Pool of value blocks, alike.
        window: Tokens that a query attends to, or None.
        group: Query heads that share a key/value head; None: all have as many.
        head_offset: Place of the first query head in the first group.
    """
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; "
            "expected [rows, heads, head dim] and twice [blocks, kv heads, block tokens, head dim]"
        )
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_tokens, cache_dim = k_cache.shape
    if group is not None:
        last = (head_offset + num_heads - 1) // max(group, 1)
        if group < 1 or not 0 <= head_offset < group or last + 1 != num_kv_heads:
            raise ValueError(
                f"{op}: {num_heads} query heads from head {head_offset} of a group of {group} with "
                f"{num_kv_heads} key/value heads; expected one for each group that they are of"
            )
    if cache_dim != head_dim or (group is None and num_heads % num_kv_heads):
        raise ValueError(
            f"{op}: {num_heads} query heads of {head_dim} with {num_kv_heads} key/value heads of "
            f"{cache_dim}; expected equal dims and a multiple of the key/value heads"
        )
    if k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise ValueError(
            f"{op}: queries of {q.dtype}, caches of {k_cache.dtype} and {v_cache.dtype}; "
            "expected one dtype"
        )
    if not blocks_are_legal(block_tokens):
        raise ValueError(
            f"{op}: {block_tokens} tokens a block; expected a power of two >= {LEAST_BLOCK_TOKENS}"
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(f"{op}: strides of the caches; expected a dense last axis")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window={window}; expected at least 1, or None")
