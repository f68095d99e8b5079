"""Settings of the communication libraries that follow from where the ranks are.

Only what the libraries cannot find out themselves, or get wrong when left alone; each with the
fact of this cluster that it follows from. A setting without such a fact is not made.

Never made: `NCCL_P2P_LEVEL`, `NCCL_ALGO`, `NCCL_PROTO` and their like. NCCL asks the driver which
GPUs reach each other (src/graph/paths.cc, `ncclTopoCheckP2p`), and its guide keeps these for
debugging: left in scripts, they lead to "sub-optimal behavior, crashes, or hangs"
(docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html). Who needs one sets it; ours leave it.
"""

import re

from rankwright.planner.plan import EnvironmentVariable, RankPlan
from rankwright.topology.cluster import Cluster, Fabric, Nic, Node

# Ports slower than this part of the fabric's carry storage or management; rates that a driver
# reports are within some percent of the nominal.
_SAME_RATE_SHARE = 0.9


def find_environment(
    cluster: Cluster, ranks: tuple[RankPlan, ...]
) -> tuple[EnvironmentVariable, ...]:
    """Return the settings for the ranks of a plan, each with its reason."""
    used = sorted({rank.node for rank in ranks})
    nodes = [cluster.node(index) for index in used]
    settings: list[EnvironmentVariable] = []
    if all(gpu.device == "cpu" for node in nodes for gpu in node.gpus):
        per_node = max(sum(rank.node == index for rank in ranks) for index in used[:1])
        threads = max(1, nodes[0].num_cpus // per_node)
        settings.append(
            EnvironmentVariable(
                name="OMP_NUM_THREADS",
                value=str(threads),
                reason=f"{per_node} ranks share {nodes[0].num_cpus} cores; torch would take all "
                "of them for each rank",
            )
        )
        if len(used) == 1:
            settings.append(
                EnvironmentVariable(
                    name="GLOO_SOCKET_IFNAME",
                    value="lo",
                    reason="all ranks are on one machine; gloo would look up the host name, which "
                    "need not resolve",
                )
            )
        return tuple(settings)
    if len(used) > 1 and cluster.fabric is not None:
        settings += _fabric_settings(cluster, used)
    return tuple(settings)


def _fabric_settings(cluster: Cluster, used: list[int]) -> list[EnvironmentVariable]:
    fabric = cluster.fabric
    assert fabric is not None
    nodes = [cluster.node(index) for index in used]
    settings: list[EnvironmentVariable] = []
    if fabric.kind == "ethernet":
        settings.append(
            EnvironmentVariable(
                name="NCCL_IB_DISABLE",
                value="1",
                reason="the nodes are joined by Ethernet without RDMA; NCCL would try the verbs "
                "devices that it finds first",
            )
        )
    else:
        settings += _rdma_ports(nodes, fabric)
    settings += _interfaces(nodes, fabric)
    if fabric.separate_rails and fabric.ports_per_node > 1:
        settings.append(
            EnvironmentVariable(
                name="NCCL_CROSS_NIC",
                value="0",
                reason=f"the {fabric.ports_per_node} ports of a node lead to rails of their own, "
                "which are slow to reach from each other; NCCL would cross them where it can",
            )
        )
    if fabric.sharp and fabric.kind == "infiniband":
        settings.append(
            EnvironmentVariable(
                name="NCCL_COLLNET_ENABLE",
                value="1",
                reason="the switches of the fabric sum for the GPUs (SHARP); NCCL does not ask "
                "them to unless told",
            )
        )
    return settings


def _rdma_ports(nodes: list[Node], fabric: Fabric) -> list[EnvironmentVariable]:
    """Return the list of ports, where a node has others too that do not carry the fabric.

    Storage and management ports are slower; NCCL would spread its rings over them.
    """
    carry = [
        {nic.name for nic in node.nics if nic.rdma and _carries(nic, fabric)} for node in nodes
    ]
    named = {name for mine in carry for name in mine}
    others = {
        nic.name
        for node, mine in zip(nodes, carry, strict=True)
        for nic in node.nics
        if nic.rdma and nic.name not in mine
    }
    # One list is for all nodes: a name that carries the fabric on one and storage on another can
    # be neither in it nor out of it.
    if not all(carry) or not others or named & others:
        return []
    return [
        EnvironmentVariable(
            name="NCCL_IB_HCA",
            value="=" + ",".join(sorted(named, key=_natural)),
            reason=f"{len(named)} ports of {fabric.bytes_per_s * 8 / 1e9:.0f} Gb/s carry the "
            f"fabric; {', '.join(sorted(others, key=_natural))} do not",
        )
    ]


def _interfaces(nodes: list[Node], fabric: Fabric) -> list[EnvironmentVariable]:
    """Return the interface to meet over, where each node has just one that it can be.

    With several, only the routes could tell, and a wrong name keeps ranks from meeting at all.
    """
    names: set[str] = set()
    for node in nodes:
        plain = [nic for nic in node.nics if not nic.rdma]
        if fabric.kind == "ethernet":
            plain = [nic for nic in plain if _carries(nic, fabric)]
        if len(plain) != 1:
            return []
        names.add(plain[0].name)
    if any(len(names & {nic.name for nic in node.nics}) > 1 for node in nodes):
        return []
    what = "the only network interface of each node" + (
        " that carries the fabric" if fabric.kind == "ethernet" else ""
    )
    settings = [
        EnvironmentVariable(
            name="NCCL_SOCKET_IFNAME",
            value="=" + ",".join(sorted(names, key=_natural)),
            reason=f"{what}; NCCL would also try bridges of containers and virtual machines",
        )
    ]
    if len(names) == 1:  # gloo gives up on a name that a node does not have
        settings.append(
            EnvironmentVariable(
                name="GLOO_SOCKET_IFNAME",
                value=names.pop(),
                reason=f"{what}; gloo would look up the host name, which often leads to 127.0.1.1",
            )
        )
    return settings


def _carries(nic: Nic, fabric: Fabric) -> bool:
    return nic.bytes_per_s >= _SAME_RATE_SHARE * fabric.bytes_per_s


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `mlx5_10` behind `mlx5_9`."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
