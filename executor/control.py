"""`Control`: how the leader of a replica tells its ranks what to compute.

Through shared memory where the replica is on one machine, else over gloo, which also carries
sampled tokens.
"""

from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rankwright.executor.groups import Group, make_group
from rankwright.executor.shared_channel import SharedChannel, is_supported

# gloo raises as soon as a peer's socket closes; the timeout only bounds a peer that hangs. Idle
# leaders send a heartbeat every few seconds, so silence this long means a dead replica.
CONTROL_TIMEOUT = timedelta(minutes=10)
# What one control broadcast carries without a second one: a decode step of some 100 sequences.
CONTROL_BYTES = 16384
# Control broadcasts on their way at most: a pipeline has as many steps in flight as stages, each of
# one or two broadcasts.
MAX_TELLING = 64
# How long a rank beside a GPU looks for the next batch without sleeping: longer than a step, so
# that it never sleeps while its replica is busy.
SPIN_S = 0.05


def control_group(ranks: tuple[int, ...]) -> Group:
    """Return a gloo group of the ranks of a replica; every rank of the world must call this."""
    return make_group(ranks, backend="gloo", timeout=CONTROL_TIMEOUT)


class Control:
    """What the ranks of one replica say to each other, besides tensors.

    Args:
        group: All ranks of the replica, over gloo; the first of them leads.
        rank: This one.
        one_machine: Whether they are all on one.
        spins: Whether to look for news without sleeping, as beside a GPU.
    """

    def __init__(self, group: Group, rank: int, *, one_machine: bool, spins: bool) -> None:
        self._group = group
        self._rank = rank
        self._telling: deque[tuple[dist.Work, bytearray]] = deque()
        self._channel: SharedChannel | None = None
        if group.size > 1:
            self._open_channel(one_machine=one_machine, spin_s=SPIN_S if spins else 0.0)

    def tell(self, data: bytes) -> None:
        """Start sending the leader's `data` to every rank of the replica, without waiting.

        A stage that still computes an earlier batch hears this one when it is done; waiting for it
        here would let the stages of a pipeline work one after another.
        """
        if self._group.size == 1:
            return
        if self._channel is not None:
            self._channel.write(data)
        else:
            self._tell_over_gloo(data)

    def hear(self) -> bytes:
        """Return what the leader of this replica says next."""
        return self._hear_over_gloo() if self._channel is None else self._channel.read()

    def has_heard(self) -> bool:
        """Whether the leader has said something; without shared memory nobody can tell: False."""
        return self._channel is not None and self._channel.has_next()

    def finish(self) -> None:
        """Wait until all ranks of the replica have heard everything and are here too.

        Over gloo: a barrier of the default group would make NCCL take memory that the KV cache has.
        """
        while self._telling:
            self._telling.popleft()[0].wait()
        self.gather_integers(0)

    def gather_integers(self, value: int) -> list[int]:
        """Return every replica rank's `value`, in rank order."""
        if self._group.size == 1:
            return [value]
        out = [torch.zeros(1, dtype=torch.int64) for _ in self._group.ranks]
        dist.all_gather(out, torch.tensor([value]), group=self._group.process_group)
        return [int(one) for one in out]

    def _open_channel(self, *, one_machine: bool, spin_s: float) -> None:
        """Share memory with the ranks of this replica, if all of them can."""
        able = self.gather_integers(int(one_machine and is_supported()))
        if not all(able):
            return
        num_readers = self._group.size - 1
        place = self._group.ranks.index(self._rank)
        if place == 0:
            self._channel, path = SharedChannel.create(num_readers, spin_s=spin_s)
            self._tell_over_gloo(str(path).encode())
            self.gather_integers(0)  # everybody has mapped it
            path.unlink()
        else:
            path = Path(self._hear_over_gloo().decode())
            self._channel = SharedChannel(path, num_readers, place - 1, spin_s=spin_s)
            self.gather_integers(0)

    def _tell_over_gloo(self, data: bytes) -> None:
        room = CONTROL_BYTES - 8
        head = bytearray(CONTROL_BYTES)
        head[:8] = len(data).to_bytes(8, "little")
        head[8 : 8 + min(len(data), room)] = data[:room]
        self._start_broadcast(head)
        if len(data) > room:
            self._start_broadcast(bytearray(data[room:]))

    def _hear_over_gloo(self) -> bytes:
        source, group = self._group.ranks[0], self._group.process_group
        # `frombuffer` shares memory, so a broadcast fills the bytes in place.
        head = bytearray(CONTROL_BYTES)
        dist.broadcast(torch.frombuffer(head, dtype=torch.uint8), source, group=group)
        size = int.from_bytes(head[:8], "little")
        room = CONTROL_BYTES - 8
        if size <= room:
            return bytes(head[8 : 8 + size])
        rest = bytearray(size - room)
        dist.broadcast(torch.frombuffer(rest, dtype=torch.uint8), source, group=group)
        return bytes(head[8:] + rest)

    def _start_broadcast(self, data: bytearray) -> None:
        while self._telling and (
            len(self._telling) >= MAX_TELLING or self._telling[0][0].is_completed()
        ):
            self._telling.popleft()[0].wait()
        work = dist.broadcast(
            torch.frombuffer(data, dtype=torch.uint8),
            self._group.ranks[0],
            group=self._group.process_group,
            async_op=True,
        )
        assert work is not None
        self._telling.append((work, data))
