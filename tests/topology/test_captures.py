"""Captures of every kind: made up and known by hand, real ones with labels, and damaged ones."""

import json
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.topology.captures import (
    IBSTAT,
    LSPCI,
    NCCL_XML,
    NVLINK_STATUS,
    QUERY,
    ROCM_NAMES,
    ROCM_TABLE,
    ROCM_TOPO,
    SAMPLES,
    SMI_L,
    SMI_Q,
    SMI_TABLE,
    TOPO_M,
    TOPO_P2P,
    xml_gpu,
)

from rankwright.topology.captures import KINDS, describe_topology_text, probe_from_text
from rankwright.topology.errors import ProbeError
from rankwright.topology.readers.nvidia_smi_log import parse_smi_log

CORPUS = Path(__file__).parents[2] / ".." / "shared" / "reference" / "topology"
NUM_EXAMPLES = int(os.environ.get("RANKWRIGHT_FUZZ_EXAMPLES", "300"))

Page = dict[str, Any]


def described(text: str) -> Page:
    page = cast("Page", describe_topology_text(text))
    assert "error" not in page, page
    json.dumps(page)
    return page


def refusal_of(text: str) -> tuple[str, str]:
    error = cast("Page", describe_topology_text(text))["error"]
    return error["class"], error["message"]


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_kind_is_told_from_the_content(kind: str) -> None:
    assert described(SAMPLES[kind])["kind"] == kind
    assert described(SAMPLES[kind].replace("\n", "\r\n"))["kind"] == kind


def test_every_kind_has_a_sample() -> None:
    assert {kind.name for kind in KINDS} == set(SAMPLES)


def test_peer_access_is_read_with_and_without_blanks_and_header() -> None:
    matrix = [["X", "OK", "CNS"], ["OK", "X", "CNS"], ["CNS", "CNS", "X"]]
    page = described(TOPO_P2P)
    assert (page["n_rows"], page["matrix"], page["complete"]) == (3, matrix, True)
    assert page["gpu_names"] == ["GPU0", "GPU1", "GPU2"]
    glued = "GPU0 GPU1 GPU2\nGPU0 XOKCNS\nGPU1 OKXCNS\nGPU2 CNSCNSX\n"
    assert described(glued)["matrix"] == matrix
    quoted = TOPO_P2P.replace(" GPU", "> GPU").replace(" \tGPU0", "> \tGPU0")
    assert described(quoted)["matrix"] == matrix
    first = described("GPU0  X  CNS  CNS\nCNS = Chipset not supported\n")
    assert (first["n_rows"], first["matrix"], first["complete"]) == (
        1,
        [["X", "CNS", "CNS"]],
        False,
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (" GPU2\tCNS\tCNS\tX\t\n", "", "rows GPU0, GPU1"),
        ("GPU1\tOK", "GPU1\tNS", "line 2"),
        ("GPU1\tOK\tX", "GPU1\tOK\tOK", "'OK' to itself"),
        ("GPU2\tCNS\tCNS\tX", "GPU2\tCNS\tX", "2 cells for 3 columns"),
        ("GPU1\tOK\tX\tCNS", "GPU1\tOK\tX\t??", "line 3"),
    ],
)
def test_a_peer_table_that_is_not_square_and_symmetric_is_refused(
    old: str, new: str, says: str
) -> None:
    assert old in TOPO_P2P
    kind, message = refusal_of(TOPO_P2P.replace(old, new))
    assert kind == "inconsistent_topology"
    assert says in message


def test_nvlink_status_is_read_link_by_link() -> None:
    page = described(NVLINK_STATUS)
    assert page["gpus"] == [
        {
            "gpu": 0,
            "name": "NVIDIA RTX A6000",
            "links": {"0": "14.062 GB/s", "1": "<inactive>"},
            "message": None,
        },
        {
            "gpu": 1,
            "name": "NVIDIA RTX A6000",
            "links": {},
            "message": "NVML: Unable to retrieve NVLink information as all links are inActive",
        },
    ]
    for broken in (
        NVLINK_STATUS.replace("14.062 GB/s", "14.0"),
        NVLINK_STATUS.replace("Link 1", "Link 0"),
        NVLINK_STATUS.replace("GPU 1", "GPU 0"),
    ):
        assert refusal_of(broken)[0] == "inconsistent_topology"


