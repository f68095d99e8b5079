"""Unequal shares of a model over the ranks of a TP group on GPUs of several kinds.

Says what a unit costs in seconds and bytes on each kind of GPU, by the same functions of the cost
model that time and count the shares once they are dealt. `share_problem.py` finds the best; this
file knows models and GPUs, that one only numbers.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

from rankwright.cost_model.layout import SlotKind, alike_ranks
from rankwright.cost_model.memory import activation_bytes
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import StageModels
from rankwright.cost_model.shards import Shares
from rankwright.cost_model.unlike_stage import RankModel, UnlikeStage
from rankwright.planner.memory_table import MemoryTable
from rankwright.planner.shapes import Shape
from rankwright.planner.share_loads import Load
from rankwright.planner.share_problem import Room, ShareProblem, Sum, Term, deal
from rankwright.planner.share_units import Parts, parts_of
from rankwright.topology.cluster import Gpu
from rankwright.topology.devices import memory_bytes_per_s

# Kinds of GPU in one slot; no machine that we know of has more.
_MOST_KINDS = 3
_HEADS, _COLUMNS, _ROWS = range(3)


class ShareDealer:
    """Deals one model over slots on GPUs of several kinds."""

    def __init__(self, models: StageModels, memory: MemoryTable) -> None:
        """Prepare.

        Args:
            models: Stages of the model, by which seconds are counted.
            memory: Of the same model.
        """
        self._models, self._memory = models, memory
        self._variants: dict[tuple[int, Shares], SlotKind] = {}
        self._slots: dict[tuple[object, ...], _Slot | None] = {}

    def forget(self) -> None:
        """Drop what units cost; variants of slots stay, as plans know them by identity."""
        self._slots.clear()

    def best(self, shape: Shape, kind: SlotKind, load: Load) -> SlotKind | None:
        """Return `kind` with the shares that are best for `load`; None where none fit."""
        key = (id(kind), shape.pp)
        if key not in self._slots:
            parts = parts_of(self._models.spec, shape.tp)
            kinds = alike_ranks(kind.members)
            self._slots[key] = None
            if parts is not None and len(kinds) <= _MOST_KINDS:
                self._slots[key] = _Slot(self._models, self._memory, shape, kind, parts, kinds)
        slot = self._slots[key]
        shares = None if slot is None else slot.deal(load)
        if shares is None:
            return None
        variant = (id(kind), shares)
        if variant not in self._variants:
            self._variants[variant] = replace(kind, shares=shares)
        return self._variants[variant]


class _Slot:
    """One kind of slot under one shape: what a unit costs on each kind of its GPUs."""

    def __init__(
        self,
        models: StageModels,
        memory: MemoryTable,
        shape: Shape,
        kind: SlotKind,
        parts: Parts,
        kinds: list[list[int]],
    ) -> None:
        self._models, self._memory = models, memory
        self._shape, self._kind, self._parts, self._kinds = shape, kind, parts, kinds
        rates = models.member_rates(kind)
        self._rates = [rates[ranks[0]] for ranks in kinds]
        stage = models.stage(kind, shape.ep, shape.attention)
        assert isinstance(stage, UnlikeStage), "shares are unequal on unlike GPUs only"
        self._stage = stage
        self._ranks: dict[tuple[int, tuple[int, ...]], RankModel] = {}

    def deal(self, load: Load) -> Shares | None:
        """Return the shares that are best for `load`; None where none fit."""
        parts = self._parts
        gpus = [
            min((self._kind.members[rank] for rank in ranks), key=self._memory.budget_bytes)
            for ranks in self._kinds
        ]
        problem = ShareProblem(
            tuple(map(len, self._kinds)),
            tuple(part.count for part in parts.all()),
            tuple(self._sums(load)),
            tuple(self._rooms(load, gpu) for gpu in gpus),
        )
        most = deal(problem)
        if most is None:
            return None
        return parts.shares(*map(self._to_ranks, problem.units, most))

    def _to_ranks(self, units: int, most: Sequence[int]) -> list[int]:
        """Return the units of each rank, where a rank of each kind has `most` of them at most."""
        held = [0] * len(self._kind.members)
        for ranks, number in zip(self._kinds, most, strict=True):
            for rank in ranks:
                held[rank] = number
        speeds = [memory_bytes_per_s(gpu) for gpu in self._kind.members]
        for _ in range(sum(held) - units):
            able = [rank for rank, number in enumerate(held) if number > 1]
            held[max(able, key=lambda rank: (held[rank] / speeds[rank], rank))] -= 1
        return held

    def _sums(self, load: Load) -> list[Sum]:
        """Return what the seconds of the stage add up from: its layers, and the head."""
        of_layer = self._models.layers.of_layer
        sums: list[Sum] = []
        for tokens, weight in load.steps:
            for layer in range(len(self._models.layers.kinds)):
                halves = (
                    self._term(_HEADS, partial(self._half_s, layer, tokens, _HEADS)),
                    self._term(_COLUMNS, partial(self._half_s, layer, tokens, _COLUMNS)),
                )
                share = of_layer.count(layer) / len(of_layer)
                least_s = self._stage.least_s(layer, tokens)
                sums.append(Sum(weight * load.layers * share, halves, least_s))
            if load.stage == self._shape.pp - 1:
                logits = self._term(_ROWS, partial(self._logits_s, tokens))
                sums.append(Sum(weight, (logits,)))
        return sums

    def _term(self, part: int, seconds: "partial[float]") -> Term:
        """Return a term, whose `seconds` are asked by the kind of GPU and the units of a rank."""
        return Term(part, tuple(cache(partial(seconds, kind)) for kind in range(len(self._kinds))))

    def _half_s(self, layer: int, tokens: StepTokens, part: int, kind: int, units: int) -> float:
        """Return the seconds of one half of a layer on a rank with so many units of its part."""
        rank = self._rank(kind, (units, 1, 1) if part == _HEADS else (1, units, 1))
        return rank.rates.seconds(rank.halves(layer, tokens)[part])

    def _logits_s(self, tokens: StepTokens, kind: int, units: int) -> float:
        return self._rank(kind, (1, 1, units)).logits_s(tokens)

    def _rank(self, kind: int, units: tuple[int, int, int]) -> RankModel:
        key = (kind, units)
        if key not in self._ranks:
            self._ranks[key] = RankModel(
                self._models.spec,
                self._models.layers,
                self._rates[kind],
                tp=self._shape.tp,
                shares=self._shares(units),
                fused_norms=self._stage.fused_norms,
            )
        return self._ranks[key]

    def _shares(self, units: Sequence[int]) -> Shares:
        """Return shares of which rank 0 has so many units, to ask the cost model about it."""
        return self._parts.shares(*((number,) for number in units))

    def _rooms(self, load: Load, gpu: Gpu) -> tuple[Room, ...]:
        """Return the rows of memory of a rank on `gpu`.

        One for a step whose widest block is attention, one for a step whose widest is the other:
        a rank has buffers for the wider (`memory.activation_bytes`).
        """
        budget = self._memory.budget_bytes(gpu)
        one = self._held_bytes(load, (1, 1, 1), gpu)
        more = [
            self._held_bytes(load, units, gpu) - one for units in ((2, 1, 1), (1, 2, 1), (1, 1, 2))
        ]
        rooms: list[Room] = []
        for part in (_HEADS, _COLUMNS):
            low, high = (self._buffer_bytes(load, part, units) for units in (1, 2))
            unit_bytes = list(more)
            unit_bytes[part] += high - low
            rooms.append(Room(tuple(unit_bytes), budget - (one + low - sum(unit_bytes))))
        return tuple(rooms)

    def _held_bytes(self, load: Load, units: Sequence[int], gpu: Gpu) -> float:
        """Return the bytes of a rank with so many units, but for the buffers of its layers."""
        shares = self._shares(units)
        weights, kv = self._memory.layer_bytes(self._shape, 0, shares)
        extra = self._memory.extra_bytes(
            self._shape, load.stage, load.batch_size, load.chunk_tokens, gpu, 0, shares
        )
        layers = load.layers * (sum(weights) + load.kv_tokens * sum(kv)) / len(weights)
        return layers + extra - self._activations(load, shares)

    def _buffer_bytes(self, load: Load, part: int, units: int) -> int:
        """Return the bytes of a step's buffers, were the block of `part` the only one."""
        shares = self._shares((units, units, 1))
        if part == _HEADS:
            return self._activations(load, replace(shares, columns=(0,)))
        return self._activations(load, replace(shares, query_heads=(0,)))

    def _activations(self, load: Load, shares: Shares) -> int:
        return activation_bytes(
            self._models.spec,
            tp=self._shape.tp,
            max_batched_tokens=max(load.chunk_tokens, load.batch_size),
            max_num_seqs=load.batch_size if load.stage == self._shape.pp - 1 else 0,
            shares=shares,
        )
