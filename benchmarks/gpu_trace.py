"""Reads a trace of torch.profiler: what a GPU did in a window, by class of operation."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# (class, parts of a kernel's lower-case name); the first that matches counts.
CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("collectives", ("nccl", "all_reduce", "allreduce", "all_gather")),
    ("attention", ("_decode_kernel", "_merge_kernel", "_prefill", "flash", "fmha", "cudnn")),
    ("sampling", ("_sample_", "_pick_kernel", "_threshold", "argmax", "sort", "topk", "cumsum")),
    ("matrix products", ("gemm", "gemv", "nvjet", "cutlass", "splitk", "xmma", "_skinny")),
    ("copies", ("memcpy", "memset")),
    ("norms and elementwise", ("",)),
)
# Steps at the start of a window that are left out.
DISTURBED = 4
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class Event:
    """One kernel or copy, microseconds since the trace's own start."""

    name: str
    start_us: float
    stop_us: float

    @property
    def kind(self) -> str:
        """Its class of operation."""
        name = self.name.lower()
        return next(kind for kind, parts in CLASSES if any(part in name for part in parts))


def read_trace(path: Path) -> list[Event]:
    """Return the GPU's events of a Chrome trace, by start."""
    events = [
        Event(one["name"], float(one["ts"]), float(one["ts"]) + float(one["dur"]))
        for one in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        if one.get("ph") == "X" and one.get("cat") in GPU_CATEGORIES
    ]
    return sorted(events, key=lambda event: event.start_us)


def whole_steps(events: list[Event], num_steps: int) -> tuple[list[Event], int]:
    """Return the events of whole steps, and how many steps those are.

    A window cuts its first and last step, and starting it disturbs the first few. What occurs once
    a step marks where one begins: the first name that was seen within two of `num_steps` times.

    Raises:
        ValueError: Nothing occurs about that often.
    """
    counts = Counter(event.name for event in events)
    for event in events:
        if abs(counts[event.name] - num_steps) <= 2 and counts[event.name] > 1:
            starts = [one.start_us for one in events if one.name == event.name]
            starts = starts[min(DISTURBED, len(starts) - 2) :]
            inside = [one for one in events if starts[0] <= one.start_us < starts[-1]]
            return inside, len(starts) - 1
    raise ValueError(
        f"no kernel ran about {num_steps} times; the most frequent: {counts.most_common(5)}"
    )


def summarise(events: list[Event], num_steps: int) -> dict[str, Any]:
    """Return microseconds a step by class, of the longest kernels, and of the gaps between them."""
    window_us = max(event.stop_us for event in events) - events[0].start_us
    by_class: dict[str, list[float]] = {}
    by_name: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    busy_us, reached, before = 0.0, events[0].start_us, events[0].name
    for event in events:
        spent = event.stop_us - event.start_us
        by_class.setdefault(event.kind, []).append(spent)
        by_name.setdefault(_short(event.name), []).append(spent)
        if event.start_us > reached:
            gaps.setdefault(f"{_short(before)} -> {_short(event.name)}", []).append(
                event.start_us - reached
            )
        if event.stop_us > reached:
            busy_us += event.stop_us - max(event.start_us, reached)
            reached, before = event.stop_us, event.name
    return {
        "num_steps": num_steps,
        "window_us_per_step": window_us / num_steps,
        "busy_us_per_step": busy_us / num_steps,
        "idle_share_of_window": 1 - busy_us / window_us,
        "classes": _table(by_class, num_steps),
        "kernels": _table(by_name, num_steps)[:20],
        "gaps": _table(gaps, num_steps)[:10],
    }


def _short(name: str) -> str:
    return name.removeprefix("void ")[:110]


def _table(times: dict[str, list[float]], num_steps: int) -> list[dict[str, Any]]:
    rows = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "name": name,
            "us_per_step": sum(spent) / num_steps,
            "times_per_step": len(spent) / num_steps,
            "mean_us": sum(spent) / len(spent),
        }
        for name, spent in rows
    ]
