"""`amd-smi` in all forms that it has had: tables, two kinds of JSON, text and the plain table."""

import json
from typing import Any, cast

import pytest
from tests.topology.captures import AMD_STATIC, AMD_TABLE, AMD_TOPOLOGY, IBSTAT

from rankwright.topology.captures import describe_topology_text, probe_from_text
from rankwright.topology.errors import ProbeError, find_failure
from rankwright.topology.readers.amd_smi_gpus import hip_numbers, parse_amd_listing

BUSES = ["0000:0c:00.0", "0000:22:00.0", "0001:38:00.0"]
KINDS = [["SELF", "XGMI", "PCIE"], ["XGMI", "SELF", "XGMI"], ["PCIE", "XGMI", "SELF"]]
MATRIX = [["X" if cell == "SELF" else cell for cell in row] for row in KINDS]
WEIGHT = [[0, 15, 72], [15, 0, 30], [72, 30, 0]]
HOPS = [[0, 1, 3], [1, 0, 1], [3, 1, 0]]
MIB = 2**20

Page = dict[str, Any]


def new_json() -> list[Page]:
    """Return the JSON since ROCm 6.2."""
    return [
        {
            "gpu": a,
            "bdf": bus,
            "links": [
                {
                    "gpu": b,
                    "bdf": other,
                    "weight": WEIGHT[a][b],
                    "link_status": "DISABLED" if {a, b} == {0, 2} else "ENABLED",
                    "link_type": KINDS[a][b],
                    "num_hops": HOPS[a][b],
                    "bandwidth": "N/A",
                }
                for b, other in enumerate(BUSES)
            ],
        }
        for a, bus in enumerate(BUSES)
    ]


def old_json() -> list[Page]:
    """Return the JSON of ROCm 6.0 and 6.1."""

    def row(cells: list[Any]) -> Page:
        return {f"gpu_{gpu}": cell for gpu, cell in enumerate(cells)}

    return [
        {
            "gpu": gpu,
            "link_accessibility": row(["ENABLED"] * 3),
            "weight": row(WEIGHT[gpu]),
            "hops": row(HOPS[gpu]),
            "link_type": row(KINDS[gpu]),
            "numa_bandwidth": row(["N/A"] * 3),
        }
        for gpu in range(3)
    ]


def static_json() -> list[Page]:
    return [
        {
            "gpu": gpu,
            "asic": {"market_name": "AMD Instinct MI300X", "oam_id": "N/A"},
            "bus": {"bdf": bus, "max_pcie_width": 16, "pcie_interface_version": "Gen 5"},
            "vram": {"type": "HBM3", "size": {"value": 196592, "unit": "MB"}},
            "numa": {"node": gpu // 2, "affinity": gpu // 2},
        }
        for gpu, bus in enumerate(BUSES)
    ]


def metric_json() -> list[Page]:
    return [
        {"gpu": gpu, "mem_usage": {"used_vram": {"value": 592, "unit": "MB"}}} for gpu in range(3)
    ]


def described(text: str) -> Page:
    page = cast("Page", describe_topology_text(text))
    assert "error" not in page, page
    return page


def refusal_of(text: str) -> str:
    return str(cast("Page", describe_topology_text(text))["error"]["message"])


@pytest.mark.parametrize(
    "text",
    [
        AMD_TOPOLOGY,
        f"$ amd-smi topology --json\n{json.dumps(new_json(), indent=4)}\n",
        json.dumps({"gpu_data": new_json()}, indent=4),
        json.dumps(new_json()),
        json.dumps(old_json(), indent=4),
    ],
    ids=["tables", "json", "gpu_data", "one line", "old json"],
)
def test_links_are_read_alike_from_every_form(text: str) -> None:
    page = described(text)
    assert page["kind"] == "amd_smi_topology"
    assert page["matrix"] == MATRIX
    assert page["gpu_names"] == ["GPU0", "GPU1", "GPU2"]
    assert page["weight"] == [[str(cell) for cell in row] for row in WEIGHT]
    assert page["hops"] == [[str(cell) for cell in row] for row in HOPS]
    assert page["bus_ids"] == (BUSES if "bdf" in text or "TABLE" in text else [None] * 3)


def test_tables_that_were_not_asked_for_are_none() -> None:
    some = [
        {
            **row,
            "links": [{k: link[k] for k in ("gpu", "bdf", "link_type")} for link in row["links"]],
        }
        for row in new_json()
    ]
    page = described(json.dumps(some))
    assert (page["matrix"], page["weight"], page["access"]) == (MATRIX, None, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (AMD_TOPOLOGY.replace("72           30           0", "72           30"), "2 cells"),
        (AMD_TOPOLOGY.replace("15           0 ", "16           0 "), "'15' to GPU1, but '16'"),
        (AMD_TOPOLOGY.replace("XGMI         SELF", "XGMI         XGMI"), "to itself"),
        (AMD_TOPOLOGY.replace("SELF         XGMI", "SELF         XMGI"), "cells of its LINK TYPE"),
        (AMD_TOPOLOGY.replace("0000:22:00.0 15 ", "0000:23:00.0 15 "), "but rows GPU0, 0000:23"),
        (AMD_TOPOLOGY + AMD_TOPOLOGY, "the same table twice"),
        (
            AMD_TOPOLOGY.replace(
                "HOPS TABLE:\n             0000:0c:00.0", "HOPS TABLE:\n             0000:0d:00.0"
            ),
            "a table of other GPUs",
        ),
        (json.dumps(new_json()[:2]), "3 links, and 2 GPUs"),
        (json.dumps(new_json()[1:]), "expected GPUs 0 to 1"),
        (json.dumps(old_json()[:2]), "3 GPUs, where 2 are listed"),
        (json.dumps(new_json()).replace("XGMI", "NVLINK"), "link_type has"),
        (json.dumps(new_json()).replace('"gpu": 2, "bdf": "0001', '"gpu": 7, "bdf": "0001'), ""),
    ],
)
def test_links_that_contradict_themselves_are_refused(text: str, says: str) -> None:
    assert says in refusal_of(text)


