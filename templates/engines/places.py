"""Which GPUs of which nodes each replica of a plan takes: an engine runs one replica a server."""

from dataclasses import dataclass

from rankwright.planner.plan import Plan, RankPlan
from rankwright.templates.layout import node_order


@dataclass(frozen=True, slots=True)
class Place:
    """The part of one replica on one node."""

    replica: int
    part: int  # number of the node within the replica
    node_rank: int  # number of the node within the job
    gpus: tuple[int, ...]


def ranks_of_replicas(plan: Plan) -> dict[int, list[RankPlan]]:
    """Return the ranks of each replica of `plan`, in their order."""
    found: dict[int, list[RankPlan]] = {}
    for rank in plan.ranks:
        found.setdefault(rank.replica, []).append(rank)
    return found


def replica_places(plan: Plan) -> tuple[Place, ...]:
    """Return the places of `plan`, replica by replica.

    Raises:
        ValueError: A replica takes different numbers of GPUs on its nodes, GPUs of several kinds,
            or replicas take different numbers of nodes, which engines have no flags for.
    """
    numbers = {node: rank for rank, node in enumerate(node_order(plan))}
    places: list[Place] = []
    for replica, ranks in ranks_of_replicas(plan).items():
        nodes = list(dict.fromkeys(rank.node for rank in ranks))
        for part, node in enumerate(nodes):
            gpus = tuple(rank.gpu for rank in ranks if rank.node == node)
            places.append(Place(replica, part, numbers[node], gpus))
        _check_kinds(plan, ranks)
    sizes = {len(place.gpus) for place in places}
    if len(sizes) > 1:
        counts = " + ".join(str(len(place.gpus)) for place in places)
        raise ValueError(
            f"the plan's replicas take {counts} GPUs of their nodes, and another engine splits a "
            "replica evenly over its nodes; plan with a --tp and --pp that fill nodes alike"
        )
    return tuple(places)


def _check_kinds(plan: Plan, ranks: list[RankPlan]) -> None:
    kinds = {
        gpu.device
        for rank in ranks
        for gpu in plan.cluster.node(rank.node).gpus
        if gpu.index == rank.gpu
    }
    if "cpu" in kinds:
        raise ValueError(
            "the plan is for CPUs, and another engine's targets are for GPUs; render for slurm or "
            "kubernetes"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"replica {ranks[0].replica} runs on {' and '.join(sorted(kinds))}, and another engine "
            "takes the same share of layers, batch and memory from every GPU; plan replicas on "
            "GPUs of one kind"
        )


def nodes_of_a_replica(places: tuple[Place, ...]) -> int:
    """Return how many nodes each replica has."""
    return 1 + max(place.part for place in places)
