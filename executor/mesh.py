"""`Mesh`: the process groups of one rank, and the collectives that the layers call.

Every layer is written once, against a mesh: a group of one makes a collective a no-op, so one rank
runs the same code as many. Activations travel over NCCL on GPUs and gloo on CPUs; what the leader
of a replica tells its ranks goes by `control.py`.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from rankwright.executor.control import Control, control_group
from rankwright.executor.expert_memory import ExpertMemory
from rankwright.executor.groups import Group, make_group
from rankwright.executor.peer_memory import PeerMemory, open_peer_memory
from rankwright.kernels.rms_norm import rms_norm
from rankwright.planner.plan import Plan, RankPlan


class Mesh:
    """This rank's place and its groups.

    Attributes:
        plan: What all ranks run.
        place: This rank's row of it.
        device: Where its tensors live.
        tp: Ranks that share each layer of this stage, for the same part of the context.
        cp: Ranks of this stage with the same weights, each with its part of the context.
        expert_slots: Where experts are, if not each rank's range of them.
        counts_experts: Count how often experts are chosen also where they are in no slots.
        ep: Ranks of `tp` that share the experts out: those with the same part of each expert.
        expert_memory: What layers hand tokens to experts through, once one of them has opened it.
        control: All ranks of the replica, over gloo; the leader is the first.
        results: The same ranks over another gloo group, for sampled tokens.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        """Make every group; all ranks of the plan must call this together.

        Groups are made in the same order on each rank, as `dist.new_group` needs.
        """
        self._take_place(plan, rank, device)
        split = plan.split
        per_replica = split.gpus_per_replica
        for first in range(0, len(plan.ranks), per_replica):
            replica = tuple(range(first, first + per_replica))
            control, results = control_group(replica), control_group(replica)
            if rank in replica:
                self.control, self.results = control, results
            for stage in range(split.pp):
                self._make_stage_groups(replica, stage)
        self._control = Control(
            self.control,
            rank,
            one_machine=self._is_one_machine(self.control),
            spins=device.type == "cuda",
        )

    def _take_place(self, plan: Plan, rank: int, device: torch.device) -> None:
        """Set what needs no other rank."""
        split = plan.split
        self.plan = plan
        self.place: RankPlan = plan.ranks[rank]
        self.device = device
        self.num_stages = split.pp
        self.split = split
        self.expert_slots = plan.expert_slots
        self.counts_experts = False
        self.vocab_ranges = tuple(
            other.vocab
            for other in plan.ranks
            if (other.replica, other.stage, other.cp_rank)
            == (self.place.replica, self.place.stage, self.place.cp_rank)
        )
        self._peers: PeerMemory | None = None
        self.expert_memory: ExpertMemory | None = None
        self._nodes = [place.node for place in plan.ranks]
        self._previous = Group((rank,), None)
        self._next = Group((rank,), None)
        self.cp = self.ep = Group((rank,), None)

    @property
    def is_one_machine(self) -> bool:
        """Whether all ranks of this replica are on one machine."""
        return self._is_one_machine(self.control)

    def _is_one_machine(self, group: Group) -> bool:
        return len({self._nodes[rank] for rank in group.ranks}) == 1

    def _make_stage_groups(self, replica: tuple[int, ...], stage: int) -> None:
        """Make the groups inside one stage, and the pairs with the stage before."""
        rank, split = self.place.rank, self.split
        size = split.tp * split.cp
        ranks = replica[stage * size : (stage + 1) * size]
        for cp_rank in range(split.cp):
            members = ranks[cp_rank * split.tp : (cp_rank + 1) * split.tp]
            tp = make_group(members)
            if rank in members:
                self.tp = tp
            if split.ep == split.tp:
                self.ep = tp if rank in members else self.ep
                continue
            for moe_tp_rank in range(split.moe_tp if split.ep > 1 else 0):
                sharers = members[moe_tp_rank :: split.moe_tp]
                ep = make_group(sharers)
                if rank in sharers:
                    self.ep = ep
        for tp_rank in range(split.tp if split.cp > 1 else 0):
            members = ranks[tp_rank :: split.tp]
            cp = make_group(members)
            if rank in members:
                self.cp = cp
        for receiver in ranks if stage else ():
            pair = make_group((receiver - size, receiver))
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
        return self.tp.summed(tensor)

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
        return self.tp.gathered(rows_TD).flatten(0, 1)

    def sum_tokens(self, parts_TD: torch.Tensor) -> torch.Tensor:
        """Return the sum over the TP group of what its ranks made of `gather_tokens`' rows.

        With attention TP of all rows; with attention DP of this rank's own. The parts are lost.
        """
        if self.attention_ranks == 1:
            return self.all_reduce(parts_TD)
        return self.tp.summed_share(parts_TD)

    def gather_context(self, part: torch.Tensor) -> torch.Tensor:
        """Return the parts of all ranks of the CP group, [cp, ...]."""
        return part.unsqueeze(0) if self.cp.size == 1 else self.cp.gathered(part)

    def pass_round(self, part: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the equally large parts of the CP group, each with the cp_rank whose it is.

        This rank's own first, then those of the ranks before it. While a part is worked on, it is
        already on its way to the next rank, and the part after it on its way here.
        """
        size, here = self.cp.size, self.place.cp_rank
        after, before = self.cp.ranks[(here + 1) % size], self.cp.ranks[here - 1]
        group = self.cp.process_group
        for step in range(size):
            is_last = step == size - 1
            arriving = part if is_last else torch.empty_like(part)
            ways = [
                dist.P2POp(dist.isend, part, after, group),
                dist.P2POp(dist.irecv, arriving, before, group),
            ]
            under_way = [] if is_last else dist.batch_isend_irecv(ways)
            yield (here - step) % size, part
            for work in under_way:
                work.wait()
            part = arriving

    def sum_context(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """Return the sum of `rows_RD` over the CP group; what it held may be gone."""
        return rows_RD if self.cp.size == 1 else self.cp.summed(rows_RD)

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
        out_RBV = self.tp.gathered(padded)
        return torch.cat([out_RBV[i, :, :width] for i, width in enumerate(widths)], dim=1)

    def send_to_next(self, hidden_TD: torch.Tensor) -> "dist.Work | None":
        """Start sending to the same rank of the next stage; keep the tensor until it is done."""
        return dist.isend(hidden_TD, self._next.ranks[1], group=self._next.process_group)

    def receive_from_previous(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Fill `hidden_TD` from the same rank of the previous stage."""
        dist.recv(hidden_TD, self._previous.ranks[0], group=self._previous.process_group)
        return hidden_TD

    def tell(self, data: bytes) -> None:
        """Start sending the leader's `data` to every rank of the replica, without waiting."""
        self._control.tell(data)

    def hear(self) -> bytes:
        """Return what the leader of this replica says next."""
        return self._control.hear()

    def has_heard(self) -> bool:
        """Whether the leader has said something; without shared memory nobody can tell: False."""
        return self._control.has_heard()

    def finish(self) -> None:
        """Wait until all ranks of the replica have heard everything and are here too."""
        self._control.finish()

    def gather_integers(self, value: int) -> list[int]:
        """Return every replica rank's `value`, in rank order."""
        return self._control.gather_integers(value)

    @property
    def first_stage_ranks(self) -> tuple[int, ...]:
        """World ranks that embed the tokens of this replica; the leader is the first."""
        return self.control.ranks[: self.split.tp * self.split.cp]

    @property
    def sampler_rank(self) -> int:
        """World rank that draws the tokens of this replica."""
        return self.control.ranks[(self.num_stages - 1) * self.split.tp * self.split.cp]
