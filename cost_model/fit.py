"""Turns a calibration into the shares of peak that the roofline uses.

Every kind of kernel is two lines: seconds over bytes where memory binds, whose slope is the memory
share and whose start is a launch, and seconds over operations where arithmetic binds. Lines are
fitted by least squares of relative errors, so that short kernels count as much as long ones.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rankwright.cost_model.calibration import Calibration, OpTime
from rankwright.cost_model.tiles import PRODUCT_ROWS, TILE_KEYS, prefill_flops

# What a launch cannot be: the regression may place it below zero where caches flatter small shapes.
_LEAST_S = 1e-7
# Rows of a product below which its weights are what takes time, and above which its operations are.
_FEW_ROWS, _MANY_ROWS = 64, 1024


@dataclass(frozen=True, slots=True)
class Line:
    """`seconds = start_s + amount / per_s`."""

    start_s: float
    per_s: float


def fit_shares(
    calibration: Calibration, peak_bytes_per_s: float, peak_flops_per_s: Mapping[str, float]
) -> dict[str, float]:
    """Return fields of `Efficiency` that `calibration` determines, by name.

    Args:
        calibration: What was timed.
        peak_bytes_per_s: Of the data sheet, as predictions take it.
        peak_flops_per_s: By dtype, likewise.
    """
    ops = calibration.ops
    shares: dict[str, float] = {}
    launches = [op.seconds for op in ops if op.kind == "launch"]
    elementwise = [op for op in ops if op.kind == "elementwise" and op.name != "sample"]
    if line := _fit_line((op.bytes, op.seconds) for op in elementwise):
        shares["elementwise_memory"] = line.per_s / peak_bytes_per_s
        shares["launch_s"] = line.start_s
    if launches:
        shares["launch_s"] = max(shares.get("launch_s", 0.0), min(launches))
    products = [op for op in ops if op.kind == "gemm"]
    thin = [op for op in products if op.shape[0] <= _FEW_ROWS]
    if line := _fit_line((op.bytes, op.seconds) for op in thin):
        shares["gemm_memory"] = line.per_s / peak_bytes_per_s
        shares["product_s"] = max(0.0, line.start_s - shares.get("launch_s", 0.0))
    for dtype, name in (("bfloat16", "gemm_compute"), ("float8", "gemm_compute_float8")):
        rates = [
            op.flops * (1 + PRODUCT_ROWS / op.shape[0]) / op.seconds
            for op in products
            if op.dtype == dtype and op.shape[0] >= _MANY_ROWS and min(op.shape[1:]) >= _MANY_ROWS
        ]
        if rates:
            shares[name] = statistics.median(rates) / peak_flops_per_s[dtype]
    decodes = [op for op in ops if op.kind == "attention decode"]
    if line := _fit_line((op.bytes, op.seconds) for op in decodes):
        shares["attention_memory"] = line.per_s / peak_bytes_per_s
        # Two launches: the parts of a context, and their merge.
        shares["attention_s"] = max(0.0, line.start_s - 2 * shares.get("launch_s", 0.0))
    prefills = [op for op in ops if op.kind == "attention prefill"]
    if prefills:
        launch_s = shares.get("launch_s", 0.0)
        rates = [timed_prefill_flops(op) / max(_LEAST_S, op.seconds - launch_s) for op in prefills]
        shares["attention_compute"] = statistics.median(rates) / peak_flops_per_s["bfloat16"]
    return shares


def timed_prefill_flops(op: OpTime) -> float:
    """Return the FLOPs that a timed attention of prompts takes the time of."""
    prompts, new, reach, heads, _, head_size = op.shape
    context = op.flops / (4 * prompts * new * heads * head_size)
    return prefill_flops(prompts * new, context, reach, heads, 4 * head_size, TILE_KEYS)


def _fit_line(points: Iterable[tuple[float, float]]) -> Line | None:
    """Return the line with the least squared relative error through (amount, seconds).

    None where fewer than two amounts are there, or time does not grow with them.
    """
    pairs = [(amount, seconds) for amount, seconds in points if amount > 0]
    if len({amount for amount, _ in pairs}) < 2:
        return None
    # Weighted normal equations of seconds = start + slope * amount, with weights 1 / seconds**2.
    w = sum(1 / s**2 for _, s in pairs)
    wx = sum(x / s**2 for x, s in pairs)
    wxx = sum(x * x / s**2 for x, s in pairs)
    wy = sum(1 / s for _, s in pairs)
    wxy = sum(x / s for x, s in pairs)
    slope = (w * wxy - wx * wy) / (w * wxx - wx * wx)
    start_s = (wy - slope * wx) / w
    if start_s < _LEAST_S:
        start_s, slope = _LEAST_S, (wxy - _LEAST_S * wx) / wxx
    return Line(start_s, 1 / slope) if slope > 0 else None
