"""Deals units of a model over GPUs of several kinds so that the slowest rank is fastest.

Three parts are dealt: groups of heads, feed-forward columns, rows of the vocabulary. Ranks on GPUs
of one kind get equal shares, as equal as whole units allow, so that what is sought is the most
units `m[p, k]` of part `p` that a rank of kind `k` holds:

    minimise   sum_s weight[s] * max(least_s[s], sum_{t in s} max_k seconds[t, k](m[part[t], k]))
    sum_k ranks[k] * m[p, k] >= units[p]                    every unit is held
    rows[k] . (m[0, k], m[1, k], m[2, k]) <= room           memory of a rank of each kind

A sum `s` is a layer in one kind of step: attention, then the feed-forward block, no faster than the
host launches it. Without the memory rows and the floors each part is on its own, and for two kinds
of GPU the answer has a closed form: seconds rise with the units, so that the best of a term is
where those of one kind overtake those of the other, and the best of several terms between. Where
that breaks no memory row and meets no floor, it is the optimum. Else the integer program above is
solved, with the seconds as the chords of their (convex, piecewise linear) curves.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import pulp

from rankwright.planner.solver import solve

Seconds = Callable[[int], float]  # of a rank with so many units; never falls
Units = tuple[tuple[int, ...], ...]  # [part][kind of GPU]: the most units of a rank

_ROUNDING = 1e-9  # relative: what sums of the same seconds in another order may differ by


@dataclass(frozen=True, slots=True)
class Term:
    """What ranks do between two sums over them: it lasts as long as on the slowest."""

    part: int
    seconds: tuple[Seconds, ...]  # by kind of GPU

    def value(self, units: Sequence[int]) -> float:
        """Return the seconds where a rank of each kind has so many units."""
        return max(seconds(count) for seconds, count in zip(self.seconds, units, strict=True))


@dataclass(frozen=True, slots=True)
class Sum:
    """Terms that follow each other, with how much their seconds weigh, and the least they take."""

    weight: float
    terms: tuple[Term, ...]
    least_s: float = -inf


@dataclass(frozen=True, slots=True)
class Room:
    """A row of memory of a rank: bytes of a unit of each part, and the bytes there are for them."""

    unit_bytes: tuple[float, ...]
    room_bytes: float

    def holds(self, units: Sequence[int]) -> bool:
        """Return whether so many units of each part fit."""
        taken = sum(size * count for size, count in zip(self.unit_bytes, units, strict=True))
        return taken <= self.room_bytes


@dataclass(frozen=True, slots=True)
class ShareProblem:
    """Units of each part to deal, over how many ranks of each kind, at which cost.

    Args:
        ranks: Ranks of each kind of GPU.
        units: Units of each part.
        sums: What is minimised.
        rooms: Rows of memory of each kind of GPU.
    """

    ranks: tuple[int, ...]
    units: tuple[int, ...]
    sums: tuple[Sum, ...]
    rooms: tuple[tuple[Room, ...], ...]

    def value(self, dealt: Units) -> float:
        """Return the seconds that are minimised."""
        return sum(
            one.weight * max(one.least_s, sum(term.value(dealt[term.part]) for term in one.terms))
            for one in self.sums
        )

    def fits(self, dealt: Units) -> bool:
        """Return whether a rank of each kind has memory for its units."""
        held = list(zip(*dealt, strict=True))
        return all(room.holds(held[kind]) for kind, rows in enumerate(self.rooms) for room in rows)

    def most(self, part: int, kind: int) -> int:
        """Return the most units that a rank of `kind` can have: all others have one at least."""
        others = sum(self.ranks) - self.ranks[kind]
        return -(-(self.units[part] - others) // self.ranks[kind])


def deal(problem: ShareProblem) -> Units | None:
    """Return the most units of each part that a rank of each kind holds; None where none fit."""
    found = closed_form(problem)
    if found is not None and problem.fits(found):
        return found
    if _too_large(problem):
        return None
    return _solve(problem)


def closed_form(problem: ShareProblem) -> Units | None:
    """Return the optimum without memory rows; None where it has no closed form.

    Without the floors, or with the sums that have one at their floor, the value is a bound: where
    what is best for it attains it, nothing can be better.
    """
    if len(problem.ranks) > 2:
        return None
    for sums in (problem.sums, [one for one in problem.sums if one.least_s == -inf]):
        dealt = tuple(_deal_part(problem, part, sums) for part in range(len(problem.units)))
        bound = sum(
            one.weight * sum(term.value(dealt[term.part]) for term in one.terms) for one in sums
        )
        if len(sums) < len(problem.sums):
            bound += sum(one.weight * one.least_s for one in problem.sums if one.least_s > -inf)
        if problem.value(dealt) <= bound * (1 + _ROUNDING):
            return dealt
    return None


def _deal_part(problem: ShareProblem, part: int, sums: Sequence[Sum]) -> tuple[int, ...]:
    """Return the best units of one part on its own, over one kind of GPU or two."""
    terms = [
        (one.weight, term)
        for one in sums
        for term in one.terms
        if term.part == part and one.weight > 0
    ]
    if len(problem.ranks) == 1:
        return (problem.most(part, 0),)
    choices = range(1, problem.most(part, 0) + 1)
    dealt = [_with_rest(problem, part, first) for first in choices]
    if not terms:
        return min(dealt, key=max)
    crossings: list[int] = []
    for _, term in terms:
        one, other = term.seconds
        crossings.append(bisect_left(dealt, True, key=lambda pair: one(pair[0]) >= other(pair[1])))
    low, high = max(0, min(crossings) - 1), max(crossings)
    return min(
        dealt[low : high + 1],
        key=lambda pair: sum(weight * term.value(pair) for weight, term in terms),
    )


def _with_rest(problem: ShareProblem, part: int, first: int) -> tuple[int, int]:
    """Return `first` with what is left for a rank of the other kind."""
    rest = problem.units[part] - first * problem.ranks[0]
    return first, max(1, -(-rest // problem.ranks[1]))


def _too_large(problem: ShareProblem) -> bool:
    """Return whether all units are more than all ranks can hold, each where it takes least."""
    least = [
        min(rows[0].unit_bytes[part] for rows in problem.rooms) * units
        for part, units in enumerate(problem.units)
    ]
    rooms = zip(problem.ranks, problem.rooms, strict=True)
    return sum(least) > sum(count * rows[0].room_bytes for count, rows in rooms)


def _solve(problem: ShareProblem) -> Units | None:
    """Return what the integer program deals; None where it has no solution."""
    program = pulp.LpProblem("shares", pulp.LpMinimize)
    add = program.add_variable
    kinds = range(len(problem.ranks))
    dealt = [
        [add(f"m{part}_{kind}", 1, problem.most(part, kind), pulp.LpInteger) for kind in kinds]
        for part in range(len(problem.units))
    ]
    for held, units in zip(dealt, problem.units, strict=True):
        program += pulp.lpDot(problem.ranks, held) >= units
    for kind, rows in enumerate(problem.rooms):
        for room in rows:
            if room.room_bytes <= 0:
                return None
            shares = [size / room.room_bytes for size in room.unit_bytes]
            program += pulp.lpDot(shares, [held[kind] for held in dealt]) <= 1
    even = tuple(
        tuple(min(-(-units // sum(problem.ranks)), problem.most(part, kind)) for kind in kinds)
        for part, units in enumerate(problem.units)
    )
    scale = problem.value(even)  # solvers compare to 1e-6, and a step may take 1 ms
    values: list[pulp.LpVariable] = []
    for number, one in enumerate(problem.sums):
        lasts = add(f"s{number}", max(0.0, one.least_s / scale))
        values.append(lasts)
        terms: list[pulp.LpVariable] = []
        for index, term in enumerate(one.terms):
            seconds = add(f"t{number}_{index}", 0)
            terms.append(seconds)
            for kind in kinds:
                most = problem.most(term.part, kind)
                for slope, intercept in _chords(term.seconds[kind], most):
                    line = slope / scale * dealt[term.part][kind] + intercept / scale
                    program += seconds >= line
        program += lasts >= pulp.lpSum(terms)
    program += pulp.lpDot([one.weight for one in problem.sums], values)
    if solve(program) is None:
        return None
    return tuple(tuple(round(count.value()) for count in held) for held in dealt)


def _chords(seconds: Seconds, most: int) -> Iterator[tuple[float, float]]:
    """Yield slope and intercept of each straight piece of `seconds` from 1 to `most` units."""
    if most == 1:
        yield 0.0, seconds(1)
        return
    pieces = [(1, most)]
    while pieces:
        low, high = pieces.pop()
        slope = (seconds(high) - seconds(low)) / (high - low)
        middle = (low + high) // 2
        straight = seconds(low) + slope * (middle - low)
        if high - low > 1 and seconds(middle) < straight * (1 - _ROUNDING):
            pieces += [(low, middle), (middle, high)]
        else:
            yield slope, seconds(low) - slope * low
