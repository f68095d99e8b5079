"""Slots on GPUs of several kinds in the search: their ranks, and the pools with unequal shares.

For slots whose GPUs are alike, and for forms in which shares must be equal, there is nothing here:
one rank, the fullest, stands for all, on the slowest and smallest GPU.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from rankwright.cost_model.layout import SlotKind
from rankwright.cost_model.predict import StageModels
from rankwright.cost_model.shards import Shares
from rankwright.cost_model.workload import Workload
from rankwright.planner.memory_table import MemoryTable
from rankwright.planner.pools import Pool
from rankwright.planner.shapes import Shape
from rankwright.planner.share_loads import Load, loads_of
from rankwright.planner.unequal import ShareDealer
from rankwright.topology.cluster import Gpu

Rank = tuple[Gpu, int, Shares | None]  # its GPU, its tp_rank, and the shares of its group


class UnlikeSlots:
    """Looks after slots on GPUs of several kinds."""

    def __init__(self, models: StageModels, memory: MemoryTable, workload: Workload) -> None:
        """Prepare.

        Args:
            models: Stages of the model.
            memory: Of the same model.
            workload: What is asked.
        """
        self._models, self._memory, self._workload = models, memory, workload
        self._dealer = ShareDealer(models, memory)

    def is_unlike(self, shape: Shape, kind: SlotKind) -> bool:
        """Return whether each rank of a slot of `kind` counts with its own part on its own GPU."""
        return bool(kind.members) and self._models.is_unlike(
            kind, shape.ep, shape.attention, shape.cp
        )

    def is_in(self, shape: Shape, pool: Pool) -> bool:
        """Return whether any slot of `pool` is on GPUs of several kinds."""
        return any(self.is_unlike(shape, kind) for group in pool.replicas for kind in group.stages)

    def forget(self) -> None:
        """Drop what was kept about slots."""
        self._dealer.forget()

    def ranks_of(self, shape: Shape, kinds: Iterable[SlotKind]) -> Iterator[Rank]:
        """Yield the ranks that memory is counted on, where GPUs of one slot are of several kinds.

        Of a slot with GPUs of one kind that is rank 0, which none exceeds. Nothing where all are.
        """
        kinds = list(kinds)
        if not any(self.is_unlike(shape, kind) for kind in kinds):
            return
        seen: set[object] = set()
        for kind in kinds:
            if not self.is_unlike(shape, kind):
                yield kind.gpu, 0, None
                continue
            for rank, gpu in enumerate(kind.members):
                held = (rank,) if kind.shares is None else kind.shares.of(rank)
                # Rank 0 has the biases of products that are summed.
                key = (gpu.memory_bytes, gpu.device, rank == 0, *held)
                if key not in seen:
                    seen.add(key)
                    yield gpu, rank, kind.shares

    def pools(
        self, shape: Shape, pool: Pool, batch_size: int, chunk_tokens: int, kv_tokens: int
    ) -> list[Pool]:
        """Return `pool`, and with unequal shares on its slots of unlike GPUs, if it has any.

        Args:
            shape: How a replica is cut.
            pool: Where replicas go.
            batch_size: Slots of one replica.
            chunk_tokens: Tokens of one step at most.
            kv_tokens: That the cache of a rank holds.
        """
        kinds = {id(kind): kind for group in pool.replicas for kind in group.stages}
        unlike = [kind for kind in kinds.values() if self.is_unlike(shape, kind)]
        if not unlike:
            return [pool]
        found: dict[tuple[int, ...], Pool] = {(): pool}
        layers = self._models.spec.num_layers
        for load in loads_of(self._workload, layers, shape.pp, batch_size, chunk_tokens, kv_tokens):
            dealt = {id(kind): self._dealt(shape, pool, kind, load) for kind in unlike}
            able = {key: kind for key, kind in dealt.items() if kind is not None}
            if len(able) == len(dealt):
                groups = tuple(
                    replace(group, stages=tuple(able.get(id(kind), kind) for kind in group.stages))
                    for group in pool.replicas
                )
                found[tuple(map(id, able.values()))] = Pool(groups)
        return list(found.values())

    def _dealt(self, shape: Shape, pool: Pool, kind: SlotKind, load: Load) -> SlotKind | None:
        """Return `kind` with the shares that are best for `load` on its last stage."""
        stage = max(
            stage
            for group in pool.replicas
            for stage, one in enumerate(group.stages)
            if one is kind
        )
        return self._dealer.best(shape, kind, replace(load, stage=stage))

    def fitting_batch(self, shape: Shape, chunk_tokens: int, tokens: int) -> int:
        """Return about the largest batch that unequal shares leave memory for; 0 without any.

        What all ranks of a slot have room for beside one copy of the weights.

        Args:
            shape: How a replica is cut.
            chunk_tokens: Of a step.
            tokens: That the cache holds of a request.
        """
        fitting = 0.0
        for kind in shape.kinds:
            if not self.is_unlike(shape, kind):
                continue
            weights, kv = self._memory.layer_bytes(shape)
            room: float = sum(
                self._memory.budget_bytes(gpu)
                - self._memory.extra_bytes(shape, 0, 1, chunk_tokens, gpu)
                for gpu in kind.members
            )
            room -= sum(weights) * shape.tp / shape.pp
            fitting = max(fitting, room * shape.pp / (sum(kv) * shape.tp * tokens))
        return int(fitting)
