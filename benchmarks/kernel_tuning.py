"""What tuners of kernels share: timing a candidate, choosing, and writing the table.

Every candidate is first held to an exact result; one that is wrong fails the run. What there is now
stays where no candidate beats it by more than noise.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from kernel_timing import DTYPE, graph_us
from rankwright.kernels.tuned import table_name
from result import ROOT, environment

Row = dict[str, Any]
Config = TypeVar("Config")
NOISE = 0.98  # of two times: less apart is none
CALL_MS = 12.0  # of timing one candidate


@dataclass(slots=True)
class Tuner:
    """Times candidates; remembers whether all were right."""

    all_right: bool = True

    def us(
        self, label: str, calls: Sequence[Callable[[], torch.Tensor]], exact: torch.Tensor
    ) -> float:
        """Return the microseconds of a call, infinite where it cannot run or is wrong.

        Args:
            label: What to call it when that is so.
            calls: Of the same work on other inputs.
            exact: The result of the first.
        """
        try:
            found = calls[0]()
        except Exception as error:  # Triton's own: too much shared memory or too many registers
            print(f"  {label}: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.synchronize()
            return math.inf
        off = float((found.double() - exact.double()).norm() / exact.double().norm())
        if not off <= torch.finfo(DTYPE).eps:  # NaN is not either
            print(f"  {label}: WRONG, relative error {off:.1e}", flush=True)
            self.all_right = False
            return math.inf
        try:
            return graph_us(calls, CALL_MS)
        except RuntimeError as error:  # what a graph does not hold is of no use here
            print(f"  {label}: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.synchronize()
            return math.inf


def best(
    candidates: Sequence[Config], timers: Sequence[tuple[float, Callable[[Config], float]]]
) -> tuple[Config, float]:
    """Return the candidate of the least time over all shapes, and that time over today's.

    Args:
        candidates: Configurations.
        timers: Of each shape: microseconds today, and what tells those of a candidate.
    """

    def ratio(candidate: Config) -> float:
        logs = [math.log(time_us(candidate) / now_us) for now_us, time_us in timers]
        return math.exp(sum(logs) / len(logs))

    ratios = [ratio(candidate) for candidate in candidates]
    least = min(ratios)
    return candidates[ratios.index(least)], least


def write_table(kinds: dict[str, list[Row]], gpu: str, folder: Path | None = None) -> Path:
    """Return the file of a GPU, which now holds these kinds of rows; other kinds in it stay."""
    folder = folder or ROOT / "kernels" / "tuned"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / table_name(gpu)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = {**old, "environment": environment(), **kinds}
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path
