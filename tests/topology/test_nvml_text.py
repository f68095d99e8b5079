"""NVML and the text of nvidia-smi tell the same of the machine that the tests run on."""

from itertools import combinations

import pytest

from rankwright.topology.captures import probe_from_text
from rankwright.topology.cluster import Cluster
from rankwright.topology.device_table import MIB
from rankwright.topology.link_kinds import nvlink_count
from rankwright.topology.readers.assemble import make_cluster
from rankwright.topology.readers.nvidia_smi import parse_topo_m
from rankwright.topology.readers.nvidia_smi_query import list_names
from rankwright.topology.readers.nvidia_smi_tool import read_nvidia_smi, run_smi
from rankwright.topology.readers.nvlink_status import is_nvlink_status, parse_nvlink_status
from rankwright.topology.readers.nvml import read_nvml

pytestmark = pytest.mark.gpu

# What processes that come and go may free or take between the two readings.
_FREE_MEMORY_BYTES = 64 * MIB


@pytest.fixture(scope="module")
def by_nvml() -> Cluster:
    return make_cluster(read_nvml(), "test")


@pytest.fixture(scope="module")
def by_text() -> Cluster:
    return make_cluster(read_nvidia_smi(), "test")


def test_both_see_the_same_gpus(by_nvml: Cluster, by_text: Cluster) -> None:
    ours, theirs = by_nvml.nodes[0], by_text.nodes[0]
    assert len(ours.gpus) == len(theirs.gpus)
    assert ours.driver == theirs.driver
    for a, b in zip(ours.gpus, theirs.gpus, strict=True):
        for field in (
            *("index", "device", "name", "uuid", "compute_capability", "mig"),
            *("pcie_generation", "pcie_width"),
        ):
            assert getattr(a, field) == getattr(b, field), f"GPU {a.index}: {field}"
        assert a.total_memory_bytes // MIB == b.total_memory_bytes // MIB
        assert abs(a.memory_bytes - b.memory_bytes) <= _FREE_MEMORY_BYTES


def test_both_see_the_same_links(by_nvml: Cluster, by_text: Cluster) -> None:
    if by_nvml.num_gpus < 2:
        pytest.skip("needs two GPUs")
    assert by_nvml.nodes[0].links == by_text.nodes[0].links
    matrix = parse_topo_m(run_smi("topo", "-m")).matrix
    kinds = {(link.a, link.b): link.kind for link in by_nvml.nodes[0].links}
    assert {(a, b): matrix[a][b] for a, b in combinations(range(len(matrix)), 2)} == kinds


def test_both_see_the_same_numa_nodes(by_nvml: Cluster) -> None:
    printed = parse_topo_m(run_smi("topo", "-m")).numa_affinity
    if printed is None:
        pytest.skip("this nvidia-smi prints no NUMA affinity")
    for gpu, cell in zip(by_nvml.nodes[0].gpus, printed, strict=True):
        domain = int(cell) if cell is not None and cell.isdecimal() else None
        assert gpu.numa_node == domain, f"GPU {gpu.index}: nvidia-smi prints {cell!r}"


def test_the_list_names_the_same_gpus(by_nvml: Cluster) -> None:
    listed = [(gpu.index, gpu.name, gpu.uuid) for gpu in list_names(run_smi("-L"))]
    assert listed == [(gpu.index, gpu.name, gpu.uuid) for gpu in by_nvml.nodes[0].gpus]


def test_a_capture_of_list_and_table_gives_the_same_links(by_nvml: Cluster) -> None:
    captured = probe_from_text(run_smi("-L") + run_smi("topo", "-m"))
    ours = [(link.a, link.b, link.kind) for link in by_nvml.nodes[0].links]
    assert [(link.a, link.b, link.kind) for link in captured.nodes[0].links] == ours
    assert [gpu.device for gpu in captured.nodes[0].gpus] == [
        gpu.device for gpu in by_nvml.nodes[0].gpus
    ]


def test_as_many_nvlinks_are_active(by_nvml: Cluster) -> None:
    text = run_smi("nvlink", "--status")
    if not is_nvlink_status(text):
        pytest.skip(f"nvidia-smi nvlink --status says only {text.strip()[:80]!r}")
    active = {
        gpu.index: sum("inactive" not in speed.lower() for _, speed in gpu.links)
        for gpu in parse_nvlink_status(text)
    }
    most: dict[int, int] = {}
    for link in by_nvml.nodes[0].links:
        for index in (link.a, link.b):
            most[index] = max(most.get(index, 0), nvlink_count(link.kind))
    for index, count in most.items():
        # Through a switch each pair has all of a GPU's links; bridged pairs have a part.
        assert count <= active[index]
        assert (count > 0) == (active[index] > 0)
