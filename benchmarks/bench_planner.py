"""How good and how fast plans are: small problems against trying everything, large ones timed.

    PYTHONPATH=src:. python benchmarks/bench_planner.py optimal [--cases 2000] [--parts FILE]
    PYTHONPATH=src:. python benchmarks/bench_planner.py fast [--repeats 10] [--output FOLDER]

`optimal` draws problems (up to 8 GPUs, mixed kinds and unequal islands among them; dense and MoE
models of up to 12 layers; limits, budgets, every objective) and compares the integer program, by
HiGHS and by CBC, with every legal plan evaluated one by one (`tests/planner/exhaustive.py`).
Unequal shares are dealt in few units there, so that all of them can be tried.
`fast` runs `rankwright plan` from the shell and notes the CPU seconds and the peak memory of the
process, the interpreter and all imports included, beside those of a Python that does nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.planner.exhaustive import exhaustive
from tests.planner.exhaustive_shares import few_units
from tests.planner.random_cases import random_case

from rankwright.cost_model.legality import has_experts
from rankwright.planner.ilp import Choice
from result import write_result

# (name, model, cluster, further options, most CPU seconds)
TIMED = (
    ("dense, 8 GPUs", "meta-llama/Llama-3.1-8B", "8xh100-sxm", (), 0.7),
    ("dense, 8 GPUs, TPOT limit", "meta-llama/Llama-3.1-70B", "8xh100-sxm", ("--tpot", "40"), None),
    ("MoE, 16 GPUs", "deepseek-ai/DeepSeek-V3", "2x8xh200-sxm+ib400", (), 2.0),
    ("dense, 1,024 GPUs", "meta-llama/Llama-3.1-70B", "128x8xh100-sxm+ib400", (), 5.0),
    ("MoE, 1,024 GPUs", "deepseek-ai/DeepSeek-V3", "128x8xh200-sxm+ib400", (), 5.0),
    ("dense, 16,384 GPUs", "meta-llama/Llama-3.1-405B", "2048x8xh100-sxm+ib400", (), 20.0),
    ("MoE, 16,384 GPUs", "deepseek-ai/DeepSeek-V3", "2048x8xh200-sxm+ib400", (), 20.0),
    (
        "MoE, 16,384 GPUs, three levels",
        "deepseek-ai/DeepSeek-V3",
        "2048x8xh200-sxm+ib400@32@512:2",
        (),
        20.0,
    ),
    ("MoE, 228 NVL72 racks", "deepseek-ai/DeepSeek-V3", "4104x4xgb200+ib400@18@306:2", (), 20.0),
)
MOST_MB = 200


def compare(seed: int) -> dict[str, Any]:
    """Return how the two solvers and the exhaustive search ended on one problem."""
    case = random_case(seed)
    with few_units():
        search = case.search()
        started = time.process_time()
        highs = search.best(settle=False)
        planned_s = time.process_time() - started
        with patch("rankwright.planner.solver.find_spec", return_value=None):  # as without HiGHS
            cbc = search.best(settle=False)
        started = time.process_time()
        best = exhaustive(case)
    return {
        "seed": seed,
        "case": case.describe(),
        "num_gpus": case.cluster.num_gpus,
        "num_layers": case.model.num_layers,
        "num_kinds": len({gpu.device for node in case.cluster.nodes for gpu in node.gpus}),
        "num_islands": len({len(island) for island in case.cluster.islands}),
        "has_experts": has_experts(case.model),
        "objective": case.workload.objective,
        "best": best,
        "highs": _value(highs),
        "is_beyond": highs is not None and _is_beyond(highs, best, case.workload.objective),
        "cbc": _value(cbc),
        "certified_gap": None if highs is None else highs.ending.gap,
        "planned_s": planned_s,
        "tried_s": time.process_time() - started,
    }


def _value(choice: Choice | None) -> float | None:
    return None if choice is None else choice.value


def _is_beyond(choice: Choice, best: float | None, objective: str) -> bool:
    """Return whether a plan is better by what the exhaustive search does not try.

    That is unequal shares in the stages of a pipeline.
    """
    stages = (kind for group in choice.candidate.pool.replicas for kind in group.stages)
    if choice.candidate.shape.pp == 1 or all(kind.shares is None for kind in stages):
        return False
    lower_is_better = objective == "latency"
    return best is None or (choice.value < best if lower_is_better else choice.value > best)


def differs(value: float | None, best: float | None) -> bool:
    """Return whether two objectives differ by more than rounding (one part in a million)."""
    if value is None or best is None:
        return value is not best
    return abs(value / best - 1) > 1e-6


def _is_wrong(row: dict[str, Any]) -> bool:
    return differs(row["highs"], row["best"]) and not row["is_beyond"]


def optimal(cases: int, jobs: int, output: Path | None, parts: Path | None) -> int:
    """Compare `cases` problems, but for those in `parts` already; return how many differ."""
    rows: list[dict[str, Any]] = []
    if parts is not None and parts.exists():
        rows = [json.loads(line) for line in parts.read_text(encoding="utf-8").splitlines()]
    known = {row["seed"] for row in rows}
    seeds = [seed for seed in range(cases) if seed not in known]
    with ProcessPoolExecutor(jobs) as pool:
        for row in pool.map(compare, seeds, chunksize=4):
            rows.append(row)
            if parts is not None:
                with parts.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if _is_wrong(row) or differs(row["cbc"], row["highs"]):
                print(row, flush=True)
            if len(rows) % 100 == 0:
                print(f"{len(rows)} of {cases}", flush=True)
    wrong = [row for row in rows if _is_wrong(row)]
    beyond = [row for row in rows if row["is_beyond"] and differs(row["highs"], row["best"])]
    disagree = [row for row in rows if differs(row["cbc"], row["highs"])]
    content = {
        "cases": cases,
        "feasible": sum(row["best"] is not None for row in rows),
        "with_experts": sum(row["has_experts"] for row in rows),
        "on_mixed_gpus": sum(row["num_kinds"] > 1 for row in rows),
        "on_unequal_islands": sum(row["num_islands"] > 1 for row in rows),
        "differ_from_exhaustive": len(wrong),
        "better_by_unequal_shares_in_pipelines": len(beyond),
        "solvers_disagree": len(disagree),
        "largest_certified_gap": max(row["certified_gap"] or 0.0 for row in rows),
        "planning_cpu_s": sum(row["planned_s"] for row in rows),
        "exhaustive_cpu_s": sum(row["tried_s"] for row in rows),
        "rows": [*wrong, *beyond, *(row for row in disagree if row not in wrong)] or rows[:20],
    }
    print({key: value for key, value in content.items() if key != "rows"})
    print(write_result("planner-optimal", content, folder=output))
    return len(wrong) + len(disagree)


def fast(output: Path | None, repeats: int) -> None:
    """Time plans from the shell, each `repeats` times."""
    rows = []
    bare = sorted(_cpu_s([sys.executable, "-c", "pass"]) for _ in range(repeats))
    for name, model, cluster, options, limit_s in TIMED:
        command = ["plan", model, "--cluster", cluster, *options, "--json"]
        runs = [_run(command) for _ in range(repeats + 1)][1:]  # the first writes bytecode
        row = {
            "name": name,
            "command": " ".join(["rankwright", *command]),
            "cpu_s": statistics.median(run[0] for run in runs),
            "every_cpu_s": sorted(run[0] for run in runs),
            "wall_s": statistics.median(run[1] for run in runs),
            "peak_mb": max(run[2] for run in runs),
            "limit_cpu_s": limit_s,
            "limit_mb": MOST_MB,
            **runs[0][3],
        }
        print(row, flush=True)
        rows.append(row)
    content = {
        "load_average": os.getloadavg(),
        "num_cpus": os.cpu_count(),
        "python_alone_cpu_s": statistics.median(bare),
        "rows": rows,
    }
    print(write_result("planner-fast", content, folder=output))


def _cpu_s(command: list[str]) -> float:
    with subprocess.Popen(command) as child:
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def _run(command: list[str]) -> tuple[float, float, float, dict[str, Any]]:
    """Return CPU seconds, wall seconds, peak MB and what the plan says, of one process."""
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "rankwright", *command],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},  # as an installed package has it
    ) as child:
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.monotonic() - started
    if child.returncode:
        raise RuntimeError(f"{command} ended with {child.returncode}")
    plan = json.loads(output)
    certificate = plan["certificate"]
    return (
        used.ru_utime + used.ru_stime,
        wall_s,
        used.ru_maxrss * 1024 / 1e6,
        {
            "split": {key: plan["split"][key] for key in ("tp", "pp", "dp", "ep", "cp")},
            "num_gpus": plan["num_gpus"],
            "num_candidates": certificate["num_candidates"],
            "solve_s": certificate["solve_s"],
            "gap": certificate["gap"],
        },
    )


def main() -> None:
    """Run what was asked for; exit with 1 where a plan was not the best."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("optimal", "fast"))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=10, help="of each plan that is timed")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    parser.add_argument("--parts", type=Path, help="file of single rows, to go on with later")
    arguments = parser.parse_args()
    if arguments.what == "fast":
        fast(arguments.output, arguments.repeats)
        return
    wrong = optimal(arguments.cases, arguments.jobs, arguments.output, arguments.parts)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
