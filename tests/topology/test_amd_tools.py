"""Machines with AMD GPUs, by stand-ins for the `amd-smi` or `rocm-smi` that they have."""

import json
from pathlib import Path

import pytest
from tests.topology.test_amd_smi import metric_json, new_json, static_json

from rankwright.topology import probe as probe_module
from rankwright.topology.errors import ProbeError, failure_of
from rankwright.topology.probe import probe
from rankwright.topology.readers import amd_smi_tool

NAMES = "".join(f"GPU[{g}]\t\t: Card Series: \t\tAMD Instinct MI300X OAM\n" for g in range(3))
MEMORY = "".join(
    f"GPU[{g}]\t\t: VRAM Total Memory (B): 206141652992\n"
    f"GPU[{g}]\t\t: VRAM Total Used Memory (B): {297771008 + g}\n"
    f"GPU[{g}]\t\t: PCI Bus: 000{g}:01:00.0\n"
    for g in range(3)
)
TOPOLOGY = """\
========================= Weight between two GPUs =========================
       GPU0         GPU1         GPU2
GPU0   0            15           30
GPU1   15           0            15
GPU2   30           15           0
======================= Link Type between two GPUs ========================
       GPU0         GPU1         GPU2
GPU0   0            XGMI         XGMI
GPU1   XGMI         0            XGMI
GPU2   XGMI         XGMI         0
=============================== Numa Nodes ================================
GPU[0]\t\t: (Topology) Numa Node: 0
GPU[1]\t\t: (Topology) Numa Node: 0
GPU[2]\t\t: (Topology) Numa Node: 1
========================== End of ROCm SMI Log ============================
"""


@pytest.fixture(autouse=True)
def _without_nvidia(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> None:
        raise failure_of("nvml_library_not_found", "libnvidia-ml.so.1")

    monkeypatch.setattr(probe_module, "_read_gpus", none)
    monkeypatch.setattr(probe_module, "_pci_devices", lambda: iter([tmp_path / "card"]))
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(amd_smi_tool, "AMD_TIMEOUT_S", 5.0)


def install(folder: Path, says: str) -> None:
    (folder / "said").write_text(says)
    tool = folder / "rocm-smi"
    tool.write_text(f"#!/bin/sh\nexec /bin/cat {folder / 'said'}\n")
    tool.chmod(0o755)


def install_amd_smi(folder: Path, **says: object) -> None:
    """Install an `amd-smi` that prints, for a command, JSON or text; nothing for any other."""
    for command, said in says.items():
        text = said if isinstance(said, str) else json.dumps(said, indent=4)
        (folder / f"amd-smi-{command}").write_text(text)
    tool = folder / "amd-smi"
    tool.write_text(f"#!/bin/sh\n/bin/cat {folder}/amd-smi-$1 2>/dev/null || echo invalid $1\n")
    tool.chmod(0o755)


def show_card(folder: Path) -> None:
    (folder / "card").mkdir()
    (folder / "card" / "vendor").write_text("0x1002\n")
    (folder / "card" / "class").write_text("0x120000\n")


def test_amd_gpus_are_read_with_their_free_memory(tmp_path: Path) -> None:
    install(tmp_path, NAMES + MEMORY + TOPOLOGY)
    cluster = probe(require_gpu=True)
    assert cluster.describe() == "3 x mi300x"
    gpus = cluster.nodes[0].gpus
    assert [gpu.memory_bytes for gpu in gpus] == [205843881984 - g for g in range(3)]
    assert [gpu.numa_node for gpu in gpus] == [0, 0, 1]
    assert [link.kind for link in cluster.nodes[0].links] == ["XGMI"] * 3
    far, untried = cluster.notes
    assert far.startswith("1 pairs of GPUs have no XGMI link of their own")
    assert "no plan has been run on one yet" in untried


def test_hip_visible_devices_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, NAMES + MEMORY + TOPOLOGY)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,1")
    assert [gpu.index for gpu in probe().nodes[0].gpus] == [1, 2]


