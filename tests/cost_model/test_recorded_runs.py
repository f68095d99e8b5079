"""Predictions against what the executor took on GPUs, as recorded under `benchmarks/results`."""

import pytest

from bench_accuracy import conformal_factors
from executor_points import POINTS, Point, fitting
from result import RESULTS
from score_executor import read_all, summary


def test_recorded_steps_and_memory_of_the_engine_as_it_is_are_predicted() -> None:
    current = [row for row in read_all(RESULTS) if row.current]
    decode, prompt, memory = (summary(current, what) for what in ("decode", "prompt", "memory"))
    assert decode["rows"] >= 60
    assert prompt["rows"] >= 30
    assert decode["mean_abs_error"] < 0.06
    assert decode["p90_abs_error"] < 0.12
    # Short prompts are the host's time, which other runs on the machine share (docs/accuracy.md).
    assert abs(prompt["median_predicted_over_measured"] - 1) < 0.05
    assert prompt["mean_abs_error"] < 0.16
    latent = [row for row in current if row.what == "prompt" and "DeepSeek" in row.run]
    assert len(latent) == 4
    assert all(abs(row.ratio - 1) < 0.15 for row in latent)
    assert memory["largest_error"] < 0.04
    assert memory["least_predicted_over_measured"] > 1, "memory that is there must be planned for"


def test_points_cover_batches_and_contexts_and_leave_out_what_does_not_fit() -> None:
    decodes = [point for point in POINTS if point.kind == "decode"]
    assert {1, 256} <= {point.batch for point in decodes}
    assert {128, 16000} <= {point.context for point in decodes}
    few = fitting(POINTS, max_num_seqs=8, max_tokens=4096, room=40_000)
    assert Point("decode", 8, 512) in few
    assert Point("decode", 32, 1024) not in few  # too many sequences
    assert Point("decode", 1, 16000) not in few  # too long
    assert Point("decode", 8, 4096) not in few


def test_factors_hold_the_next_figure_as_often_as_asked() -> None:
    ratios = [number / 100 for number in range(50, 150)]
    low, high = conformal_factors(ratios)
    assert (low, high) == pytest.approx((0.591, 1.399), abs=0.01)
    # Few rows say little: the interval is wider than the tenths of them.
    assert conformal_factors(ratios[::10])[0] < 0.6
