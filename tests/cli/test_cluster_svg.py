"""The picture of a cluster: whole, well-formed, readable on both papers."""

import re
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.topology import machines

from rankwright.cli import main
from rankwright.cli.cluster_page import print_cluster
from rankwright.cluster_svg import MAX_GPUS, cluster_svg, write_svg
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.link_classes import LINK_CLASSES, OTHER, LinkClass, link_class
from rankwright.planner.make_plan import make_plan
from rankwright.report import render_report
from rankwright.topology.cluster import Cluster, Fabric, Gpu, Link, Nic, Node
from rankwright.topology.shorthand import parse_cluster

SVG = "{http://www.w3.org/2000/svg}"


def alone(node: Node) -> Cluster:
    return Cluster(nodes=(node,))


def words_of(svg: str) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def titles_of(svg: str) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(svg).iter(f"{SVG}title")]


ALL = {
    "dgx-1": alone(machines.dgx1_v100()),
    "dgx-2": alone(machines.dgx2()),
    "dgx-a100": alone(machines.dgx_a100()),
    "rails": machines.h100_rails(),
    "a10": alone(machines.a10_two_sockets()),
    "a6000": alone(machines.a6000_bridged_pairs()),
    "cpu": parse_cluster("64xcpu"),
    "one": parse_cluster("1xl4"),
    "two kinds": parse_cluster("1x8xmi300x+2x4xl40s+eth100"),
}


@pytest.mark.parametrize("name", ALL)
def test_all_is_inside_the_picture(name: str) -> None:
    root = ElementTree.fromstring(cluster_svg(ALL[name]))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter(f"{SVG}rect"):
        x, y = float(box.get("x", "0")), float(box.get("y", "0"))
        assert x >= 0
        assert y >= 0
        assert x + float(box.attrib["width"]) <= width
        assert y + float(box.attrib["height"]) <= height
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= width
        assert 0 <= float(text.attrib["y"]) <= height


@pytest.mark.parametrize("name", ALL)
def test_it_needs_nothing_else(name: str) -> None:
    svg = cluster_svg(ALL[name])
    assert not re.search(r"href|src=|url\(|@import|<script", svg)
    assert re.findall(r"https?://\S+?\"", svg) == ['http://www.w3.org/2000/svg"']


def test_every_gpu_and_port_is_drawn() -> None:
    words = words_of(cluster_svg(ALL["rails"]))
    assert [word for word in words if word.startswith("GPU ")] == [f"GPU {at}" for at in range(8)]
    assert {f"mlx5_{at}" for at in range(8)} <= set(words)
    assert {"NUMA 0", "NUMA 1", "infiniband: 8 ports a node of 50 GB/s"} <= set(words)


def test_nvswitch_is_one_bar_and_a_cube_mesh_sixteen_arcs() -> None:
    assert "NV18: 450 GB/s each way" in words_of(cluster_svg(ALL["rails"]))
    arcs = [title for title in titles_of(cluster_svg(ALL["dgx-1"])) if " to GPU " in title]
    assert len(arcs) == 16
    assert "GPU 0 to GPU 3: NV2, 50 GB/s each way" in arcs


def test_sockets_and_switches_are_bars() -> None:
    words = words_of(cluster_svg(ALL["a10"]))
    assert words.count("PIX: 32 GB/s") == 4
    assert words.count("NODE: 32 GB/s") == 2
    assert words.count("SYS: 22 GB/s") == 1


def test_bars_and_frames_of_one_row_do_not_overlap() -> None:
    for cluster in ALL.values():
        root = ElementTree.fromstring(cluster_svg(cluster))
        rows: dict[float, list[tuple[float, float]]] = {}
        for box in root.iter(f"{SVG}rect"):
            if "x" in box.attrib and box.attrib["class"] != "rw-frame":
                left = float(box.attrib["x"])
                rows.setdefault(float(box.attrib["y"]), []).append(
                    (left, left + float(box.attrib["width"]))
                )
        for row in rows.values():
            for (_, end), (start, _) in pairwise(sorted(row)):
                assert end <= start


def test_cards_that_meet_stand_side_by_side() -> None:
    switches = {0: 0, 1: 1, 2: 0, 3: 1}
    node = machines.make_node(
        "l40s",
        dict.fromkeys(switches, 0),
        lambda a, b: "PIX" if switches[a] == switches[b] else "PHB",
    )
    words = [word for word in words_of(cluster_svg(alone(node))) if word.startswith("GPU ")]
    assert words == ["GPU 0", "GPU 2", "GPU 1", "GPU 3"]


