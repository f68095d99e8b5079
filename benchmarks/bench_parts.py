"""How good mixes of unlike replicas are: small machines against trying everything.

    PYTHONPATH=src:. python benchmarks/bench_parts.py [--cases 400] [--jobs N] [--output FOLDER]

Draws machines of up to four cards, of one kind or several, joined at random (`random_parts.py`),
with dense and MoE models, limits and loads, and compares the program over parts, by HiGHS and by
CBC, with every way to deal the cards out and every replica on each set. Beside it is the best plan
of alike replicas: how often a mix serves more, and how much.
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.planner.random_parts import best_mix, random_parts_case

from rankwright.planner.make_parts import WORTHWHILE, best_parts
from rankwright.planner.part_bound import most_tokens_per_s
from rankwright.planner.twins import Twins
from result import write_result


def compare(seed: int) -> dict[str, Any]:
    """Return how both solvers, trying everything, and alike replicas ended on one problem."""
    case = random_parts_case(seed)
    search, twins = case.search(), Twins(case.cluster.nodes[0])
    started = time.process_time()
    highs = best_parts(search, twins)
    planned_s = time.process_time() - started
    with patch("rankwright.planner.solver.find_spec", return_value=None):  # as without HiGHS
        cbc = best_parts(search, twins)
    alike = search.best(settle=False)
    return {
        "seed": seed,
        "case": case.describe(),
        "classes": twins.classes,
        "num_parts": 0 if highs is None else len(highs[1].columns),
        "best": best_mix(case),
        "highs": 0.0 if highs is None else highs[1].value,
        "cbc": 0.0 if cbc is None else cbc[1].value,
        "certified_gap": None if highs is None else highs[1].ending.gap,
        "bound": most_tokens_per_s(search),
        "alike": None if alike is None else alike.value,
        "planned_s": planned_s,
    }


def is_wrong(row: dict[str, Any]) -> bool:
    """Return whether a value of `row` differs from trying everything by more than rounding."""
    best = row["best"]
    return any(abs(row[name] - best) > 1e-6 * best for name in ("highs", "cbc"))


def main() -> int:
    """Compare the problems, write the result, and return how many are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    with ProcessPoolExecutor(asked.jobs) as pool:
        rows = list(pool.map(compare, range(asked.cases), chunksize=4))
    wrong = [row for row in rows if is_wrong(row)]
    gains = [row["highs"] / row["alike"] - 1 for row in rows if row["alike"]]
    content = {
        "cases": asked.cases,
        "feasible": sum(row["best"] > 0 for row in rows),
        "of_several_parts": sum(row["num_parts"] > 1 for row in rows),
        "largest_part_of_the_quick_bound": max(
            (row["best"] / row["bound"] for row in rows if row["bound"]), default=None
        ),
        "wrong": len(wrong),
        "largest_certified_gap": max(row["certified_gap"] or 0.0 for row in rows),
        "mixes_chosen": sum(gain > WORTHWHILE for gain in gains),
        "median_gain_of_those": statistics.median(
            [gain for gain in gains if gain > WORTHWHILE] or [0.0]
        ),
        "largest_gain": max(gains, default=0.0),
        "planning_cpu_s": sum(row["planned_s"] for row in rows),
        "rows": wrong or rows[:20],
    }
    print({key: value for key, value in content.items() if key != "rows"})
    print(write_result("planner-parts", content, folder=asked.output))
    return len(wrong)


if __name__ == "__main__":
    raise SystemExit(min(1, main()))
