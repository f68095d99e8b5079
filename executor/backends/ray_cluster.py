"""The Ray cluster of a launch: joined or started, counted against the plan, left again.

Nothing here stops a Ray that it did not start: `ray stop` would end those of other people too.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rankwright.executor.backends.tools import MissingToolError
from rankwright.executor.run_options import RunOptions
from rankwright.planner.plan import Plan
from rankwright.templates.ray_share import rank_share

_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node of a Ray cluster, with what it has in all, used or not."""

    id: str
    address: str
    host: str
    num_gpus: float
    num_cpus: float


@dataclass(frozen=True, slots=True)
class Bundle:
    """What the ranks of one machine ask of Ray, and which node it must be (None: any)."""

    node: int
    num_ranks: int
    gpus_per_rank: int
    cpus_per_rank: int
    node_id: str | None

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts them."""
        asked = {"CPU": float(self.num_ranks * self.cpus_per_rank)}
        if self.gpus_per_rank:
            asked["GPU"] = float(self.num_ranks * self.gpus_per_rank)
        return asked


@contextlib.contextmanager
def connected(plan: Plan, options: RunOptions) -> Iterator[RunOptions]:
    """Join a Ray cluster that has what `plan` asks for, and leave it with the block.

    Yields:
        The options with the address of this node, where leaders connect.

    Raises:
        MissingToolError: There is no Ray, or no cluster to join.
        ValueError: The cluster is smaller than the plan.
    """
    _init(plan, options)
    import ray

    try:
        make_bundles(plan, nodes())
        here: str = ray.util.get_node_ip_address()
        yield replace(options, host_interface=options.host_interface or here)
    finally:
        ray.shutdown()  # leaves a cluster that was there, ends one that `init` has started


def nodes() -> list[RayNode]:
    """Return the nodes that are alive."""
    import ray

    return [
        RayNode(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            host=node["NodeManagerHostname"],
            num_gpus=node["Resources"].get("GPU", 0.0),
            num_cpus=node["Resources"].get("CPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def make_bundles(plan: Plan, offered: list[RayNode]) -> list[Bundle]:
    """Return a bundle for each machine of the plan.

    Where the plan's machines have the names or addresses of Ray's nodes, as those of a probed
    cluster have, each is bound to its node.

    Raises:
        ValueError: Ray does not have what they ask for; with both counts.
    """
    used = plan.nodes_used()
    names = [plan.cluster.node(node).name for node in used]
    ids = [[n.id for n in offered if name in (n.host, n.address)] for name in names]
    found = [matching[0] for matching in ids if len(matching) == 1]
    bound = len(set(found)) == len(used)
    bundles = [
        _bundle(plan, node, found[index] if bound else None) for index, node in enumerate(used)
    ]
    asked = sorted((_counts(bundle) for bundle in bundles), reverse=True)
    has = sorted(((node.num_gpus, node.num_cpus) for node in offered), reverse=True)
    fits = len(asked) <= len(has) and all(
        gpus <= has_gpus and cpus <= has_cpus
        for (gpus, cpus), (has_gpus, has_cpus) in zip(asked, has, strict=False)
    )
    if not fits:
        raise ValueError(
            f"the plan asks for {_describe(asked)}, and the Ray cluster has {_describe(has)}; "
            "add nodes with `ray start --address`, or plan for what it has"
        )
    return bundles


def _bundle(plan: Plan, node: int, node_id: str | None) -> Bundle:
    share = rank_share(plan, node)
    return Bundle(
        node=node,
        num_ranks=len(plan.ranks_of_node(node)),
        gpus_per_rank=share.num_gpus,
        cpus_per_rank=share.num_cpus,
        node_id=node_id,
    )


def _counts(bundle: Bundle) -> tuple[float, float]:
    return bundle.resources.get("GPU", 0.0), bundle.resources["CPU"]


def _describe(machines: list[tuple[float, float]]) -> str:
    """Return machines of (GPUs, CPUs) in words.

    >>> _describe([(8, 16), (8, 16), (0, 2)])
    '2 nodes x 8 GPUs and 16 CPUs + 1 node x 2 CPUs'
    """
    parts: list[str] = []
    for kind in sorted(set(machines), reverse=True):
        count, (gpus, cpus) = machines.count(kind), kind
        what = f"{gpus:g} GPUs and {cpus:g} CPUs" if gpus else f"{cpus:g} CPUs"
        parts.append(f"{count} node{'s' * (count != 1)} x {what}")
    return " + ".join(parts) or "no node"


def _init(plan: Plan, options: RunOptions) -> None:
    """Join the cluster at the given address or the one that runs here, or start one.

    Raises:
        MissingToolError: There is no Ray, or no cluster.
        ValueError: The address is that of a Ray Client.
    """
    # Read when Ray is imported: nobody was asked whether to send usage statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it a warning comes that does not concern ranks: actors without GPUs set nothing.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingToolError(
            "Ray is not installed here; install it on every node with: "
            "pip install 'rankwright[executor,ray]'"
        ) from None
    address = options.ray_address or os.environ.get("RAY_ADDRESS")
    if address is not None and "://" in address:
        raise ValueError(
            f"the Ray address {address!r} is that of a Ray Client, and the launch must run on a "
            "node of the cluster itself: log in to one, and give HOST:PORT"
        )
    if address not in (None, "auto", "local"):
        _check_answers(address)
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    several = len(plan.nodes_used()) > 1
    try:
        # For one machine Ray joins what runs here, or starts a cluster of its own.
        ray.init(address=address or ("auto" if several else None), **quiet)
    except (ConnectionError, RuntimeError) as error:
        what = f"Ray at {address}" if address else "Ray on this machine"
        raise _no_cluster(what, " ".join(str(error).split())[:200]) from None


def _check_answers(address: str) -> None:
    """Check that something listens at `address`: Ray itself tries for minutes.

    Raises:
        MissingToolError: Nothing does.
        ValueError: It is no address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"the Ray address {address!r} is not HOST:PORT; the port is 6379 by default"
        )
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(f"Ray at {address}", str(error)) from None


def _no_cluster(what: str, why: str) -> MissingToolError:
    return MissingToolError(
        f"there is no {what} ({why}); start one with `ray start --head` and, on the other "
        "machines, `ray start --address HOST:PORT`, or launch with --backend slurm, or on each "
        "machine with --nnodes"
    )
