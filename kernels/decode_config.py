"""How decode attention is cut and compiled, by geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from rankwright.kernels.backend import ceil_div
from rankwright.kernels.limits import padded_head_dim
from rankwright.kernels.tuned import tuned_rows


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is cut and compiled: `tile` tokens a loop iteration, `min_tiles` a split.

    Splits are as many as fill the GPU with `programs` on each multiprocessor.
    """

    tile: int
    num_warps: int
    num_stages: int
    num_splits: int = 1
    min_tiles: int = 1
    programs: int = 2


# (padded head dim, bytes a value), for sm_90. A program keeps (num_stages - 1) tiles of keys and
# values in shared memory: 64 KB at (128, 2), so that two or three fit in the 227 KB of an H100 or
# H200 (CUDA C programming guide, compute capability 9.0). A multiprocessor's share of their 3.0 and
# 4.3 TB/s is 23 and 33 KB in a microsecond, about the latency of a load from a busy memory.
_SHAPES: dict[tuple[int, int], DecodeConfig] = {
    (64, 2): DecodeConfig(tile=64, num_warps=4, num_stages=4),
    (128, 2): DecodeConfig(tile=64, num_warps=4, num_stages=3),
    (256, 2): DecodeConfig(tile=32, num_warps=4, num_stages=3),
    (64, 4): DecodeConfig(tile=64, num_warps=4, num_stages=3),
    (128, 4): DecodeConfig(tile=32, num_warps=4, num_stages=3),
    (256, 4): DecodeConfig(tile=16, num_warps=4, num_stages=3),
}
# Of latent attention, by bytes a value: a tile of 32 latents of 576 columns is 36 KB in bfloat16,
# and 32 heads by 512 columns are 64 registers a thread of 8 warps.
_MLA_SHAPES = {
    2: DecodeConfig(tile=32, num_warps=8, num_stages=3),
    4: DecodeConfig(tile=16, num_warps=8, num_stages=2),
}
# The merge reads S x D floats a head, one program a head: 64 KB at 128 splits of dimension 128.
_MAX_SPLITS = 128


def decode_config(
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    max_blocks: int,
    block_tokens: int,
    dtype: torch.dtype,
    num_multiprocessors: int,
    device: torch.device | None = None,
) -> DecodeConfig:
    """Return the launch configuration of a geometry: the same for every step of a CUDA graph.

    What was measured on `device` (`tuned.py`) comes before the table above.

    Splits fill the GPU: the fewest whose programs come in waves at least 95 % as full as the best
    number's. (FlashAttention-2's `num_splits_heuristic` asks for 85 %, which is 29 splits of a
    sequence with 8 key/value heads on an H100: a context of 8192 tokens then takes rounds of 5
    tiles, of 32 splits 4.)
    """
    key = padded_head_dim(head_dim), dtype.itemsize
    shape = _SHAPES[key]
    if device is not None and (row := tuned_rows(device, "decode").get(key)):
        shape = DecodeConfig(**row)
    return with_splits(shape, batch * num_kv_heads, max_blocks, block_tokens, num_multiprocessors)


def mla_decode_config(
    programs: int, max_blocks: int, block_tokens: int, dtype: torch.dtype, num_multiprocessors: int
) -> DecodeConfig:
    """Return the launch configuration of latent attention, whose programs take blocks of heads."""
    shape = _MLA_SHAPES[dtype.itemsize]
    return with_splits(shape, programs, max_blocks, block_tokens, num_multiprocessors)


def with_splits(
    shape: DecodeConfig,
    programs: int,
    max_blocks: int,
    block_tokens: int,
    num_multiprocessors: int,
) -> DecodeConfig:
    """Return `shape` with as many splits as fill the GPU; `programs` are there without."""
    tile = min(shape.tile, block_tokens)
    programs = max(programs, 1)
    slots = num_multiprocessors * shape.programs
    # Past four waves the last, partly filled one no longer matters.
    limit = 1 if programs >= 4 * slots else max(4, ceil_div(slots, programs))
    limit = max(1, min(limit, _MAX_SPLITS, ceil_div(max_blocks * block_tokens, tile)))
    waves = [programs * num_splits / slots for num_splits in range(1, limit + 1)]
    fullness = [wave / math.ceil(wave) for wave in waves]
    num_splits = 1 + next(i for i, full in enumerate(fullness) if full >= 0.95 * max(fullness))
    return replace(shape, tile=tile, num_splits=num_splits)


def decode_workspace_elements(batch: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Return the float32 values of scratch memory that `decode_attention` needs."""
    return 0 if num_splits == 1 else batch * num_heads * num_splits * (head_dim + 1)
