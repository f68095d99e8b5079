"""The text of nvidia-smi: whole, damaged, and instead of it an error.

The captures here are our own (a virtual machine with two H200) or made up. A corpus of real outputs
with labels may lie beside the checkout; its tests say so and skip where it does not.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.topology.captures import describe_topology_text, probe_from_text
from rankwright.topology.errors import FAILURES, ProbeError, find_failure
from rankwright.topology.readers.nvidia_smi import parse_topo_m
from rankwright.topology.readers.nvidia_smi_query import list_names, parse_query

CORPUS = Path(__file__).parents[2] / ".." / "shared" / "reference" / "topology"

TWO_H200 = (
    "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\t0-31\t0\t\tN/A\n"
    "GPU1\tNV18\t X \t0-31\t0\t\tN/A\n"
    "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)
TWO_H200_LIST = (
    "GPU 0: NVIDIA H200 (UUID: GPU-00000000-0000-0000-0000-000000000000)\n"
    "GPU 1: NVIDIA H200 (UUID: GPU-00000000-0000-0000-0000-000000000001)\n"
)
FOUR_L4 = """\
        GPU0    GPU1    GPU2    GPU3    NIC0    NIC1    CPU Affinity    NUMA Affinity
GPU0     X      PIX     NODE    SYS     PIX     SYS     0-23,48-71      0
GPU1    PIX      X      NODE    SYS     PXB     SYS     0-23,48-71      0
GPU2    NODE    NODE     X      SYS     NODE    SYS     0-23,48-71      0
GPU3    SYS     SYS     SYS      X      SYS     PHB     24-47,72-95     1
NIC0    PIX     PXB     NODE    SYS      X      SYS
NIC1    SYS     SYS     SYS     PHB     SYS      X

