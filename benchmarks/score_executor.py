"""Scores predictions against every recorded run of our executor, in one table.

    PYTHONPATH=src python benchmarks/score_executor.py [--results benchmarks/results] [--output DIR]

Reads what `bench_engine.py` (engine-*), `bench_points.py` (points-*) and `bench_profile.py`
(profile-*) recorded; needs no GPU. Each row is predicted again, from model, split, device, batch
and context alone, so that the table is of the cost model as it is now. What an older commit of the
engine measured is told apart (`--since`): it was slower for reasons that are gone.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from executor_points import OUTPUT_TOKENS, decode_s, pipeline_of, prompt_s, recorded_cluster
from rankwright.cost_model.fullest import fullest_rank
from rankwright.cost_model.predict import choose_replicas
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from result import RESULTS, write_result

# Since then the host decides the next step while one runs, and one row has kernels of its own.
ENGINE_SINCE = "2026-11-22T03:00:00+00:00"
# Since then padding of attention DP goes to no expert: before, it was computed like a prompt.
PADDING_SINCE = "2026-11-22T10:30:00+00:00"
KINDS = ("engine-*.json", "points-*.json", "profile-*.json")
BLOCK_TOKENS = 64  # of the KV cache of a GPU
# Output tokens of the rows of bench_engine.py and bench_profile.py, by batch, where these differ
# from `OUTPUT_TOKENS`: the step is timed in the middle of them.
_ENGINE_OUTPUTS = {1: 128, 8: 96, 32: 64, 64: 64, 128: 128, 256: 192}


@dataclass(frozen=True)
class Row:
    """A figure as measured and as predicted: seconds of a step, or bytes of the fullest rank."""

    run: str
    what: str
    batch: int
    context: int
    measured: float
    predicted: float
    commit: str
    current: bool

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def rows_of(recorded: dict[str, Any], since: str) -> Iterator[Row]:
    """Yield the rows of one result file; `since` is the first date of the engine as it is."""
    environment = recorded["environment"]
    version = environment["commit"][:7], environment["date"] >= since
    cluster = recorded_cluster(environment)
    spec, split = read_model(recorded["model"]), Split(**recorded["split"])
    gpu = cluster.nodes[0].gpus[0].device
    run = f"{recorded['model'].rsplit('/', 1)[-1]} {split.label()} {gpu}"
    if split.dp == 2 and len(cluster.nodes[0].gpus) == 2:
        run = run.replace(split.label(), "DP2")
    pipeline = pipeline_of(split, spec, cluster)
    for row in recorded["rows"]:
        batch, context = row.get("batch", 1), row.get("context", row.get("prompt_tokens", 0))
        if row["what"] == "decode":
            measured_s = row.get("measured_ms", row.get("step_ms")) / 1e3
            outputs = OUTPUT_TOKENS if "context" in row else _ENGINE_OUTPUTS.get(batch, 64)
            made_s = decode_s(pipeline, split, batch, context + outputs / 2)
            yield Row(run, "decode", batch, context, measured_s, made_s, *version)
        elif row["what"] in ("prompt", "ttft"):
            measured_s = row.get("measured_ms", row.get("ttft_ms")) / 1e3
            made_s = prompt_s(pipeline, split, context)
            commit, current = version
            current &= split.attention == "tp" or environment["date"] >= PADDING_SINCE
            yield Row(run, "prompt", 1, context, measured_s, made_s, commit, current)
    if recorded.get("peak_memory_bytes"):
        tokens = recorded["num_kv_blocks"] * BLOCK_TOKENS
        groups = choose_replicas(cluster, split)
        parts = fullest_rank(
            spec, split, [group.stages for group in groups], Workload(), kv_tokens=tokens
        )
        made = sum(part.bytes for part in parts)
        yield Row(run, "memory", 0, 0, max(recorded["peak_memory_bytes"]), made, *version)


def summary(rows: Sequence[Row], what: str) -> dict[str, Any]:
    """Return mean and p90 errors of the rows of one kind, `decode`, `prompt` or `memory`."""
    chosen = [row for row in rows if row.what == what]
    errors = sorted(abs(row.ratio - 1) for row in chosen)
    if not errors:
        return {"what": what, "rows": 0}
    return {
        "what": what,
        "rows": len(errors),
        "mean_abs_error": statistics.mean(errors),
        "p90_abs_error": errors[int(0.9 * (len(errors) - 1))],
        "largest_error": errors[-1],
        "median_predicted_over_measured": statistics.median(row.ratio for row in chosen),
        "least_predicted_over_measured": min(row.ratio for row in chosen),
    }


def read_all(folder: Path, since: str = ENGINE_SINCE) -> list[Row]:
    """Return the rows of every recorded run in `folder`."""
    paths = sorted(path for kind in KINDS for path in folder.glob(kind))
    return [row for path in paths for row in rows_of(json.loads(path.read_text("utf-8")), since)]


def main() -> int:
    """Return the exit status: 2 where no run is recorded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of recorded runs")
    parser.add_argument("--since", default=ENGINE_SINCE, help="first date of the engine as it is")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    rows = read_all(arguments.results, arguments.since)
    if not rows:
        print(f"score_executor: no recorded run in {arguments.results}", file=sys.stderr)
        return 2
    for row in rows:
        unit, scale = ("GB", 1e-9) if row.what == "memory" else ("ms", 1e3)
        print(
            f"{row.run:<40}{row.what:<8}{row.batch:>4}{row.context:>7}"
            f"{row.measured * scale:>9.2f} {unit}{row.predicted * scale:>9.2f} {unit}"
            f"{row.ratio:>7.2f}  {row.commit}{'' if row.current else ', older'}"
        )
    current = [row for row in rows if row.current]
    lines = [
        {"of": name, **summary(part, what)}
        for name, part in (("engine as it is", current), ("all", rows))
        for what in ("decode", "prompt", "memory")
    ]
    for line in lines:
        print(line)
    content = {"rows": [asdict(row) for row in rows], "summary": lines}
    print(write_result("executor-accuracy", content, folder=arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
