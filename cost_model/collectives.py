"""Seconds of collectives over the links of the group that runs them.

Alpha-beta models: a latency for every step of an algorithm, and bytes over the bandwidth that a
kernel reaches of a link. As the libraries do at run time, the cheapest algorithm for a size is
taken. Sizes are of the whole buffer on each rank (all-reduce, all-to-all) or of the gathered result
(all-gather, reduce-scatter).
"""

from dataclasses import dataclass, replace
from math import ceil, log2

from rankwright.cost_model.efficiency import AllReduce
from rankwright.cost_model.peer_sums import SumAlgorithm
from rankwright.topology.cluster import Cluster
from rankwright.topology.graph import port_share_bytes_per_s
from rankwright.topology.levels import by_rack, crossings, network_latency_s

Place = tuple[int, int]  # node, gpu

# NCCL on H100, H200 and A100 with NVLink, fitted to nccl-tests (aiconfigurator's tables of NCCL
# 2.23 to 2.29: all-reduce of 2 KiB on 2, 4 and 8 H100: 6.3, 9.6 and 15.7 us) and to our own runs on
# two H200 inside a CUDA graph (11.3 us up to 64 KiB, 36 us at 4 MiB, 894 us at 256 MiB): 9.7 us in
# a graph, and a hop of the ring for each step (0.8 us, in the topology).
_RING_BASE_S = 9.7e-6
# Its low-latency protocol moves at most 160 GB/s (1 MiB to 4 MiB on two H100); the bulk protocol
# reaches 0.68-0.76 of the link and starts 25 us later (16 MiB and more).
_LOW_LATENCY_BYTES_PER_S = 160e9
_BULK_START_S = 25e-6
_LINK_SHARE = 0.70
# One-shot and two-shot kernels over peer memory, as in vLLM 0.24 on 2, 4 and 8 H100: 4.2, 4.6 and
# 4.7 us at 2 KiB, 8.3 us for 1 MiB on two, 15 us for 1 MiB on eight.
_ONE_SHOT_BASE_S = 4.2e-6
_TWO_SHOT_BASE_S = 8.0e-6
_PEER_SHARE = 0.62
# Between nodes: 64 MiB between two DGX H100 takes 1.87 ms over one 400 Gb/s port (36 of 50 GB/s).
_NETWORK_SHARE = 0.72
# A send and its receive in a CUDA graph, before the hop: 2 KiB takes 5 us inside a DGX H100.
_SEND_BASE_S = 4.2e-6


