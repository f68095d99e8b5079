"""Where replicas of one shape may go: the placements among which the integer program counts."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from math import comb

from rankwright.cost_model.layout import SlotKind, replicas_in_nodes
from rankwright.cost_model.predict import Replicas
from rankwright.planner.shapes import Shape

# Kinds of slot of which every combination is tried, and mixes of them under one pipeline. A machine
# has two or three kinds; clusters of more are cut by their fastest and slowest.
_MOST_KINDS = 3
_MOST_MIXES = 45


@dataclass(frozen=True, slots=True)
class Pool:
    """Where replicas of one shape may go, and how many fit there.

    Args:
        replicas: One kind of placement each; `count` is how many fit.
    """

    replicas: tuple[Replicas, ...]


def find_pools(shape: Shape) -> Iterator[Pool]:
    """Yield where replicas of `shape` may go.

    Replicas on one kind of slot each: of one kind, inside machines or spread over them, or of
    several kinds at once. And replicas whose stages are on several kinds, all on the same mix.
    """
    whole: list[Replicas] = []
    for kind in shape.kinds:
        inside = replicas_in_nodes(kind, shape.pp)
        spread = kind.count // shape.pp
        if inside:
            yield Pool((Replicas((kind,) * shape.pp, inside),))
        if spread > inside:
            yield Pool((Replicas((kind,) * shape.pp, spread, True),))
        if spread:
            whole.append(Replicas((kind,) * shape.pp, spread, spread > inside))
    for size in range(2, min(len(whole), _MOST_KINDS) + 1):
        for chosen in combinations(whole, size):
            yield Pool(chosen)
    if len(whole) > _MOST_KINDS:
        yield Pool(tuple(whole))
    for stages, room in _mixes(shape):
        yield Pool((Replicas(stages, room, True),))


def _mixes(shape: Shape) -> Iterator[tuple[tuple[SlotKind, ...], int]]:
    """Yield stages on several kinds of slot, fastest first, and how many such replicas fit.

    Of many kinds, or deep pipelines, only the mixes that use up the faster or the slower kinds.
    None of whole machines that differ only in how near each other they are: with racks such mixes
    would make up most of the search.
    """
    kinds, pp = shape.kinds, shape.pp
    if all(kind.nodes_per_slot > 1 and kind.gpu == kinds[0].gpu for kind in kinds):
        return
    if len(kinds) < 2 or sum(kind.count for kind in kinds) < pp:
        return
    if comb(len(kinds) + pp - 1, pp) > _MOST_MIXES:
        slots = [index for index, kind in enumerate(kinds) for _ in range(min(kind.count, pp))]
        chosen_mixes = {tuple(slots[:pp]), tuple(slots[-pp:])}
    else:
        chosen_mixes = set(combinations_with_replacement(range(len(kinds)), pp))
    for chosen in sorted(chosen_mixes):
        used = Counter(chosen)
        room = min(kinds[index].count // number for index, number in used.items())
        if len(used) > 1 and room:
            yield tuple(kinds[index] for index in chosen), room
