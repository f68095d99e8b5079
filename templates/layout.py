"""What each machine of a plan must give: GPUs, CPUs, memory, and time to load.

Node ranks of a launch follow the plan's ranks: node rank 0 is the machine of rank 0. Targets share
this arithmetic, so that a Slurm job and a pod ask for the same things.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rankwright.planner.parts_plan import OwnPlan
from rankwright.topology.cluster import Node

# A GPU rank keeps one thread busy with Python and kernel launches and one with NCCL's proxy or with
# reading weights; the node's front end and launcher share two more.
CPUS_PER_GPU_RANK = 2
CPUS_PER_LAUNCHER = 2

# Host memory asked for a GPU rank: interpreter, torch, CUDA context and pinned buffers. Weights are
# read through the page cache straight to the GPU. A request, not a limit.
HOST_BYTES_PER_GPU_RANK = 4 * 2**30

# NCCL's shared-memory transport. 64 MiB, the default of containers, is too small; NVIDIA's user
# guide (Troubleshooting, Docker) starts containers with --shm-size=1g.
SHM_BYTES_PER_RANK = 2**30

# Loading may take as long as the slowest volume that people do serve from: 125 MiB/s, the baseline
# of an Amazon EBS gp3 volume (EBS user guide). Then graphs are captured, images and page caches are
# cold, and the peers are waited for.
SLOWEST_STORAGE_BYTES_PER_S = 125 * 2**20
START_S = 300

# How long running requests get to finish after a TERM, and what the launcher then takes to end its
# ranks: 10 s by themselves, a moment to kill them.
DRAIN_S = 60
END_S = 20

# Ranks meet on one port; leaders of replicas connect to the next one.
PORTS_OF_A_LAUNCH = 2


@dataclass(frozen=True, slots=True)
class NodeShare:
    """One machine's part of a plan."""

    node_rank: int
    node: int
    devices: tuple[str, ...]  # of its ranks, in rank order
    is_whole: bool  # no GPU of the machine is left over
    num_cpus: int  # to ask for
    memory_bytes: int  # of host memory to ask for, without /dev/shm
    device_bytes: int  # held by all its ranks at most

    @property
    def num_ranks(self) -> int:
        """Ranks on this machine."""
        return len(self.devices)

    @property
    def num_gpus(self) -> int:
        """GPUs to ask for: none on a machine of CPU ranks."""
        return sum(device != "cpu" for device in self.devices)


def node_order(plan: OwnPlan) -> tuple[int, ...]:
    """Return the plan's machines by node rank: in the order of their first rank.

    Raises:
        ValueError: Ranks of a machine do not follow one another, as launchers number them.
    """
    places = [node for node, _ in groupby(plan.ranks, key=lambda rank: rank.node)]
    if len(set(places)) != len(places):
        raise ValueError(
            f"ranks go to nodes {', '.join(map(str, places))}, and a job numbers the ranks of a "
            "node one after another; plan again with a --tp that fits a node"
        )
    return tuple(places)


def node_shares(plan: OwnPlan, *, told_apart: bool = False) -> tuple[NodeShare, ...]:
    """Return what each used machine must give, by node rank.

    Args:
        plan: What runs where.
        told_apart: The target asks for each kind of machine by its name.

    Raises:
        ValueError: The machines hold different devices and are not `told_apart`: a scheduler hands
            out machines in an order of its own, and a plan for unlike machines is right in one
            order only. Or the GPUs of a machine are not its first ones.
    """
    shares = tuple(_share(plan, rank, node) for rank, node in enumerate(node_order(plan)))
    if told_apart:
        return shares
    kinds = [sorted(set(share.devices)) for share in shares]
    for share, kind in zip(shares, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"the plan runs on {', '.join(kinds[0])} on node {shares[0].node} and on "
                f"{', '.join(kind)} on node {share.node}, and a scheduler cannot be told which of "
                "its machines is which; plan for machines of one kind"
            )
    return shares


def _share(plan: OwnPlan, node_rank: int, node: int) -> NodeShare:
    gpus = sorted(rank.gpu for rank in plan.ranks_of_node(node))
    held_bytes = math.ceil(plan.prediction.memory_bytes_per_gpu.high) * len(gpus)
    return share_of(plan.cluster.node(node), node_rank, node, gpus, held_bytes)


def share_of(
    machine: Node,
    node_rank: int,
    node: int,
    gpus: Sequence[int],
    held_bytes: float,
    *,
    any_gpus: bool = False,
) -> NodeShare:
    """Return what a machine must give for ranks on these GPUs.

    Args:
        machine: What it has.
        node_rank: Its number in the launch.
        node: Its number in the cluster.
        gpus: Of its ranks, ascending.
        held_bytes: On all of them together.
        any_gpus: Whether they may be others than its first ones.

    Raises:
        ValueError: They are, and may not.
    """
    kinds = {gpu.index: gpu.device for gpu in machine.gpus}
    devices = tuple(kinds[gpu] for gpu in gpus)
    num_ranks = len(devices)
    if set(devices) != {"cpu"} and not any_gpus and list(gpus) != list(range(num_ranks)):
        raise ValueError(
            f"the plan uses GPUs {', '.join(map(str, gpus))} of node {node}, and a job's GPUs are "
            f"numbered from 0; plan for machines of {num_ranks} GPUs"
        )
    held_bytes = math.ceil(held_bytes)
    if all(device == "cpu" for device in devices):
        # Ranks split the machine's CPUs. There may be fewer CPUs than ranks.
        num_cpus = max(1, machine.num_cpus * num_ranks // len(machine.gpus))
        memory_bytes = held_bytes
    else:
        num_cpus = CPUS_PER_GPU_RANK * num_ranks + CPUS_PER_LAUNCHER
        if machine.num_cpus > 1:  # 1 stands for unknown: no GPU machine has a single CPU
            num_cpus = min(num_cpus, machine.num_cpus)
        memory_bytes = HOST_BYTES_PER_GPU_RANK * num_ranks
    return NodeShare(
        node_rank=node_rank,
        node=node,
        devices=devices,
        is_whole=num_ranks == len(machine.gpus),
        num_cpus=num_cpus,
        memory_bytes=memory_bytes,
        device_bytes=held_bytes,
    )


def start_budget_s(shares: tuple[NodeShare, ...]) -> int:
    """Return the seconds after which a start counts as failed: slow storage, then `START_S`."""
    most_bytes = max(share.device_bytes for share in shares)
    return START_S + math.ceil(most_bytes / SLOWEST_STORAGE_BYTES_PER_S)


def needs_force(shares: tuple[NodeShare, ...]) -> bool:
    """Return whether a launcher will see other GPUs than the plan's machine has.

    A job is given the GPUs that it asks for. Where those are a part of the machine, the launcher's
    check that the machine is the planned one cannot hold.
    """
    return any(share.num_gpus > 0 and not share.is_whole for share in shares)
