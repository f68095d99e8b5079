"""What a RayService has that other workloads have not: a head without ranks, and Ray's own ports.

The plan's machines are all workers. Which of them is which, Ray decides: it gives each machine's
ranks a node that has what they ask for.
"""

from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.kubernetes_flavors import Group, PodShare
from rankwright.templates.layout import NodeShare
from rankwright.templates.ray_share import FRONT_END_CPUS, rank_share

# Ray's defaults, which KubeRay keeps (Ray docs, "Configuring Ray", ports).
GCS_PORT, DASHBOARD_PORT, AGENT_PORT = 6379, 8265, 52365
_CLIENT_PORT, _METRICS_PORT, _WORKER_PORTS = 10001, 8080, range(10002, 20000)

# Ray would take 30 % of the memory, out of /dev/shm, for objects. Ours are a plan and lines of
# logs; 75 MiB is the least that it takes.
OBJECT_STORE_BYTES = 100 * 2**20

# Control plane, dashboard, agents, Serve's controller and a proxy took 0.8 GiB with two nodes, and
# grow with the cluster and with time.
_HEAD = PodShare(num_cpus=2, num_gpus=0, memory="4096Mi", shm="256Mi")


def ray_head(name: str) -> Group:
    """Return the pod of the head, which runs no rank."""
    return Group(f"{name}-head", "head", 0, 1, _HEAD, None)


def ray_workers(
    plan: OwnPlan, shares: tuple[NodeShare, ...], groups: tuple[Group, ...]
) -> tuple[tuple[Group, int], ...]:
    """Return the pods of the plan's machines, one group for all that are alike.

    Args:
        plan: What runs on them.
        shares: What each machine must give, by node rank.
        groups: Runs of machines that are alike.

    Returns:
        Each group with the CPUs that Ray may hand out on one of its machines.
    """
    counts: dict[tuple[PodShare, str | None, int], int] = {}
    for group in groups:
        for share in shares[group.start : group.start + group.replicas]:
            num_cpus = share.num_ranks * rank_share(plan, share.node).num_cpus + FRONT_END_CPUS
            key = (group.share, group.gpu_type, num_cpus)
            counts[key] = counts.get(key, 0) + 1
    return tuple(
        (Group(f"workers-{number}", "worker", 0, count, share, gpu_type), num_cpus)
        for number, ((share, gpu_type, num_cpus), count) in enumerate(counts.items())
    )


def check_ray_port(port: int) -> None:
    """Check that Ray listens to nothing else on `port`.

    Raises:
        ValueError: It does.
    """
    own = (GCS_PORT, DASHBOARD_PORT, AGENT_PORT, _CLIENT_PORT, _METRICS_PORT)
    if port in own or port in _WORKER_PORTS:
        raise ValueError(
            f"port={port} is one that Ray uses itself ({', '.join(map(str, own))}, and "
            f"{_WORKER_PORTS[0]} to {_WORKER_PORTS[-1]}); expected another, such as 8000"
        )
