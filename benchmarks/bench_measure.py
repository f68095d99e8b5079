"""Holds `probe --measure` against plain measurements of the same things, made in the same run.

    PYTHONPATH=src python benchmarks/bench_measure.py [--ranks 2] [--output FOLDER]

First `executor/measure.py` runs as the command does; then a process for each GPU times what it
timed in the plainest way: copies, cuBLAS products and NCCL collectives called on the stream between
two CUDA events, without a graph. Each row has both figures and their ratio. Products heat the
board, which then lowers its clock, so both ways take turns there, in one process; the row has the
medians of five turns each, each way first in turn, and what the full run had read.

A row is held to 5 % where the size decides its time; small messages are listed too, but there the
plain call pays for a launch that a graph does not, so no agreement is due. On CPUs (gloo) the
script only shows that it works: two runs of one thing differ by more than 5 % there.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from measure_products import product_rows
from rankwright.executor.measure import measure
from rankwright.executor.measure_ranks import Ranks
from rankwright.topology.cluster import Cluster
from rankwright.topology.measurements import Measurements
from rankwright.topology.probe import probe
from rankwright.topology.shorthand import parse_cluster
from result import copy_bytes_per_s, write_result

WITHIN = 0.05
# From here on bandwidth decides: at 450 GB/s a launch of 10 us costs 7 % of 64 MiB, 2 % of 256.
HELD_BYTES = 256 * 2**20
# In a row, so that one rank's late start is spread over several calls.
CALLS = 5
SAMPLES = 15
PEER_COPY_BYTES = 128 * 2**20

# This process's view of all ranks, once they have met.
_RANKS: list[Ranks] = []

Row = dict[str, Any]


def main() -> None:
    """Measure twice, print the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, help="CPU ranks, where there is no GPU", default=2)
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    cluster = probe(require_gpu=True) if cuda else parse_cluster(f"{arguments.ranks}xcpu")
    ours = measure(cluster, progress=print).measurements
    assert ours is not None
    plain = measure_plainly(cluster, ours, cuda=cuda)
    rows = compare(ours, plain)
    for row in rows:
        print(json.dumps(row))
    held = [row for row in rows if row["held"]]
    outside = [row for row in held if abs(row["ratio"] - 1) > WITHIN]
    full_run = [abs(row["ratio_of_full_run"] - 1) for row in held if "ratio_of_full_run" in row]
    facts: Row = {
        "cluster": cluster.describe(),
        "seconds_of_probe_measure": round(ours.seconds, 2),
        "software": ours.software,
        "transports": list(ours.transports),
        "held": len(held),
        "outside_5_percent": len(outside),
        "largest_deviation": round(max((abs(row["ratio"] - 1) for row in held), default=0), 4),
        "all_within_5_percent": bool(held) and not outside,
        "largest_deviation_of_products_in_full_run": round(max(full_run, default=0), 4),
    }
    print(json.dumps(facts))
    print(write_result("measure", facts | {"rows": rows}, folder=arguments.output))


def compare(ours: Measurements, plain: Sequence[Row]) -> list[Row]:
    """Return the plain rows, each with our figure of the same thing and the ratio of both.

    The figures of rows with `gpu` are of one GPU, those with `gpus` of a pair or a group. Rates
    and times alike: the ratio is ours over the plain one.
    """
    known: dict[str, float] = {}
    for memory in ours.memory:
        known[f"memory copy {memory.gpu}"] = memory.bytes_per_s
    for pair in ours.pairs:
        known[f"peer copy {pair.a}-{pair.b}"] = pair.forth_bytes_per_s
        known[f"peer copy {pair.b}-{pair.a}"] = pair.back_bytes_per_s
    for collective in ours.collectives:
        over = ",".join(map(str, collective.gpus))
        name = f"{collective.operation} {collective.size_bytes} over {over}"
        known[name] = collective.size_bytes / collective.seconds
    rows = []
    for row in plain:
        mine = row.pop("measure", None) or known.get(row["what"])
        if mine is not None:
            rows.append(
                {
                    **row,
                    "measure": float(f"{mine:.5g}"),
                    "plain": float(f"{row['plain']:.5g}"),
                    "ratio": round(mine / row["plain"], 4),
                    **_of_full_run(row),
                }
            )
    return rows


def _of_full_run(row: Row) -> Row:
    rate = row.get("measure_in_full_run")
    return {} if rate is None else {"ratio_of_full_run": round(rate / row["plain"], 4)}