def test_a_tool_that_is_missing_or_finds_nothing_is_no_amd_machine(tmp_path: Path) -> None:
    assert {gpu.device for gpu in probe().nodes[0].gpus} == {"cpu"}
    install(tmp_path, "ERROR:root:Driver not initialized (amdgpu not found in modules)\n")
    cluster = probe()
    assert {gpu.device for gpu in cluster.nodes[0].gpus} == {"cpu"}
    assert not any("AMD" in note for note in cluster.notes)
    with pytest.raises(ProbeError, match="install the NVIDIA driver"):
        probe(require_gpu=True)


def test_accelerators_without_their_tool_or_driver_are_not_passed_over(tmp_path: Path) -> None:
    show_card(tmp_path)
    assert "neither amd-smi nor rocm-smi is installed here: they are left out" in probe().notes[-1]
    install(tmp_path, "ERROR:root:Driver not initialized (amdgpu not found in modules)\n")
    with pytest.raises(ProbeError, match=r"Driver not initialized.*modprobe amdgpu") as caught:
        probe()
    assert caught.value.kind == "no_devices"


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        (
            NAMES + TOPOLOGY.replace("15           0            15", "15  0"),
            "inconsistent_topology",
        ),
        (NAMES.replace("MI300X", "MI999") + TOPOLOGY, "unsupported_gpu"),
        (NAMES, "unsupported_gpu"),
    ],
)
def test_what_cannot_be_read_is_never_hidden_behind_cpu_ranks(
    tmp_path: Path, says: str, kind: str
) -> None:
    install(tmp_path, says)
    with pytest.raises(ProbeError) as caught:
        probe()
    assert caught.value.kind == kind


def test_a_tool_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "rocm-smi"
    tool.write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    tool.chmod(0o755)
    monkeypatch.setattr(amd_smi_tool, "AMD_TIMEOUT_S", 0.3)
    with pytest.raises(ProbeError, match="rocm-smi hangs") as caught:
        probe()
    assert caught.value.kind == "tool_hung"


def test_amd_smi_goes_before_rocm_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, NAMES + MEMORY + TOPOLOGY)
    install_amd_smi(tmp_path, topology=new_json(), static=static_json(), metric=metric_json())
    cluster = probe(require_gpu=True)
    assert cluster.describe() == "3 x mi300x"
    assert [gpu.numa_node for gpu in cluster.nodes[0].gpus] == [0, 0, 1]
    assert [gpu.memory_bytes for gpu in cluster.nodes[0].gpus] == [196000 * 2**20] * 3
    assert "no plan has been run on one yet" in cluster.notes[-1]
    # HIP counts the other way round, and its variable with it.
    install_amd_smi(tmp_path, list=[{"gpu": gpu, "hip_id": 2 - gpu} for gpu in range(3)])
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1")
    kept = probe().nodes[0]
    assert [gpu.index for gpu in kept.gpus] == [0, 1]
    assert [link.kind for link in kept.links] == ["XGMI"]
    assert [gpu.numa_node for gpu in kept.gpus] == [1, 0]


def test_rocm_smi_answers_where_amd_smi_cannot(tmp_path: Path) -> None:
    install_amd_smi(
        tmp_path, topology="RuntimeError: User is missing the following required groups"
    )
    with pytest.raises(ProbeError, match="may not read the AMD GPUs") as caught:
        probe()
    assert caught.value.kind == "no_permission"
    install(tmp_path, NAMES + MEMORY + TOPOLOGY)
    assert probe().describe() == "3 x mi300x"


def test_an_amd_smi_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, NAMES + MEMORY + TOPOLOGY)
    tool = tmp_path / "amd-smi"
    tool.write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    tool.chmod(0o755)
    monkeypatch.setattr(amd_smi_tool, "AMD_TIMEOUT_S", 0.3)
    with pytest.raises(ProbeError, match="amd-smi hangs"):
        probe()


def test_why_amd_smi_failed_is_not_hidden_by_a_rocm_smi_that_finds_nothing(tmp_path: Path) -> None:
    install(tmp_path, "")
    install_amd_smi(tmp_path, topology="User is missing the following required groups: render")
    with pytest.raises(ProbeError) as caught:
        probe()
    assert caught.value.kind == "no_permission"
