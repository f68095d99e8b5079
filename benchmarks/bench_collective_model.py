"""Compares the collective model with published times, by GPU, operation and size.

    PYTHONPATH=src python benchmarks/bench_collective_model.py [--rows published_collectives.csv]

NCCL and the all-reduce kernels of vLLM and SGLang (in CUDA graphs) on one machine, 2 to 8 GPUs.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from published import DEFAULT_ROWS
from rankwright.cost_model.collectives import (
    Group,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    find_group,
    reduce_scatter_s,
)
from rankwright.topology.shorthand import parse_cluster
from result import write_result

# The L40S host of these rows has almost no peer-to-peer (1.4 GB/s): no PCIe ceiling, so left out.
GPUS = {
    "H100-SXM5-80GB": "h100-sxm",
    "H200-SXM-141GB": "h200-sxm",
    "A100-SXM4-80GB": "a100-sxm",
}
OPERATIONS: dict[str, Callable[[float, Group], float]] = {
    "all_gather": all_gather_s,
    "reduce_scatter": reduce_scatter_s,
    "alltoall": all_to_all_s,
}
# Upper ends of the classes of size that are told apart, bytes.
SIZES = {"to 256 KiB": 2**18, "to 16 MiB": 2**24, "above": 2**62}


def predicted_s(row: dict[str, str], group: Group) -> float | None:
    """Return the modelled seconds of a row; None where it is of an algorithm we do not model."""
    size = float(row["bytes"])
    is_nccl = "NCCL" in row["impl"]
    if row["collective"] == "all_reduce":
        own = "graph" in row["impl"] and "eager" not in row["impl"] and not is_nccl
        if not (is_nccl or own):
            return None
        return all_reduce_s(size, group, ("library",) if is_nccl else ("library", "one_shot"))
    operation = OPERATIONS.get(row["collective"])
    return operation(size, group) if operation is not None and is_nccl else None


def main() -> int:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    rows_path = DEFAULT_ROWS.with_name("published_collectives.csv")
    parser.add_argument("--rows", type=Path, default=rows_path)
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    if not arguments.rows.exists():
        print(f"bench_collective_model: no published rows at {arguments.rows}", file=sys.stderr)
        return 2
    ratios: dict[tuple[str, ...], list[float]] = {}
    with arguments.rows.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["gpu"] not in GPUS or row["nodes"] != "1" or not row["bytes"]:
                continue
            cluster = parse_cluster(f"8x{GPUS[row['gpu']]}")
            count = int(row["n_gpus"])
            group = find_group(cluster, tuple((0, gpu) for gpu in range(count)))
            made_s = predicted_s(row, group)
            if made_s is None or float(row["latency_us"]) <= 0:
                continue
            limit = next(name for name, end in SIZES.items() if float(row["bytes"]) <= end)
            kernels = "NCCL" if "NCCL" in row["impl"] else "one-shot and two-shot"
            key = (row["gpu"], kernels, row["collective"], limit)
            ratios.setdefault(key, []).append(made_s * 1e6 / float(row["latency_us"]))
    lines = []
    for (gpu, kernels, collective, limit), found in sorted(ratios.items()):
        error = statistics.mean(abs(ratio - 1) for ratio in found)
        middle = statistics.median(found)
        print(
            f"{gpu:<16}{kernels:<24}{collective:<16}{limit:<12}{len(found):>4} rows  mean error "
            f"{error:6.1%}  predicted / measured {middle:.2f}"
        )
        lines.append(
            {
                "gpu": gpu,
                "kernels": kernels,
                "collective": collective,
                "size": limit,
                "rows": len(found),
                "mean_abs_error": error,
                "median_predicted_over_measured": middle,
            }
        )
    print(write_result("collective-model", {"rows": lines}, folder=arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
