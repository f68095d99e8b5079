"""How attention of prompts is cut and compiled, by geometry, and which program takes which rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from rankwright.kernels.backend import DOT_PRECISION, next_power_of_two
from rankwright.kernels.limits import padded_head_dim
from rankwright.kernels.tuned import tuned_rows


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel is cut and compiled: `block_m` query tokens and `tile` context tokens."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


# (padded head dim, bytes a value), for sm_90: 128 rows are two warpgroups of 64, the height of
# Hopper's matrix instruction. More stages or larger tiles than these spill registers (ptxas) or no
# longer fit beside the queries in 227 KB of shared memory. float32 is for checks, not for speed.
_SHAPES: dict[tuple[int, int], PrefillConfig] = {
    (64, 2): PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3),
    (128, 2): PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3),
    (256, 2): PrefillConfig(block_m=128, tile=32, num_warps=8, num_stages=2),
    (64, 4): PrefillConfig(block_m=32, tile=32, num_warps=4, num_stages=2),
    (128, 4): PrefillConfig(block_m=16, tile=16, num_warps=4, num_stages=2),
    (256, 4): PrefillConfig(block_m=16, tile=16, num_warps=8, num_stages=2),
}


def prefill_config(
    max_queries: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> PrefillConfig:
    """Return the launch configuration for chunks of up to `max_queries` tokens.

    What was measured on `device` (`tuned.py`) comes before the table above.
    """
    key = padded_head_dim(head_dim), dtype.itemsize
    config = _SHAPES[key]
    if device is not None and (row := tuned_rows(device, "prefill").get(key)):
        config = PrefillConfig(**row)
    config = replace(config, tile=min(config.tile, block_tokens))
    block_m = min(config.block_m, max(16, next_power_of_two(max_queries)))
    if block_m < config.block_m:
        config = replace(config, block_m=block_m, num_warps=4)
    return config


@lru_cache(maxsize=8)
def prefill_work(
    query_starts: tuple[int, ...], context_lens: tuple[int, ...], block_m: int, device: torch.device
) -> torch.Tensor:
    """Return int32 [programs, 4]: sequence, first row, rows, position of the first row.

    Cached because every layer of a step asks for the same. Longest first, so that the last
    programs to start are short.
    """
    rows: list[tuple[int, int, int, int]] = []
    for b, context in enumerate(context_lens):
        start, stop = query_starts[b], query_starts[b + 1]
        for row in range(start, stop, block_m):
            rows.append((b, row, min(block_m, stop - row), context - stop + row))
    rows.sort(key=lambda r: -(r[2] + r[3]))
    table = torch.tensor(rows, dtype=torch.int32)
    if device.type != "cuda":
        return table
    # Pinned, so that the copy does not wait for the work already queued.
    return table.pin_memory().to(device, non_blocking=True)


def launch_constants(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    window: int | None,
    group: int | None,
    head_offset: int,
    config: PrefillConfig,
) -> dict[str, Any]:
    """Return what the kernels over prompts are compiled for.

    Args:
        q_THD: Query tokens.
        k_cache: Pool of key blocks.
        window: Tokens that each attends to; None: all.
        group: Query heads that share a key/value head; None: as many for each.
        head_offset: Place of the first query head in the first group.
        config: How it is cut.
    """
    _, num_heads, head_dim = q_THD.shape
    _, num_kv_heads, block_tokens, _ = k_cache.shape
    return {
        "NUM_HEADS": num_heads,
        "GROUP": group or num_heads // num_kv_heads,
        "HEAD_OFFSET": head_offset,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_D": max(16, next_power_of_two(head_dim)),
        "BLOCK_TOKENS": block_tokens,
        "TILE": config.tile,
        "HAS_WINDOW": window is not None,
        "LN_2": math.log(2),
        "PRECISION": DOT_PRECISION[q_THD.dtype],
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def check_starts(
    op: str,
    num_tokens: int,
    num_tables: int,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
) -> None:
    """Raise ValueError unless every sequence has a start, a table and a context.

    Args:
        op: Name for the message.
        num_tokens: Query tokens of all sequences.
        num_tables: Rows of the block tables.
        query_starts: One more than sequences: from 0 to `num_tokens`, rising.
        context_lens: One a sequence.
    """
    batch = len(context_lens)
    if len(query_starts) != batch + 1 or num_tables != batch:
        raise ValueError(
            f"{op}: {len(query_starts)} query starts and {num_tables} block tables; "
            f"expected {batch + 1} and {batch} for {batch} context lengths"
        )
    falls = any(start > stop for start, stop in pairwise(query_starts))
    if query_starts[0] != 0 or query_starts[-1] != num_tokens or falls:
        raise ValueError(
            f"{op}: query starts {list(query_starts)}; expected to rise from 0 to {num_tokens}"
        )
