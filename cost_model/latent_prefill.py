"""What latent attention (MLA) of prompts costs where keys and values are expanded by heads.

Our executor copies a prompt's latents out of its blocks and expands them for some heads at a time,
in kernels of their own, before PyTorch's attention (`executor/layers/mla.py`). Engines with one
kernel for all of that have none of this.
"""

from typing import NamedTuple

from rankwright.cost_model.model_spec import Attention

# Two products, joining the rotary columns, widening the values (two kernels), attention, and the
# copy of what it found: for each group of heads. Looking up the blocks, and copying their latents.
_GROUP_LAUNCHES, _PROMPT_LAUNCHES = 7, 2


class LatentPrefill(NamedTuple):
    """Bytes moved, and kernels launched, beside the products and attention itself."""

    bytes: float
    launches: int


def latent_prefill(
    heads: Attention, queries: int, rows: float, prompts: float, reach: float, width: float
) -> LatentPrefill:
    """Return what expanding the latents of the prompts of a step takes.

    So many heads at a time that their keys and values take no more than half of what the step's own
    tokens would have: a prompt of one chunk has two groups, its last chunk of four has eight.

    Args:
        heads: The attention.
        queries: Heads of this rank.
        rows: New tokens of all prompts.
        prompts: How many they are.
        reach: Tokens that each attends to at its end.
        width: Bytes of a value.

    >>> v2_lite = Attention(
    ...     kind="mla", num_heads=16, num_kv_heads=16, head_dim=192, value_head_dim=128,
    ...     kv_lora_rank=512, rope_head_dim=64,
    ... )
    >>> [latent_prefill(v2_lite, 8, 2048, 1, n, 2).launches for n in (2048, 4096, 8192)]
    [16, 30, 58]
    """
    assert heads.kv_lora_rank is not None
    assert heads.rope_head_dim is not None
    groups = min(float(queries), max(1.0, 2 * reach * prompts / rows))
    key, value, rotary = heads.head_dim, heads.value_head_dim, heads.rope_head_dim
    # Joined keys are read and written, values read, and the wider ones filled and written.
    expanded = queries * ((key - rotary) + key + key + 2 * value)
    latents = 2 * (heads.kv_lora_rank + rotary)
    moved = prompts * reach * (expanded + latents) + 2 * rows * queries * value
    launches = prompts * (_PROMPT_LAUNCHES + _GROUP_LAUNCHES * groups)
    return LatentPrefill(moved * width, round(launches))
