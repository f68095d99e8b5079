"""Reads the GPUs of this machine and the links between them through NVML (package nvidia-ml-py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

from rankwright.topology.errors import ProbeError, failure_of
from rankwright.topology.readers.assemble import FoundGpu, FoundMachine
from rankwright.topology.readers.nvml_health import health_notes

# Names of NVML errors at start, and the failure that each is.
_INIT_FAILURES = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": "nvml_library_not_found",
    "NVML_ERROR_DRIVER_NOT_LOADED": "driver_not_loaded",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "driver_library_mismatch",
    "NVML_ERROR_GPU_IS_LOST": "device_lost",
    "NVML_ERROR_OPERATING_SYSTEM": "gpu_access_blocked",
    "NVML_ERROR_NO_PERMISSION": "no_permission",
    "NVML_ERROR_NOT_FOUND": "no_devices",
    "NVML_ERROR_UNKNOWN": "nvml_unknown_error",
}

_P2P_READ = 0  # nvmlGpuP2PCapsIndex_t; the binding's NVML_P2P_CAPS_INDEX_READ is a tuple by slip

_AFFINITY_WORDS = 4  # of 64 bits: 256 NUMA domains

# nvmlGpuTopologyLevel_t: the closest common ancestor of two devices on PCIe.
_ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


@dataclass(frozen=True, slots=True)
class _NvLinks:
    """Active NVLinks of one GPU: to each other GPU by bus id, and to anything else."""

    to_bus: dict[str, int]
    to_switch: int


def read_nvml(sysfs: Path = Path("/sys")) -> FoundMachine:
    """Return what NVML knows of this machine.

    NVML numbers GPUs by PCI bus id, and so do we.

    Raises:
        ProbeError: The binding or the library is missing, the driver does not answer, or no GPU.
    """
    try:
        nvml = import_module("pynvml")  # only here: a login node has no driver
    except ImportError:
        raise ProbeError(
            "nvml_binding_missing",
            "the Python package nvidia-ml-py is not installed; `pip install nvidia-ml-py`",
        ) from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _as_probe_error(nvml, error) from None
    try:
        return _read(nvml, sysfs)
    except nvml.NVMLError as error:
        raise _as_probe_error(nvml, error) from None
    finally:
        nvml.nvmlShutdown()


def _read(nvml: Any, sysfs: Path) -> FoundMachine:
    count = nvml.nvmlDeviceGetCount()
    if count == 0:
        raise failure_of("no_devices", "NVML counts 0 devices")
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    buses = [_text(nvml.nvmlDeviceGetPciInfo(handle).busId) for handle in handles]
    gpus = tuple(
        _read_gpu(nvml, index, handle, bus, sysfs)
        for index, (handle, bus) in enumerate(zip(handles, buses, strict=True))
    )
    nvlinks = [_read_nvlinks(nvml, handle, buses) for handle in handles]
    kinds: dict[tuple[int, int], str] = {}
    staged: list[tuple[int, int]] = []
    for a, b in combinations(range(count), 2):
        links = _nvlinks_between(nvml, handles, buses, nvlinks, a, b)
        kinds[a, b] = f"NV{links}" if links else _pcie_kind(nvml, handles[a], handles[b])
        readable = _p2p_status(nvml, handles[a], handles[b], _P2P_READ)
        if not links and readable not in (None, nvml.NVML_P2P_STATUS_OK):
            staged.append((a, b))
    notes: list[str] = []
    if staged:
        notes.append(
            f"no peer-to-peer access between {len(staged)} of {len(kinds)} pairs of GPUs (first "
            f"{staged[0]}): their traffic is staged in host memory"
        )
    for index, handle in enumerate(handles):
        notes += health_notes(nvml, _ask, index, handle)
    driver = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
    return FoundMachine(gpus, kinds, _text(driver) if driver else None, tuple(notes))


def _read_gpu(nvml: Any, index: int, handle: Any, bus: str, sysfs: Path) -> FoundGpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    mig = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    sm_mhz = _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)
    memory_mhz = _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM)
    uuid = _ask(nvml, nvml.nvmlDeviceGetUUID, handle)
    return FoundGpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total_memory_bytes=memory.total,
        free_memory_bytes=memory.free,
        uuid=_text(uuid) if uuid else None,
        bus_id=bus,
        compute_capability=(capability[0], capability[1]) if capability else None,
        # The most that device and slot can do together: an idle link runs at a lower generation.
        pcie_generation=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle) or None,
        pcie_width=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle) or None,
        numa_node=_numa_node(nvml, handle, bus, sysfs),
        num_processes=len(_ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()),
        mig=bool(mig and mig[0]),
        cuda_cores=_ask(nvml, nvml.nvmlDeviceGetNumGpuCores, handle),
        sm_clock_hz=sm_mhz * 1e6 if sm_mhz else None,
        memory_clock_hz=memory_mhz * 1e6 if memory_mhz else None,
        memory_bus_bits=_ask(nvml, nvml.nvmlDeviceGetMemoryBusWidth, handle),
    )


def _read_nvlinks(nvml: Any, handle: Any, buses: Sequence[str]) -> _NvLinks:
    to_bus: dict[str, int] = {}
    to_switch = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        state = _ask(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link)
        if state is None:  # past the last link of this GPU, or no NVLink at all
            break
        if state != nvml.NVML_FEATURE_ENABLED:
            continue
        remote = _ask(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
        bus = _text(remote.busId) if remote is not None else ""
        kind = _ask(nvml, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        if bus in buses:
            to_bus[bus] = to_bus.get(bus, 0) + 1
        elif kind in (None, nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH):
            # Drivers before 460 do not tell the type; virtual machines hide the switch's bus id.
            to_switch += 1
    return _NvLinks(to_bus, to_switch)


def _nvlinks_between(
    nvml: Any,
    handles: Sequence[Any],
    buses: Sequence[str],
    links: Sequence[_NvLinks],
    a: int,
    b: int,
) -> int:
    direct = links[a].to_bus.get(buses[b], 0)
    if direct:
        return direct
    switched = min(links[a].to_switch, links[b].to_switch)
    if not switched:
        return 0
    # Links to a switch carry nothing until the fabric manager has set up the routes.
    status = _p2p_status(nvml, handles[a], handles[b], nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    return switched if status in (None, nvml.NVML_P2P_STATUS_OK) else 0


def _pcie_kind(nvml: Any, a: Any, b: Any) -> str:
    level = _ask(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, a, b)
    return _ANCESTORS.get(-1 if level is None else level, "SYS")


def _p2p_status(nvml: Any, a: Any, b: Any, capability: int) -> int | None:
    status = _ask(nvml, nvml.nvmlDeviceGetP2PStatus, a, b, capability)
    return None if status is None else int(status)


def _numa_node(nvml: Any, handle: Any, bus: str, sysfs: Path) -> int | None:
    """Return the domain of sysfs, or where a container hides that, the only one near the GPU."""
    domain, _, rest = bus.lower().partition(":")
    path = sysfs / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node"
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        node = -1
    if node >= 0:
        return node
    scope = nvml.NVML_AFFINITY_SCOPE_NODE
    words = _ask(nvml, nvml.nvmlDeviceGetMemoryAffinity, handle, _AFFINITY_WORDS, scope) or ()
    near = [
        at * 64 + bit for at, word in enumerate(words) for bit in range(64) if int(word) >> bit & 1
    ]
    return near[0] if len(near) == 1 else None


def _ask(nvml: Any, function: Callable[..., Any], *args: object) -> Any:
    """Return what NVML answers, or None where this GPU or driver does not support the question."""
    try:
        return function(*args)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _as_probe_error(nvml: Any, error: Any) -> ProbeError:
    kinds = {getattr(nvml, name): kind for name, kind in _INIT_FAILURES.items()}
    return failure_of(kinds.get(error.value, "nvml_unknown_error"), f"NVML: {error}")
