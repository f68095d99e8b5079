"""What the link tokens of nvidia-smi mean, and what a link of each kind is worth.

The tokens are those of `nvidia-smi topo -m`: `NV#` (bonded NVLinks), `PIX` (one PCIe switch), `PXB`
(several), `PHB` (the CPU's host bridge), `NODE` (between host bridges of one NUMA node), `SYS`
(between sockets), and the older `SOC` for `SYS`. Two are ours: `XGMI` joins AMD GPUs, `SHM` joins
CPU ranks through the memory of their machine.
"""

import re
from typing import TYPE_CHECKING

from rankwright.topology.devices import device_of, pcie_bytes_per_s

if TYPE_CHECKING:
    from rankwright.topology.cluster import Gpu

PCIE_KINDS = ("PIX", "PXB", "PHB", "NODE", "SYS", "SOC")

_NVLINK = re.compile(r"NV(\d+)$")

# Seconds that one step of a ring adds to a small collective. Fitted to published NCCL latencies of
# all-gathers and all-reduces of 512 bytes over 2, 4 and 8 GPUs (aiconfigurator@095f58a5, NCCL
# 2.27): 0.8 us a step on H100 and H200, 1.0 on A100, 1.3 on L40S through the host. NCCL's own model
# says 0.6 (NVLink) and 1.0 (PCIe) with its LL protocol (src/graph/tuning.cc, `hwLat`), which is
# what one switch without a host in between is given here.
NVLINK_LATENCY_S = 0.8e-6
SWITCH_LATENCY_S = 1.0e-6
HOST_LATENCY_S = 1.3e-6
# gloo between CPU ranks of one machine, as the executor uses it: 2 ranks on a busy 2-core machine,
# torch 2.13, 2026-11-21. A 4-byte all-reduce (2 steps) took 92 us at best and send plus receive
# 102 us; 16 MiB went from rank to rank at 1.65 GB/s.
SHM_LATENCY_S = 50e-6
SHM_BYTES_PER_S = 1.6e9

# Between sockets a GPU's traffic meets the CPU's own link. NCCL reckons with 10 GB/s (Skylake), 16
# (AMD), 22 (Sapphire Rapids) and 40 (Emerald Rapids): src/graph/topo.h. The middle is used.
SOCKET_BYTES_PER_S = 22e9

# One NVLink each way, by compute capability: V100 and A100 25 GB/s, GA102 boards 14.0625, Hopper
# 25, Blackwell 50 (data sheets of the GPUs; the sum over a device's links is its `scale_up` rate).
_NVLINK_BYTES_PER_S: dict[tuple[int, int], float] = {
    (6, 0): 20e9,
    (7, 0): 25e9,
    (7, 5): 25e9,
    (8, 0): 25e9,
    (8, 6): 14.0625e9,
    (9, 0): 25e9,
    (10, 0): 50e9,
    (10, 3): 50e9,
}

# The same by version, for a GPU that no table knows; GA102 boards run version 3 at their own rate.
_BY_VERSION: dict[int | None, float] = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}


def nvlink_count(kind: str) -> int:
    """Return the number of NVLinks in a token, 0 if it is none.

    >>> nvlink_count("NV18")
    18
    """
    match = _NVLINK.match(kind)
    return int(match.group(1)) if match else 0


def is_direct(kind: str) -> bool:
    """Return whether the link bypasses PCIe: NVLink, xGMI, or memory shared by CPU ranks."""
    return nvlink_count(kind) > 0 or kind in ("XGMI", "SHM")


def joins_island(kind: str) -> bool:
    """Return whether GPUs joined by such a link form an island: direct, or below one PCIe root."""
    return is_direct(kind) or kind in ("PIX", "PXB")


def pcie_rate_of(gpu: "Gpu") -> float:
    """Return the PCIe line rate of a GPU each way in bytes/s: as probed, else the device's."""
    device = device_of(gpu)
    if gpu.pcie_generation is None and device is not None:
        return device.pcie_bytes_per_s
    return pcie_bytes_per_s(gpu.pcie_generation, gpu.pcie_width)


def link_bytes_per_s(kind: str, a: "Gpu", b: "Gpu") -> float:
    """Return what a link of `kind` between two GPUs carries each way in bytes/s.

    Raises:
        ValueError: `kind` is no link token.
    """
    links = nvlink_count(kind)
    if links:
        return links * min(_nvlink_rate_of(a), _nvlink_rate_of(b))
    if kind == "SHM":
        return SHM_BYTES_PER_S
    if kind == "XGMI":
        return min(_mesh_rate_of(a), _mesh_rate_of(b))
    if kind not in PCIE_KINDS:
        raise ValueError(
            f"unknown link kind {kind!r}; expected NV#, XGMI, SHM or one of {', '.join(PCIE_KINDS)}"
        )
    rate = min(pcie_rate_of(a), pcie_rate_of(b))
    return min(rate, SOCKET_BYTES_PER_S) if kind in ("SYS", "SOC") else rate


def link_latency_s(kind: str) -> float:
    """Return the seconds that one hop over a link of `kind` adds to a small collective."""
    if kind == "SHM":
        return SHM_LATENCY_S
    if is_direct(kind):
        return NVLINK_LATENCY_S
    return SWITCH_LATENCY_S if kind in ("PIX", "PXB") else HOST_LATENCY_S


def _nvlink_rate_of(gpu: "Gpu") -> float:
    device = device_of(gpu)
    if device is not None and nvlink_count(device.scale_up_token):
        return device.scale_up_bytes_per_s / nvlink_count(device.scale_up_token)
    if device is None and gpu.nvlink_version in _BY_VERSION and gpu.compute_capability != (8, 6):
        return _BY_VERSION[gpu.nvlink_version]
    capability = gpu.compute_capability or (device.compute_capability if device else None)
    return _NVLINK_BYTES_PER_S.get(capability or (7, 0), 25e9)


def _mesh_rate_of(gpu: "Gpu") -> float:
    device = device_of(gpu)
    if device is None or device.scale_up_token != "XGMI":
        return pcie_rate_of(gpu)
    return device.scale_up_bytes_per_s / (device.scale_up_domain - 1)