@dataclass(frozen=True, slots=True)
class WayUp:
    """A level of switches over whose top messages of a group go.

    Args:
        num_nodes: Machines (or racks) of the group in the part that has fewest of them.
        num_ranks: Its ranks in the part that has fewest of them.
        bytes_per_s: A GPU's share of a part's way up, each way, when all below it send at once.
    """

    num_nodes: int
    num_ranks: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that run a collective, and the links between them.

    Args:
        size: Ranks.
        num_nodes: Machines that they are on; a rack that NVLink joins counts as one.
        bytes_per_s: Of the slowest link inside a machine, each way, a GPU.
        latency_s: Of that link.
        network_bytes_per_s: Of the fabric's ports, each way, a GPU.
        network_latency_s: Of the fabric, between the two that are furthest apart.
        ways_up: The levels of the fabric's switches that the group does not keep within.
        one_machine: Whether the ranks can map each other's memory.
    """

    size: int
    num_nodes: int = 1
    bytes_per_s: float = float("inf")
    latency_s: float = 0.0
    network_bytes_per_s: float = float("inf")
    network_latency_s: float = 0.0
    ways_up: tuple[WayUp, ...] = ()
    one_machine: bool = True

    @property
    def local_size(self) -> int:
        """Ranks on the fullest machine."""
        return ceil(self.size / self.num_nodes)

    @property
    def ring_bytes_per_s(self) -> float:
        """Bytes/s of the fabric that a GPU has in rings and trees over machines, each way.

        They pass from neighbour to neighbour and leave a part of a level once, with the way up of
        all the machines that they have there.
        """
        rates = [way_up.num_nodes * way_up.bytes_per_s for way_up in self.ways_up]
        return min(self.network_bytes_per_s, *rates) if rates else self.network_bytes_per_s


def find_group(cluster: Cluster, places: tuple[Place, ...]) -> Group:
    """Return the links between `places`.

    The fabric's ports of a node are shared by all of its GPUs, since every one of them belongs to
    some group that talks at the same time; a GPU gets one port at most.
    """
    nodes: dict[int, list[Place]] = {}
    for place in places:
        nodes.setdefault(place[0], []).append(place)
    racks = [
        [place for node in rack for place in nodes[node]]
        for rack in by_rack(cluster, nodes).values()
    ]
    local = [members for members in racks if len(members) > 1]
    bandwidth = min((cluster.bandwidth(members) for members in local), default=float("inf"))
    latency = max((cluster.latency(members) for members in local), default=0.0)
    inside = Group(len(places), len(racks), bandwidth, latency, one_machine=len(nodes) == 1)
    if len(racks) == 1:
        return inside
    assert cluster.fabric is not None, "a cluster of several nodes has a fabric"
    share = min(port_share_bytes_per_s(cluster, cluster.node(node), gpu) for node, gpu in places)
    ways_up = tuple(
        WayUp(
            min(len(by_rack(cluster, part)) for part in crossing.parts.values()),
            min(sum(len(nodes[node]) for node in part) for part in crossing.parts.values()),
            share / crossing.ratio,
        )
        for crossing in crossings(cluster, nodes)
    )
    return replace(
        inside,
        network_bytes_per_s=share,
        network_latency_s=network_latency_s(cluster, nodes),
        ways_up=ways_up,
    )


def all_reduce_s(
    size_bytes: float,
    group: Group,
    algorithms: tuple[AllReduce, ...] = ("library",),
    one_shot_bytes: float = 0.0,
) -> float:
    """Return the seconds of the fastest all-reduce that `algorithms` allow.

    Up to `one_shot_bytes` it is one-shot, where allowed, even if another were faster: that is how
    some engines choose.

    >>> h200 = Group(2, bytes_per_s=450e9, latency_s=0.8e-6)
    >>> round(all_reduce_s(64 * 1024, h200) * 1e6, 1)
    11.7
    """
    if group.size == 1:
        return 0.0
    if group.num_nodes > 1:
        return _all_reduce_over_nodes_s(size_bytes, group)
    times = [_ring_s(2, size_bytes, group)]
    if "one_shot" in algorithms and group.one_machine:
        one_shot_s = peer_sum_s("one_shot", size_bytes, group)
        if size_bytes <= one_shot_bytes:
            return one_shot_s
        times += [one_shot_s, peer_sum_s("two_shot", size_bytes, group)]
    return min(times)


def peer_sum_s(algorithm: SumAlgorithm, size_bytes: float, group: Group) -> float:
    """Return the seconds of an all-reduce on one machine by the given algorithm.

    >>> h200 = Group(2, bytes_per_s=450e9, latency_s=0.8e-6)
    >>> round(peer_sum_s("one_shot", 64 * 1024, h200) * 1e6, 1)
    6.0
    """
    if algorithm == "library":
        return _ring_s(2, size_bytes, group)
    rate = group.bytes_per_s * _PEER_SHARE
    others = group.size - 1
    if algorithm == "one_shot":
        return _ONE_SHOT_BASE_S + others * size_bytes / rate + 2 * group.latency_s
    wire = 2 * others / group.size * size_bytes
    return _TWO_SHOT_BASE_S + wire / rate + 4 * group.latency_s


def all_gather_s(size_bytes: float, group: Group) -> float:
    """Return the seconds to give every rank all of `size_bytes`, of which each holds a part."""
    if group.size == 1:
        return 0.0
    if group.num_nodes == 1:
        return _ring_s(1, size_bytes, group)
    local = Group(group.local_size, 1, group.bytes_per_s, group.latency_s)
    between = _network_s(1, size_bytes / group.local_size, group)
    return between + all_gather_s(size_bytes, local)


def reduce_scatter_s(size_bytes: float, group: Group) -> float:
    """Return the seconds to sum `size_bytes` and leave a part on each rank.

    The mirror image of an all-gather, and measured alike (NCCL 2.29, 8 H100: 14.6 and 17.1 us at
    1 MiB, 722 and 729 us at 256 MiB).
    """
    return all_gather_s(size_bytes, group)


def all_to_all_s(size_bytes: float, group: Group) -> float:
    """Return the seconds in which each rank sends `size_bytes` in all, a part to every other."""
    if group.size == 1:
        return 0.0
    away = size_bytes * (group.size - group.local_size) / group.size
    near = size_bytes * (group.local_size - 1) / group.size
    seconds = _RING_BASE_S + near / (group.bytes_per_s * _LINK_SHARE)
    if group.num_nodes > 1:
        # At once out of each machine, and over each level's way up what goes there.
        sent_s = [away / group.network_bytes_per_s]
        sent_s += [
            size_bytes * (group.size - way_up.num_ranks) / group.size / way_up.bytes_per_s
            for way_up in group.ways_up
        ]
        seconds += group.network_latency_s + max(sent_s) / _NETWORK_SHARE
    return seconds


def send_s(size_bytes: float, group: Group) -> float:
    """Return the seconds of one message between the two ranks of `group`."""
    if group.num_nodes > 1:
        rate = group.ring_bytes_per_s * _NETWORK_SHARE
        return _SEND_BASE_S + group.network_latency_s + size_bytes / rate
    return _SEND_BASE_S + group.latency_s + size_bytes / (group.bytes_per_s * _LINK_SHARE)


def _ring_s(passes: int, size_bytes: float, group: Group) -> float:
    """Return the seconds of a ring that goes round `passes` times, by the faster protocol."""
    hops = passes * (group.size - 1)
    start_s = _RING_BASE_S + hops * group.latency_s
    wire = passes * (group.size - 1) / group.size * size_bytes
    bulk = group.bytes_per_s * _LINK_SHARE
    low_latency = min(bulk, _LOW_LATENCY_BYTES_PER_S)
    return min(start_s + wire / low_latency, start_s + _BULK_START_S + wire / bulk)


def _network_s(passes: int, size_bytes: float, group: Group) -> float:
    """Return the seconds to combine `size_bytes` a GPU over nodes: by ring or by tree."""
    nodes = group.num_nodes
    hop_s = group.network_latency_s
    rate = group.ring_bytes_per_s * _NETWORK_SHARE
    ring = passes * (nodes - 1) * hop_s + passes * (nodes - 1) / nodes * size_bytes / rate
    tree = passes * ceil(log2(nodes)) * hop_s + passes * size_bytes / rate
    return min(ring, tree)


def _all_reduce_over_nodes_s(size_bytes: float, group: Group) -> float:
    """Return the seconds of a hierarchical all-reduce.

    Reduce-scatter inside each node, all-reduce of each GPU's part over the nodes, all-gather inside
    each node; with one GPU a node only the middle is left.
    """
    local = Group(group.local_size, 1, group.bytes_per_s, group.latency_s)
    between = _RING_BASE_S + _network_s(2, size_bytes / group.local_size, group)
    if group.local_size == 1:
        return between
    # One kernel does all three, so that a collective's start is paid once.
    return between + _ring_s(2, size_bytes, local) - _RING_BASE_S
