"""The NVML reader, against a binding whose functions answer from a table.

No GPU is here to ask: the functions of the third-party package are replaced, and asked in this
process rather than in one of their own (`test_nvml_process.py` has that). On real hardware the
reader was run on two H200 in a virtual machine, whose odd answers (a switch without a bus id) are
reproduced here.
"""

import ctypes
import json
import queue
from pathlib import Path
from typing import Any

import pytest
from tests.topology.boards import HIDDEN, MIB, SWITCH, Board, install, pair, switched

from rankwright.cli import main
from rankwright.topology.cluster import Cluster
from rankwright.topology.devices import DEVICES, flops_per_s
from rankwright.topology.errors import ProbeError
from rankwright.topology.probe import probe
from rankwright.topology.readers import nvml
from rankwright.topology.readers.nvml import facts_of, read_nvml
from rankwright.topology.readers.nvml_facts import report

pynvml = pytest.importorskip("pynvml")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's library is there, and the binding is asked here, where it is replaced."""

    def ask() -> dict[str, Any]:
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        report(pynvml, lambda said: lines.put(json.dumps(said)))
        return facts_of(lines.get_nowait)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(nvml, "ask_nvml", ask)


def test_links_to_a_switch_join_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, switched())
    cluster = probe(require_gpu=True)
    node = cluster.nodes[0]
    assert [gpu.device for gpu in node.gpus] == ["h200-sxm"] * 2
    assert node.gpus[0].memory_bytes == 143156 * MIB
    assert node.gpus[0].total_memory_bytes == 143771 * MIB
    assert node.gpus[0].compute_capability == (9, 0)
    assert (node.links[0].kind, node.links[0].bytes_per_s) == ("NV18", 450e9)
    assert node.driver == "580.1"
    assert {gpu.nvlink_version for gpu in node.gpus} == {4}
    assert cluster.islands == (((0, 0), (0, 1)),)


def test_links_that_the_fabric_manager_has_not_routed_count_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, switched(), nvlink_p2p=pynvml.NVML_P2P_STATUS_NOT_SUPPORTED)
    link = probe().nodes[0].links[0]
    assert (link.kind, link.bytes_per_s) == ("PHB", 64e9)


def test_only_active_links_to_the_other_gpu_count(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = [
        Board(name="NVIDIA A30", bus=f"00000000:0{i}:00.0", total=24576 * MIB) for i in (1, 2)
    ]
    boards[0].links = [(1, boards[1].bus, 0)] * 3 + [(0, boards[1].bus, 0)]
    boards[1].links = [(1, boards[0].bus, 0)] * 3 + [(0, boards[0].bus, 0)]
    install(monkeypatch, boards, ancestor=50)
    link = probe().nodes[0].links[0]
    assert (link.kind, link.bytes_per_s) == ("NV3", 75e9)


@pytest.mark.parametrize(
    ("ancestor", "kind"),
    [(0, "PIX"), (10, "PIX"), (20, "PXB"), (30, "PHB"), (40, "NODE"), (50, "SYS")],
)
def test_the_common_ancestor_gives_the_pcie_class(
    monkeypatch: pytest.MonkeyPatch, ancestor: int, kind: str
) -> None:
    install(monkeypatch, pair("NVIDIA L4", 23034), ancestor=ancestor)
    assert probe().nodes[0].links[0].kind == kind


def test_cards_without_peer_access_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = pair("NVIDIA GeForce RTX 4090", 24564)
    install(monkeypatch, boards, read_p2p=pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED)
    assert any("staged in host memory" in note for note in probe().notes)


def test_mig_and_busy_gpus_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [Board(mig=1, processes=2, free=7 * MIB)])
    cluster = probe()
    gpu = cluster.nodes[0].gpus[0]
    assert (gpu.mig, gpu.num_processes, gpu.memory_bytes) == (True, 2, 7 * MIB)
    assert any("MIG" in note for note in cluster.notes)


def test_the_numa_node_comes_from_sysfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "bus/pci/devices/0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("1\n")
    install(monkeypatch, [Board()])
    assert read_nvml(tmp_path).gpus[0].numa_node == 1
    (folder / "numa_node").write_text("-1\n")
    assert read_nvml(tmp_path).gpus[0].numa_node is None


@pytest.mark.parametrize(("near", "node"), [((4, 0), 2), ((0, 1), 64), ((3, 0), None), ((), None)])
def test_without_sysfs_the_only_near_numa_node_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, near: tuple[int, ...], node: int | None
) -> None:
    install(monkeypatch, [Board(near=near)])
    assert read_nvml(tmp_path).gpus[0].numa_node == node


