"""Intervals hold about as much as they say: on kernels that the shares were not fitted to."""

from pathlib import Path

import pytest

from fit_calibrations import held_back_ratios, row_of
from rankwright.cost_model.calibration import read_calibration
from rankwright.cost_model.efficiency import find_efficiency
from rankwright.cost_model.intervals import (
    BEYOND,
    ENGINES,
    LAUNCHED,
    OURS,
    Intervals,
    engine_intervals,
)
from rankwright.cost_model.predict import predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.shorthand import parse_cluster

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CALIBRATIONS = ("calibration-2xnvidia-h200.json", "calibration-nvidia-h100-80gb-hbm3.json")


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_about_80_of_100_held_back_kernels_lie_inside(name: str) -> None:
    ratios = held_back_ratios(read_calibration(RESULTS / name))
    # The kernels that steps are made of.
    steps = ratios["gemm"] + ratios["attention decode"] + ratios["attention prefill"]
    low, high = OURS["measured table"].tpot
    inside = sum(low <= ratio <= high for ratio in steps) / len(steps)
    print(f"\n{name}: {inside:.0%} of {len(steps)} held-back kernels inside")
    assert 0.72 < inside < 0.95


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_the_shares_that_ship_are_those_of_the_calibration(name: str) -> None:
    calibration = read_calibration(RESULTS / name)
    gpu = parse_cluster(f"1x{calibration.device}").nodes[0].gpus[0]
    shipped = find_efficiency("rankwright", gpu)
    for field, value in row_of(calibration)["shares"].items():
        assert getattr(shipped, field) == value


def widths(intervals: Intervals) -> tuple[float, ...]:
    return tuple(high / low for low, high in (intervals.tpot, intervals.rate, intervals.prompt))


def test_intervals_narrow_with_what_was_measured() -> None:
    analytic, table, here = (
        widths(OURS[key]) for key in ("analytic", "measured table", "measured here")
    )
    for wide, middle, narrow in zip(analytic, table, here, strict=True):
        assert wide > middle > narrow
    for row in (*OURS.values(), *ENGINES.values()):
        for low, high in (row.tpot, row.rate, row.prompt, row.wait):
            assert 0 < low < 1 < high


def test_what_was_not_fitted_to_has_wider_intervals() -> None:
    dense, experts = map(read_model, ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B"))
    h100, b200 = (parse_cluster(f"1x{name}").nodes[0].gpus[0] for name in ("h100-sxm", "b200-sxm"))
    for engine, fitted in ENGINES.items():
        assert engine_intervals(engine, dense, h100) == fitted
        assert engine_intervals(engine, dense, b200) == BEYOND
        assert engine_intervals(engine, experts, h100) == BEYOND


def test_first_tokens_that_wait_for_the_host_may_take_twice_as_long() -> None:
    model, cluster = read_model("meta-llama/Llama-3.1-8B"), parse_cluster("1xh200-sxm")
    split = Split(stage_layers=(32,))
    for tokens, factors in ((128, LAUNCHED), (2000, OURS["measured table"].prompt)):
        load = Workload(input_tokens=tokens, output_tokens=128)
        made = predict(model, cluster, load, split).ttft_s
        assert (made.low / made.value, made.high / made.value) == pytest.approx(factors)