def test_names_from_outside_cannot_break_the_picture() -> None:
    gpu = parse_cluster("1xl4").nodes[0].gpus[0].model_copy(update={"name": '<b>&"'})
    nic = Nic(name="</text><script>", bytes_per_s=1e9, rdma=False)
    svg = cluster_svg(alone(Node(name="a<b&c", gpus=(gpu,), nics=(nic,))))
    assert any(word.startswith("a<b&c") for word in words_of(svg))
    assert "<script" not in svg


def test_busy_and_split_gpus_stand_out() -> None:
    first, second = parse_cluster("2xl4").nodes[0].gpus
    gpus = (
        first.model_copy(update={"num_processes": 2}),
        second.model_copy(update={"mig": True}),
    )
    words = words_of(cluster_svg(alone(Node(name="n", gpus=gpus))))
    assert {"busy: 2 processes", "MIG"} <= set(words)


def test_more_gpus_than_fit_are_counted() -> None:
    words = words_of(cluster_svg(ALL["cpu"]))
    assert sum(word.startswith("rank ") for word in words) == MAX_GPUS
    assert "and 48 more" in words


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("one", [*LINK_CLASSES, OTHER], ids=lambda one: one.name)
def test_colours_can_be_told_from_both_papers(one: LinkClass) -> None:
    svg = cluster_svg(ALL["one"])
    light, dark = re.findall(r"\.rw-box\{fill:(#\w+)", svg)
    assert contrast(one.light, light) >= 3
    assert contrast(one.dark, dark) >= 3


def test_tokens_have_their_class() -> None:
    tokens = ("NV4", "XGMI", "SHM", "PXB", "NODE", "SOC", "C2C")
    names = [link_class(token).name for token in tokens]
    assert names == ["direct", "direct", "memory", "switch", "host", "socket", "other"]


def test_the_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "cluster.svg"
    write_svg(ALL["one"], path)
    assert path.read_text(encoding="utf-8") == cluster_svg(ALL["one"])
    assert list(tmp_path.iterdir()) == [path]


KINDS = st.sampled_from(["NV1", "NV4", "PIX", "PXB", "PHB", "NODE", "SYS", "SOC", "C2C", None])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(1, 9), num_nics=st.integers(0, 9))
def test_any_machine_can_be_drawn(data: st.DataObject, size: int, num_nics: int) -> None:
    domain = st.sampled_from([None, 0, 1, 5])
    gpus = tuple(
        Gpu(
            index=index,
            device="mystery",
            name="",
            memory_bytes=1,
            total_memory_bytes=1,
            numa_node=data.draw(domain),
        )
        for index in range(size)
    )
    kinds = [(pair, data.draw(KINDS)) for pair in combinations(range(size), 2)]
    links = tuple(
        Link(a=a, b=b, kind=kind, bytes_per_s=1e9, latency_s=1e-6)
        for (a, b), kind in kinds
        if kind is not None
    )
    nics = tuple(
        Nic(name=f"n{at}", bytes_per_s=1e9, rdma=True, numa_node=data.draw(domain))
        for at in range(num_nics)
    )
    fabric = Fabric(kind="roce", bytes_per_s=1e9, ports_per_node=1, latency_s=1e-6)
    node = Node(name="n", count=2, gpus=gpus, links=links, nics=nics)
    svg = cluster_svg(Cluster(nodes=(node,), fabric=fabric), paper=False)
    words = words_of(svg)
    assert sorted(word for word in words if word.startswith("GPU ")) == [
        f"GPU {index}" for index in range(size)
    ]
    assert sorted(word for word in words if re.fullmatch(r"n\d", word)) == [
        f"n{at}" for at in range(num_nics)
    ]


def test_probe_draws_the_machine_it_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "cluster.svg"
    assert main(["probe", "--svg", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().err
    assert words_of(path.read_text(encoding="utf-8"))


def test_the_report_shows_the_machines() -> None:
    plan = make_plan(
        read_model("HuggingFaceTB/SmolLM2-135M-Instruct"),
        parse_cluster("1x4xrtx4090+1x2xl4+ib100"),
        Workload(input_tokens=10, output_tokens=10),
    )
    page = render_report(plan)
    assert cluster_svg(plan.cluster, paper=False) in page
    assert "PHB: 32 GB/s" in page


def test_the_terminal_tree_names_domains_ports_and_islands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_cluster(ALL["dgx-1"])
    out = capsys.readouterr().out
    for words in ("NUMA 1", "mlx5_2: 12.5 GB/s, RDMA", "island of GPUs 0-7: NV1 NV2, 25 GB/s to"):
        assert words in out
    print_cluster(ALL["a6000"])
    assert "island of GPUs 0,3: NV4, 56.2 GB/s a pair" in capsys.readouterr().out
    print_cluster(parse_cluster("2xrtx4090"))
    assert "island" not in capsys.readouterr().out
