"""The tensors of the paged KV cache: one pool of blocks for keys and one for values a layer.

Shape letters: N blocks, K key-value heads of this rank, B tokens of a block, D head dimension.
Heads stand outside tokens ([N, K, B, D]), so that the tile an attention kernel reads, one head of
one block, is contiguous.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each [N, K, B, D]."""

    keys: torch.Tensor
    values: torch.Tensor


def allocate(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerCache]:
    """Return a zeroed cache for each layer.

    Zeroed, not empty: a masked probability of 0 times a stray NaN would still be NaN.
    """
    shape = (num_blocks, num_kv_heads, block_tokens, head_dim)
    return [
        LayerCache(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        for _ in range(num_layers)
    ]
