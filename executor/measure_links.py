"""Entry point of a rank that measures: `python -m rankwright.executor.measure_links`.

Under torchrun, or started by `measure.py`, one process a GPU (or a CPU rank). Times copies between
all pairs, collectives over growing groups, copies in memory and matrix products. On GPUs each
sample is a replayed CUDA graph, as the engine's decode steps are, so that launches cost what they
cost there.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed as dist

from rankwright.topology.measurements import (
    CollectiveTime,
    GemmRate,
    Measurements,
    MemoryRate,
    Operation,
    PairRate,
)

OPERATIONS: tuple[Operation, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send_recv",
)
_KIB, _MIB = 2**10, 2**20
# Powers of four up to where bandwidth grows no more: 256 MiB on NVLink, 4 MiB through the host.
_LARGEST_BYTES = {"cuda": 256 * _MIB, "cpu": 4 * _MIB}
_PAIR_BYTES = {"cuda": 128 * _MIB, "cpu": 4 * _MIB}
_COPY_BYTES = {"cuda": 1024 * _MIB, "cpu": 64 * _MIB}  # past every cache
_LATENCY_BYTES = _KIB
# Bytes of all calls in a sample, so that small ones are timed well and large ones quickly.
_SAMPLE_BYTES = {"cuda": 64 * _MIB, "cpu": 8 * _MIB}
_ROUNDS = {"cuda": 5, "cpu": 3}
_COPY_ROUNDS = 24  # of half a millisecond each
# Weights of 128 MiB in 16 bits do not fit into an L2 cache of 50 to 126 MB.
_GEMMS: dict[str, tuple[tuple[str, int, int, int], ...]] = {
    "cuda": (
        ("bfloat16", 16, 8192, 8192),
        ("bfloat16", 256, 8192, 8192),
        ("bfloat16", 4096, 4096, 4096),
        ("bfloat16", 8192, 8192, 8192),
        ("float16", 8192, 8192, 8192),
        ("float8", 8192, 8192, 8192),
    ),
    "cpu": (
        ("float32", 1, 1024, 1024),
        ("float32", 32, 1024, 1024),
        ("float32", 512, 1024, 1024),
        ("bfloat16", 512, 1024, 1024),
    ),
}
_CONTROL_TIMEOUT = timedelta(minutes=4)  # the launcher gives up after five


def main() -> None:
    """Measure as this rank; rank 0 writes the result and prints what is being done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", required=True, help="index of each rank's GPU, such as 0,1,2")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    gpus = tuple(int(word) for word in arguments.gpus.split(","))
    if arguments.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        dist.init_process_group("gloo")
    gc.collect()
    gc.freeze()  # each capture collects garbage, and would go through all of torch for it
    measured = measure_rank(rank, gpus, device)
    if rank == 0:
        temporary = arguments.output.with_suffix(".part")
        temporary.write_text(measured.model_dump_json(), encoding="utf-8")
        temporary.replace(arguments.output)
    dist.destroy_process_group()


def measure_rank(rank: int, gpus: tuple[int, ...], device: torch.device) -> Measurements:
    """Return all that was measured, on rank 0; the other ranks return their part of it.

    Args:
        rank: Of this process in the default group.
        gpus: Index of each rank's GPU on its machine.
        device: Of this rank; device `i` is rank `i`'s where it is a GPU.
    """
    started_s = time.monotonic()

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.monotonic() - started_s:5.1f} s  {text}", flush=True)

    bench = _Bench(rank, gpus, device)
    say("memory and matrix products")
    memory, gemms = bench.all_of(bench.memory()), bench.all_of(bench.gemms())
    say(f"copies between {len(gpus) * (len(gpus) - 1) // 2} pairs")
    pairs = bench.pairs()
    collectives: list[CollectiveTime] = []
    for group in bench.groups():
        say(f"collectives over {len(group)}")
        collectives += bench.collectives(group)
    notes = bench.all_of(bench.notes)
    say("done")
    return Measurements(
        backend=dist.get_backend(),
        software=_software(device),
        seconds=time.monotonic() - started_s,
        pairs=tuple(pairs),
        collectives=tuple(collectives),
        memory=tuple(memory),
        gemms=tuple(gemms),
        notes=tuple(dict.fromkeys(notes)),
    )


