"""Cuts the layers of a model into stages so that the slowest stage is as fast as it can be.

The search asks this thousands of times, so it is not an integer program but an exact search on the
one number that matters, the time of the slowest stage: for a given time, filling every stage as far
as time and memory allow finds out whether contiguous layers can keep it. `ilp.solve_stages` states
the same problem as an integer program, to which the tests hold this.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Costs of one stage, for whichever layers it gets.

    Args:
        layer_s: Seconds of each layer of the model on this stage's GPUs.
        extra_s: Seconds besides: embedding, head, hand-over.
        layer_bytes: Bytes of each layer on this stage's fullest rank, KV cache included.
        extra_bytes: Bytes besides.
        budget_bytes: Bytes of its smallest GPU that may be used.
    """

    layer_s: Sequence[float]
    extra_s: float
    layer_bytes: Sequence[float]
    extra_bytes: float
    budget_bytes: float


def balance_layers(stages: Sequence[StageCosts]) -> tuple[int, ...] | None:
    """Return the layers of each stage that make the slowest stage fastest; None if none fits.

    Starts from a time that no cut can beat, and raises it to the next time at which some stage
    takes one more layer, until all layers are placed: the first that works is the best. Among the
    cuts with that slowest stage, an even one is taken.

    >>> stage = StageCosts([1.0] * 7, 0.0, [1.0] * 7, 0.0, 9.0)
    >>> balance_layers([stage, stage])
    (4, 3)
    """
    num_layers = len(stages[0].layer_s)
    if len(stages) > num_layers or _too_large(stages):
        return None
    if len(stages) == 1:
        return (num_layers,)
    sums: dict[int, list[float]] = {}
    for stage in stages:
        for values in (stage.layer_s, stage.layer_bytes):
            if id(values) not in sums:
                sums[id(values)] = [0.0, *accumulate(values)]
    seconds = [sums[id(stage.layer_s)] for stage in stages]
    sizes = [sums[id(stage.layer_bytes)] for stage in stages]
    limit_s = _least_s(stages)
    while limit_s < inf:
        reach, next_s = _fill(stages, seconds, sizes, limit_s)
        if reach is not None:
            filled = tuple(end - start for start, end in pairwise(reach))
            return _even_cut(stages, seconds, sizes, reach, limit_s) or filled
        if next_s < 0:
            cut, next_s = _any_cut(stages, seconds, sizes, limit_s)
            if cut is not None:
                return cut
        limit_s = next_s
    return None


def _too_large(stages: Sequence[StageCosts]) -> bool:
    """Return whether the layers exceed what all stages together may hold."""
    distinct = {id(stage.layer_bytes): stage.layer_bytes for stage in stages}.values()
    least = next(iter(distinct)) if len(distinct) == 1 else map(min, *distinct)
    return sum(least) > sum(stage.budget_bytes - stage.extra_bytes for stage in stages)


def _least_s(stages: Sequence[StageCosts]) -> float:
    """Return a time that no cut can beat: all work, each layer where it is fastest, shared out."""
    distinct = {id(stage.layer_s): stage.layer_s for stage in stages}.values()
    least = next(iter(distinct)) if len(distinct) == 1 else map(min, *distinct)
    work_s = sum(least) + sum(stage.extra_s for stage in stages)
    return work_s / len(stages) / _ROUNDING


_ROUNDING = 1 + 1e-12  # a stage exactly at the limit is within it, whatever the last bit says


def _fill(
    stages: Sequence[StageCosts],
    seconds: Sequence[list[float]],
    sizes: Sequence[list[float]],
    limit_s: float,
) -> tuple[list[int] | None, float]:
    """Return how far the stages reach, each filled as far as time and memory allow.

    `reach[s]` is the first layer that stages before `s` cannot take. None stands for layers left
    over; then the second value is the least time that lets some stage take one more. It is negative
    where a stage got no layer at all, which filling the stages before it less might change.
    """
    num_layers, num_stages = len(stages[0].layer_s), len(stages)
    reach, next_s = [0], inf
    for index, (stage, total, size) in enumerate(zip(stages, seconds, sizes, strict=True)):
        start = reach[-1]
        room = size[start] + stage.budget_bytes - stage.extra_bytes
        latest = min(bisect_right(size, room) - 1, num_layers - (num_stages - 1 - index))
        time_left = total[start] + limit_s * _ROUNDING - stage.extra_s
        end = min(bisect_right(total, time_left) - 1, latest)
        if end < latest:
            one_more = max(end, start) + 1
            next_s = min(next_s, total[one_more] - total[start] + stage.extra_s)
        if end <= start:
            return None, -1.0
        reach.append(end)
    return (reach if reach[-1] == num_layers else None), next_s


def _even_cut(
    stages: Sequence[StageCosts],
    seconds: Sequence[list[float]],
    sizes: Sequence[list[float]],
    reach: Sequence[int],
    limit_s: float,
) -> tuple[int, ...] | None:
    """Return a cut within the limits whose stages have as equal numbers of layers as they allow.

    None where an even share would leave an earlier stage without a layer that it can take.
    """
    ends = [reach[-1]]
    for index in range(len(stages) - 1, 0, -1):
        end = ends[-1]
        earliest = _earliest_start(stages[index], seconds[index], sizes[index], end, limit_s)
        even = end - end // (index + 1)
        ends.append(max(earliest, min(reach[index], even)))
        if ends[-1] >= end:
            return None
    ends.reverse()
    if _earliest_start(stages[0], seconds[0], sizes[0], ends[0], limit_s) > 0:
        return None
    return tuple(end - start for start, end in pairwise([0, *ends]))


def _any_cut(
    stages: Sequence[StageCosts],
    seconds: Sequence[list[float]],
    sizes: Sequence[list[float]],
    limit_s: float,
) -> tuple[tuple[int, ...] | None, float]:
    """Return a cut within the limits, and else the least time that lets any stage take one more.

    Follows every layer at which a stage may end, where `_fill` follows the last one only. Needed
    when layers or budgets differ so much that a stage can take some layers and not others.
    """
    num_layers = len(stages[0].layer_s)
    came_from: list[dict[int, int]] = []
    starts, next_s = [0], inf
    for stage, total, size in zip(stages, seconds, sizes, strict=True):
        before: dict[int, int] = {}
        for start in starts:
            if start == num_layers:
                continue
            room = size[start] + stage.budget_bytes - stage.extra_bytes
            latest = bisect_right(size, room) - 1
            time_left = total[start] + limit_s * _ROUNDING - stage.extra_s
            end = min(bisect_right(total, time_left) - 1, latest)
            if end < latest:
                one_more = max(end, start) + 1
                next_s = min(next_s, total[one_more] - total[start] + stage.extra_s)
            for stop in range(start + 1, end + 1):
                before[stop] = start
        came_from.append(before)
        starts = sorted(before)
    if num_layers not in came_from[-1]:
        return None, next_s
    ends = [num_layers]
    for before in reversed(came_from):
        ends.append(before[ends[-1]])
    ends.reverse()
    return tuple(end - start for start, end in pairwise(ends)), inf


def _earliest_start(
    stage: StageCosts,
    seconds: list[float],
    sizes: list[float],
    end: int,
    limit_s: float,
) -> int:
    """Return the first layer from which a stage that ends at `end` stays within its limits."""
    by_time = bisect_left(seconds, seconds[end] + stage.extra_s - limit_s * _ROUNDING)
    by_size = bisect_left(sizes, sizes[end] + stage.extra_bytes - stage.budget_bytes)
    return max(by_time, by_size)
