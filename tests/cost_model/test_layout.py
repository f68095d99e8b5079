from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwright.cost_model.layout import (
    boundary_groups,
    crossings,
    find_slots,
    replica_slots,
    replicas_in_nodes,
)
from rankwright.topology.cluster import Cluster, Link
from rankwright.topology.shorthand import parse_cluster


def test_a_node_of_eight_has_two_slots_of_four() -> None:
    (kind,) = find_slots(parse_cluster("2x8xh100-sxm+ib400"), 4)
    assert kind.gpus == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert kind.count == 4
    assert kind.places(2) == ((1, 0), (1, 1), (1, 2), (1, 3))


def test_a_slot_wider_than_a_node_takes_whole_nodes() -> None:
    (kind,) = find_slots(parse_cluster("4x8xh100-sxm+ib400"), 16)
    assert (kind.count, kind.nodes_per_slot, kind.group.num_nodes) == (2, 2, 2)
    assert {node for node, _ in kind.places(1)} == {2, 3}
    assert find_slots(parse_cluster("2x8xh100-sxm+ib400"), 12) == ()


def test_slots_stay_inside_islands() -> None:
    cluster = parse_cluster("4xa100-pcie")
    gpus = cluster.nodes[0].gpus
    bridged = [Link(a=0, b=2, kind="NV4", bytes_per_s=1e11, latency_s=1e-6)]
    bridged += [Link(a=1, b=3, kind="NV4", bytes_per_s=1e11, latency_s=1e-6)]
    slow = [
        Link(a=a, b=b, kind="SYS", bytes_per_s=1e10, latency_s=1e-6)
        for a, b in ((0, 1), (0, 3), (1, 2), (2, 3))
    ]
    node = cluster.nodes[0].model_copy(update={"gpus": gpus, "links": (*bridged, *slow)})
    (kind,) = find_slots(Cluster(nodes=(node,)), 2)
    assert kind.gpus == ((0, 2), (1, 3))
    assert kind.group.bytes_per_s == 1e11


def test_kinds_of_gpu_are_kept_apart_and_the_fastest_comes_first() -> None:
    kinds = find_slots(parse_cluster("2xrtx3090+2xrtx4090"), 2)
    assert [(kind.gpu.device, kind.gpus) for kind in kinds] == [
        ("rtx4090", ((2, 3),)),
        ("rtx3090", ((0, 1),)),
    ]
    (mixed,) = find_slots(parse_cluster("1xrtx3090+1xrtx4090"), 2)
    assert mixed.gpus == ((0, 1),)
    assert mixed.gpu.device == "rtx3090"


def test_machines_that_are_alike_are_one_kind() -> None:
    (kind,) = find_slots(parse_cluster("2048x8xh100-sxm+ib400"), 8)
    assert kind.count == 2048
    assert kind.places(2047)[0] == (2047, 0)


def test_pipelines_stay_in_machines_unless_told_to_spread() -> None:
    (kind,) = find_slots(parse_cluster("2x8xh100-sxm+ib400"), 1)
    assert replicas_in_nodes(kind, 3) == 4
    assert list(replica_slots(kind, 3)) == [(0, 1, 2), (3, 4, 5), (8, 9, 10), (11, 12, 13)]
    assert [*replica_slots(kind, 3, spread=True)][-1] == (6, 7, 14)
    assert crossings(kind, 3) == 1
    assert crossings(kind, 16) == 1
    assert crossings(kind, 8) == 0


def test_a_boundary_between_nodes_is_the_fabric() -> None:
    cluster = parse_cluster("2x8xh100-sxm+ib400")
    (kind,) = find_slots(cluster, 8)
    (group,) = boundary_groups(cluster, (kind, kind), spread=True)
    assert (group.num_nodes, group.network_bytes_per_s) == (2, 50e9)
    (kind,) = find_slots(cluster, 4)
    (group,) = boundary_groups(cluster, (kind, kind), spread=False)
    assert (group.num_nodes, group.bytes_per_s) == (1, 450e9)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.integers(1, 12), st.booleans())
def test_no_gpu_is_in_two_pipelines(nodes: int, gpus: int, tp: int, pp: int, spread: bool) -> None:
    cluster = parse_cluster(f"{nodes}x{gpus}xh100-sxm+ib400")
    for kind in find_slots(cluster, tp):
        pipelines = list(replica_slots(kind, pp, spread))
        expected = kind.count // pp if spread else replicas_in_nodes(kind, pp)
        assert len(pipelines) == expected
        places = list(
            chain.from_iterable(kind.places(slot) for slots in pipelines for slot in slots)
        )
        assert len(set(places)) == len(places) == expected * pp * tp
        for slots in pipelines:
            on = [kind.places(slot)[0][0] for slot in slots]
            crossed = sum(a != b for a, b in pairwise(on))
            assert crossed <= (crossings(kind, pp) if spread else 0)


def test_a_cluster_without_room_has_no_slot() -> None:
    assert find_slots(parse_cluster("4xh100-sxm"), 8) == ()


@pytest.mark.parametrize("tp", [1, 2, 3, 5, 6, 7, 8])
def test_any_number_of_gpus_makes_slots(tp: int) -> None:
    (kind,) = find_slots(parse_cluster("8xh100-sxm"), tp)
    assert kind.count == 8 // tp
