"""The tensors of the paged KV cache: one pool of blocks for keys and one for values a layer.

Shape letters: N blocks, K key-value heads of this rank, B tokens of a block, D head dimension.
Heads stand outside tokens ([N, K, B, D]), so that the tile an attention kernel reads, one head of
one block, is contiguous.
"""

from dataclasses import dataclass

import torch

from rankwright.cost_model.model_spec import Attention


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each [N, K, B, D].

    Of latent attention, `keys` are the latents with their rotary keys, and `values` a view of the
    latents in them.
    """

    keys: torch.Tensor
    values: torch.Tensor


def cache_head_dim(attention: Attention) -> int:
    """Return the values that a key of the cache has."""
    if attention.kv_lora_rank is None:
        return attention.head_dim
    return attention.kv_lora_rank + (attention.rope_head_dim or 0)


def allocate(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    latent: int | None = None,
) -> list[LayerCache]:
    """Return a zeroed cache for each layer; with `latent`, of latent attention of that width.

    Zeroed, not empty: a masked probability of 0 times a stray NaN would still be NaN.
    """
    shape = (num_blocks, num_kv_heads, block_tokens, head_dim)
    if latent is not None:
        pools = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        return [LayerCache(pool, pool[..., :latent]) for pool in pools]
    return [
        LayerCache(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        for _ in range(num_layers)
    ]
