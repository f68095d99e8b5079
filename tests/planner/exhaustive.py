"""The best plan of a small problem by trying everything.

What the planner decides is enumerated here afresh: degrees, the kinds of slot under the stages,
every cut of the layers into stages, batches and chunks, numbers of replicas. Shared with the
planner are only the inputs of its decision: the cost model, which slots a cluster has, which cuts
are legal, and the levels of batch and chunk.

A problem has up to a million plans, so that what many of them share is worked out once: seconds and
bytes of every run of layers of a stage are tables, and cuts of the layers that load every stage
sum and slowest stage alike (`_figures`) are priced once, by the cost model itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, combinations_with_replacement, product
from math import ceil

import numpy as np
from numpy.typing import NDArray
from tests.planner.exhaustive_shares import fits, is_unlike, unequal_shares
from tests.planner.random_cases import Case

from rankwright.cost_model.fullest import cached_tokens
from rankwright.cost_model.layout import SlotKind, find_slots, replicas_in_nodes
from rankwright.cost_model.legality import cut_is_legal, has_experts
from rankwright.cost_model.memory import (
    RESERVED_BYTES,
    activation_bytes,
    gathered_bytes,
    stage_kv_bytes_per_token,
    stage_weight_bytes,
)
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import Replicas
from rankwright.cost_model.serving import Serving, find_flow, serve_closed
from rankwright.cost_model.shards import Shares
from rankwright.cost_model.split import AttentionSplit, CpExchange, Split
from rankwright.planner.candidates import Evaluator
from rankwright.planner.goals import burn_per_s
from rankwright.planner.shapes import LONG_REQUEST_TOKENS, Shape

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Place:
    """Where replicas of a shape may be: the kind of slot of each stage, and how many fit."""

    stages: tuple[SlotKind, ...]
    room: int
    spread: bool
    shares: Shares | None = None  # of a replica of one stage on unlike GPUs

    @property
    def is_alike(self) -> bool:
        """Whether all stages are on one kind of slot."""
        return len(set(map(id, self.stages))) == 1

    @property
    def slots(self) -> tuple[object, ...]:
        """What tells the slots of its first stage from others."""
        return self.stages[0].gpus, self.stages[0].nodes


# Where a replica is, what it does there, how many of it.
Used = tuple[Place, Serving, int]


def exhaustive(case: Case) -> float | None:
    """Return the best objective of all plans; None where none keeps memory and limits."""
    values = [value for value in _values(case) if value is not None]
    if not values:
        return None
    return min(values) if case.workload.objective == "latency" else max(values)


def whole_replicas(case: Case) -> Iterator[tuple[int, Serving]]:
    """Yield the batch and the steady state of every replica that takes all GPUs of the cluster."""
    for _, batch_size, problem in _problems(case, case.cluster.num_gpus):
        for able in problem.distinct():
            yield from ((batch_size, state) for _, state in able if _keeps_limits(case, state))


def _values(case: Case) -> Iterator[float | None]:
    """Yield the objective of every plan, None for one that breaks a limit."""
    for shape, _, problem in _problems(case):
        for able in problem.distinct():
            yield from _values_of(case, shape, able)


def _problems(case: Case, least_gpus: int = 1) -> "Iterator[tuple[Shape, int, _Cuts]]":
    """Yield every shape of so many GPUs at every batch and chunk."""
    evaluator = case.search().evaluator
    for shape in _all_shapes(case):
        if shape.num_gpus < least_gpus:
            continue
        places = list(_places(shape))
        runs = _RunBytes.of(case, shape)
        for batch_size in evaluator.batch_levels(shape):
            for chunk in evaluator.chunk_levels(batch_size, shape.pp):
                dealt = unequal_places(case, evaluator, shape, places, batch_size, chunk)
                here = [*places, *dealt]
                yield (
                    shape,
                    batch_size,
                    _Cuts(case, evaluator, shape, here, runs, batch_size, chunk),
                )


def _values_of(
    case: Case, shape: Shape, able: list[tuple[Place, Serving]]
) -> Iterator[float | None]:
    """Yield the objective of every number of replicas on the places that one cut fits on."""
    able = [(place, state) for place, state in able if _keeps_limits(case, state)]
    for place, state in able:
        for count in range(1, place.room + 1):
            yield _value(case, shape, [(place, state, count)])
    # Replicas on one kind of slot each, of several kinds.
    alike = [(place, state) for place, state in able if place.is_alike]
    kinds = {place.slots for place, _ in alike}
    for size in range(2, len(kinds) + 1):
        for chosen in combinations(alike, size):
            if len({place.slots for place, _ in chosen}) < size:
                continue  # inside machines and spread over them, or with other shares
            for counts in product(*(range(1, place.room + 1) for place, _ in chosen)):
                used = [(*one, count) for one, count in zip(chosen, counts, strict=True)]
                yield _value(case, shape, used)


def _all_shapes(case: Case) -> Iterator[Shape]:
    most = case.cluster.num_gpus
    load = case.workload
    is_long = load.input_tokens + load.output_tokens >= LONG_REQUEST_TOKENS
    splits: tuple[AttentionSplit, ...] = ("tp", "dp") if has_experts(case.model) else ("tp",)
    on_cpus = all(gpu.device == "cpu" for node in case.cluster.nodes for gpu in node.gpus)
    for tp, pp, cp in product(range(1, most + 1), repeat=3):
        if cp & (cp - 1) or (cp > 1 and not is_long):
            continue
        if tp * pp * cp > most or pp > case.model.num_layers or tp != (case.tp or tp):
            continue
        for ep, attention in product(range(1, tp + 1), splits):
            if cut_is_legal(case.model, tp=tp, ep=ep, cp=cp, attention=attention) is None:
                kinds = find_slots(case.cluster, tp * cp)
                if sum(kind.count for kind in kinds) < pp:
                    continue
                exchanges: tuple[CpExchange, ...] = ("gather",)
                if cp > 1 and on_cpus:
                    exchanges = ("gather", "ring")
                for cp_exchange in exchanges:
                    yield Shape(tp, pp, ep, kinds, cp, attention, cp_exchange)


def _places(shape: Shape) -> Iterator[Place]:
    """Yield the kinds of slot of a replica's stages, and how many such replicas there is room for.

    Stages on several kinds are in the order of the kinds, fastest first.
    """
    for chosen in combinations_with_replacement(range(len(shape.kinds)), shape.pp):
        stages = tuple(shape.kinds[index] for index in chosen)
        if len(set(chosen)) == 1:
            inside = replicas_in_nodes(stages[0], shape.pp)
            spread = stages[0].count // shape.pp
            if inside:
                yield Place(stages, inside, False)
            if spread > inside:
                yield Place(stages, spread, True)
        else:
            room = min(shape.kinds[index].count // chosen.count(index) for index in set(chosen))
            if room:
                yield Place(stages, room, True)


@cache
def compositions(total: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """Return every way to write `total` as `parts` numbers of 1 or more.

    >>> compositions(4, 2)
    ((1, 3), (2, 2), (3, 1))
    """
    return tuple(
        tuple(b - a for a, b in zip((0, *inner), (*inner, total), strict=True))
        for inner in combinations(range(1, total), parts - 1)
    )


@cache
def _bounds(total: int, parts: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first layer of each stage and the one past its last, a row for each cut."""
    ends = np.cumsum(np.array(compositions(total, parts), dtype=np.intp), axis=1)
    return np.hstack([np.zeros_like(ends[:, :1]), ends[:, :-1]]), ends