def test_a_gpu_without_a_row_gets_derived_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        [
            Board(
                name="NVIDIA A10G",
                total=23028 * MIB,
                capability=(8, 6),
                cores=9216,
                sm_mhz=1710,
                memory_mhz=6251,
                bus_bits=384,
            ),
        ],
    )
    cluster = probe()
    gpu = cluster.nodes[0].gpus[0]
    assert gpu.device == "a10g"
    assert gpu.memory_bytes_per_s == pytest.approx(600e9, rel=0.01)
    assert gpu.flops_per_s is not None
    assert gpu.flops_per_s["bfloat16"] == pytest.approx(126e12, rel=0.01)
    assert "derived" in cluster.notes[0]


def test_a_gpu_too_old_for_us_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Board(name="NVIDIA GeForce GT 710", bus="00000000:09:00.0", capability=(3, 5))
    install(monkeypatch, [Board(), old])
    cluster = probe()
    assert cluster.num_gpus == 1
    assert any("GT 710" in note for note in cluster.notes)
    install(monkeypatch, [old])
    with pytest.raises(ProbeError, match="GT 710") as caught:
        probe()
    assert caught.value.kind == "unsupported_gpu"


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("1", [1]),
        ("1,0", [0, 1]),
        ("0,7,1", [0]),  # CUDA stops at the first entry that names no GPU
        ("GPU-00000000:02", [1]),
        (" 0 , 1 ", [0, 1]),
    ],
)
def test_cuda_visible_devices_is_respected(
    monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]
) -> None:
    install(monkeypatch, switched())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cluster = probe(require_gpu=True)
    assert [gpu.index for gpu in cluster.nodes[0].gpus] == indices
    assert len(cluster.nodes[0].links) == len(indices) - 1
    assert visible in cluster.notes[-1]


@pytest.mark.parametrize("visible", ["", "-1", "9"])
def test_hiding_every_gpu_leaves_cpu_ranks_unless_a_gpu_is_required(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    install(monkeypatch, switched())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert {gpu.device for gpu in probe().nodes[0].gpus} == {"cpu"}
    with pytest.raises(ProbeError, match="hides every GPU") as caught:
        probe(require_gpu=True)
    assert caught.value.kind == "no_devices"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("NVML_ERROR_LIB_RM_VERSION_MISMATCH", "driver_library_mismatch"),
        ("NVML_ERROR_GPU_IS_LOST", "device_lost"),
        ("NVML_ERROR_OPERATING_SYSTEM", "gpu_access_blocked"),
        ("NVML_ERROR_UNKNOWN", "nvml_unknown_error"),
        ("NVML_ERROR_IRQ_ISSUE", "nvml_unknown_error"),
    ],
)
def test_a_broken_driver_is_never_hidden_behind_cpu_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, kind: str
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(getattr(pynvml, code))

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi to fall back on
    with pytest.raises(ProbeError) as caught:
        probe()
    assert caught.value.kind == kind


def test_no_driver_means_cpu_ranks_unless_a_gpu_is_required(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {gpu.device for gpu in probe().nodes[0].gpus} == {"cpu"}
    with pytest.raises(ProbeError, match="install the NVIDIA driver") as caught:
        probe(require_gpu=True)
    assert caught.value.kind == "nvml_library_not_found"


def eight(lost: set[int], at: str = "nvmlDeviceGetHandleByIndex") -> list[Board]:
    """Eight GPUs on a switch, of which some have fallen off the bus."""
    return [
        Board(
            bus=f"00000000:{index + 1:02X}:00.0",
            links=[(1, HIDDEN, SWITCH)] * 18,
            lost_at=at if index in lost else None,
        )
        for index in range(8)
    ]


@pytest.mark.parametrize(
    "at",
    [
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetNvLinkState",
    ],
)
def test_one_lost_gpu_of_eight_leaves_seven_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    install(monkeypatch, eight({3}, at))
    assert main(["probe", "--gather", "none", "--require-gpu", "--json"]) == 0
    cluster = Cluster.model_validate_json(capsys.readouterr().out)
    assert [gpu.index for gpu in cluster.nodes[0].gpus] == [0, 1, 2, 4, 5, 6, 7]
    assert {link.kind for link in cluster.nodes[0].links} == {"NV18"}
    assert len(cluster.nodes[0].links) == 21
    assert "GPU 3 cannot be read" in cluster.notes[0]
    assert "lost" in cluster.notes[0]


def test_gpus_of_other_jobs_are_left_out_without_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = switched()
    boards[0].lost_at = "nvmlDeviceGetHandleByIndex"
    boards[0].lost_by = pynvml.NVML_ERROR_NO_PERMISSION
    install(monkeypatch, boards)
    cluster = probe(require_gpu=True)
    assert [gpu.index for gpu in cluster.nodes[0].gpus] == [1]
    assert cluster.notes[0].startswith("GPU 0 is not open to this user or job")


def test_links_of_an_unknown_gpu_run_at_the_rate_of_their_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boards = switched(name="NVIDIA H999", version=5)
    install(monkeypatch, boards)
    link = probe().nodes[0].links[0]
    assert (link.kind, link.bytes_per_s) == ("NV18", 18 * 50e9)


def test_eight_lost_gpus_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, eight(set(range(8))))
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi to fall back on
    assert main(["probe", "--gather", "none"]) == 4
    assert "a GPU has fallen off the bus" in capsys.readouterr().err


