"""Sums over the GPUs of this machine: NCCL, and three forms over memory that they share.

    torchrun --nproc-per-node 2 benchmarks/bench_all_reduce.py

Each time is of one sum in a chain inside a CUDA graph, as in a decode step; the norm rows add the
residual addition and the RMSNorm that follow a sum in every layer. A sum that differs from NCCL's
is not timed, and the exit status is 1. Last comes the row for this many ranks in the table of
`cost_model/peer_sums.py` by which the executor chooses.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rankwright.cost_model.peer_sums import PeerSums, SumAlgorithm
from rankwright.executor.peer_memory import PeerMemory, open_peer_memory
from rankwright.kernels.rms_norm import rms_norm
from result import write_result

# Hidden size of an 8B-class model in bfloat16: a row is 8 KiB.
DIM = 4096
DTYPE = torch.bfloat16
ROWS = (1, 2, 8, 16, 64, 128, 256, 1024, 2048, 4096)
CHAIN = 32  # sums in a graph
EPS = 1e-5
FORMS: tuple[SumAlgorithm, ...] = ("pushed", "one_shot", "two_shot")
PUSHED_BYTES = 1 << 20  # twice that goes over the links
EVERY_SIZE = max(ROWS) * DIM * DTYPE.itemsize

Chain = Callable[[], Any]


def forms(rows: int) -> tuple[SumAlgorithm, ...]:
    """Return the forms that so many rows are summed by."""
    return FORMS if rows * DIM * DTYPE.itemsize <= PUSHED_BYTES else FORMS[1:]


def graph_us(chain: Chain, device: torch.device) -> float:
    """Return the median microseconds of one sum of a chain, the slowest rank's."""
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    times = []
    for _ in range(30):
        dist.barrier()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # ranks come together in it
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / CHAIN)
    slowest = torch.tensor(statistics.median(times[5:]), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def chains(peers: PeerMemory | None, rows: int, device: torch.device) -> dict[str, Chain]:
    """Return what is timed, by name."""
    x, residual = (torch.randn(rows, DIM, device=device).to(DTYPE) for _ in range(2))
    weight = torch.ones(DIM, device=device, dtype=DTYPE)

    def nccl(norm: bool) -> None:
        for _ in range(CHAIN):
            dist.all_reduce(x)
            if norm:
                rms_norm(x, weight, EPS, residual_TD=residual)

    def shared(form: SumAlgorithm, norm: bool) -> None:
        assert peers is not None
        peers.begin()
        options: dict[str, Any] = (
            {"weight_D": weight, "eps": EPS, "residual_TD": residual} if norm else {}
        )
        for _ in range(CHAIN):
            part = peers.part(rows, DIM, DTYPE)
            assert part is not None
            peers.sum(part, algorithm=form, **options)

    made: dict[str, Chain] = {
        "nccl_us": lambda: nccl(False),
        "nccl_norm_us": lambda: nccl(True),
    }
    for form in forms(rows) if peers is not None else ():
        made[f"{form}_us"] = partial(shared, form, False)
        made[f"{form}_norm_us"] = partial(shared, form, True)
    return made


def is_right(peers: PeerMemory, rows: int, device: torch.device) -> bool:
    """Whether sums over shared memory equal NCCL's in float32 but for one rounding."""
    worst = 0.0
    for repeat in range(6):
        x = torch.randn(rows, DIM, device=device).to(DTYPE)
        if repeat == 0:
            peers.begin()
        total = peers.sum(x, algorithm=forms(rows)[repeat % len(forms(rows))])
        assert total is not None
        exact = x.float()
        dist.all_reduce(exact)
        worst = max(worst, float((total.float() - exact).norm() / exact.norm()))
    return worst <= torch.finfo(DTYPE).eps


def best_table(rows: list[dict[str, Any]]) -> PeerSums:
    """Return the sizes up to which each form, norm fused, was not slower than the others."""
    ends = dict.fromkeys(FORMS, 0)
    for row in rows:
        times = {form: row.get(f"{form}_norm_us", float("inf")) for form in FORMS}
        form = min(FORMS, key=lambda form: times[form])
        if times[form] <= row.get("nccl_norm_us", 0.0):
            ends[form] = row["bytes"]
    return PeerSums(**{f"{form}_bytes": end for form, end in ends.items()})


def main() -> int:
    """Return the exit status: 1 where a sum was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    world_size = dist.get_world_size()
    peers = open_peer_memory(
        dist.group.WORLD,
        one_machine=True,
        max_rows=max(ROWS),
        dim=DIM,
        dtype=DTYPE,
        device=device,
        table=PeerSums(PUSHED_BYTES, EVERY_SIZE, EVERY_SIZE),
    )
    rows_of_result: list[dict[str, Any]] = []
    for rows in ROWS:
        passed = peers is None or is_right(peers, rows, device)
        row: dict[str, Any] = {"rows": rows, "bytes": rows * DIM * DTYPE.itemsize, "passed": passed}
        for name, chain in chains(peers, rows, device).items() if passed else ():
            row[name] = graph_us(chain, device)
        rows_of_result.append(row)
        if rank == 0:
            print(
                "  ".join(
                    f"{key}={value:.2f}" if isinstance(value, float) else f"{key}={value}"
                    for key, value in row.items()
                ),
                flush=True,
            )
    if rank == 0:
        table = best_table(rows_of_result)
        print(f"{world_size}: {table}")
        content = {"world_size": world_size, "dim": DIM, "rows": rows_of_result}
        content["best"] = asdict(table)
        print(write_result(f"all-reduce-{world_size}", content, folder=arguments.output))
    all_passed = all(row["passed"] for row in rows_of_result)
    dist.destroy_process_group()
    return 0 if all_passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
