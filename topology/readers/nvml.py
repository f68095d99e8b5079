"""Reads the GPUs of this machine and the links between them through NVML (package nvidia-ml-py)."""

import ctypes
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from rankwright.topology.errors import ProbeError, failure_of
from rankwright.topology.readers.cpu import usable_memory_bytes
from rankwright.topology.readers.found import FoundGpu, FoundMachine
from rankwright.topology.readers.health import health_notes
from rankwright.topology.readers.tool import end

# Names of NVML errors, and the failure that each is.
_FAILURES = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": "nvml_library_not_found",
    "NVML_ERROR_DRIVER_NOT_LOADED": "driver_not_loaded",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "driver_library_mismatch",
    "NVML_ERROR_GPU_IS_LOST": "device_lost",
    "NVML_ERROR_OPERATING_SYSTEM": "gpu_access_blocked",
    "NVML_ERROR_NO_PERMISSION": "no_permission",
    "NVML_ERROR_NOT_FOUND": "no_devices",
    "NVML_ERROR_UNKNOWN": "nvml_unknown_error",
}

# nvmlGpuTopologyLevel_t: the closest common ancestor of two devices on PCIe.
_ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}

# For each step, not in all: a GPU without persistence mode takes 2 to 4 s to wake, eight of them
# one after the other.
NVML_TIMEOUT_S = 10.0
_COMMAND = ("-m", "rankwright.topology.readers.nvml_facts")
_LIBRARY = "libnvidia-ml.so.1"


def read_nvml(sysfs: Path = Path("/sys")) -> FoundMachine:
    """Return what NVML knows of this machine; GPUs that it has lost are left out with a note.

    NVML numbers GPUs by PCI bus id, and so do we. It is asked in a process of its own, which is
    given up when a step takes more than `NVML_TIMEOUT_S`.

    Raises:
        ProbeError: The binding or the library is missing, the driver does not answer, or no GPU.
    """
    if find_spec("pynvml") is None:
        raise ProbeError(
            "nvml_binding_missing",
            "the Python package nvidia-ml-py is not installed; `pip install nvidia-ml-py`",
        )
    try:
        ctypes.CDLL(_LIBRARY)  # spares a machine without driver the process
    except OSError as error:
        raise failure_of("nvml_library_not_found", str(error)) from None
    return machine_of(ask_nvml(), sysfs)


