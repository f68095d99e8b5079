"""Cuts the layers of a model into stages so that the slowest stage is as fast as it can be.

The search asks this thousands of times, so it is not an integer program but an exact search on the
one number that matters, the time of the slowest stage: for a given time, filling every stage as far
as time and memory allow finds out whether contiguous layers can keep it. `stages_program.py` states
the same problem as an integer program, to which the tests hold this.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf


@dataclass(frozen=True, slots=True)
class RankCosts:
    """Bytes of one more rank of a stage whose ranks are not alike.

    Args:
        layer_bytes: Of each layer, KV cache included.
        weight_bytes: Of each layer.
        token_bytes: Cache of one token in each layer.
        extra_bytes: Bytes besides.
        budget_bytes: Bytes of its GPU that may be used.
    """

    layer_bytes: Sequence[float]
    weight_bytes: Sequence[int]
    token_bytes: Sequence[int]
    extra_bytes: float
    budget_bytes: float


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Costs of one stage, for whichever layers it gets.

    Args:
        layer_s: Seconds of each layer of the model on this stage's GPUs.
        extra_s: Seconds besides: embedding, head, hand-over.
        layer_bytes: Bytes of each layer on this stage's fullest rank, KV cache included.
        extra_bytes: Bytes besides.
        budget_bytes: Bytes of its smallest GPU that may be used.
        ranks: Where its GPUs are of several kinds, all that have bytes or budgets of their own:
            then these hold, in place of the three above.
    """

    layer_s: Sequence[float]
    extra_s: float
    layer_bytes: Sequence[float]
    extra_bytes: float
    budget_bytes: float
    ranks: tuple[RankCosts, ...] = ()


def balance_layers(
    stages: Sequence[StageCosts], others: Sequence[StageCosts] = (), limit_s: float = inf
) -> tuple[int, ...] | None:
    """Return the layers of each stage that make the slowest stage fastest; None if none fits.

    Starts from a time that no cut can beat, and raises it to the next time at which some stage
    takes one more layer, until all layers are placed: the first that works is the best. Among the
    cuts with that slowest stage, an even one is taken.

    >>> stage = StageCosts([1.0] * 7, 0.0, [1.0] * 7, 0.0, 9.0)
    >>> balance_layers([stage, stage])
    (4, 3)

    Args:
        stages: What each stage costs.
        others: The same stages in another kind of step.
        limit_s: In which no stage may take longer than this.
    """
    num_layers = len(stages[0].layer_s)
    if len(stages) > num_layers or _too_large(stages):
        return None
    if len(stages) == 1:
        within = not others or slowest_s(others, (num_layers,)) <= limit_s * _ROUNDING
        return (num_layers,) if within else None
    search = _Search(stages, others, limit_s)
    stage_s = _least_s(stages)
    can_be = False
    while stage_s < inf:
        reach, next_s = search.fill(stage_s)
        if reach is not None:
            filled = tuple(end - start for start, end in pairwise(reach))
            return search.even_cut(reach, stage_s) or filled
        if next_s < 0:
            # Before more time is tried, whether any amount would do: memory does not grow with it.
            can_be = can_be or search.any_cut(inf)[0] is not None
            if not can_be:
                return None
            cut, next_s = search.any_cut(stage_s)
            if cut is not None:
                return cut
        stage_s = next_s
    return None


def balance_both(
    stages: Sequence[StageCosts], others: Sequence[StageCosts]
) -> list[tuple[int, ...]]:
    """Return the cuts of which none is faster in one kind of step without being slower in another.

    A step with prompts and one without weigh head, embedding and layers differently, so that no one
    cut need be best in both. Empty where none fits.

    Args:
        stages: What each stage costs in one kind of step.
        others: What it costs in the other; bytes and budgets are the same.
    """
    best_in_other = balance_layers(others)
    if best_in_other is None:
        return []
    least_s = slowest_s(others, best_in_other)
    cuts: list[tuple[int, ...]] = []
    cut = balance_layers(stages)
    while cut is not None and len(cuts) < _MOST_CUTS:
        if slowest_s(others, cut) > least_s * _ROUNDING:
            # Of those as fast, the one that is fastest in the other kind.
            cut = balance_layers(others, stages, slowest_s(stages, cut)) or cut
        cuts.append(cut)
        reached_s = slowest_s(others, cut)
        if reached_s <= least_s * _ROUNDING:
            break
        cut = balance_layers(stages, others, reached_s * (1 - 1e-9))
    return cuts


