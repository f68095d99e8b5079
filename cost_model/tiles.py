"""What kernels compute beyond the arithmetic that is asked for, because they work in tiles.

Said as arithmetic, so that a share of peak turns it into seconds; `fit.py` and `layer_ops.py` count
alike.
"""

# Products of few rows reach a smaller share of peak, as if they had 64 rows more: tiles are 64 or
# 128 rows high and the last wave is never full. Decoding the Qwen3-8B shape on one H200 under vLLM
# 0.26 takes 9.5 ms at 128 sequences and 15.1 ms at 256, which this reproduces within 12 %.
PRODUCT_ROWS = 64

# Attention of prompts: a program takes 128 rows of one head over all keys that they see, on one of
# the processors of the GPU (132 on H100 and H200; others have 108 to 148). Fewer tiles than
# processors leave the rest idle: the kernel takes no less than its longest tile.
_ROWS = 128
_PROCESSORS = 132
# A tile of our kernel takes the time of so many keys before its first and after its last: 36 shapes
# on an H200, of 128 to 16,384 tokens of context, are within 6 % of it on average.
TILE_KEYS = 400.0


def prefill_flops(
    rows: float, context: float, reach: float, heads: float, pair_flops: float, tile_keys: float
) -> float:
    """Return the FLOPs that attention of prompts takes the time of.

    Args:
        rows: New tokens of all prompts.
        context: Mean tokens that each of them attends to.
        reach: Tokens that the last one attends to.
        heads: Query heads.
        pair_flops: Of one row and one key of one head.
        tile_keys: What starting and ending a tile costs, as keys more that it attends to.

    One prompt of 128 tokens and 8 heads takes eight tiles, on eight processors of 132:

    >>> prefill_flops(128, 64.5, 128, 8, 512, 400) / (128 * 64.5 * 8 * 512)
    135.06976744186048
    """
    all_tiles = rows * heads * (context + tile_keys)
    longest_tile = _PROCESSORS * _ROWS * (reach + tile_keys)
    return max(all_tiles, longest_tile) * pair_flops
