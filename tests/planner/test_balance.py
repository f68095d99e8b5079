from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.planner.balance import StageCosts, balance_layers
from rankwright.planner.stages_program import solve_stages


def stage(layer_s: list[float], extra_s: float = 0.0, budget: float = 1e9) -> StageCosts:
    return StageCosts(layer_s, extra_s, [1.0] * len(layer_s), 0.0, budget)


def slowest(stages: list[StageCosts], cut: tuple[int, ...]) -> float:
    start, worst = 0, 0.0
    for one, count in zip(stages, cut, strict=True):
        worst = max(worst, sum(one.layer_s[start : start + count]) + one.extra_s)
        start += count
    return worst


def fits(stages: list[StageCosts], cut: tuple[int, ...]) -> bool:
    start = 0
    for one, count in zip(stages, cut, strict=True):
        size = sum(one.layer_bytes[start : start + count]) + one.extra_bytes
        if size > one.budget_bytes:
            return False
        start += count
    return True


def brute_force(stages: list[StageCosts]) -> float | None:
    num_layers = len(stages[0].layer_s)
    cuts = (
        tuple(b - a for a, b in zip((0, *inner), (*inner, num_layers), strict=True))
        for inner in combinations(range(1, num_layers), len(stages) - 1)
    )
    return min((slowest(stages, cut) for cut in cuts if fits(stages, cut)), default=None)


def test_equal_layers_are_shared_evenly() -> None:
    layers = [1.0] * 80
    assert balance_layers([stage(layers)] * 3) == (27, 27, 26)
    assert balance_layers([stage(layers)] * 8) == (10,) * 8


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    layers = [1.0] * 32
    assert balance_layers([stage(layers), stage(layers, extra_s=4.0)]) == (18, 14)


def test_a_small_gpu_gets_what_fits() -> None:
    layers = [1.0] * 12
    assert balance_layers([stage(layers), stage(layers, budget=3.0)]) == (9, 3)
    assert balance_layers([stage(layers, budget=8.0), stage(layers, budget=3.0)]) is None


def test_a_slow_gpu_gets_fewer_layers() -> None:
    assert balance_layers([stage([1.0] * 12), stage([3.0] * 12)]) == (9, 3)


def test_more_stages_than_layers_cannot_be() -> None:
    assert balance_layers([stage([1.0])] * 2) is None


durations = st.sampled_from([0.5, 1.0, 1.5, 3.0])


@st.composite
def problems(draw: st.DrawFn) -> list[StageCosts]:
    num_layers = draw(st.integers(1, 8))
    num_stages = draw(st.integers(1, min(4, num_layers)))
    sizes = draw(st.lists(durations, min_size=num_layers, max_size=num_layers))
    base = draw(st.lists(durations, min_size=num_layers, max_size=num_layers))
    return [
        StageCosts(
            [seconds * speed for seconds in base],
            draw(st.sampled_from([0.0, 0.5, 2.0])),
            sizes,
            draw(st.sampled_from([0.0, 1.0])),
            draw(st.sampled_from([3.0, 6.0, 100.0])),
        )
        for speed in draw(
            st.lists(st.sampled_from([1.0, 1.0, 2.0]), min_size=num_stages, max_size=num_stages)
        )
    ]


@given(problems())
def test_the_search_equals_brute_force(stages: list[StageCosts]) -> None:
    best, cut = brute_force(stages), balance_layers(stages)
    assert (cut is None) == (best is None)
    if cut is not None:
        assert sum(cut) == len(stages[0].layer_s)
        assert min(cut) >= 1
        assert fits(stages, cut)
        assert slowest(stages, cut) == pytest.approx(best)


@settings(deadline=None, max_examples=40)
@given(problems())
def test_the_integer_program_equals_the_search(stages: list[StageCosts]) -> None:
    cut, searched = solve_stages(stages), balance_layers(stages)
    assert (cut is None) == (searched is None)
    if cut is not None and searched is not None:
        assert fits(stages, cut)
        assert slowest(stages, cut) == pytest.approx(slowest(stages, searched))
