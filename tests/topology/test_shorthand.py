"""Shorthand for clusters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.topology.cluster import Cluster
from rankwright.topology.devices import DEVICES
from rankwright.topology.shorthand import format_shorthand, parse_cluster


def test_one_node_of_eight_nvswitch_gpus() -> None:
    cluster = parse_cluster("8xh100-sxm")
    assert (cluster.num_nodes, cluster.num_gpus, cluster.fabric) == (1, 8, None)
    node = cluster.nodes[0]
    assert len(node.links) == 28
    assert {(link.kind, link.bytes_per_s) for link in node.links} == {("NV18", 450e9)}
    assert node.gpus[3].total_memory_bytes == 81559 * 2**20
    assert cluster.source == "8xh100-sxm"


def test_two_nodes_have_one_port_for_each_gpu() -> None:
    cluster = parse_cluster("2x8xh200-sxm+ib400")
    assert (cluster.num_nodes, cluster.num_gpus) == (2, 16)
    assert len(cluster.nodes) == 1  # equal nodes are folded
    assert cluster.fabric is not None
    assert cluster.fabric.kind == "infiniband"
    assert cluster.fabric.bytes_per_s == 50e9
    assert cluster.fabric.ports_per_node == 8


@pytest.mark.parametrize(
    ("text", "kind", "bytes_per_s", "ports"),
    [
        ("2x8xh100-sxm+ib400x4", "infiniband", 50e9, 4),
        ("2x4xl40s+roce200", "roce", 25e9, 4),
        ("2x4xl40s+eth100", "ethernet", 12.5e9, 1),
        ("2x4xl40s+eth25x2", "ethernet", 3.125e9, 2),
    ],
)
def test_fabrics(text: str, kind: str, bytes_per_s: float, ports: int) -> None:
    fabric = parse_cluster(text).fabric
    assert fabric is not None
    assert (fabric.kind, fabric.bytes_per_s, fabric.ports_per_node) == (kind, bytes_per_s, ports)


def test_gpus_of_two_kinds_share_a_node() -> None:
    cluster = parse_cluster("2xrtx4090+2xrtx3090")
    assert [gpu.device for gpu in cluster.nodes[0].gpus] == ["rtx4090"] * 2 + ["rtx3090"] * 2
    assert [gpu.index for gpu in cluster.nodes[0].gpus] == [0, 1, 2, 3]
    assert {link.bytes_per_s for link in cluster.nodes[0].links} == {32e9}
    assert "PCIe" in cluster.notes[0]


def test_a_node_count_starts_a_new_kind_of_node() -> None:
    cluster = parse_cluster("2x8xh100-sxm+1x4xl40s+ib400")
    assert [(node.count, len(node.gpus)) for node in cluster.nodes] == [(2, 8), (1, 4)]
    assert cluster.node(2).gpus[0].device == "l40s"


def test_pcie_cards_meet_in_the_host_and_slow_down_between_sockets() -> None:
    links = parse_cluster("8xa100-pcie").nodes[0].links
    kinds = {(link.a, link.b): (link.kind, link.bytes_per_s) for link in links}
    assert kinds[0, 3] == ("PHB", 32e9)
    assert kinds[0, 4] == ("SYS", 22e9)
    assert kinds[4, 7] == ("PHB", 32e9)


def test_eight_v100_form_the_hybrid_cube_mesh_with_six_links_each() -> None:
    links = parse_cluster("8xv100-sxm2").nodes[0].links
    for gpu in range(8):
        counts = [
            int(link.kind[2:]) for link in links if link.kind != "SYS" and gpu in (link.a, link.b)
        ]
        assert sum(counts) == 6
    by_pair = {(link.a, link.b): link for link in links}
    assert by_pair[0, 3].bytes_per_s == 50e9
    assert by_pair[0, 5].kind == "SYS"


def test_amd_gpus_share_their_rate_among_seven_peers() -> None:
    links = parse_cluster("8xmi300x").nodes[0].links
    assert {(link.kind, link.bytes_per_s) for link in links} == {("XGMI", 64e9)}


def test_cpu_ranks_share_memory_of_their_machine() -> None:
    cluster = parse_cluster("4xcpu")
    node = cluster.nodes[0]
    assert node.num_cpus == 4
    assert node.host_memory_bytes == 16 * 2**30
    assert {link.kind for link in node.links} == {"SHM"}


def test_machines_of_one_rack_need_no_fabric() -> None:
    cluster = parse_cluster("18x4xgb200")
    assert cluster.racks is not None
    assert cluster.racks.nodes == 18
    assert cluster.bandwidth([(0, 0), (17, 3)]) == cluster.bandwidth([(0, 0), (0, 1)])
    assert any("no network beside it was given" in note for note in cluster.notes)
    with pytest.raises(ValueError, match="nothing between"):
        parse_cluster("19x4xgb200")


def test_a_mesh_of_nvlinks_is_not_called_pcie_cards() -> None:
    assert parse_cluster("8xv100-sxm2").notes == ()
    assert "PCIe cards" in parse_cluster("2xl4").notes[0]


def test_sixteen_thousand_gpus_are_one_row() -> None:
    cluster = parse_cluster("2048x8xh100-sxm+ib400")
    assert cluster.num_gpus == 16384
    assert len(cluster.nodes) == 1
    assert len(cluster.model_dump_json()) < 20_000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8xh100-smx", "unknown device 'h100-smx'.*h100-sxm"),
        ("2x8xh100-sxm", r"nothing between them.*\+ib400"),
        ("8h100", "cannot read '8h100'"),
        ("h100-sxm", "cannot read 'h100-sxm'; a count is missing, as in 1xh100-sxm"),
        ("", "cannot read ''"),
        ("8xh100-sxm+", "cannot read ''"),
        ("8xh100-sxm+ib", "cannot read 'ib'"),
        ("ib400+8xh100-sxm", "only stand last"),
        ("0xh100-sxm", "at least one"),
        ("0x8xh100-sxm+ib400", "at least one"),
        ("16xh100-sxm", "at most 8.*2x8xh100-sxm"),
        ("100000xl40s", "at most 32"),
        ("9999999xcpu", "at most 512"),
        ("20xl40s+20xl4", "40 GPUs in one node"),
        ("2xcpu+2xl4", "do not mix"),
        ("2x8xh100-sxm+ib0", "at least 1 of each"),
        ("2x8xh100-sxm+ib400x0", "at least 1 of each"),
        ("-1xh100-sxm", "cannot read"),
        ("9" * 5000 + "xh100-sxm", "cannot read"),
    ],
)
def test_bad_text_is_refused_in_one_line_that_names_it(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_cluster(text)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is ValueError


SMALL = sorted(key for key, device in DEVICES.items() if device.vendor != "cpu")
nodes = st.lists(st.tuples(st.integers(1, 8), st.sampled_from(SMALL)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=50)
@given(
    kinds=st.lists(st.tuples(st.integers(1, 3000), nodes), min_size=1, max_size=3),
    fabric=st.sampled_from(["ib400x8", "roce200x4", "eth100x1"]),
)
def test_shorthand_survives_the_round_trip(
    kinds: list[tuple[int, list[tuple[int, str]]]], fabric: str
) -> None:
    words = []
    expected = []
    for count, parts in kinds:
        numbers = {device: number for number, device in parts}  # one part a device
        runs = [f"{number}x{device}" for device, number in numbers.items()]
        words.append(f"{count}x" + "+".join(runs))
        expected.append((count, sum(numbers.values())))
    cluster = parse_cluster("+".join([*words, fabric]))
    assert [(node.count, len(node.gpus)) for node in cluster.nodes] == expected
    again = parse_cluster(format_shorthand(cluster))
    assert again.model_copy(update={"source": ""}) == cluster.model_copy(update={"source": ""})
    assert again.fingerprint == cluster.fingerprint
    assert Cluster.model_validate_json(cluster.model_dump_json()) == cluster


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_cluster_or_one_line_of_error(text: str) -> None:
    message = ""
    try:
        parse_cluster(text)
    except ValueError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