@dataclass(frozen=True, slots=True)
class _RunBytes:
    """Bytes of every run of layers on the fullest rank of a stage, by its first and end layer."""

    weights: Numbers
    kv_per_token: Numbers

    @classmethod
    def of(cls, case: Case, shape: Shape) -> "_RunBytes":
        """Ask the memory model about each run, as a stage with what comes before and after it."""
        total = case.model.num_layers
        weights, kv = np.zeros((total + 1, total + 1)), np.zeros((total + 1, total + 1))
        for first, end in combinations(range(total + 1), 2):
            layers = tuple(size for size in (first, end - first, total - end) if size)
            split = _split(shape, layers)
            stage = 1 if first else 0
            weights[first, end] = stage_weight_bytes(case.model, split, stage=stage)
            kv[first, end] = stage_kv_bytes_per_token(case.model, split, stage=stage)
        return cls(weights, kv)


def unequal_places(
    case: Case,
    evaluator: Evaluator,
    shape: Shape,
    places: list[Place],
    batch_size: int,
    chunk: int,
) -> Iterator[Place]:
    """Yield places of one stage on unlike GPUs with all shares that can be best there."""
    for place in places:
        if shape.pp == 1 and is_unlike(evaluator, shape, place.stages[0]):
            kind = place.stages[0]
            for shares in unequal_shares(case, evaluator, shape, kind, (batch_size, chunk)):
                stages = (replace(kind, shares=shares),)
                yield replace(place, stages=stages, shares=shares)


