"""Settings of the communication libraries that follow from where the ranks are.

Only what the libraries cannot find out themselves, or get wrong when left alone; each with the
fact of this cluster that it follows from. A setting without such a fact is not made.
"""

from rankwright.planner.plan import EnvironmentVariable, RankPlan
from rankwright.topology.cluster import Cluster


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
    if fabric.kind == "ethernet":
        return [
            EnvironmentVariable(
                name="NCCL_IB_DISABLE",
                value="1",
                reason="the nodes are joined by Ethernet without RDMA; NCCL would try the verbs "
                "devices that it finds first",
            )
        ]
    # Probed nodes name their ports. Storage and management ports of other rates are left out, or
    # NCCL would spread its rings over them.
    names = [
        {
            nic.name
            for nic in cluster.node(index).nics
            if nic.rdma and nic.bytes_per_s >= 0.9 * fabric.bytes_per_s
        }
        for index in used
    ]
    common = names[0].intersection(*names[1:])
    others = {
        nic.name for index in used for nic in cluster.node(index).nics if nic.name not in common
    }
    if not common or not others:
        return []
    listed = ",".join(sorted(common))
    return [
        EnvironmentVariable(
            name="NCCL_IB_HCA",
            value=f"={listed}",
            reason=f"{len(common)} ports of {fabric.bytes_per_s * 8 / 1e9:.0f} Gb/s carry the "
            f"fabric; {', '.join(sorted(others))} do not",
        )
    ]
