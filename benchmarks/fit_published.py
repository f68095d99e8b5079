"""Fits an engine's row of `cost_model/efficiency.py` to the published runs that are not held back.

    PYTHONPATH=src python benchmarks/fit_published.py trtllm [--rows published_serving.csv]

Gauss-Newton on the logarithms of eleven constants, from the data-sheet shares as prior. A residual
is log(predicted / measured) over 8 %, TTFT counting three tenths of TPOT, and what is more than
three away is damped, since some runs depend on what was not published. Prints the row; a person
copies it.
"""

import argparse
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from math import copysign, log, log1p, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from published import DEFAULT_ROWS, Measured, read_published
from rankwright.cost_model import efficiency, engines
from rankwright.cost_model.predict import predict

# Prior value, and how far off its logarithm may be.
PRIORS: dict[str, tuple[float, float]] = {
    "gemm_compute": (0.72, 0.15),
    "gemm_compute_float8": (0.64, 0.15),
    "gemm_memory": (0.86, 0.08),
    "attention_compute": (0.50, 0.30),
    "attention_memory": (0.75, 0.15),
    "elementwise_memory": (0.75, 0.30),
    "launch_s": (2.5e-6, 0.5),
    "step_s": (4e-4, 0.8),
    "skew_s": (3e-6, 1.0),
    "host_sequence_s": (8e-5, 1.0),
    "request_s": (1e-2, 1.0),
}
_MOST_SHARE = 0.97
_SCALE, _TTFT_WEIGHT, _DAMP_FROM = 0.08, 0.3, 3.0
_ROWS_PER_PRIOR = 40  # so many rows outweigh a prior by one
_OLDEST = "0.15"  # of TensorRT-LLM; where no version is given, the dump is newer
_DIFFERENCE, _LONGEST_STEP = 0.06, 0.7

Vector = npt.NDArray[np.floating[Any]]


def apply(engine: str, values: Vector) -> dict[str, float]:
    """Let `predict` use constants whose logarithms are `values`, and return them."""
    chosen = dict(zip(PRIORS, np.exp(values).tolist(), strict=True))
    shares = {
        name: min(value, _MOST_SHARE)
        for name, value in chosen.items()
        if name.endswith(("compute", "memory", "float8"))
    }
    row = {**chosen, **shares}
    request_s = row.pop("request_s")
    engines.ENGINE_ROWS[engine] = replace(engines.ENGINE_ROWS[engine], request_s=request_s)
    efficiency.CUDA_ROWS[engine] = replace(efficiency.CUDA_ROWS[engine], **row)
    return {**row, "request_s": request_s}


def residuals(engine: str, values: Vector, rows: Sequence[Measured]) -> Vector:
    """Return damped residuals of `rows` and those of the priors."""
    apply(engine, values)
    found: list[float] = []
    for row in rows:
        made = predict(row.model(), row.cluster(), row.workload(), row.split(), engine)
        if row.output_tokens_per_s is not None:
            rate = made.output_tokens_per_s.value
            found.append(_damped(log(rate / row.output_tokens_per_s) / _SCALE))
            continue
        assert row.tpot_s is not None
        assert row.ttft_s is not None
        found.append(_damped(log(made.tpot_s.value / row.tpot_s) / _SCALE))
        found.append(_damped(_TTFT_WEIGHT * log(made.ttft_s.value / row.ttft_s) / _SCALE))
    weighted = np.array(found) / sqrt(len(rows) / _ROWS_PER_PRIOR)
    priors = np.array([(v - log(p)) / s for v, (p, s) in zip(values, PRIORS.values(), strict=True)])
    return np.concatenate([weighted, priors])


def _damped(residual: float) -> float:
    over = abs(residual) - _DAMP_FROM
    return residual if over <= 0 else copysign(_DAMP_FROM + log1p(over), residual)


def fit(engine: str, rows: Sequence[Measured], iterations: int) -> dict[str, float]:
    """Return the constants that fit `rows` best."""
    now = {"request_s": engines.ENGINE_ROWS[engine].request_s}
    now |= {name: getattr(efficiency.CUDA_ROWS[engine], name) for name in PRIORS if name not in now}
    values = np.log([max(now[name], prior / 100) for name, (prior, _) in PRIORS.items()])
    found = residuals(engine, values, rows)
    ridge = 1e-2
    for number in range(iterations):
        slopes = np.empty((len(found), len(values)))
        for i in range(len(values)):
            moved = values.copy()
            moved[i] += _DIFFERENCE
            slopes[:, i] = (residuals(engine, moved, rows) - found) / _DIFFERENCE
        square = slopes.T @ slopes
        for _ in range(4):
            step = np.linalg.solve(square + ridge * np.diag(np.diag(square)), -slopes.T @ found)
            trial = values + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
            then = residuals(engine, trial, rows)
            if then @ then < found @ found:
                break
            ridge *= 10
        else:
            break
        gain = 1 - (then @ then) / (found @ found)
        values, found, ridge = trial, then, ridge / 5
        print(f"{number}: {found @ found:.4g}", file=sys.stderr)
        if gain < 0.01:
            break
    return apply(engine, values)


def main() -> int:
    """Print the fitted row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=tuple(engines.ENGINE_ROWS))
    parser.add_argument("--rows", type=Path, default=DEFAULT_ROWS)
    parser.add_argument("--most", type=int, default=80, help="rows to fit to, chosen by checksum")
    parser.add_argument("--iterations", type=int, default=6)
    arguments = parser.parse_args()
    if not arguments.rows.exists():
        print(f"fit_published: no published rows at {arguments.rows}", file=sys.stderr)
        return 2
    rows = [
        row
        for row in read_published(arguments.rows)[0]
        if row.engine == arguments.engine
        and not row.held_back
        and (not row.version or row.version >= _OLDEST)
    ]
    rows.sort(key=lambda row: zlib.crc32(repr(row).encode()))
    loops = [row for row in rows if row.kind == "closed loop"][: arguments.most]
    tables = [row for row in rows if row.kind == "maximum throughput"][: arguments.most // 3]
    for name, value in fit(arguments.engine, loops + tables, arguments.iterations).items():
        print(f"{name}={value:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
