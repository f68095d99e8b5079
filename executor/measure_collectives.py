"""Times collectives over growing groups of GPUs, within each machine and over several."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from rankwright.executor.measure_ranks import Ranks, new_group
from rankwright.topology.measurements import CollectiveTime, Operation

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
_LARGEST_WIDE_BYTES = {"cuda": 64 * _MIB, "cpu": 4 * _MIB}
# Bytes of all calls in a sample, so that small ones are timed well and large ones quickly.
_SAMPLE_BYTES = {"cuda": 64 * _MIB, "cpu": 8 * _MIB}
# A network of 1 Gb/s would take minutes for the largest sizes: past such a call none is larger.
_LONG_S = 0.05


def sizes_of(count: int) -> list[int]:
    """Return how many of `count` each group has: 2, 4, ... and all.

    >>> sizes_of(6), sizes_of(1)
    ([2, 4, 6], [])
    """
    powers = [2**power for power in range(1, count.bit_length()) if 2**power <= count]
    return sorted({*powers, *([count] if count > 1 else [])})


class Collectives:
    """Groups of ranks, and what is timed over them."""

    def __init__(self, ranks: Ranks) -> None:
        """Make the groups; all ranks must call this together."""
        self._ranks = ranks
        first = [ranks.of_node(node) for node in range(ranks.num_nodes)]
        self._within = [[of_node[:size] for size in sizes_of(len(of_node))] for of_node in first]
        lanes = min(len(of_node) for of_node in first)
        self._over = [
            tuple(rank for of_node in first[:count] for rank in of_node[:width])
            for count in sizes_of(ranks.num_nodes)
            for width in sorted({1, lanes})
        ]
        every = [*(group for of_node in self._within for group in of_node), *self._over]
        self._groups = {group: new_group(group) for group in dict.fromkeys(every)}

    def within(self, say: Callable[[str], None]) -> list[CollectiveTime]:
        """Return every operation at every size over the first GPUs of this machine."""
        rows: list[CollectiveTime] = []
        for group in self._within[self._ranks.node]:
            say(f"collectives over {len(group)}")
            for operation in OPERATIONS:
                size = _KIB
                while size <= _LARGEST_BYTES[self._ranks.device.type]:
                    self._ranks.wait()
                    rows += self._time(operation, group, size)
                    size *= 4
            self._ranks.wait()
        return [row for row in rows if self._ranks.rank == self._ranks.local[0]]

    def over(self, say: Callable[[str], None]) -> list[CollectiveTime]:
        """Return the same over one GPU, and over all, of each of the first machines."""
        rows: list[CollectiveTime] = []
        for group in self._over:
            nodes = len({self._ranks.places[rank][0] for rank in group})
            say(f"collectives over {len(group)} on {nodes} machines")
            for operation in OPERATIONS:
                size = _KIB
                while size <= _LARGEST_WIDE_BYTES[self._ranks.device.type]:
                    self._ranks.wait_all()
                    made = self._time(operation, group, size)
                    rows += made
                    if (
                        self._ranks.wait_all(max((row.seconds for row in made), default=0))
                        > _LONG_S
                    ):
                        break
                    size *= 4
        return [row for row in rows if self._ranks.rank == 0]

    def _time(
        self, operation: Operation, group: tuple[int, ...], size: int
    ) -> list[CollectiveTime]:
        ranks = self._ranks
        if ranks.rank not in group:
            return []
        call, actual = self._call(operation, group, size)
        most = _SAMPLE_BYTES[ranks.device.type] // size
        seconds = ranks.seconds(call, max(2, min(20, most)))
        places = [ranks.places[rank] for rank in group]
        return [
            CollectiveTime(
                operation=operation,
                gpus=tuple(gpu for node, gpu in places if node == places[0][0]),
                nodes=tuple(dict.fromkeys(node for node, _ in places)),
                size_bytes=actual,
                seconds=seconds,
            )
        ]

    def _call(
        self, operation: Operation, group: tuple[int, ...], size: int
    ) -> tuple[Callable[[], object], int]:
        """Return an operation on buffers of its own, and the bytes that it is counted by."""
        device = self._ranks.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        count = len(group)
        part = -(-size // (dtype.itemsize * count))
        whole = torch.zeros(part * count, dtype=dtype, device=device)
        piece = torch.zeros(part, dtype=dtype, device=device)
        other = torch.zeros_like(whole)
        over = self._groups[group]
        at = group.index(self._ranks.rank)
        after, before = group[(at + 1) % count], group[at - 1]

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
