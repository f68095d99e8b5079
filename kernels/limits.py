"""What the Triton kernels can run, in one table, readable without PyTorch.

The kernels' tables of shapes have a row for each padded head dim here, and what starts a model
looks here before it loads anything. Plain PyTorch, which runs on CPUs, has no limit but that of
blocks.
"""

# A head is padded to the first of these that holds it; tiles of more would not fit into shared
# memory and registers as the kernels are cut.
PADDED_HEAD_DIMS = (64, 128, 256)
# Columns of latent attention: what every published model of it has (DeepSeek V2 and V3) is what its
# kernel's tiles were cut for.
LARGEST_LATENT = 512
LARGEST_LATENT_ROTARY = 64
# tl.dot takes no fewer rows, and a tile of keys must not cross a block.
LEAST_BLOCK_TOKENS = 16
# Ampere brought bfloat16. Triton names the same as its least (github.com/triton-lang/triton,
# README, "Compatibility").
LEAST_CAPABILITY = (8, 0)


def padded_head_dim(head_dim: int) -> int:
    """Return the row of the shape tables for heads of `head_dim`.

    Raises:
        ValueError: No kernel is cut for it.

    >>> padded_head_dim(80)
    128
    """
    for padded in PADDED_HEAD_DIMS:
        if 1 <= head_dim <= padded:
            return padded
    raise ValueError(
        f"a head size of {head_dim}; the attention kernels take 1 to {PADDED_HEAD_DIMS[-1]}"
    )


def blocks_are_legal(block_tokens: int) -> bool:
    """Return whether a block of the KV cache may hold so many tokens: a power of two from 16.

    >>> [blocks_are_legal(tokens) for tokens in (8, 16, 48, 64)]
    [False, True, False, True]
    """
    return block_tokens >= LEAST_BLOCK_TOKENS and not block_tokens & (block_tokens - 1)
