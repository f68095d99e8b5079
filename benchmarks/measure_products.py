"""Times matrix products for `bench_measure.py`, as `probe --measure` does and plainly."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from board import Board
from rankwright.executor.measure_device import product, product_s
from rankwright.executor.measure_ranks import Ranks
from rankwright.executor.sustained import SAMPLE_S, SETTLE_S
from rankwright.topology.measurements import GemmRate, Measurements

Row = dict[str, Any]

# Products whose launch (some 5 us) is nothing beside their time.
HELD_FLOPS = 1e11
# Of both ways of calling a product; one where no agreement is due.
TURNS = 3
# Rounds of calls in the stream while the host waits for the one before them.
AHEAD = 3
CALLS = 5  # in a round
CPU_SAMPLES = 15


def product_rows(ours: Measurements, ranks: Ranks) -> list[Row]:
    """Return a row for each product that was timed on this rank, all ranks at once."""
    board = Board(_uuid(ranks.device))
    rows: list[Row] = []
    for gemm in ours.gemms:
        # float8 has no plain call in torch.
        if gemm.gpu == ranks.gpu and gemm.dtype != "float8":
            rows.append(_row(gemm, ranks, board))
    ranks.wait()
    return rows


def _row(gemm: GemmRate, ranks: Ranks, board: Board) -> Row:
    flops = 2.0 * gemm.m * gemm.n * gemm.k
    held = flops >= HELD_FLOPS
    device = ranks.device
    call = product(gemm.dtype, gemm.m, gemm.n, gemm.k, device)
    ways: dict[str, Callable[[], float]] = {
        "measure": partial(product_s, ranks, call),
        "plain": partial(_settled_seconds, call, device),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    turns: dict[str, list[Row]] = {way: [] for way in ways}
    for turn in range(TURNS if held else 1):
        for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            ranks.wait()
            seconds, seen = board.watch(ways[way])
            rates[way].append(flops / seconds)
            turns[way].append({"flops_per_s": float(f"{flops / seconds:.5g}"), **seen})
    once = partial(product_s, ranks, call, settle_s=0, sample_s=0)
    return {
        "what": f"gemm {gemm.dtype} {gemm.m}x{gemm.n}x{gemm.k} {ranks.gpu}",
        "measure": statistics.median(rates["measure"]),
        "measure_in_full_run": float(f"{gemm.flops_per_s:.5g}"),
        "plain": statistics.median(rates["plain"]),
        "held": held,
        "turns": turns,
        "kernels": {"measure": kernels_of(once, device), "plain": kernels_of(call, device)},
    }


def _uuid(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def kernels_of(work: Callable[[], object], device: torch.device) -> list[str]:
    """Return the names of the kernels (on a CPU: operations) that `work` runs, most time first."""
    cuda = device.type == "cuda"
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    events = found.key_averages()
    took = [
        (event.device_time_total if cuda else event.cpu_time_total, event.key) for event in events
    ]
    return [name[:120] for _, name in sorted(took, reverse=True)][:4]


def _settled_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call on a board that has settled under it.

    As long as `--measure` takes, by the host's clock; what counts is the last of it.
    """
    if device.type == "cpu":
        return statistics.median(_cpu_seconds(call) for _ in range(CPU_SAMPLES))
    events: list[torch.cuda.Event] = []
    end_s = time.monotonic() + SETTLE_S + SAMPLE_S
    while time.monotonic() < end_s:
        for _ in range(CALLS):
            call()
        events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        events[-1].record()
        if len(events) > AHEAD:
            events[-1 - AHEAD].synchronize()
    torch.cuda.synchronize(device)
    return (
        settled_round_s([start.elapsed_time(stop) / 1e3 for start, stop in pairwise(events)])
        / CALLS
    )


def settled_round_s(rounds_s: Sequence[float]) -> float:
    """Return the median of the last rounds, those of `SAMPLE_S`.

    >>> settled_round_s([0.1] * 10 + [0.125] * 4)
    0.125
    """
    last: list[float] = []
    for round_s in reversed(rounds_s):
        last.append(round_s)
        if sum(last) >= SAMPLE_S:
            break
    return statistics.median(last)


def _cpu_seconds(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
