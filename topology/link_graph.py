"""`Cluster.graph`: every GPU and every link, as a networkx graph to draw or to search."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from rankwright.topology.graph import GpuId, port_share_bytes_per_s
from rankwright.topology.levels import rack_of

if TYPE_CHECKING:
    import networkx

    from rankwright.topology.cluster import Cluster

FABRIC = (-1, 0)  # the vertex of the graph that stands for the network between nodes
RACK = -2  # first half of the vertices that stand for the NVLink switches of racks
LEVEL = -3  # of those that stand for leaf switches; each level above has one less


def graph(cluster: "Cluster") -> "networkx.Graph[GpuId]":
    """Return every GPU and every link, with `bandwidth` (bytes/s each way) and `latency` (s).

    Links inside a node are edges as they stand. GPUs of different nodes meet in the fabric, a node
    named `FABRIC`, so that the graph grows with the GPUs and not with their square; each of
    its edges is one GPU's share of the ports and carries half of the fabric's latency. Levels of
    switches and the NVLink switches of racks are nodes too: see `edges_above`.
    """
    import networkx  # only callers that ask for the graph pay its 0.2 s import

    result: networkx.Graph[GpuId] = networkx.Graph()
    first = 0
    for node in cluster.nodes:
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
        first += node.count
    if cluster.num_nodes > 1:
        for edge in edges_above(cluster):
            result.add_edge(
                edge.below,
                edge.above,
                bandwidth=edge.bytes_per_s,
                latency=edge.latency_s,
                kind=edge.kind,
            )
    return result


@dataclass(frozen=True, slots=True)
class EdgeAbove:
    """A link of the graph that leads out of a machine, or further up."""

    below: GpuId
    above: GpuId
    bytes_per_s: float
    latency_s: float
    kind: str


def edges_above(cluster: "Cluster") -> Iterator[EdgeAbove]:
    """Yield the links from GPUs to the fabric, by way of its levels, and to their rack's switches.

    The switches of level `i` (0: leaves) are `(LEVEL - i, part)`, those of rack `r` `(RACK, r)`. A
    rack's links carry half of its latency each, a level's half of what going over its top adds.
    """
    fabric, racks = cluster.fabric, cluster.racks
    levels = fabric.levels if fabric is not None else ()
    ways_up: list[dict[int, float]] = [{} for _ in levels]
    first = 0
    for node in cluster.nodes:
        shares = {
            gpu.index: port_share_bytes_per_s(cluster, node, gpu.index)
            for gpu in node.gpus
            if fabric is not None
        }
        for index, (gpu, share) in product(range(first, first + node.count), shares.items()):
            assert fabric is not None
            above = (LEVEL, index // levels[0].nodes) if levels else FABRIC
            yield EdgeAbove((index, gpu), above, share, fabric.latency_s / 2, fabric.kind)
            for way_up, level in zip(ways_up, levels, strict=True):
                part = index // level.nodes
                way_up[part] = way_up.get(part, 0.0) + share
        if racks is not None:
            for index, one in product(range(first, first + node.count), node.gpus):
                switches = (RACK, rack_of(cluster, index))
                half_s = racks.latency_s / 2
                yield EdgeAbove((index, one.index), switches, racks.bytes_per_s, half_s, racks.kind)
        first += node.count
    ratio = 1.0
    for number, (level, way_up) in enumerate(zip(levels, ways_up, strict=True)):
        assert fabric is not None
        ratio *= level.oversubscription
        for part, rate in way_up.items():
            top = number == len(levels) - 1
            above = (
                FABRIC
                if top
                else (LEVEL - number - 1, part * level.nodes // levels[number + 1].nodes)
            )
            below = (LEVEL - number, part)
            yield EdgeAbove(below, above, rate / ratio, level.latency_s / 2, fabric.kind)
