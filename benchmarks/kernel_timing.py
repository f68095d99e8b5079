"""What kernel benchmarks share: a row of their tables, its check, its time, the GPU's ceilings."""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from result import copy_bytes_per_s

DTYPE = torch.bfloat16
# Inputs rotate over this many bytes, more than twice the L2 of an H100 (50 MB) or H200 (60 MB).
ROTATION_BYTES = 160e6


Run = Callable[[str], torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: `make` draws new inputs and returns the call by backend."""

    op: str
    shape: str
    make: Callable[[], Run]
    bytes_moved: float
    flops: float = 0.0
    backend: str = "triton"
    reference: str = "reference"
    tolerance: float = torch.finfo(DTYPE).eps  # one rounding of the result


def random(*shape: int) -> torch.Tensor:
    """Return normal values on the GPU."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def relative_error(out: Any, reference: Any) -> float:
    """Return the largest ||out - reference|| / ||reference|| of the outputs."""
    pairs = zip(
        out if isinstance(out, tuple) else (out,),
        reference if isinstance(reference, tuple) else (reference,),
        strict=True,
    )
    return max(
        float((a.cpu().double() - b.cpu().double()).norm() / b.cpu().double().norm().clamp(1e-30))
        for a, b in pairs
    )


def graph_us(calls: Sequence[Callable[[], Any]], target_ms: float = 60.0) -> float:
    """Return the median microseconds of one call, the calls replayed one after the other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Enough calls a graph that its own launch does not show.
    repeats = max(1, 16 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()

    def once() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    warm_ms = [once() for _ in range(3)][-1]
    times = [once() for _ in range(max(7, min(100, int(target_ms / max(warm_ms, 1e-3)))))]
    return statistics.median(times) * 1e3 / (repeats * len(calls))


def ceilings() -> dict[str, float]:
    """Return the rates that this GPU reaches here: a copy, read and written; a matrix product."""
    a, b = random(8192, 8192), random(8192, 8192)
    out = torch.empty_like(a)
    product_us = graph_us([lambda: torch.mm(a, b, out=out)])
    return {
        "copy_bytes_per_s": copy_bytes_per_s(),
        "matmul_flops_per_s": 2 * 8192**3 / product_us * 1e6,
    }


def measure(case: Case, rates: dict[str, float]) -> dict[str, Any]:
    """Return the row of a case; without a time where the kernel failed its check."""
    run = case.make()
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(DTYPE).removeprefix("torch."),
        "bytes": case.bytes_moved,
        "flops": case.flops,
    }
    try:
        found = run(case.backend)
    except RuntimeError as error:
        if case.backend != "cudnn":
            raise
        # A library that does not take a shape is no failure of ours, and nothing that passed.
        return row | {"passed": None, "us": None, "why": str(error).splitlines()[0]}
    off = relative_error(found, run(case.reference))
    row |= {"relative_error": off, "passed": off <= case.tolerance}  # NaN is not
    if not row["passed"]:
        return row
    # Tiny inputs stay few, and so in L2, as they do between the operations of a model.
    sets = max(1, min(8, int(ROTATION_BYTES // case.bytes_moved)))
    runs = [run, *(case.make() for _ in range(sets - 1))]
    us = graph_us([partial(one, "timed") for one in runs])
    cached = sets * case.bytes_moved < ROTATION_BYTES / 2
    by_memory = case.bytes_moved / rates["copy_bytes_per_s"]
    by_arithmetic = case.flops / rates["matmul_flops_per_s"]
    return row | {
        "us": us,
        "bytes_per_s": case.bytes_moved / us * 1e6,
        "flops_per_s": case.flops / us * 1e6,
        "floor_us": max(by_memory, by_arithmetic) * 1e6,
        "share_of_floor": max(by_memory, by_arithmetic) * 1e6 / us,
        "bound": "arithmetic" if by_arithmetic > by_memory else "memory",
        "inputs_in_l2": cached,
    }


def line(row: dict[str, Any]) -> str:
    """Return a row as printed."""
    head = f"{row['op']:<27} {row['shape']:<18}"
    if row["passed"] is False:
        return f"{head} FAILED its check: relative error {row['relative_error']:.1e}"
    if row["us"] is None:
        return f"{head} not on this machine: {row['why']}"
    rate = (
        f"{row['flops_per_s'] / 1e12:7.0f} TFLOP/s"
        if row["bound"] == "arithmetic"
        else f"{row['bytes_per_s'] / 1e9:7.0f} GB/s   "
    )
    return (
        f"{head} {row['us']:9.2f} us {row['bytes'] / 1e6:8.1f} MB {rate} "
        f"{row['share_of_floor']:6.1%}{' (L2)' if row['inputs_in_l2'] else ''}"
    )


def num_multiprocessors() -> int:
    """Return those of this GPU."""
    return torch.cuda.get_device_properties(0).multi_processor_count


def begin(program: str) -> tuple[int, dict[str, float]]:
    """Return the seed and what the GPU reaches, both printed; exit with 4 where there is none."""
    if not torch.cuda.is_available():
        print(f"{program}: needs a CUDA GPU, and torch sees none", file=sys.stderr)
        raise SystemExit(4)
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    rates = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"matrix product {rates['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s; seed {seed}",
        flush=True,
    )
    return seed, rates