class _Bench:
    """What one rank times, together with the others."""

    def __init__(self, rank: int, gpus: tuple[int, ...], device: torch.device) -> None:
        self.rank, self.gpus, self.device = rank, gpus, device
        self.notes: list[str] = []
        # On the host: a GPU that waits in a collective would be busy with waiting.
        self._control = _new_group(range(len(gpus)), backend="gloo", timeout=_CONTROL_TIMEOUT)
        self._groups = {size: _new_group(range(size)) for size in self._sizes()}

    def _sizes(self) -> list[int]:
        world = len(self.gpus)
        powers = [2**power for power in range(1, world.bit_length()) if 2**power <= world]
        return sorted({*powers, *([world] if world > 1 else [])})

    def groups(self) -> Iterator[tuple[int, ...]]:
        """Yield the ranks of each group: the first 2, 4, ... and all."""
        for size in self._sizes():
            yield tuple(range(size))

    def all_of(self, rows: list) -> list:
        """Return the rows of all ranks, by rank."""
        found: list[list] = [[] for _ in self.gpus]
        dist.all_gather_object(found, rows, group=self._control)
        return [row for of_rank in found for row in of_rank]

    def wait(self) -> None:
        """Return when all ranks have come here and have nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.all_reduce(torch.zeros(1), group=self._control)

    def seconds(self, call: Callable[[], object], count: int) -> float:
        """Return the seconds of one `call`, of `count` in a row."""
        call()
        call()
        if self.device.type == "cpu":
            return _timed(lambda: [call() for _ in range(count)], count)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        graph.replay()
        times_s = []
        for _ in range(_ROUNDS["cuda"]):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times_s.append(start.elapsed_time(stop) / 1e3 / count)
        del graph  # it holds NCCL work, which must go before its communicator does
        return statistics.median(times_s)

    def stream_seconds(self, call: Callable[[], object]) -> float:
        """Return the seconds of one `call` on the stream, without a graph.

        For copies within a device: captured in a graph they read 2.75 TB/s on an H200, where copies
        on a stream (`benchmarks/result.py`) read 4.1 on the same machine.
        """
        call()
        if self.device.type == "cpu":
            return _timed(call, 1)
        times_s = []
        for _ in range(_COPY_ROUNDS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times_s.append(start.elapsed_time(stop) / 1e3)
        # The first copies find memory clocks that idle.
        return statistics.median(times_s[_COPY_ROUNDS // 4 :])

    def memory(self) -> list[MemoryRate]:
        """Return the rate of large copies on this rank, while all ranks copy."""
        size = _COPY_BYTES[self.device.type]
        # Random: on zeros some kernels run faster than on data.
        source = torch.randint(0, 256, (size,), device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        self.wait()
        seconds = self.stream_seconds(lambda: target.copy_(source))
        self.wait()
        return [MemoryRate(gpu=self.gpus[self.rank], bytes_per_s=2 * size / seconds)]

    def gemms(self) -> list[GemmRate]:
        """Return the rates of matrix products on this rank, while all ranks multiply."""
        rows: list[GemmRate] = []
        for dtype, m, n, k in _GEMMS[self.device.type]:
            self.wait()
            if dtype == "float8" and torch.cuda.get_device_capability(self.device) < (8, 9):
                continue
            try:
                seconds = self.seconds(_product(dtype, m, n, k, self.device), 8)
            except (RuntimeError, AttributeError) as error:
                line = str(error).splitlines()[0][:120]
                self.notes.append(f"matrix products in {dtype} could not be timed: {line}")
                continue
            rate = 2.0 * m * n * k / seconds
            rows.append(
                GemmRate(gpu=self.gpus[self.rank], dtype=dtype, m=m, n=n, k=k, flops_per_s=rate)
            )
        self.wait()
        return rows

    def pairs(self) -> list[PairRate]:
        """Return copies both ways between all pairs of ranks, one pair at a time."""
        rows: list[PairRate] = []
        for a, b in combinations(range(len(self.gpus)), 2):
            self.wait()
            latency_s = self._ping_pong(a, b)
            self.wait()
            forth, back = self._copy(a, b), self._copy(b, a)
            values = [latency_s, forth, back]
            dist.broadcast_object_list(values, src=a, group=self._control)
            rows.append(
                PairRate(
                    a=self.gpus[a],
                    b=self.gpus[b],
                    latency_s=values[0],
                    forth_bytes_per_s=values[1],
                    back_bytes_per_s=values[2],
                )
            )
        return rows

    def _ping_pong(self, a: int, b: int) -> float:
        """Return the seconds one way of a small message that goes forth and back."""
        if self.rank not in (a, b):
            return 0.0
        buffer = torch.ones(_LATENCY_BYTES // 4, device=self.device)
        other = b if self.rank == a else a

        def send() -> None:
            dist.send(buffer, other)

        def receive() -> None:
            dist.recv(buffer, other)

        steps = (send, receive) if self.rank == a else (receive, send)
        return self.seconds(lambda: [step() for step in steps], 20) / 2

    def _copy(self, source: int, target: int) -> float:
        """Return the bytes/s of large copies from one rank's memory to another's."""
        size = _PAIR_BYTES[self.device.type]
        if self.device.type == "cpu":
            if self.rank not in (source, target):
                return 0.0
            buffer = torch.ones(size // 4)
            # The receiver's word for each lets the sender see when the bytes have arrived.
            word = torch.ones(1)

            def exchange() -> None:
                if self.rank == source:
                    dist.send(buffer, target)
                    dist.recv(word, target)
                else:
                    dist.recv(buffer, source)
                    dist.send(word, source)

            return size / self.seconds(exchange, 4)
        rate = 0.0
        if self.rank == min(source, target):
            rate = _peer_copy_bytes_per_s(size, source, target)
        self.wait()
        return rate

    def collectives(self, group: tuple[int, ...]) -> list[CollectiveTime]:
        """Return every operation at every size over the first ranks."""
        rows: list[CollectiveTime] = []
        members = tuple(self.gpus[rank] for rank in group)
        for operation in OPERATIONS:
            size = _KIB
            while size <= _LARGEST_BYTES[self.device.type]:
                self.wait()
                if self.rank in group:
                    call, actual = self._call(operation, group, size)
                    most = _SAMPLE_BYTES[self.device.type] // size
                    seconds = self.seconds(call, max(2, min(20, most)))
                    rows.append(
                        CollectiveTime(
                            operation=operation, gpus=members, size_bytes=actual, seconds=seconds
                        )
                    )
                size *= 4
        self.wait()
        return rows

    def _call(
        self, operation: Operation, group: tuple[int, ...], size: int
    ) -> tuple[Callable[[], object], int]:
        """Return an operation on buffers of its own, and the bytes that it is counted by."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        ranks = len(group)
        part = -(-size // (dtype.itemsize * ranks))
        whole = torch.zeros(part * ranks, dtype=dtype, device=self.device)
        piece = torch.zeros(part, dtype=dtype, device=self.device)
        other = torch.zeros_like(whole)
        over = self._groups[ranks]
        after, before = (self.rank + 1) % ranks, (self.rank - 1) % ranks

        def send_recv() -> None:
            steps = [
                dist.P2POp(dist.isend, whole, after, over),
                dist.P2POp(dist.irecv, other, before, over),
            ]
            for work in dist.batch_isend_irecv(steps):
                work.wait()

        calls: dict[Operation, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(whole, group=over),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, piece, group=over),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(piece, whole, group=over),
            "all_to_all": lambda: dist.all_to_all_single(other, whole, group=over),
            "send_recv": send_recv,
        }
        return calls[operation], whole.numel() * dtype.itemsize


