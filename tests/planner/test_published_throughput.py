"""Scores planned throughput against published tables, and prints the error.

The rows are not ours to ship: they lie beside the repository, and the test skips without them.
"""

import csv
import statistics

import pytest

from published import DEFAULT_ROWS
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.planner.search import Search
from rankwright.planner.shapes import Pins
from rankwright.topology.shorthand import parse_cluster

ROWS = DEFAULT_ROWS
MODELS = {"Llama 3.1 8B": "meta-llama/Llama-3.1-8B", "Llama 3.1 70B": "meta-llama/Llama-3.1-70B"}


def in_fp8(model: ModelSpec) -> ModelSpec:
    weights = model.weight_dtypes.model_copy(
        update={"attention": "float8", "feed_forward": "float8"}
    )
    return model.model_copy(update={"weight_dtypes": weights, "kv_dtype": "float8"})


def test_throughput_tables_of_tensorrt_llm() -> None:
    if not ROWS.exists():
        pytest.skip(f"no published rows at {ROWS.resolve()}")
    with ROWS.open(encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["engine"] == "TensorRT-LLM"
            and row["engine_version"] == "0.20.0"
            and row["metric"] == "total_output_tok_s"
            and row["model"] in MODELS
            and row["precision"] == "FP8/FP8/FP8"
        ]
    ratios = []
    for row in rows[::3]:  # a third of 118: seconds instead of many
        gpu = "h200-sxm" if "H200" in row["gpu"] else "h100-sxm"
        search = Search(
            in_fp8(read_model(MODELS[row["model"]])),
            parse_cluster(f"{row['tp']}x{gpu}"),
            Workload(input_tokens=int(row["isl"]), output_tokens=int(row["osl"])),
            pins=Pins(tp=int(row["tp"]), pp=1),
            engine="trtllm",
        )
        choice = search.best(settle=False)
        assert choice is not None, row
        ratios.append(choice.value / float(row["value"]))
    error = statistics.mean(abs(ratio - 1) for ratio in ratios)
    print(
        f"\nthroughput: {len(ratios)} rows, mean error {error:.1%}, "
        f"median predicted / published {statistics.median(ratios):.2f}"
    )
    assert len(ratios) > 30
    assert error < 0.12
