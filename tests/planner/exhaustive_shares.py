"""All unequal shares of one stage on GPUs of several kinds, one by one.

GPUs of one kind hold equal shares, as equal as whole units allow, so that a plan is how many units
of each part the ranks of each kind hold at most. Seconds and bytes are asked of the cost model for
each; of those that fit, the ones of which another is no slower in both kinds of step are left out,
because no figure of a replica falls when a step of it takes longer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from math import ceil
from unittest.mock import patch

from tests.planner.random_cases import Case

from rankwright.cost_model.fullest import cached_tokens
from rankwright.cost_model.layout import SlotKind, alike_ranks
from rankwright.cost_model.memory import rank_memory
from rankwright.cost_model.serving import find_flow
from rankwright.cost_model.shards import Shares
from rankwright.cost_model.split import Split
from rankwright.cost_model.unlike_stage import RankModel, UnlikeStage
from rankwright.planner.candidates import Evaluator
from rankwright.planner.shapes import Shape
from rankwright.planner.share_units import Part, parts_of
from rankwright.topology.cluster import Gpu

_FEW = 5  # units, so that all shares can be tried
Sizes = tuple[int, int]  # batch and chunk
Held = tuple[int, ...]  # of one part: the most units of a rank of each kind of GPU


@contextmanager
def few_units() -> Iterator[None]:
    """Have columns and rows dealt in few units, of planner and exhaustive search alike."""
    with patch("rankwright.planner.share_units._MOST_UNITS", _FEW):
        yield


def is_unlike(evaluator: Evaluator, shape: Shape, kind: SlotKind) -> bool:
    """Return whether ranks of a slot of `kind` are counted one by one."""
    return evaluator.models.is_unlike(kind, shape.ep, shape.attention, shape.cp)


def fits(
    case: Case,
    evaluator: Evaluator,
    shape: Shape,
    split: Split,
    gpu: Gpu,
    stage: int,
    tp_rank: int,
    sizes: Sizes,
    shares: Shares | None = None,
) -> bool:
    """Return whether one rank fits on its GPU."""
    batch_size, chunk = sizes
    load, block = case.workload, evaluator.block_tokens(shape.cp)
    tokens = ceil(ceil((load.input_tokens + load.output_tokens) / shape.cp) / block) * block
    whole = split.model_copy(update={"cp": 1})
    parts = rank_memory(
        case.model,
        split,
        stage=stage,
        kv_tokens=cached_tokens(batch_size, tokens, whole),
        max_batched_tokens=max(chunk, batch_size),
        max_num_seqs=batch_size,
        tp_rank=tp_rank,
        shares=shares,
    )
    return sum(part.bytes for part in parts) <= evaluator.memory.budget_bytes(gpu)


def unequal_shares(
    case: Case, evaluator: Evaluator, shape: Shape, kind: SlotKind, sizes: Sizes
) -> list[Shares]:
    """Return the shares of which no other is as fast in both kinds of step, among all that fit."""
    parts = parts_of(case.model, shape.tp)
    if parts is None:
        return []
    kinds = alike_ranks(kind.members)
    flow = find_flow(case.workload, *sizes, shape.pp)
    steps = [flow.mixed, *([flow.plain] if flow.plain.decode and flow.mixed_share < 1 else [])]
    rates = evaluator.models.member_rates(kind)
    layers = evaluator.models.layers
    counts = [layers.of_layer.count(index) for index in range(len(layers.kinds))]
    stage = evaluator.models.stage(kind, shape.ep, shape.attention)
    assert isinstance(stage, UnlikeStage)
    split = Split(tp=shape.tp, stage_layers=(case.model.num_layers,))
    halves: dict[tuple[int, int, int], list[list[tuple[float, float]]]] = {}
    logits: dict[tuple[int, int], list[float]] = {}

    def rank_model(number: int, units: tuple[int, int, int]) -> RankModel:
        return RankModel(
            case.model,
            layers,
            rates[kinds[number][0]],
            tp=shape.tp,
            shares=parts.shares(*((one,) for one in units)),
            fused_norms=stage.fused_norms,
        )

    def seconds(dealt: tuple[Held, ...]) -> tuple[float, ...]:
        heads, columns, rows = dealt
        found = []
        for number in range(len(kinds)):
            for key in ((number, heads[number], 1), (number, 1, columns[number])):
                if key not in halves:
                    model = rank_model(number, (*key[1:], 1))
                    halves[key] = [
                        [model.halves_s(one, step) for one in range(len(counts))] for step in steps
                    ]
            if (number, rows[number]) not in logits:
                model = rank_model(number, (1, 1, rows[number]))
                logits[number, rows[number]] = [model.logits_s(step) for step in steps]
        numbers = range(len(kinds))
        for index, step in enumerate(steps):
            total = max(logits[number, rows[number]][index] for number in numbers)
            for one, count in enumerate(counts):
                attention = max(halves[n, heads[n], 1][index][one][0] for n in numbers)
                block = max(halves[n, 1, columns[n]][index][one][1] for n in numbers)
                total += count * max(stage.least_s(one, step), attention + block)
            found.append(total)
        return tuple(found)

    front: list[tuple[tuple[float, ...], tuple[Held, ...]]] = []
    for dealt in product(*(_covers(part, kinds) for part in parts.all())):
        found = seconds(dealt)
        if any(all(a <= b for a, b in zip(other, found, strict=True)) for other, _ in front):
            continue
        able = all(
            fits(
                case,
                evaluator,
                shape,
                split,
                min((kind.members[rank] for rank in ranks), key=evaluator.memory.budget_bytes),
                0,
                0,
                sizes,
                parts.shares(*((held[number],) for held in dealt)),
            )
            for number, ranks in enumerate(kinds)
        )
        if able:
            front = [
                one for one in front if not all(a <= b for a, b in zip(found, one[0], strict=True))
            ]
            front.append((found, dealt))
    return [
        parts.shares(
            *(_to_ranks(part, kinds, held) for part, held in zip(parts.all(), dealt, strict=True))
        )
        for _, dealt in front
    ]


def _covers(part: Part, kinds: list[list[int]]) -> list[Held]:
    """Return every way to hold all units of `part`, of which no rank can hold fewer."""
    ranges = [range(1, part.count + 1) for _ in kinds]
    able = [
        held
        for held in product(*ranges)
        if sum(len(ranks) * units for ranks, units in zip(kinds, held, strict=True)) >= part.count
    ]
    return [held for held in able if not any(_is_less(other, held) for other in able)]


def _is_less(one: Held, other: Held) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _to_ranks(part: Part, kinds: list[list[int]], held: Held) -> list[int]:
    """Return the units of each rank: the last ones have less where `held` is more than there is."""
    units = [0] * sum(map(len, kinds))
    for ranks, number in zip(kinds, held, strict=True):
        for rank in ranks:
            units[rank] = number
    for rank in reversed(range(len(units))):
        units[rank] -= min(units[rank] - 1, sum(units) - part.count)
    return units