def _new_group(ranks: range, **options: Any) -> dist.ProcessGroup | None:
    """Return a group of `ranks`, None on a rank outside; every rank must call this."""
    made = dist.new_group(list(ranks), **options)
    return made if isinstance(made, dist.ProcessGroup) else None


def _timed(call: Callable[[], object], count: int) -> float:
    """Return the seconds of one of `count` calls, the best of some rounds.

    Not the median: other work on the machine only ever slows one down.
    """
    times_s = []
    for _ in range(_ROUNDS["cpu"]):
        start_s = time.perf_counter()
        call()
        times_s.append((time.perf_counter() - start_s) / count)
    return min(times_s)


def _peer_copy_bytes_per_s(size: int, source: int, target: int) -> float:
    """Return the bytes/s of copies by the driver between two GPUs, on the source's stream."""
    data = torch.ones(size, dtype=torch.uint8, device=f"cuda:{source}")
    there = torch.empty(size, dtype=torch.uint8, device=f"cuda:{target}")
    times_s = []
    with torch.cuda.device(source):
        there.copy_(data)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        for _ in range(_ROUNDS["cuda"]):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            there.copy_(data, non_blocking=True)
            stop.record()
            stop.synchronize()
            times_s.append(start.elapsed_time(stop) / 1e3)
    torch.cuda.synchronize(target)
    return size / statistics.median(times_s)


def _product(dtype: str, m: int, n: int, k: int, device: torch.device) -> Callable[[], object]:
    if dtype == "float8":
        a = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
        b = torch.randn(n, k, device=device).to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        scaled_mm, result = torch.ops.aten._scaled_mm, torch.bfloat16
        return lambda: scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=result)
    kind = getattr(torch, dtype)
    left = torch.randn(m, k, device=device, dtype=kind)
    right = torch.randn(n, k, device=device, dtype=kind).t()  # as weights lie
    out = torch.empty(m, n, device=device, dtype=kind)
    return lambda: torch.mm(left, right, out=out)


def _software(device: torch.device) -> str:
    if device.type == "cpu":
        return f"torch {torch.__version__}"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}"


if __name__ == "__main__":
    main()
