"""What ranks and their front end ask of Ray, on a cluster that is there or one to be made."""

from dataclasses import dataclass

from rankwright.planner.parts_plan import OwnPlan

# The front end as a Ray Serve replica: one Python thread that hands tokens on.
FRONT_END_CPUS = 1


@dataclass(frozen=True, slots=True)
class RankShare:
    """What a rank asks for, as Ray counts it."""

    num_gpus: int
    num_cpus: int


def rank_share(plan: OwnPlan, node: int) -> RankShare:
    """Return what each rank of machine `node` asks for."""
    machine = plan.cluster.node(node)
    devices = {gpu.index: gpu.device for gpu in machine.gpus}
    if all(devices[rank.gpu] == "cpu" for rank in plan.ranks_of_node(node)):
        return RankShare(0, max(1, machine.num_cpus // len(machine.gpus)))  # they share the cores
    return RankShare(1, 1)  # a core is kept busy with launching kernels
