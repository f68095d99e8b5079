"""`Mesh`: the process groups of one rank, and the collectives that the layers call.

Every layer is written once, against a mesh: a group of one makes a collective a no-op, so one rank
runs the same code as many. Activations travel over NCCL on GPUs and gloo on CPUs; step batches
through shared memory where a replica is on one machine, else, as sampled tokens, over gloo.
"""

from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rankwright.executor.expert_memory import ExpertMemory
from rankwright.executor.peer_memory import PeerMemory, open_peer_memory
from rankwright.executor.shared_channel import SharedChannel, is_supported
from rankwright.kernels.rms_norm import rms_norm
from rankwright.planner.plan import Plan, RankPlan

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
        plan: What all ranks run.
        place: This rank's row of it.
        device: Where its tensors live.
        tp: Ranks that share each layer of this stage, for the same part of the context.
        cp: Ranks of this stage with the same weights, each with its part of the context.
        expert_slots: Where experts are, if not each rank's range of them.
        ep: Ranks of `tp` that share the experts out: those with the same part of each expert.
        expert_memory: What layers hand tokens to experts through, once one of them has opened it.
        control: All ranks of the replica, over gloo; the leader is the first.
        results: The same ranks over another gloo group, for sampled tokens.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        """Make every group; all ranks of the plan must call this together.

        Groups are made in the same order on each rank, as `dist.new_group` needs.
        """
        split = plan.split
        self.plan = plan
        self.place: RankPlan = plan.ranks[rank]
        self.device = device
        self.num_stages = split.pp
        self.split = split
        self.expert_slots = plan.expert_slots
        self._telling: deque[tuple[dist.Work, bytearray]] = deque()
        self.vocab_ranges = tuple(
            other.vocab
            for other in plan.ranks
            if (other.replica, other.stage, other.cp_rank)
            == (self.place.replica, self.place.stage, self.place.cp_rank)
        )
        self._channel: SharedChannel | None = None
        self._peers: PeerMemory | None = None
        self.expert_memory: ExpertMemory | None = None
        self._nodes = [place.node for place in plan.ranks]
        self._previous = Group((rank,), None)
        self._next = Group((rank,), None)
        self.cp = self.ep = Group((rank,), None)
        per_replica = split.gpus_per_replica
        for first in range(0, len(plan.ranks), per_replica):
            replica = tuple(range(first, first + per_replica))
            control, results = _gloo_group(replica), _gloo_group(replica)
            if rank in replica:
                self.control, self.results = control, results
            for stage in range(split.pp):
                self._make_stage_groups(replica, stage)
        if self.control.size > 1:
            self._open_channel(one_machine=self._is_one_machine(self.control))

    def _is_one_machine(self, group: Group) -> bool:
        return len({self._nodes[rank] for rank in group.ranks}) == 1

    def _make_stage_groups(self, replica: tuple[int, ...], stage: int) -> None:
        """Make the groups inside one stage, and the pairs with the stage before."""
        rank, split = self.place.rank, self.split
        size = split.tp * split.cp
        ranks = replica[stage * size : (stage + 1) * size]
        for cp_rank in range(split.cp):
            members = ranks[cp_rank * split.tp : (cp_rank + 1) * split.tp]
            tp = _device_group(members)
            if rank in members:
                self.tp = tp
            if split.ep == split.tp:
                self.ep = tp if rank in members else self.ep
                continue
            for moe_tp_rank in range(split.moe_tp if split.ep > 1 else 0):
                sharers = members[moe_tp_rank :: split.moe_tp]
                ep = _device_group(sharers)
                if rank in sharers:
                    self.ep = ep
        for tp_rank in range(split.tp if split.cp > 1 else 0):
            members = ranks[tp_rank :: split.tp]
            cp = _device_group(members)
            if rank in members:
                self.cp = cp
        for receiver in ranks if stage else ():
            pair = _device_group((receiver - size, receiver))
            if rank == receiver:
                self._previous = pair
            elif rank == receiver - size:
                self._next = pair

    @property
    def is_leader(self) -> bool:
        """Whether this rank schedules its replica."""
        return self.place.stage == 0 and self._is_first_of_stage

    @property
    def _is_first_of_stage(self) -> bool:
        return self.place.cp_rank == 0 and self.place.tp_rank == 0

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
        return self.is_last_stage and self._is_first_of_stage

    def open_peer_memory(self, *, max_rows: int, dim: int, dtype: torch.dtype) -> None:
        """Share memory within the TP group for sums of up to `max_rows` rows, where that works."""
        if self.attention_ranks > 1:
            return  # sums leave each rank with its own rows only
        self._peers = open_peer_memory(
            self.tp.process_group,
            one_machine=self._is_one_machine(self.tp),
            max_rows=max_rows,
            dim=dim,
            dtype=dtype,
            device=self.device,
        )

    def begin_step(self) -> None:
        """Say that the sums of another step follow."""
        if self._peers is not None:
            self._peers.begin()

    def part(self, num_rows: int, dim: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return where this rank's part of the next sum is best computed, None: anywhere."""
        return None if self._peers is None else self._peers.part(num_rows, dim, dtype)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over the TP group; what it held may be gone."""
        if self.tp.size == 1:
            return tensor
        if self._peers is not None:
            total = self._peers.sum(tensor)
            if total is not None:
                return total
        dist.all_reduce(tensor, group=self.tp.process_group)
        return tensor

    @property
    def attention_ranks(self) -> int:
        """Ranks of a stage with sequences of their own: its TP group with attention DP, else 1."""
        return self.split.tp if self.split.attention == "dp" else 1

    def gather_tokens(self, rows_TD: torch.Tensor) -> torch.Tensor:
        """Return the rows of all tokens that a layer cut over the TP group works on.

        With attention TP every rank has them; with attention DP each rank has its own, as many as
        every other, and they are gathered in the order of ranks.
        """
        if self.attention_ranks == 1:
            return rows_TD
        return _gathered(rows_TD, self.tp).flatten(0, 1)

    def sum_tokens(self, parts_TD: torch.Tensor) -> torch.Tensor:
        """Return the sum over the TP group of what its ranks made of `gather_tokens`' rows.

        With attention TP of all rows, in place; with attention DP of this rank's own.
        """
        if self.attention_ranks == 1:
            return self.all_reduce(parts_TD)
        out_TD = parts_TD.new_empty(len(parts_TD) // self.tp.size, *parts_TD.shape[1:])
        dist.reduce_scatter_tensor(out_TD, parts_TD.contiguous(), group=self.tp.process_group)
        return out_TD

    def gather_context(self, part: torch.Tensor) -> torch.Tensor:
        """Return the parts of all ranks of the CP group, [cp, ...]."""
        return part.unsqueeze(0) if self.cp.size == 1 else _gathered(part, self.cp)

    def sum_context(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """Return the sum of `rows_RD` over the CP group, in place."""
        if self.cp.size > 1:
            dist.all_reduce(rows_RD, group=self.cp.process_group)
        return rows_RD

    def add_norm(
        self,
        part_TD: torch.Tensor,
        weight_D: torch.Tensor,
        eps: float,
        residual_TD: torch.Tensor,
        *,
        is_whole: bool = False,
    ) -> torch.Tensor:
        """Add the sum of `part_TD` over the TP group to the residual, and return that, normalised.

        Args:
            part_TD: This rank's part; what it held may be gone.
            weight_D: Factors of the RMSNorm.
            eps: Added to the mean square.
            residual_TD: Becomes residual plus sum in place.
            is_whole: The part is all there is to add.
        """
        if is_whole:
            return rms_norm(part_TD, weight_D, eps, residual_TD=residual_TD)
        if self._peers is not None:
            out_TD = self._peers.sum(part_TD, weight_D=weight_D, eps=eps, residual_TD=residual_TD)
            if out_TD is not None:
                return out_TD
        return rms_norm(self.sum_tokens(part_TD), weight_D, eps, residual_TD=residual_TD)

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

    def tell(self, data: bytes) -> None:
        """Start sending the leader's `data` to every rank of the replica, without waiting.

        A stage that still computes an earlier batch hears this one when it is done; waiting for it
        here would let the stages of a pipeline work one after another.
        """
        if self.control.size == 1:
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

    def _open_channel(self, *, one_machine: bool) -> None:
        """Share memory with the ranks of this replica, if all of them can."""
        able = self.gather_integers(int(one_machine and is_supported()))
        if not all(able):
            return
        num_readers = self.control.size - 1
        spin_s = SPIN_S if self.device.type == "cuda" else 0.0
        if self.is_leader:
            self._channel, path = SharedChannel.create(num_readers, spin_s=spin_s)
            self._tell_over_gloo(str(path).encode())
            self.gather_integers(0)  # everybody has mapped it
            path.unlink()
        else:
            reader = self.control.ranks.index(self.place.rank) - 1
            path = Path(self._hear_over_gloo().decode())
            self._channel = SharedChannel(path, num_readers, reader, spin_s=spin_s)
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
        source, group = self.control.ranks[0], self.control.process_group
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
            self.control.ranks[0],
            group=self.control.process_group,
            async_op=True,
        )
        assert work is not None
        self._telling.append((work, data))

    def finish(self) -> None:
        """Wait until all ranks of the replica have heard everything and are here too.

        Over gloo: a barrier of the default group would make NCCL take memory that the KV cache has.
        """
        while self._telling:
            self._telling.popleft()[0].wait()
        self.gather_integers(0)

    def gather_integers(self, value: int) -> list[int]:
        """Return every replica rank's `value`, in rank order."""
        if self.control.size == 1:
            return [value]
        out = [torch.zeros(1, dtype=torch.int64) for _ in self.control.ranks]
        dist.all_gather(out, torch.tensor([value]), group=self.control.process_group)
        return [int(one) for one in out]

    @property
    def first_stage_ranks(self) -> tuple[int, ...]:
        """World ranks that embed the tokens of this replica; the leader is the first."""
        return self.control.ranks[: self.split.tp * self.split.cp]

    @property
    def sampler_rank(self) -> int:
        """World rank that draws the tokens of this replica."""
        return self.control.ranks[(self.num_stages - 1) * self.split.tp * self.split.cp]


def _gathered(part: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the equally large parts of all ranks of `group`, [ranks, ...]."""
    out = part.new_empty(group.size, *part.shape)
    dist.all_gather_into_tensor(
        out.view(-1, *part.shape[1:]), part.contiguous(), group=group.process_group
    )
    return out


def _gloo_group(ranks: tuple[int, ...]) -> Group:
    return _group(ranks, backend="gloo", timeout=CONTROL_TIMEOUT)


def _device_group(ranks: tuple[int, ...]) -> Group:
    """A group over the default backend: NCCL on GPUs, gloo on CPUs."""
    return _group(ranks)


def _group(
    ranks: tuple[int, ...], *, backend: str | None = None, timeout: timedelta | None = None
) -> Group:
    if len(ranks) == 1:
        return Group(ranks, None)
    made = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    # Who is not in it gets a placeholder.
    return Group(ranks, made if isinstance(made, dist.ProcessGroup) else None)
