"""Two Ray nodes of 2 CPUs and 2 pretended GPUs each, until standard input ends.

A process of its own: Ray warns, and its threads and signal handlers would be the tests'.
"""

import os
import re
import shutil
import sys
import tempfile
from typing import Any

# For a machine with much other work. (Ray spells them so.)
os.environ["RAY_raylet_start_wait_time_s"] = "120"  # noqa: SIM112
os.environ["RAY_agent_register_timeout_ms"] = "120000"  # noqa: SIM112
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Compiling all that Ray's agents import takes longer than the tests, each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from ray._private import services
from ray.cluster_utils import Cluster
from tests.ports import free_port

# A node waits 15 s, which no setting changes, for each port that its Python agents choose, and then
# ends itself. For ports that are given it does not wait, but Ray's Python forgets to hand one on.
FORGOTTEN = "dashboard_agent_listen_port"
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", FORGOTTEN)
start_process = services.start_ray_process


def start_process_with_port(command: list[str], *args: Any, **options: Any) -> Any:
    """Ray's function, with the port that its agent listens on for the node."""
    if command[0].endswith("/raylet"):
        (port,) = re.findall(r" --listen-port=(\d+) ", " ".join(command))
        command = [*command, f"--{FORGOTTEN}={port}"]
    return start_process(command, *args, **options)


services.start_ray_process = start_process_with_port


def start(folder: str) -> Cluster:
    cluster = Cluster()
    first: dict[str, Any] = {"include_dashboard": False, "temp_dir": folder}
    for own in (first, {}):
        node: dict[str, Any] = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 100_000_000}
        cluster.add_node(**node, **own, **free_ports())
    return cluster


def free_ports() -> dict[str, Any]:
    """A port for each of a node's agents, none of them twice."""
    return {each: free_port() for each in AGENT_PORTS}


if __name__ == "__main__":
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets: a path of 107 bytes at most
    try:
        cluster = start(folder)
        print(cluster.address, flush=True)
        sys.stdin.read()
        cluster.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
