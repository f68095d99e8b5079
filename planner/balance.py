"""Cuts the layers of a model into stages so that the slowest stage is as fast as it can be.

The search asks this thousands of times, so it is not an integer program but an exact search on the
one number that matters, the time of the slowest stage: for a given time, filling every stage as far
as time and memory allow is optimal for contiguous layers. `ilp.solve_stages` states the same
problem as an integer program, which the tests hold this to.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    if len(stages) > len(stages[0].layer_s):
        return None
    sums: dict[int, list[float]] = {}
    for stage in stages:
        for values in (stage.layer_s, stage.layer_bytes):
            if id(values) not in sums:
                sums[id(values)] = [0.0, *accumulate(values)]
    seconds = [sums[id(stage.layer_s)] for stage in stages]
    sizes = [sums[id(stage.layer_bytes)] for stage in stages]
    # No cut is faster than all layers at the fastest stage's speed, shared out evenly.
    limit_s = min(total[-1] for total in seconds) / len(stages)
    while limit_s < inf:
        reach, next_s = _fill(stages, seconds, sizes, limit_s)
        if reach is not None:
            return _even_cut(stages, seconds, sizes, reach, limit_s)
        limit_s = next_s
    return None


_ROUNDING = 1 + 1e-12  # a stage exactly at the limit is within it, whatever the last bit says


def _fill(
    stages: Sequence[StageCosts],
    seconds: Sequence[list[float]],
    sizes: Sequence[list[float]],
    limit_s: float,
) -> tuple[list[int] | None, float]:
    """Return how far the stages reach, each filled as far as time and memory allow.

    `reach[s]` is the first layer that stages before `s` cannot take. None stands for layers left
    over; then the second value is the least time that lets some stage take one more.
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
            return None, next_s
        reach.append(end)
    return (reach if reach[-1] == num_layers else None), next_s


def _even_cut(
    stages: Sequence[StageCosts],
    seconds: Sequence[list[float]],
    sizes: Sequence[list[float]],
    reach: Sequence[int],
    limit_s: float,
) -> tuple[int, ...]:
    """Return a cut within the limits whose stages have as equal numbers of layers as they allow."""
    ends = [reach[-1]]
    for index in range(len(stages) - 1, 0, -1):
        end, stage = ends[-1], stages[index]
        earliest = bisect_left(
            seconds[index], seconds[index][end] + stage.extra_s - limit_s * _ROUNDING
        )
        room = stage.budget_bytes - stage.extra_bytes
        earliest = max(earliest, bisect_left(sizes[index], sizes[index][end] - room))
        even = end - round(end / (index + 1))
        ends.append(max(earliest, min(reach[index], even)))
    ends.reverse()
    return tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))
