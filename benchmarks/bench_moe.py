"""Times the experts of a MoE block, routing included, beside what the GPU could do at best.

    PYTHONPATH=src python benchmarks/bench_moe.py [--only qwen3] [--output FOLDER]
    PYTHONPATH=src python benchmarks/bench_moe.py --tune [--only mixtral] [--seconds 240]

Every shape is first held to the plain reference on fresh random inputs; one that fails is not
timed, and the exit status is 1. Times are medians of CUDA graph replays over several sets of
weights, so that none comes from L2. The floor is the longer of the bytes of the experts that were
chosen, by a copy measured in the same run, and the operations, by a matrix product measured so.
`--tune` times other configurations of the two products of each shape and prints the best as a row
of `kernels/moe_configs.py`.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernel_timing import begin, graph_us
from rankwright.kernels.moe_configs import ExpertsConfig, Tile, experts_config
from rankwright.kernels.moe_experts import Experts, run_experts, run_experts_reference
from rankwright.kernels.moe_routing import RoutingRule, route
from result import write_result

DTYPE = torch.bfloat16
# Weights rotate over this many bytes, more than three times the L2 of an H100 (50 MB) or H200.
ROTATION_BYTES = 200e6
DECODE_TOKENS = (1, 8, 32, 64, 128, 256)
PREFILL_TOKENS = (1024, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Shape:
    """A MoE block as one rank sees it: `slots` of `experts`, `width` columns of each."""

    name: str
    experts: int
    slots: int
    top_k: int
    hidden: int
    width: int


# Expert counts and widths of the config.json of mistralai/Mixtral-8x7B-v0.1 and Qwen/Qwen3-30B-A3B.
SHAPES = (
    Shape("mixtral-8x7b TP1", 8, 8, 2, 4096, 14336),
    Shape("mixtral-8x7b TP2", 8, 8, 2, 4096, 7168),
    Shape("mixtral-8x7b EP2", 8, 4, 2, 4096, 14336),
    Shape("qwen3-30b-a3b TP1", 128, 128, 8, 2048, 768),
    Shape("qwen3-30b-a3b TP2", 128, 128, 8, 2048, 384),
    Shape("qwen3-30b-a3b EP2", 128, 64, 8, 2048, 768),
)


@dataclass(slots=True)
class Inputs:
    """One set of tokens and weights."""

    x: torch.Tensor
    logits: torch.Tensor
    experts: Experts
    weights: torch.Tensor
    slots: torch.Tensor

    def run(self, shape: Shape, config: ExpertsConfig | None = None) -> torch.Tensor:
        """Route and run the experts, as a layer does."""
        weights, slots = route(self.logits, RoutingRule(shape.top_k), num_slots=shape.slots)
        return run_experts(
            self.x, self.experts, weights, slots, num_experts=shape.experts, config=config
        )


def make(shape: Shape, tokens: int) -> Inputs:
    """Return random inputs whose outputs are near 1."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=DTYPE)

    experts = Experts(
        random(shape.slots, 2 * shape.width, shape.hidden).mul_(shape.hidden**-0.5),
        random(shape.slots, shape.hidden, shape.width).mul_(shape.width**-0.5),
    )
    logits = random(tokens, shape.experts)
    weights, slots = route(logits, RoutingRule(shape.top_k), num_slots=shape.slots)
    return Inputs(random(tokens, shape.hidden), logits, experts, weights, slots)


def measure(
    shape: Shape, tokens: int, rates: dict[str, float], config: ExpertsConfig | None = None
) -> dict[str, Any]:
    """Return the row of a shape; without a time where it failed its check."""
    first = make(shape, tokens)
    error = _error(first, shape, config)
    row: dict[str, Any] = {
        "shape": shape.name,
        "tokens": tokens,
        "relative_error": error,
        # A sum of top_k rows, each rounded once, and the result's own rounding.
        "passed": error <= 2 * torch.finfo(DTYPE).eps,
    }
    if not row["passed"]:
        return row
    expert_bytes = 3 * shape.hidden * shape.width * DTYPE.itemsize
    sets = [first]
    while sum(_used(one) for one in sets) * expert_bytes < ROTATION_BYTES and len(sets) < 8:
        sets.append(make(shape, tokens))
    calls = [lambda one=one: one.run(shape, config) for one in sets]
    us = graph_us(calls)
    pairs = sum(int((one.slots >= 0).sum()) for one in sets) / len(sets)
    moved = sum(_used(one) for one in sets) / len(sets) * expert_bytes
    moved += 2 * tokens * shape.hidden * DTYPE.itemsize
    flops = 6 * pairs * shape.hidden * shape.width
    by_memory = moved / rates["copy_bytes_per_s"]
    by_arithmetic = flops / rates["matmul_flops_per_s"]
    floor_us = max(by_memory, by_arithmetic) * 1e6
    return row | {
        "us": us,
        "bytes": moved,
        "flops": flops,
        "bytes_per_s": moved / us * 1e6,
        "flops_per_s": flops / us * 1e6,
        "floor_us": floor_us,
        "share_of_floor": floor_us / us,
        "bound": "arithmetic" if by_arithmetic > by_memory else "memory",
    }