@pytest.mark.parametrize("gap", ["\t [...]\n", "\t ...\n", ""])
def test_links_between_which_lines_are_left_out_are_refused(gap: str) -> None:
    """As people quote them: 18 links must not become two."""
    text = f"GPU 0: NVIDIA H100\n\t Link 0: 26.562 GB/s\n{gap}\t Link 17: 26.562 GB/s\n"
    assert "link 0 goes before: lines are cut" in refusal_of(text)[1]


def test_a_board_in_mig_mode_without_memory_keeps_its_power_limit() -> None:
    text = SMI_TABLE.replace("55MiB / 143771MiB", "              N/A")
    first = described(text)["gpus"][0]
    assert (first["memory_total_bytes"], first["power_limit_w"]) == (None, 700.0)


def test_the_driver_is_named_without_the_remark_of_newer_ones() -> None:
    remark = "580.95.05 [Deprecated; use KMD Version]\nKMD Version               : 580.95.05"
    page = described(SMI_Q.replace("580.95.05", remark, 1))
    assert page["gpus"][0]["driver"] == "580.95.05"


def test_two_blanks_before_an_identity_are_no_part_of_the_name() -> None:
    assert described("GPU 0: NVIDIA Thor  (UUID: 54d0-1)\n")["gpus"][0]["name"] == "NVIDIA Thor"


def test_lists_of_gpus_are_read_in_order() -> None:
    gpus = described(QUERY)["gpus"]
    assert [(gpu["index"], gpu["ecc"], gpu["memory_total_mib"]) for gpu in gpus] == [
        (0, False, 23034),
        (1, True, 23034),
    ]
    assert "3 cells" in refusal_of(QUERY.replace("1, NVIDIA L4, 23034 MiB, 1 MiB,", "1,"))[1]
    gpus = described(SMI_L)["gpus"]
    assert [len(gpu["mig_devices"]) for gpu in gpus] == [2, 0]
    assert refusal_of(SMI_L[:-4])[1].startswith("line 4")


def test_the_log_of_everything_is_read_by_section() -> None:
    page = described(SMI_Q)
    assert (page["n_gpus"], page["attached_gpus"], page["complete"]) == (2, 2, True)
    first, second = page["gpus"]
    assert first["name"] == second["name"] == "NVIDIA H100 80GB HBM3"
    assert (first["pcie_generation"], first["pcie_width"]) == (5, 16)
    assert (first["mig"], first["ecc"], first["power_limit_w"]) == (False, True, 650)
    assert (first["num_processes"], second["num_processes"]) == (1, 0)
    assert first["memory_free_bytes"] == 81000 * 2**20
    one = described(SMI_Q.split("GPU 00000000:3B")[0])
    assert (one["complete"], one["gpus"][0]["index"]) == (False, None)


@pytest.mark.parametrize("title", ["GPU Power Readings", "Power Readings"])
def test_a_log_says_what_limit_a_gpu_came_with(title: str) -> None:
    limit = "        Current Power Limit               : 650.00 W\n"
    default = limit.replace("Current", "Default").replace("650", "700")
    log = SMI_Q.replace(limit, limit + default).replace("GPU Power Readings", title)
    assert SMI_Q.count(limit) >= 1
    gpus = parse_smi_log(log.replace("Current Power", "Power") if title[0] == "P" else log).gpus
    assert (gpus[0].power_limit_w, gpus[0].default_power_limit_w) == (650, 700)


def test_the_plain_tables_are_read() -> None:
    first, second = described(SMI_TABLE)["gpus"]
    assert (first["name"], first["mig"], first["ecc"]) == ("NVIDIA H200", True, True)
    assert (second["name"], second["mig"], second["ecc"]) == (
        "NVIDIA RTX 6000 Ada Gene...",
        None,
        False,
    )
    assert (second["num_processes"], second["power_limit_w"]) == (1, 300)
    assert second["memory_free_bytes"] == (49140 - 20322) * 2**20
    assert described(SMI_TABLE)["complete"]
    assert not described(SMI_TABLE.replace("|   1  NVIDIA", "|   2  NVIDIA"))["complete"]
    assert "line 13" in refusal_of(SMI_TABLE.replace("|   1  NVIDIA", "|   0  NVIDIA"))[1]
    page = described(ROCM_TABLE)
    assert [gpu["name"] for gpu in page["gpus"]] == ["AMD Instinct MI300X"] * 3


