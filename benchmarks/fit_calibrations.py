"""Fits the constants that ship for a device to what `rankwright calibrate` measured on it.

    PYTHONPATH=src python benchmarks/fit_calibrations.py h200.json h100.json [--write]

Prints, for each kind of kernel, how far the fitted lines are from every second measured shape when
fitted to the others, and with `--write` puts the shares of all shapes into
`cost_model/data/calibrated.json`.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rankwright.cost_model.apply_calibration import apply_calibration
from rankwright.cost_model.calibration import Calibration, OpTime, read_calibration
from rankwright.cost_model.fit import fit_shares, timed_prefill_flops
from rankwright.cost_model.ops import Op, Rates, find_rates
from rankwright.cost_model.tiles import PRODUCT_ROWS
from rankwright.topology.devices import flops_per_s, memory_bytes_per_s
from rankwright.topology.shorthand import parse_cluster

TABLES = Path(__file__).parents[1] / "cost_model" / "data" / "calibrated.json"


def made(rates: Rates, op: OpTime) -> float:
    """Return the seconds that the cost model gives for a timed kernel."""
    launches = 2 if op.kind == "attention decode" else 1
    padding = PRODUCT_ROWS / op.shape[0] * op.flops if op.kind == "gemm" else 0.0
    if op.kind == "attention prefill":
        padding = timed_prefill_flops(op) - op.flops
    kind = "elementwise" if op.kind == "launch" else op.kind
    return rates.cost(Op(op.name, kind, op.flops, op.bytes, launches, op.dtype, padding)).seconds


def held_back_ratios(calibration: Calibration) -> dict[str, list[float]]:
    """Return measured over predicted of every second shape, by kind, fitted to the others."""
    others = calibration.model_copy(update={"ops": calibration.ops[::2]})
    cluster = apply_calibration(parse_cluster(f"1x{calibration.device}"), others)
    rates = find_rates(cluster.nodes[0].gpus[0], "rankwright")
    found: dict[str, list[float]] = {}
    for op in calibration.ops[1::2]:
        if op.name != "sample":  # it is priced with the logits
            found.setdefault(op.kind, []).append(op.seconds / made(rates, op))
    return found


def row_of(calibration: Calibration) -> dict[str, Any]:
    """Return what ships for one device."""
    gpu = parse_cluster(f"1x{calibration.device}").nodes[0].gpus[0]
    peaks = {dtype: flops_per_s(gpu, dtype) for dtype in ("bfloat16", "float8")}
    shares = fit_shares(calibration, memory_bytes_per_s(gpu), peaks)
    return {
        "shares": {name: float(f"{value:.4g}") for name, value in shares.items()},
        "source": f"rankwright calibrate on {calibration.name}, {calibration.software}, "
        f"{calibration.measured_at[:10]}",
    }


def main() -> int:
    """Print errors and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    tables: dict[str, Any] = json.loads(TABLES.read_text()) if TABLES.exists() else {}
    for path in arguments.files:
        calibration = read_calibration(path)
        tables[calibration.device] = row_of(calibration)
        print(f"{calibration.name}: {json.dumps(tables[calibration.device]['shares'])}")
        for kind, ratios in held_back_ratios(calibration).items():
            ordered = sorted(ratios)
            tenth = len(ordered) // 10
            error = statistics.mean(abs(ratio - 1) for ratio in ratios)
            print(
                f"  {kind:<18}{len(ratios):>4} held-back shapes, mean error {error:.1%}, 80 % of "
                f"measured / predicted in {ordered[tenth]:.2f} to {ordered[-1 - tenth]:.2f}"
            )
    if arguments.write:
        unfinished = TABLES.with_suffix(".tmp")
        unfinished.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(TABLES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
