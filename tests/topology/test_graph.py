"""Islands, bandwidth and latency of groups."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.topology.cluster import Cluster, Gpu, Link, Node
from rankwright.topology.link_graph import FABRIC
from rankwright.topology.link_kinds import link_bytes_per_s, link_latency_s
from rankwright.topology.shorthand import parse_cluster


def node_of(device: str, kinds: dict[tuple[int, int], str]) -> Cluster:
    """A node with one link for each entry; GPUs are those that the entries name."""
    indices = sorted({index for pair in kinds for index in pair})
    gpus = {
        index: Gpu(index=index, device=device, name=device, memory_bytes=1, total_memory_bytes=1)
        for index in indices
    }
    links = tuple(
        Link(
            a=a,
            b=b,
            kind=kind,
            bytes_per_s=link_bytes_per_s(kind, gpus[a], gpus[b]),
            latency_s=link_latency_s(kind),
        )
        for (a, b), kind in kinds.items()
    )
    return Cluster(nodes=(Node(name="n", gpus=tuple(gpus.values()), links=links),))


def test_nvswitch_gives_every_group_the_whole_port() -> None:
    cluster = parse_cluster("8xh100-sxm")
    assert cluster.islands == (tuple((0, gpu) for gpu in range(8)),)
    assert cluster.bandwidth([(0, 0), (0, 5)]) == 450e9
    assert cluster.bandwidth([(0, gpu) for gpu in range(8)]) == 450e9
    assert cluster.latency([(0, 0), (0, 5)]) == 0.8e-6


def test_one_gpu_moves_nothing() -> None:
    cluster = parse_cluster("8xh100-sxm")
    assert cluster.bandwidth([(0, 3)]) == math.inf
    assert cluster.latency([(0, 3), (0, 3)]) == 0


def test_a_mesh_adds_up_the_links_that_stay_in_the_group() -> None:
    cluster = parse_cluster("8xmi300x")
    assert cluster.bandwidth([(0, 0), (0, 1)]) == 64e9
    assert cluster.bandwidth([(0, gpu) for gpu in range(4)]) == 3 * 64e9
    assert cluster.bandwidth([(0, gpu) for gpu in range(8)]) == 448e9


def test_four_a100_on_a_board_without_switch_use_all_twelve_links() -> None:
    pairs = {(a, b): "NV4" for a in range(4) for b in range(a + 1, 4)}
    assert node_of("a100-sxm-80gb", pairs).bandwidth([(0, gpu) for gpu in range(4)]) == 300e9


def test_bridged_pairs_are_islands_and_pcie_joins_them() -> None:
    pairs = {(a, b): "SYS" for a in range(4) for b in range(a + 1, 4)}
    cluster = node_of("a100-pcie-80gb", pairs | {(0, 1): "NV12", (2, 3): "NV12"})
    assert cluster.islands == (((0, 0), (0, 1)), ((0, 2), (0, 3)))
    assert cluster.bandwidth([(0, 0), (0, 1)]) == 300e9
    assert cluster.bandwidth([(0, gpu) for gpu in range(4)]) == 22e9
    assert cluster.latency([(0, 0), (0, 2)]) == 1.3e-6


def test_islands_may_be_unequal() -> None:
    kinds = {
        (0, 1): "PIX",
        (0, 2): "PXB",
        (1, 2): "PXB",
        (0, 3): "SYS",
        (1, 3): "SYS",
        (2, 3): "SYS",
    }
    assert node_of("l40s", kinds).islands == (((0, 0), (0, 1), (0, 2)), ((0, 3),))


def test_nvlink_islands_are_not_merged_by_a_switch_they_sit_on() -> None:
    pairs = {(a, b): "PIX" for a in range(4) for b in range(a + 1, 4)}
    assert node_of("a30", pairs | {(0, 1): "NV4"}).islands == (((0, 0), (0, 1)), ((0, 2), (0, 3)))


def test_gpus_through_the_host_are_islands_of_one() -> None:
    assert parse_cluster("4xrtx4090").islands == (((0, 0),), ((0, 1),), ((0, 2),), ((0, 3),))


def test_between_nodes_each_gpu_has_its_share_of_the_ports() -> None:
    cluster = parse_cluster("2x8xh100-sxm+ib400")
    assert cluster.bandwidth([(0, 0), (1, 0)]) == 50e9
    everyone = [(node, gpu) for node in range(2) for gpu in range(8)]
    assert cluster.bandwidth(everyone) == 400e9  # eight ports, below 450e9 of NVLink
    assert cluster.bandwidth([(0, 0), (0, 1), (1, 0)]) == 50e9  # node 1 has one share in it
    assert cluster.latency(everyone) == 12e-6
    assert parse_cluster("2x8xh100-sxm+ib400x4").bandwidth([(0, 0), (1, 0)]) == 25e9
    assert parse_cluster("2x8xl40s+ib400").bandwidth([(0, 0), (1, 0)]) == 32e9  # its PCIe slot


def test_questions_about_sixteen_thousand_gpus_touch_only_the_group() -> None:
    cluster = parse_cluster("2048x8xh100-sxm+ib400")
    assert cluster.bandwidth([(0, 0), (2047, 7)]) == 50e9
    assert len(cluster.islands) == 2048
    assert cluster.islands[2047][0] == (2047, 0)
    assert "graph" not in vars(cluster)


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ([], "at least one"),
        ([(1, 0)], "nodes 0 to 0"),
        ([(-1, 0)], "nodes 0 to 0"),
        ([(0, 8)], "has no GPU 8"),
    ],
)
def test_a_group_that_is_not_there_is_refused(group: list[tuple[int, int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_cluster("8xh100-sxm").bandwidth(group)


def test_a_group_that_no_link_joins_is_refused() -> None:
    cluster = node_of("l4", {(0, 1): "PHB", (2, 3): "PHB"})
    with pytest.raises(ValueError, match=r"no link joins all of GPUs \[0, 2\]"):
        cluster.bandwidth([(0, 0), (0, 2)])


def test_the_graph_has_every_link_and_meets_in_the_fabric() -> None:
    graph = parse_cluster("2x4xh100-sxm+ib400").graph
    assert graph.number_of_nodes() == 9
    assert graph.number_of_edges() == 2 * 6 + 8
    assert graph.edges[(0, 0), (0, 1)]["bandwidth"] == 450e9
    assert graph.edges[(1, 2), FABRIC]["bandwidth"] == 50e9
    assert graph.edges[(1, 2), FABRIC]["latency"] == 6e-6
    assert graph.nodes[1, 2]["device"] == "h100-sxm"


def test_asking_for_graph_and_islands_leaves_the_value_as_it_was() -> None:
    cluster = parse_cluster("2x4xh100-sxm+ib400")
    before = cluster.model_dump_json()
    assert cluster.graph is cluster.graph
    assert cluster.islands is cluster.islands
    assert cluster.model_dump_json() == before
    assert cluster == parse_cluster("2x4xh100-sxm+ib400")


KINDS = st.sampled_from(["NV1", "NV4", "NV12", "PIX", "PXB", "PHB", "NODE", "SYS"])


@settings(deadline=None)
@given(
    device=st.sampled_from(["a100-sxm-80gb", "h100-sxm", "v100-sxm2-32gb", "l40s", "mystery"]),
    kinds=st.lists(KINDS, min_size=15, max_size=15),
    group=st.sets(st.integers(0, 5), min_size=2),
    removed=st.integers(0, 14),
)
def test_removing_a_link_never_raises_the_bandwidth(
    device: str, kinds: list[str], group: set[int], removed: int
) -> None:
    pairs = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    full = node_of(device, dict(zip(pairs, kinds, strict=True)))
    node = full.nodes[0]
    fewer = tuple(link for at, link in enumerate(node.links) if at != removed)
    less = Cluster(nodes=(node.model_copy(update={"links": fewer}),))
    ids = [(0, gpu) for gpu in group]
    try:
        remaining = less.bandwidth(ids)
    except ValueError:
        return  # nothing joins them any more
    assert remaining <= full.bandwidth(ids)


@settings(deadline=None)
@given(group=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=1))
def test_a_pair_across_nodes_is_never_faster_than_the_fabric_of_its_nodes(
    group: set[tuple[int, int]],
) -> None:
    cluster = parse_cluster("4x8xh100-sxm+ib400")
    result = cluster.bandwidth(group)
    if len({node for node, _ in group}) > 1:
        smallest = min(sum(1 for n, _ in group if n == node) for node, _ in group)
        assert result == min(450e9, smallest * 50e9)
    assert result > 0
