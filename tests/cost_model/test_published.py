"""Scores predictions against published measurements that no constant was fitted to.

The rows are not ours to ship: they lie beside the repository, and the tests skip without them.
`benchmarks/bench_accuracy.py` scores all of them; here are some, for seconds instead of minutes.
"""

import statistics
import zlib

import pytest

from published import DEFAULT_ROWS, Measured, read_published
from rankwright.cost_model.predict import predict
from rankwright.cost_model.prediction import Prediction


def held_back(kind: str, count: int) -> list[tuple[Measured, Prediction]]:
    """Predict `count` held-back rows of `kind`, chosen by checksum.

    Not every n-th: files go through TPs and batches in turn, so that these are always the same.
    """
    if not DEFAULT_ROWS.exists():
        pytest.skip(f"no published rows at {DEFAULT_ROWS.resolve()}")
    rows = [row for row in read_published(DEFAULT_ROWS)[0] if row.kind == kind and row.held_back]
    rows.sort(key=lambda row: zlib.crc32(repr(row).encode()))
    return [
        (row, predict(row.model(), row.cluster(), row.workload(), row.split(), row.engine))
        for row in rows[:count]
    ]


def mean_error(name: str, ratios: list[float]) -> float:
    error = statistics.mean(abs(ratio - 1) for ratio in ratios)
    print(
        f"\n{name}: {len(ratios)} rows, mean error {error:.1%}, "
        f"median predicted / measured {statistics.median(ratios):.2f}"
    )
    return error


def test_latencies_at_fixed_concurrency() -> None:
    scored = held_back("closed loop", 64)
    assert len(scored) > 50
    tpot = [made.tpot_s.value / (row.tpot_s or 0.0) for row, made in scored]
    assert mean_error("TPOT", tpot) < 0.10
    ttft = [made.ttft_s.value / (row.ttft_s or 0.0) for row, made in scored]
    assert mean_error("TTFT", ttft) < 0.35  # 26 % of all 294, within 3 % for 64 of them
    inside = [made.tpot_s.low <= (row.tpot_s or 0.0) <= made.tpot_s.high for row, made in scored]
    assert 0.65 < sum(inside) / len(inside) < 0.95, "about 80 % must lie in the stated interval"


def test_maximum_throughput_of_recent_versions() -> None:
    scored = [
        (row, made) for row, made in held_back("maximum throughput", 40) if row.version >= "0.15"
    ]
    assert len(scored) > 20
    ratios = [
        made.output_tokens_per_s.value / (row.output_tokens_per_s or 0.0) for row, made in scored
    ]
    assert statistics.median(abs(ratio - 1) for ratio in ratios) < 0.15
    mean_error("throughput", ratios)
