"""Machines that were read one by one become one cluster."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.topology.cluster import Cluster, Nic, Node
from rankwright.topology.join import find_fabric, fold, hostlist, join
from rankwright.topology.shorthand import parse_cluster

KINDS = ("8xh100-sxm", "4xl40s", "2xa100-pcie", "2xcpu")


def node(kind: str = "4xl40s", name: str = "a", **changes: object) -> Node:
    return parse_cluster(kind).nodes[0].model_copy(update={"name": name, **changes})


def alone(machine: Node, *notes: str) -> Cluster:
    return Cluster(nodes=(machine,), source="probe", notes=notes)


def with_free(machine: Node, free_bytes: Sequence[int]) -> Node:
    gpus = tuple(
        gpu.model_copy(update={"memory_bytes": free, "uuid": f"GPU-{machine.name}-{gpu.index}"})
        for gpu, free in zip(machine.gpus, free_bytes, strict=True)
    )
    return machine.model_copy(update={"gpus": gpus})


@st.composite
def machines(draw: st.DrawFn) -> list[Cluster]:
    made = []
    for number in range(draw(st.integers(1, 7))):
        base = node(draw(st.sampled_from(KINDS)), f"host{number}")
        total = base.gpus[0].total_memory_bytes
        shares = st.sampled_from([1.0, 0.995, 0.99, 0.6])
        free = [int(total * draw(shares)) for _ in base.gpus]
        made.append(alone(with_free(base, free)))
    return made


@given(machines())
@settings(max_examples=60, deadline=None)
def test_joining_keeps_every_machine_in_its_place_and_promises_no_more_than_it_has(
    clusters: list[Cluster],
) -> None:
    joined = join(clusters)
    assert joined.num_nodes == len(clusters)
    assert joined.num_gpus == sum(cluster.num_gpus for cluster in clusters)
    for index, cluster in enumerate(clusters):
        merged, own = joined.node(index), cluster.nodes[0]
        assert [gpu.device for gpu in merged.gpus] == [gpu.device for gpu in own.gpus]
        assert [(link.a, link.b, link.kind) for link in merged.links] == [
            (link.a, link.b, link.kind) for link in own.links
        ]
        for least, gpu in zip(merged.gpus, own.gpus, strict=True):
            assert least.memory_bytes <= gpu.memory_bytes
            assert gpu.device == "cpu" or least.memory_bytes >= gpu.memory_bytes * 0.97
    assert join([joined]) == joined
    assert Cluster.model_validate_json(joined.model_dump_json()) == joined


@given(st.sampled_from(KINDS), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_equal_machines_fold_into_one_row(kind: str, count: int) -> None:
    folded = fold(node(kind, f"gpu{number:02}") for number in range(count))
    assert [each.count for each in folded] == [count]
    assert folded[0].name == ("gpu00" if count == 1 else f"gpu[00-{count - 1:02}]")


def test_a_folded_cluster_is_the_one_that_shorthand_means() -> None:
    joined = join([alone(node("8xh100-sxm", name)) for name in "ab"], fabric="ib400")
    assert joined.fingerprint == parse_cluster("2x8xh100-sxm+ib400").fingerprint


def test_only_neighbours_fold_so_that_machines_keep_their_numbers() -> None:
    folded = fold([node(name="a"), node("8xh100-sxm", "b"), node(name="c")])
    assert [each.name for each in folded] == ["a", "b", "c"]


def test_folded_machines_promise_the_memory_of_the_least() -> None:
    least, most = 64 * 2**30, 64 * 2**30 + 2**20
    folded = fold([node(name="a", host_memory_bytes=most), node(name="b", host_memory_bytes=least)])
    assert [(each.count, each.host_memory_bytes) for each in folded] == [(2, least)]


def test_a_busy_gpu_keeps_its_machine_apart() -> None:
    total = node().gpus[0].total_memory_bytes
    busy = with_free(node(name="b"), [total, total // 2, total, total])
    assert len(fold([node(name="a"), busy, node(name="c")])) == 3


def test_uuids_are_kept_until_machines_are_folded() -> None:
    total = node().gpus[0].total_memory_bytes
    one, two = (with_free(node(name=name), [total] * 4) for name in "ab")
    assert fold([one])[0].gpus[0].uuid == "GPU-a-0"
    assert fold([one, two])[0].gpus[0].uuid is None


def port(name: str, gbit: float, layer: str | None = "infiniband", rdma: bool = True) -> Nic:
    return Nic.model_validate(
        {"name": name, "bytes_per_s": gbit * 1e9 / 8, "rdma": rdma, "link_layer": layer}
    )


@pytest.mark.parametrize(
    ("nics", "kind", "gbit", "ports"),
    [
        ([port(f"mlx5_{i}", 400) for i in range(8)] + [port("mlx5_8", 100)], "infiniband", 400, 8),
        ([port("mlx5_0", 200, "ethernet"), port("mlx5_1", 200, "ethernet")], "roce", 200, 2),
        ([port("mlx5_0", 200, None)], "infiniband", 200, 1),
        (
            [port("eth0", 25, "ethernet", rdma=False), port("eth1", 1, None, False)],
            "ethernet",
            25,
            1,
        ),
        ([port("eth0", 100, None, rdma=False), port("mlx5_0", 50)], "infiniband", 50, 1),
    ],
)
def test_the_fabric_follows_from_the_ports(
    nics: list[Nic], kind: str, gbit: float, ports: int
) -> None:
    fabric, note = find_fabric([node(nics=tuple(nics))] * 2)
    assert (fabric.kind, fabric.bytes_per_s * 8 / 1e9, fabric.ports_per_node) == (kind, gbit, ports)
    assert note is None


def test_the_machine_with_the_least_network_decides() -> None:
    good = node(nics=tuple(port(f"mlx5_{i}", 400) for i in range(8)))
    poor = node(nics=(port("mlx5_0", 200), port("mlx5_1", 200)))
    fabric, _ = find_fabric([good, poor])
    assert (fabric.bytes_per_s, fabric.ports_per_node) == (25e9, 2)


def test_a_network_that_says_nothing_is_assumed_aloud() -> None:
    joined = join([alone(node(name="a")), alone(node(name="b"))])
    assert joined.fabric is not None
    assert joined.fabric.kind == "ethernet"
    assert any("assumed" in note and "--fabric" in note for note in joined.notes)
    assert join([alone(node())]).fabric is None


def test_a_note_says_whose_it_is_unless_all_share_it() -> None:
    joined = join([alone(node(name=name), "all", *(["own"] * (name == "b"))) for name in "abc"])
    assert joined.notes[:2] == ("all", "b: own")


def test_nothing_to_join_is_refused() -> None:
    with pytest.raises(ValueError, match="no machine"):
        join([])


def test_names_that_do_not_count_up_are_listed() -> None:
    assert hostlist(["n1", "n3"]) == "n1,n3"
    assert hostlist(["1", "2"]) == "1,2"
