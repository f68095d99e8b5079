"""NVML is asked in a process of its own: what becomes of one that hangs, crashes or loses a GPU.

That process is real. It imports a module `pynvml` made here, in place of the binding, which has
only what the case needs.
"""

import ctypes
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwright.cli import main
from rankwright.topology.errors import ProbeError
from rankwright.topology.probe import probe
from rankwright.topology.readers import nvml
from rankwright.topology.readers.nvml import read_nvml

# A binding for one GPU that supports nothing but what every GPU must.
BINDING = """
import os, signal, time
from types import SimpleNamespace

NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_GPU_IS_LOST = 3, 15
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_AFFINITY_SCOPE_NODE = 1, 0, 0
NVML_CLOCK_GRAPHICS, NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_NVLINK_MAX_LINKS = 0, 1, 2, 18


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__({3: "Not Supported", 15: "GPU is lost"}[value])
        self.value = value


def __getattr__(name):
    def unsupported(*arguments):
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)

    if name.startswith("__"):
        raise AttributeError(name)
    return unsupported


def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return "NVIDIA L4"
def nvmlDeviceGetPciInfo(handle): return SimpleNamespace(busId=f"00000000:0{handle}:00.0")
def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(total=23034 * 2**20, free=22000 * 2**20)
"""


@pytest.fixture
def binding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the process imports as `pynvml`."""
    file = tmp_path / "pynvml.py"
    file.write_text(BINDING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return file


def test_a_process_of_its_own_reads_the_same(binding: Path) -> None:
    machine = read_nvml()
    assert [gpu.name for gpu in machine.gpus] == ["NVIDIA L4"] * 2
    assert machine.kinds == {(0, 1): "SYS"}
    assert probe(require_gpu=True).num_gpus == 2


def test_a_driver_that_hangs_is_given_up(
    binding: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nvml.NVML_TIMEOUT_S == 10
    monkeypatch.setattr(nvml, "NVML_TIMEOUT_S", 3.0)
    binding.write_text(
        BINDING + "def nvmlDeviceGetHandleByIndex(index): time.sleep(600 * index); return index\n"
    )
    started_s = time.monotonic()
    assert main(["probe", "--gather", "none"]) == 4
    assert time.monotonic() - started_s < 60
    said = " ".join(capsys.readouterr().err.split())
    assert "the NVIDIA driver does not answer (no answer about GPU 1 within 3 s)" in said


def test_gpus_that_wake_slowly_are_waited_for(
    binding: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "NVML_TIMEOUT_S", 3.0)
    binding.write_text(
        BINDING
        + "def nvmlDeviceGetCount(): return 4\n"
        + "def nvmlDeviceGetHandleByIndex(index): time.sleep(1.0); return index\n"
    )
    assert len(read_nvml().gpus) == 4  # 4 s in all, more than a step may take


def test_a_crash_is_named_and_harms_nobody(binding: Path) -> None:
    binding.write_text(
        BINDING + "def nvmlDeviceGetName(handle): os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    with pytest.raises(ProbeError, match=r"NVML crashed.*asked about GPU 0") as caught:
        probe()
    assert caught.value.kind == "nvml_crashed"


def test_a_lost_gpu_leaves_the_other(binding: Path) -> None:
    binding.write_text(
        BINDING
        + "def nvmlDeviceGetHandleByIndex(index):\n"
        + "    if index == 0: raise NVMLError(NVML_ERROR_GPU_IS_LOST)\n"
        + "    return index\n"
    )
    machine = read_nvml()
    assert [gpu.index for gpu in machine.gpus] == [1]
    assert "GPU 0 cannot be read (GPU is lost)" in machine.notes[0]


def test_a_process_that_cannot_be_killed_is_left_behind(
    binding: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As one within a call of a driver that hangs: the signal changes nothing.
    left: list[Any] = []
    kill = subprocess.Popen.kill
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: left.append(process))
    monkeypatch.setattr(nvml, "NVML_TIMEOUT_S", 0.2)
    binding.write_text(BINDING + "def nvmlInit(): time.sleep(600)\n")
    try:
        with pytest.raises(ProbeError, match="does not answer") as caught:
            read_nvml()
        assert caught.value.kind == "driver_hung"
        assert left[0].poll() is None
    finally:
        for process in left:
            kill(process)
            process.wait()


def test_without_a_driver_no_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(nvml, "subprocess", SimpleNamespace())
    with pytest.raises(ProbeError) as caught:
        read_nvml()
    assert caught.value.kind == "nvml_library_not_found"
