"""Writes what a benchmark measured, with everything that a reader needs to measure it again."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit of this tree, with "-dirty" where tracked files differ from it.

    Where a copy of the tree knows no better, `RANKWRIGHT_COMMIT` says what it is a copy of.
    """
    if said := os.environ.get("RANKWRIGHT_COMMIT"):
        return said
    head = _output_of("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Return device, driver, versions, commit, command and date of this run."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [f"--id={visible}"] if visible else []
    query = ("--query-gpu=name,driver_version", "--format=csv,noheader")
    gpus = _output_of("nvidia-smi", *chosen, *query)
    rows = [line.split(", ") for line in gpus.splitlines()] if gpus else []
    return {
        "devices": [row[0] for row in rows] or [_processor()],
        "driver": rows[0][1] if rows else None,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "commit": commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def copy_bytes_per_s(device: Any = "cuda") -> float:
    """Return the rate of a 1 GiB copy on a GPU, bytes read plus bytes written, median of 20.

    Args:
        device: A torch device or its name.
    """
    import torch  # not at the top: planner benchmarks write results too, and do without torch

    # Random: on zeros some kernels run faster than on data.
    source = torch.randint(0, 256, (2**30,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times_ms = []
    for _ in range(23):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times_ms.append(start.elapsed_time(stop))
    return 2 * source.numel() / (statistics.median(times_ms[3:]) / 1e3)


def write_result(name: str, content: Mapping[str, Any], *, folder: Path | None = None) -> Path:
    """Return the file that now holds the content: `<name>-<device>.json`, an older one replaced.

    Args:
        name: What was measured.
        content: Facts and `rows`, with units in their keys.
        folder: Where; None: `benchmarks/results`.
    """
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    where = environment()
    device = where["devices"][0].lower().replace(" ", "-")
    if len(where["devices"]) > 1:
        device = f"{len(where['devices'])}x{device}"
    slug = "".join(c for c in device if c.isalnum() or c in "-_.")
    path = folder / f"{name}-{slug}.json"
    text = json.dumps({"name": name, "environment": where, **content}, indent=1)
    # Complete or not there: the rename replaces the file in one step.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path
