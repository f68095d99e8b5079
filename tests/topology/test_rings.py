"""Rings, trees and bottlenecks against trying everything."""

import math
from collections.abc import Sequence
from itertools import combinations, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.topology.cluster import Cluster, Fabric, Gpu, Link, Node
from rankwright.topology.graph import GpuId
from rankwright.topology.link_graph import FABRIC
from rankwright.topology.rings import EXACT_GPUS, best_ring, best_tree
from rankwright.topology.shorthand import parse_cluster

Pair = tuple[int, int]
Edges = dict[Pair, tuple[float, float]]  # bytes/s, seconds

FAST, SLOW = (2e9, 1e-6), (1e9, 2e-6)


def node_of(size: int, edges: Edges) -> Node:
    """A node whose links all go through the host, so that only their rates matter."""
    gpus = tuple(
        Gpu(index=index, device="mystery", name="", memory_bytes=1, total_memory_bytes=1)
        for index in range(size)
    )
    links = tuple(
        Link(a=a, b=b, kind="PHB", bytes_per_s=rate, latency_s=latency)
        for (a, b), (rate, latency) in edges.items()
    )
    return Node(name="n", gpus=gpus, links=links)


def group_of(size: int) -> list[GpuId]:
    return [(0, gpu) for gpu in range(size)]


def edge(edges: Edges, a: int, b: int) -> tuple[float, float] | None:
    return edges.get((min(a, b), max(a, b)))


Worth = tuple[float, float, float]


def worth(used: Sequence[tuple[float, float]]) -> Worth:
    """Bottleneck, total, -latency; in whole units, so that no order of adding matters."""
    rates = [rate for rate, _ in used]
    return (
        min(rates),
        sum(round(rate) for rate in rates),
        -sum(round(latency * 1e15) for _, latency in used),
    )


def every_ring(size: int, edges: Edges) -> list[Worth]:
    found: list[Worth] = []
    for rest in permutations(range(1, size)):
        order = (0, *rest)
        used = [edge(edges, order[at - 1], order[at]) for at in range(size)]
        if None not in used:
            found.append(worth([one for one in used if one is not None]))
    return found


def every_tree(size: int, edges: Edges) -> list[tuple[Worth, float]]:
    """What each tree is worth, and the latency of its slowest hop."""
    found: list[tuple[Worth, float]] = []
    for chosen in combinations(edges, size - 1):
        joined = {0}
        for _ in chosen:
            joined |= {end for pair in chosen if joined & set(pair) for end in pair}
        if len(joined) == size:
            used = [edges[pair] for pair in chosen]
            found.append((worth(used), max(latency for _, latency in used)))
    return found


def check(size: int, edges: Edges) -> None:
    cluster, group = Cluster(nodes=(node_of(size, edges),)), group_of(size)
    rings = every_ring(size, edges)
    if rings:
        ring = best_ring(cluster, group)
        assert ring.exact
        assert sorted(ring.order) == group
        hops = [edge(edges, ring.order[at - 1][1], ring.order[at][1]) for at in range(size)]
        used = [hop for hop in hops if hop is not None]
        assert len(used) == size
        assert worth(used) == max(rings)
        assert (ring.bytes_per_s, ring.total_bytes_per_s) == max(rings)[:2]
        assert ring.latency_s == pytest.approx(sum(latency for _, latency in used))
    else:
        with pytest.raises(ValueError, match="no ring of links joins"):
            best_ring(cluster, group)
    trees = every_tree(size, edges)
    if trees:
        tree = best_tree(cluster, group)
        best, slowest_hop_s = max(trees)
        assert worth([edges[a, b] for (_, a), (_, b) in tree.hops]) == best
        assert (tree.bytes_per_s, tree.total_bytes_per_s) == best[:2]
        assert cluster.bandwidth(group) == max(value[0] for value, _ in trees)
        assert cluster.latency(group) == slowest_hop_s
    else:
        for ask in (cluster.bandwidth, cluster.latency):
            with pytest.raises(ValueError, match="no link joins"):
                ask(group)
        with pytest.raises(ValueError, match="no links join"):
            best_tree(cluster, group)


def test_every_graph_of_three_and_four_gpus() -> None:
    for size in (3, 4):
        pairs = list(combinations(range(size), 2))
        for kinds in product((None, SLOW, FAST), repeat=len(pairs)):
            edges = dict(zip(pairs, kinds, strict=True))
            check(size, {pair: kind for pair, kind in edges.items() if kind is not None})


LINKS = st.sampled_from([None, *product((1e9, 2e9, 3e9, 14.0625e9), (0.8e-6, 1.3e-6))])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(2, 6))
def test_any_graph_of_up_to_six_gpus(data: st.DataObject, size: int) -> None:
    pairs = list(combinations(range(size), 2))
    kinds = data.draw(st.lists(LINKS, min_size=len(pairs), max_size=len(pairs)))
    found = zip(pairs, kinds, strict=True)
    check(size, {pair: kind for pair, kind in found if kind is not None})


@settings(deadline=None, max_examples=10)
@given(kinds=st.lists(LINKS, min_size=28, max_size=28))
def test_rings_of_eight_gpus_are_exact(kinds: list[tuple[float, float] | None]) -> None:
    found = zip(combinations(range(8), 2), kinds, strict=True)
    edges = {pair: kind for pair, kind in found if kind is not None}
    cluster = Cluster(nodes=(node_of(8, edges),))
    rings = every_ring(8, edges)
    if rings:
        ring = best_ring(cluster, group_of(8))
        assert (ring.bytes_per_s, ring.total_bytes_per_s) == max(rings)[:2]


