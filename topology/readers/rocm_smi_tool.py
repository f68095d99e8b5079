"""Asks the `rocm-smi` of this machine for its AMD GPUs."""

import subprocess
from dataclasses import replace

from rankwright.topology.errors import ProbeError
from rankwright.topology.readers.found import FoundMachine
from rankwright.topology.readers.rocm_smi import rocm_machine
from rankwright.topology.readers.tool import run_tool

ROCM_TIMEOUT_S = 10.0
_COMMAND = ("rocm-smi", "--showproductname", "--showbus", "--showmeminfo", "vram", "--showtopo")
_UNTRIED = "AMD GPUs are planned for by their data sheets; no plan has been run on one yet"


def read_rocm_smi() -> FoundMachine:
    """Return the AMD GPUs of this machine, with a note that plans are untried on them.

    Raises:
        ProbeError: The tool is missing (`tool_not_found`), finds no GPU (`no_devices`), hangs, or
            prints what cannot be read.
    """
    try:
        text = run_tool(_COMMAND, ROCM_TIMEOUT_S)
    except FileNotFoundError:
        raise ProbeError("tool_not_found", "rocm-smi is not installed here") from None
    except subprocess.TimeoutExpired:
        raise ProbeError(
            "tool_hung",
            f"rocm-smi hangs (no answer within {ROCM_TIMEOUT_S:g} s); see `dmesg`, reset the GPU "
            "that hangs, or reboot",
        ) from None
    except OSError as error:
        raise ProbeError("tool_not_found", f"rocm-smi cannot be started: {error}") from None
    if "Card" not in text:
        said = " ".join(text.split())[-200:] or "it says nothing"
        raise ProbeError(
            "no_devices", f"rocm-smi names no GPU ({said}); is the driver amdgpu loaded?"
        )
    try:
        machine = rocm_machine(text)
    except ValueError as error:
        raise ProbeError("unsupported_gpu", f"rocm-smi: {error}") from None
    return replace(machine, notes=(*machine.notes, _UNTRIED))