def _used(inputs: Inputs) -> int:
    """Experts of this rank that some token chose."""
    return len(set(inputs.slots.flatten().tolist()) - {-1})


def _error(inputs: Inputs, shape: Shape, config: ExpertsConfig | None) -> float:
    some = slice(0, 512)  # a plain loop over thousands of tokens takes seconds
    out = inputs.run(shape, config)[some]
    expected = run_experts_reference(
        inputs.x[some], inputs.experts, inputs.weights[some], inputs.slots[some]
    )
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def candidates(rows: int) -> tuple[list[Tile], list[Tile]]:
    """Return the tiles worth trying for blocks of `rows` rows, of gate and up and of down."""
    ks = (64, 128, 256) if rows <= 32 else (64,) if rows >= 128 else (64, 128)
    warps = (4, 8) if rows > 16 else (4,)
    group = 1 if rows <= 32 else 8
    found: tuple[list[Tile], list[Tile]] = ([], [])
    for which, widths in enumerate(((32, 64, 128), (32, 64, 128, 256))):
        for n, k, warp, stages in itertools.product(widths, ks, warps, (3, 4, 5)):
            columns = n * (2 if which == 0 else 1)
            shared = stages * k * (rows + columns) * DTYPE.itemsize
            registers = rows * columns / (32 * warp)
            # The most that a program may have on sm_90, and too little to hide a load behind.
            if 48_000 < shared <= 227 * 1024 and registers <= 128:
                found[which].append(Tile(n, k, warp, stages, group))
    return found


def tune(shape: Shape, tokens: int, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Yield a row for each better configuration found, one product after the other."""
    base = experts_config(
        num_tokens=tokens,
        top_k=shape.top_k,
        num_experts=shape.experts,
        width=shape.width,
        hidden_size=shape.hidden,
        dtype=DTYPE,
        device=torch.device("cuda"),
    )
    sets = [make(shape, tokens) for _ in range(2)]

    def time_us(config: ExpertsConfig) -> float:
        try:
            return graph_us([lambda one=one: one.run(shape, config) for one in sets], 20.0)  # type: ignore[misc]
        except Exception as error:  # Triton's own: too much shared memory or too many registers
            print(f"  {config}: {error}", flush=True)
            torch.cuda.synchronize()
            return float("inf")

    best, best_us = base, time_us(base)
    sizes = [base.block_rows, *([base.block_rows * 2] if base.block_rows < 128 else [])]
    for rows in sizes:
        ups, downs = candidates(rows)
        start = base if rows == base.block_rows else ExpertsConfig(rows, ups[0], downs[0])
        here, here_us = start, time_us(start)
        for is_down, tiles in enumerate((ups, downs)):
            for tile in tiles:
                config = replace(here, down=tile) if is_down else replace(here, gate_up=tile)
                us = time_us(config)
                if us < here_us:
                    here, here_us = config, us
        if here_us < 0.98 * best_us:  # less is noise
            best, best_us = here, here_us
    key = (torch.cuda.get_device_name(), shape.experts, shape.width, shape.hidden, tokens)
    print(f"    {key!r}: {_row(best)},", flush=True)
    yield measure(shape, tokens, rates, best) | {"config": _row(best)}


def _row(config: ExpertsConfig) -> str:
    def tile(t: Tile) -> str:
        return f"Tile({t.block_n}, {t.block_k}, {t.num_warps}, {t.num_stages}, {t.group_m})"

    return f"ExpertsConfig({config.block_rows}, {tile(config.gate_up)}, {tile(config.down)})"


def line(row: dict[str, Any]) -> str:
    """Return a row as printed."""
    head = f"{row['shape']:<19} {row['tokens']:>5} tokens"
    if not row["passed"]:
        return f"{head} FAILED its check: relative error {row['relative_error']:.1e}"
    rate = (
        f"{row['flops_per_s'] / 1e12:6.0f} TFLOP/s"
        if row["bound"] == "arithmetic"
        else f"{row['bytes_per_s'] / 1e9:6.0f} GB/s   "
    )
    return f"{head} {row['us']:9.1f} us {rate} {row['share_of_floor']:6.1%} of the floor"


def main() -> int:
    """Return the exit status: 1 where a shape failed its check, 4 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--tokens", type=int, nargs="+", default=DECODE_TOKENS + PREFILL_TOKENS)
    parser.add_argument("--tune", action="store_true", help="look for better configurations")
    parser.add_argument("--seconds", type=float, default=400, help="stop tuning after so long")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    seed, rates = begin("bench_moe")
    rows: list[dict[str, Any]] = []
    stop = time.monotonic() + arguments.seconds
    for shape in SHAPES:
        if arguments.only not in shape.name:
            continue
        for tokens in arguments.tokens:
            if not arguments.tune:
                rows.append(measure(shape, tokens, rates))
                print(line(rows[-1]), flush=True)
            elif time.monotonic() < stop:
                for row in tune(shape, tokens, rates):
                    rows.append(row)
                    print(line(row), flush=True)
            torch.cuda.empty_cache()
    name = "moe-tune" if arguments.tune else "moe"
    print(write_result(name, {"seed": seed, **rates, "rows": rows}, folder=arguments.output))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