def slowest_s(stages: Sequence[StageCosts], cut: Sequence[int]) -> float:
    """Return the seconds of the slowest stage."""
    start, found = 0, 0.0
    for stage, count in zip(stages, cut, strict=True):
        found = max(found, sum(stage.layer_s[start : start + count]) + stage.extra_s)
        start += count
    return found


def cache_tokens(
    stages: Sequence[StageCosts],
    cut: Sequence[int],
    weight_bytes: Sequence[int],
    token_bytes: Sequence[int],
) -> float:
    """Return the tokens of KV cache that fit on the rank with least room for them.

    Args:
        stages: Budgets, and what ranks hold besides layers.
        cut: Layers of each stage.
        weight_bytes: Of each layer, on the fullest rank where ranks are alike.
        token_bytes: Cache of one token in each layer, likewise.
    """
    start, tokens = 0, inf
    for stage, count in zip(stages, cut, strict=True):
        layers = slice(start, start + count)
        if not stage.ranks:
            room = stage.budget_bytes - stage.extra_bytes - sum(weight_bytes[layers])
            tokens = min(tokens, room / sum(token_bytes[layers]))
        for rank in stage.ranks:
            room = rank.budget_bytes - rank.extra_bytes - sum(rank.weight_bytes[layers])
            tokens = min(tokens, room / sum(rank.token_bytes[layers]))
        start += count
    return tokens


def _too_large(stages: Sequence[StageCosts]) -> bool:
    """Return whether the layers exceed what all stages together may hold, or a rank of one."""
    if len(stages) == 1:
        return any(
            sum(rank.layer_bytes) > rank.budget_bytes - rank.extra_bytes
            for rank in stages[0].ranks or stages
        )
    firsts = [stage.ranks[0] if stage.ranks else stage for stage in stages]
    distinct = {id(rank.layer_bytes): rank.layer_bytes for rank in firsts}.values()
    least = next(iter(distinct)) if len(distinct) == 1 else map(min, *distinct)
    return sum(least) > sum(rank.budget_bytes - rank.extra_bytes for rank in firsts)


def _least_s(stages: Sequence[StageCosts]) -> float:
    """Return a time that no cut can beat: all work, each layer where it is fastest, shared out."""
    distinct = {id(stage.layer_s): stage.layer_s for stage in stages}.values()
    least = next(iter(distinct)) if len(distinct) == 1 else map(min, *distinct)
    work_s = sum(least) + sum(stage.extra_s for stage in stages)
    return work_s / len(stages) / _ROUNDING


# Cuts kept of those between the best for one kind of step and the best for another: layers are few
# and alike, so that there are hardly ever more than three.
_MOST_CUTS = 16
_ROUNDING = 1 + 1e-12  # a stage exactly at the limit is within it, whatever the last bit says


