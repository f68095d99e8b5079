"""Racks and levels of switches against trying everything on small ones."""

from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.cost_model.collectives import Group, all_reduce_s, all_to_all_s, find_group, send_s
from rankwright.cost_model.layout import boundary_groups, find_slots, replica_slots
from rankwright.topology.cluster import Cluster
from rankwright.topology.link_graph import FABRIC, LEVEL, RACK
from rankwright.topology.shorthand import format_shorthand, parse_cluster

SMALL = (
    "6x2xh100-sxm+ib400@2",
    "6x2xh100-sxm+ib400@2:2",
    "6x1xh100-sxm+ib400@3:1.5",
    "6x2xh100-sxm+ib400x1@2@4:4",
    "6x2xl40s+roce100x1@2:3@6:2",
)


def ring_bytes_per_s(cluster: Cluster, group: Sequence[tuple[int, int]]) -> float:
    """Return the rate of the best order of the machines, by the capacities in the graph.

    Every GPU of the cluster uses its share of each edge, so that the group has its own.
    """
    assert cluster.fabric is not None
    levels, graph = cluster.fabric.levels, cluster.graph
    members: dict[int, list[int]] = {}
    for node, gpu in group:
        members.setdefault(node, []).append(gpu)
    inside = min(cluster.bandwidth([(node, gpu) for gpu in gpus]) for node, gpus in members.items())
    if len(members) == 1:
        return inside

    def way_up(number: int, part: int) -> float:
        vertex = (LEVEL - number, part)
        (above,) = (one for one in graph[vertex] if one == FABRIC or one[0] == vertex[0] - 1)
        return float(graph.edges[vertex, above]["bandwidth"])

    ports = [
        sum(graph.edges[(node, gpu), (LEVEL, node // levels[0].nodes)]["bandwidth"] for gpu in gpus)
        for node, gpus in members.items()
    ]
    best = 0.0
    first, *others = members
    for order in permutations(others):
        rates = [inside, *ports]
        for number, level in enumerate(levels):
            parts = [node // level.nodes for node in (first, *order, first)]
            for part in set(parts):
                leaving = sum(a == part != b for a, b in pairwise(parts))
                if not leaving:
                    continue
                below = [node for node in range(cluster.num_nodes) if node // level.nodes == part]
                mine = sum(len(members.get(node, ())) for node in below)
                every = sum(len(cluster.node(node).gpus) for node in below)
                rates.append(way_up(number, part) * mine / every / leaving)
        best = max(best, min(rates))
    return best


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_a_group_is_as_fast_as_the_best_ring_through_its_machines(
    text: str, data: st.DataObject
) -> None:
    cluster = parse_cluster(text)
    places = [(node, gpu.index) for node in range(6) for gpu in cluster.node(node).gpus]
    group = data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=8, unique=True))
    assert cluster.bandwidth(group) == pytest.approx(ring_bytes_per_s(cluster, group))


def pairings(nodes: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield every way to put machines two and two."""
    if not nodes:
        yield []
        return
    first, *others = nodes
    for other in others:
        left = [node for node in others if node != other]
        yield from ([(first, other), *rest] for rest in pairings(left))


@pytest.mark.parametrize("text", SMALL)
def test_machines_that_work_together_are_as_near_as_in_the_best_pairing(text: str) -> None:
    cluster = parse_cluster(text)
    size = len(cluster.node(0).gpus)

    def rates(pairs: Sequence[tuple[int, int]]) -> list[float]:
        return sorted(
            cluster.bandwidth([(node, gpu) for node in pair for gpu in range(size)])
            for pair in pairs
        )

    found: list[tuple[int, int]] = []
    for kind in find_slots(cluster, 2 * size):
        for slot in range(kind.count):
            nodes = sorted({node for node, _ in kind.places(slot)})
            found.append((nodes[0], nodes[1]))
    assert sorted(node for pair in found for node in pair) == list(range(6))
    assert rates(found) == max(map(rates, pairings(range(6))))


def test_each_kind_of_slot_is_timed_by_its_furthest_machines() -> None:
    cluster = parse_cluster("10x8xh100-sxm+ib400@5:4")
    inside, across = find_slots(cluster, 16)
    assert (inside.count, across.count) == (4, 1)
    assert {node for slot in range(4) for node, _ in inside.places(slot)} == {
        0,
        1,
        2,
        3,
        5,
        6,
        7,
        8,
    }
    assert {node for node, _ in across.places(0)} == {4, 9}
    assert (inside.group.ring_bytes_per_s, across.group.ring_bytes_per_s) == (50e9, 12.5e9)
    assert across.group.network_latency_s > inside.group.network_latency_s


def test_a_pipeline_is_timed_by_the_one_that_goes_furthest() -> None:
    # Three machines a pipeline, four below a leaf: the second pipeline is on machines 3, 4 and 5.
    cluster = parse_cluster("12x8xh100-sxm+ib400@4:8")
    (kind,) = find_slots(cluster, 8)
    assert list(replica_slots(kind, 3, spread=True))[1] == (3, 4, 5)
    rates = [group.ring_bytes_per_s for group in boundary_groups(cluster, (kind,) * 3, True)]
    assert sorted(rates) == [50e9 / 8, 50e9]
    (even,) = boundary_groups(cluster, (kind,) * 2, True)
    assert even.ring_bytes_per_s == 50e9


def test_oversubscription_slows_what_leaves_a_leaf_only() -> None:
    flat, thin = parse_cluster("8x8xh100-sxm+ib400"), parse_cluster("8x8xh100-sxm+ib400@4:2")

    def group(cluster: Cluster, *nodes: int) -> Group:
        return find_group(cluster, tuple((node, gpu) for node in nodes for gpu in range(8)))

    size = 64 * 2**20
    assert all_to_all_s(size, group(thin, 0, 1)) == all_to_all_s(size, group(flat, 0, 1))
    # Two machines of each leaf have twice one machine's way up: 2 x 25 GB/s, as their ports.
    same = all_reduce_s(size, group(flat, 0, 1, 4, 5))
    assert all_reduce_s(size, group(thin, 0, 1, 4, 5)) == pytest.approx(same, abs=1e-5)
    # One machine of each: a GPU's eighth goes over at 25 GB/s instead of 50.
    slower_s = all_reduce_s(size, group(thin, 0, 4)) - all_reduce_s(size, group(flat, 0, 4))
    assert slower_s == pytest.approx(size / 8 * (1 / 25e9 - 1 / 50e9) / 0.72, abs=5e-6)
    # All-to-all: half of the bytes leave the leaf at 25 GB/s, three quarters the machine at 50.
    more_s = all_to_all_s(size, group(thin, 0, 1, 4, 5)) - all_to_all_s(
        size, group(flat, 0, 1, 4, 5)
    )
    assert more_s == pytest.approx(size * (0.5 / 25e9 - 0.75 / 50e9) / 0.72, abs=1.1e-6)
    pair = ((0, 0), (4, 0))
    assert send_s(size, find_group(thin, pair)) > 1.9 * send_s(size, find_group(flat, pair))


def test_trays_of_a_rack_meet_over_nvlink() -> None:
    cluster = parse_cluster("36x4xgb200+ib400")
    assert cluster.racks is not None
    assert cluster.racks.nodes == 18
    assert [len(island) for island in cluster.islands] == [72, 72]
    whole = [(node, gpu) for node in range(18) for gpu in range(4)]
    assert cluster.bandwidth(whole) == 900e9
    assert cluster.bandwidth([*whole, (18, 0)]) == 50e9
    group = find_group(cluster, tuple(whole))
    assert (group.num_nodes, group.one_machine) == (1, False)
    inside, across = find_slots(cluster, 16)
    # Four slots of four trays in each rack, and the two trays that each has left.
    assert (inside.count, across.count) == (8, 1)
    assert (inside.group.num_nodes, across.group.num_nodes) == (1, 2)
    assert inside.group.network_bytes_per_s == inf


def test_the_graph_joins_trays_by_their_rack_and_racks_by_the_fabric() -> None:
    cluster = parse_cluster("36x4xgb200+ib400@18:2")
    graph = cluster.graph
    assert graph.edges[(17, 3), (RACK, 0)]["bandwidth"] == 900e9
    assert not graph.has_edge((18, 0), (RACK, 0))
    assert graph.edges[(18, 0), (LEVEL, 1)]["bandwidth"] == 50e9
    assert graph.edges[(LEVEL, 1), FABRIC]["bandwidth"] == 18 * 4 * 50e9 / 2


def test_one_machine_with_the_whole_rack_needs_no_rack() -> None:
    assert parse_cluster("4x72xgb200+ib400").racks is None
    assert parse_cluster("2x8xh100-sxm+ib400").racks is None


def test_levels_are_written_and_read_back() -> None:
    text = "2048x8xh100-sxm+ib400x8@32@512:2"
    cluster = parse_cluster(text)
    assert format_shorthand(cluster) == text
    assert Cluster.model_validate_json(cluster.model_dump_json()) == cluster
    assert "512 machines a switch 2:1" in cluster.describe()
    flat = parse_cluster("2048x8xh100-sxm+ib400x8")
    assert cluster.fingerprint != flat.fingerprint


@pytest.mark.parametrize("levels", ["@32@48", "@32@32", "@1", "@0", "@32:0.5", "@32@512:0"])
def test_levels_that_cannot_be_are_refused(levels: str) -> None:
    with pytest.raises(ValueError, match="switches"):
        parse_cluster(f"2048x8xh100-sxm+ib400{levels}")
