"""Published serving measurements as what `predict` takes, with the reasons why rows are left out.

The rows themselves are not ours to ship: `published_serving.csv` is read where it lies, and a
benchmark that needs it says so. Only figures that are derived from it are in this repository.
"""

import csv
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Cluster
from rankwright.topology.shorthand import parse_cluster

_ROWS = Path("shared", "reference", "published_serving.csv")
# Beside the repository, or beside a folder that it is in.
DEFAULT_ROWS = next(
    (folder / _ROWS for folder in Path(__file__).parents if (folder / _ROWS).exists()),
    Path(__file__).parents[2] / _ROWS,
)
Kind = Literal["closed loop", "maximum throughput"]

MODELS = {
    "meta-llama/Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-32B": "Qwen/Qwen3-32B",
    "Llama 3.1 8B": "meta-llama/Llama-3.1-8B",
    "Llama 3.1 70B": "meta-llama/Llama-3.1-70B",
    "LLaMA v3.1 8B": "meta-llama/Llama-3.1-8B",
    "LLaMA v3.1 70B": "meta-llama/Llama-3.1-70B",
}
ENGINES = {"vLLM": "vllm", "SGLang": "sglang", "TensorRT-LLM": "trtllm"}
GPUS = {
    "H100-SXM5-80GB": "h100-sxm",
    "H200-SXM-141GB": "h200-sxm",
    "A100-SXM4-80GB": "a100-sxm",
}
# AIConfigurator launches this version and later ones with --enable-mixed-chunk; see `engines.py`.
_MIXED_SINCE = "0.5.6"
# trtllm-bench runs at most this many requests at once (its `max_batch_size`).
_MOST_IN_FLIGHT = 2048


@dataclass(frozen=True)
class Measured:
    """One configuration and what was published about it. Seconds and tokens a second."""

    kind: Kind
    engine: str
    version: str
    model_name: str
    precision: str
    gpu: str
    tp: int
    input_tokens: int
    output_tokens: int
    concurrency: int | None
    group: str
    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None

    @property
    def held_back(self) -> bool:
        """Whether no constant was fitted to it: by engine, model, GPU and lengths.

        All TPs, batches and versions of one workload fall on one side.
        """
        return zlib.crc32(self.group.encode()) % 2 == 1

    def model(self) -> ModelSpec:
        """Return the model in the published number formats.

        TensorRT-LLM's FP8 checkpoints (ModelOpt) keep the KV cache in FP8; those that vLLM and
        SGLang ran do not say so, and these engines then keep it in the model's own format.
        """
        return _model(self.model_name, "fp8" in self.precision.lower(), self.engine == "trtllm")

    def cluster(self) -> Cluster:
        """Return the GPUs of one replica."""
        return parse_cluster(f"{self.tp}x{self.gpu}")

    def workload(self) -> Workload:
        """Return lengths and concurrency."""
        return Workload(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            concurrency=self.concurrency,
        )

    def split(self) -> Split:
        """Return the cut."""
        return Split(
            tp=self.tp,
            stage_layers=(self.model().num_layers,),
            max_batch_size=self.concurrency or _MOST_IN_FLIGHT,
        )


@cache
def _model(name: str, float8: bool, float8_cache: bool) -> ModelSpec:
    model = read_model(MODELS[name])
    if not float8:
        return model
    weights = model.weight_dtypes.model_copy(
        update={"method": "fp8", "attention": "float8", "feed_forward": "float8"}
    )
    update: dict[str, object] = {"weight_dtypes": weights}
    if float8_cache:
        update["kv_dtype"] = "float8"
    return model.model_copy(update=update)


def read_published(path: Path) -> tuple[list[Measured], Counter[str]]:
    """Return the usable measurements in `path`, and how many rows were left out for what reason."""
    left_out: Counter[str] = Counter()
    pairs: dict[tuple[object, ...], dict[str, float]] = {}
    found: list[Measured] = []
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            reason = _unusable(row)
            if reason is not None:
                left_out[reason] += 1
                continue
            value = float(row["value"])
            if row["metric"] == "total_output_tok_s":
                found.append(_measured("maximum throughput", row, None, output_tokens_per_s=value))
                continue
            key = tuple(row[name] for name in row if name not in ("metric", "value"))
            pair = pairs.setdefault(key, {})
            pair[row["metric"]] = value
            if len(pair) == 2:
                loops = int(row["batch_or_concurrency"].split("=")[1])
                found.append(
                    _measured(
                        "closed loop",
                        row,
                        -(-loops * int(row["tp"]) // int(row["num_gpus"])),
                        ttft_s=pair["ttft_ms"] / 1e3,
                        tpot_s=pair["tpot_ms"] / 1e3,
                    )
                )
    return found, left_out


def _unusable(row: dict[str, str]) -> str | None:
    if row["engine"] not in ENGINES:
        return "another engine (offline scripts, Triton's front end, llama.cpp and the like)"
    if row["engine"] == "vLLM" and "2023" in row["engine_version"]:
        return "versions of 2023"
    if "DISAGG" in row["notes"]:
        return "separate prefill and decode pools"
    if row["gpu"] not in GPUS or row["model"] not in MODELS:
        return "a model of before 2024 without a config here, or a GPU of unknown form"
    if row["metric"] in ("tpot_ms", "ttft_ms"):
        known = row["batch_or_concurrency"].startswith(("concurrency=", "batch_size="))
        return None if known else "no concurrency stated"
    if row["metric"] != "total_output_tok_s" or "max throughput" not in row["notes"]:
        return "another metric"
    if "CUDA graphs were unintentionally disabled" in row["notes"]:
        return "a table that its authors say ran without CUDA graphs"
    return None


def _measured(
    kind: Kind, row: dict[str, str], concurrency: int | None, **values: float
) -> Measured:
    engine = ENGINES[row["engine"]]
    if engine == "sglang" and row["engine_version"] >= _MIXED_SINCE:
        engine = "sglang-mixed"
    return Measured(
        kind,
        engine,
        row["engine_version"],
        row["model"],
        row["precision"],
        GPUS[row["gpu"]],
        int(row["tp"]),
        int(row["isl"]),
        int(row["osl"]),
        concurrency,
        "|".join(row[name] for name in ("engine", "model", "gpu", "isl", "osl")),
        **values,
    )


def by_workload(rows: Iterable[Measured]) -> dict[tuple[object, ...], list[Measured]]:
    """Return rows that differ in TP and concurrency alone."""
    groups: dict[tuple[object, ...], list[Measured]] = {}
    for row in rows:
        key = (
            row.kind, row.engine, row.version, row.model_name, row.precision, row.gpu,
            row.input_tokens, row.output_tokens,
        )  # fmt: skip
        groups.setdefault(key, []).append(row)
    return groups