def test_one_link_the_other_way_is_refused_in_json_as_well() -> None:
    rows = new_json()
    rows[0]["links"][1]["link_type"] = "PCIE"
    assert "'PCIE' to GPU1, but 'XGMI' the other way" in refusal_of(json.dumps(rows))
    del rows[0]["links"][1]["link_type"]
    assert "2 cells for 3 columns" in refusal_of(json.dumps(rows))


@pytest.mark.parametrize("text", [AMD_STATIC, json.dumps(static_json()), AMD_TABLE])
def test_gpus_are_listed_from_text_json_and_the_plain_table(text: str) -> None:
    page = described(text)
    assert page["kind"] == "amd_smi_static"
    assert page["n_gpus"] == 3
    assert page["complete"]
    assert {gpu["name"] for gpu in page["gpus"]} == {"AMD Instinct MI300X"}
    assert [gpu["bus_id"] for gpu in page["gpus"]] == BUSES
    assert {gpu["memory_total_mib"] for gpu in page["gpus"]} == {196592}


def test_numa_and_pcie_are_read_and_missing_ones_are_none() -> None:
    first, second, _ = parse_amd_listing(AMD_STATIC)
    assert (first.numa_node, first.pcie_width, first.pcie_generation) == (1, 16, 5)
    assert (second.numa_node, second.pcie_width, second.pcie_generation) == (None, None, None)


@pytest.mark.parametrize("static", [AMD_STATIC, json.dumps(static_json(), indent=4)])
def test_links_and_names_become_a_cluster(static: str) -> None:
    cluster = probe_from_text(AMD_TOPOLOGY + static + "\n" + json.dumps(metric_json()))
    assert cluster.describe() == "3 x mi300x"
    node = cluster.nodes[0]
    assert [link.kind for link in node.links] == ["XGMI", "SYS", "XGMI"]
    assert {gpu.total_memory_bytes for gpu in node.gpus} == {196592 * MIB}
    assert {gpu.memory_bytes for gpu in node.gpus} == {196000 * MIB}
    assert any(note.startswith("1 pairs of GPUs have no XGMI link") for note in cluster.notes)
    assert any("cannot reach each other's memory" in note for note in cluster.notes)


def test_gpus_have_the_numbers_that_hip_takes() -> None:
    """amd-smi numbers by PCI address; a launch names GPUs as HIP does."""
    assert hip_numbers(AMD_TABLE) == {0: 2, 1: 0, 2: 1}
    cluster = probe_from_text(AMD_TOPOLOGY + AMD_TABLE)
    assert {(link.a, link.b): link.kind for link in cluster.nodes[0].links} == {
        (0, 1): "XGMI",
        (0, 2): "XGMI",
        (1, 2): "SYS",
    }
    free = {gpu.index: gpu.memory_bytes for gpu in cluster.nodes[0].gpus}
    assert free[2] == 196000 * MIB
    assert any("HIP's numbers" in note for note in cluster.notes)
    assert hip_numbers(AMD_TABLE.replace("|   2       1 ", "|   2       0 ")) == {}
    listed = '[{"gpu": 0, "hip_id": 1}, {"gpu": 1, "hip_id": 0}]'
    others = '[{"gpu": 0, "numa": {"node": 0}}, {"gpu": 1, "numa": {"node": 1}}]'
    for text in (listed, f"{listed}\n{others}", f"{others}\n{listed}"):
        assert hip_numbers(text) == {0: 1, 1: 0}


def test_ports_listed_beside_links_are_those_of_the_node() -> None:
    (node,) = probe_from_text(AMD_TOPOLOGY + AMD_STATIC + IBSTAT).nodes
    assert [nic.name for nic in node.nics] == ["mlx5_0", "mlx4_0:2"]


def test_odd_links_are_refused() -> None:
    page = describe_topology_text('[{"gpu":0,"links":[{"gpu":[]}]}, {"gpu":1,"links":[]}]')
    assert "error" in page


def test_links_without_names_or_of_another_machine_are_no_cluster() -> None:
    with pytest.raises(ValueError, match="3 GPUs are linked but names 0"):
        probe_from_text(AMD_TOPOLOGY)
    with pytest.raises(ProbeError, match="GPU 1 is at 0000:23:00"):
        probe_from_text(AMD_TOPOLOGY + AMD_STATIC.replace("0000:22", "0000:23"))
    with pytest.raises(ProbeError, match="market_name was 'AMD Instinct MI300X' before"):
        probe_from_text(AMD_TOPOLOGY + AMD_STATIC + AMD_STATIC.replace("MI300X", "MI325X"))


def test_documents_that_are_no_json_of_amd_smi_are_passed_over() -> None:
    odd = '[\n[1]\n{"gpu_data": 7}\n[{"gpu": true, "asic": {}}]\n{"gpu": "x", "bdf": 1}\n[{"gpu":\n'
    assert described(odd + AMD_TOPOLOGY)["matrix"] == MATRIX


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("RuntimeError: WARNING: User is missing the following required groups: render", "no_perm"),
        ("Permission needed to access required GPU device node(s):", "no_permission"),
        ("ERROR:root:Unable to detect any GPU devices, check amdgpu version", "no_devices"),
        ("bash: amd-smi: command not found", "tool_not_found"),
    ],
)
def test_failures_of_the_tool_are_named(said: str, kind: str) -> None:
    failure = find_failure(said)
    assert failure is not None
    assert failure.kind.startswith(kind)