@settings(deadline=None, max_examples=40)
@given(data=st.data(), sizes=st.sampled_from([[1, 3], [3, 3], [1, 2, 3], [2, 2, 2], [1, 1]]))
def test_rings_over_unequal_nodes(data: st.DataObject, sizes: list[int]) -> None:
    nodes: list[Node] = []
    for size in sizes:
        pairs = list(combinations(range(size), 2))
        kinds = data.draw(st.lists(LINKS, min_size=len(pairs), max_size=len(pairs)))
        found = zip(pairs, kinds, strict=True)
        nodes.append(node_of(size, {pair: kind for pair, kind in found if kind is not None}))
    fabric = Fabric(kind="roce", bytes_per_s=2e9, ports_per_node=2, latency_s=8e-6)
    cluster = Cluster(nodes=tuple(nodes), fabric=fabric)
    gpus = [(node, gpu) for node, size in enumerate(sizes) for gpu in range(size)]
    graph = cluster.graph
    edges: Edges = {}
    for a, b in combinations(range(len(gpus)), 2):
        if gpus[a][0] != gpus[b][0]:
            ways = [graph.edges[gpus[end], FABRIC] for end in (a, b)]
            rate = min(way["bandwidth"] for way in ways)
            edges[a, b] = (rate, sum(way["latency"] for way in ways))
        elif graph.has_edge(gpus[a], gpus[b]):
            way = graph.edges[gpus[a], gpus[b]]
            edges[a, b] = (way["bandwidth"], way["latency"])
    rings = every_ring(len(gpus), edges)
    if not rings:
        with pytest.raises(ValueError, match="no ring"):
            best_ring(cluster, gpus)
        return
    ring = best_ring(cluster, gpus)
    order = [gpus.index(gpu) for gpu in ring.order]
    used = [edge(edges, order[at - 1], order[at]) for at in range(len(order))]
    assert worth([one for one in used if one is not None]) == max(rings)


def ladder(size: int, fast: float = 3e9, slow: float = 1e9) -> Edges:
    """All joined slowly, and fast in one circle that goes 0, 2, 4 ... 5, 3, 1."""
    circle = [*range(0, size, 2), *reversed(range(1, size, 2))]
    quick = {frozenset((circle[at - 1], circle[at])) for at in range(size)}
    return {
        pair: (fast if frozenset(pair) in quick else slow, 1e-6)
        for pair in combinations(range(size), 2)
    }


@pytest.mark.parametrize("size", [EXACT_GPUS, EXACT_GPUS + 1, 16, 32])
def test_one_fast_circle_is_found_at_any_size(size: int) -> None:
    ring = best_ring(Cluster(nodes=(node_of(size, ladder(size)),)), group_of(size))
    assert ring.bytes_per_s == 3e9
    assert ring.exact == (size <= EXACT_GPUS)


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_the_heuristic_visits_all_and_is_no_better_than_the_tree(data: st.DataObject) -> None:
    size = EXACT_GPUS + 2
    pairs = list(combinations(range(size), 2))
    kind = st.sampled_from([SLOW, FAST, (3e9, 0.5e-6)])
    kinds = data.draw(st.lists(kind, min_size=len(pairs), max_size=len(pairs)))
    cluster = Cluster(nodes=(node_of(size, dict(zip(pairs, kinds, strict=True))),))
    ring = best_ring(cluster, group_of(size))
    assert ring.exact == (len(set(kinds)) == 1)
    assert sorted(ring.order) == group_of(size)
    assert ring.bytes_per_s <= cluster.bandwidth(group_of(size))


def test_two_gpus_use_their_link_in_both_directions() -> None:
    ring = best_ring(parse_cluster("8xh100-sxm"), [(0, 5), (0, 2)])
    assert ring.order == ((0, 2), (0, 5))
    assert ring.bytes_per_s == 450e9
    assert ring.total_bytes_per_s == 900e9
    assert ring.latency_s == pytest.approx(1.6e-6)


def test_parallel_links_count_as_the_better_one() -> None:
    node = node_of(2, {(0, 1): SLOW})
    other = node.links[0].model_copy(update={"a": 1, "b": 0, "bytes_per_s": 5e9})
    both = node.model_copy(update={"links": (*node.links, other)})
    assert best_ring(Cluster(nodes=(both,)), group_of(2)).bytes_per_s == 5e9


@pytest.mark.parametrize("ask", [best_ring, best_tree])
@pytest.mark.parametrize(
    ("group", "says"),
    [([], "at least one"), ([(0, 1)], "at least two"), ([(0, 1), (0, 9)], "has no GPU 9")],
)
def test_a_group_that_makes_no_ring_is_refused(ask: object, group: list[GpuId], says: str) -> None:
    assert callable(ask)
    with pytest.raises(ValueError, match=says):
        ask(parse_cluster("8xh100-sxm"), group)


def test_a_heuristic_that_finds_none_says_so() -> None:
    star = {(0, other): FAST for other in range(1, EXACT_GPUS + 2)}
    cluster = Cluster(nodes=(node_of(EXACT_GPUS + 2, star),))
    with pytest.raises(ValueError, match="no ring of links was found"):
        best_ring(cluster, group_of(EXACT_GPUS + 2))
    assert math.isfinite(best_tree(cluster, group_of(EXACT_GPUS + 2)).bytes_per_s)
