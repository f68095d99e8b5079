"""How near the formula of a steady state is to the real scheduler.

    PYTHONPATH=src:. python benchmarks/bench_flow.py [--output FOLDER]

The planner takes tokens per second and TPOT from a formula (`cost_model/serving.py`), since it asks
for thousands of them. Here the executor's scheduler serves the same loads on a virtual clock, in
steps that last what the cost model says of each, so that what differs is the formula alone: how
prompts fall into steps, and what they hold up. Lengths are drawn as in the regret benchmark. Needs
neither a GPU nor PyTorch, and takes some minutes of one core.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import StageModels, choose_replicas
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.serving import serve_closed
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.shorthand import parse_cluster
from regret_load import figures, make_load
from result import write_result
from simulated_replica import simulated_replica

CLUSTER = "8xh200-sxm"
MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B")
FORMS = ((1, 1), (2, 1), (1, 2), (1, 4))  # TP and PP
# Tokens in and out, and requests in flight at a replica.
LOADS = (
    (512, 16, 16),
    (1024, 128, 1),
    (1024, 128, 4),
    (1024, 128, 32),
    (128, 256, 2),
    (128, 256, 64),
    (6000, 64, 2),
    (6000, 64, 8),
    (2000, 500, 16),
)
CHUNK_TOKENS = 2048
FIGURES = ("output_tokens_per_s", "tpot_s")


def compare(
    model: ModelSpec, tp: int, pp: int, input_tokens: int, output_tokens: int, slots: int
) -> dict[str, Any]:
    """Return what the formula says of one replica, relative to what its scheduler did."""
    split = Split(
        tp=tp,
        pp=pp,
        stage_layers=_even(model.num_layers, pp),
        micro_batches=pp,
        max_batch_size=max(2, slots),
        chunk_tokens=CHUNK_TOKENS,
    )
    cluster = parse_cluster(CLUSTER)
    load = make_load(input_tokens, output_tokens, slots, rounds=6 if slots > 8 else 10)
    line = simulated_replica(model, cluster, split).keep(load.lengths, slots, until=load.until)
    served = figures(line, load)
    (replicas, *_) = choose_replicas(cluster, split)
    state = serve_closed(
        StageModels(model, cluster, "rankwright").pipeline_of(replicas, split),
        Workload(input_tokens=input_tokens, output_tokens=output_tokens, concurrency=slots),
        batch_size=slots,
        chunk_tokens=CHUNK_TOKENS,
    )
    said = {
        "output_tokens_per_s": state.requests_per_s * output_tokens,
        "tpot_s": state.tpot_s,
    }
    return {
        "model": model.name,
        "tp": tp,
        "pp": pp,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "slots": slots,
        **{f"{name}_ratio": said[name] / served[name] for name in FIGURES},
    }


def _even(num_layers: int, stages: int) -> tuple[int, ...]:
    few, more = divmod(num_layers, stages)
    return tuple(few + (stage < more) for stage in range(stages))


def cases() -> Iterator[tuple[str, tuple[int, int], tuple[int, int, int]]]:
    """Yield all of them."""
    for name in MODELS:
        for form in FORMS:
            for load in LOADS:
                yield name, form, load


def main() -> None:
    """Compare, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    output = parser.parse_args().output
    rows = [
        compare(read_model(name), *form, *load)
        for name, form, load in track(list(cases()), "serving", transient=True)
    ]
    content: dict[str, Any] = {"cluster": CLUSTER, "chunk_tokens": CHUNK_TOKENS}
    for name in FIGURES:
        errors = [abs(row[f"{name}_ratio"] - 1) for row in rows]
        content[name] = {
            "mean_error": statistics.fmean(errors),
            "p90_error": statistics.quantiles(errors, n=10)[-1],
            "largest_error": max(errors),
        }
        print(name, {key: f"{100 * value:.1f} %" for key, value in content[name].items()})
    print(write_result("flow", {**content, "rows": rows}, folder=output))


if __name__ == "__main__":
    main()
