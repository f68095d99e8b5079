"""Turns what a reader found about GPUs and pairs into `Gpu` and `Link` values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from rankwright.topology.architectures import ARCHITECTURES, derived_flops_per_s
from rankwright.topology.cluster import Cluster, Gpu, Link, Node
from rankwright.topology.devices import DEVICES, device_key
from rankwright.topology.errors import ProbeError
from rankwright.topology.link_kinds import is_direct, link_bytes_per_s, link_latency_s
from rankwright.topology.readers.found import FoundGpu, FoundMachine
from rankwright.topology.readers.limits import limits_of


def make_cluster(
    machine: FoundMachine,
    source: str,
    *,
    name: str = "captured",
    num_cpus: int = 1,
    host_memory_bytes: int = 0,
) -> Cluster:
    """Return the machine as a cluster of one node, with notes on what was left out or derived.

    Raises:
        ProbeError: No GPU of the machine is supported; `kind` is `unsupported_gpu`.
    """
    gpus: list[Gpu] = []
    notes = list(machine.notes)
    for found in machine.gpus:
        try:
            gpu, about = make_gpu(found)
        except ValueError as error:  # a display card beside the accelerators, say
            notes.append(f"GPU {found.index} is left out: {error}")
            continue
        gpus.append(gpu)
        notes += about
        if gpu.mig:
            notes.append(f"GPU {gpu.index} is in MIG mode: only slices of it can be used")
    if not gpus:
        raise ProbeError("unsupported_gpu", "; ".join(notes))
    links = make_links(gpus, machine.kinds)
    notes += _missing_links(gpus, links)
    node = Node(
        name=name,
        gpus=tuple(gpus),
        links=links,
        nics=machine.nics,
        num_cpus=num_cpus,
        host_memory_bytes=host_memory_bytes,
        driver=machine.driver,
    )
    return Cluster(nodes=(node,), source=source, notes=tuple(notes))


def with_numa(
    found: Sequence[FoundGpu], nodes: Sequence[str | None] | None
) -> tuple[FoundGpu, ...]:
    """Return the GPUs with the NUMA nodes that a table printed for them; ranges are none."""
    return tuple(
        replace(gpu, numa_node=int(node) if node is not None and node.isdecimal() else None)
        for gpu, node in zip(found, nodes or (None,) * len(found), strict=True)
    )


def make_gpu(found: FoundGpu) -> tuple[Gpu, list[str]]:
    """Return the GPU, with notes where its rates were derived or something limits them.

    Raises:
        ValueError: The device table lacks it, and the driver says too little to derive its rates.
    """
    notes: list[str] = []
    bandwidth: float | None = None
    flops: dict[str, float] | None = None
    try:
        key = device_key(found.name, found.total_memory_bytes)
    except ValueError as unknown:
        key = slug(found.name)
        bandwidth, flops = _derived_rates(found, str(unknown))
        notes.append(
            f"GPU {found.index} ({found.name}) is not in the device table; its rates are derived "
            "from its clocks and units"
        )
    device = DEVICES.get(key)
    limits = limits_of(found, device.boost_hz if device is not None else None)
    notes += limits.notes
    if limits.flops_share < 1:
        rates = flops if device is None else device.flops_per_s
        flops = {dtype: rate * limits.flops_share for dtype, rate in (rates or {}).items()}
    gpu = Gpu(
        index=found.index,
        device=key,
        name=found.name,
        memory_bytes=max(found.free_memory_bytes, 1),
        total_memory_bytes=found.total_memory_bytes,
        compute_capability=found.compute_capability,
        uuid=found.uuid,
        pcie_generation=found.pcie_generation,
        pcie_width=limits.pcie_width,
        nvlink_version=found.nvlink_version,
        numa_node=found.numa_node,
        num_processes=found.num_processes,
        mig=found.mig,
        memory_bytes_per_s=bandwidth,
        flops_per_s=flops,
    )
    return gpu, notes


def make_links(gpus: Sequence[Gpu], kinds: Mapping[tuple[int, int], str]) -> tuple[Link, ...]:
    """Return a link for every pair of GPUs; `kinds` is keyed by GPU indices, smaller first."""
    links: list[Link] = []
    for a, b in combinations(sorted(gpus, key=lambda gpu: gpu.index), 2):
        kind = kinds.get((a.index, b.index), "SYS")
        links.append(
            Link(
                a=a.index,
                b=b.index,
                kind=kind,
                bytes_per_s=link_bytes_per_s(kind, a, b),
                latency_s=link_latency_s(kind),
            )
        )
    return tuple(links)


def _missing_links(gpus: Sequence[Gpu], links: Sequence[Link]) -> list[str]:
    """Return a note on each kind of GPU that always has direct links and shows none."""
    notes: list[str] = []
    for key in sorted({gpu.device for gpu in gpus}):
        device, members = DEVICES.get(key), {gpu.index for gpu in gpus if gpu.device == key}
        own = [link.kind for link in links if {link.a, link.b} <= members]
        if device is None or device.scale_up not in ("nvswitch", "mesh") or not own:
            continue
        if not any(map(is_direct, own)):
            word = "XGMI" if device.scale_up_token == "XGMI" else "NVLink"
            notes.append(
                f"no two of the {len(members)} {key} are joined by {word}, which such boards have: "
                "a virtual machine may hide it, `nvidia-smi topo -mp` leaves it out, and without "
                "its fabric manager it is off"
            )
    return notes


def slug(name: str) -> str:
    """Return a device key for a GPU without a row.

    >>> slug("NVIDIA GeForce RTX 2080 Ti")
    'geforce-rtx-2080-ti'
    """
    plain = re.sub(r"^(NVIDIA|Tesla|AMD)\s+", "", name.strip())
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-") or "unknown"


def _derived_rates(found: FoundGpu, unknown: str) -> tuple[float, dict[str, float]]:
    clocks = (found.memory_bus_bits, found.memory_clock_hz, found.cuda_cores, found.sm_clock_hz)
    capability = found.compute_capability
    if capability not in ARCHITECTURES or any(value is None for value in clocks):
        raise ValueError(unknown)
    assert capability is not None
    assert found.memory_bus_bits is not None
    assert found.memory_clock_hz is not None
    assert found.cuda_cores is not None
    assert found.sm_clock_hz is not None
    # Two transfers a clock, on the clock that NVML reports: a 4090's 384 bits at 10,501 MHz are
    # its 1008 GB/s, an H100's 5120 bits at 2,619 MHz its 3352.
    bandwidth = found.memory_bus_bits / 8 * found.memory_clock_hz * 2
    num_sms = found.cuda_cores / ARCHITECTURES[capability].cuda_cores
    return bandwidth, derived_flops_per_s(found.name, capability, num_sms, found.sm_clock_hz)
