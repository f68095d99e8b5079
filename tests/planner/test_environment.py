"""Settings of NCCL and gloo, and the facts they follow from."""

from collections.abc import Sequence

import pytest
from tests.topology import machines

from rankwright.planner.environment import find_environment
from rankwright.planner.plan import EnvironmentVariable, RankPlan
from rankwright.topology.cluster import Cluster, Nic
from rankwright.topology.shorthand import parse_cluster

GBIT = 1e9 / 8


def rank_on(node: int, rank: int = 0) -> RankPlan:
    return RankPlan(
        rank=rank,
        node=node,
        gpu=0,
        replica=rank,
        stage=0,
        tp_rank=0,
        layers=(0, 1),
        query_heads=(0, 1),
        kv_heads=(0, 1),
        ffn_columns=(0, 1),
        experts=(0, 0),
        vocab=(0, 1),
    )


def ports(first: int, count: int, gbit: float, *, rdma: bool = True) -> list[Nic]:
    return [
        Nic(name=f"mlx5_{at}", bytes_per_s=gbit * GBIT, rdma=rdma)
        for at in range(first, first + count)
    ]


def interface(name: str, gbit: float) -> Nic:
    return Nic(name=name, bytes_per_s=gbit * GBIT, rdma=False)


def cluster_of(fabric: str, *nics: Sequence[Nic]) -> Cluster:
    """A node for each list of ports."""
    base = parse_cluster(f"1x2xh100-sxm+1x2xh100-sxm+{fabric}")
    nodes = tuple(
        base.nodes[0].model_copy(update={"name": f"n{at}", "nics": tuple(mine)})
        for at, mine in enumerate(nics)
    )
    return base.model_copy(update={"nodes": nodes})


def settings_of(cluster: Cluster, *nodes: int) -> dict[str, EnvironmentVariable]:
    used = nodes or range(cluster.num_nodes)
    found = find_environment(cluster, tuple(rank_on(node, at) for at, node in enumerate(used)))
    assert all(one.reason for one in found)
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def values_of(cluster: Cluster, *nodes: int) -> dict[str, str]:
    return {name: one.value for name, one in settings_of(cluster, *nodes).items()}


def test_ports_that_all_carry_the_fabric_need_no_list() -> None:
    assert values_of(machines.h100_rails(2)) == {}


def test_storage_ports_are_left_out_by_exact_names_in_counting_order() -> None:
    mine = [*ports(0, 12, 400), Nic(name="mlx5_bond_0", bytes_per_s=100 * GBIT, rdma=True)]
    setting = settings_of(cluster_of("ib400", mine, mine))["NCCL_IB_HCA"]
    assert setting.value == "=" + ",".join(f"mlx5_{at}" for at in range(12))
    assert setting.reason == "12 ports of 400 Gb/s carry the fabric; mlx5_bond_0 do not"


def test_nodes_may_name_their_ports_differently() -> None:
    one = [*ports(0, 2, 400), *ports(8, 1, 100)]
    two = [*ports(4, 2, 400), *ports(9, 1, 100)]
    listed = values_of(cluster_of("ib400", one, two))["NCCL_IB_HCA"]
    assert listed == "=mlx5_0,mlx5_1,mlx5_4,mlx5_5"


def test_a_name_that_means_two_things_makes_no_list() -> None:
    one = [*ports(0, 2, 400), *ports(2, 1, 100)]
    two = [*ports(1, 2, 400), *ports(0, 1, 100)]
    assert "NCCL_IB_HCA" not in values_of(cluster_of("ib400", one, two))


def test_a_node_without_known_ports_makes_no_list() -> None:
    assert values_of(cluster_of("ib400", [*ports(0, 2, 400), *ports(2, 1, 100)], [])) == {}


def test_the_only_interface_is_the_one_to_meet_over() -> None:
    mine = [*ports(0, 2, 400), interface("ens3", 25)]
    found = settings_of(cluster_of("ib400", mine, mine))
    assert found["NCCL_SOCKET_IFNAME"].value == "=ens3"
    assert found["GLOO_SOCKET_IFNAME"].value == "ens3"  # gloo takes names as they are
    assert "only network interface" in found["GLOO_SOCKET_IFNAME"].reason
    assert "NCCL_IB_HCA" not in found


def test_of_two_interfaces_only_the_routes_know() -> None:
    mine = [*ports(0, 2, 400), interface("ens3", 25), interface("ens4", 25)]
    assert values_of(cluster_of("ib400", mine, mine)) == {}


def test_over_ethernet_the_interface_of_its_rate_is_taken() -> None:
    mine = [interface("eno1", 1), interface("ens5", 100)]
    assert values_of(cluster_of("eth100", mine, mine)) == {
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "=ens5",
        "GLOO_SOCKET_IFNAME": "ens5",
    }


def test_gloo_is_not_told_a_name_that_some_node_lacks() -> None:
    cluster = cluster_of("eth100", [interface("ens5", 100)], [interface("ens6", 100)])
    assert values_of(cluster) == {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "=ens5,ens6"}


def test_an_interface_that_is_slow_elsewhere_is_not_named() -> None:
    cluster = cluster_of(
        "eth100",
        [interface("ens5", 100), interface("ens6", 1)],
        [interface("ens6", 100)],
    )
    assert values_of(cluster) == {"NCCL_IB_DISABLE": "1"}


@pytest.mark.parametrize(
    ("fact", "name", "value"),
    [
        ("separate_rails", "NCCL_CROSS_NIC", "0"),
        ("sharp", "NCCL_COLLNET_ENABLE", "1"),
    ],
)
def test_rails_and_sharp_are_used_only_where_they_are(fact: str, name: str, value: str) -> None:
    cluster = machines.h100_rails(2)
    assert cluster.fabric is not None
    fabric = cluster.fabric.model_copy(update={fact: True})
    stated = cluster.model_copy(update={"fabric": fabric})
    assert values_of(stated) == {name: value}
    assert values_of(stated, 0) == {}  # one node does not use the fabric
    assert stated.fingerprint == cluster.fingerprint  # plans made before still fit
    ethernet = fabric.model_copy(update={"kind": "ethernet", "ports_per_node": 1})
    assert name not in values_of(cluster.model_copy(update={"fabric": ethernet}))


def test_overrides_for_debugging_are_never_made() -> None:
    mine = [*ports(0, 2, 400), *ports(2, 1, 100), interface("ens3", 25)]
    cluster = cluster_of("ib400", mine, mine)
    assert cluster.fabric is not None
    fabric = cluster.fabric.model_copy(update={"separate_rails": True, "sharp": True})
    assert set(values_of(cluster.model_copy(update={"fabric": fabric}))) == {
        "NCCL_IB_HCA",
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "NCCL_CROSS_NIC",
        "NCCL_COLLNET_ENABLE",
    }