def measure_plainly(cluster: Cluster, ours: Measurements, *, cuda: bool) -> list[Row]:
    """Return the rows of all ranks, a process each."""
    gpus = [gpu.index for gpu in cluster.nodes[0].gpus]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(  # type: ignore[no-untyped-call]
            _rank, (gpus, port, folder, ours.model_dump_json(), cuda), nprocs=len(gpus)
        )
        files = sorted(Path(folder).glob("*.json"))
        return [row for file in files for row in json.loads(file.read_text())]


def _rank(rank: int, gpus: list[int], port: int, folder: str, text: str, cuda: bool) -> None:
    ours = Measurements.model_validate_json(text)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=len(gpus),
        device_id=device if cuda else None,
    )
    ranks = Ranks(rank, tuple((0, gpu) for gpu in gpus), device)
    _RANKS.append(ranks)
    rows = _of_one_gpu(ours, ranks)
    if cuda:
        rows += _peer_copies(gpus, rank)
    rows += _collectives(ours, gpus, rank, device)
    (Path(folder) / f"{rank:03}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _meet() -> None:
    """Wait for the others on the host.

    NCCL's own barrier keeps the GPU of whoever waits busy: copies to it then went at 56 GB/s
    instead of 365 on two H200.
    """
    _RANKS[0].wait()


def _of_one_gpu(ours: Measurements, ranks: Ranks) -> list[Row]:
    rows: list[Row] = []
    _meet()
    if ranks.device.type == "cuda":
        rate = copy_bytes_per_s(ranks.device)
        rows.append({"what": f"memory copy {ranks.gpu}", "plain": rate, "held": True})
    return rows + product_rows(ours, ranks)


def _peer_copies(gpus: list[int], rank: int) -> list[Row]:
    rows: list[Row] = []
    for source in range(len(gpus)):
        for target in range(len(gpus)):
            _meet()
            if source == target or rank != source:
                continue
            data = torch.ones(PEER_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
            there = torch.empty_like(data, device=f"cuda:{target}")
            seconds = _seconds(partial(there.copy_, data, non_blocking=True), data.device)
            what = f"peer copy {gpus[source]}-{gpus[target]}"
            rows.append({"what": what, "plain": PEER_COPY_BYTES / seconds, "held": True})
    _meet()
    return rows


def _collectives(ours: Measurements, gpus: list[int], rank: int, device: torch.device) -> list[Row]:
    rows: list[Row] = []
    groups = {
        over: dist.new_group([gpus.index(gpu) for gpu in over])
        for over in dict.fromkeys(row.gpus for row in ours.collectives)
    }
    for row in ours.collectives:
        _meet()
        if gpus[rank] not in row.gpus:
            continue
        group = groups[row.gpus]
        assert isinstance(group, dist.ProcessGroup)
        call = _collective(row.operation, row.size_bytes, rank, group, device)
        seconds = _seconds(call, device)
        if rank == 0:
            name = f"{row.operation} {row.size_bytes} over {','.join(map(str, row.gpus))}"
            held = row.size_bytes >= HELD_BYTES
            rows.append({"what": name, "plain": row.size_bytes / seconds, "held": held})
    _meet()
    return rows


def _collective(
    operation: str, size_bytes: int, rank: int, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], object]:
    ranks = group.size()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    whole = torch.zeros(size_bytes // dtype.itemsize, dtype=dtype, device=device)
    piece = torch.zeros(whole.numel() // ranks, dtype=dtype, device=device)
    other = torch.zeros_like(whole)

    def send_recv() -> None:
        steps = [
            dist.P2POp(dist.isend, whole, (rank + 1) % ranks, group),
            dist.P2POp(dist.irecv, other, (rank - 1) % ranks, group),
        ]
        for work in dist.batch_isend_irecv(steps):
            work.wait()

    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, piece, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(piece, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "send_recv": send_recv,
    }
    return calls[operation]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: the median of samples of some calls in a row."""
    times_s: list[float] = []
    for _ in range(3):
        call()
    for _ in range(SAMPLES):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            call()  # keeps the GPU busy while the host launches the calls that count
            start.record()
            for _ in range(CALLS):
                call()
            stop.record()
            stop.synchronize()
            times_s.append(start.elapsed_time(stop) / 1e3 / CALLS)
        else:
            start_s = time.perf_counter()
            call()
            times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


if __name__ == "__main__":
    main()
