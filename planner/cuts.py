"""Cuts the layers of a replica into stages: what each layer costs there, and the cuts to try."""

from dataclasses import dataclass, replace
from math import inf

from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import StageModels
from rankwright.cost_model.serving import find_flow
from rankwright.cost_model.shards import Shares
from rankwright.cost_model.workload import Workload
from rankwright.planner.balance import RankCosts, StageCosts, balance_both, balance_layers
from rankwright.planner.cache_blocks import CacheBlocks
from rankwright.planner.homes import Home, Stage
from rankwright.planner.memory_table import MemoryTable
from rankwright.planner.shapes import Shape


@dataclass(frozen=True, slots=True)
class Cut:
    """Stages of one candidate, and the rank that is closest to its budget."""

    layers: tuple[int, ...]
    fits: bool
    memory_bytes: int
    budget_bytes: int


class Cutter:
    """Cuts one model for one workload; what many candidates share is worked out once."""

    def __init__(
        self,
        models: StageModels,
        memory: MemoryTable,
        workload: Workload,
        blocks: CacheBlocks,
    ) -> None:
        """Prepare.

        Args:
            models: Time the layers.
            memory: Sizes of them.
            workload: What is asked.
            blocks: Of the cache.
        """
        self._models = models
        self._memory = memory
        self._workload = workload
        self._blocks = blocks
        self._sizes: dict[tuple[object, ...], list[int]] = {}
        self._layer_seconds: dict[tuple[object, ...], list[float]] = {}

    def forget(self) -> None:
        """Drop what was kept; what is asked for again is worked out again."""
        self._layer_seconds.clear()
        self._sizes.clear()

    def cuts(self, home: Home, batch_size: int, chunk: int) -> list[Cut]:
        """Return the stages that can be best; where memory allows none, those without its limit.

        Several where steps with prompts and steps without are balanced by different ones.
        """
        pp = home.shape.pp
        flow = find_flow(self._workload, batch_size, chunk, pp)
        costs = self.stage_costs(home, batch_size, chunk, flow.mixed)
        if pp > 1 and flow.mixed_share < 1 and flow.plain.decode:
            plain = self.stage_costs(home, batch_size, chunk, flow.plain)
            cuts = balance_both(costs, plain)
        else:
            best = balance_layers(costs)
            cuts = [] if best is None else [best]
        fits = bool(cuts)
        if not fits:
            roomy = [replace(stage, budget_bytes=inf, ranks=()) for stage in costs]
            free = balance_layers(roomy)
            assert free is not None, "without a memory limit every shape has a cut"
            cuts = [free]
        return [Cut(layers, fits, *_fullest(costs, layers)) for layers in cuts]

    def stage_costs(
        self, home: Home, batch_size: int, chunk: int, tokens: StepTokens
    ) -> list[StageCosts]:
        """Return what each stage costs per layer, for the placement that is hardest.

        Args:
            home: Kinds of slot under each stage; where they are several, the slowest and the
                smallest of each stage count.
            batch_size: Slots of one replica, which size its cache.
            chunk: Tokens of one step at most, which size its buffers.
            tokens: Of the step that is timed.
        """
        shape = home.shape
        layer_bytes = self._layer_bytes(shape, batch_size)
        costs: list[StageCosts] = []
        for stage in home.stages:
            extra_s = 0.0
            if stage.index == 0:
                extra_s += max([model.first_s(tokens) for model in stage.models])
            if stage.index == shape.pp - 1:
                extra_s += max([model.last_s(tokens) for model in stage.models])
            else:
                extra_s += max([model.handover_s for model in stage.models])
            costs.append(
                StageCosts(
                    self._layer_s(stage, tokens),
                    extra_s,
                    layer_bytes,
                    self._memory.extra_bytes(shape, stage.index, batch_size, chunk, stage.gpu),
                    stage.budget_bytes,
                    tuple(
                        RankCosts(
                            self._layer_bytes(shape, batch_size, *rank[1:]),
                            *self._memory.layer_bytes(shape, *rank[1:]),
                            self._memory.extra_bytes(shape, stage.index, batch_size, chunk, *rank),
                            self._memory.budget_bytes(rank[0]),
                        )
                        for rank in stage.ranks
                    ),
                )
            )
        return [costs[index] for index in home.of_stage]

    def _layer_bytes(
        self, shape: Shape, batch_size: int, tp_rank: int = 0, shares: Shares | None = None
    ) -> list[int]:
        """Return the bytes of each layer with its part of the cache; one list for equal asks."""
        key = (shape.tp, shape.ep, shape.cp, shape.attention, batch_size, tp_rank, shares)
        if key not in self._sizes:
            weights, kv = self._memory.layer_bytes(shape, tp_rank, shares)
            tokens = self._blocks.kv_tokens(shape, batch_size)
            self._sizes[key] = [
                weight + tokens * per_token for weight, per_token in zip(weights, kv, strict=True)
            ]
        return self._sizes[key]

    def _layer_s(self, stage: Stage, tokens: StepTokens) -> list[float]:
        """Return the seconds of each layer on the slowest of its GPUs; one list for equal asks."""
        key = (tokens, stage.model_ids)
        seconds = self._layer_seconds.get(key)
        if seconds is None:
            by_kind = [
                max([model.layer_s(kind, tokens) for model in stage.models])
                for kind in range(len(self._models.layers.kinds))
            ]
            seconds = [by_kind[kind] for kind in self._models.layers.of_layer]
            self._layer_seconds[key] = seconds
        return seconds


def _fullest(costs: list[StageCosts], layers: tuple[int, ...]) -> tuple[int, int]:
    """Return the bytes and the budget of the rank that is closest to its budget."""
    start = 0
    ranks: list[tuple[int, int]] = []
    for stage, count in zip(costs, layers, strict=True):
        for rank in stage.ranks or (stage,):
            size = sum(rank.layer_bytes[start : start + count]) + rank.extra_bytes
            ranks.append((round(size), round(rank.budget_bytes)))
        start += count
    return max(ranks, key=lambda rank: rank[0] / rank[1])
