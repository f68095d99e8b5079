"""What the links of a cluster are worth: graph, islands, bandwidth and latency of a group.

Pure functions over `Cluster`; the class offers them as `.graph`, `.islands`, `.bandwidth(group)`
and `.latency(group)`. Questions about a group look only at the nodes it touches, so they cost the
same in a cluster of 16,384 GPUs as in one of 16.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rankwright.topology.devices import device_of
from rankwright.topology.link_kinds import is_direct, joins_island, pcie_rate_of

if TYPE_CHECKING:
    import networkx

    from rankwright.topology.cluster import Cluster, Gpu, Link, Node

GpuId = tuple[int, int]  # (node, gpu)
FABRIC = (-1, 0)  # the vertex of the graph that stands for the network between nodes


def bandwidth(cluster: "Cluster", group: Iterable[GpuId]) -> float:
    """Return the bytes/s each way at which a ring over `group` turns (its bus bandwidth).

    Inside a node that is the slowest hop of the best tree of links, or, where NVLink or xGMI alone
    joins the group, what the worst-connected GPU can send to the rest of it. Between nodes each GPU
    owns its share of the node's ports; a group with `g` GPUs on a node enters and leaves it through
    `g` shares. One GPU alone has infinite bandwidth: nothing needs to move.

    >>> from rankwright.topology.shorthand import parse_cluster
    >>> parse_cluster("2x8xh100-sxm+ib400").bandwidth([(0, 0), (1, 0)]) / 1e9
    50.0

    Raises:
        ValueError: The group is empty, names a GPU that is not there, or no link joins it.
    """
    members = by_node(cluster, group)
    rates: list[float] = []
    for index, gpus in members.items():
        node = cluster.node(index)
        rates.append(bandwidth_in_node(node, gpus))
        if len(members) > 1:
            rates.append(sum(port_share_bytes_per_s(cluster, node, gpu) for gpu in gpus))
    return min(rates)


def latency(cluster: "Cluster", group: Iterable[GpuId]) -> float:
    """Return the seconds one hop of a small message takes on the slowest link of `group`.

    A collective of n steps takes n times as long; starting the kernel is not in it. 0 for one GPU.

    Raises:
        ValueError: As `bandwidth`.
    """
    members = by_node(cluster, group)
    hops = [latency_in_node(cluster.node(index), gpus) for index, gpus in members.items()]
    if len(members) > 1:
        assert cluster.fabric is not None
        hops.append(cluster.fabric.latency_s)
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
    are one island. Sets come in order of node and lowest GPU; sizes may differ.
    """
    found: list[tuple[GpuId, ...]] = []
    first = 0
    for node in cluster.nodes:
        sets = islands_of_node(node)
        for index in range(first, first + node.count):
            found.extend(tuple((index, gpu) for gpu in gpus) for gpus in sets)
        first += node.count
    return tuple(found)


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


def graph(cluster: "Cluster") -> "networkx.Graph[GpuId]":
    """Return every GPU and every link, with `bandwidth` (bytes/s each way) and `latency` (s).

    Links inside a node are edges as they stand. GPUs of different nodes meet in the fabric, a node
    named `FABRIC`, so that the graph grows with the GPUs and not with their square; each of
    its edges is one GPU's share of the ports and carries half of the fabric's latency.
    """
    import networkx  # only callers that ask for the graph pay its 0.2 s import

    result: networkx.Graph[GpuId] = networkx.Graph()
    fabric = cluster.fabric
    first = 0
    for node in cluster.nodes:
        shares = {
            gpu.index: port_share_bytes_per_s(cluster, node, gpu.index)
            for gpu in node.gpus
            if fabric is not None
        }
        for index in range(first, first + node.count):
            for gpu in node.gpus:
                result.add_node((index, gpu.index), device=gpu.device)
            for link in node.links:
                result.add_edge(
                    (index, link.a),
                    (index, link.b),
                    bandwidth=link.bytes_per_s,
                    latency=link.latency_s,
                    kind=link.kind,
                )
            if fabric is not None and cluster.num_nodes > 1:
                for gpu_index, share in shares.items():
                    result.add_edge(
                        (index, gpu_index),
                        FABRIC,
                        bandwidth=share,
                        latency=fabric.latency_s / 2,
                        kind=fabric.kind,
                    )
        first += node.count
    return result


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
