"""Two Ray nodes of 2 CPUs and 2 pretended GPUs each, until standard input ends.

A process of its own: Ray warns, and its threads and signal handlers would be the tests'.
"""

import os
import shutil
import sys
import tempfile
from typing import Any

os.environ["RAY_raylet_start_wait_time_s"] = "40"  # noqa: SIM112 (Ray spells it so)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Compiling all that Ray's agents import takes longer than the tests, each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from ray.cluster_utils import Cluster

# A node ends itself when its Python agent takes more than 15 s to start, which no setting changes
# and which may happen on a machine with much other work.
ATTEMPTS = 4


def start(folder: str) -> Cluster:
    node: dict[str, Any] = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 100_000_000}
    for attempt in range(ATTEMPTS):
        cluster = Cluster()
        try:
            cluster.add_node(include_dashboard=False, temp_dir=folder, **node)
            cluster.add_node(**node)
            return cluster
        except Exception as error:  # Ray has no narrower one here
            cluster.shutdown()
            print(f"attempt {attempt}: {error}", file=sys.stderr)
    raise SystemExit("no Ray cluster could be started")


if __name__ == "__main__":
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets: a path of 107 bytes at most
    try:
        cluster = start(folder)
        print(cluster.address, flush=True)
        sys.stdin.read()
        cluster.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
