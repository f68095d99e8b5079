"""Intervals hold about as much as they say: on kernels that the shares were not fitted to."""

from pathlib import Path

import pytest

from fit_calibrations import held_back_ratios, row_of
from rankwright.cost_model.calibration import read_calibration
from rankwright.cost_model.efficiency import find_efficiency
from rankwright.cost_model.intervals import ENGINES, OURS, Intervals
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
