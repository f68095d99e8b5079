"""`Calibration`: what was timed on one machine, and where its file lies.

Facts as they came from the clock, made by `executor/calibrate.py`. What they say about an engine's
efficiency is `fit.py`. A file of this kind is the user's own, so that every fault in one is
reported by its field.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from rankwright.cost_model.calibration_file import own_file
from rankwright.cost_model.dtypes import Dtype
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.split import Split
from rankwright.topology.cluster import Cluster
from rankwright.topology.measurements import CollectiveTime
from rankwright.topology.value import Value
from rankwright.topology.whole_file import write_whole

TimedKind = Literal["gemm", "attention prefill", "attention decode", "elementwise", "launch"]


class OpTime(Value):
    """One kernel of the engine at one shape, replayed in a CUDA graph.

    The shape is `(m, n, k)` of a product; `(sequences, new tokens, context, query heads, KV heads,
    head size)` of attention; `(rows, columns)` of what passes over values; `()` of a launch.
    """

    kind: TimedKind
    name: str = Field(description="kernel, such as 'rms_norm'")
    dtype: Dtype
    shape: tuple[int, ...]
    flops: float = Field(ge=0)
    bytes: float = Field(ge=0, description="read and written, each value once")
    seconds: float = Field(gt=0)


class RunTime(Value):
    """What `rankwright bench` measured of a plan: mean time per output token, closed loop."""

    model: ModelSpec
    split: Split
    input_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=2)
    concurrency: int = Field(ge=1)
    tpot_s: float = Field(gt=0)


class Calibration(Value):
    """All that was timed on the GPUs of one kind."""

    schema_version: Literal[1] = 1
    device: str = Field(description="key in topology/devices.py, such as 'h100-sxm'")
    name: str = Field(description="name as the driver prints it")
    software: str = Field(default="", description="versions, such as 'torch 2.11.0, CUDA 12.8'")
    measured_at: str = Field(default="", description="UTC, ISO 8601")
    seconds: float = Field(default=0.0, ge=0, description="that it took")
    ops: tuple[OpTime, ...] = Field(min_length=1)
    runs: tuple[RunTime, ...] = Field(default=(), description="of the whole engine, oldest first")
    collectives: tuple[CollectiveTime, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="what could not be timed, and why")


# Runs that are kept: older ones are of another state of the machine and of the engine.
_MOST_RUNS = 32


def add_run(calibration: Calibration, run: RunTime) -> Calibration:
    """Return the calibration with one more run of the engine, without the oldest of too many."""
    runs = (*calibration.runs, run)[-_MOST_RUNS:]
    return calibration.model_copy(update={"runs": runs})


def read_calibration(path: Path) -> Calibration:
    """Return the calibration in `path`.

    Raises:
        ValueError: It is not there, no JSON, or a field of it is wrong; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"calibration {path}: {error.strerror or error}; make one with: rankwright calibrate"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"calibration {path} is not a text file") from None
    try:
        return Calibration.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(
            f"calibration {path}: {field}: {first['msg']}; make it anew with: rankwright calibrate "
            f"-o {path}"
        ) from None


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write `path`, complete or not at all.

    Raises:
        ValueError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, calibration.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def find_calibration(
    cluster: Cluster, environment: Mapping[str, str] = os.environ
) -> Calibration | None:
    """Return this user's calibration of the GPUs of `cluster`; None where there is none."""
    path = own_file(cluster, environment)
    return None if path is None else read_calibration(path)
