"""Outputs of machines and ways of saving them that the corpus has none or few of.

Written here after the formats of the tools; what must come out was worked out by hand.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import pytest

from rankwright.topology.captures import describe_topology_text, probe_from_text

Kind = Callable[[int, int], str]


def listed(name: str, count: int) -> str:
    return "".join(f"GPU {i}: {name} (UUID: GPU-7f0c{i:04d}-5b1a)\n" for i in range(count))


def topo_m(
    count: int,
    kind: Kind,
    *,
    nics: int = 0,
    nic_kind: Kind = lambda gpu, nic: "NODE",
    numa: Callable[[int], str] = lambda gpu: "0",
) -> str:
    """The table as current drivers print it, tabs and all."""
    gpus, ports = [f"GPU{i}" for i in range(count)], [f"NIC{i}" for i in range(nics)]
    rows = [["", *gpus, *ports, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"]]
    for a in range(count):
        cells = [" X " if a == b else kind(min(a, b), max(a, b)) for b in range(count)]
        rows.append(
            [gpus[a], *cells, *(nic_kind(a, k) for k in range(nics)), "0-63", numa(a), "", "N/A"]
        )
    for k in range(nics):
        cells = [" X " if k == j else "NODE" for j in range(nics)]
        rows.append([ports[k], *(nic_kind(g, k) for g in range(count)), *cells, "", "", "", ""])
    return "\n".join("\t".join(row) for row in rows) + "\n"


def showtopo(count: int, kind: Kind, *, brackets: bool = True) -> str:
    """`rocm-smi --showtopo`; drivers before 6.0 print the NUMA lines without brackets."""
    text = "===== ROCm System Management Interface =====\n"
    tables: tuple[tuple[str, Kind], ...] = (
        ("Weight between two GPUs", lambda a, b: "15"),
        ("Hops between two GPUs", lambda a, b: "1" if kind(a, b) == "XGMI" else "3"),
        ("Link Type between two GPUs", kind),
    )
    for title, cell in tables:
        text += f"===== {title} =====\n       "
        text += "".join(f"GPU{i:<10}" for i in range(count)) + "\n"
        for a in range(count):
            cells = ["0" if a == b else cell(min(a, b), max(a, b)) for b in range(count)]
            text += f"GPU{a:<4}" + "".join(f"{each:<13}" for each in cells) + "\n"
    text += "===== Numa Nodes =====\n"
    for g in range(count):
        name = f"GPU[{g}]\t\t" if brackets else f"GPU {g}          "
        text += f"{name}: (Topology) Numa Node: {g // 4}\n"
        text += f"{name}: (Topology) Numa Affinity: {g // 4}\n"
    return text + "===== End of ROCm SMI Log =====\n"


def card_series(name: str, count: int) -> str:
    lines = "".join(f"GPU[{g}]\t\t: Card Series: \t\t{name}\n" for g in range(count))
    return f"===== ROCm System Management Interface =====\n===== Product Info =====\n{lines}"


def prefixed(text: str, prefix: str | Callable[[int], str]) -> str:
    return "".join(
        f"{prefix if isinstance(prefix, str) else prefix(at)}{line}\n"
        for at, line in enumerate(text.splitlines())
    )


def every(kind: str) -> Kind:
    return lambda a, b: kind


H100 = listed("NVIDIA H100 80GB HBM3", 2) + topo_m(2, every("NV18"))
H100_TABLE = topo_m(2, every("NV18"))

# Text, the cluster, and its links: how many pairs of each kind, and GB/s each way.
MACHINES: dict[str, tuple[str, str, Mapping[str, int], Mapping[str, float]]] = {
    "GB200 tray, memory domains of the GPUs in the NUMA cell": (
        listed("NVIDIA GB200", 4)
        + topo_m(4, every("NV18"), nics=8, numa=lambda g: "0,2-17" if g < 2 else "1,18-33"),
        *("4 x gb200-nvl72", {"NV18": 6}, {"NV18": 900}),
    ),
    "GB200 tray with two links down": (
        listed("NVIDIA GB200", 4)
        + topo_m(4, lambda a, b: "NV16" if 2 in (a, b) else "NV18").replace(" X ", "X"),
        *("4 x gb200-nvl72", {"NV18": 3, "NV16": 3}, {"NV18": 900, "NV16": 800}),
    ),
    "DGX B200 with twelve ports": (
        listed("NVIDIA B200", 8) + topo_m(8, every("NV18"), nics=12, numa=lambda g: str(g // 4)),
        *("8 x b200-sxm", {"NV18": 28}, {"NV18": 900}),
    ),
    "B300, header underlined": (
        "\x1b[4m"
        + topo_m(8, every("NV18"), nics=9).replace("ID\n", "ID\x1b[0m\n", 1)
        + listed("NVIDIA B300 SXM6 AC", 8),
        *("8 x b300-sxm", {"NV18": 28}, {"NV18": 900}),
    ),
    "three GPUs, a bridge over the outer two": (
        listed("NVIDIA RTX A5000", 3) + topo_m(3, lambda a, b: "NV4" if a + 2 == b else "SYS"),
        *("3 x rtx-a5000", {"NV4": 1, "SYS": 2}, {"NV4": 56.25, "SYS": 22}),
    ),
    "legend cut off": (
        listed("NVIDIA A40", 4)
        + topo_m(4, lambda a, b: "NV4" if a // 2 == b // 2 else "SYS")
        + "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe as well as the SMP int",
        *("4 x a40", {"NV4": 2, "SYS": 4}, {"NV4": 56.25, "SYS": 22}),
    ),
    "one GH200": (
        "GPU 0: NVIDIA GH200 480GB (UUID: GPU-1)\n"
        "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t0-71\t0\t\t1\n",
        *("1 x gh200-96gb", {}, {}),
    ),
    "four GH200, a NUMA domain each": (
        listed("NVIDIA GH200 144G HBM3e", 4) + topo_m(4, every("NV6"), numa=str),
        *("4 x gh200-144gb", {"NV6": 6}, {"NV6": 150}),
    ),
    "WSL, affinity cells empty": (
        listed("NVIDIA GeForce RTX 4090", 2)
        + "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
        "GPU0\t X \tSYS\t\t\t\tN/A\nGPU1\tSYS\t X \t\t\t\tN/A\n",
        *("2 x rtx4090", {"SYS": 1}, {"SYS": 22}),
    ),
    "Windows line ends": (
        (listed("NVIDIA RTX 6000 Ada Generation", 2) + topo_m(2, every("PHB"))).replace(
            "\n", "\r\n"
        ),
        *("2 x rtx6000-ada", {"PHB": 1}, {"PHB": 32}),
    ),
    "container log with times": (
        prefixed(H100, lambda at: f"2026-03-14T08:22:{at:02}.113Z stdout F "),
        *("2 x h100-sxm", {"NV18": 1}, {"NV18": 450}),
    ),
    "docker compose": (
        prefixed(
            listed("NVIDIA L40S", 4) + topo_m(4, lambda a, b: "PIX" if a // 2 == b // 2 else "SYS"),
            "worker-0  | ",
        ),
        *("4 x l40s", {"PIX": 2, "SYS": 4}, {"PIX": 32, "SYS": 22}),
    ),
    "docker compose with times": (
        prefixed(H100, lambda at: f"node-1  | 2026-03-14T08:22:{at:02}.113Z "),
        *("2 x h100-sxm", {"NV18": 1}, {"NV18": 450}),
    ),
    "kubectl logs --prefix": (
        prefixed(H100, "[pod/gpu-probe-7d9fc/main] "),
        *("2 x h100-sxm", {"NV18": 1}, {"NV18": 450}),
    ),
    "srun --label": (prefixed(H100, " 0: "), "2 x h100-sxm", {"NV18": 1}, {"NV18": 450}),
    "pdsh": (prefixed(H100, "node07: "), "2 x h100-sxm", {"NV18": 1}, {"NV18": 450}),
    "frame of a terminal": (
        "".join(f"\u2502 {line:<90} \u2502\n" for line in H100.expandtabs(8).splitlines()),
        *("2 x h100-sxm", {"NV18": 1}, {"NV18": 450}),
    ),
    "MIG on one of two, uuids masked": (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-...)\n"
        "  MIG 1g.10gb     Device  0: (UUID: MIG-...)\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-...)\n" + H100_TABLE,
        *("2 x h100-sxm", {"NV18": 1}, {"NV18": 450}),
    ),
    "display card of a DGX Station": (
        listed("NVIDIA A100-SXM4-80GB", 4).replace(
            "GPU 2: NVIDIA A100-SXM4-80GB", "GPU 2: NVIDIA DGX Display"
        )
        + topo_m(4, lambda a, b: "SYS" if 2 in (a, b) else "NV4"),
        *("3 x a100-sxm-80gb", {"NV4": 3}, {"NV4": 100}),
    ),
    "DGX-2": (
        listed("Tesla V100-SXM3-32GB", 16) + topo_m(16, every("NV6"), numa=lambda g: str(g // 8)),
        *("16 x v100-sxm2-32gb", {"NV6": 120}, {"NV6": 150}),
    ),
    "environment report of a GB200 tray, equal GPUs on one line": (
        "GPU 0,1,2,3: NVIDIA GB200\nGPU 0,1,2,3 Compute Capability: 10.0\nNVIDIA Topology: \n"
        + topo_m(4, every("NV18"), nics=2).expandtabs(8),
        *("4 x gb200-nvl72", {"NV18": 6}, {"NV18": 900}),
    ),
    "rocm-smi in a fence, bridged MI210": (
        f"```\n{card_series('AMD Instinct MI210', 4)}"
        f"{showtopo(4, every('XGMI')).split('===== Numa')[0]}```\nThat is all.\n",
        *("4 x mi210", {"XGMI": 6}, {"XGMI": 50}),
    ),
    "MI300X": (
        card_series("AMD Instinct MI300X", 8) + showtopo(8, every("XGMI")),
        *("8 x mi300x", {"XGMI": 28}, {"XGMI": 64}),
    ),
    "MI300X OAM, NUMA lines of an older driver": (
        card_series("AMD Instinct MI300X OAM", 8) + showtopo(8, every("XGMI"), brackets=False),
        *("8 x mi300x", {"XGMI": 28}, {"XGMI": 64}),
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_comes_out_as_it_is(name: str) -> None:
    text, described, kinds, rates = MACHINES[name]
    read = describe_topology_text(text)
    assert "error" not in read, read
    cluster = probe_from_text(text)
    assert cluster.describe() == described
    links = cluster.nodes[0].links
    assert Counter(link.kind for link in links) == kinds
    assert {link.kind: link.bytes_per_s / 1e9 for link in links} == rates


# Text, and the class of the refusal.
REFUSED: dict[str, tuple[str, str]] = {
    "one GPU twice in a list": (listed("NVIDIA L4", 1) * 2, "inconsistent_topology"),
    "a list cut in its uuid": ("GPU 0: NVIDIA L4 (UU\n", "inconsistent_topology"),
    "the same query twice": (
        "index, name\n0, NVIDIA L4\nindex, name\n1, NVIDIA L4\n",
        "inconsistent_topology",
    ),
    "two sockets of one number": (
        '<system version="1"><cpu numaid="0"/><cpu numaid="0"/></system>',
        "inconsistent_topology",
    ),
    "columns cut at the edge of a terminal": (
        "\n".join(line[:40] for line in topo_m(8, every("NV18")).splitlines()),
        "inconsistent_topology",
    ),
    "rows cut": (
        "\n".join(topo_m(8, every("NV18")).splitlines()[:6]),
        "inconsistent_topology",
    ),
    "a row found by grep": ("GPU2\tNV17\tNV17\tX\tNV17\t0-3\t0\t\tN/A\n", "no_topology"),
    "one lost GPU in a list": (
        listed("NVIDIA A100-SXM4-80GB", 2)
        + "Unable to determine the device handle for gpu 0000:4B:00.0: GPU is lost.  Reboot\n",
        "device_lost",
    ),
    # The rows of both would make one square table, of a machine that there is not.
    "two tasks of srun in one log": (
        "".join(prefixed(line, f" {at % 2}: ") for at, line in enumerate(H100_TABLE.splitlines())),
        "no_topology",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_with_certainty_is_refused(name: str) -> None:
    text, kind = REFUSED[name]
    read = describe_topology_text(text)
    assert read.keys() == {"error"}
    error = read["error"]
    assert isinstance(error, dict)
    assert error["class"] == kind


def test_memory_that_only_a_gpu_has_is_no_numa_domain_of_a_cpu() -> None:
    text = MACHINES["GB200 tray, memory domains of the GPUs in the NUMA cell"][0]
    assert [gpu.numa_node for gpu in probe_from_text(text).nodes[0].gpus] == [None] * 4


def test_boards_that_always_have_nvlink_and_show_none_are_noted() -> None:
    text = listed("NVIDIA H100 80GB HBM3", 2) + topo_m(2, every("NODE"))
    assert "no two of the 2 h100-sxm are joined by NVLink" in probe_from_text(text).notes[0]
    assert not probe_from_text(H100).notes
    assert not probe_from_text(listed("NVIDIA L4", 2) + topo_m(2, every("NODE"))).notes


def test_a_lost_gpu_in_a_table_has_no_memory() -> None:
    text = (
        "| NVIDIA-SMI 570.124.06   Driver Version: 570.124.06   CUDA Version: 12.8 |\n"
        "|   0  NVIDIA H100 80GB HBM3    On  | 00000000:1B:00.0 Off |       0 |\n"
        "| N/A   31C   P0     72W / 700W |     0MiB / 81559MiB |   0%  Default |\n"
        "|   1  NVIDIA H100 80GB HBM3    On  | 00000000:43:00.0 Off |    ERR! |\n"
        "| ERR!  ERR! ERR!    N/A / N/A  |    Unknown Error    |  ERR!    ERR! |\n"
    )
    gpus = describe_topology_text(text)["gpus"]
    assert isinstance(gpus, list)
    assert [gpu["memory_total_bytes"] for gpu in gpus] == [81559 * 2**20, None]


def test_a_speed_newer_than_ibv_devinfo_is_unknown() -> None:
    text = (
        "hca_id:\tmlx5_0\n\tphys_port_cnt:\t1\n\t\tport:\t1\n\t\t\tstate:\tPORT_ACTIVE (4)\n"
        "\t\t\tactive_width:\t4X (2)\n\t\t\tactive_speed:\tinvalid speed (256)\n\n"
    )
    ports = describe_topology_text(text)["ports"]
    assert isinstance(ports, list)
    assert (ports[0]["state"], ports[0]["gbit_per_s"]) == ("Active", None)


def test_a_jetson_is_listed() -> None:
    read = describe_topology_text("GPU 0: Orin (nvgpu) (UUID: 9c2a6f0e-3d51-5ccf)\n")
    assert (read["kind"], read["n_gpus"]) == ("smi_L", 1)


def test_half_of_the_lanes_and_less_power_in_a_query() -> None:
    text = (
        "index, name, uuid, memory.total [MiB], memory.free [MiB], pcie.link.gen.max, "
        "pcie.link.width.max, pcie.link.width.current, power.limit [W], power.default_limit [W], "
        "clocks.applications.graphics [MHz]\n"
        "0, NVIDIA B200, GPU-1, 183359 MiB, 182628 MiB, 5, 16, 16, 1000.00 W, 1000.00 W, "
        "[Requested functionality has been deprecated]\n"
        "1, NVIDIA B200, GPU-2, 183359 MiB, 182628 MiB, 5, 16, 8, 490.00 W, 1000.00 W, "
        "[Requested functionality has been deprecated]\n"
    ) + topo_m(2, every("SYS"))
    cluster = probe_from_text(text)
    sound, limited = cluster.nodes[0].gpus
    assert (sound.pcie_width, sound.flops_per_s) == (16, None)
    assert limited.pcie_width == 8
    assert limited.flops_per_s is not None
    assert limited.flops_per_s["bfloat16"] == pytest.approx(0.7 * 2250e12, rel=0.01)
    assert len(cluster.notes) == 3  # and that no NVLink is shown
