"""Which machines are neighbours: racks that NVLink joins, and the levels of the network above.

Machines are numbered so that neighbours follow each other, which is how a scheduler with a topology
file lists them: the first `nodes` machines are the first rack, leaf or pod, and so on. The last
group of a level may be smaller.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwright.topology.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Crossing:
    """A level of the network that a group of machines does not keep within one part of.

    Args:
        ratio: Bytes/s of all ports below a part over bytes/s of its way up, the levels below
            included.
        parts: The machines of the group, by the part that they are in.
    """

    ratio: float
    parts: Mapping[int, Sequence[int]]


def rack_of(cluster: "Cluster", node: int) -> int:
    """Return the number of the rack of machine `node`; without racks each machine is its own."""
    return node if cluster.racks is None else node // cluster.racks.nodes


def by_rack(cluster: "Cluster", nodes: Collection[int]) -> dict[int, list[int]]:
    """Return the machines of each rack."""
    return _by_part(nodes, 1 if cluster.racks is None else cluster.racks.nodes)


def crossings(cluster: "Cluster", nodes: Collection[int]) -> list[Crossing]:
    """Return the levels of the network over whose top messages between `nodes` must go."""
    found: list[Crossing] = []
    if cluster.fabric is None:
        return found
    ratio = 1.0
    for level in cluster.fabric.levels:
        ratio *= level.oversubscription
        parts = _by_part(nodes, level.nodes)
        if len(parts) < 2:
            break
        found.append(Crossing(ratio, parts))
    return found


def network_latency_s(cluster: "Cluster", nodes: Collection[int]) -> float:
    """Return the seconds of a small message between the two of `nodes` that are furthest apart."""
    assert cluster.fabric is not None, "machines that are not one rack have a fabric"
    crossed = len(crossings(cluster, nodes))
    return cluster.fabric.latency_s + sum(
        level.latency_s for level in cluster.fabric.levels[:crossed]
    )


def block_sizes(cluster: "Cluster") -> list[int]:
    """Return the machines of a rack, and of a part of each level, smallest first."""
    sizes = [] if cluster.racks is None else [cluster.racks.nodes]
    if cluster.fabric is not None:
        sizes += [level.nodes for level in cluster.fabric.levels]
    return sorted({size for size in sizes if size > 1})


def cut_runs(cluster: "Cluster", runs: Sequence[range], size: int) -> list[list[range]]:
    """Return the machines of `runs` for groups of `size`, which lie one after another in each list.

    The first list has the groups that keep within the smallest parts that hold one; each further
    one joins what the parts before left over. Machines left over at the end are in none.

    >>> from rankwright.topology.shorthand import parse_cluster
    >>> cut_runs(parse_cluster("10x8xh100-sxm+ib400@5"), [range(10)], 2)
    [[range(0, 4), range(5, 9)], [range(4, 5), range(9, 10)]]
    """
    left = [node for run in runs for node in run]
    found: list[list[range]] = []
    for block in (*block_sizes(cluster), cluster.num_nodes):
        if block < size:
            continue
        taken: list[int] = []
        rest: list[int] = []
        for part in _by_part(left, block).values():
            whole = len(part) // size * size
            taken += part[:whole]
            rest += part[whole:]
        if taken:
            found.append(_ranges(taken))
        left = rest
    return found


def distance(sizes: Sequence[int], a: int, b: int) -> int:
    """Return over how many of the parts of `sizes`, as `block_sizes` gives them, a message goes."""
    return sum(a // size != b // size for size in sizes)


def _ranges(nodes: Sequence[int]) -> list[range]:
    """Return ascending numbers as runs."""
    found: list[range] = []
    for node in nodes:
        if found and found[-1].stop == node:
            found[-1] = range(found[-1].start, node + 1)
        else:
            found.append(range(node, node + 1))
    return found


def _by_part(nodes: Collection[int], size: int) -> dict[int, list[int]]:
    parts: dict[int, list[int]] = {}
    for node in nodes:
        parts.setdefault(node // size, []).append(node)
    return parts
