"""A GPU as a listing names it: of `nvidia-smi`, its `-L`, `-q` and `--query-gpu`, or of AMD's."""

from dataclasses import dataclass

from rankwright.topology.devices import DEVICES, device_key
from rankwright.topology.readers.found import FoundGpu


@dataclass(frozen=True, slots=True)
class ListedGpu:
    """What a listing says about one GPU; None where it does not say.

    `index` is None where only a part of the machine is shown and the position is not given. A name
    that the tool cut to its column ends in `...`.
    """

    index: int | None
    name: str | None
    uuid: str | None = None
    bus_id: str | None = None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    mig: bool | None = None
    mig_devices: tuple[str, ...] = ()
    ecc: bool | None = None
    power_limit_w: float | None = None
    num_processes: int | None = None
    driver: str | None = None
    pcie_width_now: int | None = None
    default_power_limit_w: float | None = None
    max_clock_hz: float | None = None
    set_clock_hz: float | None = None
    default_clock_hz: float | None = None
    numa_node: int | None = None


def found_gpu(gpu: ListedGpu) -> FoundGpu:
    """Return the listed GPU for assembly; memory that is not listed is the device table's.

    Raises:
        ValueError: Index or name is missing, or the size and the table does not have the name.
    """
    if gpu.name is None:
        raise ValueError("the list does not say which GPU is which; list index and name of all")
    total = gpu.memory_total_bytes
    if total is None:
        total = DEVICES[device_key(gpu.name)].memory_bytes
    return FoundGpu(
        index=index_of(gpu),
        name=gpu.name,
        total_memory_bytes=max(total, 1),
        free_memory_bytes=total if gpu.memory_free_bytes is None else gpu.memory_free_bytes,
        uuid=gpu.uuid if gpu.uuid and gpu.uuid.startswith("GPU-") else None,
        bus_id=gpu.bus_id,
        compute_capability=gpu.compute_capability,
        pcie_generation=gpu.pcie_generation,
        pcie_width=gpu.pcie_width,
        numa_node=gpu.numa_node,
        num_processes=gpu.num_processes or 0,
        mig=bool(gpu.mig or gpu.mig_devices),
        sm_clock_hz=gpu.max_clock_hz,
        pcie_width_now=gpu.pcie_width_now,
        power_limit_w=gpu.power_limit_w,
        default_power_limit_w=gpu.default_power_limit_w,
        set_clock_hz=gpu.set_clock_hz,
        default_clock_hz=gpu.default_clock_hz,
    )


def index_of(gpu: ListedGpu) -> int:
    """Return the index of a listed GPU.

    Raises:
        ValueError: The list shows a part of the machine and does not say which.
    """
    if gpu.index is None:
        raise ValueError("the list does not say which GPU is which; list index and name of all")
    return gpu.index