def test_rocm_tables_are_read_and_become_a_cluster_with_names() -> None:
    page = described(ROCM_TOPO)
    assert page["n_gpus"] == 3
    assert page["weight"][2] == ["72", "40", "0"]
    assert page["hops"][0] == ["0", "1", "3"]
    assert page["matrix"][0] == ["X", "XGMI", "PCIE"]
    assert (page["numa_node"], page["numa_affinity"]) == (["0", "0", "1"], ["0", "0", "-1"])
    for names in (ROCM_NAMES, ROCM_TABLE):
        node = probe_from_text(names + ROCM_TOPO).nodes[0]
        assert [gpu.device for gpu in node.gpus] == ["mi300x"] * 3
        assert [gpu.numa_node for gpu in node.gpus] == [0, 0, 1]
        assert [(link.a, link.b, link.kind) for link in node.links] == [
            (0, 1, "XGMI"),
            (0, 2, "SYS"),
            (1, 2, "PHB"),
        ]
    with pytest.raises(ValueError, match="add the output of `rocm-smi --showproductname`"):
        probe_from_text(ROCM_TOPO)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("GPU1   15 ", "GPU1   40 ", "'15' to GPU1, but '40' the other way (line 5)"),
        ("GPU2   PCIE         PCIE         0\n", "", "rows GPU0, GPU1"),
        ("GPU2   3            2 ", "GPU2   x            2 ", "line 12"),
        ("GPU[1]\t\t: (Topology) Numa Node: 0\n", "", "given for GPUs [0, 2]"),
    ],
)
def test_a_rocm_table_that_contradicts_itself_is_refused(old: str, new: str, says: str) -> None:
    assert old in ROCM_TOPO
    kind, message = refusal_of(ROCM_TOPO.replace(old, new, 1))
    assert kind == "inconsistent_topology"
    assert says in message


def test_devices_below_one_switch_share_its_path() -> None:
    page = described(LSPCI)
    assert [gpu["bus_id"] for gpu in page["gpus"]] == ["0000:63:00.0", "0000:01:00.0"]
    assert page["gpus"][0]["path"] == ("0000:60", "61", "62", "63")
    assert page["nics"] == ["0000:65:00.0", "0000:65:00.1"]
    assert page["nic_devices"][1]["path"] == ("0000:60", "61", "62", "65")
    assert refusal_of(LSPCI.replace("-[65]--+-", "-[65]----"))[0] == "inconsistent_topology"


def test_a_capture_with_ports_gives_them_to_the_node() -> None:
    names = "".join(f"GPU {i}: NVIDIA H100 NVL (UUID: GPU-{i})\n" for i in range(3))
    cluster = probe_from_text(names + TOPO_M + IBSTAT)
    assert [(nic.name, nic.bytes_per_s) for nic in cluster.nodes[0].nics] == [
        ("mlx5_0", 50e9),
        ("mlx4_0:2", 7e9),
    ]
    assert cluster.notes == ("network port mlx4_0:1 is down and left out",)


def test_names_may_come_from_the_log() -> None:
    two = TOPO_M.replace("\tSYS\tPIX", "\tPIX").replace("\tSYS\tSYS", "\tSYS").replace("GPU2\t", "")
    two = "\n".join(line for line in two.split("\n") if not line.startswith("SYS"))
    two = two.replace("NIC0\tPIX\tSYS\t X", "NIC0\tPIX\tSYS\t X")
    cluster = probe_from_text(SMI_Q + two)
    assert cluster.describe() == "2 x h100-sxm"
    assert cluster.nodes[0].links[0].kind == "NV4"


def corpus() -> list[Page]:
    index = CORPUS / "index.jsonl"
    if not index.is_file():
        return []
    return [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]


def read_corpus(entry: Page) -> str:
    return (CORPUS / entry["file"]).read_bytes().decode("utf-8", errors="replace")


def mismatch(entry: Page) -> str | None:
    """Say how a real capture is read otherwise than labelled; None if it is not."""
    page = cast("Page", describe_topology_text(read_corpus(entry)))
    label: Page = entry["label"] or {}
    if entry["kind"] == "error":
        found = page.get("error", {}).get("class")
        return None if found == entry["expected_error"] else f"{found}"
    if entry["kind"] == "topo_m" and label["gpu_links"] is None:  # marked as unreadable
        return None if page.get("error", {}).get("class") == "inconsistent_topology" else "read"
    if page.get("kind") != entry["kind"]:
        return f"{page.get('kind') or page['error']}"
    if entry["kind"] == "topo_m":
        label = {
            "matrix": label["gpu_links"],
            "gpu_names": label["gpu_names"],
            "nics": label["nic_names"],
            "cpu_affinity": label["cpu_affinity"],
            "numa_affinity": label["numa_affinity"],
        }
    wrong = [key for key, value in label.items() if page[key] != value]
    return f"{wrong}" if wrong else None


