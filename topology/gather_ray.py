"""Reads every machine of a Ray cluster: a task on each of its nodes probes where it runs.

Only this module imports Ray, and only once it is asked. It joins a cluster that runs and leaves it
running.
"""

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.join import join
from rankwright.topology.probe_message import parse_message

# What a task takes from its machine's probe: exit code, standard output, standard error.
_Answer = tuple[int, str, str]
_CONNECT_S = 5.0
_COMMAND = ("-m", "rankwright", "probe", "--json", "--gather", "none")


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node of a Ray cluster that is alive."""

    id: str
    address: str
    hostname: str
    num_gpus: float


def is_ray(environment: Mapping[str, str]) -> bool:
    """Return whether the environment names a Ray cluster to join, as jobs of Ray have it.

    `ray job submit` takes the address of a dashboard (http://) from the same variable, which no
    driver can join.
    """
    address = environment.get("RAY_ADDRESS", "")
    return bool(address) and not address.startswith(("http://", "https://"))


def over_ray(
    environment: Mapping[str, str],
    *,
    address: str | None,
    require_gpu: bool,
    fabric: str | None,
    timeout_s: float,
) -> Cluster:
    """Return the nodes of a running Ray cluster as one cluster, in the order of their addresses.

    Nodes without a GPU resource are left out where others have one (a head without GPUs, say).
    Nodes on one host get names that tell them apart.

    Args:
        environment: Of this process.
        address: Of the Ray cluster, as `ray.init` takes it; None: RAY_ADDRESS, else the cluster
            that runs on this machine.
        require_gpu: Refuse nodes without a GPU.
        fabric: The network between them, as shorthand has it; None: what their ports say.
        timeout_s: Until all must have answered.

    Raises:
        ProbeError: A node could not be read or did not answer.
        ValueError: Ray is not installed, or no cluster is at the address.
    """
    try:
        ray = import_module("ray")
    except ImportError:
        raise ValueError(
            "Ray is not installed here; install it with `pip install 'rankwright[ray]'`, or read "
            "this machine alone with --gather none"
        ) from None
    joined = not ray.is_initialized()
    deadline_s = time.monotonic() + timeout_s
    if joined:
        _connect(ray, address or environment.get("RAY_ADDRESS") or "auto")
    try:
        nodes = alive_nodes(ray.nodes())
        chosen, notes = choose_nodes(nodes)
        answers = _ask(ray, chosen, require_gpu, deadline_s)
    finally:
        if joined:
            ray.shutdown()  # of this driver only: the cluster goes on
    names, more = name_nodes(chosen)
    found: list[Cluster] = []
    for name, (code, said, complained) in zip(names, answers, strict=True):
        if "No module named rankwright" in complained:
            raise ProbeError(
                "gather_failed",
                f"rankwright is not installed on the Ray node {name}; install it in the Python "
                "that Ray runs there",
            )
        found.append(parse_message(said, name, complained or f"exit code {code}"))
    cluster = join(found, fabric=fabric, source="probe over Ray")
    return cluster.model_copy(update={"notes": (*cluster.notes, *notes, *more)})


def alive_nodes(rows: Sequence[Mapping[str, Any]]) -> list[RayNode]:
    """Return the nodes of `ray.nodes()` that are alive, by address, then by id."""
    nodes = [
        RayNode(
            id=row["NodeID"],
            address=row["NodeManagerAddress"],
            hostname=row["NodeManagerHostname"] or row["NodeManagerAddress"],
            num_gpus=row.get("Resources", {}).get("GPU", 0.0),
        )
        for row in rows
        if row["Alive"]
    ]
    # Addresses count as numbers do: 10.0.0.9 is before 10.0.0.10.
    return sorted(nodes, key=lambda node: (len(node.address), node.address, node.id))


def choose_nodes(nodes: Sequence[RayNode]) -> tuple[list[RayNode], list[str]]:
    """Return the nodes that can compute for us, and a note on those that are left out."""
    with_gpus = [node for node in nodes if node.num_gpus > 0]
    if not with_gpus or len(with_gpus) == len(nodes):
        return list(nodes), []
    others = ", ".join(node.address for node in nodes if node.num_gpus == 0)
    return with_gpus, [f"Ray nodes without a GPU are left out: {others}"]


def name_nodes(nodes: Sequence[RayNode]) -> tuple[list[str], list[str]]:
    """Return a name for each node, and a note where several are on one host.

    >>> a, b = RayNode("aa11bb22", "10.0.0.1", "n", 0), RayNode("cc33dd44", "10.0.0.1", "n", 0)
    >>> name_nodes([a])[0], name_nodes([a, b])[0]
    (['n'], ['n-aa11bb22', 'n-cc33dd44'])
    """
    count = Counter((node.hostname, node.address) for node in nodes)
    hosts = Counter(node.hostname for node in nodes)
    names = [
        node.hostname if hosts[node.hostname] == 1 else f"{node.hostname}-{node.id[:8]}"
        for node in nodes
    ]
    notes = [
        f"{number} Ray nodes run on host {hostname} ({address}) and share what it has: its GPUs, "
        "cores and memory are counted once for each of them"
        for (hostname, address), number in count.items()
        if number > 1
    ]
    return names, notes


def _connect(ray: Any, address: str) -> None:
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    # Ray raises what it likes here: ConnectionError, RuntimeError, or an error of gRPC.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({reason}); give its address with "
            "--ray-address or RAY_ADDRESS, or start one with `ray start --head`"
        ) from None


def _check_answers(address: str) -> None:
    """Check that something listens at HOST:PORT: Ray itself tries for ten minutes.

    Raises:
        OSError: Nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host, min(int(port), 65535)), _CONNECT_S):
            pass


def _ask(ray: Any, nodes: Sequence[RayNode], require_gpu: bool, deadline_s: float) -> list[_Answer]:
    affinity = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    arguments = (*_COMMAND, *(("--require-gpu",) if require_gpu else ()))
    most_s = max(deadline_s - time.monotonic(), 1.0)

    # Within, so that it travels by value: a node without rankwright can then say so.
    def probe_there(has_gpus: bool) -> _Answer:
        environment = {
            name: value
            for name, value in os.environ.items()
            # Older Rays hide all GPUs from a task that asks for none.
            if not (has_gpus and name == "CUDA_VISIBLE_DEVICES" and not value)
        }
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=most_s,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    # No CPU is asked for, so that a node that is full of other work still answers.
    task = ray.remote(num_cpus=0, max_retries=0)(probe_there)
    asked = [
        task.options(scheduling_strategy=affinity(node_id=node.id, soft=False)).remote(
            node.num_gpus > 0
        )
        for node in nodes
    ]
    left_s = max(deadline_s - time.monotonic(), 0.0)
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=left_s)
    silent = [node.address for node, ref in zip(nodes, asked, strict=True) if ref not in done]
    if silent:
        raise ProbeError(
            "gather_failed",
            f"no word in time from the Ray node at {', '.join(silent)}; see `ray status`",
        )
    answers: list[_Answer] = []
    for node, ref in zip(nodes, asked, strict=True):
        try:
            answers.append(ray.get(ref))
        # A task fails in as many ways as its node: a worker that dies, a lost node, a time limit.
        except Exception as error:
            reason = " ".join(str(error).split())[-300:]
            raise ProbeError(
                "gather_failed", f"the Ray node at {node.address} was not read: {reason}"
            ) from None
    return answers
