"""Predicts every usable published serving measurement, and reports the error.

    PYTHONPATH=src python benchmarks/bench_accuracy.py [--rows published_serving.csv]

Through `rankwright.predict(..., engine=...)`, as a user would. Constants are fitted on about half
of the workloads, chosen by a checksum of engine, model, GPU and lengths (`Measured.held_back`);
what is reported first is the other half.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published import DEFAULT_ROWS, Measured, by_workload, read_published
from rankwright.cost_model.predict import predict
from rankwright.cost_model.prediction import Estimate, Prediction
from result import write_result

TPOT_LIMITS_S = (0.015, 0.020, 0.030, 0.040, 0.060)


@dataclass(frozen=True)
class Scored:
    """A measurement and what was predicted of it."""

    row: Measured
    made: Prediction


Pair = tuple[float, Estimate]


def tpot(one: Scored) -> Pair | None:
    """Return measured and predicted TPOT."""
    return None if one.row.tpot_s is None else (one.row.tpot_s, one.made.tpot_s)


def ttft(one: Scored) -> Pair | None:
    """Return measured and predicted TTFT."""
    return None if one.row.ttft_s is None else (one.row.ttft_s, one.made.ttft_s)


def throughput(one: Scored) -> Pair | None:
    """Return measured and predicted output tokens a second."""
    measured = one.row.output_tokens_per_s
    return None if measured is None else (measured, one.made.output_tokens_per_s)


METRICS: dict[str, Callable[[Scored], Pair | None]] = {
    "tpot": tpot,
    "ttft": ttft,
    "throughput": throughput,
}


def errors(scored: Iterable[Scored], metric: str) -> dict[str, Any]:
    """Return mean and median errors of one metric, and how often its interval held."""
    pairs = [pair for one in scored if (pair := METRICS[metric](one)) is not None]
    if not pairs:
        return {"rows": 0}
    ratios = [estimate.value / value for value, estimate in pairs]
    ordered = sorted(ratios)
    lower, upper = ordered[len(ratios) // 10], ordered[-1 - len(ratios) // 10]
    wrong = sorted(abs(ratio - 1) for ratio in ratios)
    return {
        "rows": len(pairs),
        "mean_abs_error": statistics.mean(wrong),
        "median_abs_error": statistics.median(wrong),
        "p90_abs_error": wrong[int(0.9 * (len(wrong) - 1))],
        "median_predicted_over_measured": statistics.median(ratios),
        "measured_over_predicted_p10": 1 / upper,
        "measured_over_predicted_p90": 1 / lower,
        "inside_interval": sum(e.low <= value <= e.high for value, e in pairs) / len(pairs),
    }


def conformal_factors(ratios: Sequence[float], coverage: float = 0.8) -> tuple[float, float]:
    """Return measured over predicted that holds `coverage` of figures like those of `ratios`.

    Split conformal prediction: order statistics of rows beside those that are reported, with one
    row more for the one to come (Lei et al. 2018, "Distribution-free predictive inference for
    regression"), between neighbours in proportion: with few rows the next one would be too wide.

    >>> conformal_factors([0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    (0.7, 1.5)
    """
    ordered = sorted(ratios)
    place = min(float(len(ordered)), (len(ordered) + 1) * (1 + coverage) / 2)
    whole, part = int(place), place - int(place)

    def at(place: int, beyond: int) -> float:
        return ordered[place] + part * (ordered[beyond] - ordered[place])

    above = min(whole, len(ordered) - 1)
    return at(len(ordered) - whole, len(ordered) - 1 - above), at(whole - 1, above)


def conformal(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return each engine's factors from the rows that are not held back, and what they hold."""
    lines: list[dict[str, Any]] = []
    for engine in sorted({one.row.engine for one in scored}):
        for metric, pair_of in METRICS.items():
            ratios: dict[bool, list[float]] = {True: [], False: []}
            for one in scored:
                if one.row.engine == engine and (pair := pair_of(one)) is not None:
                    ratios[one.row.held_back].append(pair[0] / pair[1].value)
            if not ratios[False] or not ratios[True]:
                continue
            low, high = conformal_factors(ratios[False])
            inside = sum(low <= ratio <= high for ratio in ratios[True]) / len(ratios[True])
            lines.append(
                {
                    "engine": engine,
                    "metric": metric,
                    "factors": [low, high],
                    "calibration_rows": len(ratios[False]),
                    "held_back_rows": len(ratios[True]),
                    "held_back_inside": inside,
                }
            )
    return lines


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return Spearman's correlation of two series without ties."""
    order = [sorted(range(len(v)), key=v.__getitem__) for v in (xs, ys)]
    places = [dict(zip(one, range(len(xs)), strict=True)) for one in order]
    gaps = sum((places[0][i] - places[1][i]) ** 2 for i in range(len(xs)))
    return 1 - 6 * gaps / (len(xs) * (len(xs) ** 2 - 1))


def correlation_over_tp(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the mean rank correlation of throughput over TP, of workloads with two TPs or more."""
    by_row = {id(one.row): one for one in scored}
    found: list[float] = []
    for rows in by_workload(one.row for one in scored).values():
        ones = {row.tp: by_row[id(row)] for row in rows if row.output_tokens_per_s is not None}
        if len(ones) < 2:
            continue
        measured = [one.row.output_tokens_per_s or 0.0 for one in ones.values()]
        made = [one.made.output_tokens_per_s.value for one in ones.values()]
        found.append(rank_correlation(measured, made))
    return {"workloads": len(found), "mean": statistics.mean(found)} if found else {"workloads": 0}


def decisions(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return how good the choices of TP and concurrency are that predictions lead to.

    For each workload of several points and each limit of TPOT: of the points whose predicted TPOT
    holds the limit, the one with the most predicted tokens/s/GPU, against the best of those whose
    measured TPOT holds it.
    """
    by_row = {id(one.row): one for one in scored}
    right = right_point = broken = none = count = 0
    losses: list[float] = []
    for rows in by_workload(one.row for one in scored).values():
        points = [by_row[id(row)] for row in rows if row.tpot_s is not None]
        if len({point.row.tp for point in points}) < 2:
            continue
        for limit_s in TPOT_LIMITS_S:
            holding = [one for one in points if (one.row.tpot_s or 0.0) <= limit_s]
            if not holding:
                continue
            count += 1
            best = max(holding, key=_measured_rate)
            allowed = [one for one in points if one.made.tpot_s.value <= limit_s]
            if not allowed:
                none += 1
                continue
            pick = max(allowed, key=lambda one: one.made.output_tokens_per_s.value / one.row.tp)
            right += pick.row.tp == best.row.tp
            right_point += pick is best
            if (pick.row.tpot_s or 0.0) > limit_s:
                broken += 1
            else:
                losses.append(1 - _measured_rate(pick) / _measured_rate(best))
    if not count:
        return {"decisions": 0}
    return {
        "decisions": count,
        "same_tp": right / count,
        "same_tp_and_concurrency": right_point / count,
        "breaks_the_limit": broken / count,
        "no_pick": none / count,
        "mean_loss": statistics.mean(losses) if losses else None,
        "worst_loss": max(losses) if losses else None,
    }


def _measured_rate(one: Scored) -> float:
    """Return the output tokens/s/GPU that latencies and concurrency of a closed loop give."""
    row = one.row
    assert row.tpot_s is not None
    assert row.ttft_s is not None
    assert row.concurrency is not None
    request_s = row.ttft_s + (row.output_tokens - 1) * row.tpot_s
    return row.concurrency * row.output_tokens / request_s / row.tp


def score(rows: Iterable[Measured]) -> list[Scored]:
    """Predict each of `rows`."""
    return [
        Scored(row, predict(row.model(), row.cluster(), row.workload(), row.split(), row.engine))
        for row in rows
    ]


def summary(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return a line of errors for each part of the rows that is worth telling apart."""
    parts: dict[str, Callable[[Scored], bool]] = {
        "held back": lambda one: one.row.held_back,
        "fitted": lambda one: not one.row.held_back,
    }
    lines: list[dict[str, Any]] = []
    for part, chosen in parts.items():
        inside = [one for one in scored if chosen(one)]
        groups: dict[tuple[str, str], list[Scored]] = {("all", "all"): inside}
        for one in inside:
            groups.setdefault((one.row.engine, "all"), []).append(one)
            groups.setdefault((one.row.engine, one.row.model_name), []).append(one)
            groups.setdefault(("all", one.row.gpu), []).append(one)
        for (engine, what), members in sorted(groups.items()):
            for metric in METRICS:
                found = errors(members, metric)
                if found["rows"]:
                    lines.append(
                        {"part": part, "engine": engine, "of": what, "metric": metric, **found}
                    )
    return lines


def main() -> int:
    """Return the exit status: 2 where the rows are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=DEFAULT_ROWS, help="published_serving.csv")
    parser.add_argument(
        "--every", type=int, default=1, help="only every n-th row, for a quick look"
    )
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    if not arguments.rows.exists():
        print(f"bench_accuracy: no published rows at {arguments.rows}", file=sys.stderr)
        return 2
    rows, left_out = read_published(arguments.rows)
    start_s = time.process_time()
    scored = score(rows[:: arguments.every])
    cpu_s = time.process_time() - start_s
    lines = summary(scored)
    held_back = [one for one in scored if one.row.held_back]
    content = {
        "usable_rows": len(rows),
        "scored_rows": len(scored),
        "left_out": dict(left_out.most_common()),
        "cpu_s": cpu_s,
        "rank_correlation_over_tp": {
            "held back": correlation_over_tp(held_back),
            "all": correlation_over_tp(scored),
        },
        "conformal": conformal(scored),
        "decisions": {"held back": decisions(held_back), "all": decisions(scored)},
        "rows": lines,
    }
    for line in lines:
        print(
            f"{line['part']:<10}{line['engine']:<8}{line['of']:<34}{line['metric']:<11}"
            f"{line['rows']:>5} rows  mean {line['mean_abs_error']:6.1%}  median "
            f"{line['median_abs_error']:6.1%}  p90 {line['p90_abs_error']:6.1%}  ratio "
            f"{line['median_predicted_over_measured']:.2f}  inside {line['inside_interval']:.0%}"
        )
    for name in ("rank_correlation_over_tp", "decisions"):
        print(name, content[name])
    for line in conformal(scored):
        print("conformal", line)
    print(f"{len(scored)} predictions in {cpu_s:.0f} CPU-s")
    print(write_result("accuracy", content, folder=arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