Legend:

  X    = Self
  NODE = Connection traversing PCIe as well as the interconnect

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_bond_1
"""


def test_a_capture_with_colours_and_tabs_is_read() -> None:
    table = parse_topo_m(TWO_H200)
    assert table.matrix == (("X", "NV18"), ("NV18", "X"))
    assert table.gpu_names == ("GPU0", "GPU1")
    assert table.nics == ()
    assert table.cpu_affinity == ("0-31", "0-31")
    assert table.numa_affinity == ("0", "0")
    assert table.gpu_numa_id == ("N/A", "N/A")
    assert table.nic_legend is None


def test_ports_affinity_and_legend_are_read_from_spaces() -> None:
    table = parse_topo_m(FOUR_L4)
    assert table.matrix[2] == ("NODE", "NODE", "X", "SYS")
    assert table.nics == ("NIC0", "NIC1")
    assert table.nic_matrix == (("PIX", "PXB", "NODE", "SYS"), ("SYS", "SYS", "SYS", "PHB"))
    assert table.nic_links == (("X", "SYS"), ("SYS", "X"))
    assert table.cpu_affinity == ("0-23,48-71",) * 3 + ("24-47,72-95",)
    assert table.numa_affinity == ("0", "0", "0", "1")
    assert table.gpu_numa_id is None
    assert table.nic_legend == {"NIC0": "mlx5_0", "NIC1": "mlx5_bond_1"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: "$ nvidia-smi topo -m\n" + text,
        lambda text: "\n".join("    " + line for line in text.splitlines()),
        lambda text: "\n".join(" ".join(line.split()) for line in text.splitlines()),
        lambda text: text.replace("\x1b", "\ufffd"),
        lambda text: text.split("Legend")[0],
    ],
)
@pytest.mark.parametrize("text", [TWO_H200, FOUR_L4])
def test_layout_does_not_matter(text: str, damage: Any) -> None:
    assert parse_topo_m(damage(text)).matrix == parse_topo_m(text).matrix
    assert parse_topo_m(damage(text)).cpu_affinity == parse_topo_m(text).cpu_affinity


def test_cells_that_ran_together_are_split() -> None:
    text = FOUR_L4.replace("PIX     SYS     0-23", "PIXSYS0-23").replace(
        "X      SYS\nNIC1", "X SYS\nNIC1"
    )
    assert parse_topo_m(text) == parse_topo_m(FOUR_L4)


def test_a_numa_node_glued_to_its_cpu_list_is_split_where_the_ranges_match() -> None:
    text = TWO_H200.replace("0-31\t0\t\tN/A", "0-47,96-1431N/A")
    table = parse_topo_m(text)
    assert table.cpu_affinity == ("0-47,96-143",) * 2
    assert table.numa_affinity == ("1", "1")
    assert table.gpu_numa_id == ("N/A", "N/A")


def test_blank_and_missing_affinity_are_told_apart() -> None:
    blank = parse_topo_m(TWO_H200.replace("0-31\t0", "\t"))
    assert blank.cpu_affinity == (None, None)
    assert blank.gpu_numa_id == ("N/A", "N/A")
    missing = parse_topo_m("   GPU0 GPU1\nGPU0  X  PHB\nGPU1 PHB  X\n")
    assert missing.cpu_affinity is None


def test_ports_whose_rows_were_cut_are_read_from_the_columns() -> None:
    table = parse_topo_m(FOUR_L4.split("NIC1    SYS")[0])
    assert table.nic_matrix[1] == ("SYS", "SYS", "SYS", "PHB")
    assert len(table.nic_links) == 1


def test_sixteen_gpus_are_read() -> None:
    names = [f"GPU{i}" for i in range(16)]
    rows = [
        "\t".join([name, *(" X " if name == other else "NV6" for other in names)]) for name in names
    ]
    table = parse_topo_m("\t" + "\t".join(names) + "\n" + "\n".join(rows))
    assert len(table.matrix) == 16
    assert table.matrix[15][0] == "NV6"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\tGPU0\tGPU1\nGPU0\t X \tPHB\n", "2 GPU columns and 1 GPU rows"),
        ("\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\n", "GPU1 has 1 links for 2"),
        ("\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tSYS\t X \n", "'PHB' one way, 'SYS' the other"),
        ("\tGPU0\tGPU1\nGPU0\tPHB\tPHB\nGPU1\tPHB\t X \n", "GPU0 to GPU0 reads 'PHB'"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(text: str, says: str) -> None:
    with pytest.raises(ProbeError, match=says) as caught:
        parse_topo_m(text)
    assert caught.value.kind == "inconsistent_topology"
    assert describe_topology_text(text)["error"] == {
        "class": "inconsistent_topology",
        "message": str(caught.value),
    }


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("NIC0    PIX     PXB ", "NIC0    PIX     PIX ", "'PXB' one way, 'PIX' the other"),
        ("PHB     SYS      X", "PHB     SYS     SYS", "X belongs on the diagonal"),
        ("NIC0    NIC1    CPU", "NIC0    CPU", "NIC1 is no column of the header"),
        ("PHB     24-47", "PHB  SYS   24-47", "GPU3 has more links than the header"),
        ("NIC0    NIC1    CPU", "NIC0    NIC0    CPU", "NIC0 is named twice"),
        ("CPU Affinity", "PU Affinity", "names 'PU', of which no row tells a link"),
        ("NUMA Affinity", "NUMA Affi", "'Affi' is no column"),
        ("0-23,48-71", "?", r"'\? 0' under the 2 columns"),
        ("0-23,48-71      0", "0-230", "'0-230' under the 2 columns"),
        ("SYS     0-23", "\n     SYS     0-23", "a row is wrapped"),
        ("NIC0    PIX     PXB     NODE    SYS      X      SYS\n", "", "where the row of NIC0 is"),
        ("\nNIC1    SYS", "\nNIC0    SYS", "a second row of NIC0"),
    ],
)
def test_no_cell_is_guessed(old: str, new: str, says: str) -> None:
    assert old in FOUR_L4
    with pytest.raises(ProbeError, match=says) as caught:
        parse_topo_m(FOUR_L4.replace(old, new))
    assert caught.value.kind == "inconsistent_topology"


def test_affinity_columns_come_as_the_header_orders_and_shortens_them() -> None:
    turned = FOUR_L4.replace("CPU Affinity    NUMA Affinity", "NUMA      CPU Affinity")
    turned = turned.replace("24-47,72-95     1", "1     24-47,72-95")
    table = parse_topo_m(turned.replace("0-23,48-71      0", "0      0-23,48-71"))
    assert table.cpu_affinity is not None
    assert table.numa_affinity is not None
    assert (table.cpu_affinity[0], table.numa_affinity[0]) == ("0-23,48-71", "0")


def test_text_without_a_table_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no topology table"):
        parse_topo_m("hello")
    error = describe_topology_text("hello")["error"]
    assert isinstance(error, dict)
    assert error["class"] == "no_topology"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\n", "driver_library_mismatch"),
        ("Failed to initialize NVML: Unknown Error", "nvml_unknown_error"),
        ("No devices were found", "no_devices"),
        ("bash: nvidia-smi: command not found", "tool_not_found"),
        ("Unable to determine the device handle for GPU 0000:04:00.0: Not Found", "device_handle"),
        (
            "Unable to determine the device handle for GPU1: 0000:05:00.0: Unknown Error\n"
            "0, 00000000:04:00.0, NVIDIA L4\n",
            "device_handle_partial",
        ),
        ("Unable to determine the device handle for GPU0: GPU is lost.", "device_lost"),
    ],
)
def test_errors_of_the_tool_have_a_class_and_a_remedy(text: str, kind: str) -> None:
    error = find_failure(text)
    assert error is not None
    assert error.kind == kind
    assert ";" in str(error)
    assert len(str(error).splitlines()) == 1
    with pytest.raises(ProbeError) as caught:
        parse_topo_m(text)
    assert caught.value.kind == kind
    described = describe_topology_text(text)["error"]
    assert isinstance(described, dict)
    assert described["class"] == kind


def test_failures_are_distinct() -> None:
    assert len({failure.pattern for failure in FAILURES}) == len(FAILURES)
    makers = {
        (failure.kind, "AMD" in failure.meaning or "amd" in failure.meaning) for failure in FAILURES
    }
    assert len(makers) == len(FAILURES)  # one row of a kind for each maker's tools


def test_a_capture_with_names_is_a_cluster() -> None:
    cluster = probe_from_text(TWO_H200_LIST + TWO_H200)
    node = cluster.nodes[0]
    assert [gpu.device for gpu in node.gpus] == ["h200-sxm"] * 2
    assert node.gpus[1].uuid == "GPU-00000000-0000-0000-0000-000000000001"
    assert node.gpus[0].numa_node == 0
    assert (node.links[0].kind, node.links[0].bytes_per_s) == ("NV18", 450e9)
    four = "".join(f"GPU {i}: NVIDIA L4 (UUID: GPU-{i})\n" for i in range(4))
    assert probe_from_text(FOUR_L4 + four).islands == (((0, 0), (0, 1)), ((0, 2),), ((0, 3),))


def test_a_capture_with_a_query_is_a_cluster() -> None:
    query = (
        "index, name, memory.total [MiB], memory.free [MiB], pcie.link.gen.max\n"
        "0, NVIDIA H200, 143771 MiB, 143000 MiB, 5\n"
        "1, NVIDIA H200, 143771 MiB, [N/A], [N/A]\n"
    )
    gpus = probe_from_text(query + TWO_H200).nodes[0].gpus
    assert gpus[0].memory_bytes == 143000 * 2**20
    assert gpus[1].memory_bytes == gpus[1].total_memory_bytes == 143771 * 2**20
    assert (gpus[0].pcie_generation, gpus[1].pcie_generation) == (5, None)


def test_links_without_names_say_what_to_add() -> None:
    with pytest.raises(ValueError, match="add the output of `nvidia-smi -L`"):
        probe_from_text(TWO_H200)
    with pytest.raises(ValueError, match="unknown GPU 'NVIDIA H2000'"):
        probe_from_text(TWO_H200_LIST.replace("H200 ", "H2000 ") + TWO_H200)
    with pytest.raises(ProbeError, match="lists 1 GPUs and links 2"):
        probe_from_text(TWO_H200_LIST.splitlines()[0] + "\n" + TWO_H200)


def test_queries_without_header_take_the_fields_asked_for() -> None:
    rows = "1, Tesla T4, Enabled, 7.5\n0, Tesla T4, [N/A], 7.5\n"
    gpus = parse_query(rows, ("index", "name", "mig.mode.current", "compute_cap"))
    assert [gpu.index for gpu in gpus] == [0, 1]
    assert [gpu.mig for gpu in gpus] == [False, True]
    assert gpus[0].compute_capability == (7, 5)
    assert gpus[0].total_memory_bytes == 15360 * 2**20
    with pytest.raises(ValueError, match="no GPU list"):
        parse_query("", ("index", "name"))


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[str]], list[str], str]:
    """A symmetric matrix, CPU lists, and the text that nvidia-smi would print of them."""
    size = draw(st.integers(1, 16))
    kinds = st.sampled_from(["NV1", "NV2", "NV18", "PIX", "PXB", "PHB", "NODE", "SYS"])
    matrix = [["X"] * size for _ in range(size)]
    for i in range(size):
        for j in range(i):
            matrix[i][j] = matrix[j][i] = draw(kinds)
    cpus = [f"{i * 4}-{i * 4 + 3}" for i in range(size)]
    blank = draw(st.sampled_from(["\t", "    ", " "]))
    head = [f"GPU{i}" for i in range(size)] + ["CPU Affinity", "NUMA Affinity", "GPU NUMA ID"]
    lines = [blank + blank.join(head)]
    for i in range(size):
        cells = [" X " if cell == "X" else cell for cell in matrix[i]]
        lines.append(blank.join([f"GPU{i}", *cells, cpus[i], str(i % 2), "N/A"]))
    return matrix, cpus, "\n".join(lines)


@settings(deadline=None)
@given(tables())
def test_what_is_printed_is_read_back(table: tuple[list[list[str]], list[str], str]) -> None:
    matrix, cpus, text = table
    read = parse_topo_m(text)
    assert [list(row) for row in read.matrix] == matrix
    assert list(read.cpu_affinity or ()) == cpus
    assert list(read.numa_affinity or ()) == [str(i % 2) for i in range(len(cpus))]


edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.text(max_size=6)), min_size=1, max_size=5
)


def mutate(text: str, changes: list[tuple[float, int, str]]) -> str:
    for where, length, new in changes:
        at = int(where * len(text))
        text = text[:at] + new + text[at + length :]
    return text


@settings(deadline=None)
@given(text=st.sampled_from([TWO_H200_LIST + TWO_H200, FOUR_L4]), changes=edits)
def test_damaged_text_is_read_or_refused_but_never_crashes(
    text: str, changes: list[tuple[float, int, str]]
) -> None:
    broken = mutate(text, changes)
    described = describe_topology_text(broken)
    assert ("error" in described) != ("kind" in described)
    json.dumps(described)
    for read in (parse_topo_m, list_names, parse_query, probe_from_text):
        try:
            read(broken)
        except (ValueError, ProbeError):
            continue


def corpus(kind: str) -> list[dict[str, Any]]:
    index = CORPUS / "index.jsonl"
    if not index.is_file():
        pytest.skip(f"the corpus of real outputs is not at {CORPUS}")
    entries = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def read_corpus(entry: dict[str, Any]) -> str:
    return (CORPUS / entry["file"]).read_bytes().decode("utf-8", errors="replace")


def mismatches(entry: dict[str, Any]) -> list[str]:
    label = entry["label"]
    try:
        table = parse_topo_m(read_corpus(entry))
    except ProbeError as error:
        refused = label["gpu_links"] is None and error.kind == "inconsistent_topology"
        return [] if refused else [f"refused: {error}"]
    read = {
        "gpu_links": [list(row) for row in table.matrix],
        "gpu_names": list(table.gpu_names),
        "nic_names": list(table.nics),
        "nic_gpu": dict(zip(table.nics, map(list, table.nic_matrix), strict=True)) or None,
        "nic_links": [list(row) for row in table.nic_links] or None,
        "cpu_affinity": table.cpu_affinity and list(table.cpu_affinity),
        "numa_affinity": table.numa_affinity and list(table.numa_affinity),
        "gpu_numa_id": table.gpu_numa_id and list(table.gpu_numa_id),
        "nic_legend": table.nic_legend,
    }
    return [name for name, value in read.items() if value != label[name]]


def test_every_real_table_is_read_as_labelled() -> None:
    wrong = {entry["file"]: found for entry in corpus("topo_m") if (found := mismatches(entry))}
    total = len(corpus("topo_m"))
    print(f"{total - len(wrong)} of {total} real topo -m outputs match their labels")
    assert not wrong


def test_every_real_error_is_classified_as_labelled() -> None:
    entries = corpus("error")
    wrong = {
        entry["file"]: error and error.kind
        for entry in entries
        if (error := find_failure(read_corpus(entry))) is None
        or error.kind != entry["expected_error"]
    }
    print(f"{len(entries) - len(wrong)} of {len(entries)} real errors match their class")
    assert not wrong


@pytest.mark.parametrize("kind", ["query_gpu_csv", "smi_L"])
def test_every_real_list_of_known_gpus_is_read(kind: str) -> None:
    unread = []
    for entry in corpus(kind):
        read = parse_query if kind == "query_gpu_csv" else list_names
        try:
            assert read(read_corpus(entry))
        except ValueError as error:
            if "unknown GPU" not in str(error):
                unread.append((entry["file"], str(error)))
    assert not unread


BLANK_CPUS = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNV18\tPIX\t8-15\t0\t\tN/A
GPU1\tNV18\t X \tSYS\t\t1\t\tN/A
NIC0\tPIX\tSYS\t X \t\t\t\t
"""


