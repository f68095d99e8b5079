"""Keeps a rank on the CPUs beside its GPU: memory of the other socket is a hop further for both.

torchrun's agent would do it too, where ranks are as many as GPUs; but it takes rank n to run on GPU
n, and asks CUDA for the GPU's place, after which its forks cannot use CUDA.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

_SYSFS = Path("/sys")


def bind_to_gpu(device: torch.device, sysfs: Path = _SYSFS) -> None:
    """Let all threads of this process run only on CPUs of the GPU's NUMA node, if it has one."""
    known: Any = torch.cuda.get_device_properties(device)
    address = f"{known.pci_domain_id:04x}:{known.pci_bus_id:02x}:{known.pci_device_id:02x}.0"
    cpus = cpus_beside(address, sysfs) & os.sched_getaffinity(0)
    for thread in os.listdir("/proc/self/task") if cpus else ():
        # One may have ended since.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cpus)


def cpus_beside(pci_address: str, sysfs: Path = _SYSFS) -> set[int]:
    """Return the CPUs of a PCI device's NUMA node; none where the machine does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / pci_address / "numa_node").read_text())
        cpus = (sysfs / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):
        return set()
    found: set[int] = set()
    for part in filter(None, cpus.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
