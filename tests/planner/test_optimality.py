"""The planner against trying everything; `benchmarks/bench_planner.py` does 2,000 of these."""

import pytest
from tests.planner.exhaustive import exhaustive
from tests.planner.exhaustive_shares import few_units
from tests.planner.random_cases import Case, random_case

from rankwright.planner.ilp import Choice

# Among these are a pipeline that steps with prompts and without balance differently (14), a limit
# that a larger batch keeps and a smaller breaks (67), more replicas than requests (403), and an
# objective of 2 ms (128).
SEEDS = (1, 5, 14, 34, 55, 67, 89, 128, 353, 403)


def choice_of(case: Case) -> Choice | None:
    return case.search().best(settle=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_plan_is_as_good_as_the_best_of_all(seed: int) -> None:
    case = random_case(seed)
    with few_units():
        choice, best = choice_of(case), exhaustive(case)
    assert (choice is None) == (best is None)
    if choice is not None:
        assert choice.value == pytest.approx(best)
        assert choice.ending.gap <= 1e-6


@pytest.mark.parametrize("seed", range(37, 43))
def test_both_solvers_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(seed)
    highs = choice_of(case)
    monkeypatch.setattr("rankwright.planner.solver.find_spec", lambda name: None)
    cbc = choice_of(case)
    assert (highs is None) == (cbc is None)
    if highs is not None and cbc is not None:
        assert (highs.ending.solver.split()[0], cbc.ending.solver) == ("HiGHS", "CBC")
        assert highs.value == pytest.approx(cbc.value)