class _Search:
    """One problem, with the sums that every look at it needs.

    `seconds[s]` are the seconds of stage `s` up to each layer; `bounds[s]` are sums of what else is
    limited (bytes, seconds of another kind of step), with the room that the stage has for it.
    """

    def __init__(
        self, stages: Sequence[StageCosts], others: Sequence[StageCosts], limit_s: float
    ) -> None:
        self._stages = stages
        self._num_layers = len(stages[0].layer_s)
        sums: dict[int, list[float]] = {}

        def up_to(values: Sequence[float]) -> list[float]:
            if id(values) not in sums:
                sums[id(values)] = [0.0, *accumulate(values)]
            return sums[id(values)]

        self._seconds = [up_to(stage.layer_s) for stage in stages]
        self._bounds = [
            [
                (up_to(rank.layer_bytes), rank.budget_bytes - rank.extra_bytes)
                for rank in stage.ranks or (stage,)
            ]
            for stage in stages
        ]
        for bounds, other in zip(self._bounds, others, strict=False):
            bounds.append((up_to(other.layer_s), limit_s * _ROUNDING - other.extra_s))

    def fill(self, stage_s: float) -> tuple[list[int] | None, float]:
        """Return how far the stages reach, each filled as far as time and memory allow.

        `reach[s]` is the first layer that stages before `s` cannot take. None stands for layers
        left over; then the second value is the least time that lets some stage take one more. It is
        negative where a stage got no layer at all, which filling those before it less might change.
        """
        num_stages = len(self._stages)
        reach, next_s = [0], inf
        start = 0
        for index in range(num_stages):
            end, more_s = self._end(index, start, stage_s, num_stages - 1 - index)
            if more_s < next_s:
                next_s = more_s
            if end <= start:
                return None, -1.0
            reach.append(end)
            start = end
        return (reach if reach[-1] == self._num_layers else None), next_s

    def even_cut(self, reach: Sequence[int], stage_s: float) -> tuple[int, ...] | None:
        """Return a cut within the limits with numbers of layers as equal as they allow.

        None where an even share would leave an earlier stage without a layer that it can take.
        """
        ends = [reach[-1]]
        for index in range(len(self._stages) - 1, 0, -1):
            end = ends[-1]
            even = end - end // (index + 1)
            ends.append(max(self._start(index, end, stage_s), min(reach[index], even)))
            if ends[-1] >= end:
                return None
        ends.reverse()
        if self._start(0, ends[0], stage_s) > 0:
            return None
        return tuple(end - start for start, end in pairwise([0, *ends]))

    def any_cut(self, stage_s: float) -> tuple[tuple[int, ...] | None, float]:
        """Return a cut within the limits, and else the least time that lets a stage take one more.

        Follows every layer at which a stage may end, where `fill` follows the last one only. Needed
        when layers or budgets differ so much that a stage can take some layers and not others.
        """
        came_from: list[dict[int, int]] = []
        starts, next_s = [0], inf
        for index in range(len(self._stages)):
            before: dict[int, int] = {}
            for start in starts:
                if start == self._num_layers:
                    continue
                end, more_s = self._end(index, start, stage_s, 0)
                next_s = min(next_s, more_s)
                for stop in range(start + 1, end + 1):
                    before[stop] = start
            came_from.append(before)
            starts = sorted(before)
        if self._num_layers not in came_from[-1]:
            return None, next_s
        ends = [self._num_layers]
        for before in reversed(came_from):
            ends.append(before[ends[-1]])
        ends.reverse()
        return tuple(end - start for start, end in pairwise(ends)), inf

    def _end(self, index: int, start: int, stage_s: float, stages_after: int) -> tuple[int, float]:
        """Return where a stage that starts at `start` must end, and the time for one layer more."""
        # Comparisons instead of min and max: a large search asks this a million times.
        total, extra_s = self._seconds[index], self._stages[index].extra_s
        latest = self._num_layers - stages_after
        for sums, room in self._bounds[index]:
            most = bisect_right(sums, sums[start] + room) - 1
            if most < latest:
                latest = most
        end = bisect_right(total, total[start] + stage_s * _ROUNDING - extra_s) - 1
        if end >= latest:
            return latest, inf
        return end, total[(end if end > start else start) + 1] - total[start] + extra_s

    def _start(self, index: int, end: int, stage_s: float) -> int:
        """Return the first layer from which a stage that ends at `end` stays within its limits."""
        total, extra_s = self._seconds[index], self._stages[index].extra_s
        earliest = bisect_left(total, total[end] + extra_s - stage_s * _ROUNDING)
        for sums, room in self._bounds[index]:
            earliest = max(earliest, bisect_left(sums, sums[end] - room))
        return earliest
