"""The best ring and the best tree through a group of GPUs.

`topology/graph.py` says what a collective over a group reaches; this says over which hops. A hop
inside a machine is one link; a hop between machines goes from a GPU's share of its machine's ports
to another's. Libraries run several rings at once over NVSwitch or over several ports: the rate here
is that of a single one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from rankwright.topology.graph import GpuId, by_node, port_share_bytes_per_s

if TYPE_CHECKING:
    from rankwright.topology.cluster import Cluster

# Rings through so many GPUs are found exactly: 2**9 sets of 81 pairs take 40 ms in Python, two more
# GPUs five times as long. No machine that is not symmetric has more.
EXACT_GPUS = 10


@dataclass(frozen=True, slots=True)
class Ring:
    """GPUs in the order in which data goes round; the last one sends to the first.

    Args:
        order: From the lowest `(node, gpu)` towards the lower of its neighbours.
        bytes_per_s: Each way, of the slowest hop: the rate at which the ring turns.
        total_bytes_per_s: Of all hops together.
        latency_s: Of a small message that goes round once.
        exact: No ring is better; otherwise the heuristic found none.
    """

    order: tuple[GpuId, ...]
    bytes_per_s: float
    total_bytes_per_s: float
    latency_s: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Tree:
    """Hops that join a group without a circle, fastest first; the fields are those of `Ring`."""

    hops: tuple[tuple[GpuId, GpuId], ...]
    bytes_per_s: float
    total_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Hop:
    """What a message meets between two GPUs of a group."""

    bytes_per_s: float
    latency_s: float

    @property
    def order(self) -> tuple[float, float]:
        """Sorts hops, best first."""
        return -self.bytes_per_s, self.latency_s


# (place in the sorted group, place in it), smaller first
Hops = Mapping[tuple[int, int], Hop]

_NO_HOP = Hop(0.0, 1.0)


def best_ring(cluster: "Cluster", group: Iterable[GpuId]) -> Ring:
    """Return the ring through `group` with the fastest slowest hop.

    Among those, the one with the most bandwidth in all, then with the lowest latency. Exact for up
    to `EXACT_GPUS` GPUs and wherever all hops are alike (any NVSwitch machine). Beyond, hops are
    taken from the fastest to the slowest as long as they make no branch, and pairs of hops are
    exchanged until no exchange helps.

    >>> from rankwright.topology.shorthand import parse_cluster
    >>> ring = best_ring(parse_cluster("8xv100-sxm2"), [(0, gpu) for gpu in range(8)])
    >>> [gpu for _, gpu in ring.order], ring.bytes_per_s / 1e9
    ([0, 3, 2, 1, 5, 6, 7, 4], 50.0)

    Raises:
        ValueError: The group has fewer than two GPUs or names one that is not there, or no ring
            joins it.
    """
    gpus, hops = find_hops(cluster, group)
    exact = True
    if len(set(hops.values())) == 1 and len(hops) == len(gpus) * (len(gpus) - 1) // 2:
        order: Sequence[int] | None = range(len(gpus))
    elif len(gpus) <= EXACT_GPUS:
        order = _exact_ring(len(gpus), hops)
    else:
        order, exact = _exchange(_join_fastest(len(gpus), hops), hops), False
    if order is None or any(_hop(hops, *pair) is _NO_HOP for pair in _pairs(order)):
        found = "joins" if exact else "was found that joins"
        raise ValueError(f"no ring of links {found} all of GPUs {gpus}")
    if len(order) > 2 and order[-1] < order[1]:
        order = [order[0], *reversed(order[1:])]
    used = [_hop(hops, *pair) for pair in _pairs(order)]
    return Ring(
        order=tuple(gpus[place] for place in order),
        bytes_per_s=min(hop.bytes_per_s for hop in used),
        total_bytes_per_s=sum(hop.bytes_per_s for hop in used),
        latency_s=sum(hop.latency_s for hop in used),
        exact=exact,
    )


def best_tree(cluster: "Cluster", group: Iterable[GpuId]) -> Tree:
    """Return the tree over `group` with the fastest slowest hop.

    It also has the most bandwidth in all and, among those, the lowest latency of its hops together:
    Kruskal's algorithm gives all three.

    Raises:
        ValueError: The group has fewer than two GPUs or names one that is not there, or nothing
            joins it.
    """
    gpus, hops = find_hops(cluster, group)
    ends = list(range(len(gpus)))
    used: list[tuple[int, int]] = []
    for a, b in sorted(hops, key=lambda pair: (hops[pair].order, pair)):
        if ends[a] != ends[b]:
            used.append((a, b))
            ends = [ends[b] if end == ends[a] else end for end in ends]
    if len(used) < len(gpus) - 1:
        raise ValueError(f"no links join all of GPUs {gpus}")
    return Tree(
        hops=tuple((gpus[a], gpus[b]) for a, b in used),
        bytes_per_s=min(hops[pair].bytes_per_s for pair in used),
        total_bytes_per_s=sum(hops[pair].bytes_per_s for pair in used),
        latency_s=sum(hops[pair].latency_s for pair in used),
    )


def find_hops(cluster: "Cluster", group: Iterable[GpuId]) -> tuple[list[GpuId], Hops]:
    """Return the GPUs of `group`, sorted, and the hop of each pair of places that has one.

    Raises:
        ValueError: The group has fewer than two GPUs or names one that is not there.
    """
    members = by_node(cluster, group)
    gpus = sorted((node, gpu) for node, inside in members.items() for gpu in inside)
    if len(gpus) < 2:
        raise ValueError(f"a ring needs at least two GPUs; the group has {gpus}")
    place = {gpu: at for at, gpu in enumerate(gpus)}
    hops: dict[tuple[int, int], Hop] = {}
    for index in members:
        for link in cluster.node(index).links:
            a, b = place.get((index, link.a)), place.get((index, link.b))
            if a is None or b is None:
                continue
            pair, hop = (min(a, b), max(a, b)), Hop(link.bytes_per_s, link.latency_s)
            hops[pair] = min(hops.get(pair, hop), hop, key=lambda one: one.order)
    if len(members) > 1:
        assert cluster.fabric is not None
        latency_s = cluster.fabric.latency_s
        shares = [port_share_bytes_per_s(cluster, cluster.node(node), gpu) for node, gpu in gpus]
        for a, b in combinations(range(len(gpus)), 2):
            if gpus[a][0] != gpus[b][0]:
                hops[a, b] = Hop(min(shares[a], shares[b]), latency_s)
    return gpus, hops


def _hop(hops: Hops, a: int, b: int) -> Hop:
    return hops.get((a, b) if a < b else (b, a), _NO_HOP)


def _pairs(order: Sequence[int]) -> list[tuple[int, int]]:
    return [(order[at - 1], order[at]) for at in range(len(order))]


def _exact_ring(size: int, hops: Hops) -> list[int] | None:
    """Return the best order, `None` where no ring joins all.

    First the fastest rate at which some ring exists, by halving the list of rates; then, among the
    hops of that rate or more, the ring of most bandwidth and least latency. Both are sums, so that
    the best way to a place through a set of others is all that has to be kept (Held and Karp 1962).
    """
    rates = sorted({hop.bytes_per_s for hop in hops.values()})
    best: list[int] | None = None
    low, high = 0, len(rates) - 1
    while low <= high:
        middle = (low + high) // 2
        order = _widest_ring(
            size, {p: h for p, h in hops.items() if h.bytes_per_s >= rates[middle]}
        )
        if order is None:
            high = middle - 1
        else:
            best, low = order, middle + 1
    return best


def _widest_ring(size: int, hops: Hops) -> list[int] | None:
    """Return the ring of most bandwidth in all, then least latency."""
    # Whole bytes/s and femtoseconds: sums of floats depend on their order and would split ties.
    worth = {
        pair: (round(hop.bytes_per_s), -round(hop.latency_s * 1e15)) for pair, hop in hops.items()
    }
    worth |= {(b, a): value for (a, b), value in worth.items()}
    # Paths start at 0; the key is the set of visited places (as bits, without 0) and the last one.
    ways: dict[tuple[int, int], tuple[tuple[int, int], int]] = {
        (1 << at, at): (worth[0, at], 0) for at in range(1, size) if (0, at) in worth
    }
    layer = list(ways)
    while layer:
        following: dict[tuple[int, int], None] = {}
        for visited, last in layer:
            (rate, quickness), _ = ways[visited, last]
            for at in range(1, size):
                step = worth.get((last, at))
                if step is None or visited >> at & 1:
                    continue
                key = (visited | 1 << at, at)
                value = (rate + step[0], quickness + step[1])
                if key not in ways or value > ways[key][0]:
                    ways[key] = (value, last)
                    following[key] = None
        layer = list(following)
    everyone = (1 << size) - 2
    closed: list[tuple[tuple[int, int], int]] = []
    for last in range(1, size):
        if (everyone, last) in ways and (last, 0) in worth:
            (rate, quickness), back = ways[everyone, last][0], worth[last, 0]
            closed.append(((rate + back[0], quickness + back[1]), last))
    if not closed:
        return None
    visited, last = everyone, max(closed)[1]
    order = [last]
    while (before := ways[visited, last][1]) != 0:
        visited, last = visited & ~(1 << last), before
        order.append(last)
    return [0, *reversed(order)]


def _join_fastest(size: int, hops: Hops) -> list[int]:
    """Return an order made of the fastest hops that make neither a branch nor a small circle."""
    paths = {place: [place] for place in range(size)}  # by both of their ends
    pairs = list(combinations(range(size), 2))
    for a, b in sorted(pairs, key=lambda pair: _hop(hops, *pair).order):
        if a not in paths or b not in paths or paths[a] is paths[b]:
            continue
        left, right = paths.pop(a), paths.pop(b)
        joined = [
            *(left if left[-1] == a else left[::-1]),
            *(right if right[0] == b else right[::-1]),
        ]
        paths[joined[0]] = paths[joined[-1]] = joined
    order = next(iter(paths.values()))
    start = order.index(0)
    return order[start:] + order[:start]


def _exchange(order: list[int], hops: Hops) -> list[int]:
    """Return the order after exchanging pairs of hops until none helps (2-opt).

    An exchange helps when the slower of its hops gets faster, or else both together do. The sorted
    list of all rates rises with each, so that this ends.
    """

    def worth(first: Hop, second: Hop) -> tuple[float, float, float]:
        rates = first.bytes_per_s, second.bytes_per_s
        return min(rates), sum(rates), -first.latency_s - second.latency_s

    improved = True
    while improved:
        improved = False
        for i, j in combinations(range(1, len(order)), 2):
            before, first = order[i - 1], order[i]
            last, after = order[j], order[(j + 1) % len(order)]
            now = worth(_hop(hops, before, first), _hop(hops, last, after))
            then = worth(_hop(hops, before, last), _hop(hops, first, after))
            if then > now:
                order[i : j + 1] = order[i : j + 1][::-1]
                improved = True
    return order
