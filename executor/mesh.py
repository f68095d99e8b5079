"""`Mesh`: the process groups of one rank, and the collectives that the layers call.

Every layer is written once, against a mesh: a group of one makes a collective a no-op, so one rank
runs the same code as many. Activations travel over NCCL on GPUs and gloo on CPUs; control messages
(step batches, sampled tokens) always over gloo, from host memory.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rankwright.planner.plan import Plan, RankPlan

# gloo raises as soon as a peer's socket closes; the timeout only bounds a peer that hangs. Idle
# leaders send a heartbeat every few seconds, so silence this long means a dead replica.
CONTROL_TIMEOUT = timedelta(minutes=10)
# What one control broadcast carries without a second one: a decode step of some 100 sequences.
CONTROL_BYTES = 16384


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks of the world that talk to each other; `process_group` is None for one rank."""

    ranks: tuple[int, ...]
    process_group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)


class Mesh:
    """This rank's place and its groups.

    Attributes:
        place: This rank's row of the plan.
        device: Where its tensors live.
        tp: Ranks that share each layer of this stage.
        control: All ranks of the replica, over gloo; the leader is the first.
        results: The same ranks over another gloo group, for sampled tokens.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        """Make every group; all ranks of the plan must call this together.

        Groups are made in the same order on each rank, as `dist.new_group` needs.
        """
        split = plan.split
        self.place: RankPlan = plan.ranks[rank]
        self.device = device
        self.num_stages = split.pp
        self.vocab_ranges = tuple(
            other.vocab
            for other in plan.ranks
            if (other.replica, other.stage) == (self.place.replica, self.place.stage)
        )
        self._previous = Group((rank,), None)
        self._next = Group((rank,), None)
        per_replica = split.tp * split.pp
        for first in range(0, len(plan.ranks), per_replica):
            replica = tuple(range(first, first + per_replica))
            control, results = _gloo_group(replica), _gloo_group(replica)
            if rank in replica:
                self.control, self.results = control, results
            for stage in range(split.pp):
                ranks = replica[stage * split.tp : (stage + 1) * split.tp]
                group = _device_group(ranks)
                if rank in ranks:
                    self.tp = group
                if stage == 0:
                    continue
                for receiver in ranks:
                    pair = _device_group((receiver - split.tp, receiver))
                    if rank == receiver:
                        self._previous = pair
                    elif rank == receiver - split.tp:
                        self._next = pair

    @property
    def is_leader(self) -> bool:
        """Whether this rank schedules its replica."""
        return self.place.stage == 0 and self.place.tp_rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.place.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.place.stage == self.num_stages - 1

    @property
    def is_sampler(self) -> bool:
        """Whether this rank draws the tokens of its replica."""
        return self.is_last_stage and self.place.tp_rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over the TP group, in place."""
        if self.tp.size > 1:
            dist.all_reduce(tensor, group=self.tp.process_group)
        return tensor

    def all_gather_columns(self, shard_BV: torch.Tensor) -> torch.Tensor:
        """Return the vocabulary columns of all TP ranks side by side, [B, vocab].

        Shards of an odd vocabulary differ by one column, so each is padded to the widest.
        """
        if self.tp.size == 1:
            return shard_BV
        widths = [stop - start for start, stop in self.vocab_ranges]
        widest = max(widths)
        padded = shard_BV
        if shard_BV.shape[1] < widest:
            padded = torch.nn.functional.pad(shard_BV, (0, widest - shard_BV.shape[1]))
        out = shard_BV.new_empty(self.tp.size, shard_BV.shape[0], widest)
        dist.all_gather_into_tensor(
            out.view(-1, widest), padded.contiguous(), group=self.tp.process_group
        )
        return torch.cat([out[i, :, :width] for i, width in enumerate(widths)], dim=1)

    def send_to_next(self, hidden_TD: torch.Tensor) -> "dist.Work | None":
        """Start sending to the same rank of the next stage; keep the tensor until it is done."""
        return dist.isend(hidden_TD, self._next.ranks[1], group=self._next.process_group)

    def receive_from_previous(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Fill `hidden_TD` from the same rank of the previous stage."""
        dist.recv(hidden_TD, self._previous.ranks[0], group=self._previous.process_group)
        return hidden_TD

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Return the leader's `data` on every rank of the replica."""
        if self.control.size == 1:
            assert data is not None
            return data
        source, group = self.control.ranks[0], self.control.process_group
        room = CONTROL_BYTES - 8
        head = bytearray(CONTROL_BYTES)
        if data is not None:
            head[:8] = len(data).to_bytes(8, "little")
            head[8 : 8 + min(len(data), room)] = data[:room]
        # `frombuffer` shares memory, so the broadcast fills `head` in place.
        dist.broadcast(torch.frombuffer(head, dtype=torch.uint8), source, group=group)
        size = int.from_bytes(head[:8], "little")
        if size <= room:
            return bytes(head[8 : 8 + size])
        rest = bytearray(size - room) if data is None else bytearray(data[room:])
        dist.broadcast(torch.frombuffer(rest, dtype=torch.uint8), source, group=group)
        return bytes(head[8:] + rest)

    def gather_integers(self, value: int) -> list[int]:
        """Return every replica rank's `value`, in rank order."""
        if self.control.size == 1:
            return [value]
        out = [torch.zeros(1, dtype=torch.int64) for _ in self.control.ranks]
        dist.all_gather(out, torch.tensor([value]), group=self.control.process_group)
        return [int(one) for one in out]

    @property
    def sampler_rank(self) -> int:
        """World rank that draws the tokens of this replica."""
        return self.control.ranks[(self.num_stages - 1) * self.tp.size]


def _gloo_group(ranks: tuple[int, ...]) -> Group:
    if len(ranks) == 1:
        return Group(ranks, None)
    return Group(ranks, dist.new_group(list(ranks), timeout=CONTROL_TIMEOUT, backend="gloo"))


def _device_group(ranks: tuple[int, ...]) -> Group:
    """A group over the default backend: NCCL on GPUs, gloo on CPUs."""
    if len(ranks) == 1:
        return Group(ranks, None)
    return Group(ranks, dist.new_group(list(ranks)))