def _split(shape: Shape, layers: tuple[int, ...]) -> Split:
    return Split(
        tp=shape.tp,
        pp=len(layers),
        ep=shape.ep,
        cp=shape.cp,
        attention=shape.attention,
        cp_exchange=shape.cp_exchange,
        stage_layers=layers,
    )


class _Cuts:
    """Every cut of the layers into the stages of one shape, at one batch and chunk."""

    def __init__(
        self,
        case: Case,
        evaluator: Evaluator,
        shape: Shape,
        places: list[Place],
        runs: _RunBytes,
        batch_size: int,
        chunk: int,
    ) -> None:
        self._case, self._evaluator, self._shape = case, evaluator, shape
        self._places, self._batch_size, self._chunk = places, batch_size, chunk
        self._sizes = (batch_size, chunk)
        self._all = compositions(case.model.num_layers, shape.pp)
        self._starts, self._ends = _bounds(case.model.num_layers, shape.pp)
        self._bytes = self._stage_bytes(runs)
        flow = find_flow(case.workload, batch_size, chunk, shape.pp)
        self._steps = (flow.mixed, flow.plain)

    def distinct(self) -> Iterator[list[tuple[Place, Serving]]]:
        """Yield for each cut the places that it fits on, and what it does there.

        Of cuts with equal figures on every place, only the first.
        """
        fits = [self._fits(place) for place in self._places]
        if not np.any(fits):
            return
        for index in self._unlike(fits):
            able = [place for place, ok in zip(self._places, fits, strict=True) if ok[index, 0]]
            if able:
                yield [(place, self._serve(place, self._all[index])) for place in able]

    def _unlike(self, fits: list[NDArray[np.bool_]]) -> list[int]:
        """Return the cuts, without those whose figures equal an earlier one's on every place."""
        if len(self._all) == 1:
            return [0]
        figures = [
            np.where(ok, self._figures(place), 0.0)
            for place, ok in zip(self._places, fits, strict=True)
        ]
        rows = np.hstack(figures)
        # Sums of the same numbers in another order differ in the last bits.
        scale = np.maximum(rows.max(axis=0), 1e-30)
        seen: dict[tuple[float, ...], int] = {}
        for index, row in enumerate(np.round(rows / scale, 11).tolist()):
            seen.setdefault(tuple(row), index)
        return list(seen.values())

    def _serve(self, place: Place, layers: tuple[int, ...]) -> Serving:
        replicas = Replicas(place.stages, place.room, place.spread)
        pipeline = self._evaluator.pipeline(replicas, layers, self._shape)
        return serve_closed(
            pipeline, self._case.workload, batch_size=self._batch_size, chunk_tokens=self._chunk
        )

    def _figures(self, place: Place) -> Numbers:
        """Return all that `serve_closed` takes of a cut: the sum of its stages and the slowest.

        Both in a step with prompts and in one without; a row for each cut.
        """
        columns: list[Numbers] = []
        for tokens in self._steps:
            busy = np.stack(
                [self._stage_s(place, stage, tokens) for stage in range(self._shape.pp)], axis=1
            )
            columns += [busy.sum(axis=1), busy.max(axis=1)]
        return np.stack(columns, axis=1)

    def _stage_s(self, place: Place, stage: int, tokens: StepTokens) -> Numbers:
        """Return the seconds of a stage with each cut, but for what is the same for all cuts."""
        models, shape = self._evaluator.models, self._shape
        model = models.stage(
            place.stages[stage], shape.ep, shape.attention, shape.cp, shape.cp_exchange
        )
        kinds = [model.layer_s(kind, tokens) for kind in range(len(models.layers.kinds))]
        up_to = np.cumsum([0.0, *(kinds[kind] for kind in models.layers.of_layer)])
        seconds: Numbers = up_to[self._ends[:, stage]] - up_to[self._starts[:, stage]]
        if stage == 0:
            seconds = seconds + model.first_s(tokens)
        if stage == shape.pp - 1:
            return seconds + model.last_s(tokens)
        return seconds + model.handover_s

    def _stage_bytes(self, runs: _RunBytes) -> Numbers:
        """Return the bytes of the fullest rank of each stage (column) with each cut (row)."""
        case, shape = self._case, self._shape
        load, spec = case.workload, case.model
        block = self._evaluator.block_tokens(shape.cp)
        tokens = ceil(ceil((load.input_tokens + load.output_tokens) / shape.cp) / block) * block
        split = _split(shape, (spec.num_layers,)).model_copy(update={"cp": 1})
        kv_tokens = cached_tokens(self._batch_size, tokens, split)
        size = runs.weights[self._starts, self._ends]
        size = size + kv_tokens * runs.kv_per_token[self._starts, self._ends]
        gathered = gathered_bytes(
            spec,
            tp=shape.tp,
            cp=shape.cp,
            attention=shape.attention,
            cp_exchange=shape.cp_exchange,
            max_context_tokens=min(spec.max_context_tokens, kv_tokens * shape.cp),
            max_num_seqs=self._batch_size,
            max_batched_tokens=max(self._chunk, self._batch_size),
        )
        fixed = [
            activation_bytes(
                spec,
                tp=shape.tp,
                ep=shape.ep,
                attention=shape.attention,
                max_batched_tokens=max(self._chunk, self._batch_size),
                max_num_seqs=self._batch_size if stage == shape.pp - 1 else 0,
            )
            for stage in range(shape.pp)
        ]
        return size + np.array(fixed) + gathered + RESERVED_BYTES["cuda"]

    def _fits(self, place: Place) -> NDArray[np.bool_]:
        """Return whether each cut fits on `place`, as a column."""
        if place.shares is not None:
            return np.ones((len(self._all), 1), dtype=np.bool_)  # only such as fit were made
        if any(is_unlike(self._evaluator, self._shape, kind) for kind in place.stages):
            return np.array([[self._ranks_fit(place, layers)] for layers in self._all])
        memory = self._evaluator.memory
        budgets = np.array([memory.budget_bytes(kind.gpu) for kind in place.stages])
        return np.all(self._bytes <= budgets, axis=1, keepdims=True)

    def _ranks_fit(self, place: Place, layers: tuple[int, ...]) -> bool:
        """Return whether every rank of every stage fits on its own GPU, with equal shares."""
        shape, split = self._shape, _split(self._shape, layers)
        return all(
            fits(self._case, self._evaluator, shape, split, gpu, stage, rank, self._sizes)
            for stage, kind in enumerate(place.stages)
            for rank, gpu in enumerate(kind.members or (kind.gpu,))
        )


