"""Asks the `amd-smi` of this machine for its AMD GPUs; `rocm-smi` where there is only that."""

import subprocess
from collections.abc import Callable
from dataclasses import replace

from rankwright.topology.errors import ProbeError, find_failure
from rankwright.topology.readers.amd_smi import amd_machine
from rankwright.topology.readers.amd_smi_gpus import records
from rankwright.topology.readers.found import FoundMachine
from rankwright.topology.readers.rocm_smi import rocm_machine
from rankwright.topology.readers.tool import run_tool

AMD_TIMEOUT_S = 10.0
# Of several commands of amd-smi each prints its own JSON; old versions lack the last two.
_AMD_COMMANDS = (
    ("amd-smi", "topology", "--json"),
    ("amd-smi", "static", "--json"),
    ("amd-smi", "metric", "--mem-usage", "--json"),
    ("amd-smi", "list", "-e", "--json"),
)
_ROCM_COMMANDS = (
    ("rocm-smi", "--showproductname", "--showbus", "--showmeminfo", "vram", "--showtopo"),
)
_UNTRIED = "AMD GPUs are planned for by their data sheets; no plan has been run on one yet"


def read_amd() -> FoundMachine:
    """Return the AMD GPUs of this machine, with a note that plans are untried on them.

    Raises:
        ProbeError: The tools are missing (`tool_not_found`), find no GPU (`no_devices`), hang, or
            print what cannot be read. What amd-smi says counts unless rocm-smi does better.
    """
    try:
        return _read("amd-smi", _AMD_COMMANDS, lambda text: bool(records(text)), amd_machine)
    except ProbeError as error:
        if error.kind == "tool_hung":  # so would the other
            raise
        amd_error = error
    try:
        return _read("rocm-smi", _ROCM_COMMANDS, lambda text: "Card" in text, rocm_machine)
    except ProbeError as error:
        if amd_error.kind != "tool_not_found":
            raise amd_error from None
        if error.kind != "tool_not_found":
            raise
        raise ProbeError(
            "tool_not_found", "neither amd-smi nor rocm-smi is installed here"
        ) from None


def _read(
    tool: str,
    commands: tuple[tuple[str, ...], ...],
    names_gpus: Callable[[str], bool],
    machine_of: Callable[[str], FoundMachine],
) -> FoundMachine:
    text = "\n".join(_said(tool, command) for command in commands)
    if not names_gpus(text):
        said = " ".join(text.split())[-200:] or "it says nothing"
        raise find_failure(text) or ProbeError(
            "no_devices", f"{tool} names no GPU ({said}); is the driver amdgpu loaded?"
        )
    try:
        machine = machine_of(text)
    except ValueError as error:
        raise ProbeError("unsupported_gpu", f"{tool}: {error}") from None
    return replace(machine, notes=(*machine.notes, _UNTRIED))


def _said(tool: str, command: tuple[str, ...]) -> str:
    try:
        return run_tool(command, AMD_TIMEOUT_S)
    except FileNotFoundError:
        raise ProbeError("tool_not_found", f"{tool} is not installed here") from None
    except subprocess.TimeoutExpired:
        raise ProbeError(
            "tool_hung",
            f"{tool} hangs (no answer within {AMD_TIMEOUT_S:g} s); see `dmesg`, reset the GPU "
            "that hangs, or reboot",
        ) from None
    except OSError as error:
        raise ProbeError("tool_not_found", f"{tool} cannot be started: {error}") from None
