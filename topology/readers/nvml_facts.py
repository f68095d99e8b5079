"""Asks NVML all that we want to know, in a process of its own.

`python -m rankwright.topology.readers.nvml_facts` prints a line of JSON before each step, so that
whoever reads them (`nvml.py`) knows that the driver still answers, and at the end the facts or the
error. A driver call that never returns, or that crashes as some do beside a lost GPU, then costs
this process only. Imports nothing of ours, to start at once.
"""

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import combinations
from typing import Any

Facts = dict[str, Any]

_P2P_READ = 0  # nvmlGpuP2PCapsIndex_t; the binding's NVML_P2P_CAPS_INDEX_READ is a tuple by slip
_AFFINITY_WORDS = 4  # of 64 bits: 256 NUMA domains


def main() -> None:
    """Print the report of this machine."""

    def tell(said: Facts) -> None:
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()

    report(import_module("pynvml"), tell)


def report(nvml: Any, tell: Callable[[Facts], None]) -> None:
    """Tell each `step` before it is taken, then the `facts`, or the `error`.

    Args:
        nvml: The binding.
        tell: Gets what is to be said.
    """
    tell({"step": "the driver"})
    try:
        nvml.nvmlInit()
        tell({"facts": collect(nvml, lambda step: tell({"step": step}))})
    except nvml.NVMLError as error:
        tell({"error": error_of(nvml, error)})
    # No nvmlShutdown: a GPU that is lost can hang it, and the process ends anyway.


def collect(nvml: Any, tell: Callable[[str], None] = lambda step: None) -> Facts:
    """Return `driver`, `gpus` and `pairs` as NVML has them.

    A GPU that cannot be read has `index` and `error` only; the pairs are of the others.

    Args:
        nvml: The binding, after its init.
        tell: Gets a word before each part that asks the driver.
    """
    gpus: list[Facts] = []
    handles: dict[int, Any] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        tell(f"GPU {index}")
        try:
            handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append({"index": index, **_gpu(nvml, handles[index])})
        except nvml.NVMLError as error:
            handles.pop(index, None)
            gpus.append({"index": index, "error": error_of(nvml, error)})
    buses = [gpu["bus"] for gpu in gpus if "bus" in gpu]
    for at, gpu in enumerate(gpus):
        index = gpu["index"]
        if index in handles:
            tell(f"NVLinks of GPU {index}")
            try:
                gpu["nvlinks"] = _nvlinks(nvml, handles[index], buses)
            except nvml.NVMLError as error:  # lost since it was read
                del handles[index]
                gpus[at] = {"index": index, "error": error_of(nvml, error)}
    pairs: list[Facts] = []
    for a, b in combinations(handles, 2):
        tell(f"GPU {a} and GPU {b}")
        pairs.append({"a": a, "b": b, **_pair(nvml, handles[a], handles[b])})
    driver = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
    return {"driver": _text(driver) if driver else None, "gpus": gpus, "pairs": pairs}


def error_of(nvml: Any, error: Any) -> Facts:
    """Return the name of an NVML error, such as `NVML_ERROR_GPU_IS_LOST`, and its text."""
    names = [
        name
        for name in dir(nvml)
        if name.startswith("NVML_ERROR_") and getattr(nvml, name) == error.value
    ]
    return {"name": names[0] if names else "NVML_ERROR_UNKNOWN", "text": str(error)}


def _gpu(nvml: Any, handle: Any) -> Facts:
    def ask(name: str, *arguments: object) -> Any:
        return _ask(nvml, getattr(nvml, name, _missing), handle, *arguments)

    memory = ask("nvmlDeviceGetMemoryInfo")  # not supported by boards that share the host's
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    mig = ask("nvmlDeviceGetMigMode")
    uuid = ask("nvmlDeviceGetUUID")
    ecc = ask("nvmlDeviceGetEccMode")
    near = ask("nvmlDeviceGetMemoryAffinity", _AFFINITY_WORDS, nvml.NVML_AFFINITY_SCOPE_NODE)
    uncorrected = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    return {
        "name": _text(nvml.nvmlDeviceGetName(handle)),
        "bus": _text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "total_bytes": memory.total if memory else None,
        "free_bytes": memory.free if memory else None,
        "uuid": _text(uuid) if uuid else None,
        "capability": list(capability) if capability else None,
        # The most that device and slot can do together: an idle link runs at a lower generation.
        "pcie_generation": ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        "pcie_width": ask("nvmlDeviceGetMaxPcieLinkWidth"),
        "pcie_width_now": ask("nvmlDeviceGetCurrPcieLinkWidth"),
        "near": [int(word) for word in near or ()],
        "processes": len(ask("nvmlDeviceGetComputeRunningProcesses") or ()),
        "mig": bool(mig and mig[0]),
        "cores": ask("nvmlDeviceGetNumGpuCores"),
        "sm_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        "memory_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
        "bus_bits": ask("nvmlDeviceGetMemoryBusWidth"),
        "limit_mw": ask("nvmlDeviceGetPowerManagementLimit"),
        "default_mw": ask("nvmlDeviceGetPowerManagementDefaultLimit"),
        "set_mhz": ask("nvmlDeviceGetApplicationsClock", nvml.NVML_CLOCK_GRAPHICS),
        "default_mhz": ask("nvmlDeviceGetDefaultApplicationsClock", nvml.NVML_CLOCK_GRAPHICS),
        "slowdowns": ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
        "uncorrected": ask("nvmlDeviceGetTotalEccErrors", *uncorrected),
        "ecc": list(ecc) if ecc else None,
        "compute_mode": ask("nvmlDeviceGetComputeMode"),
    }


def _nvlinks(nvml: Any, handle: Any, buses: Sequence[str]) -> Facts:
    """Return the active NVLinks of one GPU by what they lead to, and their version."""
    to_bus: dict[str, int] = {}
    to_switch = 0
    version: int | None = None
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        state = _ask(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link)
        if state is None:  # past the last link of this GPU, or no NVLink at all
            break
        if state != nvml.NVML_FEATURE_ENABLED:
            continue
        version = version or _ask(nvml, nvml.nvmlDeviceGetNvLinkVersion, handle, link)
        remote = _ask(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
        bus = _text(remote.busId) if remote is not None else ""
        kind = _ask(nvml, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        if bus in buses:
            to_bus[bus] = to_bus.get(bus, 0) + 1
        elif kind in (None, nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH):
            # Drivers before 460 do not tell the type; virtual machines hide the switch's bus id.
            to_switch += 1
    return {"to_bus": to_bus, "to_switch": to_switch, "version": version}


def _pair(nvml: Any, a: Any, b: Any) -> Facts:
    """Return the common ancestor of two GPUs, and whether they reach each other's memory."""

    def status(capability: int) -> bool | None:
        found = _ask(nvml, nvml.nvmlDeviceGetP2PStatus, a, b, capability)
        return None if found is None else bool(found == nvml.NVML_P2P_STATUS_OK)

    return {
        "level": _ask(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, a, b),
        "readable": status(_P2P_READ),
        "nvlink": status(nvml.NVML_P2P_CAPS_INDEX_NVLINK),
    }


def _ask(nvml: Any, function: Callable[..., Any], *arguments: object) -> Any:
    """Return what NVML answers, or None where this GPU or driver does not support the question."""
    try:
        return function(*arguments)
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_GPU_IS_LOST:  # that is an answer to any question
            raise
        return None


def _missing(*arguments: object) -> None:
    """Answer for a function that this binding lacks."""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    main()
