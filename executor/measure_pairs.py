"""Times copies and small messages between the pairs of GPUs of each machine."""

import statistics
from itertools import combinations

import torch
import torch.distributed as dist

from rankwright.executor.measure_ranks import Ranks
from rankwright.topology.measurements import PairRate

_MIB = 2**20
_PAIR_BYTES = {"cuda": 128 * _MIB, "cpu": 4 * _MIB}
_LATENCY_BYTES = 1024
_COPIES = 5


def time_pairs(ranks: Ranks) -> list[PairRate]:
    """Return copies both ways between all pairs of a machine, one pair at a time.

    Each row is on one rank only. Copies are the driver's; where a process may not use the GPU of
    another, as in the exclusive-process compute mode, they are messages of NCCL, and a note tells.
    """
    direct = ranks.device.type == "cuda" and may_use_others(ranks)
    rows: list[PairRate] = []
    for a, b in combinations(ranks.local, 2):
        ranks.wait()
        latency_s = ping_pong_s(ranks, a, b)
        ranks.wait()
        if direct:
            forth = _driver_copy(ranks, a, b, by=a)
            back = _driver_copy(ranks, b, a, by=a)
        else:
            size = _PAIR_BYTES[ranks.device.type]
            forth = message_rate(ranks, a, b, size)
            back = message_rate(ranks, b, a, size)
        if ranks.rank == a:
            rows.append(
                PairRate(
                    node=ranks.node,
                    a=ranks.places[a][1],
                    b=ranks.places[b][1],
                    latency_s=latency_s,
                    forth_bytes_per_s=forth,
                    back_bytes_per_s=back,
                )
            )
    ranks.wait()
    return rows


def ping_pong_s(ranks: Ranks, a: int, b: int) -> float:
    """Return the seconds one way of a small message that goes forth and back, 0 on other ranks."""
    if ranks.rank not in (a, b):
        return 0.0
    buffer = torch.ones(_LATENCY_BYTES // 4, device=ranks.device)
    other = b if ranks.rank == a else a

    def send() -> None:
        dist.send(buffer, other)

    def receive() -> None:
        dist.recv(buffer, other)

    steps = (send, receive) if ranks.rank == a else (receive, send)
    return ranks.seconds(lambda: [step() for step in steps], 20) / 2


def message_rate(ranks: Ranks, source: int, target: int, size: int, count: int = 4) -> float:
    """Return the bytes/s of large messages from one rank to another, 0 on other ranks."""
    if ranks.rank not in (source, target):
        return 0.0
    buffer = torch.ones(size // 4, device=ranks.device)
    # The receiver's word for each lets the sender see when the bytes have arrived.
    word = torch.ones(1, device=ranks.device)

    def exchange() -> None:
        if ranks.rank == source:
            dist.send(buffer, target)
            dist.recv(word, target)
        else:
            dist.recv(buffer, source)
            dist.send(word, source)

    return size / ranks.seconds(exchange, count)


def may_use_others(ranks: Ranks) -> bool:
    """Return whether every rank may open the GPU of another rank of its machine."""
    refused = ""
    position = ranks.local.index(ranks.rank)
    try:
        torch.zeros(1, device=f"cuda:{(position + 1) % len(ranks.local)}")
    except RuntimeError as error:
        refused = str(error).splitlines()[0][:120]
    if not any(ranks.all_of([refused])):
        return True
    if refused:
        ranks.notes.append(
            "no process may use the GPU of another (exclusive-process compute mode?): pairs are "
            f"timed with messages of NCCL in place of copies by the driver ({refused})"
        )
    return False


def _driver_copy(ranks: Ranks, source: int, target: int, *, by: int) -> float:
    """Return the bytes/s of copies by the driver between the GPUs of two ranks, on rank `by`."""
    rate = 0.0
    if ranks.rank == by:
        first = ranks.local[0]
        rate = _peer_copy_bytes_per_s(_PAIR_BYTES["cuda"], source - first, target - first)
    ranks.wait()
    return rate


def _peer_copy_bytes_per_s(size: int, source: int, target: int) -> float:
    """Return the bytes/s of copies by the driver between two devices, on the source's stream."""
    data = torch.ones(size, dtype=torch.uint8, device=f"cuda:{source}")
    there = torch.empty(size, dtype=torch.uint8, device=f"cuda:{target}")
    times_s = []
    with torch.cuda.device(source):
        there.copy_(data)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        for _ in range(_COPIES):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            there.copy_(data, non_blocking=True)
            stop.record()
            stop.synchronize()
            times_s.append(start.elapsed_time(stop) / 1e3)
    torch.cuda.synchronize(target)
    return size / statistics.median(times_s)