def _keeps_limits(case: Case, state: Serving) -> bool:
    load = case.workload
    late = load.ttft_limit_s is not None and state.ttft_at_s(load.percentile) > load.ttft_limit_s
    return not late and (load.tpot_limit_s is None or state.tpot_s <= load.tpot_limit_s)


def _value(case: Case, shape: Shape, used: list[Used]) -> float | None:
    """Return the objective of so many replicas on each place; None where requests do not fill."""
    load = case.workload
    in_flight, tokens = load.concurrency, load.output_tokens
    batch_size = used[0][1].batch_size
    number = sum(count for _, _, count in used)
    # A replica that the requests leave without one, or would run at a smaller batch.
    if in_flight is not None and (number > in_flight or (batch_size - 1) * number > in_flight - 1):
        return None
    if load.objective == "latency":
        if in_flight is not None and batch_size * number < in_flight:
            return None
        return max(state.request_s(tokens) for _, state, _ in used)
    if load.objective == "throughput":
        served = sum(state.requests_per_s * count for _, state, count in used)
        if in_flight is not None:
            fastest = max(state.requests_per_s for _, state, _ in used)
            served = min(served, in_flight / batch_size * fastest)
        return served * tokens
    return max(
        state.requests_per_s
        * tokens
        / sum(shape.gpus_per_stage * burn_per_s(kind.gpu, load.objective) for kind in place.stages)
        for place, state, _ in used
    )
