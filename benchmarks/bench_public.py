"""Scores predictions against figures that others published, beside the dense runs on H100 and H200.

    PYTHONPATH=src python benchmarks/bench_public.py [--output DIR]

`benchmarks/data/public_rows.json` has the figures with the address of each: experts, latent
attention, MXFP4, A100, RTX 4090, B200, MI300X. No constant is fitted to them. Requests that differ
in length (`length_spread`) do so as their benchmark says.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laws import active_parameters
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import predict
from rankwright.cost_model.prediction import Estimate
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.devices import flops_per_s
from rankwright.topology.shorthand import parse_cluster
from result import write_result

ROWS = Path(__file__).parent / "data" / "public_rows.json"
_MOST_IN_FLIGHT = 2048  # of each scheduler, in a run that is given all requests at once


@dataclass(frozen=True)
class Scored:
    """A figure as published and as predicted: seconds, or output tokens/s of one GPU."""

    run: str
    metric: str
    experts: bool
    input_tokens: int
    output_tokens: int
    concurrency: int | None
    published: float
    predicted: float
    inside: bool

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.published


def model_of(source: dict[str, Any]) -> ModelSpec:
    """Return the model in the formats that a source says."""
    model = read_model(source["model"])
    if "weights" in source:
        weights = model.weight_dtypes.model_copy(
            update={
                "method": "fp8",
                "attention": source["weights"],
                "feed_forward": source["weights"],
            }
        )
        # Checkpoints of TensorRT-LLM's tables keep the cache in the same format.
        model = model.model_copy(update={"weight_dtypes": weights, "kv_dtype": source["weights"]})
    if "kv_cache" in source:
        model = model.model_copy(update={"kv_dtype": source["kv_cache"]})
    return model


def is_cached(source: dict[str, Any], model: ModelSpec) -> bool:
    """Return whether the prompts of a source were not computed, or not all of them.

    Some of its first tokens came sooner than the arithmetic of the prompt takes at the GPUs' peak,
    or a longer prompt took much less than a shorter one: its benchmark sends prompts again, and the
    server had them in its cache.
    """
    gpu = parse_cluster(f"1x{source['gpu']}").nodes[0].gpus[0]
    peak = max(flops_per_s(gpu, "bfloat16"), flops_per_s(gpu, model.weight_dtypes.feed_forward))
    longest_s: dict[int | None, float] = {}
    for inputs, _, concurrency, ttft_ms, _, _ in sorted(source["rows"], key=lambda row: row[0]):
        if ttft_ms is None:
            continue
        seconds = ttft_ms / 1e3
        flops = 2 * active_parameters(model) * inputs
        if seconds < max(flops / (source["tp"] * peak), 0.8 * longest_s.get(concurrency, 0.0)):
            return True
        longest_s[concurrency] = max(seconds, longest_s.get(concurrency, 0.0))
    return False


def scored(source: dict[str, Any]) -> Iterator[Scored]:
    """Yield the figures of one source."""
    model, tp, nodes = model_of(source), source["tp"], source.get("nodes", 1)
    machine = f"{tp // nodes}x{source['gpu']}"
    cluster = parse_cluster(machine if nodes == 1 else f"{nodes}x{machine}+ib400")
    experts = any(run.layer.feed_forward.kind == "moe" for run in model.layer_runs)
    name = f"{source['engine']} {source['model'].rsplit('/', 1)[-1]} {source['gpu']} TP{tp}"
    cached = is_cached(source, model)
    schedulers = tp if source.get("attention") == "dp" else 1
    for inputs, outputs, concurrency, ttft_ms, tpot_ms, rate in source["rows"]:
        split = Split(
            tp=tp,
            ep=source.get("ep", 1),
            attention=source.get("attention", "tp"),
            stage_layers=(model.num_layers,),
            max_batch_size=concurrency or _MOST_IN_FLIGHT * schedulers,
        )
        workload = Workload(
            input_tokens=inputs,
            output_tokens=outputs,
            concurrency=concurrency,
            length_spread=source.get("length_spread"),
        )
        made = predict(model, cluster, workload, split, source["engine"])
        pairs: list[tuple[str, float | None, Estimate, float]] = [
            ("ttft", ttft_ms and ttft_ms / 1e3, made.ttft_s, 1.0),
            ("tpot", tpot_ms and tpot_ms / 1e3, made.tpot_s, 1.0),
            ("throughput", rate, made.output_tokens_per_s, float(tp)),
        ]
        for metric, value, figure, per in pairs:
            if value is not None and (metric != "ttft" or not cached):
                inside = figure.low <= value * per <= figure.high
                yield Scored(
                    name, metric, experts, inputs, outputs, concurrency, value,
                    figure.value / per, inside,
                )  # fmt: skip


def summary(rows: list[Scored], of: str) -> dict[str, Any]:
    """Return the errors of some rows."""
    errors = [abs(row.ratio - 1) for row in rows]
    return {
        "of": of,
        "rows": len(rows),
        "mean_abs_error": statistics.mean(errors),
        "median_abs_error": statistics.median(errors),
        "median_predicted_over_published": statistics.median(row.ratio for row in rows),
        "inside_interval": sum(row.inside for row in rows) / len(rows),
    }


def main() -> int:
    """Print and write the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    sources = json.loads(ROWS.read_text(encoding="utf-8"))["sources"]
    rows = [row for source in sources for row in scored(source)]
    groups: dict[str, list[Scored]] = {}
    for row in rows:
        kind = "experts" if row.experts else "dense"
        groups.setdefault(f"all {kind} {row.metric}", []).append(row)
        groups.setdefault(f"{row.run} {row.metric}", []).append(row)
    lines = [summary(members, name) for name, members in groups.items()]
    for line in lines:
        print(
            f"{line['of']:<60}{line['rows']:>4} rows  mean {line['mean_abs_error']:6.1%}  median "
            f"{line['median_abs_error']:6.1%}  ratio {line['median_predicted_over_published']:.2f}"
        )
    content = {"summary": lines, "rows": [asdict(row) for row in rows]}
    print(write_result("public", content, folder=arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
