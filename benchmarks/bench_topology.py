"""Times a cluster file of 1,024 machines with 8 GPUs: load, graph, islands, and answers about it.

    PYTHONPATH=src python benchmarks/bench_topology.py [--nodes 1024] [--output FOLDER]

Each case runs in a process of its own, several times; the row has the medians, and the most memory
that any of the processes had resident, the interpreter and all imports included. A "folded" file
has one node with a count, as a probe of equal machines writes it; "each node" lists all machines,
as the probe of machines that all differ a little does.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rankwright.topology.cluster import Cluster
from rankwright.topology.groups import best_groups
from rankwright.topology.read_cluster import read_cluster, write_cluster
from rankwright.topology.rings import best_ring
from rankwright.topology.shorthand import parse_cluster
from result import write_result

GPUS_PER_NODE = 8
REPEATS = 5


def make_cluster(num_nodes: int, *, folded: bool) -> Cluster:
    """Return the cluster; not folded, each machine has its own name and amount of free memory."""
    cluster = parse_cluster(f"{num_nodes}x{GPUS_PER_NODE}xh100-sxm+ib400")
    if folded:
        return cluster
    node = cluster.nodes[0]
    nodes = tuple(
        node.model_copy(
            update={
                "name": f"node{index}",
                "count": 1,
                "gpus": tuple(
                    gpu.model_copy(update={"memory_bytes": gpu.memory_bytes - index})
                    for gpu in node.gpus
                ),
            }
        )
        for index in range(num_nodes)
    )
    return cluster.model_copy(update={"nodes": nodes})


def measure(path: str) -> dict[str, float]:
    """Return the seconds of each step and the memory of this process."""
    marks = [time.perf_counter()]

    def lap() -> float:
        marks.append(time.perf_counter())
        return marks[-1] - marks[-2]

    cluster = read_cluster(path)
    row = {"load_s": lap()}
    graph = cluster.graph
    row["graph_s"] = lap()
    islands = cluster.islands
    row["islands_s"] = lap()
    row["total_s"] = marks[-1] - marks[0]
    row["resident_bytes"] = _most_resident_bytes()
    lap()
    everyone = [gpu for island in islands for gpu in island]
    cluster.bandwidth(everyone)
    row["bandwidth_of_all_s"] = lap()
    best_groups(cluster, GPUS_PER_NODE // 2)
    row["groups_of_4_s"] = lap()
    best_ring(cluster, everyone[:128])
    row["ring_of_128_s"] = lap()
    row |= {"vertices": graph.number_of_nodes(), "edges": graph.number_of_edges()}
    return row | {"islands": len(islands)}


def _most_resident_bytes() -> float:
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return float(line.split()[1]) * 1024


def _run(path: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(path)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(REPEATS)
    ]
    row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    row["resident_bytes"] = max(run["resident_bytes"] for run in runs)
    return {key: round(value, 4) for key, value in row.items()}


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for folded in (True, False):
            cluster = make_cluster(arguments.nodes, folded=folded)
            for kind in ("yaml", "json"):
                path = Path(folder) / f"cluster.{kind}"
                write_cluster(cluster, path)
                shape = "folded" if folded else "each node"
                facts = {"file": f"{kind}, {shape}", "file_bytes": path.stat().st_size}
                rows.append(facts | _run(path))
                print(json.dumps(rows[-1]), flush=True)
    content = {"nodes": arguments.nodes, "gpus_per_node": GPUS_PER_NODE, "repeats": REPEATS}
    print(write_result("topology", content | {"rows": rows}, folder=arguments.output))


if __name__ == "__main__":
    main()
