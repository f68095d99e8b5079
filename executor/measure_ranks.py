"""`Ranks`: who measures, how they wait for each other, and how a call is timed.

On GPUs each sample is a replayed CUDA graph, as the engine's decode steps are, so that launches
cost what they cost there.
"""

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rankwright.executor.sustained import SAMPLE_S, SETTLE_S, CudaMark, sustained_s

_ROUNDS = {"cuda": 5, "cpu": 3}
_COPY_ROUNDS = 24  # of half a millisecond each
_CONTROL_TIMEOUT = timedelta(minutes=4)  # the launcher gives up after five

Place = tuple[int, int]


class Ranks:
    """The ranks of a measurement, seen from one of them.

    Attributes:
        rank: Of this process in the default group.
        places: Machine and GPU index of each rank, in order of machines.
        device: Of this rank; device `i` is the `i`-th rank's of the machine where it is a GPU.
        node: Machine of this rank.
        gpu: Index of this rank's GPU on it.
        local: Ranks of this machine.
        notes: What this rank could not time.
    """

    def __init__(self, rank: int, places: tuple[Place, ...], device: torch.device) -> None:
        """Make the groups that ranks wait in; all ranks must call this together."""
        self.rank, self.places, self.device = rank, places, device
        self.node, self.gpu = places[rank]
        self.notes: list[str] = []
        self.local = self.of_node(self.node)
        # On the host: a GPU that waits in a collective would be busy with waiting.
        self._all = new_group(range(len(places)), backend="gloo", timeout=_CONTROL_TIMEOUT)
        self._local = self._all
        if self.num_nodes > 1:
            for node in range(self.num_nodes):
                made = new_group(self.of_node(node), backend="gloo", timeout=_CONTROL_TIMEOUT)
                self._local = made if node == self.node else self._local

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return len({node for node, _ in self.places})

    def of_node(self, node: int) -> tuple[int, ...]:
        """Return the ranks of a machine."""
        return tuple(rank for rank, place in enumerate(self.places) if place[0] == node)

    def all_of(self, rows: list[Any]) -> list[Any]:
        """Return the rows of all ranks, by rank."""
        found: list[list[Any]] = [[] for _ in self.places]
        dist.all_gather_object(found, rows, group=self._all)
        return [row for of_rank in found for row in of_rank]

    def wait(self) -> None:
        """Return when all ranks of this machine have come here and have nothing left to do."""
        self._finish()
        dist.all_reduce(torch.zeros(1), group=self._local)

    def wait_all(self, value: float = 0.0) -> float:
        """Return the largest `value` of any rank, once all of all machines have come here."""
        self._finish()
        most = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._all)
        return float(most)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], count: int) -> float:
        """Return the seconds of one `call`, of `count` in a row.

        Args:
            call: What is timed.
            count: Calls in a sample.
        """
        call()
        call()
        if self.device.type == "cpu":
            return _timed(lambda: [call() for _ in range(count)], count)
        graph = self._captured(call, count)
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

    def sustained_seconds(
        self,
        call: Callable[[], object],
        count: int,
        *,
        settle_s: float = SETTLE_S,
        sample_s: float = SAMPLE_S,
    ) -> float:
        """Return the seconds of one `call` at the clock that the device keeps under it.

        Args:
            call: What is timed.
            count: Calls in a round; on a GPU a round is a graph, and rounds follow without a pause.
            settle_s: On a GPU, seconds of calls before those that count.
            sample_s: On a GPU, seconds of calls that count.
        """
        if self.device.type == "cpu":
            return self.seconds(call, count)
        call()
        call()
        graph = self._captured(call, count)
        round_s = sustained_s(graph.replay, CudaMark, settle_s=settle_s, sample_s=sample_s)
        del graph
        return round_s / count

    def _captured(self, call: Callable[[], object], count: int) -> torch.cuda.CUDAGraph:
        """Return a graph of `count` calls that has run once."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        graph.replay()
        return graph

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


def new_group(ranks: "range | tuple[int, ...]", **options: Any) -> dist.ProcessGroup | None:
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