def ask_nvml() -> dict[str, Any]:
    """Return the facts that `nvml_facts.py` found.

    Raises:
        ProbeError: NVML fails, its process crashes, or a step is not answered in time.
    """
    process = subprocess.Popen(
        [sys.executable, *_COMMAND],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    try:
        return facts_of(lambda: lines.get(timeout=NVML_TIMEOUT_S))
    finally:
        end(process)


def facts_of(next_line: Callable[[], str]) -> dict[str, Any]:
    """Return the facts at the end of a report.

    Args:
        next_line: Returns its next line, an empty one after the last.

    Raises:
        ProbeError: The report ends with an error, without an end, or stops (`queue.Empty`).
    """
    step = "the driver"
    try:
        while True:
            said = json.loads(next_line())
            if "facts" in said:
                facts: dict[str, Any] = said["facts"]
                return facts
            if "error" in said:
                raise _failure(said["error"])
            step = said["step"]
    except queue.Empty:
        raise failure_of(
            "driver_hung", f"no answer about {step} within {NVML_TIMEOUT_S:g} s"
        ) from None
    except ValueError:  # the process ended, or was cut off in the midst of a line
        raise failure_of("nvml_crashed", f"its process died while asked about {step}") from None


def _pass_on(stream: IO[str], lines: "queue.SimpleQueue[str]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")


def machine_of(facts: Mapping[str, Any], sysfs: Path) -> FoundMachine:
    """Return the facts of `nvml_facts.py` as a machine.

    Raises:
        ProbeError: There is no GPU, or none that can be read.
    """
    if not facts["gpus"]:
        raise failure_of("no_devices", "NVML counts 0 devices")
    found = [gpu for gpu in facts["gpus"] if "error" not in gpu]
    lost = [gpu for gpu in facts["gpus"] if "error" in gpu]
    if not found:
        raise _failure(lost[0]["error"])
    notes = [_left_out(gpu["index"], gpu["error"]) for gpu in lost]
    by_index = {gpu["index"]: gpu for gpu in found}
    kinds: dict[tuple[int, int], str] = {}
    staged: list[tuple[int, int]] = []
    for pair in facts["pairs"]:
        a, b = pair["a"], pair["b"]
        links = _nvlinks_between(by_index[a], by_index[b], pair["nvlink"])
        kinds[a, b] = f"NV{links}" if links else _ANCESTORS.get(pair["level"], "SYS")
        if not links and pair["readable"] is False:
            staged.append((a, b))
    if staged:
        notes.append(
            f"no peer-to-peer access between {len(staged)} of {len(kinds)} pairs of GPUs (first "
            f"{staged[0]}): their traffic is staged in host memory"
        )
    for gpu in found:
        notes += health_notes(gpu)
    gpus = tuple(_found_gpu(gpu, sysfs) for gpu in found)
    return FoundMachine(gpus, kinds, facts["driver"], tuple(notes))


def lost_note(index: int, reason: str) -> str:
    """Return the note on a GPU that is there and cannot be read."""
    return (
        f"GPU {index} cannot be read ({reason}) and is left out: see Xid errors in `dmesg`, then "
        "reset it or reboot; until then launch with the uuids of the others in "
        "CUDA_VISIBLE_DEVICES, since CUDA may number them anew"
    )


def _left_out(index: int, error: Mapping[str, str]) -> str:
    if error["name"] == "NVML_ERROR_NO_PERMISSION":
        return f"GPU {index} is not open to this user or job ({error['text']}) and is left out"
    return lost_note(index, error["text"])


def _found_gpu(gpu: Mapping[str, Any], sysfs: Path) -> FoundGpu:
    capability = gpu["capability"]
    total, free = gpu["total_bytes"], gpu["free_bytes"]
    if total is None:  # a board that shares the memory of its host
        total, free = usable_memory_bytes()
    return FoundGpu(
        index=gpu["index"],
        name=gpu["name"],
        total_memory_bytes=total,
        free_memory_bytes=free,
        uuid=gpu["uuid"],
        bus_id=gpu["bus"],
        compute_capability=(capability[0], capability[1]) if capability else None,
        pcie_generation=gpu["pcie_generation"] or None,
        pcie_width=gpu["pcie_width"] or None,
        pcie_width_now=gpu["pcie_width_now"] or None,
        numa_node=_numa_node(gpu["bus"], gpu["near"], sysfs),
        num_processes=gpu["processes"],
        mig=gpu["mig"],
        cuda_cores=gpu["cores"],
        sm_clock_hz=_scaled(gpu["sm_mhz"], 1e6),
        memory_clock_hz=_scaled(gpu["memory_mhz"], 1e6),
        memory_bus_bits=gpu["bus_bits"],
        power_limit_w=_scaled(gpu["limit_mw"], 1e-3),
        default_power_limit_w=_scaled(gpu["default_mw"], 1e-3),
        set_clock_hz=_scaled(gpu["set_mhz"], 1e6),
        default_clock_hz=_scaled(gpu["default_mhz"], 1e6),
        nvlink_version=gpu["nvlinks"]["version"],
    )


def _nvlinks_between(a: Mapping[str, Any], b: Mapping[str, Any], routed: bool | None) -> int:
    direct: int = a["nvlinks"]["to_bus"].get(b["bus"], 0)
    if direct:
        return direct
    # Links to a switch carry nothing until the fabric manager has set up the routes.
    switched: int = min(a["nvlinks"]["to_switch"], b["nvlinks"]["to_switch"])
    return 0 if routed is False else switched


def _numa_node(bus: str, near: list[int], sysfs: Path) -> int | None:
    """Return the domain of sysfs, or where a container hides that, the only one near the GPU."""
    domain, _, rest = bus.lower().partition(":")
    path = sysfs / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node"
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        node = -1
    if node >= 0:
        return node
    domains = [
        at * 64 + bit for at, word in enumerate(near) for bit in range(64) if word >> bit & 1
    ]
    return domains[0] if len(domains) == 1 else None


def _scaled(value: int | None, unit: float) -> float | None:
    return value * unit if value else None


def _failure(error: Mapping[str, str]) -> ProbeError:
    return failure_of(_FAILURES.get(error["name"], "nvml_unknown_error"), f"NVML: {error['text']}")