def test_fewer_lanes_lower_the_links_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = [*pair("NVIDIA L4", 23034), Board("NVIDIA L4", "00000000:03:00.0", 23034 * MIB)]
    boards[1].width_now = 4
    install(monkeypatch, boards)
    cluster = probe()
    assert [gpu.pcie_width for gpu in cluster.nodes[0].gpus] == [16, 4, 16]
    rates = {(link.a, link.b): link.bytes_per_s for link in cluster.nodes[0].links}
    assert rates == {(0, 1): 16e9, (0, 2): 64e9, (1, 2): 16e9}
    assert cluster.bandwidth([(0, 0), (0, 1)]) == 16e9
    assert any("GPU 1 has 4 of 16 PCIe lanes" in note for note in cluster.notes)


def test_a_power_limit_lowers_the_matrix_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [Board(limit_mw=343_000)])  # 0.49 of 700 W: a clock of 0.7
    cluster = probe()
    gpu = cluster.nodes[0].gpus[0]
    assert flops_per_s(gpu, "bfloat16") == pytest.approx(0.7 * 989.4e12, rel=0.01)
    assert gpu.memory_bytes_per_s is None
    assert any("343 W of its 700 W" in note for note in cluster.notes)


def test_a_clock_that_was_set_lowers_the_matrix_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    boost_hz = DEVICES["h200-sxm"].boost_hz
    assert boost_hz is not None
    install(monkeypatch, [Board(set_mhz=990)])
    cluster = probe()
    share = 990e6 / boost_hz
    table = DEVICES["h200-sxm"].flops_per_s["bfloat16"]
    assert flops_per_s(cluster.nodes[0].gpus[0], "bfloat16") == pytest.approx(share * table)
    assert any("990 MHz" in note for note in cluster.notes)


@pytest.mark.parametrize(
    "board",
    [
        Board(limit_mw=690_000),  # some watts below the default, as vendors set it
        Board(set_mhz=1590, default_mhz=1590),  # a default below the highest clock
        Board(limit_mw=None, set_mhz=None),  # a driver that does not tell
        Board(width_now=0),
    ],
)
def test_what_is_no_limit_changes_nothing(monkeypatch: pytest.MonkeyPatch, board: Board) -> None:
    install(monkeypatch, [board])
    cluster = probe()
    gpu = cluster.nodes[0].gpus[0]
    assert (gpu.flops_per_s, gpu.pcie_width, cluster.notes) == (None, 16, ())


SMI = """#!/bin/sh
case "$1" in
--query-gpu=*compute_cap*) echo 'Field "compute_cap" is not a valid field to query.' ;;
--query-gpu=*) printf '0, NVIDIA H200, GPU-a, 143771, 143000, 470.1\\n1, NVIDIA H200, GPU-b, 143771, 143001, 470.1\\n' ;;
topo) printf '\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\nGPU1\\tNV18\\t X \\n' ;;
esac
"""  # noqa: E501


def test_nvidia_smi_is_asked_where_nvml_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    node = probe(require_gpu=True).nodes[0]
    assert [gpu.memory_bytes for gpu in node.gpus] == [143000 * MIB, 143001 * MIB]
    assert node.links[0].kind == "NV18"
    assert node.driver == "470.1"
    tool.write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\n"
    )
    with pytest.raises(ProbeError) as caught:
        probe()
    assert caught.value.kind == "driver_library_mismatch"