def test_a_job_without_cpus_of_a_socket_still_has_its_numa_node() -> None:
    """Slurm gave it the CPUs of the other one; only the tabs tell which cell is blank."""
    table = parse_topo_m(BLANK_CPUS)
    assert table.cpu_affinity == ("8-15", None)
    assert table.numa_affinity == ("0", "1")
    assert table.gpu_numa_id == ("N/A", "N/A")
    with pytest.raises(ProbeError, match="under the 3 columns"):
        parse_topo_m(BLANK_CPUS.replace("\t", "    "))
    with pytest.raises(ProbeError, match="under the 3 columns"):
        parse_topo_m(BLANK_CPUS.replace("\t1\t\tN/A", "\t1\tN/A"))


PLAIN = "\tGPU0\tGPU1\nGPU0\t X \tPIX\nGPU1\tPIX\t X \n"


def test_a_table_of_peers_may_be_beside_it_without_a_legend_but_no_second_machine() -> None:
    peers = "\n$ nvidia-smi topo -p2p rw\n \tGPU0\tGPU1\n GPU0\tX\tOK\n GPU1\tOK\tX\n"
    assert parse_topo_m(PLAIN + peers).matrix == (("X", "PIX"), ("PIX", "X"))
    assert parse_topo_m(peers + PLAIN).matrix == (("X", "PIX"), ("PIX", "X"))
    with pytest.raises(ProbeError, match="a second table"):
        parse_topo_m(PLAIN + "after:\n" + PLAIN.replace("PIX", "SYS"))


def test_a_quoted_mail_with_its_own_legend_is_read() -> None:
    mail = "".join(f">>> {line}\n" for line in (PLAIN + "Where:\n  X    = Self\n").splitlines())
    assert parse_topo_m(mail + ">>>\n").matrix == (("X", "PIX"), ("PIX", "X"))
