"""Shares over unlike GPUs against trying all of them."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.planner.share_problem import Room, ShareProblem, Sum, Term, Units, closed_form, deal


def brute_force(problem: ShareProblem) -> float | None:
    """Return the least value of all units that cover what there is and fit; None where none do."""
    kinds = range(len(problem.ranks))
    covers = [
        [
            held
            for held in product(*(range(1, problem.most(part, kind) + 1) for kind in kinds))
            if sum(n * m for n, m in zip(problem.ranks, held, strict=True)) >= units
        ]
        for part, units in enumerate(problem.units)
    ]
    values = [problem.value(dealt) for dealt in product(*covers) if problem.fits(dealt)]
    return min(values, default=None)


@st.composite
def problems(draw: st.DrawFn, *, with_memory: bool = True) -> ShareProblem:
    """Draw a problem of up to three kinds of GPU; seconds are maxima of straight lines."""
    number = st.integers(1, 20).map(float)
    ranks = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=3)))
    units = tuple(sum(ranks) + draw(st.integers(0, 9 - 3 * len(ranks))) for _ in range(3))

    def term(part: int) -> Term:
        curves = []
        for _ in ranks:
            slopes = [(draw(number), draw(number)) for _ in range(2)]
            curves.append(lambda m, lines=slopes: max(a * m + b for a, b in lines))
        return Term(part, tuple(curves))

    sums = [
        Sum(draw(st.integers(0, 3)) / 2, (term(0), term(1)), draw(st.sampled_from([-1e9, 30, 80])))
        for _ in range(2)
    ]
    sums = [Sum(s.weight, s.terms, s.least_s if s.least_s > 0 else float("-inf")) for s in sums]
    sums.append(Sum(0.5, (term(2),)))
    room = st.integers(10, 150).map(float) if with_memory else st.just(1e6)
    rooms = tuple(
        tuple(Room((draw(number), draw(number), draw(number)), draw(room)) for _ in range(2))
        for _ in ranks
    )
    return ShareProblem(ranks, units, tuple(sums), rooms)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_shares_are_as_good_as_the_best_of_all(problem: ShareProblem) -> None:
    found, best = deal(problem), brute_force(problem)
    assert (found is None) == (best is None)
    if found is not None:
        assert problem.fits(found)
        assert problem.value(found) == pytest.approx(best, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(problems(with_memory=False))
def test_what_has_a_closed_form_is_best_by_it(problem: ShareProblem) -> None:
    found = closed_form(problem)
    if found is not None:
        assert problem.value(found) == pytest.approx(brute_force(problem))


def test_a_gpu_of_three_times_the_speed_gets_three_times_the_work() -> None:
    fast, slow = (lambda m: 1.0 * m), (lambda m: 3.0 * m)
    sums = (Sum(1.0, tuple(Term(part, (fast, slow)) for part in range(3))),)
    roomy = Room((1.0, 1.0, 1.0), 1e9)
    problem = ShareProblem((1, 1), (8, 224, 251), sums, ((roomy,), (roomy,)))
    expected: Units = ((6, 2), (168, 56), (188, 63))
    assert deal(problem) == expected
    # Memory for 20 units on the faster GPU, 4 of which any other part takes more quickly.
    tight = ShareProblem((1, 1), (8, 12, 8), sums, ((Room((1.0,) * 3, 18.0),), (roomy,)))
    assert deal(tight) is not None
    assert sum(part[0] for part in deal(tight) or ()) <= 18
