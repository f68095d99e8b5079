"""What a tuner measured on one kind of GPU: `kernels/tuned/<gpu>.json`, read once.

`benchmarks/bench_kernels.py --sweep` writes these files. Where there is none for a GPU, or a shape
is not in it, kernels go by their rules. `RANKWRIGHT_KERNEL_TABLES` names a folder to read instead
of the one that ships, for tables of one's own.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from rankwright.kernels.gpu_facts import gpu_facts

_SHIPPED = Path(__file__).parent / "tuned"


def table_name(gpu: str) -> str:
    """Return the name of the file for a GPU.

    >>> table_name("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3.json'
    """
    return f"{gpu.lower().replace(' ', '-')}.json"


@lru_cache
def read_table(path: Path) -> dict[str, Any]:
    """Return what the file says; nothing where it does not exist.

    Raises:
        ValueError: It is not a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(_ADVICE.format(path=path, why=error)) from None
    if not isinstance(content, dict):
        raise ValueError(_ADVICE.format(path=path, why=f"it holds a {type(content).__name__}"))
    return content


_ADVICE = (
    "{path} is no table of tuned kernels: {why}; write it again with "
    "`python benchmarks/bench_kernels.py --sweep`, or remove it"
)


def tuned_rows(device: torch.device, kind: str) -> dict[tuple[int, ...], dict[str, int]]:
    """Return the configurations of a kind of kernel on a device, by the shape that each is for.

    Args:
        device: Where it runs, or what stands for that; a CPU has none.
        kind: Which rows of the file: "linear", "decode", "prefill" or "whole_prompts".

    Raises:
        ValueError: The file is not a table.
    """
    if device.type == "cpu":
        return {}
    folder = os.environ.get("RANKWRIGHT_KERNEL_TABLES")
    return _rows_in(Path(folder) if folder else _SHIPPED, gpu_facts(device).name, kind)


@lru_cache
def _rows_in(folder: Path, gpu: str, kind: str) -> dict[tuple[int, ...], dict[str, int]]:
    return rows_of(read_table(folder / table_name(gpu)), kind)


def rows_of(table: dict[str, Any], kind: str) -> dict[tuple[int, ...], dict[str, int]]:
    """Return the configurations of a kind in a table that was read.

    >>> rows_of({"linear": [{"shape": [8, 4096, 6144], "config": {"block_n": 64}}]}, "linear")
    {(8, 4096, 6144): {'block_n': 64}}
    """
    return {tuple(row["shape"]): row["config"] for row in table.get(kind, ())}
