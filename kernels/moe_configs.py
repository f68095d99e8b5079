"""How the grouped GEMMs of a MoE block are cut: a table of what was measured, else a rule.

Nothing is tuned while serving: a configuration follows from shapes, so that a CUDA graph and an
eager step of one shape run the same code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwright.kernels.backend import next_power_of_two
from rankwright.kernels.gpu_facts import gpu_facts


@dataclass(frozen=True, slots=True)
class Tile:
    """One GEMM: `block_n` outputs (of gate and of up each, where gated) by `block_k` inputs."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Both GEMMs of a MoE block, which share the alignment and so the rows of a block."""

    block_rows: int
    gate_up: Tile
    down: Tile


# By the rows of a block, for sm_90 and values of 2 bytes. Few rows: bytes in flight are what
# counts, so long pieces of weight rows, several stages of them. Many rows: 128 x 256 accumulators
# in 8 warps (as two halves, gate and up), the most that registers hold, and 4 stages in 227 KB.
# On an H200 they reach 80 to 99 % of a copy's rate when decoding 8 to 128 tokens of
# Qwen3-30B-A3B and Mixtral-8x7B.
_RULES: dict[int, ExpertsConfig] = {
    16: ExpertsConfig(16, Tile(32, 128, 4, 4, 1), Tile(64, 128, 4, 4, 1)),
    32: ExpertsConfig(32, Tile(64, 64, 4, 4, 1), Tile(128, 64, 4, 4, 1)),
    64: ExpertsConfig(64, Tile(64, 64, 4, 4, 4), Tile(128, 64, 4, 4, 4)),
    128: ExpertsConfig(128, Tile(128, 64, 8, 4, 16), Tile(256, 64, 8, 4, 16)),
}
# float32 takes twice the shared memory and goes through no tensor core: one small shape.
_FLOAT32 = ExpertsConfig(16, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))

# (device, experts, expert width of a rank, hidden size, tokens rounded up to a power of two).
# Filled from `benchmarks/bench_moe.py --tune`, whose results are beside those of the benchmark.
_MEASURED: dict[tuple[str, int, int, int, int], ExpertsConfig] = {
    ("NVIDIA H200", 8, 14336, 4096, 1): ExpertsConfig(
        16, Tile(128, 128, 4, 3, 1), Tile(64, 256, 4, 5, 1)
    ),
    ("NVIDIA H200", 8, 14336, 4096, 8): ExpertsConfig(
        16, Tile(64, 128, 4, 4, 1), Tile(128, 256, 4, 3, 1)
    ),
    ("NVIDIA H200", 8, 14336, 4096, 32): ExpertsConfig(
        16, Tile(128, 128, 4, 3, 1), Tile(128, 256, 4, 3, 1)
    ),
    ("NVIDIA H200", 8, 14336, 4096, 64): ExpertsConfig(
        32, Tile(128, 128, 4, 3, 1), Tile(128, 128, 4, 4, 1)
    ),
    ("NVIDIA H200", 8, 14336, 4096, 128): ExpertsConfig(
        64, Tile(64, 128, 4, 4, 8), Tile(256, 64, 4, 4, 8)
    ),
}


def experts_config(
    *,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    width: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ExpertsConfig:
    """Return the configuration of a shape.

    Args:
        num_tokens: T, of all ranks that share the experts.
        top_k: Experts a token.
        num_experts: Of all ranks.
        width: Columns of an expert on this rank.
        hidden_size: D.
        dtype: Of activations and weights.
        device: Where it runs.
    """
    if dtype.itemsize > 2:
        return _FLOAT32
    bucket = next_power_of_two(max(num_tokens, 1))
    key = (gpu_facts(device).name, num_experts, width, hidden_size, bucket)
    return _MEASURED.get(key) or rule_config(num_tokens * top_k / num_experts)


def rule_config(rows_per_expert: float) -> ExpertsConfig:
    """Return the configuration for so many rows an expert on average.

    Blocks of 128 rows from 96 on: below, most of a block would be padding.
    """
    rows = next((rows for rows in sorted(_RULES) if rows_per_expert <= 0.75 * rows), max(_RULES))
    return _RULES[rows]
