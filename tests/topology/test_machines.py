"""Graph, islands, rings and groups of machines that people have."""

import pytest
from tests.topology import machines

from rankwright.topology.cluster import Cluster, Node
from rankwright.topology.groups import best_groups, cut_node
from rankwright.topology.link_graph import FABRIC
from rankwright.topology.rings import best_ring, best_tree


def alone(node: Node) -> Cluster:
    return Cluster(nodes=(node,))


def on_first(*gpus: int) -> list[tuple[int, int]]:
    return [(0, gpu) for gpu in gpus]


def ring_of(node: Node, *gpus: int) -> tuple[list[int], float]:
    ring = best_ring(alone(node), on_first(*gpus))
    assert ring.exact
    return [gpu for _, gpu in ring.order], ring.bytes_per_s


def test_dgx1_has_one_island_and_a_ring_of_its_double_links() -> None:
    node = machines.dgx1_v100()
    cluster = alone(node)
    assert cluster.islands == (tuple(on_first(*range(8))),)
    assert ring_of(node, *range(8)) == ([0, 3, 2, 1, 5, 6, 7, 4], 50e9)
    assert cluster.bandwidth(on_first(*range(8))) == 150e9  # six links of 25 GB/s leave each GPU
    assert cluster.bandwidth(on_first(0, 1)) == 25e9
    assert cluster.bandwidth(on_first(0, 3)) == 50e9
    assert cluster.bandwidth(on_first(0, 5)) == 16e9  # no NVLink: PCIe 3.0 x16 through the sockets
    assert cluster.latency(on_first(0, 5)) == 1.3e-6
    assert cluster.latency(on_first(0, 1, 5)) == 0.8e-6  # by way of GPU 1


def test_dgx1_groups_follow_the_double_links() -> None:
    node = machines.dgx1_v100()
    assert cut_node(node, 2) == ((0, 3), (1, 2), (4, 7), (5, 6))
    assert cut_node(node, 4) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert ring_of(node, 0, 1, 2, 3) == ([0, 1, 2, 3], 25e9)
    # Without GPU 7, the ring over NVLink has to use single links.
    assert ring_of(node, *range(7))[1] == 25e9


@pytest.mark.parametrize(
    ("node", "bytes_per_s"),
    [
        (machines.dgx2(), 150e9),
        (machines.dgx_a100(), 300e9),
        (machines.hgx_h100(), 450e9),
    ],
    ids=lambda value: value.name if isinstance(value, Node) else "",
)
def test_behind_nvswitch_any_group_is_as_good_as_any(node: Node, bytes_per_s: float) -> None:
    cluster = alone(node)
    size = len(node.gpus)
    assert len(cluster.islands) == 1
    assert ring_of(node, *range(size)) == (list(range(size)), bytes_per_s)
    assert best_tree(cluster, on_first(*range(size))).bytes_per_s == bytes_per_s
    for group in (range(size), (0, size - 1), (1, 2, 5)):
        assert cluster.bandwidth(on_first(*group)) == bytes_per_s
        assert cluster.latency(on_first(*group)) == 0.8e-6
    for parts in (2, 4):
        groups = cut_node(node, size // parts)
        assert groups[0] == tuple(range(size // parts))
        assert len(groups) == parts
    assert cluster.graph.number_of_edges() == size * (size - 1) // 2


def test_eight_a10_are_cut_by_switch_then_by_socket() -> None:
    node = machines.a10_two_sockets()
    cluster = alone(node)
    assert [len(island) for island in cluster.islands] == [2, 2, 2, 2]
    assert cut_node(node, 2) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert cut_node(node, 4) == ((0, 1, 2, 3), (4, 5, 6, 7))
    # Two of three: one group a socket, and nobody needs the slow link between them.
    assert all(max(group) < 4 or min(group) >= 4 for group in cut_node(node, 3))
    assert cluster.bandwidth(on_first(0, 1)) == 32e9
    assert cluster.bandwidth(on_first(0, 2)) == 32e9
    assert cluster.bandwidth(on_first(0, 4)) == 22e9
    assert cluster.latency(on_first(0, 1)) == 1.0e-6
    assert cluster.latency(on_first(0, 2)) == 1.3e-6
    order, bytes_per_s = ring_of(node, *range(8))
    assert bytes_per_s == 22e9
    crossings = sum(order[at - 1] // 4 != order[at] // 4 for at in range(8))
    assert crossings == 2


def test_crossed_bridges_make_the_pairs() -> None:
    node = machines.a6000_bridged_pairs()
    cluster = alone(node)
    assert cluster.islands == (((0, 0), (0, 3)), ((0, 1), (0, 2)))
    assert cut_node(node, 2) == ((0, 3), (1, 2))
    assert cluster.bandwidth(on_first(0, 3)) == 56.25e9
    assert cluster.bandwidth(on_first(0, 1)) == 32e9
    assert cluster.bandwidth(on_first(0, 1, 2, 3)) == 32e9
    ring = best_ring(cluster, on_first(0, 1, 2, 3))
    assert ring.bytes_per_s == 32e9
    assert ring.total_bytes_per_s == 2 * 56.25e9 + 2 * 32e9  # uses both bridges
    tree = best_tree(cluster, on_first(0, 1, 2, 3))
    assert tree.hops[:2] == (((0, 0), (0, 3)), ((0, 1), (0, 2)))


def test_a_broken_bridge_is_avoided() -> None:
    node = machines.a6000_bridged_pairs()
    links = tuple(link for link in node.links if (link.a, link.b) != (1, 2))
    broken = node.model_copy(update={"links": links})
    assert alone(broken).islands == (((0, 0), (0, 3)), ((0, 1),), ((0, 2),))
    # 1 and 2 cannot reach each other directly, so that each goes with one of the others.
    assert cut_node(broken, 2) == ((0, 1), (2, 3))
    assert ring_of(broken, *range(4))[1] == 32e9


def test_sixteen_nodes_of_eight_with_eight_rails() -> None:
    cluster = machines.h100_rails()
    assert len(cluster.islands) == 16
    assert cluster.graph.degree(FABRIC) == 128
    everyone = [(node, gpu) for node in range(16) for gpu in range(8)]
    assert cluster.bandwidth(everyone) == 400e9  # all eight rails
    assert cluster.latency(everyone) == 12e-6
    rail = [(node, 3) for node in range(16)]
    assert cluster.bandwidth(rail) == 50e9
    assert best_ring(cluster, rail).bytes_per_s == 50e9
    ring = best_ring(cluster, everyone)
    assert ring.bytes_per_s == 50e9  # one ring enters a node through one port
    nodes = [node for node, _ in ring.order]
    assert sum(nodes[at - 1] != nodes[at] for at in range(128)) == 16
    assert ring.total_bytes_per_s == 16 * 50e9 + 112 * 450e9


def test_groups_over_nodes_take_whole_neighbours() -> None:
    cluster = machines.h100_rails()
    assert cluster.best_groups(64) == best_groups(cluster, 64)
    assert cluster.best_ring([(0, 0), (1, 0)]) == best_ring(cluster, [(0, 0), (1, 0)])
    groups = best_groups(cluster, 16)
    assert len(groups) == 8
    assert groups[1] == tuple((node, gpu) for node in (2, 3) for gpu in range(8))
    assert best_groups(cluster, 12) == ()
    assert len(best_groups(cluster, 8)) == 16
    assert len(best_groups(cluster, 3)) == 32
