"""What becomes of nvidia-smi when it hangs, and when a GPU of several is lost."""

from pathlib import Path

import pytest

from rankwright.topology.errors import ProbeError
from rankwright.topology.readers import nvidia_smi_tool
from rankwright.topology.readers.assemble import make_cluster
from rankwright.topology.readers.nvidia_smi_tool import read_nvidia_smi

LOST = "Unable to determine the device handle for GPU3: 0000:3D:00.0: GPU is lost.  Reboot the system to recover this GPU"  # noqa: E501
UNKNOWN = "Unable to determine the device handle for GPU0000:3D:00.0: Unknown Error"

# Eight GPUs of which those in $lost cannot be opened: a query of all fails, as the tool does, and
# one of a GPU that answers (-i) does not.
SMI = """#!/bin/sh
number=8
lost=" {lost} "
if [ "$1" = topo ]; then {topo}; exit; fi
if [ "$1" != -i ]; then echo "{message}"; exit 15; fi
case "$lost" in *" $2 "*) echo "{message}"; exit 15 ;; esac
if [ "$2" -ge "$number" ]; then echo "No devices were found"; exit 6; fi
case "$3" in *applications*) echo 'Field "x" is not a valid field to query.'; exit 2 ;; esac
echo "$2, NVIDIA A100-SXM4-80GB, GPU-$2, 81920, 81000, 8.0, 4, 16, Disabled, 550.1"
"""
HEADER = "\t" + "\t".join(f"GPU{index}" for index in range(8))
ROWS = [
    f"GPU{a}\t" + "\t".join(" X " if a == b else "NV12" for b in range(8)) + "\t0-63\t0"
    for a in range(8)
]
TABLE = "\n".join([HEADER + "\tCPU Affinity\tNUMA Affinity", *ROWS])


def install(
    folder: Path, patch: pytest.MonkeyPatch, lost: str, topo: str, message: str = LOST
) -> None:
    tool = folder / "nvidia-smi"
    (folder / "table").write_text(TABLE + "\n")
    topo = topo.replace("TABLE", f"/bin/cat {folder / 'table'}")
    tool.write_text(SMI.format(lost=lost, topo=topo, message=message))
    tool.chmod(0o755)
    patch.setenv("PATH", str(folder), prepend=":")


def test_an_nvidia_smi_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 30\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert nvidia_smi_tool.SMI_TIMEOUT_S == 10
    monkeypatch.setattr(nvidia_smi_tool, "SMI_TIMEOUT_S", 0.3)
    with pytest.raises(ProbeError, match=r"hangs.*dmesg") as caught:
        read_nvidia_smi()
    assert caught.value.kind == "tool_hung"


@pytest.mark.parametrize("message", [LOST, UNKNOWN])
def test_one_lost_gpu_of_eight_leaves_seven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    install(tmp_path, monkeypatch, "3", "TABLE", message)
    cluster = make_cluster(read_nvidia_smi(), "test")
    node = cluster.nodes[0]
    assert [gpu.index for gpu in node.gpus] == [0, 1, 2, 4, 5, 6, 7]
    assert {link.kind for link in node.links} == {"NV12"}
    assert {gpu.numa_node for gpu in node.gpus} == {0}
    assert node.driver == "550.1"
    assert "GPU 3 cannot be read" in cluster.notes[0]


def test_without_a_table_of_links_seven_are_left_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "0 6", f'echo "{LOST}"')
    cluster = make_cluster(read_nvidia_smi(), "test")
    assert cluster.num_gpus == 6
    assert {link.kind for link in cluster.nodes[0].links} == {"SYS"}
    assert any("topo -m failed" in note for note in cluster.notes)


def test_all_lost_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "0 1 2 3 4 5 6 7", "TABLE")
    with pytest.raises(ProbeError, match="fallen off the bus") as caught:
        read_nvidia_smi()
    assert caught.value.kind == "device_lost"