def test_every_real_capture_is_read_as_labelled() -> None:
    entries = corpus()
    if not entries:
        pytest.skip(f"the corpus of real outputs is not at {CORPUS}")
    counts: dict[str, list[int]] = {}
    wrong: dict[str, str] = {}
    for entry in entries:
        found = mismatch(entry)
        if found is not None:
            wrong[entry["file"]] = found
        count = counts.setdefault(entry["kind"], [0, 0])
        count[0] += found is None
        count[1] += 1
    print("; ".join(f"{kind}: {good} of {all_}" for kind, (good, all_) in counts.items()))
    assert not wrong


def texts() -> list[str]:
    real = [read_corpus(entry) for entry in corpus()]
    return [*SAMPLES.values(), ROCM_NAMES + ROCM_TOPO, SMI_L + TOPO_M, *real]


def mutations(text: str, rng: random.Random) -> Iterator[str]:
    """Give the text damaged once in each way that captures are."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    column = rng.randrange(12)
    yield "\n".join(" ".join(w for i, w in enumerate(r.split()) if i != column) for r in lines)
    yield "\n".join(lines[:at] + lines[at + rng.randrange(1, 4) :])  # lost lines
    yield "\n".join([*lines[:at], lines[at][: rng.randrange(len(lines[at]) + 1)], *lines[at + 1 :]])
    yield text[: rng.randrange(len(text) + 1)]
    yield "\n".join([*lines[:at], lines[at], *lines[at:]])  # a line twice
    swapped = lines.copy()
    other = rng.randrange(len(lines))
    swapped[at], swapped[other] = swapped[other], swapped[at]
    yield "\n".join(swapped)
    where = rng.randrange(len(text) + 1)
    noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8)))
    yield text[:where] + noise.decode("latin-1") + text[where + rng.randrange(4) :]
    yield text.replace(rng.choice(["\t", " ", "  ", "X", "GPU", "\n", ":", "-"]), "")
    yield "".join(char for char in text if rng.random() > 0.002)


def check(text: str, original: Page) -> None:
    page = cast("Page", describe_topology_text(text))
    assert ("error" in page) != ("kind" in page)
    json.dumps(page)
    matrix = page.get("matrix")
    if matrix is not None:
        size = len(matrix)
        if page.get("complete", True):
            assert len(page["gpu_names"]) == size
            assert all(len(row) == size for row in matrix)
        for i in range(size):
            assert matrix[i][i] == "X"
            assert all(matrix[i][j] == matrix[j][i] for j in range(size))
        # What is read of a damaged table about the same GPUs is what the whole one says. (XML may
        # lose an element, or swap two, and be as good as before; a row alone has no mirror.)
        same = page["kind"] == original.get("kind") != "nccl_topo_xml" and page.get(
            "complete", True
        )
        if same and page["gpu_names"] == original["gpu_names"] and size == len(original["matrix"]):
            assert matrix == original["matrix"]
            if page.get("nics") == original.get("nics") is not None:
                for key in {"nic_matrix", "nic_links"} & page.keys():
                    for row, whole in zip(page[key], original[key], strict=False):
                        assert all(a in (None, b) for a, b in zip(row, whole, strict=False))
    with suppress(ValueError, ProbeError):
        probe_from_text(text)


@settings(deadline=None, max_examples=NUM_EXAMPLES)
@given(seed=st.integers(0, 2**32))
def test_damaged_captures_are_read_or_refused_but_never_crash_nor_lie(seed: int) -> None:
    rng = random.Random(seed)
    text = rng.choice(ALL_TEXTS)
    original = cast("Page", describe_topology_text(text))
    damaged = rng.choice(list(mutations(text, rng)))
    check(damaged, original)


ALL_TEXTS = texts()


@settings(deadline=None, max_examples=NUM_EXAMPLES)
@given(st.text())
def test_any_text_is_described(text: str) -> None:
    check(text, {})


def test_nested_xml_does_not_overflow() -> None:
    deep = NCCL_XML.replace("</system>", "<pci>" * 3000 + "</pci>" * 3000 + "</system>")
    assert refusal_of(deep)[0] == "inconsistent_topology"
    assert refusal_of(NCCL_XML.replace(xml_gpu(4, "0000:81:00.0"), "<gpu/>"))[0] == (
        "inconsistent_topology"
    )
