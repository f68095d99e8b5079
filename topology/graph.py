"""What the links of a cluster are worth: islands, bandwidth and latency of a group.

Pure functions over `Cluster`; the class offers them as `.islands`, `.bandwidth(group)`
and `.latency(group)`. Questions about a group look only at the nodes it touches, so they cost the
same in a cluster of 16,384 GPUs as in one of 16.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rankwright.topology.devices import device_of
from rankwright.topology.levels import by_rack, crossings, network_latency_s, rack_of
from rankwright.topology.link_kinds import is_direct, joins_island, pcie_rate_of

if TYPE_CHECKING:
    from rankwright.topology.cluster import Cluster, Gpu, Link, Node

GpuId = tuple[int, int]  # (node, gpu)


def bandwidth(cluster: "Cluster", group: Iterable[GpuId]) -> float:
    """Return the bytes/s each way at which a ring over `group` turns (its bus bandwidth).

    Inside a node that is the slowest hop of the best tree of links, or, where NVLink or xGMI alone
    joins the group, what the worst-connected GPU can send to the rest of it. Between nodes each GPU
    owns its share of the node's ports; a group with `g` GPUs on a node enters and leaves it through
    `g` shares, and a part of a level of switches through `g` shares of its way up. Machines of one
    rack meet over NVLink instead. One GPU alone has infinite bandwidth: nothing needs to move.

    >>> from rankwright.topology.shorthand import parse_cluster
    >>> parse_cluster("2x8xh100-sxm+ib400").bandwidth([(0, 0), (1, 0)]) / 1e9
    50.0

    Raises:
        ValueError: The group is empty, names a GPU that is not there, or no link joins it.
    """
    members = by_node(cluster, group)
    rates = [bandwidth_in_node(cluster.node(index), gpus) for index, gpus in members.items()]
    racks = by_rack(cluster, members)
    if cluster.racks is not None and len(racks) < len(members):
        rates.append(cluster.racks.bytes_per_s)
    if len(racks) > 1:
        shares = {
            index: sum(port_share_bytes_per_s(cluster, cluster.node(index), gpu) for gpu in gpus)
            for index, gpus in members.items()
        }
        rates += [sum(shares[index] for index in inside) for inside in racks.values()]
        for crossing in crossings(cluster, members):
            rates += [
                sum(shares[index] for index in part) / crossing.ratio
                for part in crossing.parts.values()
            ]
    return min(rates)


def latency(cluster: "Cluster", group: Iterable[GpuId]) -> float:
    """Return the seconds one hop of a small message takes on the slowest link of `group`.

    A collective of n steps takes n times as long; starting the kernel is not in it. 0 for one GPU.

    Raises:
        ValueError: As `bandwidth`.
    """
    members = by_node(cluster, group)
    hops = [latency_in_node(cluster.node(index), gpus) for index, gpus in members.items()]
    racks = by_rack(cluster, members)
    if cluster.racks is not None and len(racks) < len(members):
        hops.append(cluster.racks.latency_s)
    if len(racks) > 1:
        hops.append(network_latency_s(cluster, members))
    return max(hops)


def port_share_bytes_per_s(cluster: "Cluster", node: "Node", gpu: int) -> float:
    """Return the bytes/s each way that one GPU has of its node's ports, at most its PCIe rate.

    Every GPU of the node is taken to be busy on the network at once, as the replicas, stages or
    shards of one plan are.
    """
    fabric = cluster.fabric
    if fabric is None:
        raise ValueError("the cluster has no fabric between its nodes")
    rate = fabric.measured_bytes_per_s or fabric.bytes_per_s
    share = rate * fabric.ports_per_node / len(node.gpus)
    return min(share, pcie_rate_of(_gpu(node, gpu)))


def islands(cluster: "Cluster") -> tuple[tuple[GpuId, ...], ...]:
    """Return the maximal sets of GPUs joined by NVLink, xGMI or NVSwitch, or by one PCIe switch.

    A GPU that has neither is an island of its own. CPU ranks of one machine share its memory and
    are one island; so are GPUs of one rack's machines that have NVLink. Sets come in order of node
    and lowest GPU; sizes may differ.
    """
    found: list[tuple[GpuId, ...]] = []
    joined: dict[int, list[GpuId]] = {}
    first = 0
    for node in cluster.nodes:
        sets = islands_of_node(node)
        for index in range(first, first + node.count):
            for gpus in sets:
                island = tuple((index, gpu) for gpu in gpus)
                if cluster.racks is None or not _has_direct(node, gpus):
                    found.append(island)
                else:
                    joined.setdefault(rack_of(cluster, index), []).extend(island)
        first += node.count
    return tuple(sorted([*found, *map(tuple, joined.values())]))


def _has_direct(node: "Node", gpus: Sequence[int]) -> bool:
    """Return whether these GPUs of a machine meet over NVLink; one alone is taken to have it."""
    links = [link for link in node.links if link.a in gpus and link.b in gpus]
    return all(is_direct(link.kind) for link in links)


def islands_of_node(node: "Node") -> tuple[tuple[int, ...], ...]:
    """Return the islands of one machine as tuples of GPU indices."""
    direct = _components(
        [gpu.index for gpu in node.gpus], [link for link in node.links if is_direct(link.kind)]
    )
    alone = [gpus[0] for gpus in direct if len(gpus) == 1]
    switched = [
        link
        for link in node.links
        if joins_island(link.kind) and link.a in alone and link.b in alone
    ]
    joined = [gpus for gpus in direct if len(gpus) > 1]
    return tuple(sorted([*joined, *_components(alone, switched)]))


def by_node(cluster: "Cluster", group: Iterable[GpuId]) -> dict[int, list[int]]:
    """Return the GPUs of `group` on each node, without repeats.

    Raises:
        ValueError: The group is empty or names a GPU that is not there.
    """
    members: dict[int, list[int]] = {}
    nodes: dict[int, Node] = {}  # finding one takes a walk over all nodes
    for index, gpu in dict.fromkeys(group):
        if index not in nodes:
            if not 0 <= index < cluster.num_nodes:
                raise ValueError(
                    f"GPU ({index}, {gpu}) is not there: the cluster has nodes 0 to "
                    f"{cluster.num_nodes - 1}"
                )
            nodes[index] = cluster.node(index)
        _gpu(nodes[index], gpu)
        members.setdefault(index, []).append(gpu)
    if not members:
        raise ValueError("a group needs at least one GPU")
    return members


def _gpu(node: "Node", index: int) -> "Gpu":
    for gpu in node.gpus:
        if gpu.index == index:
            return gpu
    raise ValueError(
        f"node {node.name!r} has no GPU {index}; it has {sorted(gpu.index for gpu in node.gpus)}"
    )


def bandwidth_in_node(node: "Node", gpus: Sequence[int]) -> float:
    """Return what `bandwidth` does for GPUs of one machine."""
    if len(gpus) == 1:
        return math.inf
    chosen = set(gpus)
    links = [link for link in node.links if link.a in chosen and link.b in chosen]
    slowest = min(link.bytes_per_s for link in _best_tree(node, chosen, links))
    direct = [link for link in links if is_direct(link.kind)]
    if len(_components(list(chosen), direct)) > 1:
        return slowest
    # The larger of the two, so that a fast PCIe path is never lost to a thin NVLink and taking a
    # link away never raises the result.
    return max(slowest, min(_egress(_gpu(node, gpu), direct) for gpu in chosen))


def _egress(gpu: "Gpu", direct: Sequence["Link"]) -> float:
    """What a GPU can send over its direct links at once.

    Dedicated links add up (a mesh, a cube); behind NVSwitch every pair shows the rate of the whole
    port, so the sum stops at what the device has.
    """
    rates = [link.bytes_per_s for link in direct if gpu.index in (link.a, link.b)]
    device = device_of(gpu)
    port = device.scale_up_bytes_per_s if device is not None else 0.0
    return min(sum(rates), max(port, *rates))


def latency_in_node(node: "Node", gpus: Sequence[int]) -> float:
    """Return what `latency` does for GPUs of one machine."""
    if len(gpus) == 1:
        return 0.0
    chosen = set(gpus)
    links = [link for link in node.links if link.a in chosen and link.b in chosen]
    return max(link.latency_s for link in _best_tree(node, chosen, links))


def _best_tree(node: "Node", gpus: set[int], links: Sequence["Link"]) -> list["Link"]:
    """Return the spanning tree of fastest links (Kruskal); its slowest is the bottleneck."""
    parent = {gpu: gpu for gpu in gpus}
    tree: list[Link] = []
    for link in sorted(links, key=lambda link: (-link.bytes_per_s, link.latency_s)):
        a, b = _root(parent, link.a), _root(parent, link.b)
        if a != b:
            parent[a] = b
            tree.append(link)
    if len(tree) < len(gpus) - 1:
        raise ValueError(f"node {node.name!r}: no link joins all of GPUs {sorted(gpus)}")
    return tree


def _components(gpus: Sequence[int], links: Sequence["Link"]) -> list[tuple[int, ...]]:
    parent = {gpu: gpu for gpu in gpus}
    for link in links:
        parent[_root(parent, link.a)] = _root(parent, link.b)
    found: dict[int, list[int]] = {}
    for gpu in gpus:
        found.setdefault(_root(parent, gpu), []).append(gpu)
    return sorted(tuple(sorted(members)) for members in found.values())


def _root(parent: dict[int, int], gpu: int) -> int:
    while parent[gpu] != gpu:
        gpu = parent[gpu]
    return gpu
