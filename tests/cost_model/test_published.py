"""Scores predictions against published measurements, and prints the error.

The rows are not ours to ship: they lie beside the repository, and the test skips without them.
"""

import csv
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.shorthand import parse_cluster

ROWS = Path(__file__).parents[2] / ".." / "shared" / "reference" / "published_serving.csv"
MODELS = {
    "Llama 3.1 8B": "meta-llama/Llama-3.1-8B",
    "Llama 3.1 70B": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-32B": "Qwen/Qwen3-32B",
}
ENGINES = {"vLLM": "vllm", "SGLang": "sglang", "TensorRT-LLM": "trtllm"}


def rows() -> Iterator[dict[str, str]]:
    if not ROWS.exists():
        pytest.skip(f"no published rows at {ROWS.resolve()}")
    with ROWS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["model"] in MODELS and row["engine"] in ENGINES:
                yield row


def model_of(row: dict[str, str]) -> ModelSpec:
    model = read_model(MODELS[row["model"]])
    if "fp8" not in row["precision"].lower():
        return model
    weights = model.weight_dtypes.model_copy(
        update={"attention": "float8", "feed_forward": "float8"}
    )
    update: dict[str, object] = {"weight_dtypes": weights}
    if row["precision"] == "FP8/FP8/FP8":
        update["kv_dtype"] = "float8"
    return model.model_copy(update=update)


def gpu_of(row: dict[str, str]) -> str:
    return "h200-sxm" if "H200" in row["gpu"] else "h100-sxm"


def report(name: str, ratios: list[float]) -> float:
    error = statistics.mean(abs(ratio - 1) for ratio in ratios)
    print(
        f"\n{name}: {len(ratios)} rows, mean error {error:.1%}, "
        f"median predicted / measured {statistics.median(ratios):.2f}"
    )
    return error


def test_time_per_token_at_fixed_concurrency() -> None:
    ratios = []
    for index, row in enumerate(rows()):
        closed_loop = row["batch_or_concurrency"].startswith("concurrency=")
        if row["metric"] != "tpot_ms" or not closed_loop or "DISAGG" in row["notes"]:
            continue
        if index % 3:  # 200 of 600 rows: seconds instead of many
            continue
        tp = int(row["tp"])
        batch = -(-int(row["batch_or_concurrency"].split("=")[1]) * tp // int(row["num_gpus"]))
        model = model_of(row)
        split = Split(
            tp=tp, stage_layers=(model.num_layers,), max_batch_size=batch, chunk_tokens=8192
        )
        load = Workload(input_tokens=int(row["isl"]), output_tokens=int(row["osl"]))
        engine = ENGINES[row["engine"]]
        made = predict(model, parse_cluster(f"{tp}x{gpu_of(row)}"), load, split, engine)
        ratios.append(made.tpot_s.value * 1e3 / float(row["value"]))
    assert len(ratios) > 100
    assert report("TPOT", ratios) < 0.20
    inside = sum(0.78 <= 1 / ratio <= 1.31 for ratio in ratios) / len(ratios)
    assert inside > 0.7, "about 80 % must lie in the interval that predictions state"
